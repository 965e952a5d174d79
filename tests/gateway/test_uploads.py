"""Uploads over HTTP: at once and in parts (tus), at two gateways, cut off, doubled, too long, foreign, expired."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import itertools
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest
import pytest_asyncio
from temporalio.testing import WorkflowEnvironment

from activities.upload_files import UploadFiles
from comfyui_temporal.contracts.tenant_limits import NO_LIMITS, TenantLimits
from gateway.uploads import PART_BYTES, UploadSettings
from store import StoredUpload, TaskStore
from store.uploads import MAX_PARTS, Received, UploadRows
from tests.conftest import unique
from tests.gateway.serving import Gateway, bearer, gateway_process, served, token_for
from tests.waiting import until

UPLOADS = "/api/v1/uploads"
PNG = b"\x89PNG\r\n\x1a\n" + b"a picture" * 100
MP4 = b"\x00\x00\x00\x20ftypisom" + b"a video." * 500_000
WAV = b"RIFF\x00\x00\x00\x00WAVEfmt " + b"a sound"
LIMITS = {"max_bytes": 32_000_000, "whole_bytes": 10_000_000}


class Sender:
    """A tenant's client of one gateway."""

    def __init__(self, gateway: Gateway, tenant_id: str) -> None:
        self.http = gateway.http
        self.tenant_id = tenant_id
        self._headers = bearer(token_for(tenant_id))

    async def call(self, method: str, upload_id: str = "", content: Any = None, **headers: Any) -> httpx.Response:
        named = {name.replace("_", "-"): str(value) for name, value in headers.items() if value is not None}
        path = f"{UPLOADS}/{upload_id}" if upload_id else UPLOADS
        return await self.http.request(method, path, content=content, headers=self._headers | named)

    async def send(self, content: Any, kind: str | None = None) -> httpx.Response:
        query = f"?kind={kind}" if kind else ""
        return await self.http.post(f"{UPLOADS}{query}", content=content, headers=self._headers)

    async def begun(self, size: int, **headers: Any) -> str:
        """The id of a new upload in parts."""
        answer = await self.call("POST", Tus_Resumable="1.0.0", Upload_Length=size, **headers)
        assert answer.status_code == 201, answer.text
        assert answer.headers["upload-offset"] == "0" and "GMT" in answer.headers["upload-expires"]
        return answer.headers["location"].rpartition("/")[2]

    async def part(self, upload_id: str, at: int, content: Any, **headers: Any) -> httpx.Response:
        given = {"Tus_Resumable": "1.0.0", "Upload_Offset": at, "Content_Type": "application/offset+octet-stream"}
        return await self.call("PATCH", upload_id, content, **given | headers)

    async def reached(self, upload_id: str) -> int:
        answer = await self.call("HEAD", upload_id, Tus_Resumable="1.0.0")
        assert answer.status_code == 200
        return int(answer.headers["upload-offset"])

    async def view(self, upload_id: str) -> dict[str, Any]:
        found: dict[str, Any] = (await self.call("GET", upload_id)).json()
        return found


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("uploads")


@asynccontextmanager
async def at_a_gateway(
    temporal_env: WorkflowEnvironment, store: TaskStore, folder: Path, *, limits: TenantLimits = NO_LIMITS, **more: Any
) -> AsyncIterator[Gateway]:
    settings = UploadSettings(UploadFiles.at(folder.as_uri()), **LIMITS | more)
    async with served(temporal_env.client, store, uploads=settings, limits_of=lambda _: limits) as gateway:
        yield gateway


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def gateways(
    temporal_env: WorkflowEnvironment, task_store: TaskStore, folder: Path
) -> AsyncIterator[tuple[Gateway, Gateway]]:
    async with (
        at_a_gateway(temporal_env, task_store, folder) as first,
        at_a_gateway(temporal_env, task_store, folder) as second,
    ):
        yield first, second


@pytest.fixture
def sender(gateways: tuple[Gateway, Gateway]) -> Sender:
    return Sender(gateways[0], unique("tenant"))


@pytest.fixture
def elsewhere(gateways: tuple[Gateway, Gateway], sender: Sender) -> Sender:
    """The same tenant at the other gateway."""
    return Sender(gateways[1], sender.tenant_id)


