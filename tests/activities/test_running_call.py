"""A call in flight is never cut short: its effect is reported, the pool stays whole, a worker's stop costs no task."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import structlog
from temporalio import activity, workflow
from temporalio.client import WorkflowFailureError, WorkflowHandle
from temporalio.common import RetryPolicy
from temporalio.exceptions import ApplicationError, CancelledError
from temporalio.testing import ActivityEnvironment, WorkflowEnvironment
from temporalio.worker import Worker
from temporalio.worker.workflow_sandbox import SandboxedWorkflowRunner, SandboxRestrictions

from activities.comfyui import ComfyUIActivities, ComfyUIClient
from activities.credits import CreditsActivities, CreditsClient
from activities.datasets import DatasetSnapshots
from activities.lives import Lives
from activities.outside_http import REQUEST_SECONDS
from activities.running_call import SHORTEST_LIMIT_SECONDS, answered, request_limit_seconds
from comfyui_temporal.contracts.calls import Post
from comfyui_temporal.contracts.comfyui import JobAccepted, JobRequest
from comfyui_temporal.contracts.errors import Answer
from store import TaskStore
from tests.activities.calls import PROMPT, SECRET, estimate_post, job_post, tokens
from tests.activities.loopback import Answer as Reply
from tests.activities.loopback import Loopback, Seen, always, error_body, serving
from tests.conftest import unique

NO_TASKS_RUN = Lives(TaskStore("postgresql://unused@127.0.0.1:1/none"))
"""Looks at nothing: what runs here is no task's workflow."""
ACCEPTED = always(202, {"job_id": "job-1", "estimated_cost": 24})
SHUTDOWN = activity.ActivityCancellationDetails(worker_shutdown=True)


class Held:
    """A server's answers, held back until `release` is set."""

    def __init__(self, reply: Reply) -> None:
        self.arrived = asyncio.Event()
        self.release = asyncio.Event()
        self._reply = reply

    async def __call__(self, request: Seen, writer: asyncio.StreamWriter) -> None:
        self.arrived.set()
        await self.release.wait()
        await self._reply(request, writer)


@asynccontextmanager
async def comfyui_before(reply: Reply, *, pool_size: int = 100) -> AsyncIterator[tuple[Loopback, ComfyUIActivities]]:
    async with serving(reply) as server, ComfyUIClient(server.url, tokens(), pool_size=pool_size) as client:
        yield server, ComfyUIActivities(client, NO_TASKS_RUN, DatasetSnapshots("file://.run/objects"))


def environment(**info: Any) -> ActivityEnvironment:
    env = ActivityEnvironment()
    now = datetime.now(UTC)
    usual: dict[str, Any] = {
        "activity_type": "submit_job",
        "workflow_id": "task-task-1",
        "start_to_close_timeout": timedelta(seconds=10),
        "schedule_to_close_timeout": timedelta(minutes=15),
        "scheduled_time": now,
        "started_time": now,
    }
    env.info = replace(env.info, **(usual | info))
    return env


