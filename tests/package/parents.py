"""A caller's parent workflow whose run ends while its child goes on; in a file of its own, because of the sandbox."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from temporalio import workflow
from temporalio.workflow import ParentClosePolicy


@workflow.defn
class Parent:
    """Starts an image and ends when it is told to, or at once where the start was refused."""

    def __init__(self) -> None:
        self.may_end = False

    @workflow.run
    async def run(self, task: dict[str, Any], task_queue: str, policy: int | None) -> None:
        options: dict[str, Any] = {} if policy is None else {"parent_close_policy": ParentClosePolicy(policy)}
        await workflow.start_child_workflow(
            "ImageGenerationWorkflow",
            task,
            id=f"task-{task['task_id']}",
            task_queue=task_queue,
            task_timeout=timedelta(seconds=3),
            **options,
        )
        await workflow.wait_condition(lambda: self.may_end)

    @workflow.signal
    def end(self) -> None:
        self.may_end = True