def kept_of(folder: Path, tenant_id: str) -> dict[str, bytes]:
    """Path below the tenant's folder → content."""
    own = folder / tenant_id
    return {str(path.relative_to(own)): path.read_bytes() for path in own.rglob("*") if path.is_file()}


# At once


@pytest.mark.parametrize(
    ("content", "kind", "content_type"),
    [(PNG, "image", "image/png"), (WAV, "audio", "audio/wav"), (MP4, "video", "video/mp4")],
)
async def test_a_file_that_is_sent_at_once_is_kept_as_what_it_is(
    sender: Sender, elsewhere: Sender, folder: Path, content: bytes, kind: str, content_type: str
) -> None:
    answer = await sender.send(content)
    assert answer.status_code == 201, answer.text
    view = answer.json()
    assert answer.headers["location"] == f"{UPLOADS}/{view['upload_id']}"
    assert (view["kind"], view["content_type"], view["size_bytes"]) == (kind, content_type, len(content))
    assert view["address"] == f"upload:{view['upload_id']}" and view["is_whole"]
    assert view["sha256"] == hashlib.sha256(content).hexdigest()
    assert await elsewhere.view(view["upload_id"]) == view
    assert kept_of(folder, sender.tenant_id) == {view["upload_id"]: content}


async def test_a_file_of_unknown_length_is_kept_with_the_length_that_it_has(sender: Sender, folder: Path) -> None:
    async def in_chunks(content: bytes) -> AsyncIterator[bytes]:
        for start in range(0, len(content), 1_000_000):
            yield content[start : start + 1_000_000]

    large = MP4 + b"." * (PART_BYTES - len(MP4) + 1)
    for content in (PNG, large):

        async def sent(content: bytes = content) -> httpx.Response | None:
            answer = await sender.send(in_chunks(content))
            return None if answer.status_code == 503 else answer  # a busy store: a sender sends it again

        view = (await until(sent)).json()
        assert (view["size_bytes"], view["is_whole"]) == (len(content), True), view
        assert kept_of(folder, sender.tenant_id)[view["upload_id"]] == content


@pytest.mark.parametrize(
    ("content", "kind", "status", "code"),
    [
        (b"<html>", None, 415, "file_unsupported"),
        (b"", None, 415, "file_unsupported"),
        (b"MZ" + b"\x00" * 100_000, "image", 415, "file_unsupported"),
        (PNG, "video", 422, "input_invalid"),
        (WAV, "mask", 422, "input_invalid"),
        (PNG, "picture", 422, "input_invalid"),
        (MP4 + b"x" * 10_000_000, None, 413, "too_large"),
    ],
    ids=["a page", "nothing", "a program", "a picture as video", "a sound as mask", "no kind", "too large"],
)
async def test_what_no_task_takes_is_refused_and_nothing_of_it_is_kept(
    sender: Sender, task_store: TaskStore, folder: Path, content: bytes, kind: str | None, status: int, code: str
) -> None:
    answer = await sender.send(content, kind)
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert kept_of(folder, sender.tenant_id) == {}
    assert await task_store.uploads.of_tenant(sender.tenant_id) == []


async def test_a_mask_is_a_picture(sender: Sender) -> None:
    assert (await sender.send(PNG, "mask")).json()["kind"] == "image"


async def test_without_storage_the_route_says_what_is_missing(gateway: Gateway) -> None:
    sender = Sender(gateway, unique("tenant"))
    answers = [await sender.send(PNG), await sender.call("GET", "an-id")]
    answers.append(await sender.call("POST", Tus_Resumable="1.0.0", Upload_Length=10))
    for answer in answers:
        assert (answer.status_code, answer.json()["code"]) == (404, "uploads_not_offered")
        assert "COMFYUI_TEMPORAL_UPLOADS_URL" in answer.json()["detail"]


# In parts


