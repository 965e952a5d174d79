"""The demo's dataset: `make up` and `make demo` make it, so that a training can be started after either."""

from __future__ import annotations

from pathlib import Path
from typing import Final

_PICTURES: Final = 6
_PIXELS: Final = 96
NAME: Final = "demo-cats"


def demo_dataset(run_folder: Path, tenant_id: str) -> Path:
    """The tenant's dataset below the stack's folder; made if it is not there."""
    return make_dataset(run_folder / "datasets" / tenant_id / NAME)


def make_dataset(folder: Path) -> Path:
    """A few captioned pictures, generated: the same bytes each time."""
    from PIL import Image, ImageDraw  # other commands start faster without it

    folder.mkdir(parents=True, exist_ok=True)
    for n in range(_PICTURES):
        picture = Image.new("RGB", (_PIXELS, _PIXELS), (40 * n, 90, 200 - 30 * n))
        ImageDraw.Draw(picture).ellipse((10 + 4 * n, 20, 60 + 4 * n, 70), fill=(240, 200, 40 * n))
        picture.save(folder / f"cat-{n}.png")
        (folder / f"cat-{n}.txt").write_text(f"a cat, number {n}\n", encoding="utf-8")
    return folder
