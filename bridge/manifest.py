"""`manifest.toml`: what a template offers, and which inputs of its graph a request sets.

    template_id = "text-to-image"       the id that requests name
    graph = "graph.json"                ComfyUI's API format ("Export (API)" in its menu), in the manifest's folder
    pool = "default"                    which GPU workers take its jobs
    results = ["Save image"]            the nodes whose files are the result
    keep_metadata = false               whether the files keep the graph that ComfyUI writes into them

    [inputs]                            request → graph inputs, "node.input"; a node by its id or its title
    prompt = ["Positive prompt.text"]

    [extras.mask]                       further values of a request: switches, numbers, choices, texts, files
    type = "mask"                       a file: image, mask, video or audio
    inputs = ["Load mask.image"]

    [resolutions.hd]                    seconds: expected run time; set: graph inputs
    seconds = 20
    set = { "Canvas.width" = 1024, "Canvas.height" = 1024 }

A value may be a link, `["node", output]`, so that an extra can bypass nodes: nodes that no result needs do not run.
Everything is checked when templates are loaded. Unknown names are refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, model_validator

from bridge.aspect_ratio import is_ratio
from comfyui_temporal.contracts.comfyui import Resolution, TaskPriority
from comfyui_temporal.contracts.fields import CallerId
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.size_budget import MAX_IMAGES, MAX_LORAS

Ref = Annotated[str, Field(min_length=3, pattern=r"^.+\..+$")]
"""`node.input`: the node's id or title, a dot, the input's name."""
Value = bool | int | float | str | list[JsonValue]
DEFAULT_POOL: Final = "default"
MAX_FILES: Final = 16
"""Files of one request, beside its control images."""


class ManifestModel(BaseModel):
    """Strict: a misspelt name in a manifest is refused, not ignored."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


def _ratio(text: str) -> str:
    if not is_ratio(text):
        raise ValueError(f"must be like '16:9', not {text!r}")
    return text


class Setting(ManifestModel):
    """Graph inputs with fixed values. `seconds_factor` multiplies the expected run time."""

    set: dict[Ref, Value] = {}
    seconds_factor: float = Field(default=1.0, gt=0)


class ResolutionSetting(ManifestModel):
    seconds: float = Field(gt=0, le=86_400)
    set: dict[Ref, Value] = {}


class SeedInput(ManifestModel):
    """`modulo`: for inputs with fewer than ComfyUI's 64 bits, e.g. a colour."""

    inputs: list[Ref] = Field(min_length=1)
    modulo: int = Field(default=2**64, gt=1, le=2**64)


class Inputs(ManifestModel):
    prompt: list[Ref] = []
    negative_prompt: list[Ref] = []
    seed: list[Ref] | SeedInput = []


class Strength(ManifestModel):
    """A control's strength (0 to 1, clamped) → a number between `at_0` and `at_1` in these inputs."""

    inputs: list[Ref] = Field(min_length=1)
    at_0: float = 0.0
    at_1: float = 1.0


class ControlSlot(ManifestModel):
    """One control image, in the order of the request's `controls`."""

    image: Ref
    kind: str | None = None
    """Accept only controls of this kind; default: any."""
    strength: Strength | None = None
    required: bool = True
    set: dict[Ref, Value] = {}
    """Applied if the control is given."""


class BooleanExtra(Setting):
    type: Literal["boolean"]
    """`set` applies if the value is true."""


class NumberExtra(Setting):
    """`set` applies if the extra is given, as for every type below."""

    type: Literal["integer", "number"]
    inputs: list[Ref] = Field(min_length=1)
    minimum: float
    maximum: float
    seconds_at: float | None = Field(default=None, gt=0)
    """The value at which the resolutions' `seconds` hold: the run time grows with the value."""

    @model_validator(mode="after")
    def _ordered(self) -> NumberExtra:
        if self.minimum > self.maximum:
            raise ValueError("minimum must not be above maximum")
        if self.seconds_at is not None and self.minimum <= 0:
            raise ValueError("seconds_at needs a minimum above 0")
        return self

    def factor_of(self, value: float) -> float:
        """What the run time is multiplied by."""
        return self.seconds_factor if self.seconds_at is None else self.seconds_factor * value / self.seconds_at


