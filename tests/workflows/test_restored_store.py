"""A task store restored from a backup older than Temporal: rows that are missing, and rows of some time ago."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import asyncpg
import httpx
import pytest
import pytest_asyncio

from comfyui_temporal.contracts.give_back import GIVE_BACK_WORKFLOW, GiveBackOrder, give_back_id_of
from comfyui_temporal.contracts.tasks import TaskStatus
from tests.workflows.books import ended, ended_without_its_run, runs_of
from tests.workflows.payers import end_open_holds, has_kinds, holds_of, new_payer, row_of
from tests.workflows.platform import CALLERS, Handle, Platform, scheduled, task_id_of
from tests.workflows.reset_scenarios import POLICY, RENEWED, over, stalled, topped_up, work_goes_on
from tests.workflows.resets import points_of, reset

TABLES = ("task_claims", "tasks", "task_events", "task_exceptions")
Backup = dict[str, list[str]]


class Database:
    """What an operator does to PostgreSQL, for one task."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn

    async def backup(self, task_id: str) -> Backup:
        connection = await asyncpg.connect(self._dsn)
        rows = {
            table: [
                row["document"]
                for row in await connection.fetch(
                    f"SELECT to_jsonb(t)::text AS document FROM {table} t WHERE task_id = $1", task_id
                )
            ]
            for table in TABLES
        }
        await connection.close()
        return rows

    async def restore(self, task_id: str, backup: Backup | None = None) -> None:
        """Restore the task's rows from `backup`; without one the backup is older than the task."""
        connection = await asyncpg.connect(self._dsn)
        async with connection.transaction():
            for table in reversed(TABLES):
                await connection.execute(f"DELETE FROM {table} WHERE task_id = $1", task_id)
            for table in TABLES:
                for document in (backup or {}).get(table, []):
                    await connection.execute(
                        f"INSERT INTO {table} SELECT * FROM jsonb_populate_record(NULL::{table}, $1::jsonb)", document
                    )
        await connection.close()


@pytest.fixture
def database(postgres_dsn: str) -> Database:
    return Database(postgres_dsn)


@pytest_asyncio.fixture
async def platform(quick_platform: Platform) -> Platform:
    quick_platform.policy |= POLICY
    return quick_platform


async def given_back(platform: Platform, handle: Handle) -> dict[str, Any]:
    result: dict[str, Any] = await platform.client.execute_workflow(
        GIVE_BACK_WORKFLOW,
        GiveBackOrder(task_id=task_id_of(handle)),
        id=give_back_id_of(task_id_of(handle)),
        task_queue=platform.task_queue,
    )
    return result


# Open runs


async def test_an_open_run_whose_row_was_lost_recreates_it_and_is_delivered(
    platform: Platform, database: Database
) -> None:
    handle = await stalled(platform, (await new_payer(platform)).image())
    before = await row_of(platform, handle)
    await database.restore(task_id_of(handle))
    assert await platform.store.task(task_id_of(handle)) is None
    async with work_goes_on(platform, handle):
        ending = await ended(platform, handle)
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, 24)
    after = await row_of(platform, handle)
    assert (after.input_sha256, after.tenant_id, after.resolution) == (
        before.input_sha256,
        before.tenant_id,
        before.resolution,
    )


