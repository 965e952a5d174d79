"""The smallest workflow for our job: the same four calls as visible activities, five signals, no events.

`python -m proof.benchmarks.bare_worker` is its worker: our worker's settings, activities and converter.
"""

from __future__ import annotations

import asyncio
import signal
from datetime import timedelta
from typing import Any, Final, TypeVar

from pydantic import BaseModel
from temporalio import workflow

from comfyui_temporal.contracts.calls import Post
from comfyui_temporal.contracts.comfyui import JobAccepted
from comfyui_temporal.contracts.credits import Estimate, HoldReply
from comfyui_temporal.contracts.errors import Answer
from comfyui_temporal.contracts.tasks import CALLBACK_SIGNAL, ImageTask

with workflow.unsafe.imports_passed_through():
    from proof.benchmarks import job

BARE_WORKFLOW: Final = "BareImageWorkflow"
Reply = TypeVar("Reply", bound=BaseModel)


@workflow.defn(name=BARE_WORKFLOW)
class BareImageWorkflow:
    """Four calls, a signal for each callback, nothing else: no undo, no deadline, no events, no search attributes."""

    def __init__(self) -> None:
        self._is_delivered = False

    @workflow.run
    async def run(self, task: ImageTask) -> str:
        accepted = await self._call("submit_job", job.submit(task), JobAccepted)
        estimate = await self._call("estimate", job.estimate(task), Estimate)
        cost = max(accepted.estimated_cost, estimate.selected_cost)
        hold = await self._call("pre_deduct", job.pre_deduct(task, cost), HoldReply)
        await workflow.wait_condition(lambda: self._is_delivered)
        await self._call("commit", job.commit(task, hold), HoldReply)
        return accepted.job_id

    @workflow.signal(name=CALLBACK_SIGNAL)
    def comfyui_callback(self, body: dict[str, Any]) -> None:
        self._is_delivered |= bool(body.get("result_urls"))

    async def _call(self, name: str, post: Post[Any], reply: type[Reply]) -> Reply:
        answer: Answer[Reply] = await workflow.execute_activity(
            name,
            post,
            result_type=Answer[reply],  # type: ignore[valid-type]
            start_to_close_timeout=timedelta(seconds=10),
            heartbeat_timeout=timedelta(seconds=2),
        )
        assert answer.reply is not None
        return answer.reply


async def main() -> None:
    import worker
    from runtime.logs import configure_logs
    from runtime.required_settings import read_settings

    settings = read_settings()
    configure_logs(level=settings.log_level)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    client = await worker.connect(settings)
    async with worker.opened_activities(settings) as activities:
        bare = worker.make_worker(client, settings, activities, workflows=[BareImageWorkflow])
        page = worker.health_page(client, bare, stop)
        async with page.served(settings.worker_host, settings.health_port), bare:
            await stop.wait()


if __name__ == "__main__":
    asyncio.run(main())
