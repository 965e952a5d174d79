"""Row 0 of a training: its GPU scheduling window, and whether ComfyUI has such a GPU at all (contract §3, §8)."""

from __future__ import annotations

from datetime import datetime
from typing import Final

from temporalio import workflow

from activities.comfyui import ComfyUIActivities
from comfyui_temporal.contracts.calls import GpuQuestion
from comfyui_temporal.contracts.errors import FailureCode
from comfyui_temporal.contracts.tasks import GpuWindow
from workflows.failures import TaskFailed
from workflows.interruptible import InterruptibleWaits
from workflows.outside_call import RETRY, OutsideCall

_REPEATED: Final = frozenset({FailureCode.COMFYUI_UNAVAILABLE, FailureCode.REPLY_INVALID})
"""A call that ends so would have been repeated, had there been time."""


class Window:
    """The span in which a training must start. Without one it may start at any time."""

    def __init__(self, window: GpuWindow | None, waits: InterruptibleWaits) -> None:
        self._opens = window.not_before if window else None
        self.closes: datetime | None = window.not_after if window else None
        self._waits = waits

    def check(self) -> None:
        """Raise TaskFailed `gpu_unavailable` past the window."""
        if self.closes is not None and workflow.now() > self.closes:
            raise TaskFailed(
                FailureCode.GPU_UNAVAILABLE,
                f"The GPU window closed at {self.closes.isoformat()} before the training began.",
            )

    def end_of_start(self, failure: TaskFailed) -> None:
        """Raise TaskFailed `gpu_unavailable` where the window left no time to repeat the start that failed."""
        repeated_within = RETRY.maximum_interval
        assert repeated_within is not None
        if self.closes is None or self.closes - workflow.now() > repeated_within or failure.code not in _REPEATED:
            return
        raise TaskFailed(
            FailureCode.GPU_UNAVAILABLE,
            "ComfyUI did not confirm the training's start within its GPU window, which closes at "
            f"{self.closes.isoformat()}: {failure}",
        ) from failure

    async def opens(self) -> None:
        """Wait until it opens. Raises as `check` and as `InterruptibleWaits.until`."""
        opens = self._opens
        self.check()
        if opens is not None:
            await self._waits.until(lambda: workflow.now() >= opens, at=opens, summary="0 wait: the window opens")


async def check_gpus(outside: OutsideCall, gpu_type: str | None) -> bool:
    """Raise TaskFailed `gpu_unavailable` where ComfyUI has no GPU of this type; that none is free is no failure.

    False where the server has no such route, and nothing is known of its GPUs.
    Raises as `OutsideCall.read` too, and TaskFailed with the code of a refusal.
    """
    answer = await outside.read(
        ComfyUIActivities.list_gpus,
        GpuQuestion(**outside.call_for.model_dump(), gpu_type=gpu_type),
        summary="0 check GPUs",
    )
    if answer.refusal is not None:
        raise TaskFailed.by_refusal(answer.refusal)
    if answer.reply is None:
        return False
    wanted = [pool for pool in answer.reply if gpu_type in (None, pool.gpu_type)]
    if not any(pool.total > 0 for pool in wanted):
        raise TaskFailed(
            FailureCode.GPU_UNAVAILABLE,
            f"ComfyUI has no GPU of type {gpu_type}." if gpu_type else "ComfyUI has no GPU.",
        )
    return True
