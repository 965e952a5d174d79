"""Tenants share the servers, and nothing of each other's: no file, no name, no address."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from temporalio.client import Client

from bridge.graph_check import NoModel, chosen_models, graph_problems
from bridge.native.failures import refusal_details
from bridge.orders import ModelChoice
from bridge.task_files import for_tenant, foreign_files, is_of_a_task, problem_of
from comfyui_temporal.contracts.prices import PriceTable
from tests.bridge.native import NativeServer
from tests.bridge.platform import BridgePlatform, Json, running_bridge
from tests.bridge.template_folders import node, save, written
from tests.bridge.test_trainings import MODELS

THEIRS = "comfyui-temporal/training-theirs/epoch-0003-r1_6_steps_00001_.safetensors"


def lora_graph(name: str) -> Json:
    return {
        "1": node("CheckpointLoaderSimple", "Checkpoint", ckpt_name=MODELS["checkpoints"][0]),
        "2": node("LoraLoaderModelOnly", "LoRA", model=["1", 0], lora_name=name, strength_model=1.0),
        "3": node("EmptyLatentImage", "Canvas", width=64, height=64, batch_size=1),
        "4": node("CLIPTextEncode", "Prompt", text="", clip=["1", 1]),
        "5": node(
            "KSampler",
            "Sampler",
            **{"model": ["2", 0], "positive": ["4", 0], "negative": ["4", 0], "latent_image": ["3", 0]},
            **{"seed": 1, "steps": 2, "cfg": 7.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0},
        ),
        "6": node("VAEDecode", "Decode", samples=["5", 0], vae=["1", 2]),
        "7": save("Kept", "6"),
    }


LORA_EXTRA = '[extras.lora]\ntype = "text"\ninputs = ["LoRA.lora_name"]\n[inputs]\nprompt = ["Prompt.text"]\n'


@pytest_asyncio.fixture
async def styled(temporal_client: Client, tmp_path: Path) -> AsyncIterator[BridgePlatform]:
    """A bridge whose template lets a request choose a LoRA, and one whose graph names another task's."""
    folder = tmp_path / "templates"
    written(folder, "styled", lora_graph("house.safetensors"), results=["Kept"], manifest=LORA_EXTRA)
    written(folder, "stolen", lora_graph(THEIRS), results=["Kept"])
    prices = PriceTable(extras={"lora": 1})
    async with running_bridge(temporal_client, tmp_path, bridge_templates=[folder], prices=prices) as platform:
        yield platform


def with_their_lora(native: NativeServer) -> None:
    path = native.folder / "output" / "loras" / THEIRS
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"weights")


async def test_what_another_tenant_trained_cannot_be_used_by_name(styled: BridgePlatform, native: NativeServer) -> None:
    await native.admin.set(models=MODELS | {"loras": ["house.safetensors"]})
    with_their_lora(native)
    async with styled.gpu(native):
        for fields, field in (
            ({"extras": {"lora": THEIRS}}, "extras.lora"),
            ({"extras": {"lora": THEIRS.replace("/", "\\").upper()}}, "extras.lora"),
            ({"prompt": f"a cat <lora:{THEIRS}:1>"}, "prompt"),
        ):
            refused = await styled.post("/jobs", styled.job_body(template_id="styled", **fields))
            assert refused.status_code == 422, refused.text
            assert refused.json()["detail"]["fields"][0].startswith(f"{field}: must not name a file")
        own = await styled.submit(template_id="styled", extras={"lora": "house.safetensors"})
        assert (await styled.ended(own["job_id"]))["error_details"] is None
        state = await styled.ended((await styled.submit(template_id="stolen"))["job_id"])
    assert state["error_details"]["code"] == "workflow_invalid"
    assert "names a file of another task" in state["error_details"]["message"]
    assert "training-theirs" not in state["error_details"]["message"]
    assert len(await native.admin.submissions()) == 1, "only the house's own LoRA was used"


