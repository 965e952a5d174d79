"""Ticks (contract §2, §6): written only where the row knows the report, newer, gapless, never after the end."""

from __future__ import annotations

import asyncio
import random
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest

from comfyui_temporal.contracts.lives import TaskRun
from comfyui_temporal.contracts.task_events import EventType, TaskEvent
from comfyui_temporal.contracts.task_store import HeardOrder, TakenReport
from comfyui_temporal.contracts.tasks import TaskStatus
from comfyui_temporal.contracts.ticks import Tick, TickVerdict
from store import TaskStore
from tests.store.facts import claim_of, end, fact, new_task_id, write_of
from tests.waiting import until

ETA = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)


def tick(task_id: str, sequence: int, **fields: Any) -> Tick:
    given = {"job_id": "j", "digest": "same", "progress": 10.0 * sequence}
    return Tick(task_id=task_id, sequence=sequence, **{**given, **fields})


async def taken(store: TaskStore, sequence: int = 1, digest: str = "same", job_id: str = "j", **state: Any) -> str:
    """A task whose workflow has taken a job's report and written it."""
    task_id = new_task_id()
    await store.claim(claim_of(task_id))
    report = TakenReport(job_id=job_id, sequence=sequence, digest=digest)
    change = fact(f"{job_id}:{sequence}", job_id=job_id, sequence=sequence, stage="processing", is_change=True)
    await store.write(write_of(task_id, change, job_id=job_id, attempts=1, stage="processing", taken=report, **state))
    return task_id


def report_of(sequence: int) -> TakenReport:
    return TakenReport(job_id="j", sequence=sequence, digest="same")


def run_of(task_id: str, run_id: str) -> TaskRun:
    return TaskRun(task_id=task_id, run_id=run_id)


async def acting(store: TaskStore, task_id: str, run_id: str = "first") -> str:
    """Make the run the one that acts: a second one was reset."""
    await store.register(run_of(task_id, run_id))
    return run_id


async def written(store: TaskStore, given: Tick) -> TickVerdict | None:
    answer = (await store.write_ticks([given])).get(given.task_id)
    return None if answer is None else answer.verdict


async def later(postgres_dsn: str, task_id: str) -> None:
    """Let the second after the task's last tick be over."""
    connection = await asyncpg.connect(postgres_dsn)
    try:
        await connection.execute(
            "UPDATE tasks SET ticked_at = ticked_at - interval '2 seconds' WHERE task_id = $1", task_id
        )
    finally:
        await connection.close()


async def shown(store: TaskStore, task_id: str) -> list[tuple[int, float | None]]:
    return [(event.seq, event.progress) for event in await store.events(task_id) if event.seq > 2]


async def test_a_tick_becomes_the_next_event_and_moves_the_rows_figures(task_store: TaskStore) -> None:
    task_id = await taken(task_store)
    before = await task_store.task(task_id)

    assert await written(task_store, tick(task_id, 2, next_eta=ETA, queue_position=3)) is TickVerdict.WRITTEN

    event: TaskEvent = (await task_store.events(task_id))[-1]
    assert (event.seq, event.event, event.status, event.stage) == (
        3,
        EventType.RUNNING,
        TaskStatus.RUNNING,
        "processing",
    )
    assert (event.attempt, event.progress, event.next_eta, event.queue_position) == (1, 20.0, ETA, 3)
    row = await task_store.task(task_id)
    assert row is not None and before is not None
    assert (row.progress, row.next_eta, row.queue_position, row.last_seq) == (20.0, ETA, 3, 3)
    assert (row.version, row.updated_at) == (before.version, before.updated_at), "the reconciler sees a quiet task"


@pytest.mark.parametrize(
    ("given", "verdict"),
    [
        pytest.param({"digest": "another"}, TickVerdict.NOT_KNOWN, id="says more than figures"),
        pytest.param({"job_id": "k"}, TickVerdict.NOT_KNOWN, id="another job"),
        pytest.param({"sequence": 5}, TickVerdict.OUTDATED, id="what the workflow took"),
        pytest.param({"sequence": 4}, TickVerdict.OUTDATED, id="older than what the workflow took"),
    ],
)
async def test_what_the_row_does_not_know_changes_nothing(
    task_store: TaskStore, given: dict[str, Any], verdict: TickVerdict
) -> None:
    task_id = await taken(task_store, sequence=5)
    before = await task_store.task(task_id)

    assert await written(task_store, tick(task_id, **{"sequence": 6, **given})) is verdict
    assert (await task_store.task(task_id), await shown(task_store, task_id)) == (before, [])


