"""What bodies of uploads and long orders may take in one gateway process: memory, turns and time."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio
from temporalio.testing import WorkflowEnvironment

from activities.upload_files import UploadFiles
from gateway import body_memory, upload_body
from gateway.upload_body import SentBytes
from gateway.uploads import PART_BYTES
from store import TaskStore
from tests.conftest import unique
from tests.gateway.serving import Gateway, bearer, token_for
from tests.gateway.test_uploads import MP4, PNG, Sender, at_a_gateway, kept_of, part_head
from tests.waiting import comes_true, until

ORDERS = "/api/v1/tasks/images"
ROOM = 2 * PART_BYTES


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


@pytest_asyncio.fixture(loop_scope="session")
async def gateway(
    temporal_env: WorkflowEnvironment, task_store: TaskStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Gateway]:
    """A tenant has room for two bodies of unknown length, all tenants for three."""
    for name, value in (("MOST_BYTES_OF_TENANT", ROOM), ("MOST_BYTES", 3 * PART_BYTES), ("WAIT_SECONDS", 0.2)):
        monkeypatch.setattr(body_memory, name, value)
    async with at_a_gateway(temporal_env, task_store, folder) as served:
        yield served


@asynccontextmanager
async def open_part(
    sender: Sender, upload_id: str, content: bytes, *, length: int = len(MP4)
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A part that says to be longer than what has come of it, at an open connection."""
    reader, writer = await asyncio.open_connection(sender.http.base_url.host, sender.http.base_url.port)
    writer.write(part_head(sender.tenant_id, upload_id, 0, length) + content)
    await writer.drain()
    try:
        yield reader, writer
    finally:
        writer.close()


async def status_of(reader: asyncio.StreamReader, *, within_seconds: float = 10) -> int:
    line = await asyncio.wait_for(reader.readline(), within_seconds)
    return int(line.split()[1])


async def test_bodies_of_one_tenant_take_no_more_than_its_share_of_memory(gateway: Gateway) -> None:
    sender, other = Sender(gateway, unique("tenant")), Sender(gateway, unique("other"))
    async with AsyncExitStack() as held:
        for _ in range(2):
            upload_id = await sender.begun(PART_BYTES)
            await held.enter_async_context(open_part(sender, upload_id, MP4, length=PART_BYTES))

        async def is_refused() -> bool:
            answer = await sender.send(MP4)
            if answer.status_code != 429:
                return False
            assert (answer.json()["code"], int(answer.headers["retry-after"]) > 0) == ("rate_limited", True)
            assert "Too many large bodies" in answer.json()["detail"]
            return True

        await until(is_refused)
        part = await sender.part(await sender.begun(len(MP4)), 0, MP4)
        assert (part.status_code, part.headers["tus-resumable"]) == (429, "1.0.0"), part.text
        assert (await other.send(MP4)).status_code == 201
        upload_id = await other.begun(PART_BYTES)
        async with open_part(other, upload_id, MP4, length=PART_BYTES):
            third = Sender(gateway, unique("third"))

            async def are_all_refused() -> bool:
                return (await third.send(MP4)).status_code == 429

            await until(are_all_refused)

    async def is_taken() -> bool:
        return (await sender.send(MP4)).status_code == 201

    await until(is_taken)


