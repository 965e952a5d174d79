"""Progress as bars on a terminal, else as plain lines. Foreign text cannot control the terminal."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.text import Text

from comfyui_temporal.contracts.tasks import Confirmation, TrainingProgress

_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_WIDE: Final = 120
_PLAIN_STEP: Final = 10
"""Plain lines report every stage, and each step of this many percent within a stage."""


def printable(text: str) -> str:
    """Foreign text without characters that could move the cursor, hide other text or break the encoding."""
    return _CONTROL.sub("\ufffd", text)


def span(seconds: float) -> str:
    """A duration in words: `12 s`, `3 min 5 s`, `2 h 10 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest and minutes < 10 else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def eta_of(progress: TrainingProgress, now: datetime | None = None) -> str:
    """When the next stage is expected, and the task's estimated total time."""
    parts = []
    if progress.next_eta is not None:
        left = (progress.next_eta - (now or datetime.now(UTC))).total_seconds()
        parts.append(f"next stage in {span(left)}" if left >= 0.5 else "next stage any moment")
    if progress.estimated_time is not None:
        parts.append(f"about {span(progress.estimated_time * 60)} in all")
    if progress.queue_position:
        parts.append(f"{progress.queue_position} ahead")
    return ", ".join(parts)


def confirmation_of(task_id: str, wanted: Confirmation) -> str:
    """The price that a training needs to have confirmed, and the command that confirms it."""
    balance = f", balance {wanted.current_balance}" if wanted.current_balance is not None else ""
    topup = f", top up {wanted.suggest_topup}" if wanted.suggest_topup else ""
    by = f"by {wanted.confirm_by:%H:%M:%S %Z}" if wanted.confirm_by else "before its next checkpoint, where it stops,"
    return (
        f"costs {wanted.estimated_cost} points{balance}{topup}: confirm {by} with "
        f"`comfyui-tasks confirm {task_id} --max-credits {wanted.estimated_cost}`"
    )


class PlainLines:
    """One line for each stage, attempt, confirmation and ten percent."""

    def __init__(self, console: Console, task_id: str) -> None:
        self._console = console
        self._task_id = task_id
        self._shown: tuple[object, ...] | None = None
        self._silent = False

    def progressed(self, progress: TrainingProgress) -> None:
        self._silent = False
        step = int(progress.progress // _PLAIN_STEP)
        wanted = progress.confirmation
        label = progress.stage or progress.status.value
        now = (label, progress.attempts, step, wanted)
        if now == self._shown:
            return None
        self._shown = now
        if wanted is not None:
            return self._say(confirmation_of(self._task_id, wanted))
        attempt = f"  attempt {progress.attempts}" if progress.attempts > 1 else ""
        return self._say(f"{label:<13}{progress.progress:3.0f} %  {eta_of(progress)}{attempt}")

    def waits_for_worker(self, sentence: str) -> None:
        if not self._silent:
            self._silent = True
            self._say(sentence)

    def ended(self, status: str) -> None:
        self._say(status)

    def _say(self, text: str) -> None:
        line = f"{datetime.now().astimezone():%H:%M:%S}  {self._task_id}  {printable(text).rstrip()}"
        self._console.print(Text(line), soft_wrap=True)


class _Eta(ProgressColumn):
    def __init__(self, *, is_narrow: bool) -> None:
        super().__init__()
        self._is_narrow = is_narrow

    def render(self, task: Task) -> Text:
        state = task.fields.get("state")
        eta = eta_of(state) if isinstance(state, TrainingProgress) else ""
        # Only the first part: a row that is too long would cut off the ETA.
        return Text(eta.partition(", ")[0] if self._is_narrow else eta, style="dim")


class Bar:
    """One task's bar: stage, percentage within the stage, ETA. Sentences are printed once, above the bars."""

    def __init__(self, bars: Progress, task_id: str) -> None:
        self._bars = bars
        self._task_id = task_id
        self._row: TaskID = bars.add_task(task_id, total=100, stage="starting", state=None)
        self._shown: str | None = None

    def progressed(self, progress: TrainingProgress) -> None:
        wanted = progress.confirmation
        stage = "price open" if wanted and wanted.confirm_by else printable(progress.stage or progress.status.value)
        self._bars.update(self._row, completed=progress.progress, stage=stage, state=progress)
        self._print_once(f"{self._task_id} {confirmation_of(self._task_id, wanted)}" if wanted else None)

    def waits_for_worker(self, sentence: str) -> None:
        self._print_once(sentence)

    def ended(self, status: str) -> None:
        self._bars.update(self._row, stage=status, state=None, completed=100 if status == "completed" else None)

    def _print_once(self, sentence: str | None) -> None:
        if sentence is not None and sentence != self._shown:
            self._bars.console.print(Text(printable(sentence)), soft_wrap=True)
        self._shown = sentence


@contextmanager
def watchers(console: Console, task_ids: list[str]) -> Iterator[dict[str, Bar | PlainLines]]:
    """One watcher for each task: moving bars on a terminal, else plain lines."""
    if not console.is_terminal:
        yield {task_id: PlainLines(console, task_id) for task_id in task_ids}
        return
    is_narrow = console.width < _WIDE
    bars = Progress(
        SpinnerColumn(finished_text="•"),
        TextColumn("{task.description}", markup=False),
        TextColumn("{task.fields[stage]:<12}", markup=False),
        BarColumn(bar_width=10 if is_narrow else 30, finished_style="green"),
        TextColumn("{task.percentage:>3.0f} %"),
        _Eta(is_narrow=is_narrow),
        console=console,
    )
    with bars:
        yield {task_id: Bar(bars, task_id) for task_id in task_ids}
