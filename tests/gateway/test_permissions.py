"""Contract §7 over the whole gateway: every route there is, by every scope and token, for own and others' tasks.

`NEEDS` is written from the contract, not from the code; the routes are the application's own, so that a new one cannot
be forgotten here.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import jwt
import pytest
import pytest_asyncio
from fastapi.routing import iter_route_contexts
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from comfyui_temporal.contracts.permissions import Scope
from comfyui_temporal.contracts.tasks import workflow_id_of
from gateway.access import TOKEN_COOKIE
from gateway.tokens import StreamTokens
from runtime.caller_tokens import Caller
from store import TaskStore
from tests.conftest import unique
from tests.gateway.conftest import Api
from tests.gateway.serving import AUDIENCE, ISSUER, TOKEN_SECRET, token_for
from tests.store.facts import claim_of, end, write_of

TASKS = "/api/v1/tasks"
UPLOADS = "/api/v1/uploads"
Route = tuple[str, str]
NEEDS: dict[Route, str] = {
    ("POST", f"{TASKS}/images"): "comfyui.image.generate",
    ("POST", f"{TASKS}/trainings"): "comfyui.model.train",
    ("POST", f"{TASKS}/{{task_id}}/confirm-price"): "comfyui.model.train",
    ("GET", TASKS): "task.read",
    ("GET", "/api/v1/tenant"): "task.read",
    ("GET", "/api/v1/templates"): "task.read",
    ("GET", "/api/v1/datasets"): "task.read",
    ("GET", f"{TASKS}/{{task_id}}"): "task.read",
    ("GET", f"{TASKS}/{{task_id}}/events"): "task.read",
    ("GET", f"{TASKS}/{{task_id}}/training-log"): "task.read",
    ("GET", f"{TASKS}/stream/sse"): "task.read",
    ("WS", f"{TASKS}/stream/ws"): "task.read",
    ("GET", f"{TASKS}/stream/config"): "task.read",
    ("POST", f"{TASKS}/{{task_id}}/cancel"): "task.cancel",
    ("POST", f"{TASKS}/{{task_id}}/rollback"): "credits.rollback",
    ("POST", UPLOADS): "comfyui.image.generate",
    ("GET", f"{UPLOADS}/{{upload_id}}"): "comfyui.image.generate",
    ("PATCH", f"{UPLOADS}/{{upload_id}}"): "comfyui.image.generate",
    ("DELETE", f"{UPLOADS}/{{upload_id}}"): "comfyui.image.generate",
}
STREAMS: set[Route] = {route for route in NEEDS if "/stream/" in route[1]}
NAMES_A_TASK: set[Route] = {route for route in NEEDS if "{task_id}" in route[1] or route[1].endswith(("/sse", "/ws"))}
OPEN: set[Route] = {
    # Their signature is their right.
    ("POST", "/callbacks/comfyui/{task_id}"),
    # No word of any tenant.
    ("OPTIONS", UPLOADS),
    *(("GET", path) for path in ("/healthz", "/readyz", "/metrics", "/openapi.json")),
    # Files, the same for everybody.
    *(("GET", path) for path in ("/", "/page/settings.json", "/page/index.html", "/page/page.css", "/page/icon.svg")),
    *(("GET", f"/page/{name}.js") for name in ("page", "api", "card", "results", "detail", "form")),
    *(("GET", f"/page/{name}.js") for name in ("fields", "loras", "datasets", "json", "loss", "words", "en", "zh")),
}
DATASET = {"dataset_id": "faces", "source_uri": "s3://datasets/unknown/faces/"}
PAST_THE_DOOR = {"input_invalid", "file_unsupported", "protocol_unsupported", "upload_unknown"}
"""Codes of answers that come only once the scope was checked."""
PACE = {"epochs": 1, "batch_size": 1, "learning_rate": 0.001}


def routes_of(api: Api) -> set[Route]:
    found: set[Route] = set()
    for route in iter_route_contexts(api.gateway.app.routes):
        assert route.path is not None
        # Starlette answers HEAD wherever it answers GET.
        found |= {(method, route.path) for method in (route.methods or {"WS"}) - {"HEAD"}}
    return found


def body_of(route: Route) -> dict[str, Any] | None:
    match route:
        case ("POST", path) if path.endswith("/images"):
            return {"template_id": "text-to-image", "prompt": "a lighthouse"}
        case ("POST", path) if path.endswith("/trainings"):
            return {"template_id": "lora-train", "dataset": DATASET, "hyperparameters": PACE}
        case ("POST", path) if path.endswith("/confirm-price"):
            return {"max_credits": 500}
        case ("POST", _):
            return {"reason": "the permissions test"}
    return None


@dataclass
class Answer:
    status: int
    code: str | None = None
    """Of the problem document; None where there is none."""


async def asked(
    api: Api, route: Route, task_id: str, token: str | None, *, as_stream: bool = False, in_address: bool = False
) -> Answer:
    """What the route answers. `as_stream`: a task's history asked for as a stream."""
    method, path = route[0], route[1].format(task_id=task_id, upload_id=task_id)
    query = {"task_id": task_id} if path.endswith(("/sse", "/ws")) else {}
    headers = {"accept": "text/event-stream"} if as_stream else {}
    if token is not None and in_address:
        query["token"] = token
    elif token is not None:
        headers["authorization"] = f"Bearer {token}"
    if method == "WS":
        return await _dialled(f"ws{str(api.http.base_url).removeprefix('http')}{path}", query, headers)
    request = api.http.build_request(method, path, params=query, headers=headers, json=body_of(route))
    response = await api.http.send(request, stream=True)
    try:
        is_problem = response.headers.get("content-type") == "application/problem+json"
        if is_problem:
            await response.aread()
        return Answer(response.status_code, response.json()["code"] if is_problem else None)
    finally:
        await response.aclose()


