"""LoRAs at addresses of allowed hosts: fetched once, checked by their checksum, kept for their tenant alone."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from temporalio.client import Client

from bridge.allowed_hosts import AllowedHosts, FileRefused, FileUnreachable
from bridge.lora_files import REDIRECTS
from tests.bridge.https_host import HttpsHosts, https_hosts
from tests.bridge.native import NativeServer
from tests.bridge.platform import TENANT, BridgePlatform, Json, running_bridge
from tests.bridge.test_loras import CACHE_BYTES, OTHER, cached, delivered
from tests.bridge.test_trainings import MODELS

HOST, STORE = "models.example.org", "cdn.example.org"


def safetensors(weights: bytes = b"weights") -> bytes:
    """A file that begins as the format says: the length of its header, and the header."""
    return (2).to_bytes(8, "little") + b"{}" + weights


def at_address(content: bytes, name: str = "style.safetensors") -> Json:
    """A model's place in a request."""
    return {"model_path": f"https://{HOST}/{name}", "sha256": hashlib.sha256(content).hexdigest(), "strength": 0.5}


@pytest_asyncio.fixture
async def hosts(tmp_path: Path) -> AsyncIterator[HttpsHosts]:
    async with https_hosts(tmp_path, HOST, STORE) as running:
        yield running


@pytest_asyncio.fixture
async def bridge_with_hosts(
    temporal_client: Client, tmp_path: Path, hosts: HttpsHosts
) -> AsyncIterator[BridgePlatform]:
    limits: dict[str, Any] = {"bridge_lora_cache_bytes": CACHE_BYTES, "bridge_lora_hosts": [HOST, STORE]}
    async with running_bridge(temporal_client, tmp_path, **limits) as platform:
        reached(platform.bridge.lora_hosts, hosts)
        yield platform


def reached(allowed: AllowedHosts, hosts: HttpsHosts) -> AllowedHosts:
    """The same, with the hosts of a test behind it."""
    allowed.resolve, allowed.transport = hosts.resolve, hosts
    return allowed


async def test_a_model_at_an_address_goes_to_the_server_that_runs_the_job(
    bridge_with_hosts: BridgePlatform, servers: tuple[NativeServer, NativeServer], hosts: HttpsHosts
) -> None:
    content = safetensors()
    hosts.leads_to[f"{HOST}/style.safetensors"] = f"https://{STORE}/blobs/1?expires=9"
    hosts.files[f"{STORE}/blobs/1?expires=9"] = content
    lora = at_address(content)
    name = f"tenant-{TENANT}/{lora['sha256']}.safetensors"
    for native in servers:
        await native.admin.set(models=MODELS)
        async with bridge_with_hosts.gpu(native):
            await delivered(bridge_with_hosts, loras=[lora])
        assert cached(native)[name] == content
        graph = (await native.admin.sent())[-1].graph
        assert graph["lora-0"]["inputs"]["lora_name"] == f"comfyui-temporal/{name}"
        assert graph["lora-0"]["inputs"]["strength_model"] == 0.5
    assert hosts.requests == [f"{HOST}/style.safetensors", f"{STORE}/blobs/1?expires=9"], "fetched once"
    async with bridge_with_hosts.gpu(servers[0]):
        await delivered(bridge_with_hosts, loras=[lora], **OTHER)
    assert len(hosts.requests) == 4, "another tenant's is another copy"


@pytest.mark.parametrize(
    ("content", "fields", "sentence"),
    [
        (safetensors(b"others"), {}, "its checksum is another one than the task names"),
        (b"\x80\x04\x95 a pickle", {"is_own": True}, "it is not a safetensors file"),
        (b"tiny", {"is_own": True}, "it is not a safetensors file"),
        (safetensors(b"x" * CACHE_BYTES), {"is_own": True}, f"it is larger than {CACHE_BYTES} bytes"),
        (None, {}, "its host answered HTTP 404"),
    ],
)
async def test_what_is_not_the_model_ends_the_job_before_any_server_has_it(
    bridge_with_hosts: BridgePlatform,
    native: NativeServer,
    hosts: HttpsHosts,
    content: bytes | None,
    fields: Json,
    sentence: str,
) -> None:
    await native.admin.set(models=MODELS)
    before = cached(native)
    if content is not None:
        hosts.files[f"{HOST}/style.safetensors"] = content
    lora = at_address(content if fields and content else safetensors())
    async with bridge_with_hosts.gpu(native):
        job = await bridge_with_hosts.submit(template_id="text-to-image", loras=[lora])
        state = await bridge_with_hosts.ended(job["job_id"])
    assert state["error_details"]["code"] == "workflow_invalid"
    assert state["error_details"]["message"].startswith(f"The model of loras.0 cannot be used: {sentence}"), state
    assert await native.admin.submissions() == []
    assert cached(native) == before
    assert not list((bridge_with_hosts.folder / "objects" / "fetched-models").rglob("*.safetensors"))


