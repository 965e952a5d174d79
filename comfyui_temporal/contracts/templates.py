"""What ComfyUI offers (contract §2, `GET /comfyui/v1/templates`), and what of it a tenant may see."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import Field

from comfyui_temporal.contracts.fields import CallerId, Informative, OutsideModel, OutsideName, OutsideText, OwnModel
from comfyui_temporal.contracts.permissions import Scene

TEMPLATE_LIST_WORKFLOW: Final = "TemplateListWorkflow"
TEMPLATE_LIST_PREFIX: Final = "templates-of-"
MAX_TEMPLATES: Final = 500
MAX_EACH: Final = 64
"""Of a template's extras, base models and so on."""

TemplatePoints = Annotated[int | None, Informative]
"""None where the price table has no price: requests with it are refused."""
Names = Annotated[list[OutsideName], Field(max_length=MAX_EACH)]


class TemplateExtra(OutsideModel):
    """One extra: `type` is `boolean`, `integer`, `number`, `choice` or `text`, or a kind of file: `image`, `mask`,
    `video` or `audio`. The limits are those of its type."""

    type: OutsideName
    points: TemplatePoints = None
    minimum: Annotated[float | None, Informative] = None
    maximum: Annotated[float | None, Informative] = None
    choices: Annotated[Names | None, Informative] = None
    max_length: Annotated[int | None, Informative] = None
    required: Annotated[bool | None, Informative] = None
    """Of a file: whether the template needs it."""


class TemplateControl(OutsideModel):
    """A control image, in the order of a request's `controls`. `kind` is null where any is taken."""

    kind: Annotated[OutsideName | None, Informative] = None
    required: bool = True
    strength: bool = False


class TemplatePrice(OutsideModel):
    """Of a resolution, with the image itself, or of a base model, beside the training itself."""

    points: TemplatePoints = None
    seconds: Annotated[float | None, Informative] = None
    """How long it usually takes on a GPU."""


class TemplateLoras(OutsideModel):
    """How many LoRAs a request may add, and what each costs."""

    most: int = 0
    points: TemplatePoints = None


class TemplateImages(OutsideModel):
    """How many images one request may ask for, each at the price of one."""

    most: int = 1


class TemplateView(OutsideModel):
    """A template as a tenant sees it: what a request may set, and what it costs in points."""

    template_id: CallerId
    summary: OutsideText = ""
    scene: Scene
    inputs: Annotated[dict[OutsideName, OutsideName], Field(max_length=MAX_EACH)] = {}
    """Name → type, beside extras and controls."""
    controls: Annotated[list[TemplateControl], Field(max_length=MAX_EACH)] = []
    extras: Annotated[dict[OutsideName, TemplateExtra], Field(max_length=MAX_EACH)] = {}
    loras: Annotated[TemplateLoras | None, Informative] = None
    images: Annotated[TemplateImages | None, Informative] = None
    resolutions: Annotated[dict[OutsideName, TemplatePrice], Field(max_length=MAX_EACH)] = {}
    base_models: Annotated[dict[OutsideName, TemplatePrice], Field(max_length=MAX_EACH)] = {}
    hyperparameters: Names = []
    points: TemplatePoints = None
    """Of a training, without base model and GPU hours."""
    accelerated_points: TemplatePoints = None
    points_per_gpu_hour: TemplatePoints = None
    included_gpu_hours: Annotated[float | None, Informative] = None
    is_available: bool = True
    """Whether a server can run it now."""


class TemplateServers(OutsideModel):
    """How many servers the template's pool has, and how many of them can run it."""

    total: int = 0
    fit: int = 0
    well: int = 0


class ListedTemplate(TemplateView):
    """A template as ComfyUI lists it."""

    servers: Annotated[TemplateServers | None, Informative] = None

    def for_tenants(self) -> TemplateView:
        """Without pool and servers: whether it can run is all that a tenant learns of them."""
        return TemplateView(
            **self.model_dump(exclude={"servers", "is_available"}),
            is_available=self.servers is None or self.servers.fit > 0,
        )


class TemplateQuestion(OwnModel):
    """Who asks: the service token of the call names them (contract §7)."""

    tenant_id: str
    user_id: str


class TemplateList(OwnModel):
    """What ComfyUI offers; null where it does not list its templates."""

    templates: Annotated[list[TemplateView], Field(max_length=MAX_TEMPLATES)] | None = None