async def test_a_body_waits_for_its_place(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most clients do not send again after a 429."""
    monkeypatch.setattr(body_memory, "WAIT_SECONDS", 10)
    sender = Sender(gateway, unique("tenant"))
    put, running, most, both = UploadFiles.put, 0, 0, asyncio.Event()

    async def slowly(files: UploadFiles, tenant_id: str, upload_id: str, content: bytes) -> object:
        nonlocal running, most
        running += 1
        most = max(most, running)
        if running == 2:
            both.set()
        await both.wait()
        running -= 1
        return await put(files, tenant_id, upload_id, content)

    monkeypatch.setattr(UploadFiles, "put", slowly)
    content = MP4 + b"." * (PART_BYTES - len(MP4) - 1)
    answers = await asyncio.gather(*(sender.send(content) for _ in range(6)))
    assert ({answer.status_code for answer in answers}, most) == ({201}, 2)


async def test_long_orders_share_that_memory(gateway: Gateway) -> None:
    sender = Sender(gateway, unique("tenant"))
    headers = bearer(token_for(sender.tenant_id))
    inline = f"data:image/png;base64,{base64.b64encode(PNG * 200).decode()}"
    order = {"template_id": "t", "prompt": "a", "controls": [{"kind": "pose", "image_url": inline}]}
    async with AsyncExitStack() as held:
        for _ in range(2):
            upload_id = await sender.begun(PART_BYTES)
            await held.enter_async_context(open_part(sender, upload_id, MP4, length=PART_BYTES))

        async def is_refused() -> bool:
            answer = await sender.http.post(ORDERS, json=order, headers=headers)
            if answer.status_code != 429:
                return False
            assert answer.json()["code"] == "rate_limited" and answer.headers["retry-after"]
            return True

        await until(is_refused)
        short = await sender.http.post(ORDERS, json=order | {"controls": []}, headers=headers)
        assert short.status_code == 202, short.text


async def test_a_sender_who_begins_anew_ends_its_broken_connection(
    gateway: Gateway, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the broken one had brought counts; of many at once one has the turn."""
    sender, arrived, chunks = Sender(gateway, unique("tenant")), 0, SentBytes.chunks

    async def counted(body: SentBytes) -> AsyncIterator[bytes]:
        nonlocal arrived
        async for chunk in chunks(body):
            arrived += len(chunk)
            yield chunk

    monkeypatch.setattr(SentBytes, "chunks", counted)
    upload_id = await sender.begun(len(MP4))
    async with AsyncExitStack() as held:
        broken, _ = await held.enter_async_context(open_part(sender, upload_id, MP4[:1_000_000]))
        await comes_true(lambda: arrived == 1_000_000)
        others = await asyncio.gather(*(sender.part(upload_id, 0, MP4) for _ in range(4)))
        assert await status_of(broken) == 204
        assert {(each.status_code, each.headers["upload-offset"]) for each in others} == {(409, "1000000")}
    assert await sender.reached(upload_id) == 1_000_000
    answer = await sender.part(upload_id, 1_000_000, MP4[1_000_000:])
    assert answer.status_code == 204, answer.text
    assert kept_of(folder, sender.tenant_id) == {upload_id: MP4}


async def test_a_sender_who_drips_is_sent_away(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then held a buffer for ever. What comes fast enough may take its time."""
    monkeypatch.setattr(upload_body, "SLOW_SECONDS", 0.6)
    sender = Sender(gateway, unique("tenant"))
    upload_id = await sender.begun(len(MP4))
    async with open_part(sender, upload_id, MP4[:1_000_000]) as (reader, writer):

        async def drip() -> None:
            while True:
                writer.write(b"x")
                await asyncio.sleep(0.05)

        dripping = asyncio.create_task(drip())
        assert await status_of(reader) == 408
        dripping.cancel()
    piece = 150_000
    async with open_part(sender, await sender.begun(8 * piece), MP4[:piece], length=8 * piece) as (reader, writer):
        for start in range(piece, 8 * piece, piece):
            await asyncio.sleep(0.2)
            writer.write(MP4[start : start + piece])
        assert await status_of(reader) == 204


async def test_one_file_is_joined_once_however_many_ask_for_it(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender, join, joins = Sender(gateway, unique("tenant")), UploadFiles.join, 0
    upload_id = await sender.begun(len(MP4))

    async def fails(*_: object) -> None:
        raise OSError

    with monkeypatch.context() as broken:
        broken.setattr(UploadFiles, "join", fails)
        assert (await sender.part(upload_id, 0, MP4)).status_code == 503

    async def counted(files: UploadFiles, tenant_id: str, upload_id: str, names: list[str]) -> object:
        nonlocal joins
        joins += 1
        return await join(files, tenant_id, upload_id, names)

    monkeypatch.setattr(UploadFiles, "join", counted)
    views = await asyncio.gather(*(sender.view(upload_id) for _ in range(20)))
    assert all(view["is_whole"] for view in views), views
    assert joins == 1


async def test_a_small_picture_of_unknown_length_is_taken_whatever_may_be_sent_at_once(
    temporal_env: WorkflowEnvironment, task_store: TaskStore, folder: Path
) -> None:
    async def in_chunks(content: bytes) -> AsyncIterator[bytes]:
        for start in range(0, len(content), 1_000_000):
            yield content[start : start + 1_000_000]

    larger = PNG + b"." * (PART_BYTES + 1 - len(PNG))
    async with at_a_gateway(temporal_env, task_store, folder, whole_bytes=30_000_000) as gateway:
        sender = Sender(gateway, unique("tenant"))
        for content in (PNG, larger):
            answer = await sender.send(in_chunks(content))
            assert (answer.status_code, answer.json().get("size_bytes")) == (201, len(content)), answer.text
        too_large = await sender.send(in_chunks(PNG + b"." * 20_971_520))
        assert (too_large.status_code, "A picture may have" in too_large.text) == (413, True), too_large.text
        assert len(kept_of(folder, sender.tenant_id)) == 2
