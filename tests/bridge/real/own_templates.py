"""Templates for these tests: what the shipped ones cannot show on a CPU within seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

SLOW: Final = "slow-pattern"
"""Needs no model and takes seconds: many blurs, so that a run can be stopped in between."""
BAD: Final = "bad-pattern"
"""ComfyUI refuses it: a width of 0."""
TINY: Final = "tiny-picture"
"""Text to image of 64 pixels in two steps, with any checkpoint."""
BLURS: Final = 12
SLOW_SIDES: Final = {"sd": 256, "hd": 512, "4k": 512}


def write_templates(folder: Path) -> None:
    """Write the templates below `folder`, a template folder of the bridge."""
    slow = "".join(
        _resolution(name, 10, f'{{ "ground.width" = {side}, "ground.height" = {side} }}')
        for name, side in SLOW_SIDES.items()
    )
    _write(folder, SLOW, _slow_graph(), f'[inputs.seed]\ninputs = ["ground.color"]\nmodulo = 0x1000000\n{slow}')
    plain = "".join(_resolution(name, 5, "{}") for name in SLOW_SIDES)
    _write(folder, BAD, _bad_graph(), plain)
    inputs = '[inputs]\nprompt = ["prompt.text"]\nseed = ["sampler.seed"]\n'
    model = '[[models]]\ninput = "checkpoint.ckpt_name"\nprefer = ["tiny*", "*"]\n'
    several = '[images]\ninputs = ["canvas.batch_size"]\n'
    steps = '[extras.steps]\ntype = "integer"\ninputs = ["sampler.steps"]\nminimum = 1\nmaximum = 4\nseconds_at = 2\n'
    ratio = '[extras.aspect_ratio]\ntype = "aspect_ratio"\nwidth = ["canvas.width"]\nheight = ["canvas.height"]\n'
    shapes = 'choices = ["1:1", "4:1"]\nmultiple = 16\n'
    _write(folder, TINY, _tiny_graph(), inputs + several + model + plain + steps + ratio + shapes)


def _resolution(name: str, seconds: int, values: str) -> str:
    return f"[resolutions.{name}]\nseconds = {seconds}\nset = {values}\n"


def _write(folder: Path, template_id: str, graph: dict[str, Any], manifest: str) -> None:
    where = folder / template_id
    where.mkdir(parents=True)
    (where / "graph.json").write_text(json.dumps(graph))
    (where / "manifest.toml").write_text(f'template_id = "{template_id}"\nresults = ["save"]\n{manifest}')


def _node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def _slow_graph() -> dict[str, Any]:
    graph = {"ground": _node("EmptyImage", width=64, height=64, batch_size=1, color=0)}
    above = "ground"
    for number in range(BLURS):
        name = f"blur-{number}"
        graph[name] = _node("ImageBlur", image=[above, 0], blur_radius=31, sigma=10.0)
        above = name
    return graph | {"save": _node("SaveImage", images=[above, 0], filename_prefix="conformance/slow")}


def _bad_graph() -> dict[str, Any]:
    return {
        "ground": _node("EmptyImage", width=0, height=64, batch_size=1, color=0),
        "save": _node("SaveImage", images=["ground", 0], filename_prefix="conformance/bad"),
    }


def _tiny_graph() -> dict[str, Any]:
    sampling = {"steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0, "seed": 0}
    links = {
        "model": ["checkpoint", 0],
        "positive": ["prompt", 0],
        "negative": ["prompt", 0],
        "latent_image": ["canvas", 0],
    }
    return {
        "checkpoint": _node("CheckpointLoaderSimple", ckpt_name="none"),
        "prompt": _node("CLIPTextEncode", text="", clip=["checkpoint", 1]),
        "canvas": _node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "sampler": _node("KSampler", **sampling, **links),
        "decode": _node("VAEDecode", samples=["sampler", 0], vae=["checkpoint", 2]),
        "save": _node("SaveImage", images=["decode", 0], filename_prefix="conformance/tiny"),
    }
