"""Tasks before a reset: each scenario brings a task to its end, or to a state in which it waits."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from temporalio.client import WorkflowExecutionStatus, WorkflowFailureError

from comfyui_temporal.contracts.give_back import GIVE_BACK_WORKFLOW, GiveBackOrder, give_back_id_of
from tests.conftest import unique
from tests.workflows.payers import Payer, has_kinds
from tests.workflows.platform import Handle, Platform, task_id_of

POLICY = {"retry_after_seconds": [0.05, 0.05, 0.05], "poll_after_seconds": 0.3, "poll_at_most_seconds": 1.0}
RENEWED = ("pre_deduct", "pre_deduct", "cancel")


@dataclass(frozen=True)
class Scenario:
    """`begin` returns once the task has ended, or waits in the state that it is about."""

    name: str
    begin: Callable[[Platform, Payer], Awaitable[Handle]]
    is_open: bool = False
    policy: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return self.name


async def over(handle: Handle) -> Handle:
    """Wait for the task's end, of any kind."""
    with contextlib.suppress(WorkflowFailureError):
        await handle.result()
    return handle


@asynccontextmanager
async def work_goes_on(platform: Platform, handle: Handle) -> AsyncIterator[None]:
    """Within this context every running job of the task is finished immediately, also a stalled one."""

    async def finish() -> None:
        while True:
            for run in await platform.simulators.admin.comfyui.jobs(task_id_of(handle)):
                if run.phase == "working" and not run.is_over:
                    with contextlib.suppress(Exception):
                        await platform.simulators.admin.comfyui.act(run.run_id, "finish")
            await asyncio.sleep(0.05)

    finishing = asyncio.create_task(finish())
    try:
        yield
    finally:
        finishing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await finishing


async def stalled(platform: Platform, task: dict[str, Any]) -> Handle:
    """A task whose work has started and stalls."""
    route = "create_training" if "dataset" in task else "submit_job"
    comfyui = platform.simulators.admin.comfyui
    await comfyui.fault("job_stall", route=route, task_id=task["task_id"], at=0.3, times=None)
    handle = await platform.start(task)
    await until_working(platform, handle, jobs=1)
    return handle


async def until_working(platform: Platform, handle: Handle, *, jobs: int) -> str:
    """Wait until the task's newest job, the `jobs`th, is worked on, and nothing more happens for a moment; its id."""

    async def working() -> str | None:
        runs = await platform.simulators.admin.comfyui.jobs(task_id_of(handle))
        return runs[-1].run_id if len(runs) == jobs and runs[-1].phase == "working" else None

    run_id = await platform.until(working)
    assert run_id is not None
    await platform.until_held(task_id_of(handle))
    await platform.until_settled(handle)
    return run_id


# Ended


async def completed_image(platform: Platform, payer: Payer) -> Handle:
    return await over(await platform.start(payer.image()))


async def completed_training(platform: Platform, payer: Payer) -> Handle:
    return await over(await platform.start(payer.training()))


async def failed_image(platform: Platform, payer: Payer) -> Handle:
    task = payer.image()
    await platform.simulators.admin.comfyui.fault(
        "job_fail", route="submit_job", task_id=task["task_id"], code="node_error"
    )
    return await over(await platform.start(task))


async def failed_training(platform: Platform, payer: Payer) -> Handle:
    task = payer.training()
    await platform.simulators.admin.comfyui.fault(
        "job_fail", route="create_training", task_id=task["task_id"], code="node_error"
    )
    return await over(await platform.start(task))


async def refused_image(platform: Platform, payer: Payer) -> Handle:
    await payer.has(3)
    return await over(await platform.start(payer.image()))


async def cancelled_image(platform: Platform, payer: Payer) -> Handle:
    handle = await stalled(platform, payer.image())
    await platform.cancel(handle)
    return await over(handle)


async def cancelled_by_temporal(platform: Platform, payer: Payer) -> Handle:
    handle = await stalled(platform, payer.training())
    await handle.cancel()
    return await over(handle)


async def retried_image(platform: Platform, payer: Payer) -> Handle:
    """The second job is dearer: the hold is topped up."""
    task = payer.image()
    comfyui = platform.simulators.admin.comfyui
    await comfyui.fault("job_preempt", route="submit_job", task_id=task["task_id"])
    dearer: dict[str, Any] = {"reply": {"estimated_cost": 30}, "fields": {"actual_cost": 30}}
    await comfyui.fault("job_lie", route="submit_job", task_id=task["task_id"], nth=2, **dearer)
    return await over(await platform.start(task))


