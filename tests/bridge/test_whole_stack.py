"""`make demo COMFYUI=…` and `make up COMFYUI=…`: whole tasks through the bridge, credits included."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from temporalio.client import Client

from comfyui_temporal.contracts.stack import StackDescription
from comfyui_temporal.contracts.tasks import IMAGE_WORKFLOW, workflow_id_of
from comfyui_temporal.plugin import TasksPlugin
from local_stack.background import end_stack
from local_stack.commands import up
from local_stack.folder import PROJECT
from tests.bridge.native import NativeServer
from tests.bridge.test_servers import until_running
from tests.conftest import unique
from tests.local_stack.folders import new_run_folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


async def test_the_demo_delivers_a_picture_from_your_own_server(native: NativeServer, tmp_path: Path) -> None:
    folder = new_run_folder(tmp_path / "run")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "local_stack", "demo", "--folder", str(folder.path), "--comfyui", native.url),
        cwd=PROJECT,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
    )
    output = (await process.communicate())[0].decode()
    assert process.returncode == 0, output
    assert "completed" in output
    assert "points       estimated 36, held 36, charged 36, returned 0" in output
    assert len(await native.admin.runs()) == 1


@pytest_asyncio.fixture
async def stack(native: NativeServer, tmp_path: Path) -> AsyncIterator[StackDescription]:
    folder = new_run_folder(tmp_path / "run")
    assert await asyncio.to_thread(up, folder, None, [native.url]) == 0
    description = folder.description()
    assert description is not None
    yield description
    await asyncio.to_thread(end_stack, folder)


@pytest.mark.parametrize("part", ["comfyui", "gpu-1"])
async def test_a_killed_part_comes_back_and_the_task_is_delivered(
    stack: StackDescription, native: NativeServer, bridge: Any, part: str
) -> None:
    """`comfyui` is the bridge: its API and the jobs' workflows."""
    await native.admin.set(hold=True)
    client = await Client.connect(stack.temporal_address, namespace=stack.namespace, plugins=[TasksPlugin()])
    task_id = unique("image")
    task = {
        "task_id": task_id,
        "tenant_id": "tenant-demo",
        "user_id": "user-demo",
        "template_id": "test-pattern",
        "prompt": "a lighthouse",
    }
    handle = await client.start_workflow(IMAGE_WORKFLOW, task, id=workflow_id_of(task_id), task_queue=stack.task_queue)
    await until_running(bridge, native)
    os.kill(stack.pids[part], signal.SIGKILL)
    await native.admin.set(hold=False)
    result: Any = await asyncio.wait_for(handle.result(), 180)
    assert result["status"] == "completed"
    assert result["credits"]["charged"] == 24
    assert result["attempts"] == 1
    assert len(await native.admin.submissions()) == 1
    async with httpx.AsyncClient(timeout=10) as http:
        assert (await http.get(result["result_urls"][0])).content.startswith(b"\x89PNG")