@pytest.mark.parametrize("kind", ["image", "training with a list of files"])
async def test_a_continued_run_recreates_its_row_as_it_was_claimed(
    platform: Platform, database: Database, kind: str
) -> None:
    """The owner's repeat of the start is the same task. With another hash it would be refused with 409."""
    platform.policy |= {"continue_as_new_events": 50, "poll_after_seconds": 0.2}
    payer = await new_payer(platform)
    task = payer.image() if kind == "image" else payer.training()
    if "dataset" in task:
        task["dataset"]["files"] = ["0.txt"]
    handle = await stalled(platform, task)
    before = await row_of(platform, handle)

    async def has_continued() -> bool:
        return len(await runs_of(platform, handle)) > 1

    await platform.until(has_continued)
    await database.restore(task_id_of(handle))
    async with work_goes_on(platform, handle):
        ending = await ended(platform, handle)
    assert ending.status is TaskStatus.COMPLETED
    after = await row_of(platform, handle)
    assert (after.input_sha256, after.created_at) == (before.input_sha256, before.created_at)
    route = "images" if kind == "image" else "trainings"
    token = CALLERS.made_for(payer.tenant_id, payer.user_id)
    async with httpx.AsyncClient(base_url=platform.gateway_url, trust_env=False) as http:
        repeat = await http.post(f"/api/v1/tasks/{route}", json=task, headers={"Authorization": f"Bearer {token}"})
    assert repeat.status_code == 200, repeat.text


@pytest.mark.on_both_profiles
@pytest.mark.parametrize("kind", ["image", "training"])
async def test_a_run_whose_row_is_lost_before_its_hold_takes_one_and_is_charged(
    platform: Platform, database: Database, kind: str
) -> None:
    payer = await new_payer(platform)
    task, route = (payer.image(), "submit_job") if kind == "image" else (payer.training(), "create_training")
    late = await platform.simulators.admin.comfyui.fault("delay", route=route, task_id=task["task_id"], seconds=1.0)
    handle = await platform.start(task)
    await platform.until_hit(route, late)
    await database.restore(task["task_id"])
    async with work_goes_on(platform, handle):
        ending = await ended(platform, handle)
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, 24 if kind == "image" else 120)
    assert [hold.phase for hold in await holds_of(platform, handle)] == ["committed"]
    assert not ending.exceptions
    row = await row_of(platform, handle)
    assert (len(row.hold_ids), len(row.job_ids)) == (1, 1)


async def test_an_open_run_whose_row_was_lost_is_cancelled_and_given_back(
    platform: Platform, database: Database
) -> None:
    handle = await stalled(platform, (await new_payer(platform)).image())
    await database.restore(task_id_of(handle))
    assert await platform.cancel(handle) == "accepted"
    ending = await ended(platform, handle)
    assert (ending.status, ending.charged) == (TaskStatus.CANCELLED, 0)


async def test_an_open_run_goes_on_with_an_older_row(platform: Platform, database: Database) -> None:
    """Its second hold and its job's progress are not in the backup."""
    handle = await stalled(platform, (await new_payer(platform)).training())
    older = await database.backup(task_id_of(handle))
    [run] = await platform.simulators.admin.comfyui.jobs(task_id_of(handle))
    await platform.simulators.admin.comfyui.act(run.run_id, "lie", fields={"gpu_hours": 5, "gpu_hours_used": 5})
    await platform.until(lambda: has_kinds(platform, handle, *RENEWED))
    await platform.until_settled(handle)
    await database.restore(task_id_of(handle), older)
    async with work_goes_on(platform, handle):
        ending = await ended(platform, handle)
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, 360)


@pytest.mark.parametrize("place", [0, -1], ids=["its beginning", "where it was"])
async def test_a_run_that_is_reset_after_the_row_was_lost_is_delivered(
    platform: Platform, database: Database, place: int
) -> None:
    handle = await topped_up(platform, await new_payer(platform))
    await database.restore(task_id_of(handle))
    run = await reset(platform, handle, (await points_of(platform, handle))[place])
    async with work_goes_on(platform, run):
        ending = await ended(platform, run)
    assert ending.status is TaskStatus.COMPLETED and ending.charged > 0
    assert sum(hold.phase == "committed" for hold in await holds_of(platform, handle)) == 1


# Runs that are over


