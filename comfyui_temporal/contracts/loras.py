"""The models that an image uses (contract §8): of the tenant's own trainings, or at an allowed address."""

from __future__ import annotations

from typing import Annotated, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from comfyui_temporal.contracts.fields import CallerId, CallerModel, CallerText, Sha256, without_blanks
from comfyui_temporal.contracts.size_budget import MAX_LORAS


def _https_address(address: str) -> str:
    try:
        parts = urlsplit(address)
    except ValueError:
        parts = None
    if parts is None or parts.scheme != "https" or not parts.hostname or "@" in parts.netloc:
        raise ValueError("must be an https:// address without credentials")
    return without_blanks(address)


_ModelUrl = Annotated[CallerText, Field(min_length=1, max_length=2048), AfterValidator(_https_address)]


def _is_none(value: object) -> bool:
    return value is None


class Lora(CallerModel):
    """A model and how strongly it steers the result: one that a training of the same tenant has made (`model_id`), or
    a safetensors file at an address that the ComfyUI service allows (`model_url`, with its checksum)."""

    model_id: Annotated[CallerId | None, Field(exclude_if=_is_none)] = None
    """The task id of the training. It must have completed."""
    model_url: Annotated[_ModelUrl | None, Field(exclude_if=_is_none)] = None
    sha256: Annotated[Sha256 | None, Field(exclude_if=_is_none)] = None
    """Of the file at `model_url`."""
    strength: Annotated[float, Field(ge=0, le=2)] = 1.0

    @model_validator(mode="after")
    def _names_one(self) -> Self:
        if (self.model_id is None) == (self.model_url is None):
            raise ValueError("must have either model_id or model_url")
        if (self.model_url is None) != (self.sha256 is None):
            raise ValueError("must have sha256 with model_url, and not with model_id")
        return self


def no_such_model(model_id: str) -> str:
    """The same words whether there is no such training, it has not completed, or another tenant has it."""
    return f"this tenant has no completed training {model_id}"


def _each_once(loras: list[Lora]) -> list[Lora]:
    if len({lora.model_id or lora.sha256 for lora in loras}) < len(loras):
        raise ValueError("must not name a model twice")
    return loras


Loras = Annotated[
    list[Lora], Field(max_length=MAX_LORAS, exclude_if=lambda loras: not loras), AfterValidator(_each_once)
]
"""An empty list is not sent: a worker that does not know the field takes the task all the same."""