async def test_nothing_is_written_for_an_unknown_task_or_after_the_end(task_store: TaskStore) -> None:
    assert await task_store.write_ticks([tick(new_task_id(), 2)]) == {}
    task_id = await taken(task_store)
    await task_store.write(write_of(task_id, end(), version=2, status=TaskStatus.COMPLETED))

    assert await written(task_store, tick(task_id, 2)) is TickVerdict.ENDED
    assert [event.event for event in await task_store.events(task_id)][-1] is EventType.COMPLETED


async def test_a_row_before_the_first_report_and_of_the_next_attempt_takes_no_tick(task_store: TaskStore) -> None:
    task_id = await taken(task_store)
    await task_store.write(write_of(task_id, fact("retry:1"), version=2, attempts=2, taken=None))

    assert await written(task_store, tick(task_id, 2)) is TickVerdict.NOT_KNOWN


async def test_a_second_tick_within_a_second_waits(task_store: TaskStore, postgres_dsn: str) -> None:
    task_id = await taken(task_store)
    assert await written(task_store, tick(task_id, 2)) is TickVerdict.WRITTEN
    assert await written(task_store, tick(task_id, 3)) is TickVerdict.TOO_EARLY
    await later(postgres_dsn, task_id)

    assert await written(task_store, tick(task_id, 3)) is TickVerdict.WRITTEN
    assert await shown(task_store, task_id) == [(3, 20.0), (4, 30.0)]


async def test_a_repeat_writes_nothing_and_progress_never_goes_back(task_store: TaskStore, postgres_dsn: str) -> None:
    task_id = await taken(task_store)
    assert await written(task_store, tick(task_id, 3, progress=50.0)) is TickVerdict.WRITTEN
    await later(postgres_dsn, task_id)
    assert await written(task_store, tick(task_id, 3, progress=50.0)) is TickVerdict.OUTDATED
    assert await written(task_store, tick(task_id, 2, progress=20.0)) is TickVerdict.OUTDATED
    assert await written(task_store, tick(task_id, 4, progress=40.0, queue_position=1)) is TickVerdict.WRITTEN

    assert await shown(task_store, task_id) == [(3, 50.0), (4, 50.0)]


async def test_a_fraction_of_a_percent_is_no_event(task_store: TaskStore) -> None:
    task_id = await taken(task_store, progress=10.0)

    assert await written(task_store, tick(task_id, 2, progress=10.5)) is TickVerdict.WRITTEN
    row = await task_store.task(task_id)
    assert row is not None and (row.progress, row.last_seq) == (10.5, 2)
    assert await shown(task_store, task_id) == []


async def test_an_eta_that_slides_a_little_each_time_is_shown_once_it_slid_ten_seconds(
    task_store: TaskStore, postgres_dsn: str
) -> None:
    task_id, at = await taken(task_store, progress=10.0), ETA
    for sequence in range(2, 8):
        await later(postgres_dsn, task_id)
        given = tick(task_id, sequence, progress=10.0, next_eta=at)
        assert await written(task_store, given) is TickVerdict.WRITTEN
        row = await task_store.task(task_id)
        assert row is not None and row.next_eta == at, "the row has each"
        at += timedelta(seconds=5)

    etas = [event.next_eta for event in await task_store.events(task_id) if event.seq > 2]
    assert etas == [ETA, ETA + timedelta(seconds=10), ETA + timedelta(seconds=20)]


@pytest.mark.parametrize("figures", [{"queue_position": 3}, {"progress": 20.0}, {"next_eta": ETA}])
async def test_figures_that_the_workflow_wrote_without_an_event_are_shown_by_the_next_tick(
    task_store: TaskStore, figures: dict[str, Any]
) -> None:
    """The run held them back for its second, and a record for operators was written meanwhile."""
    shown_first = {"progress": 10.0, "queue_position": 4}
    task_id = await taken(task_store)
    first = fact("j:2", job_id="j", sequence=2, stage="processing", **shown_first)
    state: dict[str, Any] = {"job_id": "j", "attempts": 1, "stage": "processing", **shown_first}
    await task_store.write(write_of(task_id, first, version=2, taken=report_of(2), **state))
    await task_store.write(write_of(task_id, version=3, taken=report_of(3), **{**state, **figures}))

    await written(task_store, tick(task_id, 4, **{**shown_first, **figures}))
    event = (await task_store.events(task_id))[-1]
    assert {name: getattr(event, name) for name in figures} == figures


async def test_a_write_with_older_figures_keeps_those_of_a_tick(task_store: TaskStore) -> None:
    task_id = await taken(task_store, sequence=5)
    await task_store.write_ticks([tick(task_id, 9, progress=60.0, next_eta=ETA, queue_position=2)])
    report = TakenReport(job_id="j", sequence=6, digest="same")
    older: dict[str, Any] = {"stage": "processing", "progress": 30.0, "next_eta": ETA - timedelta(minutes=5)}
    renewed = fact("held:2", event=EventType.CREDITS, **older)
    await task_store.write(write_of(task_id, renewed, version=2, taken=report, job_id="j", attempts=1, **older))

    event, row = (await task_store.events(task_id))[-1], await task_store.task(task_id)
    assert (event.progress, event.next_eta, event.queue_position) == (60.0, ETA, 2)
    assert row is not None and (row.progress, row.next_eta, row.queue_position) == (60.0, ETA, 2)


