"""Headers of the gateway's answers, and what is served on a port of its own."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import httpx
import pytest
from temporalio.testing import WorkflowEnvironment

from gateway.page import FILES
from tests.gateway.conftest import Api
from tests.gateway.serving import bearer, gateway_process, token_for
from tests.gateway.test_permissions import NEEDS, OPEN, routes_of
from tests.waiting import until

PAGE = Path(__file__).parents[2] / "gateway" / "page"
OPERATIONS = ("/metrics", "/openapi.json")


async def test_every_answer_forbids_caching_and_guessing(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    assert routes_of(api) == set(NEEDS) | OPEN
    token = bearer(token_for())
    paths = [
        path.format(task_id="none", upload_id="none") for method, path in NEEDS | dict.fromkeys(OPEN) if method == "GET"
    ]
    for path in [*paths, "/nothing", "/api/v1/tasks/none/cancel"]:
        for headers in ({}, token):
            answer = await api.http.get(path, headers=headers)
            assert answer.headers["x-content-type-options"] == "nosniff", path
            is_file = path == "/" or path.removeprefix("/page/") in FILES
            assert answer.headers["cache-control"] == ("no-cache" if is_file else "no-store"), path

    def fails(*_: object) -> None:
        raise LookupError

    monkeypatch.setattr(api.platform.store, "tasks", fails)
    answer = await api.http.get("/api/v1/tasks", headers=token)
    assert answer.status_code == 500
    assert (answer.headers["cache-control"], answer.headers["x-content-type-options"]) == ("no-store", "nosniff")


async def test_the_page_runs_its_own_scripts_only(api: Api) -> None:
    policy = (await api.http.get("/")).headers["content-security-policy"]
    directives = dict(directive.strip().split(" ", 1) for directive in policy.split(";"))
    assert directives["default-src"] == "'none'"
    assert directives["script-src"] == directives["style-src"] == directives["connect-src"] == "'self'"
    assert directives["base-uri"] == directives["form-action"] == directives["frame-ancestors"] == "'none'"
    assert "unsafe" not in policy
    html = (PAGE / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)|\son\w+=|\sstyle=|javascript:", html)


async def test_metrics_and_documents_can_have_a_port_of_their_own(
    temporal_env: WorkflowEnvironment, postgres_dsn: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    settings = {
        "TEMPORAL_ADDRESS": temporal_env.client.service_client.config.target_host,
        "DATABASE_DSN": postgres_dsn,
        "GATEWAY_OPERATIONS_PORT": str(port),
    }
    async with gateway_process(settings) as process, httpx.AsyncClient() as http:

        async def is_up() -> bool:
            try:
                return (await http.get(f"http://127.0.0.1:{port}/readyz")).is_success
            except httpx.TransportError:
                return False

        await until(is_up)
        for path in OPERATIONS:
            assert (await http.get(f"http://127.0.0.1:{process.port}{path}")).status_code == 404
            assert (await http.get(f"http://127.0.0.1:{port}{path}")).status_code == 200
        document = (await http.get(f"http://127.0.0.1:{port}/openapi.json")).json()
        assert "/api/v1/tasks/images" in document["paths"]
        assert (await http.get(f"http://127.0.0.1:{process.port}/healthz")).status_code == 200
        assert (await http.get(f"http://127.0.0.1:{port}/api/v1/tasks")).status_code == 404
