"""`GET /comfyui/v1/templates` (ours): what this simulator takes, as the bridge lists it."""

from __future__ import annotations

from typing import Any, Final

from comfyui_temporal.contracts.comfyui import Resolution
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.prices import PriceTable
from comfyui_temporal.contracts.size_budget import MAX_IMAGES, MAX_LORAS
from proof.simulators.jobs import IMAGE_POOL, IMAGE_TEMPLATES
from proof.simulators.trainings import DEFAULT_GPU

_SUMMARIES: Final = {
    "text-to-image": "A picture of a prompt.",
    "image-to-image": "A picture of a prompt and of another picture.",
    "upscale": "A larger picture of a picture.",
    "test-pattern": "A picture without a model.",
}
_NEEDS_AN_IMAGE: Final = frozenset({"image-to-image", "upscale"})
_TAKES_LORAS: Final = frozenset({"text-to-image", "image-to-image"})
_SECONDS: Final = 20.0
_SWITCH: Final[dict[str, Any]] = {"type": "boolean"}
_KINDS: Final[dict[str, dict[str, Any]]] = {
    "steps": {"type": "integer", "minimum": 1, "maximum": 60},
    "aspect_ratio": {"type": "choice", "choices": ["1:1", "3:2", "2:3", "16:9", "9:16"]},
}


def listed(prices: PriceTable, gpus: dict[str, int]) -> list[dict[str, Any]]:
    images = [_image(name, prices) | _servers(IMAGE_POOL, gpus) for name in IMAGE_TEMPLATES]
    return [*images, _training(prices) | _servers(DEFAULT_GPU, gpus)]


def _image(template_id: str, prices: PriceTable) -> dict[str, Any]:
    def points(resolution: Resolution) -> int:
        return prices.image(resolution=resolution.value, accelerated=False, extras={})

    slot = {"kind": None, "required": True, "strength": False}
    return {
        "template_id": template_id,
        "summary": _SUMMARIES[template_id],
        "scene": Scene.IMAGE_GENERATE.value,
        "inputs": {"prompt": "text", "negative_prompt": "text", "seed": "integer"},
        "controls": [slot] if template_id in _NEEDS_AN_IMAGE else [],
        "extras": {name: _KINDS.get(name, _SWITCH) | {"points": price} for name, price in prices.extras.items()},
        "images": {"most": MAX_IMAGES},
        "loras": {"most": MAX_LORAS if template_id in _TAKES_LORAS else 0, "points": prices.lora},
        "resolutions": {name.value: {"seconds": _SECONDS, "points": points(name)} for name in Resolution},
        "accelerated_points": prices.image_accelerated,
    }


def _training(prices: PriceTable) -> dict[str, Any]:
    return {
        "template_id": "lora-train",
        "summary": "Trains a LoRA on a dataset.",
        "scene": Scene.MODEL_TRAIN.value,
        "base_models": {name: {"points": price} for name, price in prices.base_models.items()},
        "hyperparameters": ["batch_size", "epochs", "learning_rate"],
        "points": prices.training_base,
        "accelerated_points": prices.training_accelerated,
        "points_per_gpu_hour": prices.points_per_gpu_hour,
        "included_gpu_hours": prices.included_gpu_hours,
    }


def _servers(pool: str, gpus: dict[str, int]) -> dict[str, Any]:
    total = gpus.get(pool, 0)
    return {"pool": pool, "servers": {"total": total, "fit": total, "well": total}}
