"""Node classes as `/object_info` shows them, recorded from ComfyUI 0.8.0; the lists of files are this server's own."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Final

Json = dict[str, Any]
RECORDED: Final = Path(__file__).with_name("object_info.json")
PICTURES: Final = (".png", ".jpg", ".jpeg", ".webp")
MODEL_INPUTS: Final = {
    ("CheckpointLoaderSimple", "ckpt_name"): "checkpoints",
    ("UNETLoader", "unet_name"): "diffusion_models",
    ("CLIPLoader", "clip_name"): "text_encoders",
    ("DualCLIPLoader", "clip_name1"): "text_encoders",
    ("DualCLIPLoader", "clip_name2"): "text_encoders",
    ("VAELoader", "vae_name"): "vae",
    ("LoraLoader", "lora_name"): "loras",
    ("LoraLoaderModelOnly", "lora_name"): "loras",
    ("TrainLoraNode", "existing_lora"): "loras",
    ("ControlNetLoader", "control_net_name"): "controlnet",
    ("UpscaleModelLoader", "model_name"): "upscale_models",
}
"""Inputs whose choices are the model files of a folder."""


_SIZE: Final = {"min": 0, "max": 16384, "step": 1, "default": 512}
RESIZE: Final[Json] = {
    "input": {
        "required": {
            "input": ["IMAGE", {}],
            "resize_type": [
                "COMFY_DYNAMICCOMBO_V3",
                {
                    "options": [
                        {
                            "key": "scale dimensions",
                            "inputs": {"required": {"width": ["INT", _SIZE], "height": ["INT", _SIZE]}},
                        },
                        {
                            "key": "scale by multiplier",
                            "inputs": {"required": {"multiplier": ["FLOAT", {"min": 0.01}]}},
                        },
                    ]
                },
            ],
            "others": ["COMFY_AUTOGROW_V3", {"template": {"prefix": "image", "min": 1, "max": 5}}],
        }
    },
    "output": ["IMAGE"],
    "output_node": False,
    "name": "ResizeImageMaskNode",
}
"""A node of later versions, with inputs that bring others along, as their sources describe it; not recorded."""


@cache
def _recorded() -> Json:
    recorded: Json = json.loads(RECORDED.read_text())
    return recorded | {"ResizeImageMaskNode": RESIZE}


def model_folders() -> list[str]:
    """The answer to `GET /models`, for the folders known here."""
    return sorted(set(MODEL_INPUTS.values()))


class Definitions:
    """`/object_info` of a server with these folders. `models`: folder → file names that are offered."""

    def __init__(self, folder: Path) -> None:
        self._input = folder / "input"
        self._output = folder / "output"

    def all(self, models: dict[str, list[str]]) -> Json:
        return {name: self.of(name, models) for name in _recorded()}

    def known(self, node_class: str) -> bool:
        return node_class in _recorded()

    def is_output(self, node_class: str) -> bool:
        return bool(_recorded()[node_class]["output_node"])

    def of(self, node_class: str, models: dict[str, list[str]]) -> Json:
        """One class, with the choices of its file inputs filled in."""
        found: Json = copy.deepcopy(_recorded()[node_class])
        for group in ("required", "optional"):
            for name, given in found["input"].get(group, {}).items():
                choices = self._choices(node_class, name, models)
                if choices is None:
                    continue
                if isinstance(given[0], list):
                    given[0] = choices
                else:
                    given[1]["options"] = choices
        return found

    def files(self, folder: str, models: dict[str, list[str]]) -> list[str]:
        """Model files of a folder, including LoRAs saved below `output/loras`, as in ComfyUI."""
        saved = self._output / folder
        return sorted({*models.get(folder, []), *_relative_files(saved, (".safetensors",))})

    def _choices(self, node_class: str, name: str, models: dict[str, list[str]]) -> list[str] | None:
        if (folder := MODEL_INPUTS.get((node_class, name))) is not None:
            return self.files(folder, models) + (["[None]"] if node_class == "TrainLoraNode" else [])
        if (node_class, name) in {("LoadImage", "image"), ("LoadImageMask", "image")}:
            return sorted(path.name for path in self._input.glob("*") if path.suffix.lower() in PICTURES)
        if name == "folder" and node_class.startswith("LoadImage"):
            return sorted(str(path.relative_to(self._input)) for path in self._input.rglob("*") if path.is_dir())
        return None


def _relative_files(folder: Path, suffixes: tuple[str, ...]) -> Iterator[str]:
    for path in folder.rglob("*") if folder.exists() else ():
        if path.suffix.lower() in suffixes:
            yield str(path.relative_to(folder))
