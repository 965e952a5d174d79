"""What `list` shows of each task beyond its search attributes: what it is for, and its points.

Both are read from Temporal, side by side and for a few seconds at most: what did not come by then is left blank.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from temporalio.service import RPCError

from comfyui_temporal.client.errors import TaskError
from comfyui_temporal.client.models import TaskSummary
from comfyui_temporal.command_line.connection import Connection
from comfyui_temporal.contracts.tasks import CreditsSummary, SettlementState
from comfyui_temporal.encryption_keys import EncryptionError

AT_ONCE: Final = 8
SECONDS: Final = 3.0


@dataclass
class Glance:
    """`about`: an image's prompt, a training's dataset. `points`: what was charged, or is held."""

    about: str = ""
    points: str = ""


async def glances(opened: Connection, rows: Sequence[TaskSummary]) -> dict[str, Glance]:
    """Task id → glance, for each of the rows."""
    found = {row.task_id: Glance() for row in rows}
    gate = asyncio.Semaphore(AT_ONCE)

    async def look(row: TaskSummary) -> None:
        async with gate:
            glance = found[row.task_id]
            glance.about = await _about(opened, row)
            with suppress(TaskError):
                glance.points = _points((await opened.tasks.show(row.task_id)).credits)

    with suppress(TimeoutError):
        async with asyncio.timeout(SECONDS):
            await asyncio.gather(*map(look, rows))
    return found


async def _about(opened: Connection, row: TaskSummary) -> str:
    """Read from the run's input, its first event. Blank if it is encrypted with a key that is not known here."""
    handle = opened.client.get_workflow_handle(row.workflow_id, run_id=row.run_id)
    try:
        async for event in handle.fetch_history_events(page_size=1):
            payloads = event.workflow_execution_started_event_attributes.input.payloads
            [given, *_] = await opened.client.data_converter.decode(payloads)
            return _said(given)
    except (RPCError, EncryptionError, ValueError, RuntimeError):
        return ""
    return ""


def _said(given: Any) -> str:
    """A continued run's input holds the task as `task`."""
    task = given.get("task", given) if isinstance(given, dict) else {}
    dataset = task.get("dataset") if isinstance(task, dict) else None
    if isinstance(dataset, dict):
        return f"{dataset.get('dataset_id', '')}, {task.get('base_model', 'base')}"
    return str(task.get("prompt", "")) if isinstance(task, dict) else ""


def _points(credits: CreditsSummary | None) -> str:
    if credits is None:
        return ""
    if credits.settlement is SettlementState.OPEN and not credits.charged:
        return f"{credits.held} held" if credits.held else ""
    return "unknown" if credits.charged is None else str(credits.charged)
