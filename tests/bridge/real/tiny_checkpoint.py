"""Make a checkpoint that ComfyUI loads as Stable Diffusion 1.5: one level deep, random weights, 360 MB.

Run it with the server's own Python, which has torch and ComfyUI's modules:

    cd /path/to/ComfyUI && python /path/to/tests/bridge/real/tiny_checkpoint.py models/checkpoints/tiny.safetensors

Its pictures are noise and its LoRAs are useless, but every node of `text-to-image` and `lora-train` runs on a CPU.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

SHAPE: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [1],
    "channel_mult": [1],
    "transformer_depth": [1],
    "transformer_depth_output": [1, 1],
    "transformer_depth_middle": 1,
    "context_dim": 768,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "num_heads": 8,
    "num_head_channels": -1,
    "legacy": False,
}
"""ComfyUI recognises SD 1.5 by 320 channels and a context of 768, at any size (`supported_models.SD15`)."""


def main(target: Path) -> None:
    sys.path.insert(0, str(Path.cwd()))
    sys.argv = ["tiny_checkpoint", "--cpu"]
    importlib.import_module("comfy.options").enable_args_parsing()
    torch: Any = importlib.import_module("torch")
    unet = importlib.import_module("comfy.ldm.modules.diffusionmodules.openaimodel").UNetModel
    operations = importlib.import_module("comfy.ops").disable_weight_init
    vae = importlib.import_module("comfy.taesd.taesd").TAESD
    clip = importlib.import_module("comfy.sd1_clip").SDClipModel
    torch.manual_seed(0)
    parts = {
        "model.diffusion_model.": unet(**SHAPE, dtype=torch.float32, device="cpu", operations=operations),
        "first_stage_model.": vae(),
        "cond_stage_model.": clip(device="cpu", dtype=torch.float16),
    }
    weights = {
        prefix + name: _random(torch, name, tensor)
        for prefix, part in parts.items()
        for name, tensor in part.state_dict().items()
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    importlib.import_module("safetensors.torch").save_file(weights, str(target))


def _random(torch: Any, name: str, tensor: Any) -> Any:
    """Small random weights, norms of one, no biases: no value becomes infinite."""
    if not tensor.is_floating_point():
        return tensor
    if tensor.ndim <= 1:
        is_one = name.endswith("weight") or name in {"vae_scale", "logit_scale"}
        return torch.ones_like(tensor) if is_one else torch.zeros_like(tensor)
    return (torch.randn(tensor.shape) * 0.02).to(tensor.dtype).contiguous()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
