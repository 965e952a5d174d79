"""Templates of one test: a graph and a manifest in a folder of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

Json = dict[str, Any]
RESOLUTIONS: Final = "".join(f"[resolutions.{name}]\nseconds = 2\n" for name in ("sd", "hd", "4k"))


def node(kind: str, title: str, **inputs: Any) -> Json:
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": title}}


def empty_image(title: str = "Ground", *, batch_size: int = 1, color: int = 255) -> Json:
    return node("EmptyImage", title, width=64, height=64, batch_size=batch_size, color=color)


def save(title: str, source: str) -> Json:
    return node("SaveImage", title, images=[source, 0], filename_prefix="x")


TWO_RESULTS: Final[Json] = {
    "1": empty_image(),
    "2": node("ImageInvert", "Inverted", image=["1", 0]),
    "8": save("First picture", "1"),
    "9": save("Second picture", "2"),
    "10": node("PreviewImage", "Shown", images=["1", 0]),
    "11": save("Unwanted", "2"),
}


def written(folder: Path, template_id: str, graph: Json, *, results: list[str], manifest: str = "") -> Path:
    """Write a template into its own folder below `folder`. `manifest` follows its first lines."""
    own = folder / template_id
    own.mkdir(parents=True)
    (own / "graph.json").write_text(json.dumps(graph))
    head = f'template_id = "{template_id}"\nresults = {json.dumps(results)}\n'
    (own / "manifest.toml").write_text(f"{head}{manifest}\n{RESOLUTIONS}")
    return own
