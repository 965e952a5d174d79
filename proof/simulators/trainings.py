"""Trainings: queued until `start`, then data_ingest → training → evaluating → publishing (contract §3)."""

from __future__ import annotations

import hashlib
import math
import random
import uuid
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Literal

from comfyui_temporal.contracts.comfyui import TaskPriority, TrainingRequest, TrainingStage, TrainingStatus
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.scenes import SCENES
from proof.simulators.model_files import write_weights
from proof.simulators.runs import Forecast, Run, Segment

DEFAULT_GPU: Final = "a100"
GPU_HOURS_PER_EPOCH: Final = 0.15
MOST_CHECKPOINTS: Final = 10
STEPS_PER_EPOCH: Final = 100
GPU_SLOTS: Final = 1
_QUEUED_SHARE: Final = 0.1
_SHARES: Final = {
    TrainingStage.DATA_INGEST: 0.1,
    TrainingStage.TRAINING: 0.65,
    TrainingStage.EVALUATING: 0.1,
    TrainingStage.PUBLISHING: 0.05,
}
_CHECKPOINTING_SHARE: Final = 0.1
"""Of each epoch's time: what writing its checkpoint takes."""


class TrainingRun(Run):
    """One training. `gpu_hours` is the latest estimate and does not depend on the simulator's speed."""

    kind: Literal["training"] = "training"
    base_model: str
    gpu_type: str
    epochs: int
    first_epoch: int
    """The epoch it resumed after; 0 from the start."""
    learning_rate: float
    gpu_hours: float
    written: dict[str, int] = {}
    """Uri → epoch of every checkpoint it wrote."""
    checkpoint: dict[str, Any] | None = None
    output: dict[str, Any] | None = None

    def standing(self) -> tuple[str, str | None]:
        if self.has_finished:
            return TrainingStatus.COMPLETED.value, TrainingStage.PUBLISHING.value
        if self.phase == "working":
            return self.segment.status, self.segment.stage
        if self.error_details is not None:
            return TrainingStatus.FAILED.value, self.segment.stage if self.has_begun else None
        return TrainingStatus.QUEUED.value, None

    def gpu_hours_used(self, at: float) -> float:
        """Of this training, so far."""
        if not self.has_begun:
            return 0.0
        return round(self.gpu_hours * self.share_done(at), 4)

    def fields(
        self, at: float, forecast: Forecast, datetime_of: Callable[[float], datetime], speed: float
    ) -> dict[str, Any]:
        status, stage = self.standing()
        next_at = {"waiting": forecast.starts, "working": self.stage_ends() if self.phase == "working" else None}.get(
            self.phase
        )
        return {
            "training_id": self.run_id,
            "training_status": status,
            "training_stage": stage,
            "stage_progress": 100.0 if self.has_finished else self.progress(at, forecast),
            "next_eta": datetime_of(next_at).isoformat(timespec="milliseconds") if next_at is not None else None,
            "estimated_time": self.minutes_until(forecast.ends, speed),
            "gpu_hours": self.gpu_hours,
            "gpu_hours_used": self.gpu_hours_used(at),
            "gpu_slots": GPU_SLOTS,
            "gpu_type": self.gpu_type,
            "checkpoint": self.checkpoint,
            "output": self.output,
            "error_details": self.shown_error(),
        }

    def loss(self, epoch: float) -> float:
        """The loss curve: falls from about 1 to about 0.1, a little uneven, the same for the same training."""
        unevenness = random.Random(f"{self.run_id}:{epoch}").uniform(0.99, 1.01)  # noqa: S311 - a curve, no secret
        return round((0.08 + 0.92 * math.exp(-3.0 * epoch / self.epochs)) * unevenness, 4)

    def segment_ended(self, segment: Segment, at: datetime, folder: Path) -> None:
        if segment.stage == TrainingStage.DATA_INGEST and segment.progress_to >= 100:
            self._say(at, "info", f"dataset ingested; training {self.base_model} for {self.epochs} epochs")
        elif segment.checkpoint_epoch is not None and segment.status == TrainingStatus.RUNNING:
            epoch = segment.checkpoint_epoch
            step = epoch * STEPS_PER_EPOCH
            self._say(
                at,
                "info",
                f"epoch {epoch}/{self.epochs} step {step} loss={self.loss(epoch):.4f} lr={self.learning_rate:g}",
            )
        elif segment.checkpoint_epoch is not None:
            self._write_checkpoint(segment.checkpoint_epoch, folder)
            self._say(at, "info", f"checkpoint of epoch {segment.checkpoint_epoch} written")
        elif segment.stage == TrainingStage.EVALUATING and segment.progress_to >= 100:
            self._say(at, "info", f"evaluation loss={self.loss(self.epochs):.4f}")

    def _write_checkpoint(self, epoch: int, folder: Path) -> None:
        path = self._folder(folder) / f"checkpoint-{epoch:04d}.safetensors"
        metadata = {"base_model": self.base_model, "epoch": str(epoch), "loss": f"{self.loss(epoch):.4f}"}
        write_weights(path, seed=f"{self.run_id}:{epoch}", metadata=metadata)
        done = (self.done_before + self.segment.seconds) / self.total_seconds if self.total_seconds else 1.0
        uri = path.resolve().as_uri()
        self.written[uri] = epoch
        self.checkpoint = {
            "uri": uri,
            "epoch": epoch,
            "step": epoch * STEPS_PER_EPOCH,
            "gpu_hours_used": round(self.gpu_hours * min(done, 1.0), 4),
        }

    def finish(self, at: datetime, folder: Path) -> None:
        path = self._folder(folder) / "model.safetensors"
        metadata = {"base_model": self.base_model, "epochs": str(self.epochs), "loss": f"{self.loss(self.epochs):.4f}"}
        write_weights(path, seed=self.run_id, metadata=metadata)
        self.output = {
            "model_path": path.resolve().as_uri(),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "version": f"v{at:%Y%m%d%H%M%S}",
            "metrics": {
                "loss": self.loss(self.epochs),
                "first_loss": self.loss(self.first_epoch + 1),
                "epochs": self.epochs,
                "gpu_hours_used": self.gpu_hours,
            },
        }
        self._say(at, "info", "model published")

    def _folder(self, folder: Path) -> Path:
        return folder / "models" / self.tenant_id / self.run_id

    def _say(self, at: datetime, level: str, message: str) -> None:
        self.log.append({"ts": at.isoformat(timespec="milliseconds"), "level": level, "message": message})