async def retried_training(platform: Platform, payer: Payer) -> Handle:
    task = payer.training()
    await platform.simulators.admin.comfyui.fault(
        "job_preempt", route="create_training", task_id=task["task_id"], at=0.6
    )
    return await over(await platform.start(task))


async def topped_up(platform: Platform, payer: Payer) -> Handle:
    """A training whose price rises while it runs: it takes a new hold and cancels the old one; it waits."""
    handle = await stalled(platform, payer.training())
    [run] = await platform.simulators.admin.comfyui.jobs(task_id_of(handle))
    await platform.simulators.admin.comfyui.act(run.run_id, "lie", fields={"gpu_hours": 5, "gpu_hours_used": 5})
    await platform.until(lambda: has_kinds(platform, handle, *RENEWED))
    await platform.until_settled(handle)
    return handle


async def topped_up_and_completed(platform: Platform, payer: Payer) -> Handle:
    handle = await topped_up(platform, payer)
    async with work_goes_on(platform, handle):
        return await over(handle)


async def given_back_image(platform: Platform, payer: Payer) -> Handle:
    return await given_back(platform, await stalled(platform, payer.image()))


async def given_back_training(platform: Platform, payer: Payer) -> Handle:
    return await given_back(platform, await stalled(platform, payer.training()))


async def given_back(platform: Platform, handle: Handle) -> Handle:
    await handle.terminate("by a test")
    await platform.client.execute_workflow(
        GIVE_BACK_WORKFLOW,
        GiveBackOrder(task_id=task_id_of(handle)),
        id=give_back_id_of(task_id_of(handle)),
        task_queue=platform.task_queue,
    )
    return handle


# Waiting


async def running_image(platform: Platform, payer: Payer) -> Handle:
    return await stalled(platform, payer.image())


async def running_training(platform: Platform, payer: Payer) -> Handle:
    return await stalled(platform, payer.training())


async def second_attempt(platform: Platform, payer: Payer) -> Handle:
    """An image whose first job was preempted; the second is worked on, under a hold that was topped up."""
    task = payer.image()
    comfyui = platform.simulators.admin.comfyui
    await comfyui.fault("job_preempt", route="submit_job", task_id=task["task_id"])
    await comfyui.fault(
        "job_lie",
        route="submit_job",
        task_id=task["task_id"],
        nth=2,
        reply={"estimated_cost": 30},
        fields={"actual_cost": 30},
    )
    await comfyui.fault("job_stall", route="submit_job", task_id=task["task_id"], nth=2, at=0.3, times=None)
    handle = await platform.start(task)
    await until_working(platform, handle, jobs=2)
    return handle


async def terminated_image(platform: Platform, payer: Payer) -> Handle:
    handle = await stalled(platform, payer.image())
    await handle.terminate("by a test")
    return handle


CONTINUED = (("continue_as_new_signals", 2),)
ENDED = [
    Scenario("image completed", completed_image),
    Scenario("image failed", failed_image),
    Scenario("image refused", refused_image),
    Scenario("image cancelled", cancelled_image),
    Scenario("image retried and topped up", retried_image),
    Scenario("image given back", given_back_image),
    Scenario("image continued", completed_image, policy=CONTINUED),
    Scenario("training completed", completed_training),
    Scenario("training failed", failed_training),
    Scenario("training given back", given_back_training),
    Scenario("training cancelled", cancelled_by_temporal),
    Scenario("training retried", retried_training),
    Scenario("training topped up", topped_up_and_completed),
    Scenario("training continued", topped_up_and_completed, policy=CONTINUED),
]
OPEN = [
    Scenario("image running", running_image, is_open=True),
    Scenario("image terminated", terminated_image, is_open=True),
    Scenario("image at its second attempt", second_attempt, is_open=True),
    Scenario("image running, continued", running_image, is_open=True, policy=CONTINUED),
    Scenario("training running", running_training, is_open=True),
    Scenario("training topped up and running", topped_up, is_open=True),
    Scenario("training topped up and running, continued", topped_up, is_open=True, policy=CONTINUED),
]


async def is_running(handle: Handle) -> bool:
    return (await handle.describe()).status is WorkflowExecutionStatus.RUNNING


__all__ = ["ENDED", "OPEN", "POLICY", "Scenario", "is_running", "over", "unique", "work_goes_on"]
