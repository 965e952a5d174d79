"""What those who run the gateway see: readiness and metrics, and the API while a party is away."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from temporalio.testing import WorkflowEnvironment

from comfyui_temporal.contracts.errors import ExceptionCode
from comfyui_temporal.contracts.tasks import workflow_id_of
from gateway.metrics import Metrics, MetricsPage
from store import StoreUnavailable, TaskStore
from store.figures import StoreFigures
from tests.cable import Cable
from tests.conftest import NewDatabase, unique
from tests.gateway.conftest import Api, NewRun
from tests.gateway.serving import Gateway, bearer, served, tick, token_for
from tests.metrics_page import value_in
from tests.store.facts import claim_of
from tests.waiting import until

NOBODY_LISTENS = "postgresql://user:password@127.0.0.1:1/tasks"
IMAGE = {"template_id": "text-to-image", "prompt": "a lighthouse"}


async def ask(gateway: Gateway, method: str, path: str, body: object = None, *, tenant: str) -> httpx.Response:
    headers = bearer(token_for(tenant))
    return await gateway.http.request(method, f"/api/v1/tasks{path}", json=body, headers=headers, timeout=20)


# An update is waited for ten seconds.
@pytest.mark.parametrize("fault", ["pull", pytest.param("hang", marks=pytest.mark.slow)])
async def test_without_temporal_tasks_are_read_and_none_is_changed(
    on_a_cable: tuple[Gateway, Cable],
    temporal_env: WorkflowEnvironment,
    task_store: TaskStore,
    new_run: NewRun,
    fault: str,
) -> None:
    gateway, cable = on_a_cable
    tenant, task_id = unique("tenant"), unique("image")
    await task_store.claim(claim_of(task_id, tenant_id=tenant))
    run = await new_run(task_id)
    assert (await gateway.http.get("/readyz")).json() == {"status": "ready", "postgresql": "ok", "temporal": "ok"}
    getattr(cable, fault)()

    new_id = unique("image")
    changes = await asyncio.gather(
        ask(gateway, "POST", "/images", {**IMAGE, "task_id": new_id}, tenant=tenant),
        ask(gateway, "POST", f"/{task_id}/cancel", tenant=tenant),
        ask(gateway, "POST", f"/{task_id}/rollback", tenant=tenant),
        ask(gateway, "GET", f"/{unique('unknown')}", tenant=tenant),
    )
    reads = [await ask(gateway, "GET", path, tenant=tenant) for path in ("", f"/{task_id}", f"/{task_id}/events")]
    readiness = await gateway.http.get("/readyz")

    assert [answer.status_code for answer in changes] == [503] * 4
    # An update that is not answered looks the same whether server or worker is silent.
    assert {answer.json()["code"] for answer in changes} - {"worker_unavailable"} == {"temporal_unavailable"}
    assert all(int(answer.headers["retry-after"]) > 0 for answer in changes)
    assert [answer.status_code for answer in reads] == [200, 200, 200]
    assert (readiness.status_code, readiness.json()["temporal"]) == (503, "unavailable")
    assert (await gateway.http.get("/healthz")).status_code == 200
    cable.plug_in()

    async def is_ready() -> bool:
        return (await gateway.http.get("/readyz")).status_code == 200

    await until(is_ready)
    assert (await run.describe()).status is not None
    started = await ask(gateway, "POST", "/images", {**IMAGE, "task_id": new_id}, tenant=tenant)
    assert started.status_code in (200, 202)
    await temporal_env.client.get_workflow_handle(workflow_id_of(new_id)).terminate()


async def test_without_postgresql_tasks_are_started_and_none_is_read(temporal_env: WorkflowEnvironment) -> None:
    store = TaskStore(NOBODY_LISTENS)
    tenant, task_id = unique("tenant"), unique("image")
    async with served(temporal_env.client, store, task_queue=unique("no-worker")) as gateway:
        started = await ask(gateway, "POST", "/images", {**IMAGE, "task_id": task_id}, tenant=tenant)
        again = await ask(gateway, "POST", "/images", {**IMAGE, "task_id": task_id}, tenant=tenant)
        other = await ask(gateway, "POST", "/images", {**IMAGE, "task_id": task_id, "prompt": "a dog"}, tenant=tenant)
        reads = [
            await ask(gateway, "GET", path, tenant=tenant) for path in ("", f"/{task_id}", "/stream/sse?task_id=a")
        ]
        readiness = await gateway.http.get("/readyz")
        metrics = await gateway.http.get("/metrics")
    await store.close()
    await temporal_env.client.get_workflow_handle(workflow_id_of(task_id)).terminate()

    assert (started.status_code, other.status_code) == (202, 409)
    assert again.status_code in (200, 503)
    assert [(answer.status_code, answer.json()["code"]) for answer in reads] == [(503, "store_unavailable")] * 3
    assert (readiness.status_code, readiness.json()["postgresql"]) == (503, "unavailable")
    assert metrics.status_code == 200
    assert value_in(metrics.text, "task_store_up") == 0


def value_of(metrics: str, name: str, **labels: str) -> float:
    """A sample's value; 0 where it was not counted yet."""
    return value_in(metrics, name, **labels) or 0.0


