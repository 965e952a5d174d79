"""Files that the client sends: at once, in parts, over a line that is cut, and none that no task takes."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
import pytest_asyncio
from temporalio.client import Client
from temporalio.testing import WorkflowEnvironment

from activities.upload_files import UploadFiles
from comfyui_temporal import AccessDenied, GatewayUnavailable, HttpTasks, InputKind, InvalidInput, SyncTasks
from comfyui_temporal.client.uploading import PART_BYTES
from comfyui_temporal.contracts.uploads import UploadView
from gateway.uploads import UploadSettings
from store import TaskStore
from tests.cable import Cable
from tests.conftest import unique
from tests.gateway.serving import Gateway, served, token_for
from tests.waiting import until

PNG = b"\x89PNG\r\n\x1a\n" + b"a picture"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def gateway(
    temporal_env: WorkflowEnvironment, task_store: TaskStore, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Gateway]:
    files = UploadFiles.at(tmp_path_factory.mktemp("uploads").as_uri())
    async with served(temporal_env.client, task_store, uploads=UploadSettings(files)) as gateway:
        yield gateway


@pytest.fixture
def film(tmp_path: Path) -> Path:
    """A video of three parts, the last of which is not full."""
    path = tmp_path / "film.mp4"
    path.write_bytes(b"\x00\x00\x00\x20ftypisom" + os.urandom(2 * PART_BYTES))
    return path


def checksum_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


async def test_a_small_file_is_sent_at_once_and_a_large_one_in_parts(gateway: Gateway, film: Path) -> None:
    async with HttpTasks(str(gateway.http.base_url), token_for(unique("tenant"))) as tasks:
        mask = await tasks.upload(PNG, kind=InputKind.MASK)
        assert (mask.kind, mask.is_whole, mask.size_bytes) == ("image", True, len(PNG))
        for file in (film, str(film)):
            sent = await tasks.upload(file, kind=InputKind.VIDEO)
            assert sent.sha256 == checksum_of(film)
            assert sent.address == f"upload:{sent.upload_id}"


async def test_what_cannot_be_sent_raises_what_is_wrong(gateway: Gateway, film: Path, tmp_path: Path) -> None:
    async with HttpTasks(str(gateway.http.base_url), token_for(unique("tenant"))) as tasks:
        with pytest.raises(InvalidInput, match="none of these") as refused:
            await tasks.upload(b"<html>")
        assert refused.value.code == "file_unsupported"
        with pytest.raises(InvalidInput, match="was said to be of kind audio"):
            await tasks.upload(film, kind=InputKind.AUDIO)
        with pytest.raises(FileNotFoundError):
            await tasks.upload(tmp_path / "missing.png")
    async with HttpTasks(str(gateway.http.base_url), token_for(scopes=["task.read"])) as tasks:
        with pytest.raises(AccessDenied):
            await tasks.upload(PNG)


async def test_an_upload_goes_on_where_its_line_was_cut(gateway: Gateway, film: Path, task_store: TaskStore) -> None:
    tenant_id, port = unique("tenant"), gateway.http.base_url.port

    async def has_begun() -> bool:
        found = await task_store.uploads.of_tenant(tenant_id)
        return bool(found) and found[0].received_bytes > 0

    async with Cable(lambda: asyncio.open_connection("127.0.0.1", port)).laid() as cable:
        tasks = HttpTasks(f"http://127.0.0.1:{cable.port}", token_for(tenant_id))
        sending = asyncio.create_task(tasks.upload(film))
        await until(has_begun)
        cable.pull()
        cable.plug_in()
        sent = await sending
        await tasks.aclose()
    assert sent.sha256 == checksum_of(film)


async def test_a_file_that_becomes_shorter_while_it_is_sent_is_refused(film: Path) -> None:
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.method)
        with film.open("rb+") as file:
            file.truncate(PART_BYTES)
        return of_upload(PART_BYTES * asked.count("PATCH"), 2 * PART_BYTES + 12)

    async with HttpTasks("http://gateway.test", "token", transport=httpx.MockTransport(answer)) as tasks:
        with pytest.raises(InvalidInput, match="shorter"):
            await asyncio.wait_for(tasks.upload(film), 10)
    assert asked.count("PATCH") == 1


async def test_what_a_cut_part_leaves_counts_as_progress(film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part is cut after a moment, as by a proxy with a limit of its own; each leaves something."""
    patience_seconds, received, size = 1.0, 0, 2 * PART_BYTES + 12
    monkeypatch.setattr("comfyui_temporal.client.uploading.PAUSES_SECONDS", (patience_seconds / 3,))

    def answer(request: httpx.Request) -> httpx.Response:
        nonlocal received
        if request.method == "PATCH":
            received = min(size, received + PART_BYTES // 4)
            if received < size:
                raise httpx.WriteError("cut")
        return of_upload(received, size)

    transport = httpx.MockTransport(answer)
    async with HttpTasks(
        "http://gateway.test", "token", patience_seconds=patience_seconds, transport=transport
    ) as tasks:
        assert (await tasks.upload(film)).is_whole


def of_upload(received: int, size: int) -> httpx.Response:
    view = UploadView(
        upload_id="upload-1",
        address="upload:upload-1",
        size_bytes=size,
        received_bytes=received,
        is_whole=received >= size,
        expires_at=datetime(2030, 1, 1, tzinfo=UTC),
    )
    return httpx.Response(200, content=view.model_dump_json())


async def test_without_patience_an_interruption_is_raised(film: Path, unused_tcp_port: int) -> None:
    async with HttpTasks(f"http://127.0.0.1:{unused_tcp_port}", "token", patience_seconds=0) as tasks:
        with pytest.raises(GatewayUnavailable):
            await tasks.upload(film)


async def test_it_is_sent_without_async_too_and_not_by_temporal(
    gateway: Gateway, temporal_env: WorkflowEnvironment
) -> None:
    address = temporal_env.client.service_client.config.target_host

    def script() -> None:
        with SyncTasks.over_http(str(gateway.http.base_url), token_for(unique("tenant"))) as tasks:
            assert tasks.upload(PNG).is_whole
        by_temporal = SyncTasks.by_temporal(lambda: Client.connect(address))
        with by_temporal as tasks, pytest.raises(RuntimeError, match="over_http"):
            tasks.upload(PNG)

    await asyncio.to_thread(script)