async def test_a_file_comes_in_parts_at_two_gateways(sender: Sender, elsewhere: Sender, folder: Path) -> None:
    metadata = f"filename {base64.b64encode(b'my film.mp4').decode()},kind {base64.b64encode(b'video').decode()}"
    upload_id = await sender.begun(len(MP4), Upload_Metadata=metadata)
    cuts = [0, 100, 1_000_000, 1_000_001, len(MP4)]
    for number, (start, end) in enumerate(itertools.pairwise(cuts)):
        view = await elsewhere.view(upload_id)
        assert (view["received_bytes"], view["is_whole"], view["sha256"]) == (start, False, None)
        answer = await (sender, elsewhere)[number % 2].part(upload_id, start, MP4[start:end])
        assert (answer.status_code, answer.headers["upload-offset"]) == (204, str(end)), answer.text
        assert answer.headers["tus-resumable"] == "1.0.0"
    view = await sender.view(upload_id)
    assert (view["is_whole"], view["kind"], view["sha256"]) == (True, "video", hashlib.sha256(MP4).hexdigest())
    head = await elsewhere.call("HEAD", upload_id)
    assert (head.headers["upload-length"], head.headers["upload-metadata"]) == (str(len(MP4)), metadata)
    assert head.headers["cache-control"] == "no-store"
    assert kept_of(folder, sender.tenant_id) == {upload_id: MP4}


async def test_a_part_that_does_not_begin_where_the_last_one_ended_changes_nothing(
    sender: Sender, elsewhere: Sender, folder: Path
) -> None:
    upload_id = await sender.begun(len(PNG))
    assert (await sender.part(upload_id, 0, PNG[:600])).status_code == 204
    for at, content in ((0, PNG[:600]), (500, PNG[500:]), (601, PNG[601:]), (len(PNG), b"")):
        answer = await elsewhere.part(upload_id, at, content)
        assert (answer.status_code, answer.json()["code"]) == (409, "upload_offset")
        assert answer.headers["upload-offset"] == "600"
    assert (await sender.part(upload_id, 600, PNG[600:])).status_code == 204
    again = await sender.part(upload_id, 600, PNG[600:])
    assert (again.status_code, again.headers["upload-offset"]) == (409, str(len(PNG)))
    assert kept_of(folder, sender.tenant_id) == {upload_id: PNG}


async def test_more_bytes_than_were_announced_are_refused_and_not_taken(sender: Sender, folder: Path) -> None:
    async def unannounced() -> AsyncIterator[bytes]:
        yield PNG[600:] + b"more"

    upload_id = await sender.begun(len(PNG))
    await sender.part(upload_id, 0, PNG[:600])
    for content in (PNG[600:] + b"more", unannounced()):
        answer = await sender.part(upload_id, 600, content)
        assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
        assert await sender.reached(upload_id) == 600
    assert (await sender.part(upload_id, 600, PNG[600:])).status_code == 204
    assert kept_of(folder, sender.tenant_id) == {upload_id: PNG}


async def test_of_many_who_send_the_same_part_one_is_taken(sender: Sender, elsewhere: Sender, folder: Path) -> None:
    """Each sends other bytes, at two gateways: the file is made of what was answered 204, and of nothing else."""
    head, rest = PNG[:600], b"." * 5_000
    tails = [bytes([n]) * 1_000 for n in range(10)]
    upload_id = await sender.begun(6_600)
    assert (await sender.part(upload_id, 0, head)).status_code == 204
    answers = await asyncio.gather(
        *((sender, elsewhere)[n % 2].part(upload_id, 600, tail) for n, tail in enumerate(tails))
    )
    taken = [tail for tail, answer in zip(tails, answers, strict=True) if answer.status_code == 204]
    assert len(taken) == 1 and {answer.status_code for answer in answers} == {204, 409}
    answers = await asyncio.gather(*(each.part(upload_id, 1_600, rest) for each in (sender, elsewhere)))
    assert sorted(answer.status_code for answer in answers) == [204, 409]
    assert kept_of(folder, sender.tenant_id) == {upload_id: head + taken[0] + rest}
    assert (await elsewhere.view(upload_id))["sha256"] == hashlib.sha256(head + taken[0] + rest).hexdigest()


async def test_what_is_no_file_of_ours_ends_its_upload_with_the_first_part(sender: Sender, folder: Path) -> None:
    declared = f"kind {base64.b64encode(b'audio').decode()}"
    for content, metadata, status in ((b"<html>" * 200, None, 415), (PNG, declared, 422)):
        upload_id = await sender.begun(1_000_000, Upload_Metadata=metadata)
        assert (await sender.part(upload_id, 0, content)).status_code == status
        assert (await sender.call("HEAD", upload_id)).status_code == 404
    # Too little of it was there to tell.
    upload_id = await sender.begun(12)
    assert (await sender.part(upload_id, 0, b"<ht")).status_code == 204
    assert (await sender.part(upload_id, 3, b"ml></html")).status_code == 415
    assert (await sender.call("HEAD", upload_id)).status_code == 404
    assert kept_of(folder, sender.tenant_id) == {}


