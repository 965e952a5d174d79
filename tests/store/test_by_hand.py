"""An unknown settlement is closed by hand: once, with who and why, and only where it is unknown."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import pytest_asyncio

from comfyui_temporal.contracts.errors import ExceptionCode
from comfyui_temporal.contracts.task_events import TaskEvent
from comfyui_temporal.contracts.task_store import Correction, TaskException
from comfyui_temporal.contracts.tasks import CreditsSummary, SettlementState, TaskStatus
from store import TaskStore, TaskUnknown
from store.by_hand import Found
from store.failures import NotToBeSettled
from tests.conftest import NewDatabase
from tests.our_processes import environment_of
from tests.store.facts import claim_of, end, new_task_id, write_of

UNKNOWN = CreditsSummary(
    estimated=24, held=24, charged=None, returned=None, settlement=SettlementState.UNKNOWN, pre_deduct_ids=["hold-1"]
)


@pytest_asyncio.fixture
async def dsn(new_database: NewDatabase) -> str:
    return await new_database()


@pytest_asyncio.fixture
async def store(dsn: str) -> AsyncIterator[TaskStore]:
    store = TaskStore(dsn)
    yield store
    await store.close()


def without_credits(events: list[TaskEvent]) -> list[TaskEvent]:
    """An end is read with the row's points, which a correction changes."""
    return [event.model_copy(update={"credits": None}) for event in events]


async def unsettled(store: TaskStore, *, ended_days_ago: float = 3, **changes: Any) -> str:
    """A task that ended without that its settlement became known."""
    task_id, at = new_task_id(), datetime.now(UTC) - timedelta(days=ended_days_ago)
    await store.claim(claim_of(task_id))
    credits = UNKNOWN.model_copy(update=changes)
    await store.write(write_of(task_id, end(ts=at), status=TaskStatus.COMPLETED, credits=credits))
    return task_id


def found(task_id: str, **changes: Any) -> Found:
    given = {"charged": 20, "returned": 4, "by": "ada@example.org", "reason": "entry 4711 is its commit"}
    return Found.model_validate({"task_id": task_id, **given, **changes})


async def rows(dsn: str, query: str, *values: Any) -> list[dict[str, Any]]:
    connection = await asyncpg.connect(dsn)
    try:
        return [dict(row) for row in await connection.fetch(query, *values)]
    finally:
        await connection.close()


async def test_the_row_gets_the_figures_and_the_record_and_the_audit_log_say_who_and_why(
    store: TaskStore, dsn: str
) -> None:
    task_id = await unsettled(store)
    events = await store.events(task_id)
    assert await store.settle_by_hand(found(task_id)) is True
    row = await store.task(task_id)
    assert row is not None
    assert row.credits == UNKNOWN.model_copy(
        update={"charged": 20, "returned": 4, "settlement": SettlementState.SETTLED}
    )
    [record] = await store.exceptions(task_id=task_id)
    assert record.code == ExceptionCode.SETTLEMENT_CORRECTED
    assert record.details == {
        **{"charged": 20, "returned": 4},
        **{"by": "ada@example.org", "reason": "entry 4711 is its commit"},
    }
    [audited] = await rows(dsn, "SELECT operation, user_id, tenant_id, task_id FROM audit_log")
    assert audited == {
        **{"operation": "settle_by_hand", "user_id": "ada@example.org"},
        **{"tenant_id": "tenant-a", "task_id": task_id},
    }
    assert without_credits(await store.events(task_id)) == without_credits(events), "what streams showed stays"
    figures = await store.figures()
    assert sum(one.tasks for one in figures.unsettled) == 0, "the alert ends"


