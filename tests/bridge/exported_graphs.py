"""Graphs as ComfyUI exports them (API format): numbers as ids, its own titles, links to constants."""

from __future__ import annotations

from typing import Any, Final

from tests.bridge.template_folders import Json, node

SAMPLING: Final[Json] = {"cfg": 8, "sampler_name": "euler", "scheduler": "normal", "denoise": 1}
CHECKPOINT: Final = "v1-5-pruned-emaonly-fp16.safetensors"


def default_graph() -> Json:
    """The graph that a new ComfyUI shows."""
    links = {"model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}
    return {
        "3": node("KSampler", "KSampler", seed=156680208700286, steps=20, **SAMPLING, **links),
        "4": node("CheckpointLoaderSimple", "Load Checkpoint", ckpt_name=CHECKPOINT),
        "5": node("EmptyLatentImage", "Empty Latent Image", width=512, height=768, batch_size=1),
        "6": node("CLIPTextEncode", "CLIP Text Encode (Prompt)", text="a bottle with a galaxy inside", clip=["4", 1]),
        "7": node("CLIPTextEncode", "CLIP Text Encode (Prompt)", text="text, watermark", clip=["4", 1]),
        "8": node("VAEDecode", "VAE Decode", samples=["3", 0], vae=["4", 2]),
        "9": node("SaveImage", "Save Image", filename_prefix="ComfyUI", images=["8", 0]),
    }


def flux_graph() -> Json:
    """Separate loaders, a guider without a negative prompt, and a size that stands in two constants."""
    sampling = {"noise": ["25", 0], "guider": ["22", 0], "sampler": ["16", 0], "sigmas": ["17", 0]}
    return {
        "12": node(
            "UNETLoader", "Load Diffusion Model", unet_name="flux/flux1-dev.safetensors", weight_dtype="default"
        ),
        "11": node(
            "DualCLIPLoader",
            "DualCLIPLoader",
            clip_name1="t5xxl_fp16.safetensors",
            clip_name2="clip_l.safetensors",
            type="flux",
        ),
        "10": node("VAELoader", "Load VAE", vae_name="ae.safetensors"),
        "34": node("PrimitiveInt", "width", value=1216),
        "35": node("PrimitiveInt", "height", value=832),
        "27": node("EmptySD3LatentImage", "EmptySD3LatentImage", width=["34", 0], height=["35", 0], batch_size=1),
        "30": node(
            "ModelSamplingFlux",
            "ModelSamplingFlux",
            max_shift=1.15,
            base_shift=0.5,
            width=["34", 0],
            height=["35", 0],
            model=["12", 0],
        ),
        "6": node("CLIPTextEncode", "CLIP Text Encode (Positive Prompt)", text="a fox", clip=["11", 0]),
        "26": node("FluxGuidance", "FluxGuidance", guidance=3.5, conditioning=["6", 0]),
        "22": node("BasicGuider", "BasicGuider", model=["30", 0], conditioning=["26", 0]),
        "16": node("KSamplerSelect", "KSamplerSelect", sampler_name="euler"),
        "17": node("BasicScheduler", "BasicScheduler", scheduler="simple", steps=20, denoise=1, model=["30", 0]),
        "25": node("RandomNoise", "RandomNoise", noise_seed=219670278747233),
        "13": node("SamplerCustomAdvanced", "SamplerCustomAdvanced", latent_image=["27", 0], **sampling),
        "8": node("VAEDecode", "VAE Decode", samples=["13", 0], vae=["10", 0]),
        "9": node("SaveImage", "Save Image", filename_prefix="ComfyUI", images=["8", 0]),
    }


def control_graph() -> Json:
    """A control net between the texts and the sampler, whose picture is made as large as the canvas."""
    graph = default_graph()
    graph["3"]["inputs"] |= {"positive": ["13", 0], "negative": ["13", 1]}
    return graph | {
        "10": node("LoadImage", "Load Image", image="pose.png"),
        "11": node("ControlNetLoader", "Load ControlNet Model", control_net_name="openpose.safetensors"),
        "12": node(
            "ImageScale",
            "Upscale Image",
            image=["10", 0],
            upscale_method="lanczos",
            width=512,
            height=768,
            crop="center",
        ),
        "13": node(
            "ControlNetApplyAdvanced",
            "Apply ControlNet",
            positive=["6", 0],
            negative=["7", 0],
            control_net=["11", 0],
            image=["12", 0],
            strength=0.8,
            start_percent=0,
            end_percent=1,
        ),
        "14": node("PreviewImage", "Preview Image", images=["12", 0]),
    }


def editors_graph() -> Json:
    """What ComfyUI saves for itself: it cannot be run over its API."""
    nodes: list[Any] = [{"id": 9, "type": "SaveImage", "pos": [1, 2], "widgets_values": ["ComfyUI"]}]
    return {"last_node_id": 9, "nodes": nodes, "links": [[1, 8, 0, 9, 0, "IMAGE"]], "version": 0.4}