async def test_a_picture_that_no_task_takes_for_its_size_is_refused_at_its_first_part(sender: Sender) -> None:
    upload_id = await sender.begun(21 * 1024 * 1024)
    answer = await sender.part(upload_id, 0, PNG)
    assert (answer.status_code, "at most 20971520 bytes" in answer.text) == (413, True), answer.text


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"Upload_Length": None}, 422, "input_invalid"),
        ({"Upload_Length": "0"}, 422, "input_invalid"),
        ({"Upload_Length": "-1"}, 422, "input_invalid"),
        ({"Upload_Length": "many"}, 422, "input_invalid"),
        ({"Upload_Length": "32000001"}, 413, "too_large"),
        ({"Tus_Resumable": "0.2.2"}, 412, "protocol_unsupported"),
        ({"Upload_Metadata": "kind !!!"}, 422, "input_invalid"),
        ({"Upload_Metadata": "kind " + base64.b64encode(b"film").decode()}, 422, "input_invalid"),
        ({"Upload_Metadata": "a " + "x" * 5_000}, 422, "input_invalid"),
    ],
)
async def test_an_upload_that_cannot_be_begun_is_refused_by_name(
    sender: Sender, headers: dict[str, Any], status: int, code: str
) -> None:
    given: dict[str, Any] = {"Tus_Resumable": "1.0.0", "Upload_Length": 10}
    answer = await sender.call("POST", **given | headers)
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    if status == 412:
        assert answer.headers["tus-version"] == "1.0.0"


async def test_a_part_without_protocol_offset_or_type_is_refused(sender: Sender) -> None:
    upload_id = await sender.begun(len(PNG))
    refused: tuple[tuple[dict[str, Any], int], ...] = (
        ({"Tus_Resumable": None}, 412),
        ({"Upload_Offset": None}, 422),
        ({"Upload_Offset": "-1"}, 422),
        ({"Content_Type": "image/png"}, 415),
    )
    for headers, status in refused:
        assert (await sender.part(upload_id, 0, PNG, **headers)).status_code == status, headers
    assert await sender.reached(upload_id) == 0


async def test_too_many_small_parts_are_refused_with_the_size_to_send(
    sender: Sender, task_store: TaskStore, postgres_dsn: str
) -> None:
    upload_id = await sender.begun(1_000_000)
    await sender.part(upload_id, 0, PNG)
    connection = await asyncpg.connect(postgres_dsn)
    await connection.execute(
        "UPDATE uploads SET parts = array_fill('x'::text, ARRAY[$1::int]) WHERE upload_id = $2", MAX_PARTS, upload_id
    )
    await connection.close()
    answer = await sender.part(upload_id, len(PNG), b"more")
    assert (answer.status_code, "at least 1000 bytes" in answer.text) == (413, True), answer.text


async def test_a_deleted_upload_is_gone_with_its_bytes(sender: Sender, elsewhere: Sender, folder: Path) -> None:
    whole = (await sender.send(PNG)).json()["upload_id"]
    begun = await sender.begun(len(MP4))
    await sender.part(begun, 0, MP4[:1_000])
    for upload_id in (whole, begun):
        assert (await elsewhere.call("DELETE", upload_id)).status_code == 204
        for method in ("DELETE", "GET", "HEAD"):
            assert (await sender.call(method, upload_id)).status_code == 404
        assert (await sender.part(upload_id, 1_000, b"x")).status_code == 404
    assert kept_of(folder, sender.tenant_id) == {}


async def test_what_is_offered_of_tus_is_told_to_anybody(sender: Sender) -> None:
    answer = await sender.http.options(UPLOADS)
    assert answer.status_code == 204
    assert answer.headers["tus-version"] == answer.headers["tus-resumable"] == "1.0.0"
    assert answer.headers["tus-extension"] == "creation,expiration,termination"
    assert answer.headers["tus-max-size"] == "32000000"


