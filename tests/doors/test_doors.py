"""Contract §7 over a whole system: what each token of ours opens, and that none of it is written down anywhere."""

from __future__ import annotations

import base64
import contextlib
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final, cast
from unittest.mock import Mock

import httpx
import psutil
import pytest
import pytest_asyncio
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts

from bridge.api import Edge, bridge_app
from comfyui_temporal.contracts.prices import PriceTable
from proof.simulators.comfyui_app import comfyui_app
from proof.simulators.credits_app import credits_app
from proof.simulators.serving import TEST_CALLBACK_SECRET
from proof.simulators.tokens import Tokens
from tests.conftest import unique
from tests.doors.doors import ADMIN_ROUTES, DOORS, OPEN_ROUTES, SERVICE_ROUTES, SIGNED_ROUTES, TENANT, Route
from tests.doors.whole_stack import MARK, WholeStack, running_whole_stack, until

ANY_TOKEN: Final = re.compile(rb"eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{20,}")
ANY_SIGNATURE: Final = re.compile(rb"v1,[A-Za-z0-9+/]{43}=")
OWNERS_FILES: Final = {"secrets.json", "stack.json"}
"""Mode 0600: where the stack's secrets and tokens are meant to be."""
pytestmark = pytest.mark.timeout(240)


@pytest_asyncio.fixture(scope="module")
async def whole(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[WholeStack]:
    """A stack on which one task of each kind and a job at the bridge were done, and every door was tried."""
    async with running_whole_stack(tmp_path_factory.mktemp("doors") / "run") as whole:
        await whole.try_every_token_at_every_door()
        image = {"task_id": unique("image"), "template_id": "text-to-image", "prompt": "a lighthouse"}
        assert (await whole.task("images", image))["status"] == "completed"
        dataset = whole.folder.path / "datasets" / TENANT / "cats"
        dataset.mkdir(parents=True)
        (dataset / "cat.txt").write_text("a cat")
        training = {
            **{"task_id": unique("training"), "template_id": "lora-train", "max_credits": 500},
            "dataset": {"dataset_id": "cats", "source_uri": dataset.as_uri() + "/"},
            "hyperparameters": {"epochs": 1, "batch_size": 1, "learning_rate": 0.001},
        }
        assert (await whole.task("trainings", training))["status"] == "completed"
        yield whole


def routes_of(app: FastAPI) -> set[Route]:
    return {
        (method, str(route.path)) for route in iter_route_contexts(app.routes) for method in (route.methods or set())
    } - {("HEAD", "/openapi.json")}


def test_every_route_of_a_service_is_a_door_here(tmp_path: Path) -> None:
    nothing = cast("Any", None)
    given = {"folder": tmp_path, "tokens": Tokens("", "", ""), "admin_token": "", "prices": PriceTable(), "speed": 1.0}
    apps = {
        "bridge": bridge_app(Edge(nothing, nothing), Mock(), Mock(), nothing, nothing),
        "comfyui": comfyui_app(**given, callback_secrets=[TEST_CALLBACK_SECRET]),  # type: ignore[arg-type]
        "credits": credits_app(**given),  # type: ignore[arg-type]
    }
    tables = (SERVICE_ROUTES, ADMIN_ROUTES, SIGNED_ROUTES, OPEN_ROUTES)
    for party, app in apps.items():
        documents = {("GET", path) for path in ("/docs", "/docs/oauth2-redirect", "/redoc")}
        listed = {route for table in tables for route in table.get(party, ())}
        assert routes_of(app) - {("HEAD", path) for _, path in documents} - documents == listed, party


@pytest.mark.parametrize("door", DOORS)
def test_a_door_opens_for_its_own_tokens_and_for_no_other(whole: WholeStack, door: str) -> None:
    here = DOORS[door]
    statuses = {(name, place): answer.status for (of, name, place), answer in whole.answers.items() if of == door}
    assert {name for name, place in statuses if place == "header"} == set(whole.tokens)
    wrong = {
        (name, place): status
        for (name, place), status in statuses.items()
        if here.opens_for(whole.tokens[name], place) == here.is_closed_by(status) or status >= 500
    }
    assert wrong == {}


async def test_a_callers_token_orders_nothing_and_gives_back_nothing_past_the_gateway(whole: WholeStack) -> None:
    """Seen: an accelerated 4k job without a ledger entry, and a caller that cancelled its own hold."""
    caller, service = whole.stack.tokens[TENANT], whole.stack.service_tokens[TENANT]
    assert (await whole.job(caller)).status_code == 401
    hold = {
        **{"task_id": unique("task"), "tenant_id": TENANT, "user_id": "user-demo", "scene": "image.generate"},
        **{"template_id": "text-to-image", "estimated_cost": 5, "expire_in": 300},
    }
    url = f"{whole.stack.credits_url}/api/v1/credits"

    async def asked(act: str, body: dict[str, Any], token: str) -> httpx.Response:
        headers = {"authorization": f"Bearer {token}", "x-idempotency-key": unique("key")}
        return await whole.http.post(f"{url}/{act}", json=body, headers=headers)

    assert (await asked("pre-deduct", hold, caller)).status_code == 401
    held = (await asked("pre-deduct", hold, service)).json()["pre_deduct_id"]
    back = {"pre_deduct_id": held, "tenant_id": TENANT, "user_id": "user-demo", "reason": "mine"}
    assert (await asked("cancel", back, caller)).status_code == 401
    assert (await asked("cancel", back, service)).status_code == 200


async def test_a_callback_is_opened_by_the_callback_secret_and_by_no_other(whole: WholeStack) -> None:
    secrets = whole.secrets.model_dump()
    for name, secret in {**secrets, "another": "of nobody, and just as long as it must be"}.items():
        is_right = name == "callback_secret"
        key = secret if is_right else "whsec_" + base64.b64encode(secret.encode()).decode()
        raw = b'{"task_id": "404", "job_id": "j", "job_status": "processing", "stage_progress": 1, "sequence": 1}'
        answer = await whole.http.post(
            f"{whole.stack.gateway_url}/callbacks/comfyui/404", content=raw, headers=whole.signed(raw, key)
        )
        # Signed well, the task is merely unknown.
        assert answer.status_code == (404 if is_right else 401), name


async def test_a_token_or_secret_is_written_nowhere(whole: WholeStack) -> None:
    """Logs at DEBUG, answers, metrics, process lists, Temporal's history, and every file of the stack."""
    await _more_is_said(whole)
    logs = {path.name: path.read_bytes() for path in sorted((whole.folder.path / "logs").iterdir())}
    assert {"gateway.log", "worker.log", "comfyui.log", "credits.log", "bridge.log", "gpu-1.log"} <= set(logs)
    assert b"token=[hidden]" in logs["gateway.log"], "what the WebSocket library writes of an address is in the logs"
    answers = {
        f"{door} with {name} in the {place}": f"{answer.head}\n{answer.body}".encode()
        for (door, name, place), answer in whole.answers.items()
        # It makes a token for whoever may have one.
        if not (door.endswith("/stream/config") and answer.status == 200)
    }
    processes = _command_lines()
    assert {f"process {pid}" for pid in whole.stack.pids.values()} <= set(processes)
    metrics = {"the worker's metrics": (await whole.http.get(whole.metrics_url)).content}
    histories = await _histories(whole)
    assert len(histories) >= 3
    files = {
        str(path.relative_to(whole.folder.path)): path.read_bytes()
        for path in whole.folder.path.rglob("*")
        if path.is_file() and path.name not in OWNERS_FILES
    }
    assert any(name.startswith("postgres/") for name in files) and "temporal.db" in files
    written = {**logs, **answers, **processes, **metrics, **histories, **files}
    signed = [(token.text or "").rpartition(".")[2].encode() for token in whole.tokens.values()]
    needles = [MARK.encode(), *(part for part in signed if len(part) > 20), *(s.encode() for s in whole.signatures)]
    assert {name for name, text in written.items() if any(needle in text for needle in needles)} == set()
    # The worker's own tokens, and ComfyUI's signatures, are not known here: they are known by their looks.
    said = {**logs, **processes, **metrics, **histories}
    assert {name for name, text in said.items() if ANY_TOKEN.search(text) or ANY_SIGNATURE.search(text)} == set()


async def _more_is_said(whole: WholeStack) -> None:
    """A job through the bridge; and a token where an id should be."""
    service = whole.stack.service_tokens[TENANT]
    job_id = (await whole.job(service)).json()["job_id"]
    headers = {"authorization": f"Bearer {service}"}

    async def is_delivered() -> bool:
        state = (await whole.http.get(f"{whole.bridge_url}/comfyui/v1/jobs/{job_id}", headers=headers)).json()
        assert state["error_details"] is None, state
        return bool(state["job_status"] == "delivery")

    await until(is_delivered)
    for token in (whole.stack.tokens[TENANT], service):
        for url in (
            f"{whole.stack.gateway_url}/api/v1/tasks/{token}",
            f"{whole.stack.gateway_url}/api/v1/tasks?cursor={token}&status={token}",
            f"{whole.stack.gateway_url}/{token}",
            f"{whole.stack.comfyui_url}/comfyui/v1/jobs/{token}",
            f"{whole.bridge_url}/comfyui/v1/jobs/{token}",
        ):
            answer = await whole.http.get(url, headers={"authorization": f"Bearer {token}"})
            assert answer.status_code in (401, 404, 422), url
            assert token not in answer.text, url
        raw = b"{}"
        forged = {**whole.signed(raw, whole.secrets.callback_secret), "webhook-id": token}
        await whole.http.post(f"{whole.stack.gateway_url}/callbacks/comfyui/{token}", content=raw, headers=forged)


def _command_lines() -> dict[str, bytes]:
    """Of every process that was started from here, and of those that these started."""
    found = {}
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            found[f"process {child.pid}"] = " ".join(child.cmdline()).encode()
    return found


async def _histories(whole: WholeStack) -> dict[str, bytes]:
    histories = {}
    async for run in whole.client.list_workflows():
        handle = whole.client.get_workflow_handle(run.id, run_id=run.run_id)
        events = [event.SerializeToString() async for event in handle.fetch_history_events()]
        histories[f"history of {run.id}"] = b"\n".join([run.raw_info.SerializeToString(), *events])
    return histories
