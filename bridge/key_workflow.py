"""Workflows that end at once and keep something in their memo: keys of requests, and what servers say of themselves."""

from __future__ import annotations

from temporalio import workflow

from bridge.calls import KEY_WORKFLOW, SERVER_WORKFLOW


@workflow.defn(name=KEY_WORKFLOW)
class ComfyUIKeyWorkflow:
    """The key of a request that starts no run: a refused one, a cancel, a start. Its memo has the request's hash.

    Ends at once. The namespace keeps its memo as long as any closed run.
    """

    @workflow.run
    async def run(self) -> None:
        return None


@workflow.defn(name=SERVER_WORKFLOW)
class ComfyUIServerWorkflow:
    """A server's newest report, in its memo. Ends at once."""

    @workflow.run
    async def run(self) -> None:
        return None