async def test_a_completed_task_whose_row_is_open_again_is_completed_again(
    platform: Platform, database: Database
) -> None:
    handle = await stalled(platform, (await new_payer(platform)).image())
    older = await database.backup(task_id_of(handle))
    async with work_goes_on(platform, handle):
        ending = await ended(platform, handle)
    await database.restore(task_id_of(handle), older)
    assert (await given_back(platform, handle))["outcome"] == "already_charged"
    again = await ended_without_its_run(platform, task_id_of(handle))
    assert (again.status, again.charged) == (TaskStatus.COMPLETED, ending.charged)
    assert again.result["result_urls"] == ending.result["result_urls"]


async def test_a_task_that_ended_once_reset_is_given_back_where_its_row_is_open_again(
    platform: Platform, database: Database
) -> None:
    """The reset run has looked for the jobs of the run before it."""
    handle = await stalled(platform, (await new_payer(platform)).image())
    run = await reset(platform, handle, (await points_of(platform, handle))[-1])
    older = await database.backup(task_id_of(handle))
    async with work_goes_on(platform, run):
        ending = await ended(platform, run)
    assert ending.status is TaskStatus.COMPLETED and await scheduled(run, "unanswered_jobs")
    await database.restore(task_id_of(handle), older)
    result = await asyncio.wait_for(given_back(platform, handle), 30)
    assert result["outcome"] == "already_charged"
    again = await ended_without_its_run(platform, task_id_of(handle))
    assert (again.status, again.charged) == (TaskStatus.COMPLETED, ending.charged)


async def test_a_completed_task_that_was_charged_nothing_keeps_its_shortfall_where_its_row_is_open_again(
    platform: Platform, database: Database
) -> None:
    """Its hold had ended before its commit, and the charge was refused."""
    payer = await new_payer(platform)
    handle = await stalled(platform, payer.image())
    await end_open_holds(platform, handle)
    await payer.has(0)
    older = await database.backup(task_id_of(handle))
    async with work_goes_on(platform, handle):
        ending = await ended(platform, handle)
    assert (ending.status, ending.charged, ending.exceptions) == (TaskStatus.COMPLETED, 0, ["shortfall"])
    before = await row_of(platform, handle)
    await database.restore(task_id_of(handle), older)
    await given_back(platform, handle)
    again = await ended_without_its_run(platform, task_id_of(handle))
    assert (again.status, again.charged, again.exceptions) == (TaskStatus.COMPLETED, 0, ["shortfall"])
    assert (await row_of(platform, handle)).credits == before.credits
    assert [record.details for record in again.records] == [record.details for record in ending.records]


@pytest.mark.parametrize("how", ["cancelled", "failed"])
async def test_an_ended_task_whose_row_is_open_again_ends_as_it_had(
    platform: Platform, database: Database, how: str
) -> None:
    handle = await stalled(platform, (await new_payer(platform)).image())
    older = await database.backup(task_id_of(handle))
    if how == "cancelled":
        await platform.cancel(handle)
    else:
        [job] = await platform.simulators.admin.comfyui.jobs(task_id_of(handle))
        await platform.simulators.admin.comfyui.act(job.run_id, "fail", code="node_error")
    await over(handle)
    before = await row_of(platform, handle)
    await database.restore(task_id_of(handle), older)
    await given_back(platform, handle)
    again = await ended_without_its_run(platform, task_id_of(handle))
    assert (again.status, again.code) == (before.status, before.error.code if before.error else None)


async def test_a_backup_is_what_the_store_held(platform: Platform, database: Database) -> None:
    """Of the test's own means: a row that is restored is the row that was kept."""
    handle = await over(await platform.start((await new_payer(platform)).image()))
    row, backup = await row_of(platform, handle), await database.backup(task_id_of(handle))
    events = await platform.store.events(task_id_of(handle))
    assert len(backup["task_events"]) == len(events) and json.loads(backup["tasks"][0])["task_id"] == row.task_id
    await database.restore(task_id_of(handle))
    await database.restore(task_id_of(handle), backup)
    assert await row_of(platform, handle) == row and await platform.store.events(task_id_of(handle)) == events
