"""What a graph's inputs are for, read from its wiring: what a template's manifest says of them.

Nothing is guessed. Where the wiring leaves a choice, it is a question for whoever knows the graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

from bridge.graph_check import MODEL_INPUTS
from bridge.graph_texts import TEXTS, Encoders
from bridge.graph_wiring import Held, Place, Wiring
from bridge.graphs import is_link
from bridge.lora_chain import CHECKPOINT_LOADERS, LoraChain, Output
from comfyui_temporal.contracts.comfyui import Resolution
from comfyui_temporal.contracts.uploads import InputKind

SEEDS: Final = ("seed", "noise_seed")
WIDE_SEEDS: Final = frozenset({"KSampler", "KSamplerAdvanced", "SamplerCustom", "RandomNoise", "ImageAddNoise"})
"""Node types whose seeds have 64 bits."""
MOST_SEED: Final = 2**64 - 1
MOST_CONSTANT: Final = 2**63 - 1
"""The largest number that a constant of ComfyUI's holds."""
NARROW_SEED: Final = 2**31 - 1
"""The most that a node type that is not known takes for sure."""
SIDES: Final = {Resolution.SD: 512, Resolution.HD: 1024, Resolution.UHD: 2048}
"""Of a square picture of each resolution."""
STEP: Final = 64
"""Sides are multiples of it: every model takes those."""
NEAR: Final = 4 / 3
"""A graph's own size that is nearer than this to a resolution's is kept as it is."""
WIDEST: Final = 3_200
"""Pixels that a side may have at the largest resolution in the narrowest shape."""
KEEPS_BATCH: Final = frozenset(
    {
        *("KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced", "VAEDecode", "VAEDecodeTiled"),
        *("LatentUpscale", "LatentUpscaleBy", "VAEEncode", "VAEEncodeTiled", "ImageUpscaleWithModel", "ImageScale"),
        *("ImageScaleBy", "ImageScaleToTotalPixels", "ImageSharpen", "ImageBlur", "SaveImage"),
    }
)
"""Node types that give as many pictures as they take."""
PICTURES: Final = frozenset({"LoadImage", "LoadImageMask"})
FILE_LOADERS: Final = {"LoadAudio": ("audio", InputKind.AUDIO), "LoadVideo": ("file", InputKind.VIDEO)}
"""Node type → the input that names a file, and its kind."""
MODEL_FILES: Final = (".safetensors", ".sft", ".ckpt", ".pt", ".pt2", ".pth", ".bin", ".gguf", ".onnx")
MEDIA_FILES: Final = (
    ".png",
    ".jpg",
    ".jpeg",
    ".webp",
    ".gif",
    ".mp4",
    ".webm",
    ".mov",
    ".wav",
    ".mp3",
    ".flac",
    ".ogg",
)
_IMAGES: Final = ("samples", "latent", "latent_image", "pixels", "image", "images")
_SIZES: Final = ("width", "height")


@dataclass(frozen=True)
class Picture:
    """A control image. `strength`: that of the one control net that it goes to."""

    place: Place
    strength: Held | None = None


@dataclass
class Roles:
    """Graph inputs by what they are for. `questions`: part of the manifest → what is left to decide there."""

    prompt: list[Place] = field(default_factory=list)
    negative_prompt: list[Place] = field(default_factory=list)
    seeds: list[Place] = field(default_factory=list)
    most_seed: int = MOST_SEED
    steps: Held | None = None
    most_steps: int = 0
    sizes: dict[Resolution, dict[Place, int]] = field(default_factory=dict)
    widths: list[Place] = field(default_factory=list)
    """Empty where the proportions cannot be chosen."""
    heights: list[Place] = field(default_factory=list)
    images: Place | None = None
    """How many pictures one run makes."""
    is_video: bool = False
    pictures: list[Picture] = field(default_factory=list)
    files: list[tuple[InputKind, Place]] = field(default_factory=list)
    """Sounds and films that a request gives."""
    models: list[Held] = field(default_factory=list)
    lora_model: Output | None = None
    """Where LoRAs go, if that is not the graph's only checkpoint loader."""
    lora_clip: Output | None = None
    takes_loras: bool = True
    questions: dict[str, list[str]] = field(default_factory=dict)

    def ask(self, part: str, question: str) -> None:
        self.questions.setdefault(part, []).append(question)


