"""Record the histories that `test_replay.py` replays: `python -m tests.workflows.record_histories [name …]`.

Run it when a step is added, never to make a failing replay pass: a history that no longer replays is a run that would
be stuck (docs/versioning.md). Then write the commands of the new one: `python -m tests.command_fingerprints NAME`.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from temporalio.client import WorkflowFailureError
from temporalio.testing import WorkflowEnvironment

from comfyui_temporal.client.waiting_start import start_waiting
from comfyui_temporal.contracts.give_back import GIVE_BACK_WORKFLOW, GiveBackOrder, give_back_id_of
from comfyui_temporal.contracts.reconcile import RECONCILE_WORKFLOW, ReconcileOrder
from comfyui_temporal.contracts.start_answer import WAIT_UNTIL_HELD
from comfyui_temporal.contracts.tasks import ImageTask, TrainingTask
from proof.benchmarks.servers import file_backed_servers
from store import TaskStore
from tests.history_files import keep
from tests.workflows.platform import Handle, Platform, running_platform

HISTORIES = Path(__file__).parents[1] / "histories"
Scenario = Callable[[Platform], Awaitable[Handle]]


async def image_completed(platform: Platform) -> Handle:
    return await platform.start_image(resolution="4k", priority="accelerated", extras={"hires_fix": True})


async def image_polled(platform: Platform) -> Handle:
    await platform.simulators.admin.comfyui.fault("callback_withhold", times=None)
    return await platform.start_image(options={"poll_after_seconds": 0.5})


async def image_retried(platform: Platform) -> Handle:
    platform.policy = {"retry_after_seconds": [0.2, 0.2, 0.2]}
    await platform.simulators.admin.comfyui.fault("job_preempt")
    return await platform.start_image()


async def image_cancelled(platform: Platform) -> Handle:
    await platform.simulators.admin.comfyui.fault("job_stall")
    handle = await platform.start_image()
    await platform.until_held(handle.id.removeprefix("task-"))
    await platform.cancel(handle)
    return handle


async def image_cancelled_by_signal(platform: Platform) -> Handle:
    await platform.simulators.admin.comfyui.fault("job_stall")
    handle = await platform.start_image()
    await platform.until_held(handle.id.removeprefix("task-"))
    await handle.signal("cancel_task", {"reason": "no longer wanted"})
    return handle


async def image_refused(platform: Platform) -> Handle:
    return await platform.start_image(max_credits=1)


async def image_short_of_points(platform: Platform) -> Handle:
    """The balance does not cover the estimate; its starter waits until credits are held."""
    await platform.simulators.admin.credits.set_balance(23, "tenant-demo", "user-demo")
    return await _waited_for(platform, platform.image())


async def training_short_of_points(platform: Platform) -> Handle:
    await platform.simulators.admin.credits.set_balance(119, "tenant-demo", "user-demo")
    return await platform.start_training()


async def image_waited_for(platform: Platform) -> Handle:
    return await _waited_for(platform, platform.image())


async def training_waited_for(platform: Platform) -> Handle:
    handle = await _waited_for(platform, platform.training(max_credits=None))
    await handle.execute_update("confirm_price", {"max_credits": 1_000})
    await handle.execute_update(WAIT_UNTIL_HELD, {})
    return handle


async def _waited_for(platform: Platform, task: dict[str, Any]) -> Handle:
    """Started as a caller does who waits until credits are held."""
    model = TrainingTask if "dataset" in task else ImageTask
    waited = await start_waiting(
        platform.client, model.model_validate(task), task_queue=platform.task_queue, within_seconds=60
    )
    return waited.started.handle


async def image_continued(platform: Platform) -> Handle:
    platform.policy = {"continue_as_new_signals": 2}
    return await platform.start_image()


async def training_completed(platform: Platform) -> Handle:
    return await platform.start_training()


async def training_confirmed(platform: Platform) -> Handle:
    handle = await platform.start_training(max_credits=None)

    async def is_waiting() -> bool:
        return bool((await platform.progress(handle))["confirmation"])

    await platform.until(is_waiting)
    await handle.execute_update("confirm_price", {"max_credits": 1_000})
    return handle


async def training_confirmed_by_signal(platform: Platform) -> Handle:
    handle = await platform.start_training(max_credits=None)

    async def is_waiting() -> bool:
        return bool((await platform.progress(handle))["confirmation"])

    await platform.until(is_waiting)
    await handle.signal("confirm_price", {"max_credits": 1_000})
    return handle


async def training_resumed(platform: Platform) -> Handle:
    platform.policy = {"retry_after_seconds": [0.2, 0.2, 0.2]}
    await platform.simulators.admin.comfyui.fault("job_preempt", at=0.6)
    return await platform.start_training()


async def left_image(platform: Platform) -> str:
    """The task id of an image whose run was terminated while its credits were held."""
    await platform.simulators.admin.comfyui.fault("job_stall")
    handle = await platform.start_image()
    await platform.until_held(handle.id.removeprefix("task-"))
    await platform.until_settled(handle)
    await handle.terminate("to be given back")
    return handle.id.removeprefix("task-")


async def image_given_back(platform: Platform) -> Handle:
    task_id = await left_image(platform)
    return await platform.client.start_workflow(
        GIVE_BACK_WORKFLOW,
        GiveBackOrder(task_id=task_id),
        id=give_back_id_of(task_id),
        task_queue=platform.task_queue,
    )


async def image_reconciled(platform: Platform) -> Handle:
    await left_image(platform)
    return await platform.client.start_workflow(
        RECONCILE_WORKFLOW,
        ReconcileOrder(pause_seconds=0.1),
        id="reconcile",
        task_queue=platform.task_queue,
    )


async def reconciler_idle(platform: Platform) -> Handle:
    """A pass that finds no row, on code that reads the ledgers of unsettled tasks, behind a patch."""
    return await platform.client.start_workflow(
        RECONCILE_WORKFLOW,
        ReconcileOrder(pause_seconds=0.1),
        id="reconcile",
        task_queue=platform.task_queue,
    )


SCENARIOS: tuple[Scenario, ...] = (
    image_completed,
    image_polled,
    image_retried,
    image_cancelled,
    image_cancelled_by_signal,
    image_refused,
    image_short_of_points,
    image_waited_for,
    training_short_of_points,
    training_waited_for,
    image_continued,
    training_completed,
    training_confirmed,
    training_confirmed_by_signal,
    training_resumed,
    image_given_back,
    image_reconciled,
    reconciler_idle,
)


async def record(scenario: Scenario, platform: Platform) -> None:
    """Run a scenario to its end and keep the history of its first run."""
    handle = await scenario(platform)
    with contextlib.suppress(WorkflowFailureError):
        await handle.result()
    first = platform.client.get_workflow_handle(handle.id, run_id=handle.first_execution_run_id)
    history = await first.fetch_history()
    keep(history, HISTORIES / f"{scenario.__name__}.json")


async def main(names: list[str]) -> None:
    HISTORIES.mkdir(exist_ok=True)
    for scenario in [scenario for scenario in SCENARIOS if not names or scenario.__name__ in names]:
        with tempfile.TemporaryDirectory(prefix="record-", ignore_cleanup_errors=True) as folder:
            async with file_backed_servers(Path(folder)) as servers:
                environment, store = WorkflowEnvironment.from_client(servers.client), TaskStore(servers.database_dsn)
                running = running_platform(environment, store, Path(folder), client=servers.client)
                async with running as platform, platform.worker():
                    await record(scenario, platform)
                await store.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
