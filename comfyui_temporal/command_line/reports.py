"""What commands print: aligned lines for terminals, or one JSON document on standard output for scripts."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from datetime import datetime
from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table
from rich.text import Text

from comfyui_temporal.client.models import TaskDetails, TaskOutcome, TaskSummary
from comfyui_temporal.command_line.failures import CommandFailure
from comfyui_temporal.command_line.terminal import confirmation_of, eta_of, printable
from comfyui_temporal.contracts.comfyui import TrainingOutput
from comfyui_temporal.contracts.tasks import (
    CreditsSummary,
    SettlementState,
    TrainingProgress,
)

Lines = Iterable[tuple[str, str]]


def print_json(value: BaseModel | dict[str, Any] | list[Any]) -> None:
    """One document on one line, in pure ASCII, so that readers need no locale."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def print_lines(console: Console, lines: Lines) -> None:
    """`name   value` lines, never wrapped: users copy and click addresses in them."""
    rows = [(name, value) for name, value in lines if value]
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        console.print(Text.assemble((f"{name:<{width}}  ", "dim"), printable(value)), soft_wrap=True)


def print_failure(console: Console, failure: CommandFailure, *, as_json: bool) -> None:
    if as_json:
        print_json({"error": {"code": failure.code, "message": failure.sentence, "fields": failure.fields}})
        return
    console.print(Text(printable(failure.sentence), style="red"), soft_wrap=True)
    for name, reason in failure.fields.items():
        console.print(Text(f"  {printable(name)}: {printable(reason)}"), soft_wrap=True)


def credit_lines(credits: CreditsSummary | None) -> Lines:
    if credits is None:
        return
    points = {"estimated": credits.estimated, "held": credits.held}
    if credits.settlement is not SettlementState.UNKNOWN:
        points |= {"charged": credits.charged or 0, "returned": credits.returned or 0}
    if credits.shortfall:
        points["shortfall"] = credits.shortfall
    yield "points", ", ".join(f"{name} {count}" for name, count in points.items())
    if credits.settlement is SettlementState.UNKNOWN:
        yield "settlement", "unknown: the ledger does not show yet whether it was charged; it is checked again"


def outcome_lines(outcome: TaskOutcome) -> Lines:
    """A task's end: result or reason, points, links."""
    yield "task", outcome.task_id
    yield "status", outcome.status.value
    if outcome.code or outcome.sentence:
        yield "because", ": ".join(part for part in (outcome.code, outcome.sentence) if part)
    result = outcome.result
    for url in getattr(result, "result_urls", []):
        yield "image", url
    output: TrainingOutput | None = getattr(result, "output", None)
    if output is not None:
        yield "model", output.model_path or ""
        yield "version", output.version or ""
        metrics = output.metrics or {}
        yield "metrics", ", ".join(f"{name} {value:g}" for name, value in metrics.items())
    yield from credit_lines(outcome.credits)
    if result is not None:
        yield "attempts", str(result.attempts)
    yield "workflow", outcome.workflow_id
    yield "Temporal UI", outcome.ui_url or ""


def _progress_lines(task_id: str, progress: TrainingProgress) -> Lines:
    yield "status", progress.status.value
    yield "stage", f"{progress.stage or '-'}, {progress.progress:.0f} %"
    yield "ETA", eta_of(progress)
    if progress.confirmation is not None:
        yield "waits", confirmation_of(task_id, progress.confirmation)
    yield "job", progress.job_id or ""
    yield "attempts", str(progress.attempts)
    if progress.error_details is not None:
        yield "last error", f"{progress.error_details.code}: {progress.error_details.message}"
    if progress.callbacks_refused:
        yield "callbacks refused", str(progress.callbacks_refused)


def details_lines(details: TaskDetails) -> Lines:
    """What `show` prints."""
    task = details.task
    yield "task", task.task_id
    yield "scene", task.scene or ""
    yield "template", task.template_id or ""
    yield "for", " / ".join(part for part in (task.tenant_id, task.user_id) if part)
    yield "priority", task.priority or ""
    yield "started", _instant(task.started_at)
    yield "ended", _instant(task.ended_at)
    if task.is_paused:
        yield "paused", f"until: temporal workflow unpause --workflow-id {task.workflow_id}"
    if details.outcome is not None:
        yield from (line for line in outcome_lines(details.outcome) if line[0] != "task")
        return
    if details.progress is not None:
        yield from _progress_lines(task.task_id, details.progress)
    else:
        yield "status", f"{task.status or 'open'} (no worker answers, so this is what the run last wrote)"
    yield from credit_lines(details.credits)
    yield "workflow", task.workflow_id
    yield "Temporal UI", task.ui_url or ""


def print_rows(console: Console, rows: list[TaskSummary]) -> None:
    """A table on a terminal, tab-separated lines elsewhere."""
    columns = ("task", "scene", "status", "stage", "tenant", "priority", "started")
    cells = [
        (
            row.task_id,
            row.scene or "",
            row.status or "",
            row.stage or "",
            row.tenant_id or "",
            row.priority or "",
            _instant(row.started_at),
        )
        for row in rows
    ]
    if not console.is_terminal:
        for cell in cells:
            sys.stdout.write("\t".join(map(printable, cell)) + "\n")
        return
    table = Table(*columns, box=None, header_style="dim")
    for cell in cells:
        table.add_row(*(Text(printable(text)) for text in cell))
    console.print(table if rows else Text("No task matches."))


def _instant(instant: datetime | None) -> str:
    return instant.astimezone().isoformat(sep=" ", timespec="seconds") if instant else ""