def roles_of(wiring: Wiring) -> Roles:
    """Read a graph's roles."""
    roles = Roles()
    finders: tuple[Callable[[Wiring, Roles], None], ...] = (
        *(_find_texts, _find_seeds, _find_steps, _find_sizes, _find_files, _find_models, _find_loras, _find_images),
    )
    for find in finders:
        find(wiring, roles)
    return roles


def _find_texts(wiring: Wiring, roles: Roles) -> None:
    positive, negative = Encoders(wiring, "positive"), Encoders(wiring, "negative")
    if positive.is_found:
        roles.prompt = [text.place for text in positive.all_texts()]
    elif positive.texts:
        texts = ", ".join(f"{wiring.shown(text.place[0])} {text.place[1]}" for text in positive.all_texts())
        roles.ask(
            "inputs", f"different texts reach the samplers: {texts}. Name under `prompt` those that a request sets."
        )
    elif positive.lost:
        names = ", ".join(wiring.shown(node) for node in positive.lost)
        roles.ask(
            "inputs", f"the prompt is not a text of the graph at {names}. Name under `prompt` what a request sets."
        )
    elif unused := [place for place in _inputs_named(wiring, TEXTS) if place not in negative.places]:
        names = ", ".join(f"{wiring.shown(node)} {name}" for node, name in unused)
        roles.ask("inputs", f"no sampler shows which text is the prompt: {names}. Name it under `prompt`.")
    else:
        roles.ask("inputs", "nothing in this graph takes a prompt: a request's prompt changes nothing.")
    taken = {text.place for text in positive.all_texts()}
    others = [text.place for text in negative.all_texts() if text.place not in taken]
    if others and negative.is_found:
        roles.negative_prompt = others
    elif others or negative.lost:
        roles.ask("inputs", "what keeps things out of the picture is not one text. Name it under `negative_prompt`.")


def _find_seeds(wiring: Wiring, roles: Roles) -> None:
    for node, name in _inputs_named(wiring, SEEDS):
        held = wiring.source(node, name)
        if held is None or not held.is_whole or not wiring.serves_only(held.place, SEEDS):
            roles.ask("inputs", f"the seed of {wiring.shown(node)} is computed. Name under `seed` what a request sets.")
            continue
        usual = MOST_SEED if wiring.kind(node) in WIDE_SEEDS else NARROW_SEED
        most = wiring.most(node, name) or usual
        if held.place != (node, name):
            most = min(most, wiring.most(*held.place) or MOST_CONSTANT)
        if most < 2:
            continue
        if held.place not in roles.seeds:
            roles.seeds.append(held.place)
        roles.most_seed = min(roles.most_seed, most)


def _find_steps(wiring: Wiring, roles: Roles) -> None:
    named = _inputs_named(wiring, ("steps",))
    if not named:
        return
    found = [(node, held) for node, _ in named if (held := wiring.source(node, "steps")) and held.is_whole]
    is_split = any(_is_part_of_the_steps(wiring, node) for node, _ in named)
    held = found[0][1] if len(found) == len(named) and len({held.place for _, held in found}) == 1 else None
    if held is None or is_split or held.value < 1 or not wiring.serves_only(held.place, ("steps",)):
        names = ", ".join(wiring.shown(node) for node, _ in named)
        roles.ask("extras", f"the steps are set at {names}. Add an extra if requests are to choose them.")
        return
    limits = [most for node, _ in found if (most := wiring.most(node, "steps"))]
    roles.steps, roles.most_steps = held, min([2 * held.value, *limits])


def _is_part_of_the_steps(wiring: Wiring, node: str) -> bool:
    """Whether a sampler runs some of its steps only: another number of them would move where the next begins."""
    inputs = wiring.inputs(node)
    first, last, steps = (inputs.get(name) for name in ("start_at_step", "end_at_step", "steps"))
    is_late = first is not None and first != 0
    return is_late or (last is not None and not (isinstance(last, int) and isinstance(steps, int) and last >= steps))


