"""`make demo COMFYUI=…` and `make up COMFYUI=…`: whole tasks through the bridge, credits included."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from temporalio.client import Client, WorkflowFailureError
from temporalio.exceptions import ApplicationError

from comfyui_temporal import HttpTasks, ImageTask, InvalidInput, TrainingTask
from comfyui_temporal.contracts.stack import StackDescription
from comfyui_temporal.contracts.tasks import IMAGE_WORKFLOW, workflow_id_of
from comfyui_temporal.plugin import TasksPlugin
from local_stack.background import end_stack
from local_stack.commands import authorise, up
from local_stack.folder import PROJECT
from tests.bridge.native import NativeServer
from tests.bridge.template_folders import written
from tests.bridge.test_jobs import _png as png
from tests.bridge.test_servers import until_running
from tests.bridge.test_trainings import MODELS, picture
from tests.bridge.test_uploads import GRAPH, MANIFEST, WAV
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


@pytest_asyncio.fixture
async def with_models(native: NativeServer) -> NativeServer:
    """A server that has its models before the stack looks at it."""
    await native.admin.set(models=MODELS)
    return native


async def test_what_was_trained_is_used_by_an_image(
    with_models: NativeServer, stack: StackDescription, tmp_path: Path
) -> None:
    """Both through the gateway, with real workers, the bridge and its GPU worker."""
    ids = {"tenant_id": "tenant-demo", "user_id": "user-demo"}
    folder = tmp_path / "run" / "datasets" / "tenant-demo" / "cats"
    folder.mkdir(parents=True)
    (folder / "cat.png").write_bytes(picture(90))
    training = TrainingTask.model_validate(
        {
            **ids,
            "task_id": unique("training"),
            "template_id": "lora-train",
            "dataset": {"dataset_id": "cats", "source_uri": folder.as_uri() + "/"},
            "hyperparameters": {"epochs": 2, "batch_size": 1, "learning_rate": 0.0005},
            "max_credits": 1_000,
        }
    )
    image = ImageTask.model_validate(
        {
            **ids,
            "task_id": unique("image"),
            "template_id": "text-to-image",
            "prompt": "a cat in the snow",
            "loras": [{"model_id": training.task_id, "strength": 0.8}],
        }
    )
    async with HttpTasks(stack.gateway_url, stack.tokens["tenant-demo"]) as tasks:
        with pytest.raises(InvalidInput, match="a model cannot be used"):
            await tasks.start(image)
        await tasks.start(training)
        trained = await asyncio.wait_for(tasks.wait(training.task_id), 120)
        assert trained.status == "completed", trained.sentence
        await tasks.start(image)
        made = await asyncio.wait_for(tasks.wait(image.task_id), 120)
    assert made.status == "completed", made.sentence
    assert made.credits is not None and made.credits.charged == 24
    lora = (await with_models.admin.sent())[-1].graph["lora-0"]["inputs"]
    on_server = with_models.folder / "output" / "loras" / lora["lora_name"]
    sha256 = hashlib.sha256(on_server.read_bytes()).hexdigest()
    assert lora["lora_name"] == f"comfyui-temporal/tenant-tenant-demo/{sha256}.safetensors"
    assert (lora["strength_model"], lora["strength_clip"]) == (0.8, 0.8)


@pytest_asyncio.fixture
async def with_files(
    native: NativeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[StackDescription]:
    """A stack with a template that takes a mask and a sound."""
    written(tmp_path / "templates", "files", GRAPH, results=["Kept", "Told of sound"], manifest=MANIFEST)
    monkeypatch.setenv("COMFYUI_TEMPORAL_BRIDGE_TEMPLATES", str(tmp_path / "templates"))
    monkeypatch.setenv("COMFYUI_TEMPORAL_PRICES", '{"extras": {"mask": 0, "sound": 5, "film": 7}}')
    folder = new_run_folder(tmp_path / "run")
    assert await asyncio.to_thread(up, folder, None, [native.url]) == 0
    try:
        description = folder.description()
        assert description is not None
        assert await asyncio.to_thread(authorise, folder, ["files"]) == 0
        yield description
    finally:
        await asyncio.to_thread(end_stack, folder)


async def test_uploads_reach_the_graph_and_no_other_tenants_does(
    with_files: StackDescription, native: NativeServer
) -> None:
    """Through gateway, worker, bridge and GPU worker; the last task goes past the gateway."""
    stack = with_files
    async with (
        HttpTasks(stack.gateway_url, stack.tokens["tenant-demo"]) as tasks,
        HttpTasks(stack.gateway_url, stack.tokens["tenant-other"]) as strangers,
    ):
        sound, theirs = await tasks.upload(WAV), await strangers.upload(png())
        mask = f"data:image/png;base64,{base64.b64encode(png()).decode()}"
        good = {"mask": mask, "sound": sound.address}
        await tasks.start(order := image_with(good))
        made = await asyncio.wait_for(tasks.wait(order.task_id), 120)
        assert made.status == "completed", made.sentence
        assert made.credits is not None and made.credits.charged == 24 + 5
        for extras, message in (
            ({"mask": sound.address}, "is a WAV, MP3, FLAC or Ogg sound; a PNG, JPEG, GIF or WebP picture is needed"),
            ({"mask": theirs.address}, f"there is no upload {theirs.upload_id} of this tenant"),
        ):
            with pytest.raises(InvalidInput) as refused:
                await tasks.start(image_with(extras))
            assert refused.value.fields == {"extras.mask": message}
    async with httpx.AsyncClient(timeout=10) as http:
        told = (await http.get(made.result.result_urls[1])).text  # type: ignore[union-attr]
        assert told.endswith("/control-1.wav")
    client = await Client.connect(stack.temporal_address, namespace=stack.namespace, plugins=[TasksPlugin()])
    order = image_with({"mask": theirs.address})
    handle = await client.start_workflow(
        IMAGE_WORKFLOW, order, id=workflow_id_of(order.task_id), task_queue=stack.task_queue
    )
    with pytest.raises(WorkflowFailureError) as failed:
        await asyncio.wait_for(handle.result(), 60)
    assert isinstance(failed.value.cause, ApplicationError)
    assert failed.value.cause.type == "input_invalid"
    assert f"no complete upload {theirs.upload_id} of this tenant" in str(failed.value.cause)
    assert len(await native.admin.runs()) == 1


def image_with(extras: dict[str, Any]) -> ImageTask:
    return ImageTask(
        task_id=unique("image"),
        tenant_id="tenant-demo",
        user_id="user-demo",
        template_id="files",
        prompt="a lighthouse",
        extras=extras,
    )
