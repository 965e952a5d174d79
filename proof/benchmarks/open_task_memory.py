"""What an open task costs a worker: resident memory by open tasks, in one process, on a real Temporal server.

    python -m proof.benchmarks.open_task_memory [--tasks 1000]

ComfyUI and credits answer in memory, so that only the worker's own cost is measured. A bare workflow with as many
calls, a timer and a signal is measured in the same run: it shows what Temporal's SDK takes for any workflow.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
from temporalio import activity, workflow
from temporalio.api.enums.v1 import EventType
from temporalio.client import Client, WorkflowHandle
from temporalio.common import SearchAttributeKey
from temporalio.testing import WorkflowEnvironment

from comfyui_temporal.contracts.calls import Post
from comfyui_temporal.contracts.comfyui import JobAccepted, JobRequest
from comfyui_temporal.contracts.credits import Estimate, EstimateRequest, HoldReply, PreDeductRequest
from comfyui_temporal.contracts.errors import Answer
from comfyui_temporal.contracts.policy import Policy
from comfyui_temporal.contracts.task_store import ClaimOutcome, TaskClaim, TaskWrite
from comfyui_temporal.contracts.tasks import SEARCH_ATTRIBUTES, workflow_id_of
from comfyui_temporal.plugin import TasksPlugin
from runtime.settings import Settings
from worker import make_worker
from workflows.image_generation import ImageGenerationWorkflow

KIB = 1024
QUEUE = "memory"


class Answers:
    """The activities of an image task up to its wait, answered at once."""

    @activity.defn
    async def claim(self, claim: TaskClaim) -> ClaimOutcome:
        return ClaimOutcome(
            claimed=True,
            policy=Policy(
                callback_url=f"http://127.0.0.1/callbacks/comfyui/{claim.task_id}",
                poll_after_seconds=3_600,
                poll_at_most_seconds=3_600,
                deadline_factor=3,
                cap_minutes=1_440,
                queue_sla_minutes=1_000,
            ),
        )

    @activity.defn
    async def write(self, write: TaskWrite) -> None:
        return None

    @activity.defn
    async def submit_job(self, post: Post[JobRequest]) -> Answer[JobAccepted]:
        accepted = JobAccepted(job_id=f"job-{post.body.task_id}", estimated_time=600, estimated_cost=24)
        return Answer[JobAccepted](reply=accepted)

    @activity.defn
    async def estimate(self, post: Post[EstimateRequest]) -> Answer[Estimate]:
        return Answer[Estimate](reply=Estimate(selected_cost=24))

    @activity.defn
    async def pre_deduct(self, post: Post[PreDeductRequest]) -> Answer[HoldReply]:
        held = HoldReply(pre_deduct_id=f"hold-{post.body.task_id}", frozen_amount=24, expire_at=datetime.now(UTC))
        return Answer[HoldReply](reply=held)


@workflow.defn(sandboxed=False)
class BareWorkflow:
    """What Temporal itself takes: the same calls with the same payloads, then a wait for a timer and a signal."""

    def __init__(self) -> None:
        self._is_done = False

    @workflow.run
    async def run(self, task: dict[str, str]) -> None:
        for _ in range(4):
            await workflow.execute_activity(echo, task, start_to_close_timeout=timedelta(seconds=10))
        await workflow.wait_condition(lambda: self._is_done, timeout=timedelta(hours=1))

    @workflow.signal
    def finish(self) -> None:
        self._is_done = True


@activity.defn
async def echo(task: dict[str, str]) -> dict[str, str]:
    return task


def task_input(task_id: str) -> dict[str, str]:
    return {
        "task_id": task_id,
        "tenant_id": "tenant-demo",
        "user_id": "user-demo",
        "template_id": "text-to-image",
        "prompt": "a lighthouse at dusk, oil on canvas, by a patient painter " * 4,
    }


class ImageRuns:
    """Image tasks that hold their credits and wait for ComfyUI."""

    workflow = ImageGenerationWorkflow
    visible_calls = 2

    def activities(self) -> list[Callable[..., Any]]:
        answers = Answers()
        return [answers.claim, answers.write, answers.submit_job, answers.estimate, answers.pre_deduct]


class BareRuns:
    """Bare workflows that wait for their signal."""

    workflow = BareWorkflow
    visible_calls = 4

    def activities(self) -> list[Callable[..., Any]]:
        return [echo]


async def open_runs(client: Client, runs: ImageRuns | BareRuns, start: int, stop: int) -> None:
    """Start runs, and wait until each has made its calls and waits."""
    ids = [f"memory-{n}" for n in range(start, stop)]
    for task_id in ids:
        await client.start_workflow(
            runs.workflow.__name__, task_input(task_id), id=workflow_id_of(task_id), task_queue=QUEUE
        )
    for task_id in ids:
        handle = client.get_workflow_handle(workflow_id_of(task_id))
        while await calls_made(handle) < runs.visible_calls:  # noqa: ASYNC110 - another process's progress
            await asyncio.sleep(0.1)


async def calls_made(handle: WorkflowHandle[Any, Any]) -> int:
    events = handle.fetch_history_events()
    return len([event async for event in events if event.event_type == EventType.EVENT_TYPE_ACTIVITY_TASK_COMPLETED])


def resident_kib() -> float:
    gc.collect()
    return float(psutil.Process().memory_info().rss) / KIB


async def measure(tasks: int, runs: ImageRuns | BareRuns) -> float:
    """KiB per open run: the slope between a quarter and all of them, which leaves out what is loaded once."""
    binary = Path(sys.executable).parent / "temporal"
    async with await WorkflowEnvironment.start_local(
        dev_server_existing_path=str(binary),
        search_attributes=[SearchAttributeKey.for_keyword(name) for name in SEARCH_ATTRIBUTES],
    ) as environment:
        client = await Client.connect(environment.client.service_client.config.target_host, plugins=[TasksPlugin()])
        settings = Settings(_env_file=None, task_queue=QUEUE, max_cached_workflows=tasks * 2, max_workflow_tasks=16)
        async with make_worker(client, settings, runs.activities(), [runs.workflow]):
            quarter = tasks // 4
            await open_runs(client, runs, 0, quarter)
            low = resident_kib()
            await open_runs(client, runs, quarter, tasks)
            return (resident_kib() - low) / (tasks - quarter)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=1_000)
    tasks = parser.parse_args().tasks
    ours = asyncio.run(measure(tasks, ImageRuns()))
    bare = asyncio.run(measure(tasks, BareRuns()))
    print(f"KiB resident per open run, {tasks} of them: image task {ours:.1f}, bare workflow {bare:.1f}")
    print(f"ratio {ours / bare:.2f}")


if __name__ == "__main__":
    main()