async def test_a_host_that_is_away_is_tried_again(
    bridge_with_hosts: BridgePlatform, native: NativeServer, hosts: HttpsHosts
) -> None:
    content = safetensors()
    name = f"{HOST}/style.safetensors"
    hosts.files[name], hosts.statuses[name] = content, 503
    await native.admin.set(models=MODELS)
    async with bridge_with_hosts.gpu(native):
        job = await bridge_with_hosts.submit(template_id="text-to-image", loras=[at_address(content)])

        async def was_tried_again() -> bool:
            return len(hosts.requests) > 1

        await bridge_with_hosts.until(was_tried_again)
        del hosts.statuses[name]
        state = await bridge_with_hosts.ended(job["job_id"])
    assert state["error_details"] is None


async def test_an_address_that_is_not_allowed_is_refused_before_the_queue(
    bridge_with_hosts: BridgePlatform, hosts: HttpsHosts
) -> None:
    lora = at_address(safetensors())
    for given, problem in (
        (
            lora | {"model_path": "https://evil.example.com/a.safetensors"},
            f"loras.0.model_path: is on a host that is not allowed; allowed are {HOST}, {STORE}",
        ),
        (
            lora | {"model_path": f"https://user:secret@{HOST}/a.safetensors"},
            "loras.0.model_path: must not contain credentials or a port",
        ),
        (lora | {"sha256": None}, "loras.0.sha256: is needed for a model at an https:// address"),
    ):
        refused = await bridge_with_hosts.post(
            "/jobs", bridge_with_hosts.job_body(template_id="text-to-image", loras=[given])
        )
        assert refused.status_code == 422, refused.text
        assert refused.json()["detail"]["fields"] == [problem]
    assert hosts.requests == []


async def read(allowed: AllowedHosts, address: str, most: int = 100) -> bytes:
    return b"".join([chunk async for chunk in allowed.download(address, most)])


async def test_a_redirect_leads_to_allowed_hosts_only(hosts: HttpsHosts) -> None:
    allowed = reached(AllowedHosts([HOST, STORE], redirects=REDIRECTS), hosts)
    hosts.files[f"{STORE}/a"] = b"content"
    hosts.leads_to |= {
        f"{HOST}/relative": "/next",
        f"{HOST}/next": f"https://{STORE}/a",
        f"{HOST}/foreign": "https://evil.example.com/a",
        f"{HOST}/plain": f"http://{STORE}/a",
        f"{HOST}/metadata": "https://169.254.169.254/latest",
        f"{HOST}/circle": f"https://{HOST}/circle",
    }
    assert await read(allowed, f"https://{HOST}/relative") == b"content"
    for path, reason in (
        ("foreign", "host that is not allowed"),
        ("plain", "must be an https"),
        ("metadata", "host that is not allowed"),
        ("circle", f"more than {REDIRECTS} redirects are not followed"),
    ):
        with pytest.raises(FileRefused, match=reason):
            await read(allowed, f"https://{HOST}/{path}")
    with pytest.raises(FileRefused, match="answered HTTP 302; redirects are not followed"):
        await read(reached(AllowedHosts([HOST, STORE]), hosts), f"https://{HOST}/relative")


async def test_a_host_proves_its_name_and_keeps_to_the_limit(hosts: HttpsHosts) -> None:
    allowed = reached(AllowedHosts([".example.org"]), hosts)
    hosts.files[f"{HOST}/a"] = hosts.files["other.example.org/a"] = b"x" * 100
    assert await read(allowed, f"https://{HOST}/a") == b"x" * 100
    with pytest.raises(FileRefused, match="larger than 99 bytes"):
        await read(allowed, f"https://{HOST}/a", most=99)
    with pytest.raises(FileUnreachable, match="ConnectError"):
        await read(allowed, "https://other.example.org/a")
