"""The OpenAPI document against the running gateway: no 5xx, and every answer as the document says."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.gateway.conftest import Api
from tests.gateway.serving import token_for

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "tests" / "gateway" / "schemathesis.toml"


async def schemathesis(url: str, secret: str, *options: str, config: Path = CONFIG) -> tuple[int, str]:
    """Its exit code and its report. A process of its own: it asks as any client does. `secret`: of callbacks."""
    process = await asyncio.create_subprocess_exec(
        *(Path(sys.executable).parent / "st", "--config-file", config),
        *("run", f"{url}/openapi.json", "--no-color", *options),
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "GATEWAY_TOKEN": token_for("tenant-demo", "user-demo", valid_seconds=1_200),
            "GATEWAY_CALLBACK_SECRET": secret,
        },
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    report, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, report.decode()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def tasks(api: Api) -> AsyncIterator[None]:
    """The tasks that schemathesis.toml names: one that runs, one that has ended, one that waits for its price."""
    await api.platform.simulators.admin.comfyui.fault("job_stall", task_id="openapi-open-image")
    await api.platform.start_waiting_image(task_id="openapi-open-image")
    await (await api.platform.start_image(task_id="openapi-ended-image")).result()
    training = await api.platform.start_training(task_id="openapi-waiting-training", max_credits=None)

    async def asks() -> bool:
        return (await api.platform.progress(training))["confirmation"] is not None

    await api.platform.until(asks)
    yield
    for task_id in ("openapi-open-image", "openapi-waiting-training"):
        await api.call("POST", f"/{task_id}/cancel")
        await api.ended(task_id)


@pytest.mark.usefixtures("tasks")
async def test_every_answer_is_as_documented(api: Api) -> None:
    code, report = await schemathesis(str(api.http.base_url), api.gateway.secret, "--max-examples", "2")
    assert code == 0, report


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.usefixtures("tasks")
async def test_every_answer_is_as_documented_in_a_longer_run(api: Api) -> None:
    code, report = await schemathesis(str(api.http.base_url), api.gateway.secret, "--max-examples", "100")
    assert code == 0, report
