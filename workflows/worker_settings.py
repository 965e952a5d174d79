"""Asks one worker of the task queue which services it uses (`comfyui-tasks doctor`). It changes nothing."""

from __future__ import annotations

from datetime import timedelta
from typing import Final

from temporalio import workflow
from temporalio.common import RetryPolicy

from activities.worker_settings import WorkerSettingsActivities
from comfyui_temporal.contracts.worker_settings import WorkerSettings

WITHIN: Final = timedelta(seconds=3)


@workflow.defn
class WorkerSettingsWorkflow:
    """One question, one answer."""

    @workflow.run
    async def run(self) -> WorkerSettings:
        return await workflow.execute_activity_method(
            WorkerSettingsActivities.worker_settings,
            schedule_to_close_timeout=WITHIN,
            retry_policy=RetryPolicy(maximum_attempts=1),
            summary="what this worker uses",
        )
