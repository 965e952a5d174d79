"""An idempotency key that no job stands for: a refusal's, a cancel's, a start's. Its memo says what was asked."""

from __future__ import annotations

from temporalio import workflow

from bridge.calls import KEY_WORKFLOW


@workflow.defn(name=KEY_WORKFLOW)
class ComfyUIKeyWorkflow:
    """Ends at once: the namespace keeps its memo as long as it keeps runs."""

    @workflow.run
    async def run(self) -> None:
        return None