class ChoiceExtra(Setting):
    type: Literal["choice"]
    inputs: list[Ref] = []
    choices: list[str] = Field(min_length=1)


class AspectRatioExtra(Setting):
    """`16:9`: sets width and height, with about as many pixels as the resolution has."""

    type: Literal["aspect_ratio"]
    width: list[Ref] = Field(min_length=1)
    height: list[Ref] = Field(min_length=1)
    choices: list[Annotated[str, AfterValidator(_ratio)]] = Field(min_length=1)
    multiple: int = Field(default=64, ge=1, le=512)
    """Pixels: both sides are multiples of it."""

    @property
    def inputs(self) -> list[Ref]:
        return [*self.width, *self.height]


class TextExtra(Setting):
    type: Literal["text"]
    inputs: list[Ref] = Field(min_length=1)
    max_length: int = Field(default=200, ge=1, le=4_096)


class FileExtra(Setting):
    """A file: its address, as that of a control image, or an upload's. Of a mask the picture is taken.

    The inputs are those of loaders (`LoadImage.image`, `LoadVideo.file`, `LoadAudio.audio`); they get its name on the
    server. Without the file a loader must not be needed: let `set` link to it.
    """

    type: Literal["image", "mask", "video", "audio"]
    inputs: list[Ref] = Field(min_length=1)
    required: bool = False


Extra = Annotated[
    BooleanExtra | NumberExtra | ChoiceExtra | AspectRatioExtra | TextExtra | FileExtra, Field(discriminator="type")
]


class ImagesPlace(ManifestModel):
    """Graph inputs that say how many images one run makes (`batch_size`). Without them a job makes one."""

    inputs: list[Ref] = []
    most: int = Field(default=MAX_IMAGES, ge=1, le=MAX_IMAGES)
    seconds_factor: float = Field(default=1.0, gt=0)
    """Run time of each image after the first, as a share of the first one's."""

    @property
    def limit(self) -> int:
        return self.most if self.inputs else 1


class Model(ManifestModel):
    """A graph input that names a model: the first installed one that fits `prefer` (shell patterns, best first)."""

    input: Ref
    prefer: list[str] = Field(min_length=1)


class LoraPlace(ManifestModel):
    """Where LoRAs go: a chain of loaders between these outputs and all that takes them.

    Default: those of the graph's checkpoint loader, if it has one and no more.
    """

    model: list[JsonValue] = []
    """The output that gives the model: `["node", 0]`."""
    clip: list[JsonValue] = []
    """The output that gives the text encoder; without it LoRAs change the model alone."""
    most: int = Field(default=MAX_LORAS, ge=0, le=MAX_LORAS)
    """0: the template takes none."""

    @model_validator(mode="after")
    def _has_model(self) -> LoraPlace:
        if self.clip and not self.model:
            raise ValueError("clip is given without model")
        return self


class TrainingInputs(ManifestModel):
    """Which graph inputs a training sets (scene `model.train`)."""

    folder: list[Ref] = Field(min_length=1)
    """The dataset's folder, below ComfyUI's input folder."""
    steps: list[Ref] = Field(min_length=1)
    """Steps of one chunk."""
    batch_size: list[Ref] = []
    learning_rate: list[Ref] = []
    existing_lora: list[Ref] = Field(min_length=1)
    lora_prefix: list[Ref] = Field(min_length=1)
    """`SaveLoRA`'s prefix. Its file is not in the history, so it is fetched by name."""
    seed: list[Ref] = []
    hyperparameters: dict[str, list[Ref]] = {}
    """Other hyperparameters → inputs, passed on unchanged."""

    def refs(self) -> Iterable[tuple[str, list[str]]]:
        """(place in the manifest, graph inputs that it names)."""
        for name in ("folder", "steps", "batch_size", "learning_rate", "existing_lora", "lora_prefix", "seed"):
            yield f"training.inputs.{name}", getattr(self, name)
        for name, refs in self.hyperparameters.items():
            yield f"training.inputs.hyperparameters.{name}", refs


