"""What is read: lists with filters and cursors, histories from a cursor on, the training log."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest

from comfyui_temporal.contracts.comfyui import TrainingLogLine
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.task_store import TrainingLogWrite
from comfyui_temporal.contracts.tasks import TaskStatus
from store import CursorInvalid, TaskStore, TaskUnknown
from tests.conftest import NewDatabase, unique
from tests.store.facts import NOON, claim_of, end, fact, new_task_id, write_of


async def test_a_list_is_newest_first_filtered_and_goes_on_at_its_cursor(task_store: TaskStore) -> None:
    tenant = unique("tenant")
    ids = [new_task_id() for _ in range(5)]
    for number, task_id in enumerate(ids):
        scene = Scene.MODEL_TRAIN if number == 3 else Scene.IMAGE_GENERATE
        at = NOON + timedelta(seconds=min(number, 3))
        await task_store.claim(claim_of(task_id, tenant_id=tenant, scene=scene, at=at))
    await task_store.claim(claim_of(new_task_id(), tenant_id=unique("other")))
    await task_store.write(write_of(ids[1], end(), status=TaskStatus.COMPLETED))
    newest_first = [*sorted(ids[3:], reverse=True), *reversed(ids[:3])]

    read: list[str] = []
    cursor: str | None = None
    while True:
        page = await task_store.tasks(tenant_id=tenant, limit=2, cursor=cursor)
        read += [task.task_id for task in page.tasks]
        cursor = page.cursor
        if cursor is None:
            break

    assert read == newest_first
    completed = await task_store.tasks(tenant_id=tenant, status=TaskStatus.COMPLETED)
    assert [task.task_id for task in completed.tasks] == [ids[1]]
    trainings = await task_store.tasks(tenant_id=tenant, scene=Scene.MODEL_TRAIN)
    assert [task.task_id for task in trainings.tasks] == [ids[3]]


async def test_open_tasks_are_oldest_first_quiet_and_go_on_at_their_cursor(new_database: NewDatabase) -> None:
    store = TaskStore(await new_database())
    ids = [new_task_id() for _ in range(4)]
    for number, task_id in enumerate(ids):
        await store.claim(claim_of(task_id, at=NOON + timedelta(seconds=number)))
    await store.write(write_of(ids[1], end(), status=TaskStatus.COMPLETED))

    first = await store.open_tasks(quiet_for=timedelta(0), limit=2)
    rest = await store.open_tasks(quiet_for=timedelta(0), limit=2, cursor=first.cursor)
    quiet = await store.open_tasks(quiet_for=timedelta(minutes=1), limit=2)
    await store.close()

    assert [task.task_id for task in first.tasks + rest.tasks] == [ids[0], ids[2], ids[3]]
    assert rest.cursor is None
    # A claim writes its own time; only later writes use the current time.
    assert [task.task_id for task in quiet.tasks] == [ids[0], ids[2]]


async def test_a_history_goes_on_after_the_cursor_of_any_event(task_store: TaskStore) -> None:
    task_id = new_task_id()
    await task_store.claim(claim_of(task_id))
    await task_store.write(write_of(task_id, *(fact(f"k{n}") for n in range(4))))
    events = await task_store.events(task_id)

    for number, event in enumerate(events):
        assert await task_store.events(task_id, after=event.cursor) == events[number + 1 :]
    assert await task_store.events(task_id, limit=2) == events[:2]


@pytest.mark.parametrize("cursor", ["", "x", "é", "a" * 5_000, "ZQo=", "ZQp0YXNrCi0x", "\0"])
async def test_a_cursor_that_was_never_issued_is_refused(task_store: TaskStore, cursor: str) -> None:
    with pytest.raises(CursorInvalid):
        await task_store.events("task", after=cursor)
    with pytest.raises(CursorInvalid):
        await task_store.tasks(cursor=cursor)


async def test_a_cursor_of_another_task_is_refused(task_store: TaskStore) -> None:
    task_id = new_task_id()
    await task_store.claim(claim_of(task_id))
    [event] = await task_store.events(task_id)
    with pytest.raises(CursorInvalid):
        await task_store.events(new_task_id(), after=event.cursor)


async def test_log_lines_are_numbered_in_order_of_arrival_and_kept_once(task_store: TaskStore) -> None:
    task_id = new_task_id()
    await task_store.claim(claim_of(task_id, scene=Scene.MODEL_TRAIN))

    def lines(sequence: int, *messages: str, **metrics: float) -> TrainingLogWrite:
        return TrainingLogWrite(
            task_id=task_id,
            training_id="t",
            sequence=sequence,
            lines=[TrainingLogLine(ts=NOON, message=message) for message in messages],
            metrics=metrics,
        )

    await task_store.note_made(task_id, "job", "t")
    await task_store.write_log(task_id, [lines(2, "c", "d"), lines(2, "c", "d")])
    await task_store.write_log(task_id, [lines(1, "a"), lines(2, "c", "d", "e"), lines(3, loss=0.5)])

    log = await task_store.training_log(task_id)
    assert [(row.position, row.sequence, row.line, row.message) for row in log] == [
        (1, 2, 1, "c"),
        (2, 2, 2, "d"),
        (3, 1, 1, "a"),
        (4, 2, 3, "e"),
        (5, 3, 0, ""),
    ]
    assert log[-1].metrics == {"loss": 0.5}
    assert await task_store.training_log(task_id, after_position=3) == log[3:]


async def test_log_lines_are_kept_only_for_trainings_that_the_task_requested(task_store: TaskStore) -> None:
    task_id = new_task_id()
    await task_store.claim(claim_of(task_id, scene=Scene.MODEL_TRAIN))
    for training in ("first", "second"):
        await task_store.note_made(task_id, "job", training)

    def write(training_id: str) -> TrainingLogWrite:
        lines = [TrainingLogLine(ts=NOON, message=training_id)]
        return TrainingLogWrite(task_id=task_id, training_id=training_id, sequence=1, lines=lines)

    left_out = await task_store.write_log(task_id, [write("anothers"), write("first"), write("second")])

    assert left_out == {"anothers"}
    assert [row.message for row in await task_store.training_log(task_id)] == ["first", "second"]


async def test_log_lines_of_an_unclaimed_task_are_refused(task_store: TaskStore) -> None:
    with pytest.raises(TaskUnknown):
        await task_store.write_log("unclaimed", [])


async def test_an_open_task_says_when_its_present_job_first_reported(task_store: TaskStore) -> None:
    task_id = new_task_id()
    await task_store.claim(claim_of(task_id))

    async def reported(version: int, job_id: str, attempt: int) -> None:
        at = NOON + timedelta(minutes=version)
        tick = fact(f"{job_id}:{version}", ts=at, job_id=job_id, sequence=version, attempt=attempt, stage="processing")
        await task_store.write(write_of(task_id, tick, version=version, job_id=job_id, attempts=attempt))

    async def began() -> list[datetime | None]:
        row = await task_store.task(task_id)
        listed = (await task_store.tasks(tenant_id="tenant-a", limit=1, text=task_id)).tasks[0]
        assert row is not None
        return [row.job_began_at, listed.job_began_at]

    assert await began() == [None, None]
    await reported(1, "job-1", 1)
    await reported(2, "job-1", 1)
    assert await began() == [NOON + timedelta(minutes=1)] * 2
    await reported(3, "job-2", 2)
    assert await began() == [NOON + timedelta(minutes=3)] * 2, "another attempt has its own beginning"
    await task_store.write(write_of(task_id, end(), version=4, status=TaskStatus.COMPLETED, job_id="job-2"))
    assert await began() == [None, None]
