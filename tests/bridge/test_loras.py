"""What a tenant trained is used by its images, on every server, and by nobody else's."""

from __future__ import annotations

import asyncio
import hashlib
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from temporalio.client import Client

from bridge.lora_cache import LoraCache
from bridge.native import NativeServer as NativeClient
from bridge.orders import StoredLora
from bridge.server import Content, PromptRefused, ServerUnavailable
from bridge.storage import Storage
from comfyui_temporal.contracts.prices import PriceTable
from tests.bridge.native import NativeServer
from tests.bridge.platform import TENANT, BridgePlatform, Json, running_bridge
from tests.bridge.test_trainings import MODELS, created, ended, file_of, post_action
from tests.conftest import unique

OTHER = {"tenant_id": "tenant-other", "user_id": "user-other"}
CACHE_BYTES = 5_000


@pytest_asyncio.fixture
async def priced(temporal_client: Client, tmp_path: Path) -> AsyncIterator[BridgePlatform]:
    prices = PriceTable(lora=5)
    async with running_bridge(
        temporal_client, tmp_path, prices=prices, bridge_lora_cache_bytes=CACHE_BYTES
    ) as platform:
        yield platform


def modelled(bridge: BridgePlatform, tenant_id: str = TENANT, content: bytes = b"weights") -> Json:
    """A model as an earlier training of the tenant left it: its place in a request."""
    path = bridge.folder / "objects" / "models" / tenant_id / f"{unique('training')}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return {"model_path": path.as_uri(), "sha256": hashlib.sha256(content).hexdigest(), "strength": 1.0}


def cached(native: NativeServer) -> dict[str, bytes]:
    """The models on a server, below ComfyUI's folder of trained LoRAs; emptied files are left out."""
    folder = native.folder / "output" / "loras" / "comfyui-temporal"
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("tenant-*/*")}
    return {name: content for name, content in found.items() if content}


async def uploads(native: NativeServer) -> int:
    return sum(request.path == "/upload/image" for request in await native.admin.requests())


async def delivered(bridge: BridgePlatform, **fields: Any) -> Json:
    job = await bridge.submit(template_id="text-to-image", **fields)
    state = await bridge.ended(
        job["job_id"], tenant=fields.get("tenant_id", TENANT), user=fields.get("user_id", "user-demo")
    )
    assert state["error_details"] is None, state
    return job | state


async def test_what_a_training_made_is_used_by_an_image(
    priced: BridgePlatform, servers: tuple[NativeServer, NativeServer]
) -> None:
    first, second = servers
    for native in servers:
        await native.admin.set(models=MODELS)
    async with priced.gpu(first):
        training = await created(priced)
        await post_action(priced, training["training_id"], "start")
        output = (await ended(priced, training["training_id"]))["output"]
        assert output["sha256"] == hashlib.sha256(file_of(output["model_path"]).read_bytes()).hexdigest()
        lora = {"model_path": output["model_path"], "sha256": output["sha256"], "strength": 0.7}
        plain = await delivered(priced)
        job = await delivered(priced, loras=[lora])
        assert job["estimated_cost"] == job["actual_cost"] == plain["estimated_cost"] + 5
        graph = (await first.admin.sent())[-1].graph
        name = f"comfyui-temporal/tenant-{TENANT}/{output['sha256']}.safetensors"
        assert graph["lora-0"]["class_type"] == "LoraLoader"
        assert graph["lora-0"]["inputs"] == {
            **{"model": ["checkpoint", 0], "clip": ["checkpoint", 1], "lora_name": name},
            **{"strength_model": 0.7, "strength_clip": 0.7},
        }
        assert graph["sampler"]["inputs"]["model"] == ["lora-0", 0]
        assert graph["positive"]["inputs"]["clip"] == graph["negative"]["inputs"]["clip"] == ["lora-0", 1]
        [file] = (first.folder / "output" / "loras" / "comfyui-temporal").glob("tenant-*/*")
        uploaded_at = file.stat().st_mtime_ns
        await delivered(priced, loras=[lora], prompt="another")
        assert file.stat().st_mtime_ns == uploaded_at, "it was there already"
        assert list(cached(first)) == [name.removeprefix("comfyui-temporal/")]
    async with priced.gpu(second):
        await delivered(priced, loras=[lora])
    assert cached(second) == cached(first), "it goes to whichever server runs the job"


