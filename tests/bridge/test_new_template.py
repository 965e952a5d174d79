"""`template new`: what is written from an exported graph loads, and jobs run on it as they were asked for."""

from __future__ import annotations

import asyncio
import copy
import json
import random
import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
from temporalio.client import Client

from bridge.__main__ import main
from bridge.gpu_worker import check_templates
from bridge.graph_check import best_fit
from bridge.native import NativeServer as NativeClient
from bridge.new_template import read_exported, template_from
from bridge.template_library import load_library, load_template
from bridge.templates import RequestRefused, Template, TemplateProblem
from comfyui_temporal.contracts.comfyui import JobRequest
from tests.bridge.exported_graphs import CHECKPOINT, control_graph, default_graph, editors_graph, flux_graph
from tests.bridge.native import NativeServer
from tests.bridge.platform import TENANT, BridgePlatform, Json, running_bridge
from tests.bridge.template_folders import empty_image, node, save
from tests.bridge.test_jobs import _png as png
from tests.bridge.test_loras import modelled

MODELS: Final = {
    "checkpoints": [CHECKPOINT],
    "diffusion_models": ["mine/flux1-dev.safetensors"],
    "text_encoders": ["clip_l.safetensors", "t5xxl_fp16.safetensors"],
    "vae": ["ae.safetensors"],
    "controlnet": ["openpose.safetensors"],
}


def exported(folder: Path, graph: Any, name: str = "mine.json") -> Path:
    path = folder / name
    path.write_text(graph if isinstance(graph, str) else json.dumps(graph))
    return path


