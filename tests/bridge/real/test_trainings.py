"""Trainings through the bridge on a real ComfyUI, on the tiny checkpoint that `tiny_checkpoint.py` makes."""

from __future__ import annotations

import json
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

import httpx
import pytest
import pytest_asyncio
from temporalio.client import Client

from bridge.template_library import SHIPPED
from tests.bridge.platform import BridgePlatform, Json
from tests.bridge.real.own_templates import TINY as TINY_PICTURE
from tests.bridge.real.own_templates import write_templates
from tests.bridge.real.test_jobs import one_worker, queued_or_running, until_running
from tests.bridge.test_trainings import created, ended, post_action

TINY: Final = "tiny.safetensors"
BASE_MODEL: Final = "flux"
"""A name with a price that no shipped template offers. Here it is the tiny checkpoint."""
LIMIT_SECONDS: Final = 400.0
pytestmark = pytest.mark.timeout(580)


@pytest_asyncio.fixture
async def bridge(
    temporal_client: Client, tmp_path: Path, comfyui_url: str, real: httpx.AsyncClient
) -> AsyncIterator[BridgePlatform]:
    if TINY not in (await real.get("/models/checkpoints")).json():
        pytest.skip(f"this server has no {TINY}; tests/bridge/real/tiny_checkpoint.py makes it")
    write_templates(tmp_path / "templates")
    write_template(tmp_path / "templates")
    async with one_worker(temporal_client, tmp_path, comfyui_url, tmp_path / "templates") as (bridge, _):
        yield bridge


def write_template(folder: Path) -> None:
    """The shipped `lora-train`, for pictures of 64 pixels."""
    shipped = SHIPPED / "lora-train"
    where = folder / "tiny-train"
    where.mkdir(parents=True)
    graph: dict[str, Any] = json.loads((shipped / "graph.json").read_text())
    graph["fitted"]["inputs"] |= {"width": 64, "height": 64}
    graph["train"]["inputs"]["gradient_checkpointing"] = False
    (where / "graph.json").write_text(json.dumps(graph))
    manifest = (shipped / "manifest.toml").read_text()
    offered = manifest.index("[training.base_models]")
    rest = manifest.index("[training.inputs]")
    models = f'[training.base_models]\n{BASE_MODEL} = ["tiny*"]\n\n'
    text = manifest[:offered] + models + manifest[rest:]
    (where / "manifest.toml").write_text(text.replace('"lora-train"', '"tiny-train"'))


def tensors_of(address: str) -> Json:
    """The header of a safetensors file, without its metadata."""
    raw = Path(unquote(urlsplit(address).path)).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header: Json = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    assert len(raw) == 8 + length + max(tensor["data_offsets"][1] for tensor in header.values())
    return header


def hyperparameters(epochs: int) -> Json:
    return {
        "epochs": epochs,
        "batch_size": 2,
        "learning_rate": 0.001,
        "rank": 4,
        "training_dtype": "fp32",
        "lora_dtype": "fp32",
    }


async def test_a_lora_is_trained_in_chunks_and_resumed(bridge: BridgePlatform) -> None:
    accepted = await created(bridge, pictures=2, base_model=BASE_MODEL, hyperparameters=hyperparameters(2))
    await post_action(bridge, accepted["training_id"], "start")
    state = await ended(bridge, accepted["training_id"], LIMIT_SECONDS)
    assert state["error_details"] is None, state
    assert (state["checkpoint"]["epoch"], state["checkpoint"]["step"]) == (2, 2)
    assert state["gpu_hours_used"] > 0
    tensors = tensors_of(state["output"]["model_path"])
    assert any("lora" in name for name in tensors), sorted(tensors)[:5]

    async def is_published() -> bool:
        return "completed" in bridge.receiver.statuses(accepted["task_id"])

    await bridge.until(is_published)
    bodies = bridge.receiver.genuine(accepted["task_id"])
    assert list(dict.fromkeys(body["training_stage"] for body in bodies if body["training_stage"])) == [
        "data_ingest",
        "training",
        "evaluating",
        "publishing",
    ]
    lines = [line["message"] for body in bodies for line in body.get("log", [])]
    assert any("loss=" in line and "unknown" not in line for line in lines), lines

    uri = state["checkpoint"]["uri"]
    body = {"base_model": BASE_MODEL, "hyperparameters": hyperparameters(3), "resume_from": uri}
    resumed = await created(bridge, pictures=2, **body)
    await post_action(bridge, resumed["training_id"], "start")
    state = await ended(bridge, resumed["training_id"], LIMIT_SECONDS)
    assert state["error_details"] is None, state
    assert (state["checkpoint"]["epoch"], state["checkpoint"]["step"]) == (3, 3)


async def test_an_image_uses_what_was_trained(bridge: BridgePlatform) -> None:
    accepted = await created(bridge, pictures=2, base_model=BASE_MODEL, hyperparameters=hyperparameters(1))
    await post_action(bridge, accepted["training_id"], "start")
    output = (await ended(bridge, accepted["training_id"], LIMIT_SECONDS))["output"]

    async def picture(**fields: Any) -> bytes:
        job = await bridge.submit(template_id=TINY_PICTURE, extras={"seed": 7}, **fields)
        state = await bridge.ended(job["job_id"], seconds=LIMIT_SECONDS)
        assert state["error_details"] is None, state
        return (await bridge.http.get(state["result_urls"][0])).content

    plain = await picture()
    lora = {"model_path": output["model_path"], "sha256": output["sha256"], "strength": 2.0}
    assert await picture(loras=[lora]) != plain
    assert await picture(loras=[lora | {"strength": 0.0}]) == plain


async def test_a_training_is_cancelled_during_a_chunk_and_the_server_is_free(
    bridge: BridgePlatform, real: httpx.AsyncClient
) -> None:
    accepted = await created(bridge, pictures=2, base_model=BASE_MODEL, hyperparameters=hyperparameters(500))
    await post_action(bridge, accepted["training_id"], "start")
    prompt_id = await until_running(bridge, real)
    await post_action(bridge, accepted["training_id"], "cancel")
    state = await ended(bridge, accepted["training_id"], LIMIT_SECONDS)
    assert state["error_details"]["code"] == "cancelled"

    async def is_free() -> bool:
        return prompt_id not in await queued_or_running(real)

    await bridge.until(is_free, seconds=LIMIT_SECONDS)
