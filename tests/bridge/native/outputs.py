"""Results of output nodes: files in the output or temp folder, and the `ui` in history and events."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from tests.bridge.native.drawing import Saving, Value, picture, weights

Json = dict[str, Any]
TINY_MP4 = b"\x00\x00\x00\x18ftypmp42\x00\x00\x00\x00mp42isom"


def write_outputs(node: Json, above: dict[str, Value], saving: Saving, extras: Set[str]) -> Json:
    """Write the node's files. Returns its `ui` output, `{}` for a node that shows nothing (such as `SaveLoRA`)."""
    kind, inputs = node["class_type"], node["inputs"]
    value = next(iter(above.values()), Value("0" * 64))
    prefix = str(inputs.get("filename_prefix") or inputs.get("prefix") or "ComfyUI")
    if kind == "SaveLoRA":
        steps = inputs.get("steps")
        number = steps if isinstance(steps, int) else above["steps"].steps if "steps" in above else None
        middle = f"{number}_steps_" if number is not None else ""
        saving.save("output", prefix, ".safetensors", weights(value.digest), middle=middle)
        return {}
    if kind == "PreviewAny":
        return {"text": [value.text]}
    if kind in {"PreviewImage", "LossGraphNode"}:
        shown = {"animated": [False]} if kind == "LossGraphNode" else {}
        return {"images": _pictures(value, saving, "temp", f"ComfyUI_temp_{value.digest[:5]}")} | shown
    if kind in {"SaveAnimatedWEBP", "SaveAnimatedPNG", "SaveWEBM", "SaveVideo"}:
        suffix = {"SaveWEBM": ".webm", "SaveVideo": ".mp4", "SaveAnimatedPNG": ".png"}.get(kind, ".webp")
        return {"images": [saving.save("output", prefix, suffix, TINY_MP4)], "animated": [True]}
    ui: Json = {"images": _pictures(value, saving, "output", prefix, {"node": node})}
    return ui | _extras(value, saving, prefix, extras, ui["images"])


def _pictures(value: Value, saving: Saving, kind: str, prefix: str, prompt: Json | None = None) -> list[Json]:
    drawn = picture(value.digest, value.width, value.height, prompt=prompt)
    return [saving.save(kind, prefix, ".png", drawn) for _ in range(value.batch)]


def _extras(value: Value, saving: Saving, prefix: str, extras: Set[str], images: list[Json]) -> Json:
    """What custom nodes are known to add: other kinds of files, temp files among results, subfolders."""
    more: Json = {}
    if "temp" in extras:
        images += _pictures(value, saving, "temp", f"{prefix}_temp_abcde")
    if "subfolder" in extras:
        images += _pictures(value, saving, "output", f"deep/er/{prefix}")
    if "gifs" in extras:
        gif = saving.save("output", prefix, ".mp4", TINY_MP4)
        more["gifs"] = [gif | {"format": "video/h264-mp4", "frame_rate": 8.0}]
    if "audio" in extras:
        more["audio"] = [saving.save("output", f"audio/{prefix}", ".flac", b"fLaC\x00\x00\x00\x22")]
    if "text" in extras:
        more["text"] = [value.text or "a text"]
    return more
