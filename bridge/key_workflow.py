"""The key of a request that starts no run: a refused one, a cancel, a start. Its memo has the request's hash."""

from __future__ import annotations

from temporalio import workflow

from bridge.calls import KEY_WORKFLOW


@workflow.defn(name=KEY_WORKFLOW)
class ComfyUIKeyWorkflow:
    """Ends at once. The namespace keeps its memo as long as any closed run."""

    @workflow.run
    async def run(self) -> None:
        return None
