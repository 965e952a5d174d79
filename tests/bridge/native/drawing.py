"""The results of nodes (sizes and digests), and the files that output nodes write."""

from __future__ import annotations

import hashlib
import json
import re
import struct
import time
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

Json = dict[str, Any]
SIDE = 512
MOST_PIXELS_A_SIDE = 4096
_PICTURES = ("latent_image", "samples", "pixels", "images", "image")
"""Inputs whose size and number of pictures a node's output has."""


@dataclass(frozen=True)
class Value:
    """A node's output: the digest of everything upstream, size and number of pictures, and a text."""

    digest: str
    width: int = SIDE
    height: int = SIDE
    batch: int = 1
    text: str = ""
    steps: int = 0
    """Training steps in total, including those of the LoRA that is trained further."""


def value_of(node: Json, above: dict[str, Value], input_folder: Path) -> Value:
    """`above`: linked input name → linked value. Sizes are the node's own if it has them."""
    inputs = node["inputs"]
    own = {name: given for name, given in inputs.items() if name not in above and name != "filename_prefix"}
    signature = json.dumps(
        [node["class_type"], own, {name: value.digest for name, value in above.items()}], sort_keys=True
    )
    sized = next((above[name] for name in _PICTURES if name in above), next(iter(above.values()), Value("")))
    width, height = sized.width, sized.height
    if isinstance(inputs.get("width"), int) and isinstance(inputs.get("height"), int):
        width, height = inputs["width"] or width, inputs["height"] or height
    scale = float(inputs.get("scale_by") or 1.0) * (4 if node["class_type"] == "ImageUpscaleWithModel" else 1)
    if node["class_type"] in {"LoadImage", "LoadImageMask"}:
        raw = (input_folder / str(inputs["image"])).read_bytes()
        signature += hashlib.sha256(raw).hexdigest()
        with Image.open(BytesIO(raw)) as picture:
            width, height = picture.size
    texts = [str(inputs[name]) for name in ("text", "value", "string") if name in inputs and name not in above]
    batch = inputs.get("batch_size", inputs.get("amount", sized.batch))
    return Value(
        digest=hashlib.sha256(signature.encode()).hexdigest(),
        width=min(MOST_PIXELS_A_SIDE, round(width * scale)),
        height=min(MOST_PIXELS_A_SIDE, round(height * scale)),
        batch=batch if isinstance(batch, int) and node["class_type"] != "TrainLoraNode" else 1,
        text=texts[0] if texts else sized.text,
        steps=_steps_trained(inputs) if node["class_type"] == "TrainLoraNode" else 0,
    )


def _steps_trained(inputs: Json) -> int:
    """Read from the file's name, as in ComfyUI. Raises ValueError if the name has no steps."""
    before = str(inputs.get("existing_lora", "[None]"))
    steps = int(inputs.get("steps", 0))
    return (
        steps if before == "[None]" else steps + int(before.split("_steps_", maxsplit=1)[0].rsplit("_", maxsplit=1)[-1])
    )


def picture(digest: str, width: int, height: int, *, prompt: Json | None = None) -> bytes:
    """A PNG drawn from the digest. ComfyUI writes the graph into it, unless `--disable-metadata` is set."""
    colors = [tuple(bytes.fromhex(digest[start : start + 6])) for start in range(0, 48, 6)]
    canvas = Image.new("RGB", (64, 64), colors[0])
    pen = ImageDraw.Draw(canvas)
    for place, color in enumerate(colors[1:]):
        x, y = color[0] % 48, color[1] % 48
        (pen.ellipse if place % 2 else pen.rectangle)((x, y, x + 16, y + 16), fill=color)
    with BytesIO() as file:
        texts = PngInfo()
        if prompt is not None:
            texts.add_text("prompt", json.dumps(prompt))
        canvas.resize((width, height), Image.Resampling.NEAREST).save(file, "PNG", compress_level=1, pnginfo=texts)
        return file.getvalue()


def weights(digest: str) -> bytes:
    """A LoRA file: a valid safetensors file with one small tensor."""
    tensor = bytes.fromhex(digest) * 2
    name = "lora.up.weight"
    header = json.dumps({name: {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, len(tensor)]}}).encode()
    return struct.pack("<Q", len(header)) + header + tensor


class Saving:
    """The output, temp and input folders, with file names as `folder_paths.get_save_image_path` makes them."""

    def __init__(self, folder: Path) -> None:
        self.folders = {kind: folder / kind for kind in ("output", "temp", "input")}
        for path in self.folders.values():
            path.mkdir(parents=True, exist_ok=True)

    def save(self, kind: str, prefix: str, suffix: str, content: bytes, *, middle: str = "") -> Json:
        """Write a file under the next free number. Returns ComfyUI's entry. Raises ValueError outside the folder."""
        prefix = prefix.replace("%year%", time.strftime("%Y"))
        where = (self.folders[kind] / prefix).parent
        if not where.resolve().is_relative_to(self.folders[kind].resolve()):
            raise ValueError("Saving image outside the output folder is not allowed.")
        where.mkdir(parents=True, exist_ok=True)
        name = Path(prefix).name
        taken = [
            int(found[1])
            for path in where.iterdir()
            if (found := re.match(rf"{re.escape(name)}_(\d+)", path.name)) is not None
        ]
        file = where / f"{name}_{middle}{max(taken, default=0) + 1:05}_{suffix}"
        file.write_bytes(content)
        subfolder = str(Path(prefix).parent)
        return {"filename": file.name, "subfolder": "" if subfolder == "." else subfolder, "type": kind}

    def find(self, kind: str, subfolder: str, filename: str) -> Path | None:
        """A file that `/view` may return. Raises PermissionError if the subfolder leaves the root."""
        root = self.folders.get(kind)
        if root is None:
            return None
        where = (root / subfolder).resolve()
        if not where.is_relative_to(root.resolve()):
            raise PermissionError(subfolder)
        path = where / Path(filename).name
        return path if path.is_file() else None

    def has_input(self, name: str) -> bool:
        path = (self.folders["input"] / name).resolve()
        return path.is_relative_to(self.folders["input"].resolve()) and path.is_file()
