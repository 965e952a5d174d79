"""Task queues with several partitions, as Temporal Cloud and the server by default have them."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

from temporalio import activity
from temporalio.api.enums.v1 import TaskQueueType
from temporalio.client import Client
from temporalio.common import SearchAttributeKey
from temporalio.testing import WorkflowEnvironment
from temporalio.worker import PollerBehaviorSimpleMaximum, Worker

from bridge.calls import presence_queue
from bridge.forecast import Forecast
from bridge.seen_server import SeenServer, identity_of
from comfyui_temporal.contracts.tasks import SEARCH_ATTRIBUTES
from local_stack.temporal_server import dynamic_config_flags
from runtime.health_page import is_polling
from tests.conftest import temporal_binary, unique
from tests.waiting import until

PARTITIONS = {"matching.numTaskqueueReadPartitions": 4, "matching.numTaskqueueWritePartitions": 4}
SERVERS = 10


@activity.defn
async def is_there() -> None: ...


async def test_every_server_is_seen_whatever_partition_it_polls() -> None:
    bridge_queue = unique("bridge")
    servers = [SeenServer(f"gpu-{number}", "default", "A100") for number in range(SERVERS)]
    identities = [identity_of(server, number) for number, server in enumerate(servers)]
    async with (
        await WorkflowEnvironment.start_local(
            search_attributes=[SearchAttributeKey.for_keyword(name) for name in SEARCH_ATTRIBUTES],
            dev_server_existing_path=temporal_binary(),
            dev_server_extra_args=["--log-level", "never", *dynamic_config_flags(PARTITIONS)],
        ) as several,
        AsyncExitStack() as running,
    ):
        address = several.client.service_client.config.target_host
        for identity in identities:
            worker = Worker(
                await Client.connect(address, identity=identity),
                task_queue=presence_queue(bridge_queue),
                activities=[is_there],
                max_concurrent_activities=1,
                activity_task_poller_behavior=PollerBehaviorSimpleMaximum(maximum=1),
            )
            await running.enter_async_context(worker)
        forecast = Forecast(several.client, task_queue=bridge_queue)

        async def are_all_seen() -> bool:
            forecast.forget()
            return [server.name for server in await forecast.servers()] == [server.name for server in servers]

        # Long before the pollers have gone round all partitions, a minute each.
        await until(are_all_seen, within_seconds=20)
        [of_pool] = await forecast.pools({"default"})
        assert (of_pool.servers, of_pool.free) == (SERVERS, SERVERS)
        kind = TaskQueueType.TASK_QUEUE_TYPE_ACTIVITY
        seen = [is_polling(several.client, presence_queue(bridge_queue), identity, kind) for identity in identities]
        assert all(await asyncio.gather(*seen))