async def _dialled(address: str, query: dict[str, str], headers: dict[str, str]) -> Answer:
    address += "?" + "&".join(f"{name}={value}" for name, value in query.items())
    try:
        async with connect(address, additional_headers=headers, proxy=None):
            return Answer(101)
    except InvalidStatus as refused:
        assert refused.response.headers["content-type"] == "application/problem+json"
        return Answer(refused.response.status_code)


async def ended_task(store: TaskStore, tenant_id: str) -> str:
    """A task of the tenant that has ended: whatever is done to it changes nothing."""
    task_id = unique("ended")
    await store.claim(claim_of(task_id, tenant_id=tenant_id))
    await store.write(write_of(task_id, end(), status="completed"))
    return task_id


async def state_of(store: TaskStore, task_id: str) -> tuple[object, ...]:
    return (await store.task(task_id), await store.events(task_id))


@dataclass
class Tenants:
    """One who asks, and a stranger with an open task and a real run behind it."""

    own: str
    own_task: str
    strangers_task: str


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def tenants(api: Api) -> AsyncIterator[Tenants]:
    strangers = unique("image")
    await api.platform.simulators.admin.comfyui.fault("job_stall", task_id=strangers, at=0.4)
    await api.platform.start_waiting_image(task_id=strangers)

    async def stands_still() -> bool:
        row = await api.platform.store.task(strangers)
        return row is not None and row.progress == 25.0

    await api.platform.until(stands_still)
    own = unique("tenant")
    yield Tenants(own, await ended_task(api.platform.store, own), strangers)
    handle = api.platform.client.get_workflow_handle(workflow_id_of(strangers))
    await api.platform.cancel(handle)
    await handle.result()


def test_every_route_has_its_line_here_and_every_line_its_route(api: Api) -> None:
    assert routes_of(api) == set(NEEDS) | OPEN
    assert set(NEEDS.values()) == {scope.value for scope in Scope}


@pytest.mark.parametrize("route", NEEDS, ids=" ".join)
async def test_a_route_accepts_its_own_scope_only(api: Api, tenants: Tenants, route: Route) -> None:
    needed = NEEDS[route]
    others = [scope.value for scope in Scope if scope.value != needed]
    refused = [[], *([scope] for scope in others), others, [needed.upper(), f"{needed} ", "*", f"{needed}.more"]]
    for scopes in refused:
        answer = await asked(api, route, tenants.own_task, token_for(tenants.own, scopes=scopes))
        assert answer.status == 403, f"{route} with {scopes}"
        assert answer.code in (None, "not_authorized")
    answer = await asked(api, route, tenants.own_task, token_for(tenants.own, scopes=[needed]))
    assert answer.status in (101, 200, 202) or answer.code in PAST_THE_DOOR


@pytest.mark.parametrize("route", sorted(NAMES_A_TASK), ids=" ".join)
async def test_another_tenants_task_is_answered_like_an_unknown_one(api: Api, tenants: Tenants, route: Route) -> None:
    store = api.platform.store
    before = await state_of(store, tenants.strangers_task)
    token = token_for(tenants.own)
    as_stream = route[1].endswith("/events")
    for task_id, streamed in itertools.product((tenants.strangers_task, unique("unknown")), {False, as_stream}):
        answer = await asked(api, route, task_id, token, as_stream=streamed)
        assert answer.status == 404
        assert answer.code in (None, "task_unknown")
    assert await state_of(store, tenants.strangers_task) == before


def _badly_signed(algorithm: str, secret: str) -> str:
    claims = {"iss": ISSUER, "aud": AUDIENCE, "exp": int(time.time()) + 300, "tenant_id": "tenant-demo"}
    claims |= {"user_id": "user-demo", "scopes": [scope.value for scope in Scope]}
    return jwt.encode(claims, secret, algorithm=algorithm)


