"""Over HTTP: streams that are cut, refusals, tokens that change, gateways that are away."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from urllib.parse import urlsplit

import httpx
import pytest

from comfyui_temporal import (
    AccessDenied,
    GatewayUnavailable,
    HttpTasks,
    ImageTask,
    InvalidInput,
    TaskError,
    TaskExists,
    TaskOver,
    TaskStatus,
    TemporalUnavailable,
    UnexpectedReply,
    UnknownTask,
    WorkerUnavailable,
)
from comfyui_temporal.client.errors import CreditsRefused, start_refused
from comfyui_temporal.client.submission import start_task
from comfyui_temporal.contracts.errors import FailureCode
from comfyui_temporal.contracts.start_answer import CREDITS_REFUSED, ID_REFUSED, INPUT_REFUSED
from gateway.problems import Problem, ProblemCode, input_invalid
from tests.cable import Cable
from tests.package.conftest import STRANGER
from tests.workflows.platform import CALLERS, Platform

ERROR_OF = {
    ProblemCode.INPUT_INVALID: InvalidInput,
    ProblemCode.DATASET_INVALID: InvalidInput,
    ProblemCode.TASK_CONFLICT: TaskExists,
    ProblemCode.INSUFFICIENT_BALANCE: CreditsRefused,
    ProblemCode.QUOTA_EXCEEDED: CreditsRefused,
    ProblemCode.PRICE_MISMATCH: CreditsRefused,
    ProblemCode.CURSOR_INVALID: InvalidInput,
    ProblemCode.UNAUTHENTICATED: AccessDenied,
    ProblemCode.NOT_AUTHORIZED: AccessDenied,
    ProblemCode.TASK_UNKNOWN: UnknownTask,
    ProblemCode.ROUTE_UNKNOWN: UnexpectedReply,
    ProblemCode.METHOD_NOT_ALLOWED: UnexpectedReply,
    ProblemCode.TASK_EXISTS: TaskExists,
    ProblemCode.TASK_OVER: TaskOver,
    ProblemCode.ALREADY_CHARGED: UnexpectedReply,
    ProblemCode.SETTLEMENT_UNKNOWN: UnexpectedReply,
    ProblemCode.STILL_ENDING: UnexpectedReply,
    ProblemCode.TOO_LARGE: InvalidInput,
    ProblemCode.TOO_SLOW: GatewayUnavailable,
    ProblemCode.RATE_LIMITED: GatewayUnavailable,
    ProblemCode.INTERNAL: GatewayUnavailable,
    ProblemCode.TEMPORAL_UNAVAILABLE: TemporalUnavailable,
    ProblemCode.STORE_UNAVAILABLE: GatewayUnavailable,
    ProblemCode.WORKER_UNAVAILABLE: WorkerUnavailable,
    ProblemCode.STORAGE_UNAVAILABLE: GatewayUnavailable,
    ProblemCode.COMFYUI_UNAVAILABLE: GatewayUnavailable,
    ProblemCode.ROUTE_NOT_OFFERED: GatewayUnavailable,
    ProblemCode.TOKENS_UNVERIFIABLE: GatewayUnavailable,
    ProblemCode.DRAINING: GatewayUnavailable,
    ProblemCode.FILE_UNSUPPORTED: InvalidInput,
    ProblemCode.UPLOAD_UNKNOWN: InvalidInput,
    ProblemCode.UPLOAD_EXPIRED: InvalidInput,
    ProblemCode.UPLOADS_NOT_OFFERED: InvalidInput,
    ProblemCode.UPLOAD_OFFSET: UnexpectedReply,
    ProblemCode.PROTOCOL_UNSUPPORTED: UnexpectedReply,
}
"""What a caller gets for each refusal; rollback's own are not among this client's calls."""


def answering(status: int, content: bytes) -> HttpTasks:
    transport = httpx.MockTransport(lambda _: httpx.Response(status, content=content))
    return HttpTasks("http://gateway.test", "token", transport=transport)


async def started(whole: Platform) -> str:
    task = ImageTask.model_validate(whole.image())
    return (await start_task(whole.client, task, task_queue=whole.task_queue)).task_id


@pytest.mark.parametrize("code", list(ProblemCode))
async def test_every_problem_of_the_gateway_is_one_typed_error(code: ProblemCode) -> None:
    response = Problem(code, "A sentence.").response()
    async with answering(response.status_code, bytes(response.body)) as tasks:
        with pytest.raises(TaskError) as raised:
            await tasks.show("task-1")
    assert type(raised.value) is ERROR_OF[code]
    assert raised.value.code == code.value


@pytest.mark.parametrize("code", sorted(CREDITS_REFUSED | INPUT_REFUSED | ID_REFUSED))
async def test_a_start_that_waits_is_refused_alike_by_temporal(code: FailureCode) -> None:
    problem = Problem(ProblemCode(code), "A sentence.").response()
    status = httpx.codes.PAYMENT_REQUIRED if code in CREDITS_REFUSED else problem.status_code
    by_temporal = start_refused("task-1", code, "A sentence.")
    async with answering(status, bytes(problem.body)) as tasks:
        with pytest.raises(TaskError) as over_http:
            await tasks.cancel("task-1")
    assert (type(by_temporal), getattr(by_temporal, "code", None)) == (type(over_http.value), over_http.value.code)


async def test_a_refused_input_names_its_fields() -> None:
    problem = input_invalid([{"loc": ("body", "extras", "x"), "msg": "Value error, is no extra"}]).response()
    async with answering(422, bytes(problem.body)) as tasks:
        with pytest.raises(InvalidInput) as raised:
            await tasks.cancel("task-1")
    assert raised.value.fields == {"extras.x": "is no extra"}


@pytest.mark.parametrize(
    ("status", "content", "error"),
    [
        (502, b"<html>bad gateway</html>", GatewayUnavailable),
        (401, b"", AccessDenied),
        (302, b"", UnexpectedReply),
        (200, b"<html>a login page</html>", UnexpectedReply),
        (200, b'{"task_id": "task-1"}', UnexpectedReply),
    ],
)
async def test_an_unexpected_http_answer_is_a_typed_error(status: int, content: bytes, error: type[TaskError]) -> None:
    async with answering(status, content) as tasks:
        with pytest.raises(error):
            await tasks.show("task-1")


async def test_a_gateway_that_is_away_is_named(unused_tcp_port: int) -> None:
    address = f"http://127.0.0.1:{unused_tcp_port}"
    async with HttpTasks(address, "token", patience_seconds=0) as tasks:
        for call in (tasks.show("task-1"), tasks.wait("task-1"), anext(tasks.follow("task-1"))):
            with pytest.raises(GatewayUnavailable, match=address):
                await call


@pytest.mark.parametrize("address", ["localhost:8180", "ftp://host", "", "https://"])
def test_an_address_without_http_is_refused_at_once(address: str) -> None:
    with pytest.raises(ValueError, match="http"):
        HttpTasks(address, "token")


async def test_events_are_each_seen_once_over_a_cut_stream(whole: Platform, token: str) -> None:
    task_id = await started(whole)
    address = urlsplit(whole.gateway_url)
    seqs: list[int] = []
    async with (
        Cable(lambda: asyncio.open_connection(address.hostname, address.port)).laid() as cable,
        HttpTasks(f"http://127.0.0.1:{cable.port}", token) as tasks,
    ):
        async for event in tasks.events(task_id):
            seqs.append(event.seq)
            if len(seqs) == 2:
                cable.pull()
                cable.plug_in()
    assert seqs == list(range(1, len(seqs) + 1)), "no event is lost and none comes twice"
    assert len(seqs) > 3


async def test_following_continues_from_a_cursor(whole: Platform, token: str) -> None:
    task_id = await started(whole)
    async with HttpTasks(whole.gateway_url, token) as tasks:
        every = [event async for event in tasks.events(task_id)]
        rest = [update async for update in tasks.follow(task_id, cursor=every[1].cursor)]
        assert [update.cursor for update in rest] == [event.cursor for event in every[2:]]
        assert rest[-1].status is TaskStatus.COMPLETED
        assert [update async for update in tasks.follow(task_id, cursor=every[-1].cursor)] == []


async def test_a_generator_that_is_left_closes_its_stream(whole: Platform, token: str) -> None:
    task = ImageTask.model_validate(whole.image())
    await whole.simulators.admin.comfyui.fault("job_stall", route="submit_job", task_id=task.task_id)
    async with HttpTasks(whole.gateway_url, token) as tasks:
        await tasks.start(task)
        async with aclosing(tasks.follow(task.task_id)) as updates:
            assert (await anext(updates)).task_id == task.task_id
        assert await tasks.cancel(task.task_id) == "accepted"
        assert (await tasks.wait(task.task_id)).status is TaskStatus.CANCELLED


async def test_another_tenants_task_is_unknown(whole: Platform) -> None:
    task_id = await started(whole)
    stranger = CALLERS.made_for(*STRANGER)
    async with HttpTasks(whole.gateway_url, stranger) as tasks:
        with pytest.raises(UnknownTask):
            await tasks.show(task_id)
        with pytest.raises(UnknownTask):
            await anext(tasks.follow(task_id))
        assert task_id not in {row.task_id async for row in tasks.list(limit=200)}


async def test_a_token_is_made_for_each_call(whole: Platform, token: str) -> None:
    tokens = iter(["expired", token])
    task_id = await started(whole)
    async with HttpTasks(whole.gateway_url, lambda: next(tokens)) as tasks:
        with pytest.raises(AccessDenied):
            await tasks.show(task_id)
        assert (await tasks.show(task_id)).task.task_id == task_id


@pytest.mark.parametrize("unusable", ["SECRET\nWORD", "SECRET WORD", "SECRÉT", "SECRET\x00", "  \n", ""])
async def test_a_token_that_cannot_be_sent_is_refused_and_not_repeated(unusable: str) -> None:
    async with HttpTasks("http://127.0.0.1:9", unusable) as tasks:
        for call in (tasks.show("task-1"), tasks.upload(b"\x89PNG"), anext(tasks.events("task-1"))):
            with pytest.raises(AccessDenied) as refused:
                await call
            assert "SECR" not in str(refused.value)


async def test_a_token_from_a_file_may_end_with_its_line(whole: Platform, token: str) -> None:
    task_id = await started(whole)
    async with HttpTasks(whole.gateway_url, f"{token}\n") as tasks:
        assert (await tasks.show(task_id)).task.task_id == task_id


@pytest.mark.parametrize("cursor", ["a\nb", "é"])
async def test_a_cursor_that_cannot_be_sent_is_refused(cursor: str) -> None:
    async with HttpTasks("http://127.0.0.1:9", "token") as tasks:
        with pytest.raises(InvalidInput) as refused:
            await anext(tasks.events("task-1", cursor=cursor))
        assert refused.value.code == "cursor_invalid"


async def test_a_request_that_is_no_http_is_not_quoted() -> None:
    def refuse(_: httpx.Request) -> httpx.Response:
        raise httpx.LocalProtocolError("Illegal header value b'Bearer SECRET'")

    async with HttpTasks("http://gateway.test", "token", transport=httpx.MockTransport(refuse)) as tasks:
        with pytest.raises(GatewayUnavailable) as refused:
            await tasks.show("task-1")
    assert "SECRET" not in str(refused.value)