async def test_a_model_that_is_not_the_tenants_is_refused_in_the_same_words(priced: BridgePlatform) -> None:
    own, theirs = modelled(priced), modelled(priced, "tenant-other")
    folder = own["model_path"].rpartition("/")[0]
    name = theirs["model_path"].rpartition("/")[2]
    for address in (
        theirs["model_path"],
        f"{folder}/unknown.safetensors",
        f"{folder}/../tenant-other/{name}",
        f"{folder}/%2e%2e/tenant-other/{name}",
        f"{folder}/%2E%2E%2Ftenant-other%2F{name}",
        folder.replace("models", "results") + "/a.png",
        "file:///etc/passwd",
    ):
        refused = await priced.post(
            "/jobs", priced.job_body(template_id="text-to-image", loras=[own, own | {"model_path": address}])
        )
        assert refused.status_code == 422, (address, refused.text)
        fields = refused.json()["detail"]["fields"]
        assert fields == ["loras.1.model_path: is not the address of a model of this tenant"], address


async def test_loras_that_cannot_be_used_are_refused_before_the_queue(priced: BridgePlatform) -> None:
    one, large = modelled(priced), modelled(priced, content=b"x" * (CACHE_BYTES + 1))
    for fields, problem in (
        ({"template_id": "test-pattern", "loras": [one]}, "loras: template 'test-pattern' accepts none, 1 given"),
        ({"loras": [one] * 9}, "loras: List should have at most 8 items"),
        ({"loras": [one | {"strength": 2.5}]}, "loras.0.strength: Input should be less than or equal to 2"),
        ({"loras": [one | {"sha256": "x"}]}, "loras.0.sha256: String should match"),
        ({"loras": [large]}, f"loras: the models have {CACHE_BYTES + 1} bytes, and a server keeps at most"),
    ):
        refused = await priced.post("/jobs", priced.job_body(**{"template_id": "text-to-image", **fields}))
        assert refused.status_code == 422, refused.text
        assert refused.json()["detail"]["fields"][0].startswith(problem), refused.text


async def test_a_model_that_does_not_match_its_checksum_is_not_used(
    priced: BridgePlatform, native: NativeServer
) -> None:
    await native.admin.set(models=MODELS)
    lora = modelled(priced)
    file_of(lora["model_path"]).write_bytes(b"other weights")
    before = cached(native)
    async with priced.gpu(native):
        job = await priced.submit(template_id="text-to-image", loras=[lora])
        state = await priced.ended(job["job_id"])
    assert state["error_details"]["code"] == "workflow_invalid"
    assert state["error_details"]["message"] == "loras: a model does not match the checksum of its training."
    assert await native.admin.submissions() == []
    assert cached(native) == before


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage((tmp_path / "objects").as_uri())


async def stored(storage: Storage, name: str, size_bytes: int = 40, *, tenant_id: str = TENANT) -> StoredLora:
    content = name.encode().ljust(size_bytes, b".")
    path = f"models/{tenant_id}/{name}.safetensors"
    await storage.write(path, content)
    return StoredLora(path=path, sha256=hashlib.sha256(content).hexdigest(), size_bytes=size_bytes)


async def used(cache: LoraCache, *loras: StoredLora) -> list[str]:
    """One job's use of these models, from its begin to its end."""
    job_id = unique("job")
    names = await cache.take(job_id, TENANT, loras)
    cache.release(job_id)
    return [name.removeprefix("comfyui-temporal/") for name in names]


@pytest_asyncio.fixture
async def server(native: NativeServer) -> AsyncIterator[NativeClient]:
    for name in cached(native):
        (native.folder / "output" / "loras" / "comfyui-temporal" / name).write_bytes(b"")
    async with NativeClient(native.url) as client:
        yield client