NO_ENTRY: dict[str, str | None] = {
    "no token": None,
    "an expired one": token_for("tenant-demo", valid_seconds=-60),
    "signed with HS384": _badly_signed("HS384", TOKEN_SECRET),
    "signed with HS512": _badly_signed("HS512", TOKEN_SECRET),
    "unsigned": _badly_signed("none", ""),
    "of another secret": token_for("tenant-demo", secret="another secret, also longer than 32 bytes"),
    "of another issuer": token_for("tenant-demo", iss="another"),
    "for another audience": token_for("tenant-demo", aud="something"),
    "nonsense": "nonsense",
}


@pytest.mark.parametrize("route", NEEDS, ids=" ".join)
async def test_every_route_refuses_a_bad_token(api: Api, tenants: Tenants, route: Route) -> None:
    for name, token in NO_ENTRY.items():
        for in_address in {False, token is not None}:
            answer = await asked(api, route, tenants.strangers_task, token, in_address=in_address)
            assert answer.status == 401, f"{route}, {name}"
            assert answer.code in (None, "unauthenticated")


@pytest.mark.parametrize("route", NEEDS, ids=" ".join)
async def test_a_stream_token_opens_streams_alone_and_no_other_token_may_be_in_an_address(
    api: Api, tenants: Tenants, route: Route
) -> None:
    is_stream = route in STREAMS
    opened = 101 if route[0] == "WS" else 200
    in_address = await asked(api, route, tenants.own_task, token_for(tenants.own), in_address=True)
    assert in_address.status == 401
    caller = Caller(tenant_id=tenants.own, user_id="user", scopes=[*Scope], expires_at=time.time() + 60)
    token = StreamTokens(TOKEN_SECRET).made_for(caller)
    with_stream_token = await asked(api, route, tenants.own_task, token)
    assert with_stream_token.status == (opened if is_stream else 403)
    in_address = await asked(api, route, tenants.own_task, token, in_address=True)
    assert in_address.status == (opened if is_stream else 401)


async def test_a_tasks_live_stream_is_opened_by_address_or_cookie_and_its_history_is_not(
    api: Api, tenants: Tenants
) -> None:
    path = f"{TASKS}/{tenants.own_task}/events"
    token = token_for(tenants.own)
    caller = Caller(tenant_id=tenants.own, user_id="user", scopes=[*Scope], expires_at=time.time() + 60)
    stream_token = StreamTokens(TOKEN_SECRET).made_for(caller)
    for headers, status in (({}, 401), ({"accept": "text/event-stream"}, 200)):
        assert (await api.http.get(f"{path}?token={stream_token}", headers=headers)).status_code == status
        with_cookie = headers | {"cookie": f"{TOKEN_COOKIE}={token}"}
        assert (await api.http.get(path, headers=with_cookie)).status_code == status


async def test_open_routes_ask_for_no_token_and_callbacks_for_a_signature(api: Api, tenants: Tenants) -> None:
    for method, path in sorted(OPEN):
        answer = await api.http.request(method, path.format(task_id=tenants.strangers_task), json={})
        assert answer.status_code in ((401,) if path.startswith("/callbacks/") else (200, 204)), path
        assert tenants.strangers_task not in answer.text
        assert "tenant-demo" not in answer.text.replace("s3://datasets/tenant-demo/", "")


@pytest.mark.parametrize("path", [f"{TASKS}/images", f"{TASKS}/trainings"])
@pytest.mark.parametrize("field", ["tenant_id", "user_id"])
async def test_nothing_is_started_for_another_tenant_or_user(api: Api, tenants: Tenants, path: str, field: str) -> None:
    task_id = unique("foreign")
    body = {**(body_of(("POST", path)) or {}), "task_id": task_id, field: f"{field.removesuffix('_id')}-demo"}
    headers = {"authorization": f"Bearer {token_for(tenants.own, 'another')}"}
    answer = await api.http.post(path, json=body, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (403, "not_authorized")
    assert await api.platform.store.claimed_input(task_id) is None


async def test_no_route_changes_another_tenants_task(api: Api, tenants: Tenants) -> None:
    """Another tenant calls every route that changes something, with every scope: the run's history does not grow."""
    changes = [route for route in NEEDS if route[0] == "POST" and route in NAMES_A_TASK]
    handle = api.platform.client.get_workflow_handle(workflow_id_of(tenants.strangers_task))
    length = (await handle.describe()).history_length
    await asyncio.gather(*(asked(api, route, tenants.strangers_task, token_for(tenants.own)) for route in changes))
    described = await handle.describe()
    assert (described.status, described.history_length) == (type(described.status).RUNNING, length)  # type: ignore[union-attr]
