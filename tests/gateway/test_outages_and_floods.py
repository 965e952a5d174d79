"""What may happen to the callback route: Temporal or PostgreSQL away, and a sender that floods."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator

import pytest
from temporalio.client import Client
from temporalio.testing import WorkflowEnvironment

from gateway import callback_news
from proof.site.callbacks import Wire
from store import TaskStore
from tests.cable import Cable
from tests.conftest import unique
from tests.gateway.conftest import NewRun
from tests.gateway.serving import (
    Gateway,
    GatewayProcess,
    bearer,
    delivery,
    gateway_process,
    kept_by,
    served,
    tick,
    token_for,
    training_tick,
)
from tests.gateway.test_tick_writer import known
from tests.store.facts import claim_of
from tests.waiting import until

NOBODY_LISTENS = "postgresql://user:password@127.0.0.1:1/tasks"


@pytest.mark.parametrize("fault", ["pull", "hang"])
async def test_temporal_away_is_a_503_and_the_repeat_is_taken(
    on_a_cable: tuple[Gateway, Cable], new_run: NewRun, fault: str
) -> None:
    gateway, cable = on_a_cable
    task_id = unique("away")
    run = await new_run(task_id)
    assert (await gateway.post(task_id, tick(1, 1.0))).status_code == 202
    getattr(cable, fault)()

    began = time.monotonic()
    answers = await asyncio.gather(
        gateway.post(task_id, tick(2, 2.0)),
        gateway.post(task_id, delivery(3), webhook_id=f"{task_id}-end"),
        gateway.post(unique("other"), tick(1)),
    )
    took = time.monotonic() - began

    assert [(answer.status_code, answer.headers["retry-after"]) for answer in answers] == [(503, "5")] * 3
    assert took < 3.0
    cable.plug_in()

    async def repeated() -> bool:
        return (await gateway.post(task_id, delivery(3), webhook_id=f"{task_id}-end")).status_code == 202

    await until(repeated)
    assert (await kept_by(run))[-1]["job_status"] == "delivery"


async def test_postgresql_away_costs_log_lines_a_repeat_but_no_signal(
    temporal_env: WorkflowEnvironment, new_run: NewRun
) -> None:
    store = TaskStore(NOBODY_LISTENS)
    task_id = unique("nostore")
    run = await new_run(task_id)
    async with served(temporal_env.client, store) as gateway:
        with_lines = await gateway.post(task_id, training_tick(1, log=[{"message": "a"}]))
        without = await gateway.post(task_id, training_tick(2, stage_progress=2.0))
        to_unknown = await gateway.post(unique("unknown"), tick(1))
    await store.close()

    assert (with_lines.status_code, without.status_code, to_unknown.status_code) == (503, 202, 503)
    assert [kept["sequence"] for kept in await kept_by(run)] == [1, 2]


async def test_a_namespace_that_is_missing_never_ends_a_senders_repeats(
    temporal_env: WorkflowEnvironment, task_store: TaskStore
) -> None:
    task_id = unique("namespace")
    await task_store.claim(claim_of(task_id))
    client = await Client.connect(temporal_env.client.service_client.config.target_host, namespace="not-there")
    async with served(client, task_store) as gateway:
        assert (await gateway.post(task_id, tick(1))).status_code == 503


@pytest.fixture
async def process(temporal_env: WorkflowEnvironment, postgres_dsn: str) -> AsyncIterator[GatewayProcess]:
    address = temporal_env.client.service_client.config.target_host
    async with gateway_process({"TEMPORAL_ADDRESS": address, "DATABASE_DSN": postgres_dsn}) as process:
        yield process


async def sent_at_a_pace(flood: list[bytes], wires: list[Wire], per_second: int) -> list[tuple[int, bytes]]:
    began = time.monotonic()
    posts = []
    for number, request in enumerate(flood):
        if (ahead := number / per_second - (time.monotonic() - began)) > 0:
            await asyncio.sleep(ahead)
        posts.append(asyncio.create_task(wires[number % len(wires)].post(request)))
    return await asyncio.gather(*posts)


async def test_a_flood_neither_fills_the_history_nor_delays_another_task(
    process: GatewayProcess, new_run: NewRun
) -> None:
    """500 callbacks a second for one task, each with a change, against a gateway in a process of its own."""
    flooded, calm = unique("flooded"), unique("calm")
    flooded_run, calm_run = await new_run(flooded), await new_run(calm)
    seconds, per_second = 2.0, 500
    count = int(seconds * per_second)
    flood = [process.request(flooded, tick(n + 1, estimated_time=1.0 + n)) for n in range(count)]
    end = process.request(flooded, delivery(count + 1))
    wires = [await Wire.to(process.port) for _ in range(16)]
    calm_wire = await Wire.to(process.port)
    calm_waits: list[float] = []

    async def send_flood() -> list[tuple[int, bytes]]:
        return [*await sent_at_a_pace(flood, wires, per_second), await wires[0].post(end)]

    began = time.monotonic()
    flooding = asyncio.create_task(send_flood())
    while not flooding.done():
        request = process.request(calm, tick(len(calm_waits) + 1, estimated_time=1.0 + len(calm_waits)))
        sent_at = time.monotonic()
        status, _ = await calm_wire.post(request)
        calm_waits.append(time.monotonic() - sent_at)
        assert status == 202
        await asyncio.sleep(0.1)
    answers = await flooding
    took = time.monotonic() - began
    for wire in (*wires, calm_wire):
        wire.close()

    assert {status for status, _ in answers} == {202}
    assert json.loads(answers[-1][1]) == {"outcome": "signalled"}
    kept = await kept_by(flooded_run)
    assert "delivery" in [callback["job_status"] for callback in kept]
    assert len(kept) <= callback_news.BURST + callback_news.PER_SECOND * took + 2
    assert len(await kept_by(calm_run)) >= min(len(calm_waits), callback_news.BURST - callback_news.KEPT_FOR_FINALS)
    # Behind the flood it would wait for all of it.
    assert sorted(calm_waits)[int(len(calm_waits) * 0.9)] < took / 2, calm_waits


async def test_a_flood_of_ticks_is_coalesced_and_delays_no_other_tasks_ticks(
    process: GatewayProcess, task_store: TaskStore, new_run: NewRun
) -> None:
    """500 reports of figures a second for one task, whose row knows them, against a gateway in a process of its own."""
    flooded, calm = await known(task_store), await known(task_store)
    runs = [await new_run(task_id) for task_id in (flooded, calm)]
    seconds, per_second = 2.0, 500
    count = int(seconds * per_second)
    flood = [process.request(flooded, tick(n + 2, 100.0 * n / count)) for n in range(count)]
    wires = [await Wire.to(process.port) for _ in range(16)]
    calm_wire = await Wire.to(process.port)
    calm_waits: list[float] = []

    began = time.monotonic()
    flooding = asyncio.create_task(sent_at_a_pace(flood, wires, per_second))
    while not flooding.done():
        request = process.request(calm, tick(len(calm_waits) + 2, float(len(calm_waits))))
        sent_at = time.monotonic()
        status, _ = await calm_wire.post(request)
        calm_waits.append(time.monotonic() - sent_at)
        assert status == 202
        await asyncio.sleep(0.1)
    outcomes = Counter((status, json.loads(body)["outcome"]) for status, body in await flooding)

    async def newest_is_shown() -> bool:
        row = await task_store.task(flooded)
        return row is not None and row.progress == 100.0 * (count - 1) / count

    await until(newest_is_shown)
    took = time.monotonic() - began
    for wire in (*wires, calm_wire):
        wire.close()
    assert set(outcomes) == {(202, "stored"), (202, "coalesced")}
    assert outcomes[202, "stored"] <= took + 1
    assert len(await task_store.events(flooded)) <= 2 + took + 1
    assert [await kept_by(run) for run in runs] == [[], []], "no tick is a signal"
    assert len(await task_store.events(calm)) > 2
    assert sorted(calm_waits)[int(len(calm_waits) * 0.9)] < took / 2, calm_waits


async def test_out_of_pace_the_newest_tick_is_signalled_by_itself(gateway: Gateway, new_run: NewRun) -> None:
    task_id = unique("newest")
    run = await new_run(task_id)
    last = callback_news.BURST + 10
    for sequence in range(1, last + 1):
        assert (await gateway.post(task_id, tick(sequence, estimated_time=sequence))).status_code == 202

    async def newest_kept() -> bool:
        return bool((await kept_by(run))[-1]["sequence"] == last)

    await until(newest_kept)
    assert len(await kept_by(run)) < last


async def test_a_task_is_read_while_temporal_has_been_away_since_the_gateways_start(task_store: TaskStore) -> None:
    client = await Client.connect("127.0.0.1:9", lazy=True)
    await task_store.claim(claim_of(task_id := unique("image")))
    async with served(client, task_store) as gateway:
        answer = await gateway.http.get(f"/api/v1/tasks/{task_id}", headers=bearer(token_for()))
    assert (answer.status_code, answer.json()["delays"]) == (200, []), answer.text