async def test_a_page_of_an_allowed_origin_may_upload_and_read_how_far_it_is(sender: Sender) -> None:
    asked = {"origin": "https://app.example", "access-control-request-method": "PATCH"}
    asked["access-control-request-headers"] = "authorization,tus-resumable,upload-offset,content-type"
    answer = await sender.http.options(f"{UPLOADS}/an-id", headers=asked)
    assert answer.status_code == 200, answer.text
    assert "PATCH" in answer.headers["access-control-allow-methods"]
    answer = await sender.call("POST", Tus_Resumable="1.0.0", Upload_Length=10, Origin="https://app.example")
    exposed = answer.headers["access-control-expose-headers"].lower()
    assert all(name in exposed for name in ("location", "upload-offset", "tus-resumable", "upload-expires"))


# Tenants, time, limits


async def test_another_tenants_upload_is_answered_like_an_unknown_one(
    sender: Sender, gateways: tuple[Gateway, Gateway], folder: Path
) -> None:
    stranger = Sender(gateways[1], unique("stranger"))
    whole = (await sender.send(PNG)).json()["upload_id"]
    begun = await sender.begun(len(PNG))
    for upload_id in (whole, begun, "unknown"):
        answers = [await stranger.call(method, upload_id) for method in ("GET", "HEAD", "DELETE")]
        answers.append(await stranger.part(upload_id, 0, PNG))
        assert [answer.status_code for answer in answers] == [404] * 4
        assert answers[0].json()["code"] == "upload_unknown"
    assert kept_of(folder, sender.tenant_id) == {whole: PNG}
    assert await sender.reached(begun) == 0


async def test_an_expired_upload_is_gone_for_its_tenant(
    temporal_env: WorkflowEnvironment, task_store: TaskStore, folder: Path
) -> None:
    async with at_a_gateway(temporal_env, task_store, folder, kept=timedelta(seconds=-1)) as gateway:
        sender = Sender(gateway, unique("tenant"))
        begun = await sender.begun(len(PNG))
        for answer in (await sender.call("GET", begun), await sender.part(begun, 0, PNG)):
            assert (answer.status_code, answer.json()["code"]) == (410, "upload_expired")
        assert (await sender.call("HEAD", begun)).status_code == 410


async def test_a_tenant_keeps_no_more_than_its_limits_at_both_gateways_together(
    temporal_env: WorkflowEnvironment, task_store: TaskStore, folder: Path
) -> None:
    limits = TenantLimits(open_uploads=2, upload_bytes=1_000_000)
    async with (
        at_a_gateway(temporal_env, task_store, folder, limits=limits) as first,
        at_a_gateway(temporal_env, task_store, folder, limits=limits) as second,
    ):
        here = Sender(first, unique("tenant"))
        there = Sender(second, here.tenant_id)
        # So that all of the store's connections are open, and the starts really meet.
        await asyncio.gather(*(each.call("GET", "unknown") for each in (here, there) * 5))
        answers = await asyncio.gather(
            *(each.call("POST", Tus_Resumable="1.0.0", Upload_Length=100_000) for each in (here, there) * 5)
        )
        begun = [answer.json()["upload_id"] for answer in answers if answer.status_code == 201]
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert (len(begun), len(answers)) == (2, 10)
        assert "2 unfinished uploads" in refused.text and int(refused.headers["retry-after"]) > 0
        await here.call("DELETE", begun.pop())
        assert (await here.send(PNG)).status_code == 201
        refused = await there.send(MP4)
        assert (refused.status_code, "1000000 bytes of uploads" in refused.text) == (429, True), refused.text
        assert (await Sender(first, unique("other")).send(PNG)).status_code == 201


# Cut off


async def test_what_had_come_before_its_sender_left_counts(sender: Sender, elsewhere: Sender, folder: Path) -> None:
    upload_id = await sender.begun(len(MP4))
    await cut_off(sender, upload_id, MP4[:1_500_000])

    async def has_come() -> bool:
        return await elsewhere.reached(upload_id) == 1_500_000

    await until(has_come)
    assert (await elsewhere.part(upload_id, 1_500_000, MP4[1_500_000:])).status_code == 204
    assert kept_of(folder, sender.tenant_id) == {upload_id: MP4}


async def test_a_file_that_breaks_off_at_once_is_not_kept(sender: Sender, task_store: TaskStore, folder: Path) -> None:
    url = sender.http.base_url
    _, writer = await asyncio.open_connection(url.host, url.port)
    token = token_for(sender.tenant_id)
    head = f"POST {UPLOADS} HTTP/1.1\r\nHost: g\r\nAuthorization: Bearer {token}\r\nContent-Length: 5000\r\n\r\n"
    writer.write(head.encode() + PNG)

    async def is_begun() -> bool:
        return bool(await task_store.uploads.of_tenant(sender.tenant_id))

    await until(is_begun)
    writer.close()

    async def is_gone() -> bool:
        return not await is_begun()

    await until(is_gone)
    assert kept_of(folder, sender.tenant_id) == {}