async def test_what_was_used_least_recently_goes_first(
    native: NativeServer, server: NativeClient, storage: Storage
) -> None:
    cache = LoraCache(server, storage, "one", limit_bytes=100)
    old, new, next_one = [await stored(storage, name) for name in ("old", "new", "next")]
    (of_old,), (of_new,) = await used(cache, old), await used(cache, new)
    await used(cache, old)
    (of_next,) = await used(cache, next_one)
    assert set(cached(native)) == {of_old, of_next}
    assert sum(map(len, cached(native).values())) <= 100
    assert of_new not in cached(native)
    # Another worker of this server goes on with the same list, and what is gone is sent again.
    cache = LoraCache(server, storage, "one", limit_bytes=100)
    before = await uploads(native)
    await used(cache, old)
    assert await uploads(native) == before
    (native.folder / "output" / "loras" / "comfyui-temporal" / of_next).unlink()
    await used(cache, next_one)
    assert set(cached(native)) == {of_old, of_next}


async def test_what_a_running_job_uses_stays(native: NativeServer, server: NativeClient, storage: Storage) -> None:
    cache = LoraCache(server, storage, "one", limit_bytes=100)
    in_use, idle, next_one = [await stored(storage, name) for name in ("in-use", "idle", "next")]
    await cache.take("job-running", TENANT, [in_use])
    await used(cache, idle)
    names = await used(cache, next_one)
    assert len(cached(native)) == 2
    assert names[0] in cached(native)
    with pytest.raises(PromptRefused, match="leave no room"):
        await cache.take("job-large", TENANT, [await stored(storage, "large", 90)])
    assert any(content.startswith(b"in-use") for content in cached(native).values())
    with pytest.raises(PromptRefused, match="a server keeps at most 100"):
        await used(cache, await stored(storage, "larger", 101))


async def test_a_model_of_a_forgotten_tenant_leaves_the_server(
    native: NativeServer, server: NativeClient, storage: Storage
) -> None:
    cache = LoraCache(server, storage, "one", limit_bytes=1_000)
    forgotten, kept, next_one = [await stored(storage, name) for name in ("forgotten", "kept", "next")]
    await used(cache, forgotten, kept)
    await storage.delete(forgotten.path)
    await used(cache, next_one)
    assert sorted(content[:4] for content in cached(native).values()) == [b"kept", b"next"]


class CutOff(NativeClient):
    """Its server is killed while it receives a file, and keeps the beginning."""

    async def upload(self, name: str, content: Content, **more: Any) -> str:
        assert not isinstance(content, bytes)
        await super().upload(name, (await anext(content.parts))[:5], **more)
        raise ServerUnavailable("the connection was lost")


async def test_a_model_that_was_sent_in_part_is_sent_again(
    native: NativeServer, server: NativeClient, storage: Storage
) -> None:
    model = await stored(storage, "whole")
    async with CutOff(native.url) as cut_off:
        with pytest.raises(ServerUnavailable):
            await used(LoraCache(cut_off, storage, "one", limit_bytes=1_000), model)
    [name] = cached(native)
    assert cached(native)[name] == b"whole"
    assert await used(LoraCache(server, storage, "one", limit_bytes=1_000), model) == [name]
    assert hashlib.sha256(cached(native)[name]).hexdigest() == model.sha256
    sent = await uploads(native)
    await used(LoraCache(server, storage, "one", limit_bytes=1_000), model)
    assert await uploads(native) == sent


async def test_a_large_model_is_never_whole_in_memory(storage: Storage) -> None:
    size, received = 96 * 1024**2, 0

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal received
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.partition("content-length: ")[2].partition("\r")[0])
        while received < length:
            received += len(await reader.read(65_536))
        body = b'{"name": "a.safetensors"}'
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body))
        writer.write(body)
        await writer.drain()
        writer.close()

    model = await stored(storage, "large", size)
    listening = await asyncio.start_server(take, "127.0.0.1", 0)
    async with listening, NativeClient(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}") as client:
        cache = LoraCache(client, storage, "one", limit_bytes=2 * size)
        tracemalloc.start()
        try:
            await used(cache, model)
            _, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert received > size
    assert most < 32 * 1024**2


async def test_a_model_without_a_checksum_is_used_too(
    native: NativeServer, server: NativeClient, storage: Storage
) -> None:
    """The `output` of a training of an earlier release has none."""
    cache = LoraCache(server, storage, "one", limit_bytes=1_000)
    model = await stored(storage, "earlier")
    with_none = model.model_copy(update={"sha256": None})
    assert await used(cache, with_none) == await used(cache, model)
    assert len(cached(native)) == 1