def _find_sizes(wiring: Wiring, roles: Roles) -> None:
    canvases, is_whole = _canvases(wiring)
    roles.is_video = any("video" in wiring.kind(node).lower() for node in wiring.needed) or any(
        "length" in wiring.inputs(node) for node in canvases
    )
    found = {node: size for node in wiring.needed if (size := _size_of(wiring, node))}
    known = {found[node] for node in canvases if node in found}
    size = next(iter(known)) if len(known) == 1 and is_whole else None
    after = [node for node in found if node not in canvases and wiring.are_above(node) & set(canvases)]
    resized = [node for node in after if found[node] != size]
    if size is None or resized or roles.is_video:
        named = ", ".join(f"{wiring.shown(node)} {found[node][0]} x {found[node][1]}" for node in [*canvases, *resized])
        what = f"sizes are set at {named}" if named else "no node sets the size in a way that is known here"
        more = "a larger video may be too much for a GPU; " if roles.is_video else ""
        roles.ask(
            "resolutions", f"{what}; {more}sd, hd and 4k make the same. Say under `set` what each of them changes."
        )
        return
    same = [node for node, own in found.items() if own == size]
    for resolution, side in SIDES.items():
        widths, heights = _sides(wiring, same)
        width, height = _scaled(size, side)
        roles.sizes[resolution] = dict.fromkeys(widths, width) | dict.fromkeys(heights, height)
    limits = [most for node in same for name in _SIZES if (most := wiring.most(node, name)) is not None]
    if not set(widths) & set(heights) and min([WIDEST, *limits]) == WIDEST:
        roles.widths, roles.heights = widths, heights
    _check_limits(roles, limits)


def _canvases(wiring: Wiring) -> tuple[list[str], bool]:
    """The nodes in which the samplers' sizes stand, and whether each sampler has one. Without samplers: empty ones."""
    samplers = [node for node in wiring.needed if is_link(wiring.inputs(node).get("latent_image"))]
    if not samplers:
        empty = [node for node in wiring.needed if wiring.kind(node).startswith("Empty") and _size_of(wiring, node)]
        return empty, bool(empty)
    found = [_canvas_of(wiring, wiring.inputs(node)["latent_image"][0]) for node in samplers]
    return list(dict.fromkeys(node for node in found if node)), all(found)


def _canvas_of(wiring: Wiring, node: str) -> str | None:
    """The first node on the way of a picture up from here that has a size of its own."""
    seen: set[str] = set()
    while node not in seen:
        seen.add(node)
        if _size_of(wiring, node):
            return node
        links = [value for name in _IMAGES if is_link(value := wiring.inputs(node).get(name))]
        if not links:
            return None
        node = links[0][0]
    return None


def _size_of(wiring: Wiring, node: str) -> tuple[int, int] | None:
    sides = [wiring.source(node, name) for name in _SIZES]
    for side in sides:
        if side is None or not side.is_whole or side.value < 1:
            return None
        if not all(any(size in name for size in _SIZES) for _, name in _takers_of(wiring, side)):
            return None
    assert sides[0] is not None and sides[1] is not None
    return sides[0].value, sides[1].value


def _takers_of(wiring: Wiring, held: Held) -> list[Place]:
    return wiring.takers(held.place[0]) if held.place[1] == "value" else []


def _scaled(size: tuple[int, int], side: int) -> tuple[int, int]:
    """A size of about as many pixels as a square of this side, in the same proportions."""
    times = side / math.sqrt(size[0] * size[1])
    if 1 / NEAR <= times**2 <= NEAR:
        return size
    width, height = (max(STEP, round(length * times / STEP) * STEP) for length in size)
    return width, height


def _sides(wiring: Wiring, nodes: Iterable[str]) -> tuple[list[Place], list[Place]]:
    """Where the nodes' widths stand, and where their heights do."""
    widths, heights = (
        [held.place for node in nodes if (held := wiring.source(node, name)) is not None] for name in _SIZES
    )
    return list(dict.fromkeys(widths)), list(dict.fromkeys(heights))


def _check_limits(roles: Roles, limits: Iterable[int]) -> None:
    """Leave out what the server would refuse."""
    least = min(limits, default=None)
    for resolution, places in roles.sizes.items():
        if least is not None and max(places.values()) > least:
            places.clear()
            roles.ask(
                "resolutions", f"{resolution.value} is larger than a node takes. Say under `set` what it changes."
            )