async def test_an_error_shows_no_address_and_no_file_of_others(bridge: BridgePlatform, native: NativeServer) -> None:
    cause = f"{native.url}/view at 10.0.0.7:8188, gpu-7.internal:8188: no {THEIRS}; have 'comfyui-temporal/job-x/a.png'"
    await native.admin.set(fail_nodes={"SaveImage": cause})
    async with bridge.gpu(native, name="rack-7-of-acme"):
        state = await bridge.ended((await bridge.submit())["job_id"])
    message = state["error_details"]["message"]
    assert "Node save (SaveImage) failed" in message
    for hidden in ("127.0.0.1", "8188", "10.0.0.7", "gpu-7", "training-theirs", "job-x", "rack-7"):
        assert hidden not in message, message


async def test_servers_that_fail_are_not_named(bridge: BridgePlatform, native: NativeServer) -> None:
    await native.admin.set(broken_routes={"/prompt": 403})
    async with bridge.gpu(native, name="rack-7-of-acme") as worker:
        job = await bridge.submit()

        async def ended() -> Json | None:
            worker.health.sickness = None
            state = await bridge.job(job["job_id"])
            return state if state["error_details"] else None

        state = await bridge.until(ended, seconds=40)
    assert state is not None
    assert state["error_details"]["code"] == "lost"
    assert "rack-7" not in state["error_details"]["message"]
    assert "127.0.0.1" not in str(state["error_details"])


def test_a_template_never_chooses_what_a_tenant_trained() -> None:
    graph = {"2": node("LoraLoaderModelOnly", "LoRA", lora_name="any")}
    info = {"LoraLoaderModelOnly": {"input": {"required": {"lora_name": [[THEIRS, "house.safetensors"]]}}}}
    choice = ModelChoice(node="2", input="lora_name", prefer=["*epoch*", "*"])
    assert [name for _, name in chosen_models(graph, info, [choice], ["2"])] == ["house.safetensors"]
    with pytest.raises(NoModel, match=r"this server has house\.safetensors$"):
        chosen_models(graph, info, [choice.model_copy(update={"prefer": ["*epoch*"]})], ["2"])
    (problem,) = graph_problems(graph, info, ["2"])
    assert problem.endswith("it has house.safetensors")


def test_a_refusal_does_not_repeat_the_servers_list() -> None:
    details = f"folder: 'mine' not in ['{THEIRS}', 'private']"
    problem = {"type": "value_not_in_list", "message": "Value not in list", "details": details}
    error = refusal_details({"node_errors": {"2": {"errors": [problem], "class_type": "Load"}}})
    assert error.message == "ComfyUI refused the graph: node 2 (Load): Value not in list: folder: 'mine'"


@pytest.mark.parametrize(
    ("name", "is_own"),
    [
        (THEIRS, False),
        ("loras/comfyui-temporal/job-mine/a.png", True),
        ("comfyui-temporal/job-mine", True),
        ("comfyui-temporal", False),
        ("x\\Comfyui-Temporal\\job-theirs", False),
        ("comfyui-temporal/job-mine/../job-theirs/a.png", False),
        ("a story of comfyui-temporal and others", True),
    ],
)
def test_a_graph_names_files_of_its_own_task(name: str, is_own: bool) -> None:
    found = list(foreign_files({"1": {"inputs": {"image": name, "seed": 1, "model": ["2", 0]}}}, "job-mine"))
    assert found == ([] if is_own else [("1", "image")])


def test_files_of_the_other_folders_are_not_named_either() -> None:
    assert problem_of("ComfyUI_temp_abcde_00001_.png [temp]")
    assert problem_of("a.png [OUTPUT] ")
    assert problem_of("a cat [temp] in a box") is None
    assert not is_of_a_task("loras/house.safetensors")


def test_what_an_error_says_of_its_own_files_stays() -> None:
    text = "execution.py:518: comfyui-temporal/job-1/control-0.png of comfyui-temporal/job-2/control-1.png is broken"
    assert for_tenant(text, "job-1") == "execution.py:518: control-0.png of (a file of another task) is broken"
    assert for_tenant("[::1]:8188 and s3://bucket/key, done") == "(an address) and (an address), done"
