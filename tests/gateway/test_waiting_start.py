"""`Prefer: wait=N`: a start that answers what a user wants to know at once (contract §6)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from temporalio.testing import WorkflowEnvironment

from comfyui_temporal.contracts.tenant_limits import TenantLimits
from gateway.draining import Draining
from gateway.start_waits import seconds_of
from store import TaskStore
from tests.cable import Cable
from tests.conftest import unique
from tests.gateway.conftest import DEMO_TOKEN, Api
from tests.gateway.serving import Gateway, bearer, served, token_for
from tests.waiting import until
from tests.workflows.payers import Payer, new_payer

HD = 24
IMAGE = {"template_id": "text-to-image", "prompt": "a lighthouse at dusk"}
WAIT = {"Prefer": "wait=30"}


@pytest.mark.parametrize(
    ("prefer", "seconds"),
    [
        (None, 0),
        ("wait=5", 5),
        ('respond-async, Wait="7"; x=1', 7),
        ("wait=5, wait=9", 5),
        ("wait=600", 60),
        ("wait=0", 0),
        ("wait=-1", 0),
        ("wait=²", 0),
        ("wait=" + "9" * 5_000, 0),
        ("wait", 0),
        ("handling=strict", 0),
    ],
)
def test_n_is_read_from_the_preference_and_is_60_at_most(prefer: str | None, seconds: int) -> None:
    assert seconds_of(prefer) == seconds


async def poor(api: Api, balance: int) -> tuple[Payer, str]:
    payer = await new_payer(api.platform, balance)
    return payer, token_for(payer.tenant_id, payer.user_id)


async def submitted(api: Api, task_id: str) -> int:
    seen = await api.platform.simulators.admin.comfyui.requests_seen("submit_job")
    return [request.task_id for request in seen].count(task_id)


async def test_a_start_is_answered_once_credits_are_held_and_its_repeat_too(api: Api) -> None:
    body = IMAGE | {"task_id": unique("waits")}
    answer = await api.call("POST", "/images", body, **WAIT)
    assert (answer.status_code, answer.json()["credits"]["held"]) == (200, HD), answer.text
    assert answer.headers["Preference-Applied"] == "wait=30"
    assert "Idempotent-Replayed" not in answer.headers
    holds = await api.platform.simulators.admin.credits.holds(body["task_id"])
    assert [hold.amount for hold in holds] == [HD]
    again = await api.call("POST", "/images", body, **WAIT)
    assert (again.status_code, again.headers["Idempotent-Replayed"]) == (200, "true")
    assert (await api.ended(body["task_id"]))["status"] == "completed"
    late = await api.call("POST", "/images", body, **WAIT)
    assert (late.status_code, late.json()["status"]) == (200, "completed")


async def test_refused_credits_are_402_with_their_sentence_and_a_new_try_needs_a_new_key(api: Api) -> None:
    payer, token = await poor(api, HD - 1)
    tries = [await api.call("POST", "/images", IMAGE, token=token, X_Idempotency_Key="k1", **WAIT) for _ in range(2)]
    for answer in tries:
        assert (answer.status_code, answer.json()["code"]) == (402, "insufficient_balance"), answer.text
        assert f"cost {HD} points and the balance is {HD - 1}" in answer.json()["detail"]
    assert tries[0].json() == tries[1].json()
    assert [answer.headers.get("Idempotent-Replayed") for answer in tries] == [None, "true"]
    assert [answer.headers["Preference-Applied"] for answer in tries] == ["wait=30"] * 2
    task_id = tries[0].headers["Location"].rpartition("/")[2]
    await payer.has(HD)
    still = await api.call("POST", "/images", IMAGE, token=token, X_Idempotency_Key="k1", **WAIT)
    assert still.status_code == 402

    async def is_failed() -> bool:
        row = (await api.call("GET", f"/{task_id}", token=token)).json()
        return (row["status"], row["credits"]["held"], row["ended_at"] is None) == ("failed", 0, False)

    await until(is_failed)
    assert await api.platform.simulators.admin.credits.holds(task_id) == []
    assert await submitted(api, task_id) == 0
    new = await api.call("POST", "/images", IMAGE, token=token, X_Idempotency_Key="k2", **WAIT)
    assert (new.status_code, new.json()["credits"]["held"]) == (200, HD)


async def test_a_right_that_was_taken_is_402_too(api: Api) -> None:
    payer, token = await poor(api, 1_000)
    await payer.may_use("text-to-image", phase="revoked")
    answer = await api.call("POST", "/images", IMAGE, token=token, **WAIT)
    assert (answer.status_code, answer.json()["code"]) == (402, "not_authorized")
    assert "text-to-image" in answer.json()["detail"] or "revoked" in answer.json()["detail"]


async def test_a_start_that_its_claim_refused_is_never_queued_again(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api.platform, "limits", TenantLimits(starts_per_minute=1))
    _, token = await poor(api, 1_000)
    assert (await api.call("POST", "/images", IMAGE, token=token, **WAIT)).status_code == 200
    body = IMAGE | {"task_id": unique("waits")}
    refused = await api.call("POST", "/images", body, token=token, **WAIT)
    assert (refused.status_code, refused.json()["code"]) == (402, "quota_exceeded"), refused.text

    again = await api.call("POST", "/images", body, token=token, **WAIT)
    assert (again.status_code, again.json()) == (402, refused.json())
    without = await api.call("POST", "/images", body, token=token)
    assert (without.status_code, without.json()["status"]) == (200, "failed")
    read = (await api.call("GET", f"/{body['task_id']}", token=token)).json()
    assert (read["status"], read["error"]["code"], read["ended_at"] is None) == ("failed", "quota_exceeded", False)


async def test_another_body_is_409_and_an_extra_that_is_not_offered_422(api: Api) -> None:
    body = IMAGE | {"task_id": unique("waits")}
    assert (await api.call("POST", "/images", body, **WAIT)).status_code == 200
    other = await api.call("POST", "/images", body | {"prompt": "a dog"}, **WAIT)
    assert (other.status_code, other.json()["code"]) == (409, "task_exists")
    unknown = await api.call("POST", "/images", IMAGE | {"extras": {"no_such_extra": True}}, **WAIT)
    assert (unknown.status_code, unknown.json()["code"]) == (422, "input_invalid")
    assert "no_such_extra" in unknown.json()["detail"]


async def without_dataset(api: Api, _payer: Payer) -> dict[str, Any]:
    address = (api.platform.folder / "datasets" / "tenant-demo" / "nothing-here").as_uri()
    return api.platform.training(dataset={"dataset_id": "faces", "source_uri": address})


async def with_a_used_key(_api: Api, payer: Payer) -> dict[str, Any]:
    task = payer.image()
    other = {"task_id": unique("another"), "template_id": "upscale", "scene": "image.generate", "estimated_cost": 5}
    await payer.post("pre-deduct", f"{task['task_id']}:pre_deduct:1", other)
    return task


async def above_its_ceiling(_api: Api, payer: Payer) -> dict[str, Any]:
    return payer.image(max_credits=HD - 1)


@pytest.mark.parametrize(
    ("order", "status", "code"),
    [
        pytest.param(without_dataset, 422, "dataset_invalid", id="no dataset"),
        pytest.param(with_a_used_key, 409, "task_conflict", id="another's key"),
        pytest.param(above_its_ceiling, 402, "price_mismatch", id="too dear"),
    ],
)
async def test_a_task_that_fails_before_it_is_held_is_answered_with_its_problem_and_so_is_its_repeat(
    api: Api, order: Callable[[Api, Payer], Awaitable[dict[str, Any]]], status: int, code: str
) -> None:
    payer, token = await poor(api, 1_000)
    body = await order(api, payer)
    path, token = ("/trainings", DEMO_TOKEN) if "dataset" in body else ("/images", token)
    for is_repeat in (False, True):
        answer = await api.call("POST", path, body, token=token, **WAIT)
        assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
        assert ("Idempotent-Replayed" in answer.headers) is is_repeat
    assert await api.platform.simulators.admin.credits.holds(body["task_id"]) == []


async def test_a_training_answers_with_the_price_that_it_asks_for(api: Api) -> None:
    body = api.platform.training(max_credits=None)
    answer = await api.call("POST", "/trainings", body, **WAIT)
    assert answer.status_code == 200, answer.text
    wanted = answer.json()["confirmation"]["estimated_cost"]
    assert answer.json()["credits"]["held"] == 0 < wanted
    again = await api.call("POST", "/trainings", body, **WAIT)
    assert (again.status_code, again.json()["confirmation"]) == (200, answer.json()["confirmation"])
    await api.call("POST", f"/{body['task_id']}/confirm-price", {"max_credits": wanted})
    held = await api.call("POST", "/trainings", body, **WAIT)
    assert (held.status_code, held.json()["credits"]["held"]) == (200, wanted)
    await api.ended(body["task_id"])


async def test_without_a_worker_a_start_is_202_after_n_seconds_and_goes_on_later(
    api: Api, task_store: TaskStore
) -> None:
    queue, body = unique("nobody"), IMAGE | {"task_id": unique("waits")}
    async with served(api.platform.client, task_store, task_queue=queue) as gateway:
        began = time.monotonic()
        for _ in range(2):
            answer = await post(gateway, body, "wait=1")
            assert (answer.status_code, answer.json()["status"]) == (202, "queued"), answer.text
        assert 2 <= time.monotonic() - began < 12
        waiting = asyncio.create_task(post(gateway, body, "wait=20"))
        async with api.platform.worker(task_queue=queue):
            answer = await waiting
            assert (answer.status_code, answer.json()["credits"]["held"]) == (200, HD), answer.text
            await api.ended(body["task_id"])


async def post(gateway: Gateway, body: dict[str, Any], prefer: str) -> httpx.Response:
    headers = bearer(DEMO_TOKEN) | {"Prefer": prefer}
    return await gateway.http.post("/api/v1/tasks/images", json=body, headers=headers, timeout=40)


async def test_a_client_that_hangs_up_has_started_its_task(api: Api) -> None:
    body = IMAGE | {"task_id": unique("waits")}
    away = await api.platform.simulators.admin.credits.fault(
        "rate_limit", route="pre_deduct", task_id=body["task_id"], seconds=1, times=None
    )
    with pytest.raises(httpx.ReadTimeout):
        await api.http.post(
            "/api/v1/tasks/images", json=body, headers=bearer(DEMO_TOKEN) | {"Prefer": "wait=20"}, timeout=0.5
        )
    await api.platform.until_hit("pre_deduct", away)
    await api.platform.simulators.admin.credits.remove_fault(away)
    assert (await api.call("POST", "/images", body, **WAIT)).status_code == 200
    assert (await api.ended(body["task_id"]))["status"] == "completed"


async def test_without_temporal_a_start_that_waits_is_answered_as_one_that_does_not(
    on_a_cable: tuple[Gateway, Cable], temporal_env: WorkflowEnvironment
) -> None:
    gateway, cable = on_a_cable
    cable.pull()
    answers = await asyncio.gather(*(post(gateway, IMAGE, prefer) for prefer in ("wait=60", "respond-async")))
    for answer in answers:
        assert (answer.status_code, answer.json()["code"]) == (503, "temporal_unavailable")


async def test_a_shutdown_ends_the_wait(api: Api, task_store: TaskStore) -> None:
    body, draining = IMAGE | {"task_id": unique("waits")}, Draining()
    away = await api.platform.simulators.admin.credits.fault(
        "rate_limit", route="pre_deduct", task_id=body["task_id"], seconds=1, times=None
    )
    async with served(
        api.platform.client, task_store, task_queue=api.platform.task_queue, draining=draining
    ) as gateway:
        waiting = asyncio.create_task(post(gateway, body, "wait=60"))
        await api.platform.until_hit("pre_deduct", away)
        began = time.monotonic()
        draining.begin()
        assert ((await waiting).status_code, time.monotonic() - began < 10) == (202, True)
    await api.platform.simulators.admin.credits.remove_fault(away)
    assert (await api.ended(body["task_id"]))["status"] == "completed"