async def test_a_change_of_stage_is_written_after_a_later_tick_and_an_older_tick_is_not(task_store: TaskStore) -> None:
    task_id = await taken(task_store)
    await task_store.write_ticks([tick(task_id, 9, progress=60.0)])
    figures = {"job_id": "j", "stage": "processing", "progress": 40.0}
    await task_store.write(
        write_of(
            task_id,
            fact("j:7", sequence=7, **figures),
            fact("j:8", job_id="j", sequence=8, stage="upscaling", progress=5.0, is_change=True),
            version=2,
            attempts=1,
            stage="upscaling",
        )
    )

    events = [(event.seq, event.stage, event.progress) for event in await task_store.events(task_id)][-2:]
    assert events == [(3, "processing", 60.0), (4, "upscaling", 5.0)]


async def test_a_stage_that_is_entered_again_goes_on_from_what_its_ticks_reached(task_store: TaskStore) -> None:
    task_id = await taken(task_store)
    await task_store.write_ticks([tick(task_id, 9, progress=60.0)])
    await task_store.write(
        write_of(
            task_id,
            fact("j:3", job_id="j", sequence=3, stage="upscaling", progress=0.0, is_change=True),
            fact("j:4", job_id="j", sequence=4, stage="processing", progress=20.0, is_change=True),
            version=2,
            attempts=1,
            stage="processing",
        )
    )

    assert [event.progress for event in await task_store.events(task_id)][-3:] == [60.0, 0.0, 60.0]


async def test_times_rise_with_the_numbers_whoever_writes(task_store: TaskStore) -> None:
    task_id = await taken(task_store)
    await task_store.write_ticks([tick(task_id, 2)])
    behind = fact("held:1", event=EventType.CREDITS, ts=datetime(2026, 3, 1, 12, tzinfo=UTC))
    await task_store.write(write_of(task_id, behind, fact("a"), fact("b"), version=2))

    times = [event.ts for event in await task_store.events(task_id)]
    assert times == sorted(set(times))


async def test_what_was_heard_is_the_newest_tick_of_the_current_job(task_store: TaskStore) -> None:
    task_id = await taken(task_store)
    run_id = await acting(task_store, task_id)
    assert await task_store.heard(HeardOrder(task_id=task_id, job_id="j"), run_id) is None
    await task_store.write_ticks([tick(task_id, 4, next_eta=ETA)])

    heard = await task_store.heard(HeardOrder(task_id=task_id, job_id="j"), run_id)
    assert heard is not None and (heard.sequence, heard.progress, heard.next_eta) == (4, 40.0, ETA)
    assert 0 <= heard.seconds_ago < 60
    assert await task_store.heard(HeardOrder(task_id=task_id, job_id="k"), run_id) is None


async def test_ticks_that_say_something_else_than_the_run_are_not_heard(task_store: TaskStore) -> None:
    """The run took a report with another estimate; its write is under way, and the job went back to the first one."""
    task_id = await taken(task_store, digest="five minutes")
    run_id = await acting(task_store, task_id)
    await task_store.write_ticks([tick(task_id, 3, digest="five minutes")])
    order = HeardOrder(task_id=task_id, job_id="j", digest="seven minutes")
    assert await task_store.heard(order, run_id) is None

    report = TakenReport(job_id="j", sequence=2, digest="seven minutes")
    late = fact("j:2", job_id="j", sequence=2, stage="processing", is_change=True)
    await task_store.write(write_of(task_id, late, version=2, job_id="j", attempts=1, stage="processing", taken=report))
    assert await task_store.heard(order, run_id) is None, "the tick was like the report before"

    assert await written(task_store, tick(task_id, 4, digest="seven minutes")) is TickVerdict.WRITTEN
    heard = await task_store.heard(order, run_id)
    assert heard is not None and heard.sequence == 4


async def test_a_run_that_was_reset_hears_nothing_of_what_its_earlier_life_took(task_store: TaskStore) -> None:
    task_id = await taken(task_store)
    await acting(task_store, task_id)
    await task_store.write_ticks([tick(task_id, 4)])
    polled = fact("j:30", job_id="j", sequence=30, stage="delivery", is_change=True)
    await task_store.write(write_of(task_id, polled, version=2, job_id="j", taken=report_of(4)))
    order = HeardOrder(task_id=task_id, job_id="j")

    assert await task_store.heard(order, "reset") is None, "it has not registered yet"
    await acting(task_store, task_id, "reset")
    assert await task_store.heard(order, "reset") is None
    await task_store.write(write_of(task_id, version=1, job_id="j", taken=report_of(4)), run_of(task_id, "reset"))
    assert await task_store.heard(order, "reset") is None
    await task_store.write_ticks([tick(task_id, 31)])
    heard = await task_store.heard(order, "reset")
    assert heard is not None and heard.sequence == 31