def new_training(
    order: TrainingRequest, *, base_url: str, gpu_type: str, first_epoch: int, work: float, seconds: float | None
) -> TrainingRun:
    """A training that has just been created. `seconds`: its whole length from `start`, instead of the ETA."""
    if seconds is None:
        seconds = SCENES[Scene.MODEL_TRAIN].eta_minutes[order.priority] * 60
    epochs = int(str(order.hyperparameters["epochs"]))
    first_epoch = min(first_epoch, epochs - 1)
    return TrainingRun(
        run_id=f"training-{uuid.uuid4().hex}",
        task_id=order.task_id,
        tenant_id=order.tenant_id,
        user_id=order.user_id,
        priority=TaskPriority(order.priority),
        callback_url=order.callback_url,
        base_url=base_url,
        pool=gpu_type,
        plan=_plan(seconds, epochs, first_epoch),
        queue_seconds=seconds * _QUEUED_SHARE,
        counted_from=work,
        base_model=order.base_model,
        gpu_type=gpu_type,
        epochs=epochs,
        first_epoch=first_epoch,
        learning_rate=float(str(order.hyperparameters["learning_rate"])),
        gpu_hours=round(GPU_HOURS_PER_EPOCH * (epochs - first_epoch), 4),
    )


def _plan(seconds: float, epochs: int, first_epoch: int) -> list[Segment]:
    """All stages on the GPU; a resumed training has only the epochs that are left, and takes that much less."""
    share_left = (epochs - first_epoch) / epochs
    training = _SHARES[TrainingStage.TRAINING] * seconds * share_left
    return [
        *_even(TrainingStage.DATA_INGEST, _SHARES[TrainingStage.DATA_INGEST] * seconds, parts=2),
        *_epochs(training, epochs, first_epoch),
        *_even(TrainingStage.EVALUATING, _SHARES[TrainingStage.EVALUATING] * seconds, parts=1),
        *_even(TrainingStage.PUBLISHING, _SHARES[TrainingStage.PUBLISHING] * seconds, parts=1),
    ]


def _even(stage: TrainingStage, seconds: float, *, parts: int) -> list[Segment]:
    return [
        Segment(
            status=TrainingStatus.RUNNING,
            stage=stage,
            seconds=seconds / parts,
            progress_from=100 * part / parts,
            progress_to=100 * (part + 1) / parts,
        )
        for part in range(parts)
    ]


def _epochs(seconds: float, epochs: int, first_epoch: int) -> list[Segment]:
    """Running and checkpointing alternate; of many epochs only some have a checkpoint."""
    left = epochs - first_epoch
    checkpoints = min(left, MOST_CHECKPOINTS)
    segments = []
    for number in range(1, checkpoints + 1):
        epoch = first_epoch + left * number // checkpoints
        began = first_epoch + left * (number - 1) // checkpoints
        span = seconds * (epoch - began) / left
        progress = [100 * done / epochs for done in (began, epoch)]
        for status, share in (
            (TrainingStatus.RUNNING, 1 - _CHECKPOINTING_SHARE),
            (TrainingStatus.CHECKPOINTING, _CHECKPOINTING_SHARE),
        ):
            is_running = status is TrainingStatus.RUNNING
            segments.append(
                Segment(
                    status=status,
                    stage=TrainingStage.TRAINING,
                    seconds=span * share,
                    progress_from=progress[0] if is_running else progress[1],
                    progress_to=progress[1],
                    checkpoint_epoch=epoch,
                )
            )
    return segments
