"""What commands print: aligned lines for terminals, or one JSON document on standard output for scripts."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.text import Text

from comfyui_temporal.client.models import TaskDetails, TaskOutcome, TaskSummary
from comfyui_temporal.command_line.failures import CommandFailure
from comfyui_temporal.command_line.glances import Glance
from comfyui_temporal.command_line.terminal import confirmation_of, eta_of, printable, span
from comfyui_temporal.contracts.comfyui import TrainingOutput
from comfyui_temporal.contracts.tasks import (
    CreditsSummary,
    SettlementState,
    TaskDelay,
    TaskStatus,
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


def credit_lines(credits: CreditsSummary | None, *, has_ended: bool = False) -> Lines:
    if credits is None:
        return
    points = {"estimated": credits.estimated, "held": credits.held}
    if credits.settlement is not SettlementState.UNKNOWN:
        points |= {"charged": credits.charged or 0, "returned": credits.returned or 0}
    if credits.shortfall:
        points["shortfall"] = credits.shortfall
    yield "points", ", ".join(f"{name} {count}" for name, count in points.items())
    if credits.settlement is SettlementState.OPEN and has_ended and credits.held:
        yield "settlement", "open: the hold is not given back yet"
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
    yield from credit_lines(outcome.credits, has_ended=True)
    if result is not None and result.attempts:
        yield "attempts", str(result.attempts)
    yield "workflow", outcome.workflow_id
    yield "Temporal UI", outcome.ui_url or ""


def _progress_lines(task_id: str, progress: TrainingProgress) -> Lines:
    yield "status", progress.status.value
    yield "stage", f"{progress.stage or '-'}, {progress.progress:.0f} %"
    yield "ETA", eta_of(progress)
    yield "as of", f"{span((datetime.now(UTC) - progress.as_of).total_seconds())} ago" if progress.as_of else ""
    if progress.confirmation is not None:
        yield "waits", confirmation_of(task_id, progress.confirmation)
    yield "job", progress.job_id or ""
    yield "attempts", str(progress.attempts)
    if progress.error_details is not None:
        yield "last error", f"{progress.error_details.code}: {progress.error_details.message}"
    if progress.callbacks_refused:
        yield "callbacks refused", str(progress.callbacks_refused)


def _delay_lines(delays: Iterable[TaskDelay]) -> Lines:
    """What is tried, since when, until when."""
    for delay in delays:
        yield "delayed by", f"{delay.code}: {delay.sentence}"
        until = f"until {_instant(delay.until)}" if delay.until else delay.limit or ""
        tried = f"{delay.call} failed {delay.tries} times" if delay.call else ""
        since = f"since {_instant(delay.since)}" if delay.since else ""
        again = f"next try {_instant(delay.next_try_at)}" if delay.next_try_at and delay.call else ""
        yield "", ", ".join(part for part in (tried, since, again, until) if part)


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
    yield from _delay_lines(details.delays)
    yield from credit_lines(details.credits)
    yield "workflow", task.workflow_id
    yield "Temporal UI", task.ui_url or ""


def print_rows(rows: list[TaskSummary]) -> None:
    """One tab-separated line for each task, for scripts."""
    for row in rows:
        cells = (row.task_id, row.scene, row.status, row.stage, row.tenant_id, row.priority, _instant(row.started_at))
        sys.stdout.write("\t".join(printable(cell or "") for cell in cells) + "\n")


def print_table(console: Console, rows: list[TaskSummary], seen: Mapping[str, Glance]) -> None:
    """A table for a terminal: ids whole, and what each task is for as far as the line goes."""
    if not rows:
        console.print("No task matches.")
        return
    cells = [("task", "status", "age", "points", "for")]
    for row in rows:
        glance = seen[row.task_id]
        about = " ".join(glance.about.split())
        cells.append((row.task_id, _short_status(row), _age(row.started_at), glance.points, about))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)][:-1]
    room = max(0, console.width - sum(widths) - 2 * len(widths))
    for number, (*columns, about) in enumerate(cells):
        padded = "  ".join(f"{text:<{width}}" for text, width in zip(columns, widths, strict=True))
        shown = about if len(about) <= room else about[: max(0, room - 1)] + "…" * (room > 0)
        console.print(Text(printable(f"{padded}  {shown}"), style="" if number else "dim"), soft_wrap=True)


def _short_status(row: TaskSummary) -> str:
    if row.is_paused:
        return "paused"
    return row.stage or row.status or "" if row.status == TaskStatus.RUNNING else row.status or ""


def _age(instant: datetime | None) -> str:
    if instant is None:
        return ""
    seconds = (datetime.now(UTC) - instant).total_seconds()
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return f"{max(0, int(seconds))} s"


def _instant(instant: datetime | None) -> str:
    return instant.astimezone().isoformat(sep=" ", timespec="seconds") if instant else ""
