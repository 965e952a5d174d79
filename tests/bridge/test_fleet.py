"""A job goes only where it can run, and each server has a name of its own."""

from __future__ import annotations

import argparse
import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from temporalio.service import RPCError, RPCStatusCode

from bridge import fitness, gpu_worker, placement, server_check
from bridge.absent_servers import COMES_BACK_WITHIN, AbsentServers
from bridge.calls import CHECK_SERVERS, RUN_GRAPH, workflow_of
from bridge.forecast import Forecast
from bridge.manifest import DEFAULT_POOL
from bridge.orders import Missing, ServerReport
from bridge.seen_server import SeenServer, identity_of, server_of
from bridge.server_name import NameTaken, demand_name, name_of, owner_of
from runtime.required_settings import CannotStart
from tests.bridge.native import NativeServer
from tests.bridge.platform import BridgePlatform, Json
from tests.bridge.test_servers import until_running
from tests.bridge.test_trainings import MODELS, training_body
from tests.conftest import unique

Servers = tuple[NativeServer, NativeServer]
CHECKPOINT = {"checkpoints": ["a.safetensors"]}


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists are read about a hundred times more often."""
    monkeypatch.setattr(fitness, "REFRESH_SECONDS", 0.4)
    monkeypatch.setattr(fitness, "RETRY_SECONDS", 0.2)
    monkeypatch.setattr(fitness, "FRESH_SECONDS", 0.1)


async def servers_seen(bridge: BridgePlatform, number: int) -> list[SeenServer]:
    """The servers of the pool, once all of them have reported."""

    async def reported() -> list[SeenServer] | None:
        bridge.bridge.forecast.forget()
        seen = await bridge.bridge.forecast.servers()
        return seen if len(seen) == number and all(server.report for server in seen) else None

    found = await bridge.until(reported)
    assert found is not None
    return found


async def test_what_no_server_can_run_is_refused_with_the_names_of_what_is_missing(
    bridge: BridgePlatform, native: NativeServer
) -> None:
    async with bridge.gpu(native):
        await servers_seen(bridge, 1)
        answer = await bridge.post("/jobs", bridge.job_body(template_id="text-to-image"))
        assert (await bridge.ended((await bridge.submit())["job_id"]))["error_details"] is None
    detail = answer.json()["detail"]
    assert (answer.status_code, detail["code"], detail["message"]) == (422, "42202", "job_refused")
    assert detail["error_details"]["code"] == "model_missing"
    assert detail["error_details"]["retryable"] is False
    assert "ckpt_name" in detail["error_details"]["message"]
    assert len(await native.admin.submissions()) == 1


async def test_without_any_server_a_job_waits(bridge: BridgePlatform) -> None:
    assert (await bridge.job((await bridge.submit(template_id="text-to-image"))["job_id"]))["job_status"] == "queued"


async def test_a_job_that_waits_for_the_first_server_ends_where_that_cannot_run_it(
    bridge: BridgePlatform, native: NativeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "CHECKED_AFTER", timedelta(seconds=0.5))
    job = await bridge.submit(template_id="text-to-image")
    async with bridge.gpu(native):
        state = await bridge.ended(job["job_id"], seconds=30)
        assert state["error_details"]["code"] == "model_missing"
        assert state["error_details"]["retryable"] is False
        assert "ckpt_name" in state["error_details"]["message"]
        assert (await bridge.ended((await bridge.submit())["job_id"]))["error_details"] is None, "the server is free"
    assert len(await native.admin.submissions()) == 1


async def test_a_job_that_waits_again_ends_where_its_only_server_has_lost_its_model(
    bridge: BridgePlatform, native: NativeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "CHECKED_AFTER", timedelta(seconds=0.5))
    await native.admin.set(models=CHECKPOINT, hold=True)
    async with bridge.gpu(native):
        await servers_seen(bridge, 1)
        job = await bridge.submit(template_id="text-to-image")
        await until_running(bridge, native)
        await native.admin.set(models={"checkpoints": []}, hold=False)
        await native.admin.forget()
        state = await bridge.ended(job["job_id"], seconds=30)
        assert state["error_details"]["code"] == "model_missing"
        assert "ckpt_name" in state["error_details"]["message"]
        assert (await bridge.ended((await bridge.submit())["job_id"]))["error_details"] is None, "the server is free"


async def test_a_job_whose_template_is_removed_while_it_waits_ends(
    bridge: BridgePlatform, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "CHECKED_AFTER", timedelta(seconds=0.2))
    monkeypatch.setattr(placement, "CHECKED_AT_LEAST", timedelta(seconds=0.2))
    monkeypatch.setattr(server_check, "GONE_SECONDS", 1.0)
    without, having = servers
    await having.admin.set(models=CHECKPOINT, hold=True)
    async with bridge.gpu(without) as one, bridge.gpu(having) as another:
        await servers_seen(bridge, 2)
        running = await bridge.submit(template_id="text-to-image")
        await bridge.in_status(running["job_id"], "processing")
        waiting = await bridge.submit(template_id="text-to-image")
        for worker, times in ((one, 3), (another, 20)):
            await until_checked(bridge, waiting, times=times)
            assert (await bridge.job(waiting["job_id"]))["error_details"] is None
            worker.fitness.replace([each for each in bridge.templates if each.template_id != "text-to-image"])
        state = await bridge.ended(waiting["job_id"])
        assert state["error_details"]["code"] == "workflow_invalid"
        assert "text-to-image" in state["error_details"]["message"]
        await having.admin.set(hold=False)
        assert (await bridge.ended(running["job_id"]))["error_details"] is None


async def test_while_the_only_server_that_can_run_it_restarts_a_job_waits(
    bridge: BridgePlatform, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "CHECKED_AFTER", timedelta(seconds=0.2))
    monkeypatch.setattr(placement, "CHECKED_AT_LEAST", timedelta(seconds=0.2))
    without, having = servers
    await having.admin.set(models=CHECKPOINT)
    async with bridge.gpu(without):
        async with bridge.gpu(having):
            await servers_seen(bridge, 2)
            await having.admin.set(hold=True)
            running = await bridge.submit(template_id="text-to-image")
            await bridge.in_status(running["job_id"], "processing")
            waiting = await bridge.submit(template_id="text-to-image")
            await until_checked(bridge, waiting, times=1)
        await servers_seen(bridge, 1)
        later = await bridge.submit(template_id="text-to-image")
        for job in (waiting, later):
            await until_checked(bridge, job, times=3)
            assert (await bridge.job(job["job_id"]))["error_details"] is None
        await having.admin.set(hold=False)
        async with bridge.gpu(having):
            for job in (running, waiting, later):
                assert (await bridge.ended(job["job_id"]))["error_details"] is None


async def test_while_temporal_does_not_say_which_servers_there_are_nothing_is_said_of_gpus(
    bridge: BridgePlatform, native: NativeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unavailable() -> list[tuple[str, SeenServer, datetime]]:
        raise RPCError("unavailable", RPCStatusCode.UNAVAILABLE, b"")

    await native.admin.set(models=MODELS)
    body, key = training_body(bridge, gpu_type="rtx-4090"), unique("key")
    async with bridge.gpu(native):
        await servers_seen(bridge, 1)
        with monkeypatch.context() as away:
            away.setattr(bridge.bridge.forecast, "_read_pollers", unavailable)
            bridge.bridge.forecast.forget()
            assert (await bridge.get("/gpus")).status_code == 503
            refused = await bridge.post("/training", body, key=key)
            assert refused.status_code == 503, refused.text
            assert refused.headers["Retry-After"]
        assert (await bridge.post("/training", body, key=key)).status_code == 202
        assert (await bridge.get("/gpus")).json()[0]["total"] == 1


async def test_a_gpu_whose_worker_restarts_is_there_and_not_available(
    bridge: BridgePlatform, native: NativeServer
) -> None:
    await native.admin.set(models=MODELS)
    assert (await bridge.get("/gpus")).json() == []
    async with bridge.gpu(native):
        await servers_seen(bridge, 1)
    bridge.bridge.forecast.forget()
    rows = (await bridge.get("/gpus")).json()
    assert [(row["gpu_type"], row["total"], row["available"]) for row in rows] == [("rtx-4090", 1, 0)]
    assert rows[0]["accelerated_wait"] > 0
    answer = await bridge.post("/training", training_body(bridge, gpu_type="rtx-4090"))
    assert answer.status_code == 202, answer.text
    assert answer.json()["gpu_type"] == "rtx-4090"


async def until_checked(bridge: BridgePlatform, job: Json, *, times: int) -> None:
    """Wait until it was checked so often whether any server can run the job, or it has ended."""

    async def checked() -> bool:
        history = await bridge.client.get_workflow_handle(workflow_of(job["job_id"])).fetch_history()
        done = {event.activity_task_completed_event_attributes.scheduled_event_id for event in history.events}
        checks = [
            event.event_id
            for event in history.events
            if event.activity_task_scheduled_event_attributes.activity_type.name == CHECK_SERVERS
        ]
        return len(done.intersection(checks)) >= times or (await bridge.job(job["job_id"]))["error_details"] is not None

    await bridge.until(checked)


async def test_jobs_go_to_the_one_server_that_has_the_model(bridge: BridgePlatform, servers: Servers) -> None:
    without, having = servers
    await having.admin.set(models=CHECKPOINT)
    early = [await bridge.submit(template_id="text-to-image") for _ in range(2)]
    async with bridge.gpu(without), bridge.gpu(having):
        await servers_seen(bridge, 2)
        late = [await bridge.submit(template_id="text-to-image") for _ in range(2)]
        patterns = [await bridge.submit() for _ in range(4)]
        for job in [*early, *late, *patterns]:
            state = await bridge.ended(job["job_id"])
            assert state["error_details"] is None, state
            assert await times_sent(bridge, job) == 1, "it was sent to the server that cannot run it"
    assert all("save" in run.nodes for run in await without.admin.runs()), "it ran what it has no model for"
    assert len(await having.admin.runs()) + len(await without.admin.runs()) == 8


async def times_sent(bridge: BridgePlatform, job: Json) -> int:
    """How often a job was sent to a server to be run."""
    history = await bridge.client.get_workflow_handle(workflow_of(job["job_id"])).fetch_history()
    scheduled = [event.activity_task_scheduled_event_attributes.activity_type.name for event in history.events]
    return scheduled.count(RUN_GRAPH)


async def test_a_model_that_is_added_or_removed_while_the_server_runs_is_noticed(
    bridge: BridgePlatform, servers: Servers
) -> None:
    first, second = servers
    await first.admin.set(models=CHECKPOINT)
    async with bridge.gpu(first) as losing, bridge.gpu(second) as gaining:
        await second.admin.set(models=CHECKPOINT)
        await bridge.until(lambda: can_run(gaining, is_fit=True))
        await first.admin.set(models={"checkpoints": []})
        state = await bridge.ended((await bridge.submit(template_id="text-to-image"))["job_id"])
        assert state["error_details"] is None
        await bridge.until(lambda: can_run(losing, is_fit=False))
        state = await bridge.ended((await bridge.submit(template_id="text-to-image"))["job_id"])
        assert state["error_details"] is None
    assert len(await second.admin.runs()) == 2


async def can_run(worker: gpu_worker.GpuWorker, *, is_fit: bool) -> bool:
    return ("text-to-image" in worker.fitness.fit) is is_fit


async def test_a_server_whose_lists_cannot_be_read_runs_what_needs_no_model(
    bridge: BridgePlatform, native: NativeServer
) -> None:
    await native.admin.set(models=CHECKPOINT, broken_routes={"/object_info": 500})
    async with bridge.gpu(native):
        waiting = await bridge.submit(template_id="text-to-image")
        assert (await bridge.ended((await bridge.submit())["job_id"]))["error_details"] is None
        assert (await bridge.job(waiting["job_id"]))["job_status"] == "queued"
        await native.admin.set(broken_routes={})
        assert (await bridge.ended(waiting["job_id"]))["error_details"] is None
        await native.admin.set(broken_routes={"/object_info": 500})
        again: Json = await bridge.submit(template_id="text-to-image")
        assert (await bridge.ended(again["job_id"]))["error_details"] is None, "what was read before is kept"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("http://127.0.0.1:8188", "machine-a"), ("http://127.0.0.1:8188", "machine-b")),
        (("http://host.docker.internal:8188", "machine-a"), ("http://host.docker.internal:8188", "machine-b")),
        (("https://gpus.example/one", "machine-a"), ("https://gpus.example/two", "machine-a")),
        (("https://gpus.example/a.b", "machine-a"), ("https://gpus.example/a-b", "machine-a")),
        (("https://gpus.example/" + "a" * 80, "machine-a"), ("https://gpus.example/" + "a" * 81, "machine-a")),
    ],
)
def test_two_servers_never_have_the_same_name_by_default(one: tuple[str, str], other: tuple[str, str]) -> None:
    assert name_of(*one) != name_of(*other)
    assert len(name_of(*other)) <= 64


def test_a_server_has_the_same_name_from_every_machine_that_means_the_same_by_its_address() -> None:
    assert name_of("http://gpu-7:8188", "machine-a") == name_of("http://gpu-7:8188/", "machine-b")
    assert name_of("http://localhost:8188", "machine-a") == name_of("http://localhost:8188", "machine-a")


async def test_a_name_that_another_server_has_is_refused(bridge: BridgePlatform, servers: Servers) -> None:
    first, second = servers
    forecast = Forecast(bridge.client, task_queue=bridge.settings.bridge_task_queue)
    async with bridge.gpu(first, name="gpu-1"):
        await servers_seen(bridge, 1)
        await demand_name(forecast, "gpu-1", owner_of(first.url), wait_seconds=0)
        await demand_name(forecast, "gpu-2", owner_of(second.url), wait_seconds=0)
        with pytest.raises(NameTaken, match="--name"):
            await demand_name(forecast, "gpu-1", owner_of(second.url), wait_seconds=0)
    # It has left: nobody has to wait until Temporal forgets its worker.
    await demand_name(forecast, "gpu-1", owner_of(second.url), wait_seconds=0)


async def test_a_worker_under_a_taken_name_does_not_start(
    bridge: BridgePlatform, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_worker, "TAKEN_WAIT_SECONDS", 0.5)
    first, second = servers
    address = bridge.client.service_client.config.target_host
    settings = bridge.settings.model_copy(update={"temporal_address": address})
    options = argparse.Namespace(server=second.url, pool=DEFAULT_POOL, name="gpu-1", gpu_type=None)
    async with bridge.gpu(first, name="gpu-1"):
        await servers_seen(bridge, 1)
        with pytest.raises(CannotStart, match="already called 'gpu-1'"):
            await gpu_worker.serve(settings, options, asyncio.Event())


def test_the_identity_of_an_older_worker_is_read() -> None:
    server = SeenServer("gpu-1", "default", "rtx-4090", "owner")
    assert server_of(identity_of(server, 7)) == server
    assert server_of("gpu|gpu-1|default|rtx-4090|7") == SeenServer("gpu-1", "default", "rtx-4090")
    assert server_of("7@a-worker") is None


def reporting(name: str, *unfit: str) -> SeenServer:
    """A server of the default pool that lacks what these templates need."""
    missing = {template: Missing(code="model_missing", reasons=["no model"]) for template in unfit}
    return SeenServer(name, "default", "cpu", report=ServerReport(name=name, identity=name, unfit=missing))


def test_only_a_server_that_was_there_a_short_time_ago_comes_back() -> None:
    now, absent = datetime.now(UTC), AbsentServers()
    having, lacking = reporting("gpu-1"), reporting("gpu-2", "t")
    absent.look([lacking], [(having, now - COMES_BACK_WITHIN + timedelta(seconds=10))])
    assert absent.can_run("default", "t")
    assert not absent.can_run("other-pool", "t")
    absent.look([lacking, having], [])
    assert not absent.can_run("default", "t"), "it is there"
    absent.look([lacking, reporting("gpu-1", "t")], [])
    absent.look([lacking], [(having, now)])
    assert not absent.can_run("default", "t"), "it had lost its model before it left"
    absent.look([], [(reporting("gpu-3"), now - COMES_BACK_WITHIN)])
    assert not absent.can_run("default", "t"), "it was away for too long"
