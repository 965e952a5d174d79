"""One job or training as the simulator keeps it: its progress on its plan, and what a GET shows of it.

Times are work seconds (`clock.work()`), so a run's plan is in contract seconds at any speed.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel

from comfyui_temporal.contracts.comfyui import TaskPriority
from comfyui_temporal.contracts.errors import ErrorDetails
from proof.simulators.admin_wire import Parameters

Phase = Literal["idle", "waiting", "working", "over", "forgotten"]
ONLY_AT_THE_END: Final = frozenset({"actual_cost", "result_urls", "output"})
"""Fields that a `job_lie` changes only after the run has finished; before that they are empty."""


class Segment(BaseModel):
    """A stretch of work on a GPU: a callback reports its end."""

    status: str
    stage: str | None = None
    seconds: float
    progress_from: float
    progress_to: float
    checkpoint_epoch: int | None = None
    """The epoch whose checkpoint is written when the segment ends."""


class Trouble(BaseModel):
    """What goes wrong with a run when `parameters.at` of its work is done, or while it is queued."""

    kind: Literal["fail", "stall", "forget", "lie", "gpu_hours"]
    parameters: Parameters


class Forecast(BaseModel):
    """When a run is expected to start and end, in work seconds, and how many are ahead of it."""

    starts: float
    ends: float
    ahead: int | None = None


class Run(BaseModel):
    """Shared by images and trainings. `phase`: idle (not started), waiting (for a GPU), working, over, forgotten."""

    run_id: str
    kind: Literal["image", "training"]
    task_id: str
    tenant_id: str
    user_id: str
    priority: TaskPriority
    callback_url: str
    base_url: str
    pool: str
    phase: Phase = "idle"
    plan: list[Segment]
    queue_seconds: float
    """The least time in the queue, in work seconds."""
    counted_from: float
    """From when `estimated_time` counts: the submission, a training's start."""
    waiting_since: float = 0.0
    ready_at: float = 0.0
    index: int = 0
    segment_since: float = 0.0
    has_begun: bool = False
    stalled_at: float | None = None
    is_instant: bool = False
    slow_factor: float = 1.0
    troubles: list[Trouble] = []
    overlay: dict[str, Any] = {}
    error_details: ErrorDetails | None = None
    error_as_text: bool = False
    sequence: int = 0
    shown: dict[str, Any] = {}
    log: list[dict[str, str]] = []
    """Lines that no callback has carried yet."""

    @property
    def is_open(self) -> bool:
        return self.phase in ("idle", "waiting", "working")

    @property
    def holds_gpu(self) -> bool:
        return self.phase == "working" and not self.is_instant

    @property
    def has_finished(self) -> bool:
        return self.phase == "over" and self.error_details is None

    @property
    def total_seconds(self) -> float:
        return sum(segment.seconds for segment in self.plan)

    @property
    def done_before(self) -> float:
        """Work seconds of the segments that have ended."""
        return sum(segment.seconds for segment in self.plan[: self.index])

    @property
    def segment(self) -> Segment:
        return self.plan[min(self.index, len(self.plan) - 1)]

    def within_segment(self, at: float) -> float:
        """How much of the present segment is done, 0 to 1."""
        if self.phase != "working":
            return 0.0
        spent = (self.stalled_at if self.stalled_at is not None else at) - self.segment_since
        return min(1.0, max(0.0, spent / self.segment.seconds)) if self.segment.seconds else 1.0

    def share_done(self, at: float) -> float:
        """How much of the whole work is done, 0 to 1."""
        if self.index >= len(self.plan):
            return 1.0
        done = self.done_before + self.within_segment(at) * self.segment.seconds
        return done / self.total_seconds if self.total_seconds else 0.0

    def ends_if_undisturbed(self) -> float:
        """The work time at which its plan ends; only while it is working."""
        return self.segment_since + self.total_seconds - self.done_before

    def stage_ends(self) -> float:
        """The work time at which the present stage ends; only while it is working."""
        rest = self.plan[self.index :]
        same = 0.0
        for segment in rest:
            if segment.stage != rest[0].stage:
                break
            same += segment.seconds
        return self.segment_since + same

    def next_trouble(self) -> tuple[float, Trouble] | None:
        """The next trouble of a working run and the work time at which it comes."""
        due = [
            (self.segment_since + trouble.parameters.at * self.total_seconds - self.done_before, number)
            for number, trouble in enumerate(self.troubles)
            if not trouble.parameters.while_queued
        ]
        if not due:
            return None
        at, number = min(due)
        return max(at, self.segment_since), self.troubles[number]

    def progress(self, at: float, forecast: Forecast) -> float:
        """`stage_progress`: whole percent of the present stage; never less than was shown in it before."""
        if self.phase == "waiting":
            span = forecast.starts - self.waiting_since
            share = (at - self.waiting_since) / span if span > 0 else 1.0
            now = min(99.0, max(0.0, 100 * share))
        elif self.phase == "working":
            segment = self.segment
            now = segment.progress_from + self.within_segment(at) * (segment.progress_to - segment.progress_from)
        else:
            now = 0.0
        # Without a tiny addition 30 % of a segment would be rounded down to 29.
        return float(int(max(now, self._shown_progress()) + 1e-6))

    def _shown_progress(self) -> float:
        status, stage = self.standing()
        if (self.shown.get("job_status") or self.shown.get("training_status")) != status and self.kind == "image":
            return 0.0
        if self.shown.get("training_stage") != stage:
            return 0.0
        return float(self.shown.get("stage_progress") or 0.0)

    @abstractmethod
    def standing(self) -> tuple[str, str | None]:
        """Status and stage on the wire."""

    @abstractmethod
    def fields(
        self, at: float, forecast: Forecast, datetime_of: Callable[[float], datetime], speed: float
    ) -> dict[str, Any]:
        """What GET answers, without `sequence` and lies."""

    def shown_error(self) -> dict[str, Any] | str | None:
        """`error_details` on the wire."""
        if self.error_details is None:
            return None
        return self.error_details.message if self.error_as_text else self.error_details.model_dump(mode="json")

    def lied(self, fields: dict[str, Any]) -> dict[str, Any]:
        """The fields as changed by `job_lie`."""
        overlay = {
            name: value for name, value in self.overlay.items() if name not in ONLY_AT_THE_END or self.has_finished
        }
        return fields | overlay

    def segment_ended(self, segment: Segment, at: datetime, folder: Path) -> None:
        """What a segment leaves behind: a checkpoint, log lines."""

    def finish(self, at: datetime, folder: Path) -> None:
        """The work is done: results appear."""

    def minutes_until(self, ends: float, speed: float) -> float:
        """`estimated_time`: minutes at the present speed."""
        return max(round((ends - self.counted_from) / speed / 60, 6), 0.000001)
