"""The activities on the task store: claim with policy, failures by name, and a breaker for local tries."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from temporalio.exceptions import ApplicationError
from temporalio.testing import ActivityEnvironment

from activities.task_store import BREAK_SECONDS, LocalBreaker, TaskStoreActivities
from comfyui_temporal.contracts.policy import Policy
from comfyui_temporal.contracts.task_store import TaskClaim
from store import TaskStore
from tests.conftest import unique
from tests.store.facts import claim_of, fact, new_task_id, write_of

UNREACHABLE = "postgresql://user:secret-word@127.0.0.1:1/tasks"


def policy_of(claim: TaskClaim) -> Policy:
    return Policy(
        callback_url=f"http://gateway/callbacks/comfyui/{claim.task_id}",
        poll_after_seconds=30,
        poll_at_most_seconds=120,
        deadline_factor=3,
        cap_minutes=60,
        queue_sla_minutes=8,
    )


async def run(activity: Any, argument: Any, *, is_local: bool = False) -> Any:
    environment = ActivityEnvironment()
    environment.info = replace(
        environment.info,
        is_local=is_local,
        schedule_to_close_timeout=timedelta(seconds=3),
        start_to_close_timeout=None if is_local else timedelta(seconds=10),
        scheduled_time=datetime.now(UTC),
    )
    return await environment.run(activity, argument)


@pytest.fixture
def activities(task_store: TaskStore) -> TaskStoreActivities:
    return TaskStoreActivities(task_store, policy_of)


@pytest.fixture
async def without_postgresql() -> AsyncIterator[TaskStoreActivities]:
    store = TaskStore(UNREACHABLE)
    yield TaskStoreActivities(store, policy_of)
    await store.close()


async def test_a_claim_answers_with_the_workers_policy(activities: TaskStoreActivities) -> None:
    task_id = new_task_id()

    mine = await run(activities.claim, claim_of(task_id))
    other = await run(activities.claim, claim_of(task_id, "run-2"))

    assert (mine.claimed, other.claimed) == (True, False)
    assert mine.policy.callback_url.endswith(task_id)


async def test_a_write_lands(activities: TaskStoreActivities, task_store: TaskStore) -> None:
    task_id = new_task_id()
    await run(activities.claim, claim_of(task_id))
    await run(activities.write, write_of(task_id, fact("a")), is_local=True)
    assert [event.seq for event in await task_store.events(task_id)] == [1, 2]


@pytest.mark.parametrize("keeps_inputs", [True, False])
async def test_what_was_asked_for_is_stored_unless_a_setting_forbids_it(
    task_store: TaskStore, keeps_inputs: bool
) -> None:
    activities = TaskStoreActivities(task_store, policy_of, keeps_inputs=keeps_inputs)
    task_id, given = new_task_id(), {"prompt": "a lighthouse"}

    await run(activities.claim, claim_of(task_id, input=given))

    stored = await task_store.inputs([task_id])
    assert [found.document for found in stored.values()] == ([given] if keeps_inputs else [])


async def test_a_run_that_holds_no_claim_is_never_tried_again(activities: TaskStoreActivities) -> None:
    task_id = new_task_id()
    await run(activities.claim, claim_of(task_id))
    with pytest.raises(ApplicationError, match=task_id) as failure:
        await run(activities.write, write_of(task_id, fact("a"), run_id="run-2"))
    assert (failure.value.type, failure.value.non_retryable) == ("task_exists", True)

    with pytest.raises(ApplicationError) as failure:
        await run(activities.write, write_of(unique("unclaimed"), fact("a")))
    assert (failure.value.type, failure.value.non_retryable) == ("internal", True)


async def test_postgresql_away_is_retried_with_a_sentence(without_postgresql: TaskStoreActivities) -> None:
    for activity, argument in (
        (without_postgresql.claim, claim_of("task")),
        (without_postgresql.write, write_of("task", fact("a"))),
    ):
        with pytest.raises(ApplicationError) as failure:
            await run(activity, argument)
        assert not failure.value.non_retryable
        assert "127.0.0.1:1/tasks" in failure.value.message
        assert "secret-word" not in failure.value.message


async def test_while_postgresql_hangs_local_tries_fail_immediately_and_visible_ones_go_through() -> None:
    async def says_nothing(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await asyncio.sleep(30)
        finally:
            writer.close()

    server = await asyncio.start_server(says_nothing, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    store = TaskStore(f"postgresql://user@127.0.0.1:{port}/tasks")
    activities = TaskStoreActivities(store, policy_of)
    write = write_of("task", fact("a"))

    async def took(*, is_local: bool) -> float:
        began = time.monotonic()
        with pytest.raises(ApplicationError, match=str(port)) as failure:
            await run(activities.write, write, is_local=is_local)
        assert not failure.value.non_retryable
        return time.monotonic() - began

    assert 1.0 < await took(is_local=True) < 3.0
    assert await took(is_local=True) < 0.5
    assert await took(is_local=True) < 0.5
    assert await took(is_local=False) > 1.0
    await store.close()
    server.close()


def test_after_a_pause_one_local_try_probes_and_a_success_opens_the_way() -> None:
    now = 100.0
    breaker = LocalBreaker(lambda: now)
    assert breaker.lets_through()
    breaker.failed()
    assert not breaker.lets_through()
    now += BREAK_SECONDS
    assert [breaker.lets_through() for _ in range(3)] == [True, False, False]
    now += BREAK_SECONDS
    assert breaker.lets_through()
    breaker.succeeded()
    assert [breaker.lets_through() for _ in range(3)] == [True, True, True]
