"""Record the histories that `test_replay.py` replays: `python -m tests.bridge.record_histories NAME`.

Run it when a step is added, with the new scenario's name, never to make a failing replay pass (docs/versioning.md).
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from unittest.mock import patch

from temporalio.client import Client
from temporalio.common import SearchAttributeKey
from temporalio.testing import WorkflowEnvironment

from bridge import fitness
from bridge.calls import workflow_of
from comfyui_temporal.contracts.tasks import SEARCH_ATTRIBUTES
from comfyui_temporal.plugin import TasksPlugin
from tests.bridge.native import NativeServer
from tests.bridge.platform import BridgePlatform, running_bridge
from tests.bridge.test_servers import until_running
from tests.bridge.test_trainings import MODELS, created, ended, post_action
from tests.conftest import temporal_binary
from tests.history_files import keep

HISTORIES = Path(__file__).parent / "histories"
Scenario = Callable[[BridgePlatform, NativeServer], Awaitable[str]]


async def job_delivered(bridge: BridgePlatform, native: NativeServer) -> str:
    accepted = await bridge.submit()
    await bridge.ended(accepted["job_id"])
    return str(accepted["job_id"])


async def job_cancelled_in_mid_run(bridge: BridgePlatform, native: NativeServer) -> str:
    await native.admin.set(hold=True)
    accepted = await bridge.submit()
    await until_running(bridge, native)
    await bridge.cancel(accepted["job_id"])
    return str(accepted["job_id"])


async def job_lost_and_run_again(bridge: BridgePlatform, native: NativeServer) -> str:
    await native.admin.set(hold=True)
    accepted = await bridge.submit()
    await until_running(bridge, native)
    await native.admin.forget()
    await native.admin.set(hold=False)
    await bridge.ended(accepted["job_id"])
    return str(accepted["job_id"])


async def training_completed(bridge: BridgePlatform, native: NativeServer) -> str:
    await native.admin.set(models=MODELS)
    accepted = await created(bridge)
    await post_action(bridge, accepted["training_id"], "start")
    await ended(bridge, accepted["training_id"])
    return str(accepted["training_id"])


async def job_delivered_and_cleaned(bridge: BridgePlatform, native: NativeServer) -> str:
    return await job_delivered(bridge, native)


async def training_completed_and_cleaned(bridge: BridgePlatform, native: NativeServer) -> str:
    return await training_completed(bridge, native)


async def job_whose_only_server_lost_its_model(bridge: BridgePlatform, native: NativeServer) -> str:
    await native.admin.set(hold=True)
    accepted = await bridge.submit(template_id="text-to-image")
    await until_running(bridge, native)
    await native.admin.set(models={"checkpoints": []}, hold=False)
    await native.admin.forget()
    with patch.object(fitness, "FRESH_SECONDS", 0.1):
        await bridge.ended(accepted["job_id"])
    return str(accepted["job_id"])


async def job_cancelled_and_stopped(bridge: BridgePlatform, native: NativeServer) -> str:
    return await job_cancelled_in_mid_run(bridge, native)


SCENARIOS: tuple[Scenario, ...] = (
    job_delivered,
    job_cancelled_in_mid_run,
    job_lost_and_run_again,
    training_completed,
    job_delivered_and_cleaned,
    training_completed_and_cleaned,
    job_whose_only_server_lost_its_model,
    job_cancelled_and_stopped,
)


async def record(names: list[str]) -> None:
    HISTORIES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        environment = await WorkflowEnvironment.start_local(
            search_attributes=[SearchAttributeKey.for_keyword(name) for name in SEARCH_ATTRIBUTES],
            dev_server_existing_path=temporal_binary(),
        )
        async with environment, NativeServer(Path(folder) / "server") as native:
            client = await Client.connect(environment.client.service_client.config.target_host, plugins=[TasksPlugin()])
            async with running_bridge(client, Path(folder)) as bridge:
                for scenario in SCENARIOS:
                    if scenario.__name__ not in names:
                        continue
                    await native.admin.reset()
                    await native.admin.set(models=MODELS)
                    async with bridge.gpu(native):
                        handle = client.get_workflow_handle(workflow_of(await scenario(bridge, native)))
                        await handle.result()
                    history = await handle.fetch_history()
                    keep(history, HISTORIES / f"{scenario.__name__}.json")


if __name__ == "__main__":
    asyncio.run(record(sys.argv[1:]))