class Training(ManifestModel):
    inputs: TrainingInputs
    base_models: dict[str, list[str]] = Field(min_length=1)
    """`base_model` → patterns of model files, best first."""
    base_model_input: Ref
    seconds_per_image: float = Field(default=1.0, gt=0)
    """Expected time of one image in one step, until it was measured."""
    checkpoints: int = Field(default=10, ge=1, le=1_000)
    """The most chunks. Each ends with an epoch and writes a checkpoint."""


def _not_reserved(extras: dict[str, Extra]) -> dict[str, Extra]:
    for name in extras:
        if name in ("seed", "negative_prompt"):
            raise ValueError(f"{name!r} belongs under [inputs]")
    if sum(isinstance(extra, FileExtra) for extra in extras.values()) > MAX_FILES:
        raise ValueError(f"at most {MAX_FILES} of them may be files")
    return extras


class Manifest(ManifestModel):
    template_id: CallerId
    summary: str = ""
    scene: Scene = Scene.IMAGE_GENERATE
    graph: str = "graph.json"
    pool: CallerId = DEFAULT_POOL
    results: list[str] = []
    """Node ids or titles."""
    keep_metadata: bool = False
    """Leave in the results what ComfyUI writes into them: the whole graph, with the prompt."""
    inputs: Inputs = Inputs()
    images: ImagesPlace = ImagesPlace()
    resolutions: dict[Resolution, ResolutionSetting] = {}
    priorities: dict[TaskPriority, Setting] = {}
    controls: list[ControlSlot] = []
    extras: Annotated[dict[str, Extra], AfterValidator(_not_reserved)] = {}
    models: list[Model] = []
    loras: LoraPlace = LoraPlace()
    training: Training | None = None

    @model_validator(mode="after")
    def _is_complete(self) -> Manifest:
        if self.scene is Scene.MODEL_TRAIN:
            if self.training is None or len(self.results) != 1:
                raise ValueError("a template of scene model.train needs [training], and one node in results")
            return self
        if not self.results:
            raise ValueError("results: at least one node whose files are the result")
        if set(self.resolutions) != set(Resolution):
            missing = sorted(set(Resolution) - set(self.resolutions))
            raise ValueError(f"resolutions: {', '.join(missing)} missing; all of sd, hd and 4k are needed")
        return self

    def refs(self) -> Iterable[tuple[str, list[str]]]:
        """(place in the manifest, graph inputs that it names)."""
        inputs = self.inputs
        seed = inputs.seed.inputs if isinstance(inputs.seed, SeedInput) else inputs.seed
        yield from (
            ("inputs.prompt", inputs.prompt),
            ("inputs.negative_prompt", inputs.negative_prompt),
            ("inputs.seed", seed),
            ("images", self.images.inputs),
        )
        for number, slot in enumerate(self.controls):
            yield f"controls.{number}.image", [slot.image]
            if slot.strength is not None:
                yield f"controls.{number}.strength", slot.strength.inputs
        for name, extra in self.extras.items():
            if not isinstance(extra, BooleanExtra):
                yield f"extras.{name}", extra.inputs
        for number, model in enumerate(self.models):
            yield f"models.{number}", [model.input]
        if self.training is not None:
            yield from self.training.inputs.refs()
            yield "training.base_model_input", [self.training.base_model_input]

    def set_values(self) -> Iterable[tuple[str, Mapping[str, Any]]]:
        """(place in the manifest, values that it puts into graph inputs)."""
        for resolution, chosen in self.resolutions.items():
            yield f"resolutions.{resolution}", chosen.set
        settings: dict[str, Setting] = {f"priorities.{name}": setting for name, setting in self.priorities.items()}
        settings |= {f"extras.{name}": extra for name, extra in self.extras.items()}
        for where, setting in settings.items():
            yield where, setting.set
        for number, slot in enumerate(self.controls):
            yield f"controls.{number}", slot.set