async def within(seconds: float, condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - the condition is another task's doing
            await asyncio.sleep(0.01)


async def test_a_cancelled_submit_that_landed_is_returned() -> None:
    held = Held(ACCEPTED)
    env = environment()
    async with comfyui_before(held) as (server, activities):
        running = asyncio.ensure_future(env.run(activities.submit_job, job_post()))
        await held.arrived.wait()
        env.cancel()
        held.release.set()
        answer = await running
    assert answer.reply is not None
    assert answer.reply.job_id == "job-1"
    assert len(server.seen) == 1


async def test_a_refusal_that_came_after_the_cancel_is_returned() -> None:
    held = Held(always(422, error_body("payload_invalid", "42201")))
    env = environment()
    async with comfyui_before(held) as (_, activities):
        running = asyncio.ensure_future(env.run(activities.submit_job, job_post()))
        await held.arrived.wait()
        env.cancel()
        env.cancel()
        held.release.set()
        answer = await running
    assert answer.refusal is not None


async def test_a_cancelled_call_that_failed_is_cancelled() -> None:
    held = Held(always(503))
    env = environment()
    async with comfyui_before(held) as (_, activities):
        running = asyncio.ensure_future(env.run(activities.submit_job, job_post()))
        await held.arrived.wait()
        env.cancel()
        held.release.set()
        with pytest.raises(asyncio.CancelledError):
            await running


async def test_a_call_that_failed_while_the_worker_stopped_is_retried_not_cancelled() -> None:
    held = Held(always(503))
    env = environment()
    async with comfyui_before(held) as (_, activities):
        running = asyncio.ensure_future(env.run(activities.submit_job, job_post()))
        await held.arrived.wait()
        env.cancel(SHUTDOWN)
        held.release.set()
        with pytest.raises(ApplicationError) as raised:
            await running
    assert (raised.value.type, raised.value.non_retryable) == ("comfyui_unavailable", False)


async def test_a_pool_serves_on_after_thirty_cancellations() -> None:
    """Requests that a cancellation cut would leave a pool of 5 empty (pitfall 15)."""

    async def slow(request: Seen, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.05)
        await ACCEPTED(request, writer)

    async with comfyui_before(slow, pool_size=5) as (server, activities):
        for _ in range(6):
            envs = [environment() for _ in range(5)]
            running = [asyncio.ensure_future(env.run(activities.submit_job, job_post())) for env in envs]
            seen_before = len(server.seen)
            await within(5, lambda seen=seen_before: len(server.seen) > seen)  # type: ignore[misc]
            for env in envs:
                env.cancel()
            answers = await asyncio.gather(*running)
            assert all(answer.reply for answer in answers)
        assert server.connections <= 5
        assert len(server.seen) == 30
        answers = await asyncio.gather(*(environment().run(activities.submit_job, job_post()) for _ in range(5)))
    assert all(answer.reply for answer in answers)


async def test_it_heartbeats_while_the_request_is_in_flight() -> None:
    held = Held(ACCEPTED)
    env = environment()
    beats: list[float] = []
    env.on_heartbeat = lambda *_: beats.append(asyncio.get_running_loop().time())
    async with comfyui_before(held) as (_, activities):
        running = asyncio.ensure_future(env.run(activities.submit_job, job_post()))
        await within(5, lambda: len(beats) >= 3)
        held.release.set()
        await running
    assert 0.4 < beats[1] - beats[0] < 1.0


async def test_a_call_that_is_answered_at_once_does_not_heartbeat() -> None:
    """Each heartbeat would be one more write of Temporal's."""
    env, beats = environment(), list[Any]()
    env.on_heartbeat = lambda *details: beats.append(details)
    async with comfyui_before(ACCEPTED) as (_, activities):
        await env.run(activities.submit_job, job_post())
    assert beats == []


async def test_a_local_activity_does_not_heartbeat() -> None:
    env = environment(is_local=True, schedule_to_close_timeout=timedelta(seconds=3), start_to_close_timeout=None)
    beats: list[object] = []
    env.on_heartbeat = lambda *details: beats.append(details)
    async with comfyui_before(ACCEPTED) as (_, activities):
        await env.run(activities.submit_job, job_post())
    assert beats == []


async def test_a_local_try_ends_before_its_time_does() -> None:
    """It has `schedule_to_close` alone; what is over when the try starts counts (pitfall 33)."""
    held = Held(ACCEPTED)
    env = environment(
        is_local=True,
        scheduled_time=datetime.now(UTC) - timedelta(seconds=2.2),
        schedule_to_close_timeout=timedelta(seconds=3),
        start_to_close_timeout=None,
    )
    assert request_limit_seconds(env.info) == SHORTEST_LIMIT_SECONDS < 0.8
    async with comfyui_before(held) as (_, activities):
        began = asyncio.get_running_loop().time()
        with pytest.raises(ApplicationError) as raised:
            await env.run(activities.submit_job, job_post())
        assert asyncio.get_running_loop().time() - began < REQUEST_SECONDS, "its own limit ended it"
        held.release.set()
    assert raised.value.type == "comfyui_unavailable"


async def test_local_tries_fail_at_once_while_the_party_hangs_and_visible_ones_do_not() -> None:
    """A workflow hears nothing during a local try: only the first may wait for a party that hangs."""
    held = Held(ACCEPTED)
    local = {
        "is_local": True,
        "schedule_to_close_timeout": timedelta(seconds=1.2),
        "start_to_close_timeout": None,
    }
    async with comfyui_before(held) as (server, activities):
        for seconds in (REQUEST_SECONDS, 0.7):  # the usual limit; that of the first try, which the second does not take
            began = asyncio.get_running_loop().time()
            with pytest.raises(ApplicationError) as raised:
                await environment(**local).run(activities.submit_job, job_post())
            assert asyncio.get_running_loop().time() - began < seconds
        assert len(server.seen) == 1
        assert raised.value.type == "comfyui_unavailable"
        held.release.set()
        assert (await environment().run(activities.submit_job, job_post())).reply is not None
        assert (await environment(**local).run(activities.submit_job, job_post())).reply is not None


def test_a_request_ends_before_its_activity_does() -> None:
    assert request_limit_seconds(environment().info) == 9.0
    assert request_limit_seconds(environment(start_to_close_timeout=timedelta(seconds=4)).info) == 3.5
    # A visible activity's time over all of its tries does not shorten one of them: it waits until the party is back.
    last_try = environment(scheduled_time=datetime.now(UTC) - timedelta(minutes=14, seconds=58))
    assert request_limit_seconds(last_try.info) == 9.0


def test_a_local_try_has_what_is_left_of_its_time() -> None:
    def limit(gone: float) -> float:
        scheduled = datetime.now(UTC) - timedelta(seconds=gone)
        local = {"is_local": True, "start_to_close_timeout": None, "scheduled_time": scheduled}
        return request_limit_seconds(environment(schedule_to_close_timeout=timedelta(seconds=3), **local).info)

    assert limit(0) == pytest.approx(2.5, abs=0.2)
    assert limit(1) == pytest.approx(1.5, abs=0.2)
    assert limit(60) == SHORTEST_LIMIT_SECONDS


@pytest.mark.parametrize(
    ("reply", "kind", "retry_delay"),
    [
        (always(503, b"", {"retry-after": "12"}), "comfyui_unavailable", timedelta(seconds=12)),
        (always(429, error_body("rate_limited", "42901")), "comfyui_unavailable", None),
        (always(200, b"<html>"), "reply_invalid", None),
        (always(401), "comfyui_unavailable", None),
    ],
)
async def test_a_missing_answer_is_a_retryable_failure_with_a_code(
    reply: Reply, kind: str, retry_delay: timedelta | None
) -> None:
    async with comfyui_before(reply) as (server, activities):
        with pytest.raises(ApplicationError) as raised:
            await environment().run(activities.submit_job, job_post())
        assert server.url in raised.value.message
    assert (raised.value.type, raised.value.non_retryable) == (kind, False)
    assert raised.value.next_retry_delay == retry_delay
    assert raised.value.__cause__ is None


async def test_one_line_a_call_is_logged_and_it_holds_no_secret() -> None:
    with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
        async with comfyui_before(ACCEPTED) as (server, activities):
            await environment().run(activities.submit_job, job_post())
            server.answer = always(422, error_body("template_not_found", "40402"))
            await environment(attempt=2).run(activities.submit_job, job_post())
            server.answer = always(503)
            with pytest.raises(ApplicationError):
                await environment().run(activities.submit_job, job_post())
            server.answer = held = Held(always(503))
            running = asyncio.ensure_future((cancelled := environment()).run(activities.submit_job, job_post()))
            await held.arrived.wait()
            await asyncio.sleep(0.05)
            cancelled.cancel()
            held.release.set()
            with pytest.raises(asyncio.CancelledError):
                await running
            bearer = server.seen[0].headers["authorization"].removeprefix("Bearer ")
    outcomes = ["reply", "refused:template_not_found", "comfyui_unavailable", "cancelled"]
    assert [line["outcome"] for line in lines] == outcomes
    assert [line["log_level"] for line in lines] == ["info", "info", "warning", "info"]
    assert {line["task_id"] for line in lines} == {"task-1"}
    assert {line["tenant_id"] for line in lines} == {"tenant-demo"}
    assert {line["workflow_id"] for line in lines} == {"task-task-1"}
    assert all(isinstance(line["milliseconds"], int) and line["milliseconds"] < 60_000 for line in lines)
    assert lines[3]["milliseconds"] >= 50
    assert lines[1]["attempt"] == 2
    for secret in (PROMPT, SECRET, bearer):
        assert secret not in json.dumps(lines, default=str)


async def test_an_error_of_ours_is_logged_by_its_type_alone() -> None:
    async def fails() -> None:
        raise ZeroDivisionError(PROMPT)

    with structlog.testing.capture_logs() as lines, pytest.raises(ZeroDivisionError):
        await environment().run(answered, job_post().call_for, fails())
    assert [(line["outcome"], line["log_level"]) for line in lines] == [("ZeroDivisionError", "warning")]
    assert PROMPT not in json.dumps(lines, default=str)


@pytest.mark.parametrize("attempt", [1, 2, 3])
async def test_an_answer_says_at_which_try_it_came(attempt: int) -> None:
    """An earlier try may have taken effect although it failed: who reads a refusal has to know."""
    async with comfyui_before(ACCEPTED) as (_, activities):
        answer = await environment(attempt=attempt).run(activities.submit_job, job_post())
    assert answer.tries == attempt


@workflow.defn
class OneSubmit:
    """Submits once; a cancellation is taken as the project's flows take it: after the call has ended."""

    @workflow.run
    async def run(self, post: Post[JobRequest]) -> Answer[JobAccepted]:
        return await workflow.execute_activity_method(
            ComfyUIActivities.submit_job,
            post,
            start_to_close_timeout=timedelta(seconds=10),
            heartbeat_timeout=timedelta(seconds=2),
            retry_policy=RetryPolicy(initial_interval=timedelta(milliseconds=100)),
            cancellation_type=workflow.ActivityCancellationType.WAIT_CANCELLATION_COMPLETED,
        )


RUNNER = SandboxedWorkflowRunner(
    restrictions=SandboxRestrictions.default.with_passthrough_modules("activities", "contracts", "tests", "pydantic")
)


class AnsweredAfterCancel(ComfyUIClient):
    """Lets the server answer only after the activity has received its cancellation."""

    release: asyncio.Event

    async def submit_job(self, post: Post[JobRequest]) -> Answer[JobAccepted]:
        submitting = asyncio.ensure_future(super().submit_job(post))
        await activity.wait_for_cancelled()
        self.release.set()
        return await submitting


@asynccontextmanager
async def submitted(
    env: WorkflowEnvironment, held: Held
) -> AsyncIterator[tuple[Loopback, Worker, WorkflowHandle[Any, Answer[JobAccepted]]]]:
    """A run on the real server whose submit has arrived at ComfyUI and is held there."""
    queue = unique("submit")
    async with serving(held) as server, AnsweredAfterCancel(server.url, tokens()) as client:
        client.release = held.release
        activities = ComfyUIActivities(client, NO_TASKS_RUN, DatasetSnapshots("file://.run/objects"))
        async with worker(env, queue, activities) as running:
            run = await env.client.start_workflow(OneSubmit.run, job_post(), id=queue, task_queue=queue)
            async with asyncio.timeout(10):
                await held.arrived.wait()
            yield server, running, run


def worker(env: WorkflowEnvironment, queue: str, activities: ComfyUIActivities) -> Worker:
    return Worker(
        env.client,
        task_queue=queue,
        workflows=[OneSubmit],
        activities=[activities.submit_job],
        workflow_runner=RUNNER,
        graceful_shutdown_timeout=timedelta(0),
    )


async def test_on_a_real_server_a_cancelled_submit_that_landed_is_returned(temporal_env: WorkflowEnvironment) -> None:
    async with submitted(temporal_env, Held(ACCEPTED)) as (server, _, run):
        await run.cancel()
        answer = await run.result()
    assert answer.reply is not None
    assert answer.reply.job_id == "job-1"
    assert len(server.seen) == 1


async def test_on_a_real_server_a_cancelled_submit_that_failed_is_cancelled(temporal_env: WorkflowEnvironment) -> None:
    async with submitted(temporal_env, Held(always(503))) as (server, _, run):
        await run.cancel()
        with pytest.raises(WorkflowFailureError) as raised:
            await run.result()
    assert isinstance(raised.value.cause, CancelledError)
    assert len(server.seen) == 1


async def test_on_a_real_server_a_stopping_worker_leaves_its_submit_to_the_next(
    temporal_env: WorkflowEnvironment,
) -> None:
    """With no grace at all, a worker's stop cancels the activity: that must not look like the workflow's wish."""
    async with submitted(temporal_env, Held(always(503))) as (first_server, first_worker, run):
        await first_worker.shutdown()
        async with (
            comfyui_before(ACCEPTED) as (second_server, activities),
            worker(temporal_env, run.id, activities),
        ):
            answer = await run.result()
    assert answer.reply is not None
    for server in (first_server, second_server):
        assert [seen.headers["x-idempotency-key"] for seen in server.seen] == ["task-1:submit:1"]
    assert first_server.seen[0].body == second_server.seen[0].body


async def test_credits_activities_run_the_same_way() -> None:
    async with (
        serving(always(200, {"selected_cost": 24})) as server,
        CreditsClient(server.url, tokens()) as client,
    ):
        answer = await environment(activity_type="estimate").run(
            CreditsActivities(client, NO_TASKS_RUN).estimate, estimate_post()
        )
    assert answer.reply is not None
    assert answer.reply.selected_cost == 24
