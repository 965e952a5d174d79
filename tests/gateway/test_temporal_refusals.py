"""A namespace whose limits are reached: `python -m gateway` shows what Temporal refuses."""

from __future__ import annotations

import asyncio

import httpx
from temporalio.common import SearchAttributeKey
from temporalio.testing import WorkflowEnvironment

from comfyui_temporal.contracts.tasks import SEARCH_ATTRIBUTES
from local_stack.temporal_server import dynamic_config_flags
from tests.conftest import NewDatabase, temporal_binary, unique
from tests.gateway.serving import bearer, gateway_process, token_for
from tests.metrics_page import value_in

LIMITS = {"frontend.namespaceRPS": 2, "frontend.namespaceBurstRatio": 1.0}
STARTS = 30
IMAGE = {"template_id": "text-to-image", "prompt": "a lighthouse"}


async def test_starts_that_temporal_refuses_are_counted(new_database: NewDatabase) -> None:
    async with await WorkflowEnvironment.start_local(
        search_attributes=[SearchAttributeKey.for_keyword(name) for name in SEARCH_ATTRIBUTES],
        dev_server_existing_path=temporal_binary(),
        dev_server_extra_args=["--log-level", "never", *dynamic_config_flags(LIMITS)],
    ) as limited:
        environment = {
            "DATABASE_DSN": await new_database(),
            "TEMPORAL_ADDRESS": limited.client.service_client.config.target_host,
            "TASK_QUEUE": unique("nobody"),
        }
        async with gateway_process(environment) as gateway:
            address = f"http://127.0.0.1:{gateway.port}"
            headers = bearer(token_for(unique("tenant")))
            async with httpx.AsyncClient(base_url=address, headers=headers, trust_env=False, timeout=20) as http:

                async def refused() -> float | None:
                    page = (await http.get("/metrics")).text
                    return value_in(page, "gateway_temporal_refused_total", operation="StartWorkflowExecution")

                before = await refused()
                answers = await asyncio.gather(
                    *(
                        http.post("/api/v1/tasks/images", json={**IMAGE, "task_id": unique("image")})
                        for _ in range(STARTS)
                    )
                )
                after = await refused()
    failed = [answer for answer in answers if answer.status_code == 503]
    assert {answer.status_code for answer in answers} <= {202, 503} and failed
    assert {answer.json()["code"] for answer in failed} == {"temporal_unavailable"}
    assert before == 0
    assert after is not None and after > 0, "the series of the alert TemporalRequestsThrottled"
