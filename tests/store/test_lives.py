"""Which run of a task acts: continued, reset, superseded, given back; and rows that a restored store has lost."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
import pytest

from comfyui_temporal.contracts.lives import EarlierLife, TaskRun
from comfyui_temporal.contracts.task_events import EventType
from comfyui_temporal.contracts.task_store import TaskRow, TaskWrite
from comfyui_temporal.contracts.tasks import CreditsSummary, TaskStatus
from store import NotTheClaimant, TaskStore
from store.lives import MOST_EARLIER_RUNS
from store.task_store import Made
from tests.store.facts import claim_of, end, fact, new_task_id, write_of


def run_of(task_id: str, run_id: str = "run-1", number: int = 0, first: str | None = "run-1") -> TaskRun:
    return TaskRun(task_id=task_id, run_id=run_id, run_number=number, first_execution_run_id=first)


async def claimed(store: TaskStore) -> str:
    task_id = new_task_id()
    await store.claim(claim_of(task_id), run_of(task_id))
    return task_id


async def row_of(store: TaskStore, task_id: str) -> TaskRow:
    row = await store.task(task_id)
    assert row is not None
    return row


async def test_a_run_that_registers_twice_has_no_earlier_life(task_store: TaskStore) -> None:
    task_id = await claimed(task_store)
    for _ in range(2):
        assert await task_store.register(run_of(task_id)) == EarlierLife()
    assert not EarlierLife().is_possible


async def test_a_continued_run_takes_over_and_has_no_earlier_life(task_store: TaskStore) -> None:
    task_id = await claimed(task_store)
    assert await task_store.register(run_of(task_id, "run-2", 1)) == EarlierLife()
    assert await task_store.register(run_of(task_id, "run-4", 3)) == EarlierLife()
    assert (await row_of(task_store, task_id)).run_id == "run-4"


@pytest.mark.parametrize("number", [0, 2], ids=["an earlier run of the chain", "the last run of the chain"])
async def test_a_run_that_was_reset_has_an_earlier_life(task_store: TaskStore, number: int) -> None:
    task_id = await claimed(task_store)
    await task_store.register(run_of(task_id, "run-3", 2))
    life = await task_store.register(run_of(task_id, "reset", number))
    assert (life.lives, life.is_possible, life.must_stop) == (1, True, False)
    assert await task_store.register(run_of(task_id, "reset", number)) == life
    assert (await task_store.register(run_of(task_id, "continued", number + 1))).lives == 1, "its runs have it too"
    assert (await task_store.register(run_of(task_id, "again", number))).lives == 2


async def test_a_superseded_run_gets_that_answer_and_changes_nothing(task_store: TaskStore) -> None:
    task_id = await claimed(task_store)
    await task_store.register(run_of(task_id, "reset"))
    before = await row_of(task_store, task_id)
    for run_id in ("run-1", "run-1"):
        life = await task_store.register(run_of(task_id, run_id))
        assert life.is_superseded and life.must_stop
    await task_store.write(write_of(task_id, fact("late"), end(), version=99), run_of(task_id))
    assert await row_of(task_store, task_id) == before
    assert len(await task_store.events(task_id)) == 1


async def test_the_current_run_takes_the_task_back_from_a_late_call_of_a_run_that_was_reset_away(
    task_store: TaskStore,
) -> None:
    task_id = await claimed(task_store)
    await task_store.register(run_of(task_id, "newest"))
    await task_store.register(run_of(task_id, "late"))
    newest = run_of(task_id, "newest")
    assert not await task_store.write(write_of(task_id, fact("ignored"), version=3), newest)
    current = newest.model_copy(update={"is_current": True})
    life = await task_store.register(current)
    assert not life.is_superseded and life.is_possible
    assert (await row_of(task_store, task_id)).run_id == "newest"
    assert (await task_store.register(run_of(task_id, "late"))).is_superseded
    assert await task_store.write(write_of(task_id, fact("counts"), version=2), newest)

    await task_store.register(run_of(task_id, "later still"))
    assert await task_store.write(write_of(task_id, fact("again"), version=3), current), "a write takes it back too"
    assert (await task_store.look(newest)).life.is_superseded is False
    assert [event.seq for event in await task_store.events(task_id)] == [1, 2, 3]


@pytest.mark.parametrize(("charged", "moves"), [(0, [-24, 24]), (24, [-24]), (None, [-24])])
async def test_the_points_of_a_task_that_was_reset_add_up_at_its_end(
    task_store: TaskStore, charged: int | None, moves: list[int]
) -> None:
    """An earlier life has published a hold that the ending run does not know."""
    task_id = await claimed(task_store)
    held = fact("held:1", event=EventType.CREDITS, credits_delta=-24)
    await task_store.write(write_of(task_id, held), run_of(task_id))
    await task_store.register(run_of(task_id, "reset"))
    credits = CreditsSummary(charged=charged)
    write = write_of(task_id, end(), status=TaskStatus.COMPLETED, credits=credits)
    await task_store.write(write, run_of(task_id, "reset"))
    await task_store.write(write, run_of(task_id, "reset"))
    events = await task_store.events(task_id)
    assert [event.credits_delta for event in events if event.credits_delta] == moves
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert events[-1].event is EventType.COMPLETED


async def test_another_chains_run_is_superseded_too(task_store: TaskStore) -> None:
    task_id = await claimed(task_store)
    assert (await task_store.register(run_of(task_id, "other", first="other"))).is_superseded
    assert (await row_of(task_store, task_id)).run_id == "run-1"


async def test_the_state_of_a_run_that_was_reset_counts_at_any_version(task_store: TaskStore) -> None:
    task_id = await claimed(task_store)
    await task_store.write(write_of(task_id, fact("a"), version=40, attempts=3), run_of(task_id))
    await task_store.register(run_of(task_id, "reset"))
    await task_store.write(write_of(task_id, fact("b"), version=7, attempts=1), run_of(task_id, "reset"))
    row = await row_of(task_store, task_id)
    assert (row.version, row.attempts, row.lives, row.run_id) == (7, 1, 1, "reset")
    await task_store.register(run_of(task_id, "reset-again"))
    await task_store.write(write_of(task_id, version=3, attempts=2), run_of(task_id, "reset-again"))
    await task_store.write(write_of(task_id, version=2, attempts=9), run_of(task_id, "reset-again"))
    assert (await row_of(task_store, task_id)).attempts == 2, "its own older state does not"


async def test_a_write_that_lands_after_its_run_has_continued_is_no_reset(task_store: TaskStore) -> None:
    task_id = await claimed(task_store)
    await task_store.write(write_of(task_id, fact("b"), version=8), run_of(task_id, "run-3", 2))
    await task_store.write(write_of(task_id, fact("a"), version=7), run_of(task_id, "run-2", 1))
    row = await row_of(task_store, task_id)
    assert (row.run_id, row.lives, row.version) == ("run-3", 0, 8)
    assert [event.event_id for event in await task_store.events(task_id)] == [f"{task_id}:{n}" for n in (1, 2, 3)]
    assert await task_store.register(run_of(task_id, "run-3", 2)) == EarlierLife(), "it acts as before"


async def test_a_reset_run_never_moves_the_progress_of_an_attempt_and_stage_back(task_store: TaskStore) -> None:
    task_id = await claimed(task_store)
    for attempt, stage, progress in ((1, "processing", 60.0), (2, "processing", 20.0)):
        published = fact(f"j{attempt}:1", attempt=attempt, stage=stage, progress=progress)
        state: dict[str, Any] = {"attempts": attempt, "stage": stage, "progress": progress}
        await task_store.write(write_of(task_id, published, version=attempt, **state), run_of(task_id))
    await task_store.register(run_of(task_id, "reset"))
    again = fact("j1:2", attempt=1, stage="processing", progress=5.0)
    reset = write_of(task_id, again, version=2, attempts=1, stage="processing", progress=5.0)
    await task_store.write(reset, run_of(task_id, "reset"))
    assert [event.progress for event in await task_store.events(task_id)][1:] == [60.0, 20.0, 60.0]
    assert (await row_of(task_store, task_id)).progress == 60.0


async def test_an_ended_row_is_reported_and_stays_as_it_is(task_store: TaskStore) -> None:
    task_id = await claimed(task_store)
    await task_store.write(write_of(task_id, end(), status=TaskStatus.COMPLETED, version=5), run_of(task_id))
    before = await row_of(task_store, task_id)
    life = await task_store.register(run_of(task_id, "reset"))
    assert life.has_ended and life.must_stop
    seen = await task_store.look(run_of(task_id, "reset"))
    assert (seen.row, seen.life) == (before, life)
    await task_store.write(write_of(task_id, fact("b"), version=50), run_of(task_id, "reset"))
    assert await row_of(task_store, task_id) == before


async def test_every_hold_and_job_of_every_run_is_kept(task_store: TaskStore) -> None:
    task_id = await claimed(task_store)
    assert not await task_store.note_made(task_id, "hold", "h1")
    assert await task_store.note_made(task_id, "hold", "h1"), "it was known"
    credits = CreditsSummary(pre_deduct_ids=["h1", "h2"])
    await task_store.write(write_of(task_id, fact("a"), version=9, credits=credits, job_id="j1"), run_of(task_id))
    credits = CreditsSummary(pre_deduct_ids=["h3"])
    await task_store.register(run_of(task_id, "reset"))
    reset = write_of(task_id, fact("b"), version=2, credits=credits, job_id="j2")
    await task_store.write(reset, run_of(task_id, "reset"))
    row = await row_of(task_store, task_id)
    assert (row.hold_ids, row.job_ids) == (["h1", "h2", "h3"], ["j1", "j2"])
    assert row.credits.pre_deduct_ids == ["h3"]


@pytest.mark.parametrize("kind", ["hold", "job"])
async def test_what_a_task_without_a_row_made_was_not_known(task_store: TaskStore, kind: Made) -> None:
    unknown = new_task_id()
    assert not await task_store.note_made(unknown, kind, "made")
    assert not await task_store.note_made(unknown, kind, "made"), "a task without a row keeps nothing"


async def test_a_claim_that_must_be_known_claims_nothing_new(task_store: TaskStore) -> None:
    """Of a run that was reset: it may have been refused before that."""
    task_id = new_task_id()
    again, reset = claim_of(task_id).model_copy(update={"only_if_known": True}), run_of(task_id, "reset")
    assert not await task_store.claim(again, reset)
    assert await task_store.task(task_id) is None and await task_store.claimed_input(task_id) is None
    await task_store.claim(claim_of(task_id), run_of(task_id))
    assert await task_store.claim(again, reset)
    another = again.model_copy(update={"first_execution_run_id": "another-run"})
    assert not await task_store.claim(another, reset)


async def test_only_the_newest_of_many_runs_are_remembered(task_store: TaskStore, postgres_dsn: str) -> None:
    task_id = await claimed(task_store)
    for number in range(1, MOST_EARLIER_RUNS + 5):
        await task_store.register(run_of(task_id, f"run-{number + 1}", number))
    connection = await asyncpg.connect(postgres_dsn)
    earlier = await connection.fetchval("SELECT earlier_run_ids FROM tasks WHERE task_id = $1", task_id)
    await connection.close()
    assert len(earlier) == MOST_EARLIER_RUNS and earlier[0] == f"run-{MOST_EARLIER_RUNS + 4}"


async def test_of_runs_that_register_concurrently_each_is_seen_once(task_store: TaskStore) -> None:
    task_id = await claimed(task_store)
    runs = [run_of(task_id, f"reset-{n % 4}") for n in range(12)]
    lives = [(await life).lives for life in [asyncio.create_task(task_store.register(run)) for run in runs]]
    assert (await row_of(task_store, task_id)).lives == 4
    assert max(lives) == 4


# A give-back


async def test_a_give_back_claims_a_row_whose_run_is_the_one_it_found(task_store: TaskStore) -> None:
    task_id = await claimed(task_store)
    assert not await task_store.claim_give_back(task_id, by="give-back", found_run="another")
    assert await task_store.claim_give_back(task_id, by="give-back", found_run="run-1")
    assert (await row_of(task_store, task_id)).given_back_by == "give-back"
    life = await task_store.register(run_of(task_id, "reset"))
    assert life.is_given_back and life.must_stop


async def test_a_give_back_must_stop_where_another_one_has_claimed_the_row_or_it_has_ended(
    task_store: TaskStore,
) -> None:
    task_id = await claimed(task_store)
    assert (await task_store.life_of_give_back(task_id, by="first")).must_stop, "its claim is lost"
    for by in ("first", "second"):
        assert await task_store.claim_give_back(task_id, by=by, found_run="run-1")
        assert not (await task_store.life_of_give_back(task_id, by=by)).is_possible
    assert (await task_store.life_of_give_back(task_id, by="first")).must_stop
    await task_store.write(write_of(task_id, end()))
    assert (await task_store.life_of_give_back(task_id, by="second")).must_stop
    assert not (await task_store.life_of_give_back(new_task_id(), by="second")).must_stop, "its row is missing"


async def test_a_give_back_of_a_run_that_was_reset_meanwhile_claims_nothing(task_store: TaskStore) -> None:
    task_id = await claimed(task_store)
    await task_store.register(run_of(task_id, "reset"))
    assert not await task_store.claim_give_back(task_id, by="give-back", found_run="run-1")
    await task_store.write(write_of(task_id, end(), version=5), run_of(task_id, "reset"))
    assert not await task_store.claim_give_back(task_id, by="give-back", found_run="reset"), "it has ended"


async def test_a_row_from_an_earlier_release_is_taken_over_by_any_run(task_store: TaskStore) -> None:
    task_id = new_task_id()
    await task_store.claim(claim_of(task_id))
    assert await task_store.claim_give_back(task_id, by="give-back", found_run=None)
    assert (await task_store.register(run_of(task_id, "run-7", 4))).lives == 0
    assert (await row_of(task_store, task_id)).run_id == "run-7"


# A store that was restored


async def forget(dsn: str, task_id: str, *, claim: bool = True) -> None:
    """The store after a restore from a backup older than the task."""
    connection = await asyncpg.connect(dsn)
    await connection.execute("DELETE FROM tasks WHERE task_id = $1", task_id)
    if claim:
        await connection.execute("DELETE FROM task_claims WHERE task_id = $1", task_id)
    await connection.close()


def write_with_claim(task_id: str, run_id: str = "run-1") -> TaskWrite:
    write = write_of(task_id, fact("held:1"), run_id=run_id, version=6)
    return write.model_copy(update={"claim": claim_of(task_id, run_id)})


@pytest.mark.parametrize("claim", [True, False], ids=["claim and row", "the row alone"])
async def test_a_lost_row_is_recreated_from_the_runs_claim(
    task_store: TaskStore, postgres_dsn: str, claim: bool
) -> None:
    task_id = await claimed(task_store)
    await forget(postgres_dsn, task_id, claim=claim)
    assert (await task_store.register(run_of(task_id))).is_row_missing
    await task_store.write(write_with_claim(task_id), run_of(task_id))
    row = await row_of(task_store, task_id)
    assert (row.version, row.last_seq, row.run_id, row.tenant_id) == (6, 2, "run-1", "tenant-a")
    assert await task_store.claim(claim_of(task_id)) and not await task_store.claim(claim_of(task_id, "run-2"))
    assert (await task_store.register(run_of(task_id))).is_possible, "what else was lost is unknown"


async def test_a_lost_row_that_two_tries_of_a_write_recreate_is_written_once(
    task_store: TaskStore, postgres_dsn: str
) -> None:
    """The first one was slow, and goes on while the second is made."""
    task_id = await claimed(task_store)
    await forget(postgres_dsn, task_id, claim=False)
    tries = await asyncio.gather(*(task_store.write(write_with_claim(task_id), run_of(task_id)) for _ in range(4)))
    assert all(written is not None for written in tries)
    assert [event.seq for event in await task_store.events(task_id)] == [1, 2]


async def test_a_lost_row_is_not_recreated_where_another_run_has_claimed_the_id_since(
    task_store: TaskStore, postgres_dsn: str
) -> None:
    task_id = await claimed(task_store)
    await forget(postgres_dsn, task_id)
    await task_store.claim(claim_of(task_id, "run-2"))
    with pytest.raises(NotTheClaimant):
        await task_store.write(write_with_claim(task_id), run_of(task_id))
    await forget(postgres_dsn, task_id, claim=False)
    with pytest.raises(NotTheClaimant):
        await task_store.write(write_with_claim(task_id), run_of(task_id))


async def test_a_run_that_was_reset_shows_it_by_itself_to_a_store_that_lost_its_claim(task_store: TaskStore) -> None:
    task_id = new_task_id()
    assert await task_store.claim(claim_of(task_id), run_of(task_id, "reset"))
    assert (await task_store.register(run_of(task_id, "reset"))).lives == 1


async def test_a_row_that_is_older_than_what_its_run_has_written_comes_from_a_backup(task_store: TaskStore) -> None:
    task_id = await claimed(task_store)
    first = write_of(task_id, fact("a"), version=4)
    await task_store.write(first, run_of(task_id))
    await task_store.write(write_of(task_id, version=6).model_copy(update={"written_version": 4}), run_of(task_id))
    assert (await task_store.register(run_of(task_id))).lives == 0
    await task_store.write(write_of(task_id, version=9).model_copy(update={"written_version": 7}), run_of(task_id))
    assert (await task_store.register(run_of(task_id))).lives == 1


async def test_an_older_row_is_seen_by_a_run_that_has_continued_since_the_backup(task_store: TaskStore) -> None:
    task_id = await claimed(task_store)
    await task_store.write(write_of(task_id, fact("a"), version=4), run_of(task_id))
    continued = run_of(task_id, "run-2", 1)
    await task_store.write(write_of(task_id, version=9).model_copy(update={"written_version": 7}), continued)
    life = await task_store.register(continued)
    assert (life.lives, (await row_of(task_store, task_id)).version) == (1, 9)


async def test_a_row_that_is_as_new_as_what_was_written_is_no_older_one_for_a_continued_run(
    task_store: TaskStore,
) -> None:
    task_id = await claimed(task_store)
    await task_store.write(write_of(task_id, fact("a"), version=4), run_of(task_id))
    for number, written in ((1, 4), (2, 9)):
        run = run_of(task_id, f"run-{number + 1}", number)
        await task_store.write(write_of(task_id, version=9).model_copy(update={"written_version": written}), run)
        assert (await task_store.register(run)).lives == 0


@pytest.mark.parametrize("number", [0, 1], ids=["the same run", "the next run"])
async def test_the_points_add_up_where_the_ending_write_is_the_first_to_see_an_older_row(
    task_store: TaskStore, number: int
) -> None:
    """What the run had published since the backup is lost; it publishes the rest."""
    task_id = await claimed(task_store)
    await task_store.write(write_of(task_id, fact("a"), version=4), run_of(task_id))
    back = fact("given_back:1", event=EventType.CREDITS, credits_delta=24)
    write = write_of(task_id, back, end(), version=9, status=TaskStatus.CANCELLED, credits=CreditsSummary(charged=0))
    run = run_of(task_id, "run-2", 1) if number else run_of(task_id)
    await task_store.write(write.model_copy(update={"written_version": 7}), run)
    events = await task_store.events(task_id)
    assert [event.credits_delta for event in events if event.credits_delta] == [24, -24]
    assert (events[-1].event, [event.seq for event in events]) == (EventType.COMPLETED, list(range(1, len(events) + 1)))
