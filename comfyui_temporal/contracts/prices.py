"""The price table (contract §5). Pure arithmetic on whole points; the table is the worker's configuration."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any, Final

from pydantic import Field

from comfyui_temporal.contracts.fields import OwnModel

FREE_EXTRAS: Final = frozenset({"seed", "negative_prompt"})
LORAS: Final = "loras"
"""The name under which LoRAs are among the extras of an estimate."""
IMAGES: Final = "images"
"""The name under which all images but the first are among the extras of an estimate."""


class UnknownPrice(ValueError):
    """The table has no price for an extra or a base model: `input_invalid` for the caller."""

    def __init__(self, field: str, name: str, known: list[str]) -> None:
        self.field = field
        super().__init__(f"{field}: {name!r} is not offered; use one of {', '.join(sorted(known)) or 'none'}")


class PriceTable(OwnModel):
    """Prices in points. `extras` and `base_models` are what the platform offers beyond the base price."""

    image_base: int = Field(default=18, ge=0)
    resolutions: dict[str, int] = {"sd": 0, "hd": 6, "4k": 14}
    image_accelerated: int = Field(default=12, ge=0)
    extras: dict[str, int] = {"hires_fix": 8, "upscaler": 6, "steps": 0, "aspect_ratio": 0}
    lora: int = Field(default=0, ge=0)
    """Points of each LoRA that an image uses."""
    training_base: int = Field(default=120, ge=0)
    base_models: dict[str, int] = {"base": 0, "sdxl": 30, "flux": 60}
    training_accelerated: int = Field(default=40, ge=0)
    included_gpu_hours: float = Field(default=1.0, ge=0)
    points_per_gpu_hour: int = Field(default=60, ge=0)

    def points_of_extras(self, extras: dict[str, Any], *, loras: int = 0) -> dict[str, int]:
        """Name → points of the extras and LoRAs that cost something (contract §4 `extras`, §5).

        Raises UnknownPrice for a name that is not in the table.
        """
        points: dict[str, int] = {}
        for name, value in extras.items():
            if name in FREE_EXTRAS:
                continue
            if name not in self.extras:
                raise UnknownPrice("extras", name, [*self.extras, *FREE_EXTRAS])
            if self.extras[name] and value is not None and value is not False:
                points[name] = self.extras[name]
        if loras and self.lora:
            points[LORAS] = points.get(LORAS, 0) + loras * self.lora
        return points

    def image(
        self, *, resolution: str, accelerated: bool, extras: dict[str, Any], loras: int = 0, images: int = 1
    ) -> int:
        """Price of `images` images in points; `loras`: how many each uses. Raises UnknownPrice."""
        of_one = (
            self.image_base
            + self.resolutions[resolution]
            + (self.image_accelerated if accelerated else 0)
            + sum(self.points_of_extras(extras, loras=loras).values())
        )
        return images * of_one

    def points_of_order(
        self, *, resolution: str, accelerated: bool, extras: dict[str, Any], loras: int = 0, images: int = 1
    ) -> dict[str, int]:
        """`extras` of an estimate for images: they add up to `image` beside one image's base price.

        Raises UnknownPrice.
        """
        points = self.points_of_extras(extras, loras=loras)
        if images > 1:
            of_one = self.image(resolution=resolution, accelerated=accelerated, extras=extras, loras=loras)
            points[IMAGES] = points.get(IMAGES, 0) + (images - 1) * of_one
        return points

    def check_base_model(self, base_model: str) -> None:
        """Raise UnknownPrice for a base model that is not in the table."""
        if base_model not in self.base_models:
            raise UnknownPrice("base_model", base_model, list(self.base_models))

    def training(self, *, base_model: str, accelerated: bool, gpu_hours: float) -> int:
        """Price of a training that uses `gpu_hours`, in points. Raises UnknownPrice."""
        self.check_base_model(base_model)
        # A sum of hours over attempts has floating-point noise: it must not cost a point.
        hours = Decimal(str(round(gpu_hours, 6)))
        billed = max(Decimal(0), hours - Decimal(str(self.included_gpu_hours)))
        return (
            self.training_base
            + self.base_models[base_model]
            + (self.training_accelerated if accelerated else 0)
            + math.ceil(billed * self.points_per_gpu_hour)
        )
