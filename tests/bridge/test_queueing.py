"""Many jobs of several tenants: accelerated jobs first, tenants in turn, each job once."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import pytest
from temporalio.api.enums.v1 import TaskQueueType
from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode
from temporalio.worker import Worker

from bridge import template_queues
from bridge.gpu_worker import is_there
from bridge.placement import prompt_id_of
from bridge.template_queues import TemplateQueues
from runtime.health_page import is_polling
from tests.bridge.native import NativeServer
from tests.bridge.platform import BridgePlatform, Json
from tests.conftest import unique
from tests.waiting import until

TENANTS = ("tenant-one", "tenant-two", "tenant-three")


async def submitted(bridge: BridgePlatform, tenant: str, priority: str, **fields: Any) -> Json:
    accepted = await bridge.submit(tenant_id=tenant, user_id=f"user-of-{tenant}", priority=priority, **fields)
    return accepted | {"tenant": tenant, "priority": priority}


async def has_backlog(bridge: BridgePlatform, jobs: int) -> bool:
    """Whether Temporal reports this many waiting jobs. It does so some seconds late."""
    bridge.bridge.forecast.forget()
    backlog = await bridge.bridge.forecast.backlog("default")
    return backlog.accelerated + backlog.standard >= jobs


async def order_of(native: NativeServer, jobs: list[Json]) -> list[Json]:
    """The jobs in the order in which they ran."""
    by_prompt = {first_prompt_of(job): job for job in jobs}
    return [by_prompt[run.prompt_id] for run in await native.admin.runs()]


def first_prompt_of(job: Json) -> str:
    return prompt_id_of(job["job_id"], 0, 1)


async def queued_and_run(bridge: BridgePlatform, native: NativeServer, jobs: list[Json]) -> list[Json]:
    """Let all jobs wait, then run them on one server. Returns them in the order in which they ran."""
    for job in jobs:
        await bridge.until(partial(bridge.is_waiting, job), seconds=60)
    async with bridge.gpu(native):
        for job in jobs:
            caller = {"tenant": job["tenant"], "user": f"user-of-{job['tenant']}"}
            state = await bridge.ended(job["job_id"], seconds=300, **caller)
            assert state["error_details"] is None, state
    return await order_of(native, jobs)


async def test_accelerated_jobs_run_first_and_tenants_take_turns(bridge: BridgePlatform, native: NativeServer) -> None:
    await native.admin.set(node_seconds=0.0)
    jobs = [await submitted(bridge, "tenant-one", "standard") for _ in range(5)]
    jobs += [await submitted(bridge, "tenant-two", "standard") for _ in range(2)]
    jobs += [await submitted(bridge, "tenant-one", "accelerated") for _ in range(2)]
    order = await queued_and_run(bridge, native, jobs)
    assert [job["priority"] for job in order] == ["accelerated"] * 2 + ["standard"] * 7
    # Tenant two came last, with two jobs. It must not wait for all five of tenant one.
    places = [place for place, job in enumerate(order[2:]) if job["tenant"] == "tenant-two"]
    assert places[-1] <= 4, [job["tenant"] for job in order]


async def test_the_forecast_and_the_list_of_gpus_are_right(bridge: BridgePlatform, native: NativeServer) -> None:
    first = await bridge.submit(priority="standard")
    assert first["estimated_time"] == pytest.approx(8.0)
    accelerated = await bridge.submit(priority="accelerated")
    assert accelerated["estimated_time"] == pytest.approx(3.0)
    assert (await bridge.get("/gpus")).json() == []
    async with bridge.gpu(native, gpu_type="rtx-4090"):
        for job in (first, accelerated):
            await bridge.ended(job["job_id"])
        bridge.bridge.forecast.forget()
        assert (await bridge.get("/gpus")).json() == [
            {"gpu_type": "rtx-4090", "total": 1, "available": 1, "accelerated_wait": 0.0}
        ]
        measured = await bridge.until(lambda: measured_minutes(bridge))
        assert measured == 1.0, "the estimate did not learn from the runs"
        await native.admin.set(hold=True)
        running = await bridge.submit()
        await bridge.in_status(running["job_id"], "processing")
        await bridge.until(lambda: is_busy(bridge))
        await bridge.cancel(running["job_id"])


async def measured_minutes(bridge: BridgePlatform) -> float:
    bridge.bridge.forecast.forget()
    accepted = await bridge.submit()
    await bridge.cancel(accepted["job_id"])
    minutes: float = accepted["estimated_time"]
    return minutes if minutes < 3 else 0.0


async def is_busy(bridge: BridgePlatform) -> bool:
    bridge.bridge.forecast.forget()
    return bool((await bridge.get("/gpus")).json()[0]["available"] == 0)


@pytest.mark.slow
async def test_a_queued_job_moves_up_and_its_sequence_rises(
    bridge: BridgePlatform, servers: tuple[NativeServer, NativeServer]
) -> None:
    for server in servers:
        await server.admin.set(hold=True)
    for _ in range(3):
        await bridge.submit()
    await bridge.until(lambda: has_backlog(bridge, 3))
    last = await bridge.submit()
    first_seen = await bridge.job(last["job_id"])
    assert first_seen["queue_position"] == 3

    async def moved() -> Json | None:
        bridge.bridge.forecast.forget()
        state = await bridge.job(last["job_id"])
        return state if state["queue_position"] < 3 else None

    async with bridge.gpu(servers[0]), bridge.gpu(servers[1]):
        # Temporal reports the backlog some seconds late.
        state = await bridge.until(moved)
        assert state is not None
        assert state["sequence"] > first_seen["sequence"]
        for server in servers:
            await server.admin.set(hold=False)
        assert (await bridge.ended(last["job_id"]))["error_details"] is None


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_200_jobs_of_three_tenants_in_mixed_priority(
    bridge: BridgePlatform, servers: tuple[NativeServer, NativeServer]
) -> None:
    native, _ = servers
    await native.admin.set(node_seconds=0.0, step_seconds=0.0)
    numbers = {"tenant-one": 120, "tenant-two": 50, "tenant-three": 30}
    wanted = [
        (tenant, "accelerated" if n % 5 == 0 else "standard") for tenant in TENANTS for n in range(numbers[tenant])
    ]
    jobs: list[Json] = []
    for start in range(0, len(wanted), 10):
        some = wanted[start : start + 10]
        jobs += await asyncio.gather(*(submitted(bridge, tenant, priority) for tenant, priority in some))
    order = await queued_and_run(bridge, native, jobs)

    assert len(order) == 200
    assert len({job["job_id"] for job in order}) == 200
    accelerated = sum(priority == "accelerated" for _, priority in wanted)
    assert [job["priority"] for job in order] == ["accelerated"] * accelerated + ["standard"] * (200 - accelerated)
    # While all three still wait, each has about a third of the servers' time.
    standard = [job["tenant"] for job in order[accelerated:]]
    shared = standard[: 3 * 24]
    for tenant in TENANTS:
        assert 16 <= shared.count(tenant) <= 32, {name: shared.count(name) for name in TENANTS}
    last = order[-1]
    await bridge.until(lambda: all_published(bridge, [job["task_id"] for job in jobs]), seconds=60)
    assert bridge.receiver.statuses(last["task_id"])[-1] == "delivery"


async def all_published(bridge: BridgePlatform, task_ids: list[str]) -> bool:
    return all("delivery" in bridge.receiver.statuses(task_id) for task_id in task_ids)


async def test_a_templates_queue_whose_worker_has_ended_is_polled_again(
    temporal_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Temporal did not answer its start, and then refused its poll."""
    monkeypatch.setattr(template_queues, "AGAIN_SECONDS", 0.2)
    queue, identity, made = unique("queue"), unique("gpu"), []

    def fails_once(target: Any, name: str) -> None:
        whole = getattr(target, name)

        async def unavailable() -> None:
            setattr(target, name, whole)
            raise RPCError("unavailable", RPCStatusCode.UNAVAILABLE, b"")

        setattr(target, name, unavailable)

    def worker(_: str) -> Worker:
        made.append(Worker(temporal_client, task_queue=queue, activities=[is_there], identity=identity))
        if len(made) == 1:
            for call in ("validate", "poll_activity_task"):
                fails_once(made[0]._bridge_worker, call)
        return made[-1]

    async def is_polled() -> bool:
        return await is_polling(temporal_client, queue, identity, TaskQueueType.TASK_QUEUE_TYPE_ACTIVITY)

    async with TemplateQueues(lambda: {"a-template"}, worker).polled():
        await until(is_polled)
    assert len(made) == 2
