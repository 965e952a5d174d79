"""The figures of all tasks: each counts what it names, and forgets what is over."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from comfyui_temporal.contracts.errors import ErrorDetails, ExceptionCode
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.task_events import EventType
from comfyui_temporal.contracts.task_store import TaskException, TaskWrite
from comfyui_temporal.contracts.tasks import CreditsSummary, SettlementState, TaskStatus
from store import TaskStore, UnseenTask, figures
from store.unsettled import LOOKED_AT_FOR
from tests.conftest import NewDatabase
from tests.store.facts import claim_of, end, fact, new_task_id, write_of


def held(points: int) -> CreditsSummary:
    return CreditsSummary(held=points, pre_deduct_ids=["hold-1"], pre_deduct_count=1)


def ended_unknown(task_id: str, at: datetime, points: int) -> TaskWrite:
    credits = CreditsSummary(held=points, charged=None, returned=None, settlement=SettlementState.UNKNOWN)
    return write_of(task_id, end(ts=at), status=TaskStatus.FAILED, credits=credits)


async def test_open_tasks_and_their_holds_are_counted_until_they_end(new_database: NewDatabase) -> None:
    store = TaskStore(await new_database())
    now = datetime.now(UTC)
    queued, training, renewed = (new_task_id() for _ in range(3))
    await store.claim(claim_of(queued))
    await store.claim(claim_of(training, scene=Scene.MODEL_TRAIN))
    await store.claim(claim_of(renewed))
    of_hold = {"event": EventType.CREDITS, "credits_delta": -24}
    await store.write(write_of(training, fact("held:1", ts=now - timedelta(minutes=20), **of_hold), credits=held(100)))
    # The newest hold of a task counts: the one before it was given back.
    holds = [fact(f"held:{n}", ts=now - timedelta(minutes=age), **of_hold) for n, age in ((1, 50), (2, 10))]
    await store.write(write_of(renewed, *holds, credits=held(24)))

    before = await store.figures()
    await store.write(write_of(training, end(), status=TaskStatus.COMPLETED, credits=held(100), version=2))
    after = await store.figures()

    assert {(row.scene, row.status): (row.tasks, row.points_held) for row in before.open} == {
        (Scene.IMAGE_GENERATE, TaskStatus.QUEUED): (1, 0),
        (Scene.IMAGE_GENERATE, TaskStatus.RUNNING): (1, 24),
        (Scene.MODEL_TRAIN, TaskStatus.RUNNING): (1, 100),
    }
    assert 1_200 <= before.oldest_hold_seconds < 1_260
    assert 600 <= after.oldest_hold_seconds < 660
    assert sum(row.tasks for row in after.open) == 2
    await store.close()


async def test_unknown_settlements_are_the_reconcilers_for_a_day_and_then_a_persons(new_database: NewDatabase) -> None:
    store = TaskStore(await new_database())
    now = datetime.now(UTC)
    for points, at in ((24, now), (50, now - LOOKED_AT_FOR - timedelta(minutes=1))):
        task_id = new_task_id()
        await store.claim(claim_of(task_id))
        await store.write(ended_unknown(task_id, at, points))
    assert [(row.read, row.tasks, row.points) for row in (await store.figures()).unsettled] == [
        ("hourly", 1, 24),
        ("by_hand", 1, 50),
    ]
    await store.close()


async def test_exception_records_of_a_day_are_counted_up_to_a_limit(
    new_database: NewDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = TaskStore(await new_database())
    now, task_id = datetime.now(UTC), new_task_id()
    await store.claim(claim_of(task_id))

    def records(code: ExceptionCode, count: int, age: timedelta) -> list[TaskException]:
        return [TaskException(key=f"{code}:{age}:{n}", code=code, message="m", ts=now - age) for n in range(count)]

    many = records(ExceptionCode.PRICES_DIFFER, figures.MAX_RECORDS + 1, timedelta(hours=1))
    few = records(ExceptionCode.UNDO_UNFINISHED, 2, timedelta(hours=1))
    old = records(ExceptionCode.HOLD_LEFT_TO_EXPIRY, 3, timedelta(hours=25))
    write = write_of(task_id, fact("a"))
    await store.write(write.model_copy(update={"exceptions": [*many, *few, *old]}))
    await store.note_looks(unseen_tasks=[UnseenTask(task_id=task_id, reason="paused")])

    found = await store.figures()

    assert found.exceptions.keys() == set(ExceptionCode)
    assert found.exceptions[ExceptionCode.PRICES_DIFFER] == figures.MAX_RECORDS
    assert found.exceptions[ExceptionCode.UNDO_UNFINISHED] == 2
    assert found.exceptions[ExceptionCode.HOLD_LEFT_TO_EXPIRY] == 0
    assert found.not_looked_at == 1
    await store.close()


async def test_only_the_write_that_stores_the_end_says_so(task_store: TaskStore) -> None:
    task_id = new_task_id()
    await task_store.claim(claim_of(task_id, scene=Scene.MODEL_TRAIN))
    failed: dict[str, Any] = {"status": TaskStatus.FAILED, "error": ErrorDetails(code="internal")}
    first = await task_store.write(write_of(task_id, fact("a")))
    ending = await task_store.write(write_of(task_id, end(), version=2, **failed))
    again = await task_store.write(write_of(task_id, end(), version=2, **failed))
    assert [written and written.ended for written in (first, ending, again)] == [False, True, False]
    assert ending is not None and ending.scene == Scene.MODEL_TRAIN
