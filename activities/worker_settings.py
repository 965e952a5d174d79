"""What this worker uses, for `doctor`: only the worker itself knows."""

from __future__ import annotations

from temporalio import activity

from comfyui_temporal.contracts.worker_settings import WorkerSettings


class WorkerSettingsActivities:
    """Answers with what the worker was started with."""

    def __init__(self, used: WorkerSettings) -> None:
        self._used = used

    @activity.defn
    async def worker_settings(self) -> WorkerSettings:
        return self._used.model_copy(update={"identity": activity.client().identity})
