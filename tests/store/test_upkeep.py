"""Purge: tasks that ended long ago are deleted whole; recent and open tasks and all claims stay."""

from __future__ import annotations

import asyncio
import os
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from pydantic import ValidationError

from comfyui_temporal.contracts.comfyui import TaskPriority, TrainingLogLine
from comfyui_temporal.contracts.task_store import TrainingLogWrite
from comfyui_temporal.contracts.tasks import TaskStatus
from runtime.settings import Settings
from store import TaskStore
from store.upkeep import LINES_AT_ONCE
from tests.conftest import NewDatabase
from tests.store.facts import claim_of, end, fact, new_task_id, write_of


async def test_the_command_purges_what_ended_before_the_retention_and_the_claims_stay(
    new_database: NewDatabase,
) -> None:
    dsn = await new_database()
    store = TaskStore(dsn)
    now = datetime.now(UTC)
    old, young, still_open = (new_task_id() for _ in range(3))
    for task_id, at in ((old, now - timedelta(days=31)), (young, now - timedelta(days=29))):
        await store.claim(claim_of(task_id))
        await store.write(write_of(task_id, fact("a"), end(ts=at), status=TaskStatus.COMPLETED))
    await store.claim(claim_of(still_open, at=now - timedelta(days=100)))
    lines = [TrainingLogLine(ts=now, level="info", message="x")] * 3_000
    await store.note_made(old, "job", "t")
    for sequence in range(2):
        await store.write_log(old, [TrainingLogWrite(task_id=old, training_id="t", sequence=sequence, lines=lines)])
    assert LINES_AT_ONCE < 6_000

    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "store", "purge"),
        env={**os.environ, "COMFYUI_TEMPORAL_DATABASE_DSN": dsn, "COMFYUI_TEMPORAL_RETENTION_DAYS": "30"},
        cwd=Path(__file__).parents[2],
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await asyncio.wait_for(process.communicate(), 30)

    assert process.returncode == 0
    assert output.startswith(b"1 tasks")
    assert await store.task(old) is None
    assert await store.events(old) == [] and await store.training_log(old) == []
    assert await store.is_claimed(old)
    assert await store.claimed_input(old) == "0" * 64
    assert not await store.claim(claim_of(old, run_id="another-run"))
    assert await store.task(young) is not None and await store.task(still_open) is not None
    await store.close()


def test_nothing_is_purged_before_30_days() -> None:
    with pytest.raises(ValidationError, match="retention_days"):
        Settings(_env_file=None, retention_days=29)


async def test_the_queues_are_reported_by_priority(new_database: NewDatabase) -> None:
    store = TaskStore(await new_database())
    ago = datetime.now(UTC) - timedelta(minutes=10)
    for _ in range(2):
        await store.claim(claim_of(new_task_id(), priority=TaskPriority.ACCELERATED, at=ago))
    running = new_task_id()
    await store.claim(claim_of(running))
    await store.write(write_of(running, fact("a")))

    states = {state.priority: state for state in await store.queue_states()}

    assert states[TaskPriority.ACCELERATED].queued == 2
    assert 600 <= states[TaskPriority.ACCELERATED].oldest_seconds < 660
    assert (states[TaskPriority.STANDARD].queued, states[TaskPriority.STANDARD].oldest_seconds) == (0, 0.0)
    await store.close()