async def test_figures_that_cannot_be_read_count_as_a_store_that_is_away_until_they_can(
    new_database: NewDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, clock = TaskStore(await new_database()), [1_000.0]
    page = MetricsPage(Metrics(), store, clock=lambda: clock[0])
    figures, answers = store.figures, False

    async def too_slow() -> StoreFigures:
        if answers:
            return await figures()
        raise StoreUnavailable("it did not answer within 2.0 s")

    monkeypatch.setattr(store, "figures", too_slow)

    async def seen(seconds_later: float) -> tuple[float | None, float | None]:
        clock[0] += seconds_later
        text = (await page.text()).decode()
        assert value_in(text, "tasks_queued", priority="standard") == 0
        return value_in(text, "task_store_up"), value_in(text, "tasks_figures_age_seconds")

    assert [(await seen(pause))[0] for pause in (0, 1, 6, 20)] == [0, 0, 0, 0]
    answers = True
    assert [await seen(6), await seen(10)] == [(1, 0), (1, 10)]
    answers = False
    assert [await seen(6), await seen(1), await seen(6)] == [(0, 16), (0, 17), (0, 23)]
    answers = True
    assert await seen(6) == (1, 0)
    await store.close()


async def test_metrics_count_what_happens(api: Api) -> None:
    async def metrics() -> str:
        return (await api.http.get("/metrics")).text

    task_id = unique("image")
    await api.platform.simulators.admin.comfyui.fault("job_stall", task_id=task_id)
    before = await metrics()
    handle = await api.platform.start_waiting_image(task_id=task_id, priority="accelerated")
    await api.call("GET", f"/{task_id}")
    await api.call("GET", f"/{unique('unknown')}")
    job = await api.platform.job(handle)
    assert (await api.gateway.post(task_id, tick(1_000, 1.0, job_id=job.run_id))).status_code == 202
    assert (
        await api.gateway.post(task_id, tick(1_000, 1.0, job_id=job.run_id), secret="whsec_AAAA")
    ).status_code == 401
    path = f"/api/v1/tasks/stream/sse?task_id={task_id}"
    async with api.http.stream("GET", path, headers=bearer(token_for("tenant-demo"))) as response:
        assert response.status_code == 200

        async def is_shown() -> bool:
            return value_of(await metrics(), "gateway_streams_open", kind="sse") == 1

        await until(is_shown)
    after = await metrics()

    def grown(name: str, **labels: str) -> float:
        return value_of(after, name, **labels) - value_of(before, name, **labels)

    one_task = "/api/v1/tasks/{task_id}"
    assert grown("gateway_requests_total", route=one_task, method="GET", status="200") == 1
    assert grown("gateway_requests_total", route=one_task, method="GET", status="404") == 1
    assert grown("gateway_request_seconds_count", route=one_task) == 2
    assert grown("gateway_callbacks_total", outcome="signalled") >= 1
    assert grown("gateway_callbacks_total", outcome="forged") == 1
    assert grown("gateway_signal_seconds_count") >= 1
    assert task_id not in after, "labels come from our own code"
    for priority in ("standard", "accelerated"):
        for name in ("tasks_queued", "tasks_queue_wait_seconds", "tasks_queue_sla_missed"):
            assert f'{name}{{priority="{priority}"}}' in after
    assert value_of(after, "task_store_up") == 1
    for code in ExceptionCode:
        assert value_in(after, "task_exceptions", code=code.value) is not None
    for name in ("tasks_oldest_hold_seconds", "tasks_points_held", "tasks_unsettled", "tasks_points_unknown"):
        assert value_in(after, name) is not None, name
    await api.platform.cancel(handle)
    await handle.result()
