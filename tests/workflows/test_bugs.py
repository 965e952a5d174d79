"""A bug in workflow code shows immediately and undoes nothing: a fixed worker goes on from there (pitfalls 9, 23, 32).

A test repairs what it broke, as a worker with the fixed code would.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import pytest_asyncio
from temporalio.client import WorkflowExecutionStatus
from temporalio.testing import WorkflowEnvironment

from comfyui_temporal.contracts.tasks import TaskStatus
from store import TaskStore
from tests.workflows.books import ended
from tests.workflows.payers import holds_of, kinds_of, until_started
from tests.workflows.platform import Handle, Platform, running_platform, task_id_of
from workflows.settlement import Settlement
from workflows.task_record import TaskRecord

BUG = ("bug",)


class Bug(Exception):
    """An unexpected error."""


async def broken(*_arguments: Any, **_named: Any) -> Any:
    raise Bug


@pytest_asyncio.fixture
async def platform(temporal_env: WorkflowEnvironment, task_store: TaskStore, tmp_path: Path) -> AsyncIterator[Platform]:
    """A platform of its own: the failed workflow tasks here are intended."""
    async with running_platform(temporal_env, task_store, tmp_path, speed=1.0) as platform, platform.worker():
        yield platform


async def started(platform: Platform) -> Handle:
    handle = await platform.start_image()
    await until_started(platform, handle)
    await platform.until_settled(handle)
    return handle


async def until_seen(platform: Platform, handle: Handle) -> None:
    """Wait until an operator sees the bug: the workflow task fails, and is tried again."""

    async def is_seen() -> bool:
        pending = (await handle.describe()).raw_description.pending_workflow_task
        return pending.attempt > 1

    await platform.until(is_seen)


async def finish(platform: Platform, handle: Handle) -> None:
    await platform.simulators.admin.comfyui.act((await platform.job(handle)).run_id, "finish")


@pytest.mark.parametrize(
    ("owner", "name"), [(Settlement, "charge"), (TaskRecord, "_write_batch")], ids=["settling", "recording"]
)
async def test_a_bug_on_the_way_to_the_end_undoes_nothing(
    platform: Platform, monkeypatch: pytest.MonkeyPatch, owner: type, name: str
) -> None:
    handle = await started(platform)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, broken)
        await finish(platform, handle)
        await until_seen(platform, handle)
        assert [hold.phase for hold in await holds_of(platform, handle)] == ["open"]
        assert (await handle.describe()).status is WorkflowExecutionStatus.RUNNING
    ending = await ended(platform, handle, exempt=BUG)
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, 24)


async def test_a_task_whose_row_is_gone_settles_all_the_same(platform: Platform, postgres_dsn: str) -> None:
    """The store will never take its events: no money depends on them."""
    handle = await started(platform)
    connection = await asyncpg.connect(postgres_dsn)
    for table in ("task_events", "task_exceptions", "tasks"):
        await connection.execute(f"DELETE FROM {table} WHERE task_id = $1", task_id_of(handle))
    await connection.close()
    await finish(platform, handle)
    result = await handle.result()
    assert (result["status"], result["credits"]["charged"]) == ("completed", 24)
    assert await kinds_of(platform, handle) == ["pre_deduct", "commit"]
