"""Reads which datasets a tenant has, for the gateway, which may read no dataset. It changes nothing."""

from __future__ import annotations

from datetime import timedelta
from typing import Final

from temporalio import workflow
from temporalio.common import RetryPolicy

from activities.dataset_list import DatasetListActivities
from comfyui_temporal.contracts.datasets import DatasetList, DatasetQuestion

WITHIN: Final = timedelta(seconds=4)


@workflow.defn
class DatasetListWorkflow:
    """One question, one answer."""

    @workflow.run
    async def run(self, question: DatasetQuestion) -> DatasetList:
        return await workflow.execute_activity_method(
            DatasetListActivities.list_datasets,
            question,
            start_to_close_timeout=WITHIN,
            schedule_to_close_timeout=WITHIN,
            retry_policy=RetryPolicy(maximum_attempts=1),
            summary="what the tenant may train on",
        )
