"""The gateway logs each request and callback by route, task and outcome, and never an address, a token or a prompt."""

from __future__ import annotations

from typing import Any

from structlog.testing import capture_logs

from tests.gateway.conftest import DEMO_TOKEN, Api
from tests.gateway.test_tasks_api import image
from tests.waiting import until


async def test_a_request_is_one_line_without_its_address(api: Api) -> None:
    with capture_logs() as lines:
        started = (await api.call("POST", "/images", image(prompt="a prompt that no log may show"))).json()
        await api.call("GET", f"/{started['task_id']}?unknown=secret-in-the-address")
        await api.http.get("/healthz")
        await api.http.post("/callbacks/comfyui/nobody", content=b"{}")
        await api.http.get("/nowhere/secret-in-the-address")

        async def logged() -> dict[tuple[str, str, int], dict[str, Any]] | None:
            # The simulators' own requests, and those for health, are logged at debug.
            infos = [line for line in lines if line["event"] == "request" and line["log_level"] == "info"]
            found = {(line["method"], line["route"], line["status"]): dict(line) for line in infos}
            return found if len(infos) >= 4 else None

        # A client may have its answer before the line is written.
        requests = await until(logged)
    assert set(requests) == {
        ("POST", "/api/v1/tasks/images", 202),
        read := ("GET", "/api/v1/tasks/{task_id}", 200),
        forged := ("POST", "/callbacks/comfyui/{task_id}", 401),
        ("GET", "unknown", 404),
    }
    assert (requests[read]["task_id"], requests[read]["tenant_id"]) == (started["task_id"], "tenant-demo")
    assert (requests[forged]["outcome"], requests[forged]["task_id"]) == ("forged", "nobody")
    assert not any(secret in str(lines) for secret in ("secret-in-the-address", "no log may show", DEMO_TOKEN))
