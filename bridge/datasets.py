"""What of a dataset is trained on, under which names, and what is left out.

ComfyUI reads PNG, JPEG and WebP of a folder and of the folders in it, and a picture's caption from the `.txt` of the
same name. Other pictures that Pillow reads (BMP, AVIF, TIFF, HEIC where `pillow-heif` is installed) are made PNG, and
`.caption` files `.txt`. Everything else is left out, and said to be before a price is confirmed.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Final

from PIL import Image, features

from comfyui_temporal.contracts.comfyui import DatasetFile
from comfyui_temporal.contracts.fields import shortened

NATIVE: Final = frozenset({".png", ".jpg", ".jpeg", ".webp"})
"""Pictures that ComfyUI's training nodes read."""
_HAS_HEIF: Final = importlib.util.find_spec("pillow_heif") is not None
CONVERTED: Final = frozenset({".bmp", ".tif", ".tiff"}).union(
    {".avif"} if features.check("avif") else (), {".heic", ".heif"} if _HAS_HEIF else ()
)
CAPTIONS: Final = (".txt", ".caption")
"""The better one first."""
HEAD_BYTES: Final = 32
MOST_NAMED: Final = 8
_HEADS: Final = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*", b"GIF8")


@dataclass(frozen=True)
class Placed:
    """A file, and where it goes in the server's folder. `is_converted`: as PNG."""

    file: DatasetFile
    target: str
    is_converted: bool = False


@dataclass
class Plan:
    """The files that are trained on, and for those that are not the reason → their paths."""

    pictures: list[Placed] = field(default_factory=list)
    captions: list[Placed] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    uncaptioned: int = 0

    @property
    def placed(self) -> list[Placed]:
        return [*self.pictures, *self.captions]

    def summary(self) -> str:
        """What a person reads before the price is confirmed."""
        pictures, captions = len(self.pictures), len(self.pictures) - self.uncaptioned
        text = f"Dataset: {_counted(pictures, 'picture')}, {captions} with a caption."
        if converted := sum(placed.is_converted for placed in self.pictures):
            text += f" {converted} of them are converted to PNG."
        for reason, paths in self.left_out.items():
            text += f" Left out, {reason}: {_counted(len(paths), 'file')} ({named(paths)})."
        return shortened(text, 1_000)

    def _leave_out(self, reason: str, path: str) -> None:
        self.left_out.setdefault(reason, []).append(path)


def plan_of(files: Iterable[DatasetFile]) -> Plan:
    """What is trained on. The same list gives the same plan."""
    plan = Plan()
    pictures: list[DatasetFile] = []
    captions: dict[str, dict[str, DatasetFile]] = {}
    for file in sorted(files, key=lambda file: file.path):
        path = PurePosixPath(file.path)
        suffix = path.suffix.lower()
        if suffix not in NATIVE | CONVERTED and suffix not in CAPTIONS:
            plan._leave_out("neither pictures that can be read nor captions", file.path)
        elif len(path.parts) > 2:
            plan._leave_out("in a folder within a folder", file.path)
        elif suffix in CAPTIONS:
            captions.setdefault(str(path.with_suffix("")), {}).setdefault(suffix, file)
        else:
            pictures.append(file)
    _place(plan, pictures, captions)
    return plan


def _place(plan: Plan, pictures: Sequence[DatasetFile], captions: dict[str, dict[str, DatasetFile]]) -> None:
    stems = {str(PurePosixPath(file.path).with_suffix("")) for file in pictures}
    taken = {file.path for file in pictures if PurePosixPath(file.path).suffix.lower() in NATIVE}
    captioned: set[str] = set()
    for file in pictures:
        path = PurePosixPath(file.path)
        stem, target = str(path.with_suffix("")), file.path
        own_stem = stem
        if path.suffix.lower() in CONVERTED:
            # A picture of this name and another kind has the name already.
            own_stem = stem if f"{stem}.png" not in taken else f"{stem}-{path.suffix[1:].lower()}"
            target = f"{own_stem}.png"
            taken.add(target)
        plan.pictures.append(Placed(file, target, is_converted=target != file.path))
        caption = next((captions[stem][kind] for kind in CAPTIONS if kind in captions.get(stem, {})), None)
        if caption is None:
            plan.uncaptioned += 1
        elif own_stem not in captioned:
            captioned.add(own_stem)
            plan.captions.append(Placed(caption, f"{own_stem}.txt"))
    for stem, found in captions.items():
        used = next(kind for kind in CAPTIONS if kind in found)
        for kind, file in found.items():
            if stem not in stems:
                plan._leave_out("captions without a picture of their name", file.path)
            elif kind != used:
                plan._leave_out(f"captions beside one in {used}", file.path)


def named(paths: Sequence[str]) -> str:
    """The first of them, and how many follow."""
    more = len(paths) - MOST_NAMED
    return ", ".join(paths[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def looks_like_a_picture(head: bytes) -> bool:
    """Whether a file begins as pictures do, of whatever kind: names are often wrong, and readers look inside.

    A picture that breaks off later is found when it is read.
    """
    is_box = head[4:8] == b"ftyp" or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
    return is_box or head.startswith(_HEADS)


class CorruptPicture(ValueError):
    """A picture cannot be read."""


def read_picture(content: bytes, *, as_png: bool) -> bytes:
    """The picture, read to its end; `as_png`: converted. Raises CorruptPicture."""
    if _HAS_HEIF:
        import pillow_heif  # type: ignore[import-not-found,unused-ignore]

        pillow_heif.register_heif_opener()
    try:
        with Image.open(io.BytesIO(content)) as picture:
            picture.load()
            if not as_png:
                return content
            file = io.BytesIO()
            has_alpha = "A" in picture.getbands() or "transparency" in picture.info
            picture.convert("RGBA" if has_alpha else "RGB").save(file, "PNG")
            return file.getvalue()
    except Exception as error:
        # Each of Pillow's readers raises what it likes for content that is not what it seems.
        raise CorruptPicture(str(error)) from None
