"""Temporal's API key: from the environment or a file, over TLS only, and in no log."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from runtime import temporal_connection
from runtime.settings import Settings

KEY = "an-api-key-that-nobody-else-may-see"
TLS_HANDSHAKE = b"\x16"
PLAIN_HTTP2 = b"PRI * HTTP/2.0"


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("ADDRESS", "NAMESPACE", "PROFILE", "API_KEY", "CONFIG_FILE", "TLS"):
        monkeypatch.delenv(f"TEMPORAL_{name}", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@asynccontextmanager
async def listener() -> AsyncIterator[tuple[str, list[bytes]]]:
    """A port that answers nothing; its address, and the first bytes of each connection."""
    seen: list[bytes] = []

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.read(4096))
        writer.close()

    server = await asyncio.start_server(take, "127.0.0.1", 0)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", seen


async def first_bytes() -> bytes:
    """What leaves this process first when it connects as every program does."""
    async with listener() as (address, seen):
        with contextlib.suppress(RuntimeError, TimeoutError):
            settings = Settings(_env_file=None, temporal_address=address)
            await asyncio.wait_for(temporal_connection.connect(settings), 5)
    return b"".join(seen)


async def test_a_key_leaves_over_tls_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (await first_bytes()).startswith(PLAIN_HTTP2)
    monkeypatch.setenv("TEMPORAL_API_KEY", KEY)
    sent = await first_bytes()
    assert sent.startswith(TLS_HANDSHAKE) and KEY.encode() not in sent


async def test_a_key_may_come_from_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "temporal.toml"
    file.write_text(
        f'[profile.cloud]\naddress = "images.a1b2c.tmprl.cloud:7233"\nnamespace = "images.a1b2c"\napi_key = "{KEY}"\n'
    )
    monkeypatch.setenv("TEMPORAL_CONFIG_FILE", str(file))
    settings = Settings(_env_file=None, temporal_profile="cloud")
    client = await temporal_connection.connect(settings, lazy=True)
    config = client.service_client.config
    assert (config.target_host, client.namespace) == ("images.a1b2c.tmprl.cloud:7233", "images.a1b2c")
    assert client.api_key == KEY and config.tls


async def test_certificates_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEMPORAL_TLS_CLIENT_CERT_DATA", "a certificate")
    monkeypatch.setenv("TEMPORAL_TLS_CLIENT_KEY_DATA", "its key")
    client = await temporal_connection.connect(Settings(_env_file=None), lazy=True)
    tls = client.service_client.config.tls
    assert not isinstance(tls, bool) and tls is not None
    assert (tls.client_cert, tls.client_private_key) == (b"a certificate", b"its key")
