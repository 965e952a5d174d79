"""Trainings (contract §3): created, started, checkpointed, ended. How one runs is drawn when it is created."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, Final

from comfyui_temporal.contracts.calls import CallFor, JobCall, Post
from comfyui_temporal.contracts.comfyui import (
    Checkpoint,
    GpuPool,
    TrainingAccepted,
    TrainingOutput,
    TrainingStage,
    TrainingState,
    TrainingStatus,
)
from comfyui_temporal.contracts.errors import Answer, ErrorDetails, FailureCode
from proof.simulation.comfyui_model import ComfyUIModel, Work, refused

ENDS: Final = (*("completed",) * 10, *("preempted",) * 4, "node_error", "failed_without_details", "forgotten", "stall")
_ERRORS: Final = {
    "preempted": ErrorDetails(code=FailureCode.GPU_PREEMPTED, message="preempted", retryable=True),
    "node_error": ErrorDetails(code=FailureCode.NODE_ERROR, message="a node failed"),
}
Plan = list[tuple[float, Callable[[], None]]]


class Trainings(ComfyUIModel[TrainingState]):
    """ComfyUI's trainings. `gpu_hours`: the estimate when one is created."""

    gpu_hours = 1.0
    checkpoints: int | None = None
    tells_resumed_from = False
    """Whether a resumed training reports the checkpoint that it resumed from."""
    gpus: tuple[GpuPool, ...] = (GpuPool(gpu_type="a100", total=4, available=0),)

    @cached_property
    def hours_at(self) -> dict[str, float]:
        """Checkpoint's uri → the GPU hours that its training had used by then."""
        return {}

    def _made(self, post: Post[Any]) -> Answer[Any]:
        if self.terms.refuses_submits_with:
            return refused(self.terms.refuses_submits_with)
        training_id = f"training-{len(self.works) + 1}"
        state = TrainingState(
            training_id=training_id, training_status=TrainingStatus.QUEUED, gpu_hours=self.gpu_hours, gpu_hours_used=0.0
        )
        work = Work(state, post.body, self._timeline.now, post.key, is_started=False)
        self.works[training_id] = work
        if "start" in self.terms.not_offered:
            self._begin(work)
        return Answer(
            reply=TrainingAccepted(
                training_id=training_id, estimated_time=self.terms.minutes, gpu_hours=self.gpu_hours, gpu_slots=1
            )
        )

    def _unknown(self) -> Answer[Any]:
        return refused("training_not_found")

    def start(self, call: JobCall) -> Answer[Any]:
        if "start" in self.terms.not_offered:
            return Answer(not_offered=True)
        assert call.key is not None
        return self._once(call.key, call.job_id, lambda: self._started(call.job_id))

    def list_gpus(self, _call_for: CallFor) -> Answer[list[GpuPool]]:
        if "list_gpus" in self.terms.not_offered:
            return Answer(not_offered=True)
        return Answer(reply=list(self.gpus))

    def _started(self, training_id: str) -> Answer[Any]:
        work = self.works.get(training_id)
        if work is None or work.is_forgotten:
            return self._unknown()
        if not work.is_started and not work.is_over:
            self._begin(work)
        return Answer(reply=work.state)

    def _begin(self, work: Work[TrainingState]) -> None:
        work.is_started = True
        self.live(work, self._plan(work))

    def _plan(self, work: Work[TrainingState]) -> Plan:
        rng = self._rng
        span = self.terms.minutes * 60 * rng.choice((0.01, 0.5, 1.0, 1.0, 1.5, 2.5))
        checkpoints = rng.choice((0, 1, 2, 4)) if self.checkpoints is None else self.checkpoints
        pause = span / (2 * checkpoints + 3)
        hours = self.gpu_hours * rng.choice((1.0, 1.0, 1.0, 2.0, 4.0))
        plan: Plan = [(pause, self._to(work, training_status="running", training_stage="data_ingest"))]
        resumed_from = work.request.resume_from
        if self.tells_resumed_from and resumed_from is not None:
            hours_then = self.hours_at.get(resumed_from, 0.0)
            again = Checkpoint(uri=resumed_from, epoch=1, step=100, gpu_hours_used=hours_then)
            plan.append((pause, self._to(work, checkpoint=again)))
        for n in range(1, checkpoints + 1):
            used = hours * n / (checkpoints + 1)
            plan.append((pause, self._to(work, training_stage="training", stage_progress=90.0 * n / checkpoints)))
            plan.append((pause, self._checkpoint(work, n, used, hours)))
        plan.extend(self._end(work, pause, hours))
        return plan

    def _to(self, work: Work[TrainingState], **fields: Any) -> Callable[[], None]:
        if "training_stage" in fields:
            fields["training_stage"] = TrainingStage(fields["training_stage"])
        if "training_status" in fields:
            fields["training_status"] = TrainingStatus(fields["training_status"])
        return lambda: self.change(work, **fields)

    def _checkpoint(self, work: Work[TrainingState], n: int, used: float, hours: float) -> Callable[[], None]:
        uri = f"file:///checkpoints/{work.state.training_id}-{n}"
        self.hours_at[uri] = used
        checkpoint = Checkpoint(uri=uri, epoch=n, step=100 * n, gpu_hours_used=used)
        return self._to(
            work, training_status="checkpointing", checkpoint=checkpoint, gpu_hours=hours, gpu_hours_used=used
        )

    def _end(self, work: Work[TrainingState], pause: float, hours: float) -> Plan:
        end = self._rng.choice(ENDS)
        if end == "stall":
            return []
        if end == "forgotten":
            return [(pause, lambda: self.forget(work))]
        if end in _ERRORS:
            return [(pause, lambda: self.change(work, error_details=_ERRORS[end]))]
        if end == "failed_without_details":
            return [(pause, self._to(work, training_status="failed"))]
        output = TrainingOutput(model_path=f"file:///models/{work.state.training_id}", metrics={"loss": 0.1})
        return [
            (pause, self._to(work, training_stage="publishing", stage_progress=50.0)),
            (pause, self._to(work, training_status="completed", output=output, gpu_hours=hours, gpu_hours_used=hours)),
        ]