def _find_files(wiring: Wiring, roles: Roles) -> None:
    pictures = [
        node
        for node in wiring.needed
        if wiring.kind(node) in PICTURES and isinstance(wiring.inputs(node).get("image"), str)
    ]
    roles.pictures = [Picture((node, "image"), _strength_of(wiring, node, pictures)) for node in pictures]
    roles.files = [
        (kind, (node, name))
        for node in wiring.needed
        for name, kind in [FILE_LOADERS.get(wiring.kind(node), ("", InputKind.IMAGE))]
        if isinstance(wiring.inputs(node).get(name), str)
    ]
    given = {(node, "image") for node in pictures} | {place for _, place in roles.files}
    for node in wiring.needed:
        for name, value in wiring.inputs(node).items():
            if (node, name) in given or not isinstance(value, str):
                continue
            if value.lower().split(" [")[0].endswith(MEDIA_FILES):
                roles.ask(
                    "controls",
                    f"{wiring.shown(node)} reads {value!r} itself ({name}), and no request can replace it: each server "
                    "needs that file.",
                )


def _strength_of(wiring: Wiring, picture: str, pictures: Iterable[str]) -> Held | None:
    """The strength of the control net that this picture goes to, if that is one, and takes no other picture."""
    nets = []
    for node in wiring.needed:
        image = wiring.inputs(node).get("image")
        if wiring.kind(node).startswith("ControlNetApply") and is_link(image):
            above = wiring.are_above(image[0])
            if picture in above:
                nets.append((node, sum(other in above for other in pictures)))
    if len(nets) != 1 or nets[0][1] != 1:
        return None
    held = wiring.source(nets[0][0], "strength")
    is_number = held is not None and isinstance(held.value, int | float) and not isinstance(held.value, bool)
    return held if held is not None and is_number and held.value > 0 and held.place[1] == "strength" else None


def _find_models(wiring: Wiring, roles: Roles) -> None:
    for node in wiring.needed:
        for name, value in wiring.inputs(node).items():
            if not isinstance(value, str) or not value.lower().endswith(MODEL_FILES):
                continue
            is_list = wiring.is_list_of_files(node, name)
            if is_list or (is_list is None and name in MODEL_INPUTS):
                roles.models.append(Held((node, name), value))


def _find_loras(wiring: Wiring, roles: Roles) -> None:
    graph = wiring.graph
    diffusion = [node for node in wiring.needed if "unet_name" in wiring.inputs(node)]
    chains = [LoraChain((node, 0), None) for node in diffusion]
    chains += [LoraChain((node, 0), (node, 1)) for node in graph if wiring.kind(node) in CHECKPOINT_LOADERS]
    used = [chain for chain in chains if chain.is_used(graph)]
    if used == [LoraChain.of_checkpoint(graph)]:
        return
    if len(used) != 1:
        roles.takes_loras = False
        if used:
            names = ", ".join(wiring.shown(chain.model[0]) for chain in used)
            roles.ask(
                "loras", f"it takes none, because there are several models: {names}. Name the one that LoRAs change."
            )
        return
    roles.lora_model, roles.lora_clip = used[0].model, used[0].clip
    clips = [
        node for node in wiring.needed if wiring.kind(node) in ("CLIPLoader", "DualCLIPLoader", "TripleCLIPLoader")
    ]
    if roles.lora_clip is None and len(clips) == 1:
        roles.lora_clip = (clips[0], 0)


def _find_images(wiring: Wiring, roles: Roles) -> None:
    canvases, _ = _canvases(wiring)
    for canvas in [node for node in canvases if wiring.kind(node).startswith("Empty")]:
        held = wiring.source(canvas, "batch_size")
        if held is None or not held.is_whole:
            continue
        after = [node for node in wiring.needed if node != canvas and canvas in wiring.are_above(node)]
        is_kept = all(wiring.kind(node) in KEEPS_BATCH for node in after) and len(wiring.results) == 1
        is_alone = len(canvases) == 1 and wiring.serves_only(held.place, ("batch_size",))
        if is_kept and is_alone and not roles.is_video:
            roles.images = held.place
        elif held.value > 1:
            shown = wiring.shown(canvas)
            roles.ask(
                "results", f"{shown} makes {held.value} at once, for the price of one. Say under [images] what does."
            )


def _inputs_named(wiring: Wiring, names: Iterable[str]) -> list[Place]:
    return [(node, name) for node in wiring.needed for name in names if name in wiring.inputs(node)]
