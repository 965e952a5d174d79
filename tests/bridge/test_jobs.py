"""An image job through the bridge, from the POST to the picture."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import httpx
import pytest
from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.update.v1 import UpdateRef
from temporalio.api.workflowservice.v1 import PollWorkflowExecutionUpdateRequest
from temporalio.service import RPCError, RPCStatusCode

from bridge.api import MAX_BODY_BYTES
from bridge.calls import CANCEL_UPDATE, workflow_id, workflow_of
from bridge.gpu_worker import GpuWorker
from bridge.replies import Call, Refused, Reply
from bridge.runs import Keys, Runs
from comfyui_temporal.contracts.permissions import Scope, TokenClaims
from tests.bridge.native import NativeServer
from tests.bridge.platform import TENANT, USER, BridgePlatform, Json
from tests.bridge.test_trainings import training_body
from tests.conftest import unique
from tests.gateway.serving import answer_to_head

PNG = b"\x89PNG\r\n\x1a\n"


async def is_published(bridge: BridgePlatform, task_id: str, status: str) -> bool:
    return status in bridge.receiver.statuses(task_id)


async def test_a_job_is_delivered_and_its_task_gets_the_callbacks(bridge: BridgePlatform, native: NativeServer) -> None:
    async with bridge.gpu(native):
        accepted = await bridge.submit()
        state = await bridge.ended(accepted["job_id"])
    assert state["error_details"] is None
    assert state["actual_cost"] == accepted["estimated_cost"] == 18
    picture = await bridge.http.get(state["result_urls"][0])
    assert picture.headers["content-type"] == "image/png"
    assert picture.content.startswith(PNG)
    assert len(await native.admin.runs()) == 1
    await bridge.until(lambda: is_published(bridge, accepted["task_id"], "delivery"))
    assert not any(arrival.flaw for arrival in bridge.receiver.of(accepted["task_id"]))
    bodies = sorted(bridge.receiver.genuine(accepted["task_id"]), key=lambda body: body["sequence"])
    statuses = [body["job_status"] for body in bodies]
    assert [status for n, status in enumerate(statuses) if status not in statuses[:n]] == [
        "queued",
        "processing",
        "delivery",
    ]
    assert len({body["sequence"] for body in bodies}) == len(bodies)
    assert state["sequence"] == bodies[-1]["sequence"]
    processing = [body["stage_progress"] for body in bodies if body["job_status"] == "processing"]
    assert processing == sorted(processing)


async def test_an_altered_or_expired_address_is_not_found(bridge: BridgePlatform, native: NativeServer) -> None:
    async with bridge.gpu(native):
        state = await bridge.ended((await bridge.submit())["job_id"])
    url = state["result_urls"][0]
    for altered in (
        url[:-1] + ("0" if url[-1] != "0" else "1"),
        url.replace("expires=", "expires=9"),
        url.split("?")[0],
    ):
        assert (await bridge.http.get(altered)).status_code == 404
    expired = bridge.bridge.signed.address("results/x.png", expires=1)
    assert (await bridge.http.get(expired)).status_code == 404


async def test_progress_is_visible_during_the_run_and_never_falls(bridge: BridgePlatform, native: NativeServer) -> None:
    await native.admin.set(node_seconds=0.3)
    seen: list[tuple[int, float]] = []
    async with bridge.gpu(native):
        accepted = await bridge.submit()

        async def polled() -> Json:
            state = await bridge.job(accepted["job_id"])
            if state["job_status"] == "processing":
                seen.append((state["sequence"], state["stage_progress"]))
            return state

        async def is_beyond(percent: float) -> bool:
            return bool((await polled())["stage_progress"] > percent)

        async def is_delivered() -> bool:
            return bool((await polled())["job_status"] == "delivery")

        await bridge.until(lambda: has_nodes(native, 2))
        await native.admin.set(hold=True)
        await bridge.until(lambda: is_beyond(0))
        await native.admin.set(hold=False)
        await bridge.until(is_delivered)
    assert seen == sorted(seen)
    by_number: dict[int, set[float]] = {}
    for number, percent in seen:
        by_number.setdefault(number, set()).add(percent)
    assert all(len(percents) == 1 for percents in by_number.values()), seen


async def has_nodes(native: NativeServer, number: int) -> bool:
    runs = await native.admin.runs()
    return bool(runs) and len(runs[0].nodes) >= number


# The same key again


async def test_the_same_key_and_body_is_one_job_and_another_body_a_conflict(
    bridge: BridgePlatform, native: NativeServer
) -> None:
    body, key = bridge.job_body(), unique("key")
    first, again = await asyncio.gather(*(bridge.post("/jobs", body, key=key) for _ in range(2)))
    assert (first.status_code, first.json()) == (again.status_code, again.json()) == (202, first.json())
    other = await bridge.post("/jobs", body | {"prompt": "another"}, key=key)
    assert (other.status_code, other.json()["detail"]["message"]) == (409, "idempotency_conflict")
    async with bridge.gpu(native):
        await bridge.ended(first.json()["job_id"])
        late = await bridge.post("/jobs", body, key=key)
    assert (late.status_code, late.json()) == (202, first.json())
    assert len(await native.admin.runs()) == 1


# Refusals before anything is queued


@pytest.mark.parametrize(
    ("fields", "status", "message", "named"),
    [
        ({"template_id": "unknown"}, 404, "template_not_found", ""),
        ({"template_id": "lora-train"}, 404, "template_not_found", ""),
        ({"extras": {"hires_fix": True}}, 422, "payload_invalid", "extras.hires_fix: template 'test-pattern'"),
        ({"resolution": "8k"}, 422, "payload_invalid", "resolution"),
        ({"prompt": None}, 422, "payload_invalid", "prompt"),
        ({"tenant_id": "tenant/demo"}, 422, "payload_invalid", "tenant_id"),
        ({"user_id": "user-other"}, 403, "authorization_missing", ""),
        ({"callback_url": "http://169.254.169.254/latest"}, 422, "payload_invalid", "callback_url"),
        ({"template_id": "upscale"}, 422, "payload_invalid", "controls"),
        (
            {"template_id": "upscale", "controls": [{"image_url": "https://10.0.0.1/a.png"}]},
            422,
            "payload_invalid",
            "controls.0.image_url: is on a host that is not allowed",
        ),
        (
            {"template_id": "upscale", "controls": [{"image_url": "file:///etc/passwd"}]},
            422,
            "payload_invalid",
            "controls.0.image_url: is not below",
        ),
    ],
)
async def test_an_invalid_job_is_refused_with_the_field(
    bridge: BridgePlatform, fields: dict[str, Any], status: int, message: str, named: str
) -> None:
    answer = await bridge.post("/jobs", bridge.job_body(**fields))
    assert answer.status_code == status, answer.text
    detail = answer.json()["detail"]
    assert detail["message"] == message
    assert named in "; ".join(detail.get("fields", []))


@pytest.mark.parametrize("path", ["/jobs", "/training"])
@pytest.mark.parametrize(
    "address",
    [
        "{base}/callbacks/comfyui/another-task",
        "{base}/callbacks/comfyui/{task}/",
        "{base}/callbacks/comfyui/{task}?x=1",
        "{base}/callbacks/comfyui/x/../{task}",
        "{base}/callbacks/comfyui/%2e%2e/comfyui/{task}",
        "{base}@evil.test/callbacks/comfyui/{task}",
        "{base}.evil.test/callbacks/comfyui/{task}",
    ],
)
async def test_a_job_calls_back_to_its_own_task_and_to_no_other_address(
    bridge: BridgePlatform, path: str, address: str
) -> None:
    body = bridge.job_body() if path == "/jobs" else training_body(bridge)
    body["callback_url"] = address.format(base=bridge.receiver.url, task=body["task_id"])
    answer = await bridge.post(path, body)
    assert answer.status_code == 422, answer.text
    assert "callback_url: must be" in answer.json()["detail"]["fields"][0]


async def test_a_body_that_claims_to_be_too_large_is_refused_before_it_is_read(bridge: BridgePlatform) -> None:
    async with httpx.AsyncClient(base_url=bridge.url) as http:
        head = {"Content-Length": str(MAX_BODY_BYTES + 1), **bridge.headers("key")}
        assert await answer_to_head(http, "POST", "/comfyui/v1/jobs", head) == 422


async def test_a_strangers_body_is_not_read(bridge: BridgePlatform) -> None:
    async with httpx.AsyncClient(base_url=bridge.url) as http:
        for headers, status in (({}, 401), ({"Authorization": "Bearer x"}, 401), (bridge.headers(scopes=[]), 403)):
            head = {"Content-Length": str(MAX_BODY_BYTES), "X-Idempotency-Key": "key", **headers}
            for path in ("/comfyui/v1/jobs", "/comfyui/v1/training"):
                assert await answer_to_head(http, "POST", path, head) == status


async def test_a_request_without_token_scope_or_key_is_refused(bridge: BridgePlatform) -> None:
    body = bridge.job_body()
    bare = await bridge.http.post(f"{bridge.url}/comfyui/v1/jobs", json=body, headers={"X-Idempotency-Key": "k"})
    assert bare.status_code == 401
    assert (await bridge.post("/jobs", body, scopes=["task.read"])).status_code == 403
    keyless = await bridge.http.post(f"{bridge.url}/comfyui/v1/jobs", json=body, headers=bridge.headers())
    assert "X-Idempotency-Key" in keyless.json()["detail"]["fields"][0]


ODD_BODIES = (
    b"{",
    b"[]",
    b"\xff\xfe",
    b'{"task_id": NaN}',
    b'{"task_id": ' + b"9" * 5_000 + b"}",
    b'{"extras": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    b'{"prompt": "\\ud800", "\\ud800": 1}',
    b'{"task_id": "\\u0000", "callback_url": "\\u0000"}',
)
ODD_PATHS = (
    "/comfyui/v1/jobs/%00",
    "/comfyui/v1/jobs/..%2f..%2fetc",
    "/comfyui/v1/training/%ff%fe",
    f"/comfyui/v1/jobs/job-{'0' * 5_000}",
    "/comfyui/files/%00?expires=1&signature=x",
    "/comfyui/files/%2e%2e/%252e%252e/etc/passwd?expires=99999999999&signature=%00",
    f"/comfyui/files/a?expires={'9' * 5_000}&signature=x",
)


async def test_odd_requests_are_refused_and_none_leaves_a_traceback(
    bridge: BridgePlatform, caplog: pytest.LogCaptureFixture
) -> None:
    answers = [await bridge.http.get(f"{bridge.url}{path}", headers=bridge.headers()) for path in ODD_PATHS]
    for route in ("/jobs", "/training", "/jobs/%00/cancel", f"/training/job-{'0' * 40}/start"):
        for body in ODD_BODIES:
            headers = bridge.headers(unique("key"))
            answers.append(await bridge.http.post(f"{bridge.url}/comfyui/v1{route}", content=body, headers=headers))
    for key in ("x" * 300, "\xe9\x7f"):
        odd = httpx.Headers({**bridge.headers(), "X-Idempotency-Key": key}, encoding="latin-1")
        job = bridge.job_body(prompt=None)
        answers.append(await bridge.http.post(f"{bridge.url}/comfyui/v1/jobs", json=job, headers=odd))
    assert [(answer.request.url, answer.text) for answer in answers if not 400 <= answer.status_code < 500] == []
    assert not [record.getMessage() for record in caplog.records if record.exc_info]


async def test_a_repeat_that_is_refused_after_the_first_was_accepted_gets_the_first_answer(
    bridge: BridgePlatform,
) -> None:
    """Both found the key free; meanwhile the last server that could run it has left."""
    body, key = bridge.job_body(), unique("key")
    accepted: list[Json] = []

    async def refused(_: Call) -> Reply:
        accepted.append((await bridge.post("/jobs", body, key=key)).json())
        raise Refused("job_refused")

    claims = TokenClaims(tenant_id=TENANT, user_id=USER, scopes=[scope.value for scope in Scope])
    call = Call("/comfyui/v1/jobs", body, claims, key)
    runs = Runs(bridge.client, task_queue=bridge.settings.bridge_task_queue)
    assert await Keys(runs).once(call, refused) == Reply(202, accepted[0])
    with pytest.raises(Refused) as conflict:
        await Keys(runs).once(replace(call, body=body | {"prompt": "another"}), refused)
    assert conflict.value.message == "idempotency_conflict"


async def test_a_request_that_its_token_does_not_allow_starts_and_stores_nothing(bridge: BridgePlatform) -> None:
    accepted = await bridge.submit()
    own, unknown = f"/jobs/{accepted['job_id']}/cancel", f"/jobs/job-{'0' * 40}/cancel"
    refusals: list[tuple[str, Json, dict[str, Any], int]] = [
        ("/jobs", bridge.job_body(), {"scopes": ["task.read"]}, 403),
        ("/jobs", bridge.job_body(user_id="user-other"), {}, 403),
        ("/training", training_body(bridge), {"scopes": ["task.read"]}, 403),
        (own, {}, {"scopes": ["task.read"]}, 403),
        (own, {}, {"tenant": "tenant-other", "user": "user-other"}, 404),
        (unknown, {}, {}, 404),
    ]
    for path, body, who, status in refusals:
        key = unique("key")
        answer = await bridge.post(path, body, key=key, **who)
        assert answer.status_code == status, (path, answer.text)
        with pytest.raises(RPCError) as missing:
            await bridge.client.get_workflow_handle(workflow_id(who.get("tenant", TENANT), key)).describe()
        assert missing.value.status is RPCStatusCode.NOT_FOUND, path
    key, body = unique("key"), bridge.job_body()
    assert (await bridge.post("/jobs", body, key=key, scopes=["task.read"])).status_code == 403
    assert (await bridge.post("/jobs", body, key=key)).status_code == 202


async def test_another_tenants_job_is_not_found(bridge: BridgePlatform) -> None:
    accepted = await bridge.submit()
    path = f"/jobs/{accepted['job_id']}"
    stranger = {"tenant": "tenant-other", "user": "user-other"}
    for answer in (await bridge.get(path, **stranger), await bridge.post(f"{path}/cancel", {}, **stranger)):
        assert (answer.status_code, answer.json()["detail"]["message"]) == (404, "job_not_found")
    assert (await bridge.get("/jobs/job-unknown")).status_code == 404
    assert (await bridge.cancel(accepted["job_id"]))["error_details"]["code"] == "cancelled"


# Cancelling


async def test_a_job_that_is_cancelled_in_the_queue_never_reaches_a_server(
    bridge: BridgePlatform, native: NativeServer
) -> None:
    accepted = await bridge.submit()
    cancelled = await bridge.cancel(accepted["job_id"])
    assert cancelled["error_details"]["code"] == "cancelled"
    again = await bridge.cancel(accepted["job_id"])
    assert again == cancelled
    async with bridge.gpu(native):
        other = await bridge.submit()
        await bridge.ended(other["job_id"])
    assert len(await native.admin.submissions()) == 1
    await bridge.until(lambda: has_cancel_callback(bridge, accepted["task_id"]))


async def has_cancel_callback(bridge: BridgePlatform, task_id: str) -> bool:
    return any((body["error_details"] or {}).get("code") == "cancelled" for body in bridge.receiver.genuine(task_id))


async def test_a_cancel_that_arrives_with_the_taken_server_runs_nothing(
    bridge: BridgePlatform, native: NativeServer
) -> None:
    await native.admin.set(hold=True)
    accepted = await bridge.submit()
    await bridge.until(lambda: bridge.is_waiting(accepted))
    await bridge.stop_worker()
    async with bridge.gpu(native) as worker:

        async def is_taken() -> bool:
            return not await bridge.is_waiting(accepted)

        await bridge.until(is_taken)
        workflow = bridge.client.get_workflow_handle(workflow_of(accepted["job_id"]))
        cancelling = asyncio.create_task(workflow.execute_update(CANCEL_UPDATE, id="cancel"))
        await bridge.until(lambda: has_arrived(bridge, accepted, "cancel"))
        await bridge.start_worker()
        await cancelling
        assert (await bridge.job(accepted["job_id"]))["error_details"]["code"] == "cancelled"
        await bridge.until(lambda: is_free(worker))
    assert await native.admin.submissions() == []


async def has_arrived(bridge: BridgePlatform, job: Json, update_id: str) -> bool:
    """Whether the Temporal server has this update, handled or not."""
    execution = WorkflowExecution(workflow_id=workflow_of(job["job_id"]))
    reference = UpdateRef(workflow_execution=execution, update_id=update_id)
    request = PollWorkflowExecutionUpdateRequest(namespace=bridge.client.namespace, update_ref=reference)
    try:
        await bridge.client.workflow_service.poll_workflow_execution_update(request)
    except RPCError as error:
        assert error.status is RPCStatusCode.NOT_FOUND, error
        return False
    return True


async def is_free(worker: GpuWorker) -> bool:
    return not worker.slot.is_held


@pytest.mark.parametrize("jobs_api", ["none", "cancel"])
async def test_cancelling_a_running_job_stops_only_that_one(
    bridge: BridgePlatform, native: NativeServer, jobs_api: str
) -> None:
    await native.admin.set(hold=True, jobs_api=jobs_api)
    async with bridge.gpu(native):
        accepted = await bridge.submit()
        await bridge.in_status(accepted["job_id"], "processing")
        await bridge.until(lambda: has_runs(native, 1))
        # Another client uses the server directly. Its prompt must not be touched.
        await bridge.http.post(
            f"{native.url}/prompt",
            json={
                "prompt": {
                    "1": {
                        "class_type": "EmptyImage",
                        "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 1},
                    },
                    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "theirs"}},
                },
                "prompt_id": "00000000-0000-4000-8000-000000000001",
            },
        )
        state = await bridge.cancel(accepted["job_id"])
        assert state["error_details"]["code"] == "cancelled"
        await bridge.until(lambda: has_outcome(native, 0, "interrupted"))
        await native.admin.set(hold=False)
        await bridge.until(lambda: has_outcome(native, 1, "success"))
    assert (await bridge.job(accepted["job_id"]))["result_urls"] == []


async def has_runs(native: NativeServer, number: int) -> bool:
    return len(await native.admin.runs()) >= number


async def has_outcome(native: NativeServer, number: int, outcome: str) -> bool:
    runs = await native.admin.runs()
    return len(runs) > number and runs[number].outcome == outcome


async def test_a_delivered_job_stays_delivered_when_it_is_cancelled(
    bridge: BridgePlatform, native: NativeServer
) -> None:
    async with bridge.gpu(native):
        accepted = await bridge.submit()
        state = await bridge.ended(accepted["job_id"])
    assert await bridge.cancel(accepted["job_id"]) == state


# Control images


async def test_a_control_image_reaches_the_graph(bridge: BridgePlatform, native: NativeServer) -> None:
    folder = bridge.folder / "images" / TENANT
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(_png())
    control = {"image_url": (folder / "a.png").as_uri(), "strength": 1.0}
    async with bridge.gpu(native):
        accepted = await bridge.submit(template_id="upscale", controls=[control])
        state = await bridge.ended(accepted["job_id"])
    assert state["error_details"] is None, state
    paths = [request.path for request in await native.admin.requests()]
    assert any(path.endswith("/upload/image") for path in paths)
    await bridge.until(lambda: _is_cleared(bridge))


async def _is_cleared(bridge: BridgePlatform) -> bool:
    return not await asyncio.to_thread(lambda: list((bridge.folder / "objects" / "controls").glob("*/*")))


async def test_a_control_image_of_another_type_fails_the_job(bridge: BridgePlatform, native: NativeServer) -> None:
    folder = bridge.folder / "images" / TENANT
    folder.mkdir(parents=True)
    (folder / "a.png").write_text("<html>")
    accepted = await bridge.submit(
        template_id="upscale", controls=[{"image_url": (folder / "a.png").as_uri(), "strength": 1.0}]
    )
    state = await bridge.ended(accepted["job_id"])
    assert state["error_details"]["code"] == "workflow_invalid"
    assert "not a PNG, JPEG, GIF or WebP" in state["error_details"]["message"]


def _png() -> bytes:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 10, 10)).save(buffer, "PNG")
    return buffer.getvalue()