@pytest.mark.parametrize(
    ("status", "charged", "shortfall"),
    [(TaskStatus.COMPLETED, 20, 10), (TaskStatus.COMPLETED, 30, 0), (TaskStatus.FAILED, 0, 0)],
)
async def test_the_rest_of_the_price_of_a_completed_task_is_its_shortfall(
    store: TaskStore, status: TaskStatus, charged: int, shortfall: int
) -> None:
    task_id, at = new_task_id(), datetime.now(UTC)
    await store.claim(claim_of(task_id))
    unknown = TaskException(key="settlement_unknown", code="settlement_unknown", message="", ts=at)
    write = write_of(task_id, end(status=status), status=status, credits=UNKNOWN)
    early = unknown.model_copy(update={"key": "settlement_unknown:reset"})  # before the task had a price
    records = [early, unknown.model_copy(update={"details": {"cost": 10, "price": 30}})]
    await store.write(write.model_copy(update={"exceptions": records}))
    await store.settle_by_hand(found(task_id, charged=charged, returned=0))
    row = await store.task(task_id)
    assert row is not None and row.credits.shortfall == shortfall
    recorded = [record.details for record in await store.exceptions(task_id=task_id) if record.code == "shortfall"]
    assert recorded == ([{"shortfall": shortfall}] if shortfall else [])


async def test_a_repeat_changes_nothing_and_other_figures_are_refused(store: TaskStore, dsn: str) -> None:
    task_id = await unsettled(store)
    await store.settle_by_hand(found(task_id))
    assert await store.settle_by_hand(found(task_id, by="somebody-else", reason="again")) is False
    with pytest.raises(NotToBeSettled, match=r"by hand, by ada@example\.org: 20 points charged, 4 returned"):
        await store.settle_by_hand(found(task_id, charged=24, returned=0))
    assert len(await store.exceptions(task_id=task_id)) == 1
    assert len(await rows(dsn, "SELECT 1 FROM audit_log")) == 1


async def test_of_two_at_once_one_is_recorded(store: TaskStore, dsn: str) -> None:
    task_id = await unsettled(store)
    both = (store.settle_by_hand(found(task_id, by=by)) for by in ("ada", "bob"))
    assert sorted(await asyncio.gather(*both)) == [False, True]
    assert len(await rows(dsn, "SELECT 1 FROM audit_log")) == 1


async def test_an_open_task_a_known_settlement_and_an_unknown_task_are_refused(store: TaskStore) -> None:
    open_task = new_task_id()
    await store.claim(claim_of(open_task))
    with pytest.raises(NotToBeSettled, match="is open, and its own run settles it"):
        await store.settle_by_hand(found(open_task))
    known = await unsettled(store, charged=24, returned=0, settlement=SettlementState.SETTLED)
    with pytest.raises(NotToBeSettled, match="by its run or the ledger: 24 points charged, 0 returned"):
        await store.settle_by_hand(found(known))
    with pytest.raises(NotToBeSettled):
        await store.settle_by_hand(found(known, charged=24, returned=0))
    with pytest.raises(TaskUnknown):
        await store.settle_by_hand(found(new_task_id()))


async def test_the_reconciler_does_not_correct_what_was_closed_by_hand(store: TaskStore) -> None:
    task_id = await unsettled(store, ended_days_ago=0.1)
    await store.settle_by_hand(found(task_id))
    assert await store.take_unsettled(every=timedelta(0), limit=10) == []
    late = CreditsSummary(held=24, charged=24, returned=0, settlement=SettlementState.SETTLED)
    record = TaskException(key="settlement_corrected", code="settlement_corrected", message="", ts=datetime.now(UTC))
    assert await store.correct_settlement(Correction(task_id=task_id, credits=late, record=record)) is False


@pytest.mark.parametrize("wrong", [{"charged": -1}, {"returned": -1}, {"by": " "}, {"reason": ""}])
async def test_figures_below_zero_and_nobody_and_no_reason_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        found("task-1", **wrong)


async def test_the_command(store: TaskStore, dsn: str, tmp_path: Path) -> None:
    task_id = await unsettled(store)

    async def settle(charged: str) -> tuple[int | None, str]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "store", "settle", task_id, "--charged", charged, "--returned", "4"),
            *("--by", "ada", "--reason", "entry 4711"),
            env=environment_of({"DATABASE_DSN": dsn}),
            cwd=tmp_path,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        said, _ = await process.communicate()
        return process.returncode, said.decode()

    assert await settle("20") == (0, f"Task {task_id}: 20 points charged, 4 returned, settled by ada.\n")
    code, said = await settle("20")
    assert code == 0 and "nothing was changed" in said
    code, said = await settle("21")
    assert code == 1 and said.startswith("The settlement of the task") and said.count("\n") == 1
    code, said = await settle("-1")
    assert code == 2 and "charged" in said