async def run_command(*arguments: str | Path) -> tuple[int, str, str]:
    """The command in a process of its own: exit code, output, errors."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bridge", "template", "new", *map(str, arguments)),
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path.cwd())},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


def made_of(graph: Json, **options: Any) -> tuple[Template, str, list[str]]:
    """The template, its manifest, and what is left to decide."""
    new = template_from(graph, "mine.json", **options)
    return new.template, new.manifest, new.decisions


def request(**fields: Any) -> JobRequest:
    given = {"prompt": "a lighthouse", "resolution": "hd", "priority": "standard", "callback_url": "http://127.0.0.1/"}
    ids = {"task_id": "task-1", "tenant_id": "tenant-1", "user_id": "user-1", "template_id": "mine"}
    return JobRequest.model_validate(ids | given | fields)


def rendered(template: Template, **fields: Any) -> Json:
    graph: Json = template.render(request(**fields), job_id="job-1").graph
    return graph


async def delivered(bridge: BridgePlatform, native: NativeServer, **fields: Any) -> Json:
    """A job runs to its result; the graph that the server was given."""
    job = await bridge.submit(**fields)
    state = await bridge.ended(job["job_id"])
    assert state["error_details"] is None, state
    assert len(state["result_urls"]) == 1
    assert (await bridge.http.get(state["result_urls"][0])).content.startswith(b"\x89PNG")
    return (await native.admin.sent())[-1].graph


async def test_a_job_runs_on_what_was_made_of_comfyuis_own_first_graph(
    temporal_client: Client, native: NativeServer, tmp_path: Path
) -> None:
    await native.admin.set(models=MODELS)
    path, out = exported(tmp_path, default_graph(), "My first (1).json"), tmp_path / "templates"
    code, said, errors = await run_command(path, "--out", out, "--comfyui", native.url)
    assert (code, errors) == (0, "")
    assert "my-first-1" in said and "would refuse" not in said and "decide" not in said
    assert json.loads((out / "my-first-1" / "graph.json").read_text()) == default_graph()
    async with NativeClient(native.url) as server:
        assert await check_templates(server, load_library(out), "default") == []
    async with (
        running_bridge(temporal_client, tmp_path / "bridge", bridge_templates=[out]) as bridge,
        _gpu_of(bridge, native, out),
    ):
        extras = {"negative_prompt": "fog", "seed": 7, "steps": 3}
        graph = await delivered(bridge, native, template_id="my-first-1", prompt="a pier", extras=extras)
        assert [graph[name]["inputs"]["text"] for name in ("6", "7")] == ["a pier", "fog"]
        assert (graph["3"]["inputs"]["seed"], graph["3"]["inputs"]["steps"]) == (7, 3)
        assert (graph["5"]["inputs"]["width"], graph["5"]["inputs"]["height"]) == (448, 640)
        plain = await delivered(bridge, native, template_id="my-first-1", resolution="4k", loras=[modelled(bridge)])
        assert plain["7"]["inputs"]["text"] == "text, watermark"
        assert plain["3"]["inputs"]["steps"] == 20
        assert (plain["5"]["inputs"]["width"], plain["5"]["inputs"]["height"]) == (1664, 2496)
        assert plain["3"]["inputs"]["model"] == ["lora-0", 0]
        wide = {"extras": {"aspect_ratio": "16:9"}, "resolution": "sd"}
        job = await bridge.submit(template_id="my-first-1", images=3, **wide)
        assert len((await bridge.ended(job["job_id"]))["result_urls"]) == 3
        canvas = (await native.admin.sent())[-1].graph["5"]["inputs"]
        assert (canvas["width"], canvas["height"], canvas["batch_size"]) == (704, 384, 3)


def _gpu_of(bridge: BridgePlatform, native: NativeServer, out: Path) -> Any:
    bridge.templates = list(load_library(out))
    return bridge.gpu(native)


async def test_a_job_runs_on_separate_loaders_and_constants(
    temporal_client: Client, native: NativeServer, tmp_path: Path
) -> None:
    await native.admin.set(models=MODELS)
    out = tmp_path / "templates"
    code, said, errors = await run_command(exported(tmp_path, flux_graph()), "--out", out, "--id", "flux")
    assert (code, errors) == (0, ""), said
    async with (
        running_bridge(temporal_client, tmp_path / "bridge", bridge_templates=[out]) as bridge,
        _gpu_of(bridge, native, out),
    ):
        fields = {"template_id": "flux", "prompt": "a crow", "extras": {"seed": 9}, "resolution": "hd"}
        graph = await delivered(bridge, native, **fields, loras=[modelled(bridge)])
        assert graph["6"]["inputs"]["text"] == "a crow"
        assert graph["25"]["inputs"]["noise_seed"] == 9
        assert (graph["34"]["inputs"]["value"], graph["35"]["inputs"]["value"]) == (1216, 832), "hd is near its own"
        assert graph["12"]["inputs"]["unet_name"] == "mine/flux1-dev.safetensors", "another server, another folder"
        assert graph["30"]["inputs"]["model"] == ["lora-0", 0]
        assert graph["6"]["inputs"]["clip"] == ["lora-0", 1]
        small = await delivered(bridge, native, **fields | {"resolution": "sd"})
        assert (small["34"]["inputs"]["value"], small["35"]["inputs"]["value"]) == (640, 448)


async def test_a_job_runs_with_a_picture_of_its_own_and_its_strength(
    temporal_client: Client, native: NativeServer, tmp_path: Path
) -> None:
    await native.admin.set(models=MODELS)
    out = tmp_path / "templates"
    code, said, errors = await run_command(exported(tmp_path, control_graph()), "--out", out)
    assert (code, errors) == (0, ""), said
    async with (
        running_bridge(temporal_client, tmp_path / "bridge", bridge_templates=[out]) as bridge,
        _gpu_of(bridge, native, out),
    ):
        image = bridge.folder / "images" / TENANT / "a.png"
        image.parent.mkdir(parents=True)
        image.write_bytes(png())
        controls = [{"image_url": image.as_uri(), "strength": 0.5}]
        graph = await delivered(bridge, native, template_id="mine", controls=controls)
    assert graph["10"]["inputs"]["image"].startswith("comfyui-temporal/")
    assert graph["13"]["inputs"]["strength"] == 0.4, "half of what the graph has"
    assert graph["12"]["inputs"]["width"] == graph["5"]["inputs"]["width"] == 448
    assert graph["6"]["inputs"]["text"] == "a lighthouse at dusk"
    assert "14" not in graph, "a preview is no result"


async def test_a_server_that_lacks_something_is_told_and_one_that_is_away_writes_nothing(
    native: NativeServer, tmp_path: Path
) -> None:
    path = exported(tmp_path, default_graph())
    code, said, _ = await run_command(path, "--out", tmp_path, "--comfyui", native.url)
    assert code == 0
    assert "would refuse" in said and CHECKPOINT in said and "none at all" in said
    for address, reason in (("http://127.0.0.1:9", "did not answer"), ("nonsense", "is not an http://")):
        code, said, errors = await run_command(path, "--out", tmp_path / "new", "--comfyui", address)
        assert (code, said) == (2, "")
        assert reason in errors and errors.count("\n") == 1
    assert not (tmp_path / "new").exists()


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str]]:
    """The command in this process: exit code, and everything that it said."""

    def run(path: Path, *arguments: str) -> tuple[int, str]:
        argv = ["bridge", "template", "new", str(path), "--out", str(tmp_path / "out"), *arguments]
        monkeypatch.setattr(sys, "argv", argv)
        code = main()
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


def shown(kind: str = "PreviewImage") -> Json:
    return {"1": empty_image(), "2": node(kind, "Shown", images=["1", 0])}


TRAINING: Final = {
    "1": node("TrainLoraNode", "Train", steps=1),
    "2": node("SaveLoRA", "Save LoRA", lora=["1", 1], prefix="loras/mine"),
}
WITH_A_TENANTS_MODEL: Final = default_graph() | {
    "10": node(
        "LoraLoaderModelOnly", "LoRA", model=["4", 0], strength_model=1, lora_name="comfyui-temporal/tenant-a/b.pt"
    )
}
WITH_A_TENANTS_MODEL["3"]["inputs"]["model"] = ["10", 0]


@pytest.mark.parametrize(
    ("graph", "arguments", "said"),
    [
        (editors_graph(), [], r"editor's format.*Workflow → Export \(API\)"),
        (editors_graph() | {"links": None}, [], "editor's format"),
        ({}, [], "object of nodes in API format"),
        ([], [], "object of nodes in API format"),
        ("not json {", [], r"no JSON of ComfyUI's.*Export \(API\)"),
        ("[" * 100_000, [], "no JSON of ComfyUI's"),
        ('{"1": {"class_type": "SaveImage", "inputs": {"x": NaN}}}', [], "no JSON of ComfyUI's"),
        ('{"1": {"class_type": "\\ud800", "inputs": {}}}', [], "no JSON of ComfyUI's"),
        ({"prompt": default_graph()}, [], "node 'prompt' has no class_type"),
        ({"1": {"class_type": "SaveImage", "inputs": {}, "_meta": "x"}}, [], "_meta"),
        ({"1": node("SaveImage", "Save", images=["2", 0])}, [], "links to '2', which is not in the graph"),
        (shown(), [], "PreviewImage only shows a preview and saves nothing.*SaveImage"),
        (shown("SaveImageWebsocket"), [], "does not say what SaveImageWebsocket saves"),
        (shown("Uploader"), [], "no node of this graph saves a result.*--result NODE \\('Shown'\\)"),
        (
            shown("SaveImage") | {"2": save("Shown", "1") | {"inputs": {"save_output": False}}},
            [],
            "'save_output' is false",
        ),
        (default_graph(), ["--result", "Nowhere"], "'Nowhere' is not in the graph"),
        (default_graph(), ["--result", "CLIP Text Encode (Prompt)"], "several nodes: use an id"),
        (shown(), ["--result", "Shown"], "only shows a preview"),
        (TRAINING, [], "this graph trains: copy bridge/templates/lora-train"),
        (WITH_A_TENANTS_MODEL, [], "names a file of a task"),
        (default_graph(), ["--id", "../up"], "no template_id"),
        (default_graph(), ["--id", ""], "no template_id"),
        (default_graph() | {"99": node("Note", "x" * 600_000)}, [], "the graph has"),
        ("[" + " " * 3_000_000 + "]", [], "larger than"),
    ],
)
def test_what_is_no_template_is_a_sentence_and_nothing_is_written(
    command: Callable[..., tuple[int, str]], tmp_path: Path, graph: Any, arguments: list[str], said: str
) -> None:
    code, text = command(exported(tmp_path, graph), *arguments)
    assert code == 2
    assert text.count("\n") == 1 and len(text) < 600, "a sentence"
    assert re.search(said, text), text
    assert not (tmp_path / "out").exists()


def test_what_exists_is_left_as_it_is(command: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    path = exported(tmp_path, default_graph())
    assert command(path)[0] == 0
    manifest = tmp_path / "out" / "mine" / "manifest.toml"
    manifest.write_text("template_id = 'mine' # edited")
    code, said = command(path)
    assert code == 2 and "exists already" in said
    assert manifest.read_text() == "template_id = 'mine' # edited"
    manifest.parent.rename(tmp_path / "out" / "renamed")
    code, said = command(path)
    assert code == 2 and "renamed has the template_id 'mine' already" in said
    (tmp_path / "out" / "elsewhere").symlink_to(tmp_path / "nowhere")
    assert "exists already" in command(path, "--id", "elsewhere")[1]
    assert sorted(child.name for child in (tmp_path / "out").iterdir()) == ["elsewhere", "renamed"]


def test_files_that_cannot_be_read_are_a_sentence(command: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    picture = tmp_path / "picture.json"
    picture.write_bytes(png())
    for path, reason in (
        (tmp_path / "missing.json", "No such file"),
        (tmp_path, "directory"),
        (picture, "no JSON"),
        (Path("/dev/zero"), "larger than"),
    ):
        code, said = command(path)
        assert code == 2 and reason in said and said.count("\n") == 1
    nameless = exported(tmp_path, default_graph(), "图.json")
    assert "--id" in command(nameless)[1]
    assert command(nameless, "--id", "picture")[0] == 0


def test_a_byte_order_mark_and_the_name_of_a_shipped_template_are_no_obstacle(
    command: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    path = tmp_path / "upscale.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(default_graph()).encode())
    code, said = command(path)
    assert code == 0
    assert "takes the place of the shipped template upscale" in said
    assert load_template(tmp_path / "out" / "upscale").template_id == "upscale"


def combined(first: str, second: str) -> Json:
    graph = default_graph()
    graph["3"]["inputs"]["positive"] = ["11", 0]
    graph["6"]["inputs"]["text"] = first
    return graph | {
        "10": node("CLIPTextEncode", "Style", text=second, clip=["4", 1]),
        "11": node("ConditioningCombine", "Both", conditioning_1=["6", 0], conditioning_2=["10", 0]),
    }


def test_texts_that_differ_are_a_question_and_texts_that_are_the_same_are_one_prompt() -> None:
    template, manifest, decisions = made_of(combined("a cat", "oil on canvas"))
    assert any("different texts reach the samplers" in line and "'Style'" in line for line in decisions)
    assert "# Decide: different texts" in manifest
    graph = rendered(template)
    assert (graph["6"]["inputs"]["text"], graph["10"]["inputs"]["text"]) == ("a cat", "oil on canvas")
    graph = rendered(made_of(combined("a cat", "a cat"))[0])
    assert (graph["6"]["inputs"]["text"], graph["10"]["inputs"]["text"]) == ("a lighthouse", "a lighthouse")


def test_a_text_that_serves_both_sides_is_the_prompt_and_a_zeroed_one_is_none() -> None:
    graph = default_graph()
    graph["3"]["inputs"]["negative"] = ["6", 0]
    assert "negative_prompt" not in made_of(graph)[1]
    graph["10"] = node("ConditioningZeroOut", "Nothing", conditioning=["7", 0])
    graph["3"]["inputs"]["negative"] = ["10", 0]
    template, manifest, decisions = made_of(graph)
    assert "negative_prompt" not in manifest and decisions == []
    assert rendered(template)["6"]["inputs"]["text"] == "a lighthouse"


def test_a_text_that_a_node_computes_is_a_question() -> None:
    graph = default_graph() | {"10": node("Wildcards", "Wild", text="a __colour__ cat", mode="random")}
    graph["6"]["inputs"]["text"] = ["10", 0]
    template, _, decisions = made_of(graph)
    assert any("the prompt is not a text of the graph" in line for line in decisions)
    assert rendered(template)["6"]["inputs"]["text"] == ["10", 0]


def test_a_text_that_no_sampler_takes_is_named_as_a_question() -> None:
    graph = {"1": node("Ideogram", "Draw", prompt="a fox", seed=1), "2": save("Kept", "1")}
    template, manifest, decisions = made_of(graph)
    assert any("'Draw' (node '1') prompt" in line for line in decisions)
    assert "prompt =" not in manifest
    assert rendered(template)["1"]["inputs"]["prompt"] == "a fox"


def test_a_constant_that_serves_other_inputs_too_is_left_alone() -> None:
    graph = default_graph() | {"10": node("PrimitiveInt", "Twenty", value=20)}
    graph["3"]["inputs"] |= {"seed": ["10", 0], "steps": ["10", 0]}
    template, manifest, decisions = made_of(graph)
    assert "seed = " not in manifest and "[extras.steps]" not in manifest
    assert any("the seed of" in line for line in decisions) and any("the steps are set" in line for line in decisions)
    assert rendered(template, extras={"seed": 5})["10"]["inputs"]["value"] == 20


def test_steps_that_two_samplers_share_out_are_a_question() -> None:
    graph = default_graph()
    sampling: Json = graph["3"]["inputs"] | {"start_at_step": 0, "end_at_step": 12, "noise_seed": 3}
    graph["3"] = node("KSamplerAdvanced", "First", **sampling)
    _, manifest, decisions = made_of(graph)
    assert "[extras.steps]" not in manifest
    assert any("the steps are set at 'First'" in line for line in decisions)


def test_two_sizes_a_video_and_a_picture_that_gives_the_size_are_questions() -> None:
    hires = default_graph() | {
        "10": node("LatentUpscale", "Larger", samples=["3", 0], width=1024, height=1536),
        "11": node("KSampler", "Second", **default_graph()["3"]["inputs"] | {"latent_image": ["10", 0]}),
    }
    hires["8"]["inputs"]["samples"] = ["11", 0]
    fixed = default_graph() | {"10": node("ImageScale", "Last", image=["8", 0], width=300, height=300)}
    fixed["9"]["inputs"]["images"] = ["10", 0]
    video = default_graph()
    video["5"] = node("EmptyHunyuanLatentVideo", "Frames", width=848, height=480, length=25, batch_size=1)
    redrawn = default_graph()
    redrawn["5"] = node("VAEEncode", "Encode", pixels=["10", 0], vae=["4", 2])
    redrawn["10"] = node("LoadImage", "Load Image", image="a.png")
    for graph in (hires, fixed, video, redrawn):
        template, manifest, decisions = made_of(graph)
        assert any("sd, hd and 4k make the same" in line for line in decisions), manifest
        assert "set = " not in manifest
        controls = [{"image_url": "https://example.org/a.png"}] if graph is redrawn else []
        made = rendered(template, resolution="4k", controls=controls)
        assert made["5"]["inputs"] == graph["5"]["inputs"]


def test_sounds_and_films_are_extras_that_a_request_must_give() -> None:
    """Whatever file the exported graph names, a server does not have it."""
    graph: Json = {
        "1": node("LoadVideo", "Film", file="mine.mp4"),
        "2": node("LoadAudio", "Sound", audio="mine.wav", audioUI=""),
        "3": node("LoadAudio", "Load Audio", audio="other.wav"),
        "4": node("AudioConcat", "Both", audio1=["2", 0], audio2=["3", 0], direction="after"),
        "5": node("SaveVideo", "Save Video", video=["1", 0], filename_prefix="x"),
        "6": node("SaveAudio", "Save Audio", audio=["4", 0], filename_prefix="x"),
    }
    template, _, decisions = made_of(graph)
    assert not [line for line in decisions if "mine" in line or "other" in line]
    with pytest.raises(RequestRefused, match=r"extras\.audio_2: template"):
        rendered(template, extras={"video": "upload:v", "audio": "upload:a"})
    whole = template.render(
        request(extras={"video": "upload:v", "audio": "upload:a", "audio_2": "upload:b"}), job_id="job"
    )
    names = {file.name: file.kind for file in whole.files}
    assert names == {"video": "video", "audio": "audio", "audio_2": "audio"}
    assert {(upload.node, upload.input) for upload in whole.uploads} == {("1", "file"), ("2", "audio"), ("3", "audio")}


def test_several_images_are_offered_where_each_run_gives_them_all_and_else_a_batch_is_a_question() -> None:
    graph = default_graph()
    graph["5"]["inputs"]["batch_size"] = 4
    template, _, decisions = made_of(graph)
    assert decisions == []
    assert rendered(template)["5"]["inputs"]["batch_size"] == 1
    assert rendered(template, images=3)["5"]["inputs"]["batch_size"] == 3
    graph["10"] = node("ImageFromBatch", "First", image=["8", 0], batch_index=0, length=1)
    graph["9"]["inputs"]["images"] = ["10", 0]
    template, manifest, decisions = made_of(graph)
    assert "[images]" not in manifest.replace("under [images]", "")
    assert any("makes 4 at once, for the price of one" in line for line in decisions)
    assert rendered(template)["5"]["inputs"]["batch_size"] == 4


def test_a_seed_whose_limits_are_not_known_stays_small_and_a_server_that_knows_them_is_believed() -> None:
    graph = default_graph() | {"10": node("Grain", "Grain", image=["8", 0], seed=1)}
    graph["9"]["inputs"]["images"] = ["10", 0]
    seed = {"seed": 2**63 + 2**40 + 3}
    assert rendered(made_of(graph)[0], extras=seed)["3"]["inputs"]["seed"] == 3
    info = {"Grain": {"input": {"required": {"seed": ["INT", {"max": 99}]}}, "output_node": False}}
    assert rendered(made_of(graph, info=info)[0], extras=seed)["10"]["inputs"]["seed"] == seed["seed"] % 100
    assert rendered(made_of(default_graph())[0], extras=seed)["3"]["inputs"]["seed"] == seed["seed"]
    graph = default_graph() | {"10": node("PrimitiveInt", "Seed", value=1)}
    graph["3"]["inputs"]["seed"] = ["10", 0]
    assert rendered(made_of(graph)[0], extras=seed)["10"]["inputs"]["value"] == seed["seed"] % 2**63


def test_several_models_take_no_lora_until_someone_says_which() -> None:
    graph = default_graph() | {"10": node("UNETLoader", "Other", unet_name="other.safetensors", weight_dtype="default")}
    graph["11"] = node(
        "KSampler", "Second", **default_graph()["3"]["inputs"] | {"model": ["10", 0], "latent_image": ["3", 0]}
    )
    graph["8"]["inputs"]["samples"] = ["11", 0]
    template, manifest, decisions = made_of(graph)
    assert template.most_loras == 0
    assert any("several models" in line for line in decisions) and "most = 0" in manifest


def test_names_of_models_with_special_letters_are_found_on_another_server() -> None:
    graph = default_graph()
    graph["4"]["inputs"]["ckpt_name"] = "SDXL\\best [v2]*.safetensors"
    template, _, _ = made_of(graph)
    [choice] = template.models_needed()
    for name in ("SDXL\\best [v2]*.safetensors", "best [v2]*.safetensors", "other/Best [v2]*.safetensors"):
        assert best_fit([name], choice.prefer) == name
    for name in ("best v.safetensors", "my best [v2]*.safetensors", "best [v2]xx.safetensors"):
        assert best_fit([name], choice.prefer) is None


def test_titles_that_could_be_read_in_two_ways_give_way_to_ids() -> None:
    graph = default_graph()
    for node_id, title in (("3", "6"), ("4", 'Load "it"\n[x]'), ("5", "Size\x1b[2J"), ("9", "ünï 'c' \\ → 图.v1")):
        graph[node_id]["_meta"]["title"] = title
    template, manifest, _ = made_of(graph)
    assert template.result_nodes == ["9"]
    assert "\x1b" not in manifest
    made = rendered(template, extras={"seed": 5, "negative_prompt": "x"}, resolution="sd")
    assert made["3"]["inputs"]["seed"] == 5
    assert (made["6"]["inputs"]["text"], made["7"]["inputs"]["text"]) == ("a lighthouse", "x")
    assert made["5"]["inputs"]["width"] == 448
    graph = default_graph() | {
        "10": node("Odd", "Loader", **{"a.file": "x.safetensors"}),
        "11": node("Other", "Loader.a", file=1),
    }
    graph["8"]["inputs"] |= {"odd": ["10", 0], "other": ["11", 0]}
    info = {"Odd": {"input": {"required": {"a.file": [["x.safetensors"], {}]}}}}
    models = made_of(graph, info=info)[0].models_needed()
    assert [(choice.node, choice.input) for choice in models] == [("4", "ckpt_name"), ("10", "a.file")]


def test_each_saving_node_is_a_result_unless_one_is_named() -> None:
    graph = default_graph() | {
        "10": node("SaveAnimatedWEBP", "Animated", images=["8", 0], filename_prefix="x", fps=6, lossless=True),
        "11": node("VHS_VideoCombine", "Combined", images=["8", 0], filename_prefix="x", save_output=False),
        "12": node("Uploader", "Elsewhere", images=["8", 0]),
    }
    template, _, decisions = made_of(graph)
    assert template.result_nodes == ["9", "10"]
    assert any("'Elsewhere'" in line and "may give a result too" in line for line in decisions)
    assert made_of(graph, results=["Elsewhere"])[0].result_nodes == ["12"]
    info = {"Uploader": {"output_node": True}, "SaveAnimatedWEBP": {"output_node": False}}
    assert made_of(graph, info=info)[0].result_nodes == ["9"]


def test_whatever_is_in_a_graph_it_becomes_a_template_or_a_sentence(tmp_path: Path) -> None:
    """A thousand graphs with things missing, exchanged and out of place."""
    chance = random.Random(20)
    values: list[Any] = [
        *(
            None,
            True,
            -1,
            0,
            2**70,
            1.5,
            "",
            "a.b",
            "x\ny",
            "a.safetensors",
            [],
            {},
            {"a": 1},
            ["3"],
            ["9", 0],
            ["3", 7],
        ),
        *(["4", True], "comfyui-temporal/x/y", "x" * 5_000, ["8", -1]),
    ]
    made = refused = 0
    for _ in range(1_000):
        graph = copy.deepcopy(chance.choice([default_graph, flux_graph, control_graph])())
        for _ in range(chance.randint(1, 6)):
            changed = graph[chance.choice(list(graph))]
            what = chance.random()
            if what < 0.6 and changed["inputs"]:
                changed["inputs"][chance.choice(list(changed["inputs"]))] = copy.deepcopy(chance.choice(values))
            elif what < 0.8:
                changed["class_type"] = chance.choice(["", "SaveImage", "PrimitiveInt", "Ünknown\n", "UNETLoader"])
            else:
                changed["_meta"] = chance.choice(
                    [{}, {"title": None}, {"title": "a.b.c"}, {"title": "3"}, {"title": "\x00"}]
                )
        try:
            new = template_from(read_exported(exported(tmp_path, graph)), "mine.json")
        except TemplateProblem as problem:
            refused += 1
            assert "\n" not in str(problem)
            continue
        made += 1
        assert tomllib.loads(new.manifest)["template_id"] == "mine"
        controls = [{"image_url": "https://example.org/a.png"} for _ in new.template.manifest.controls]
        rendered(new.template, controls=controls, extras={"seed": 3})
    assert made > 200 and refused > 100, (made, refused)
