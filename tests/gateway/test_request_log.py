"""The gateway logs each request and callback by route, task and outcome, and never an address, a token or a prompt."""

from __future__ import annotations

from typing import Any

from structlog.testing import capture_logs

from tests.gateway.conftest import DEMO_TOKEN, Api
from tests.gateway.test_tasks_api import image


async def test_a_request_is_one_line_without_its_address(api: Api) -> None:
    with capture_logs() as lines:
        started = (await api.call("POST", "/images", image(prompt="a prompt that no log may show"))).json()
        await api.call("GET", f"/{started['task_id']}?unknown=secret-in-the-address")
        await api.http.get("/healthz")
        await api.http.post("/callbacks/comfyui/nobody", content=b"{}")
        await api.http.get("/nowhere/secret-in-the-address")
    # The simulators' own requests, and those for health, are logged at debug.
    infos = [line for line in lines if line["event"] == "request" and line["log_level"] == "info"]
    requests: list[dict[str, Any]] = [dict(line) for line in infos]
    assert [(line["method"], line["route"], line["status"]) for line in requests] == [
        ("POST", "/api/v1/tasks/images", 202),
        ("GET", "/api/v1/tasks/{task_id}", 200),
        ("POST", "/callbacks/comfyui/{task_id}", 401),
        ("GET", "unknown", 404),
    ]
    assert (requests[1]["task_id"], requests[1]["tenant_id"]) == (started["task_id"], "tenant-demo")
    [callback] = [line for line in requests if line.get("outcome")]
    assert (callback["outcome"], callback["task_id"]) == ("forged", "nobody")
    assert not any(secret in str(lines) for secret in ("secret-in-the-address", "no log may show", DEMO_TOKEN))
