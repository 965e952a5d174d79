"""What each tenant starts and has open, counted for all processes together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import asyncpg
import pytest
import pytest_asyncio

from comfyui_temporal.contracts.lives import TaskRun
from comfyui_temporal.contracts.tasks import TaskStatus
from comfyui_temporal.contracts.tenant_limits import Admission, Limit, TenantLimits
from store import StartRefused, TaskStore
from store.tenant_usage import TenantUsage, Used
from tests.conftest import unique
from tests.store.facts import claim_of, end, new_task_id, write_of
from tests.waiting import until

AT_ONCE = 20


@pytest_asyncio.fixture
async def stores(postgres_dsn: str) -> AsyncIterator[list[TaskStore]]:
    """Two stores, each with connections of its own, on one database."""
    both = [TaskStore(postgres_dsn), TaskStore(postgres_dsn)]
    yield both
    await asyncio.gather(*(store.close() for store in both))


@pytest.fixture
def tenant_id() -> str:
    return unique("tenant")


async def admit(store: TaskStore, tenant_id: str, limits: TenantLimits, *, size: int = 100) -> Admission:
    return await store.admit_start(tenant_id=tenant_id, task_id=new_task_id(), size=size, limits=limits)


@pytest.mark.parametrize(
    ("limits", "refused"),
    [
        (TenantLimits(starts_per_minute=7), Limit.STARTS),
        (TenantLimits(bytes_per_minute=700), Limit.BYTES),
        (TenantLimits(open_tasks=7), Limit.OPEN_TASKS),
    ],
)
async def test_two_stores_admit_exactly_the_limit_together(
    stores: list[TaskStore], tenant_id: str, limits: TenantLimits, refused: Limit
) -> None:
    admissions = await asyncio.gather(*(admit(stores[n % 2], tenant_id, limits) for n in range(AT_ONCE)))
    assert sum(each.refused is None for each in admissions) == 7
    assert {each.refused for each in admissions} == {None, refused}
    [allowance] = admissions[-1].allowances
    assert (allowance.most, allowance.left) in {(7, 0), (700, 0)}
    assert 1 <= next(each.retry_after_seconds for each in admissions if each.refused) <= 60
    assert (await admit(stores[0], unique("tenant"), limits)).refused is None, "another tenant's are its own"


async def test_a_large_limit_is_exceeded_by_a_fiftieth_at_most(stores: list[TaskStore], tenant_id: str) -> None:
    """Far from it a process does not count again; near it every start is counted."""
    limits = TenantLimits(starts_per_minute=200, open_tasks=1_000)
    admissions = [await admit(stores[n % 2], tenant_id, limits) for n in range(220)]
    admitted = [each.refused is None for each in admissions]
    assert 200 <= sum(admitted) <= 204
    assert not any(admitted[-10:])
    left = [allowance.left for each in admissions for allowance in each.allowances if allowance.limit is Limit.STARTS]
    assert (left[0], left[-1]) == (199, 0)


def test_a_count_is_used_for_five_seconds_and_a_fiftieth_of_what_is_left() -> None:
    now, limits = [0.0], TenantLimits(starts_per_minute=1_000)
    usage = TenantUsage(lambda: now[0])
    assert usage.after("t", 0, limits) is None
    usage.counted("t", Used(starts=500, sent=0, opened=0))
    assert [each.starts for _ in range(10) if (each := usage.after("t", 0, limits)) is not None] == [*range(501, 511)]
    assert usage.after("t", 0, limits) is None, "a fiftieth of 500 was admitted"
    usage.counted("t", Used(starts=510, sent=0, opened=0))
    assert usage.after("t", 0, TenantLimits(bytes_per_minute=49)) is not None
    assert usage.after("t", 1, TenantLimits(bytes_per_minute=49)) is None, "small limits are exact"
    now[0] = 5.1
    assert usage.after("t", 0, limits) is None


async def test_a_repeat_counts_once_and_a_claimed_task_not_again(task_store: TaskStore, tenant_id: str) -> None:
    limits, task_id = TenantLimits(starts_per_minute=2), new_task_id()
    for _ in range(5):
        admission = await task_store.admit_start(tenant_id=tenant_id, task_id=task_id, size=1, limits=limits)
        assert admission.refused is None
    claim = claim_of(task_id, tenant_id=tenant_id)
    assert await task_store.claim(claim, limits=limits)
    assert (await admit(task_store, tenant_id, limits)).refused is None
    assert (await admit(task_store, tenant_id, limits)).refused is Limit.STARTS
    assert await task_store.claim(claim, limits=limits), "a repeat of the claim"


async def test_starts_are_counted_for_a_minute(task_store: TaskStore, tenant_id: str, postgres_dsn: str) -> None:
    limits = TenantLimits(starts_per_minute=1)
    assert (await admit(task_store, tenant_id, limits)).refused is None
    assert (await admit(task_store, tenant_id, limits)).refused is Limit.STARTS
    connection = await asyncpg.connect(postgres_dsn)
    await connection.execute("UPDATE tenant_starts SET at = at - interval '61 s' WHERE tenant_id = $1", tenant_id)
    assert (await admit(task_store, tenant_id, limits)).refused is None
    await connection.execute("UPDATE tenant_starts SET at = at - interval '8 days' WHERE tenant_id = $1", tenant_id)
    assert (await admit(task_store, tenant_id, limits)).refused is None
    assert await connection.fetchval("SELECT count(*) FROM tenant_starts WHERE tenant_id = $1", tenant_id) == 1
    await connection.close()


@pytest.mark.parametrize("limits", [TenantLimits(starts_per_minute=2), TenantLimits(open_tasks=2)])
async def test_a_start_that_was_admitted_is_claimed_however_long_its_run_waits(
    task_store: TaskStore, tenant_id: str, postgres_dsn: str, limits: TenantLimits
) -> None:
    waiting = [new_task_id() for _ in range(2)]
    for task_id in waiting:
        admission = await task_store.admit_start(tenant_id=tenant_id, task_id=task_id, size=1, limits=limits)
        assert admission.refused is None
    connection = await asyncpg.connect(postgres_dsn)
    await connection.execute("UPDATE tenant_starts SET at = at - interval '1 h' WHERE tenant_id = $1", tenant_id)
    later = [new_task_id() for _ in range(2)]
    for task_id in later:
        admission = await task_store.admit_start(tenant_id=tenant_id, task_id=task_id, size=1, limits=limits)
        assert admission.refused is None, "the minute is over"
    await task_store.report_streams(process_id="gateway", open_of={})
    for task_id in (*later, *waiting):
        assert await task_store.claim(claim_of(task_id, tenant_id=tenant_id), limits=limits)
    await connection.execute("UPDATE tenant_starts SET at = at - interval '1 h' WHERE tenant_id = $1", tenant_id)
    await task_store.report_streams(process_id="gateway", open_of={})
    assert await connection.fetchval("SELECT count(*) FROM tenant_starts WHERE tenant_id = $1", tenant_id) == 0
    await connection.close()


async def test_an_ended_task_makes_room_for_another(task_store: TaskStore, tenant_id: str) -> None:
    limits, task_id = TenantLimits(open_tasks=1), new_task_id()
    await task_store.admit_start(tenant_id=tenant_id, task_id=task_id, size=1, limits=limits)
    await task_store.claim(claim_of(task_id, tenant_id=tenant_id), limits=limits)
    refused = await admit(task_store, tenant_id, limits)
    assert refused.refused is Limit.OPEN_TASKS and tenant_id in refused.sentence(tenant_id)
    await task_store.write(write_of(task_id, end(), status=TaskStatus.COMPLETED))
    assert (await admit(task_store, tenant_id, limits)).refused is None


async def test_claims_past_the_gateway_are_bounded_and_leave_nothing(stores: list[TaskStore], tenant_id: str) -> None:
    limits = TenantLimits(open_tasks=3)
    claims = [claim_of(new_task_id(), tenant_id=tenant_id) for _ in range(AT_ONCE)]
    outcomes = await asyncio.gather(
        *(stores[n % 2].claim(claim, limits=limits) for n, claim in enumerate(claims)), return_exceptions=True
    )
    assert outcomes.count(True) == 3
    assert sum(isinstance(outcome, StartRefused) for outcome in outcomes) == AT_ONCE - 3
    for claim, outcome in zip(claims, outcomes, strict=True):
        assert await stores[0].is_claimed(claim.task_id) == (outcome is True)
        assert (await stores[0].task(claim.task_id) is not None) == (outcome is True)


@pytest.mark.parametrize("is_far_from_limits", [True, False])
async def test_a_claim_that_waits_for_its_starts_slow_admission_is_taken(
    task_store: TaskStore, tenant_id: str, postgres_dsn: str, is_far_from_limits: bool
) -> None:
    """The gateway waits two seconds for an admission, which goes on. The start is accepted, and its run claims it."""
    limits, task_id = TenantLimits(starts_per_minute=10_000 if is_far_from_limits else 1), new_task_id()
    if is_far_from_limits:
        await admit(task_store, tenant_id, limits)
    slow = await asyncpg.connect(postgres_dsn)
    admission = slow.transaction()
    await admission.start()
    await slow.execute("SELECT pg_advisory_xact_lock(hashtextextended($1, 17))", tenant_id)
    await slow.execute("INSERT INTO tenant_starts (tenant_id, task_id, bytes) VALUES ($1, $2, 1)", tenant_id, task_id)
    waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND $1 = ANY(pg_blocking_pids(pid))"
    claim = asyncio.create_task(task_store.claim(claim_of(task_id, tenant_id=tenant_id), limits=limits))

    async def waits() -> bool:
        return bool(await slow.fetchval(waiting, slow.get_server_pid()))

    await until(waits)
    await admission.commit()
    assert await claim
    starts = "SELECT count(*) FROM tenant_starts WHERE task_id = $1"
    assert await slow.fetchval(starts, task_id) == 1
    await slow.close()


async def test_a_run_that_was_reset_gets_back_the_claim_that_the_store_lost(
    task_store: TaskStore, tenant_id: str
) -> None:
    """It may hold credits and have a job: refused by a limit it would end without giving them back."""
    limits, task_id = TenantLimits(open_tasks=1), new_task_id()
    assert await task_store.claim(claim_of(new_task_id(), tenant_id=tenant_id), limits=limits)
    first = TaskRun(task_id=task_id, run_id="run-1", first_execution_run_id="run-1")
    with pytest.raises(StartRefused):
        await task_store.claim(claim_of(task_id, tenant_id=tenant_id), first, limits=limits)
    reset = first.model_copy(update={"run_id": "reset"})
    assert await task_store.claim(claim_of(task_id, tenant_id=tenant_id), reset, limits=limits)


async def test_streams_of_all_processes_count_until_one_is_gone(
    stores: list[TaskStore], tenant_id: str, postgres_dsn: str
) -> None:
    limits = TenantLimits(open_streams=3)

    async def opened(n: int, own_open: int) -> Admission:
        return await stores[n].admit_stream(
            tenant_id=tenant_id, process_id=f"{tenant_id}-{n}", own_open=own_open, limits=limits
        )

    assert [(await opened(n, own)).refused for n, own in ((0, 0), (1, 0), (1, 1))] == [None] * 3
    refused = await opened(0, 1)
    assert (refused.refused, refused.allowances[0].left) == (Limit.OPEN_STREAMS, 0)
    await stores[1].report_streams(process_id=f"{tenant_id}-1", open_of={tenant_id: 1})
    assert (await opened(0, 1)).refused is None
    connection = await asyncpg.connect(postgres_dsn)
    await connection.execute(
        "UPDATE tenant_streams SET reported_at = now() - interval '31 s' WHERE process_id = $1", f"{tenant_id}-1"
    )
    assert (await opened(0, 2)).refused is None, "a process that was killed holds no streams"
    await stores[0].report_streams(process_id=f"{tenant_id}-0", open_of={})
    assert await connection.fetchval("SELECT count(*) FROM tenant_streams WHERE tenant_id = $1", tenant_id) == 0
    await connection.close()
