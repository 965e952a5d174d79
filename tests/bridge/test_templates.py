"""Templates: what a request sets in a graph, and what is refused before anything is queued."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from bridge.graph_check import NoModel, chosen_models, graph_problems
from bridge.graphs import reachable
from bridge.orders import ModelChoice
from bridge.template_library import SHIPPED, load_library, load_template
from bridge.templates import RequestRefused, TemplateProblem
from comfyui_temporal.contracts.comfyui import JobRequest
from comfyui_temporal.contracts.permissions import Scene

LIBRARY = load_library(SHIPPED)


def request(template_id: str, **fields: Any) -> JobRequest:
    return JobRequest.model_validate(
        {
            "task_id": "task-1",
            "tenant_id": "tenant-demo",
            "user_id": "user-demo",
            "template_id": template_id,
            "prompt": "a lighthouse",
            "resolution": "hd",
            "priority": "standard",
            "callback_url": "http://127.0.0.1:1/callbacks/comfyui/task-1",
            **fields,
        }
    )


def rendered(template_id: str, **fields: Any) -> Any:
    template = LIBRARY.get(template_id, Scene.IMAGE_GENERATE)
    assert template is not None
    return template.render(request(template_id, **fields), job_id="job-1")


def refused(template_id: str, **fields: Any) -> str:
    with pytest.raises(RequestRefused) as refusal:
        rendered(template_id, **fields)
    return str(refusal.value)


def copied(tmp_path: Path, template_id: str) -> Path:
    return Path(shutil.copytree(SHIPPED / template_id, tmp_path / template_id))


def test_a_request_sets_the_inputs_that_the_manifest_names() -> None:
    graph = rendered("text-to-image", extras={"negative_prompt": "blurry", "seed": 7}, resolution="sd").graph
    assert graph["positive"]["inputs"]["text"] == "a lighthouse"
    assert graph["negative"]["inputs"]["text"] == "blurry"
    assert graph["sampler"]["inputs"]["seed"] == 7
    assert (graph["canvas"]["inputs"]["width"], graph["canvas"]["inputs"]["height"]) == (512, 512)


def test_an_extra_adds_nodes_and_expected_time() -> None:
    without, with_it = rendered("text-to-image"), rendered("text-to-image", extras={"hires_fix": True})
    assert "hires" not in reachable(without.graph, without.result_nodes)
    assert {"hires", "sampler"} <= reachable(with_it.graph, with_it.result_nodes)
    assert with_it.expected_seconds > without.expected_seconds
    off = rendered("text-to-image", extras={"hires_fix": False})
    assert off.graph == without.graph


def test_rendering_does_not_change_the_template() -> None:
    first = rendered("test-pattern", extras={"seed": 1}).graph["ground"]["inputs"]["color"]
    second = rendered("test-pattern", extras={"seed": 2}).graph["ground"]["inputs"]["color"]
    assert (first, second) == (1, 2)


def test_without_a_seed_another_attempt_of_the_task_gives_the_same_picture() -> None:
    again = [rendered("test-pattern").graph["ground"]["inputs"]["color"] for _ in range(2)]
    other = rendered("test-pattern", task_id="task-2").graph["ground"]["inputs"]["color"]
    assert again[0] == again[1] != other


def test_several_images_are_one_run_that_takes_longer() -> None:
    one, four = rendered("text-to-image"), rendered("text-to-image", images=4)
    assert (one.graph["canvas"]["inputs"]["batch_size"], four.graph["canvas"]["inputs"]["batch_size"]) == (1, 4)
    assert (one.images, four.images) == (1, 4)
    assert four.expected_seconds == 4 * one.expected_seconds
    copies = rendered("image-to-image", controls=[{"image_url": "file:///a.png"}], images=2).graph["copies"]
    assert copies["inputs"] == {"samples": ["encode", 0], "amount": 2}


@pytest.mark.parametrize(
    ("resolution", "ratio", "size"),
    [
        ("hd", "1:1", (1024, 1024)),
        ("hd", "16:9", (1344, 768)),
        ("hd", "9:16", (768, 1344)),
        ("sd", "3:2", (640, 448)),
        ("4k", "2:3", (1664, 2496)),
    ],
)
def test_an_aspect_ratio_keeps_the_number_of_pixels(resolution: str, ratio: str, size: tuple[int, int]) -> None:
    canvas = rendered("text-to-image", resolution=resolution, extras={"aspect_ratio": ratio}).graph["canvas"]["inputs"]
    assert (canvas["width"], canvas["height"]) == size


def test_the_run_time_grows_with_the_steps() -> None:
    plain, long = rendered("text-to-image"), rendered("text-to-image", extras={"steps": 60})
    assert long.graph["sampler"]["inputs"]["steps"] == 60
    assert long.expected_seconds == 3 * plain.expected_seconds


def test_the_largest_seed_reaches_the_sampler() -> None:
    assert rendered("text-to-image", extras={"seed": 2**64 - 1}).graph["sampler"]["inputs"]["seed"] == 2**64 - 1
    with pytest.raises(RequestRefused, match=r"extras\.seed: must be a whole number from 0 to 18446744073709551615"):
        rendered("text-to-image", extras={"seed": 2**64})


def test_a_control_image_is_uploaded_later_and_its_strength_counts() -> None:
    control = {"image_url": "https://pictures.example/a.png", "strength": 1.0}
    strong = rendered("image-to-image", controls=[control])
    weak = rendered("image-to-image", controls=[control | {"strength": 0.0}])
    assert [(upload.node, upload.input, upload.control) for upload in strong.uploads] == [("control", "image", 0)]
    assert strong.graph["sampler"]["inputs"]["denoise"] == pytest.approx(0.3)
    assert weak.graph["sampler"]["inputs"]["denoise"] == pytest.approx(1.0)


def test_every_result_has_a_prefix_of_its_job() -> None:
    assert rendered("test-pattern").graph["save"]["inputs"]["filename_prefix"] == "comfyui-temporal/job-1/save-image"


@pytest.mark.parametrize(
    ("template_id", "fields", "named"),
    [
        ("text-to-image", {"extras": {"upscalre": True}}, "extras.upscalre: template 'text-to-image'"),
        ("text-to-image", {"extras": {"hires_fix": "yes"}}, "extras.hires_fix: must be true or false"),
        ("text-to-image", {"extras": {"seed": -1}}, "extras.seed: must be a whole number"),
        ("text-to-image", {"extras": {"seed": True}}, "extras.seed: must be a whole number"),
        ("text-to-image", {"extras": {"negative_prompt": 3}}, "extras.negative_prompt: must be a text"),
        ("text-to-image", {"controls": [{"image_url": "x"}]}, "controls: template 'text-to-image' accepts at most 0"),
        ("image-to-image", {}, "controls: template 'image-to-image' needs an image"),
        ("image-to-image", {"controls": [{"strength": 1}]}, "controls.0.image_url"),
        ("image-to-image", {"controls": [{"image_url": "x", "strength": "1"}]}, "controls.0.strength"),
        ("upscale", {"controls": [{"image_url": "x"}], "extras": {"upscaler": ""}}, "extras.upscaler: must be a text"),
        ("test-pattern", {"images": 2}, "images: template 'test-pattern' makes one image at a time, 2 given"),
        ("text-to-image", {"extras": {"aspect_ratio": "2:1"}}, "extras.aspect_ratio: must be one of 1:1, 3:2"),
        ("text-to-image", {"extras": {"steps": 61}}, "extras.steps: must be a whole number from 1 to 60"),
    ],
)
def test_a_request_that_does_not_fit_is_refused_by_field(template_id: str, fields: Any, named: str) -> None:
    assert named in refused(template_id, **fields)


def test_all_problems_are_reported_at_once() -> None:
    assert refused("text-to-image", extras={"seed": -1, "other": 1}).count("extras.") == 2


# Errors in a template


def test_a_graph_in_the_editors_format_is_refused(tmp_path: Path) -> None:
    folder = copied(tmp_path, "test-pattern")
    (folder / "graph.json").write_text(json.dumps({"nodes": [], "links": [], "version": 0.4}))
    with pytest.raises(TemplateProblem, match=r"test-pattern.*editor's format.*Export \(API\)"):
        load_template(folder)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ('"Ground.color"', '"Grond.color"', "inputs.seed.*'Grond' is not in the graph"),
        ('"Ground.color"', '"Ground.colour"', "node 'Ground' has no input 'colour'; it has .*color"),
        ('"Save image"', '"Safe image"', "results.*'Safe image' is not in the graph"),
        ("seconds = 2", "secnds = 2", "secnds"),
        ("[resolutions.4k]", "[resolutions.8k]", "8k"),
        ('"Ground.width" = 512', '"Ground.width" = ["Nowhere", 0]', "'Nowhere' is not in the graph"),
        ('"Ground.width" = 512', '"Ground.width" = [1, 2, 3]', "must be a value or a link"),
        ("modulo = 0x1000000", "modulo = 0", "modulo"),
        ('"Canvas.batch_size"', '"Canvas.batch"', "images: node 'Canvas' has no input 'batch'"),
        ('"9:16"]', '"tall"]', "must be like '16:9', not 'tall'"),
        ('width = ["Canvas.width"]', 'width = ["Decode.samples"]', "'Decode.samples' must be a number of pixels"),
        ("minimum = 1", "minimum = 0", "seconds_at needs a minimum above 0"),
    ],
)
def test_a_manifest_that_does_not_fit_its_graph_is_refused_by_name(
    tmp_path: Path, old: str, new: str, named: str
) -> None:
    texts = {name: (SHIPPED / name / "manifest.toml").read_text() for name in ("test-pattern", "text-to-image")}
    template_id, text = next((name, text) for name, text in texts.items() if old in text)
    folder = copied(tmp_path, template_id)
    (folder / "manifest.toml").write_text(text.replace(old, new, 1))
    with pytest.raises(TemplateProblem, match=named):
        load_template(folder)


def test_a_link_without_target_is_refused(tmp_path: Path) -> None:
    folder = copied(tmp_path, "test-pattern")
    graph = json.loads((folder / "graph.json").read_text())
    graph["save"]["inputs"]["images"] = ["gone", 0]
    (folder / "graph.json").write_text(json.dumps(graph))
    with pytest.raises(TemplateProblem, match="node 'save', input 'images' links to 'gone'"):
        load_template(folder)


def test_two_folders_with_one_id_are_refused_and_a_later_folder_replaces(tmp_path: Path) -> None:
    copied(tmp_path, "test-pattern")
    own = load_library(SHIPPED, tmp_path)
    assert own.get("test-pattern", Scene.IMAGE_GENERATE) is not None
    shutil.copytree(SHIPPED / "test-pattern", tmp_path / "again")
    with pytest.raises(TemplateProblem, match="both"):
        load_library(SHIPPED, tmp_path)


# Against a server

INFO: dict[str, Any] = {
    "EmptyImage": {
        "input": {
            "required": {
                "width": ["INT", {"min": 1, "max": 1000}],
                "height": ["INT", {}],
                "batch_size": ["INT", {}],
                "color": ["INT", {}],
            }
        },
        "output": ["IMAGE"],
    },
    "ImageInvert": {"input": {"required": {"image": ["IMAGE"]}}, "output": ["IMAGE"]},
    "ImageScale": {
        "input": {
            "required": {
                "image": ["IMAGE"],
                "upscale_method": [["bicubic", "area"]],
                "width": ["INT", {}],
                "height": ["INT", {}],
                "crop": ["COMBO", {"options": ["disabled", "center"]}],
            }
        },
        "output": ["IMAGE"],
    },
    "SaveImage": {
        "input": {"required": {"images": ["LATENT"], "filename_prefix": ["STRING", {}], "quality": ["INT", {}]}},
        "output": [],
    },
}


def test_problems_on_a_server_name_node_and_input() -> None:
    graph = rendered("test-pattern")
    problems = graph_problems(graph.graph, INFO, graph.result_nodes)
    assert problems == [
        "node 'ground' (EmptyImage), input 'width': 1024 is not between 1 and 1000",
        "node 'inner' (ImageScale), input 'upscale_method': 'nearest-exact' is not a choice of this server; "
        "it has bicubic, area",
        "node 'pattern' (ImageCompositeMasked): this server has no such node type; "
        "install the custom nodes that provide it",
        "node 'save' (SaveImage), input 'quality': missing",
    ]


def test_a_link_of_the_wrong_type_is_reported() -> None:
    graph = {
        "a": {"class_type": "EmptyImage", "inputs": {"width": 1, "height": 1, "batch_size": 1, "color": 0}},
        "b": {"class_type": "SaveImage", "inputs": {"images": ["a", 0], "filename_prefix": "x", "quality": 1}},
    }
    assert graph_problems(graph, INFO, ["b"]) == [
        "node 'b' (SaveImage), input 'images': takes LATENT, but node 'a' (EmptyImage) gives IMAGE"
    ]


def test_the_installed_model_that_fits_best_is_chosen() -> None:
    graph = {"c": {"class_type": "Loader", "inputs": {"ckpt_name": "any"}}}
    info = {"Loader": {"input": {"required": {"ckpt_name": [["tiny.safetensors", "SDXL_base.safetensors"]]}}}}
    choice = ModelChoice(node="c", input="ckpt_name", prefer=["*xl*", "*"])
    assert [name for _, name in chosen_models(graph, info, [choice], ["c"])] == ["SDXL_base.safetensors"]
    with pytest.raises(NoModel, match="no installed model fits flux"):
        chosen_models(graph, info, [choice.model_copy(update={"prefer": ["flux*"]})], ["c"])


def test_loras_are_a_chain_between_the_checkpoint_and_all_that_takes_it() -> None:
    loras = [{"model_path": f"s3://models/{n}", "strength": n / 2} for n in (1, 2)]
    found = rendered("text-to-image", loras=loras, extras={"hires_fix": True})
    graph = found.graph
    assert [(place.node, place.input, place.lora) for place in found.lora_inputs] == [
        ("lora-0", "lora_name", 0),
        ("lora-1", "lora_name", 1),
    ]
    assert graph["lora-0"]["inputs"]["model"] == ["checkpoint", 0]
    assert graph["lora-1"]["inputs"] == {
        **{"model": ["lora-0", 0], "clip": ["lora-0", 1], "lora_name": ""},
        **{"strength_model": 1.0, "strength_clip": 1.0},
    }
    for sampler in ("sampler", "hires"):
        assert graph[sampler]["inputs"]["model"] == ["lora-1", 0]
    for prompt in ("positive", "negative"):
        assert graph[prompt]["inputs"]["clip"] == ["lora-1", 1]
    assert graph["decode"]["inputs"]["vae"] == ["checkpoint", 2]
    assert {"lora-0", "lora-1", "checkpoint"} <= reachable(graph, ["save"])
    assert "lora-0" not in rendered("text-to-image").graph
    assert "lora-0" in rendered("image-to-image", loras=loras[:1], controls=[{"image_url": "x"}]).graph


def test_a_manifest_names_the_place_of_loras_and_their_number(tmp_path: Path) -> None:
    folder = copied(tmp_path, "text-to-image")
    manifest, graph_file = folder / "manifest.toml", folder / "graph.json"
    graph = json.loads(graph_file.read_text())
    graph["unet"] = {"class_type": "UNETLoader", "inputs": {}, "_meta": {"title": "Diffusion model"}}
    graph["sampler"]["inputs"]["model"] = ["unet", 0]
    graph["lora-0"] = graph.pop("larger")
    graph["hires"]["inputs"]["latent_image"] = ["lora-0", 0]
    graph_file.write_text(json.dumps(graph))
    shipped = manifest.read_text()
    manifest.write_text(shipped + '[loras]\nmodel = ["Diffusion model", 0]\nmost = 1\n')
    lora = {"model_path": "s3://models/1", "strength": 0.5}
    found: Any = load_template(folder).render(request("text-to-image", loras=[lora]), job_id="job-1")
    assert found.graph["lora-0"]["class_type"] == "LatentUpscaleBy", "no node of the graph is replaced"
    assert found.graph["lora-0-"] == {
        "class_type": "LoraLoaderModelOnly",
        "inputs": {"model": ["unet", 0], "lora_name": "", "strength_model": 0.5},
    }
    assert found.graph["sampler"]["inputs"]["model"] == ["lora-0-", 0]
    assert found.graph["hires"]["inputs"]["model"] == ["checkpoint", 0]
    with pytest.raises(RequestRefused, match="accepts at most 1, 2 given"):
        load_template(folder).render(request("text-to-image", loras=[lora, lora]), job_id="job-1")
    for place, problem in (
        ('model = ["Nowhere", 0]', "'Nowhere' is not in the graph"),
        ('model = ["Save image", 0]', "nothing in the graph takes the output"),
        ('clip = ["Checkpoint", 1]', "clip is given without model"),
        ("most = 9", "less than or equal to 8"),
    ):
        manifest.write_text(f"{shipped}[loras]\n{place}\n")
        with pytest.raises(TemplateProblem, match=problem):
            load_template(folder)


def test_a_template_without_one_checkpoint_takes_no_loras(tmp_path: Path) -> None:
    lora = {"model_path": "s3://models/1", "strength": 0.5}
    assert "'test-pattern' accepts none, 1 given" in refused("test-pattern", loras=[lora])
    folder = copied(tmp_path, "text-to-image")
    graph = json.loads((folder / "graph.json").read_text())
    (folder / "graph.json").write_text(json.dumps(graph | {"second": graph["checkpoint"] | {"_meta": {"title": "B"}}}))
    with pytest.raises(RequestRefused, match="accepts none"):
        load_template(folder).render(request("text-to-image", loras=[lora]), job_id="job-1")
