"""Small graphs of core nodes, in ComfyUI's API format."""

from __future__ import annotations

import uuid
from typing import Any

Json = dict[str, Any]


def new_prompt_id() -> str:
    return str(uuid.uuid4())


def plain(color: int = 255, width: int = 64, height: int = 48, prefix: str = "plain") -> Json:
    """Saves an empty picture. Needs no model."""
    return {
        "1": {
            "class_type": "EmptyImage",
            "inputs": {"width": width, "height": height, "batch_size": 1, "color": color},
        },
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": prefix}},
    }


def sampled(checkpoint: str = "sd.safetensors", seed: int = 1, steps: int = 5) -> Json:
    """Text to image, with `progress` for each step at node 5."""
    return {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": checkpoint}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "a harbour", "clip": ["1", 1]}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "", "clip": ["1", 1]}},
        "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "5": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["1", 0],
                "positive": ["2", 0],
                "negative": ["3", 0],
                "latent_image": ["4", 0],
                "seed": seed,
                "steps": steps,
                "cfg": 7.0,
                "sampler_name": "euler",
                "scheduler": "normal",
                "denoise": 1.0,
            },
        },
        "6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 2]}},
        "7": {"class_type": "SaveImage", "inputs": {"images": ["6", 0], "filename_prefix": "sampled"}},
    }


def training(
    existing: str,
    steps: int,
    *,
    folder: str = "cats",
    checkpoint: str = "sd.safetensors",
    prefix: str = "loras/mine",
) -> Json:
    """A chunk of LoRA training on a dataset folder, from an existing LoRA or from `[None]`."""
    options = {
        "batch_size": 1,
        "grad_accumulation_steps": 1,
        "steps": steps,
        "learning_rate": 0.0005,
        "rank": 8,
        "optimizer": "AdamW",
        "loss_function": "MSE",
        "seed": 0,
        "training_dtype": "fp32",
        "lora_dtype": "fp32",
        "algorithm": "LoRA",
        "gradient_checkpointing": False,
        "existing_lora": existing,
        "bucket_mode": False,
    }
    links = {"model": ["1", 0], "latents": ["3", 0], "positive": ["4", 0]}
    return {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": checkpoint}},
        "2": {"class_type": "LoadImageTextDataSetFromFolder", "inputs": {"folder": folder}},
        "3": {"class_type": "VAEEncode", "inputs": {"pixels": ["2", 0], "vae": ["1", 2]}},
        "4": {"class_type": "CLIPTextEncode", "inputs": {"text": ["2", 1], "clip": ["1", 1]}},
        "5": {"class_type": "TrainLoraNode", "inputs": options | links},
        "6": {
            "class_type": "SaveLoRA",
            "inputs": {"lora": ["5", 1], "prefix": prefix, "steps": ["5", 3]},
        },
    }