async def cut_off(sender: Sender, upload_id: str, content: bytes, *, length: int | None = None) -> None:
    """Send a part that says to be longer than it is, and leave."""
    url = sender.http.base_url
    _, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(part_head(sender.tenant_id, upload_id, 0, length or len(MP4)) + content)
    await writer.drain()
    writer.close()
    await writer.wait_closed()


def part_head(tenant_id: str, upload_id: str, at: int, length: int) -> bytes:
    lines = [
        f"PATCH {UPLOADS}/{upload_id} HTTP/1.1",
        "Host: gateway",
        f"Authorization: Bearer {token_for(tenant_id)}",
        "Tus-Resumable: 1.0.0",
        f"Upload-Offset: {at}",
        f"Content-Length: {length}",
        "Content-Type: application/offset+octet-stream",
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


async def test_a_killed_gateway_loses_nothing_that_was_counted(
    temporal_env: WorkflowEnvironment, postgres_dsn: str, sender: Sender, folder: Path
) -> None:
    """The process is killed while it receives a part; another gateway goes on, and the file is right."""
    content = MP4[:16] + os.urandom(2 * PART_BYTES)
    upload_id = await sender.begun(len(content))
    environment = {
        "DATABASE_DSN": postgres_dsn,
        "TEMPORAL_ADDRESS": temporal_env.client.service_client.config.target_host,
        "UPLOADS_URL": folder.as_uri(),
    }
    async with gateway_process(environment) as killed:
        _, writer = await asyncio.open_connection("127.0.0.1", killed.port)
        writer.write(part_head(sender.tenant_id, upload_id, 0, len(content)) + content[: PART_BYTES + 1_000_000])

        async def has_first_part() -> bool:
            return await sender.reached(upload_id) == PART_BYTES

        await until(has_first_part)
        killed.process.kill()
        await killed.process.wait()
        writer.close()
    assert await sender.reached(upload_id) == PART_BYTES
    assert (await sender.part(upload_id, PART_BYTES, content[PART_BYTES:])).status_code == 204
    assert (await sender.view(upload_id))["sha256"] == hashlib.sha256(content).hexdigest()
    assert kept_of(folder, sender.tenant_id) == {upload_id: content}


async def test_a_part_that_the_store_counts_and_is_asked_for_again_is_kept(
    sender: Sender, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store repeats work whose connection broke after it was done (store/database.py)."""
    once = UploadRows.extend

    async def twice(rows: UploadRows, upload_id: str, part: Received) -> StoredUpload | None:
        await once(rows, upload_id, part)
        return await once(rows, upload_id, part)

    monkeypatch.setattr(UploadRows, "extend", twice)
    upload_id = await sender.begun(len(MP4))
    for start, end in ((0, 1_000), (1_000, len(MP4))):
        answer = await sender.part(upload_id, start, MP4[start:end])
        assert (answer.status_code, answer.headers["upload-offset"]) == (204, str(end)), answer.text
    assert kept_of(folder, sender.tenant_id) == {upload_id: MP4}


async def test_a_file_that_was_not_joined_is_joined_by_whoever_asks_for_it(
    sender: Sender, elsewhere: Sender, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the gateway had been killed after the last part was counted."""

    async def fails(*_: Any) -> None:
        raise OSError

    for ask in (elsewhere.view, elsewhere.reached):
        upload_id = await sender.begun(len(MP4))
        with monkeypatch.context() as broken:
            broken.setattr(UploadFiles, "join", fails)
            answer = await sender.part(upload_id, 0, MP4)
            assert (answer.status_code, answer.json()["code"]) == (503, "storage_unavailable")
        await asyncio.gather(*(ask(upload_id) for _ in range(3)))
        assert (await sender.view(upload_id))["sha256"] == hashlib.sha256(MP4).hexdigest()
        assert kept_of(folder, sender.tenant_id)[upload_id] == MP4
    assert not any(".parts" in path for path in kept_of(folder, sender.tenant_id))
