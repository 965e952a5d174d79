"""The whole local stack before real servers: tasks go through gateway, worker, bridge and GPU workers, with credits."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from comfyui_temporal import HttpTasks, ImageTask
from comfyui_temporal.client.models import TaskOutcome
from comfyui_temporal.contracts.stack import StackDescription
from comfyui_temporal.contracts.tasks import TaskStatus
from local_stack.background import end_stack
from local_stack.commands import authorise, up
from tests.conftest import unique
from tests.local_stack.folders import new_run_folder

Json = dict[str, Any]
TENANT, USER = "tenant-demo", "user-demo"
LIMIT_SECONDS = 400.0


@dataclass(frozen=True)
class WholeStack:
    """One stack and its first tenant."""

    description: StackDescription
    tasks: HttpTasks
    http: httpx.AsyncClient

    async def start(self, template_id: str, **fields: Any) -> str:
        """Start an image task; its id."""
        task = ImageTask(
            task_id=unique("image"),
            tenant_id=TENANT,
            user_id=USER,
            template_id=template_id,
            prompt="a lighthouse at dusk",
            **fields,
        )
        return (await self.tasks.start(task)).task_id

    async def completed(self, task_id: str) -> TaskOutcome:
        """Wait for the task's end, which must be a delivery in its first attempt."""
        outcome = await asyncio.wait_for(self.tasks.wait(task_id), LIMIT_SECONDS)
        assert outcome.status is TaskStatus.COMPLETED, outcome
        assert outcome.result is not None and outcome.result.attempts == 1
        return outcome

    async def ledger(self, task_id: str) -> list[tuple[str, int]]:
        """(kind, change) of each entry about the task, oldest first."""
        query = {"tenant_id": TENANT, "user_id": USER, "task_id": task_id}
        headers = {"Authorization": f"Bearer {self.description.service_tokens[TENANT]}"}
        url = f"{self.description.credits_url}/api/v1/credits/ledger"
        answer = await self.http.get(url, params=query, headers=headers)
        assert answer.status_code == 200, answer.text
        entries = sorted(answer.json()["entries"], key=lambda entry: str(entry["created_at"]))
        return [(entry["kind"], entry["change"]) for entry in entries]

    async def servers_of(self, template_id: str) -> Json:
        """How many servers there are for a template, as the bridge says: `total`, `fit`, `well`."""
        headers = {"Authorization": f"Bearer {self.description.service_tokens[TENANT]}"}
        answer = await self.http.get(f"{self.description.comfyui_url}/comfyui/v1/templates", headers=headers)
        assert answer.status_code == 200, answer.text
        listed = answer.json()
        [row] = [row for row in listed if row["template_id"] == template_id]
        servers: Json = row["servers"]
        return servers


@asynccontextmanager
async def whole_stack(
    folder: Path, servers: Sequence[str], template_ids: Sequence[str], extras: Mapping[str, int]
) -> AsyncIterator[WholeStack]:
    """A stack with the templates below `folder / "templates"`. `extras`: prices in points."""
    run_folder = new_run_folder(folder / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMFYUI_TEMPORAL_BRIDGE_TEMPLATES", str(folder / "templates"))
        patch.setenv("COMFYUI_TEMPORAL_PRICES", json.dumps({"extras": extras}))
        assert await asyncio.to_thread(up, run_folder, None, servers) == 0
    try:
        description = run_folder.description()
        assert description is not None
        assert await asyncio.to_thread(authorise, run_folder, template_ids) == 0
        async with (
            httpx.AsyncClient(timeout=30) as http,
            HttpTasks(description.gateway_url, description.tokens[TENANT]) as tasks,
        ):
            yield WholeStack(description, tasks, http)
    finally:
        await asyncio.to_thread(end_stack, run_folder)