def next_run(task_id: str, number: int, after: str, **fields: Any) -> HeardOrder:
    """What the `number`th run asks that continued `after`."""
    order = HeardOrder(task_id=task_id, job_id="j", run_number=number, continued_run_id=after)
    return order.model_copy(update={"first_execution_run_id": "run-1", **fields})


async def test_a_run_that_continued_as_new_hears_what_the_ones_before_it_heard(
    task_store: TaskStore, postgres_dsn: str
) -> None:
    task_id = await taken(task_store)
    await acting(task_store, task_id, "first")
    await task_store.write_ticks([tick(task_id, 4)])
    assert await task_store.heard(HeardOrder(task_id=task_id, job_id="j"), "second") is None, "of an older worker"

    for number, (after, run_id) in enumerate((("first", "second"), ("second", "third")), start=1):
        heard = await task_store.heard(next_run(task_id, number, after), run_id)
        assert heard is not None and heard.sequence == 4
    row = await task_store.task(task_id)
    assert row is not None and (row.run_id, row.lives) == ("third", 0)
    assert await task_store.heard(next_run(task_id, 1, "first"), "second") is None, "it has ended"


@pytest.mark.parametrize(
    ("number", "after", "fields"),
    [
        pytest.param(2, "reset", {}, id="continues a run that was reset"),
        pytest.param(1, "acts", {}, id="reset"),
        pytest.param(2, "acts", {"first_execution_run_id": "another"}, id="of another chain"),
    ],
)
async def test_only_the_run_that_continues_the_acting_one_hears_what_that_heard(
    task_store: TaskStore, number: int, after: str, fields: dict[str, Any]
) -> None:
    task_id = await taken(task_store)
    await task_store.register(TaskRun(task_id=task_id, run_id="acts", run_number=1))
    await task_store.write_ticks([tick(task_id, 4)])

    assert await task_store.heard(next_run(task_id, number, after, **fields), "asks") is None
    row = await task_store.task(task_id)
    assert row is not None and (row.run_id, row.lives) == ("acts", 0)


async def test_several_gateways_and_the_workflow_at_once_leave_no_gap(task_store: TaskStore, postgres_dsn: str) -> None:
    """Ticks in any order with repeats from three processes, beside the workflow's own facts and its end."""
    others = [TaskStore(postgres_dsn) for _ in range(3)]
    task_ids = [await taken(task_store) for _ in range(4)]
    chosen = random.Random(7)

    async def gateway(store: TaskStore) -> None:
        for n in range(2, 42):
            given = {
                task_id: tick(task_id, n + chosen.randint(0, 6), progress=2.0 * n)
                for task_id in chosen.sample(task_ids, 3)
            }
            await store.write_ticks(list(given.values()))
            await later(postgres_dsn, chosen.choice(task_ids))

    async def workflow(task_id: str) -> None:
        for n in range(20):
            await task_store.write(
                write_of(
                    task_id,
                    fact(f"held:{n}", stage="processing"),
                    version=n + 2,
                    stage="processing",
                    attempts=1,
                    taken=TakenReport(job_id="j", sequence=1, digest="same"),
                    job_id="j",
                )
            )
        await until(lambda: has_ticked(task_store, task_id))
        await task_store.write(write_of(task_id, end(), version=99, status=TaskStatus.COMPLETED))

    try:
        await asyncio.gather(*(gateway(store) for store in others), *(workflow(task_id) for task_id in task_ids))
    finally:
        for store in others:
            await store.close()

    for task_id in task_ids:
        events = await task_store.events(task_id)
        assert [event.seq for event in events] == list(range(1, len(events) + 1))
        assert [event.ts for event in events] == sorted({event.ts for event in events})
        assert events[-1].event is EventType.COMPLETED
        progress = [event.progress for event in events if event.stage == "processing" and event.progress is not None]
        assert progress == sorted(progress) and progress[-1] > 0


async def has_ticked(store: TaskStore, task_id: str) -> bool:
    row = await store.task(task_id)
    return row is not None and (row.progress or 0) > 0


async def test_a_ticks_event_keeps_the_trace_of_its_callback(task_store: TaskStore) -> None:
    task_id, trace = await taken(task_store), "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    assert await written(task_store, tick(task_id, 2, traceparent=trace)) is TickVerdict.WRITTEN
    [event] = await task_store.events_of_each({task_id: 2})
    assert event.traceparent == trace
