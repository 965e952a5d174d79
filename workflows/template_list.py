"""Reads which templates ComfyUI offers, for the gateway, which has no token for ComfyUI. It changes nothing."""

from __future__ import annotations

from datetime import timedelta
from typing import Final

from temporalio import workflow
from temporalio.common import RetryPolicy

from activities.comfyui import ComfyUIActivities
from comfyui_temporal.contracts.templates import TemplateList, TemplateQuestion

WITHIN: Final = timedelta(seconds=4)


@workflow.defn
class TemplateListWorkflow:
    """One question, one answer."""

    @workflow.run
    async def run(self, question: TemplateQuestion) -> TemplateList:
        return await workflow.execute_activity_method(
            ComfyUIActivities.list_templates,
            question,
            start_to_close_timeout=WITHIN,
            schedule_to_close_timeout=WITHIN,
            retry_policy=RetryPolicy(maximum_attempts=1),
            summary="what ComfyUI offers",
        )
