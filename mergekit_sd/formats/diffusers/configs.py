"""The configurations that diffusers wants beside its weights, read off the shapes of their tensors.

Owns those files' contents, for Stable Diffusion 1, 2 and XL. Must not know where they are written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeAlias

from mergekit_sd.errors import MissingTensors

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]  # by diffusers' names within a component
Config: TypeAlias = dict[str, Any]

VERSION = "0.42.0"  # of diffusers, whose form the files have
HEAD = 64  # channels of an attention head, but for SD1's UNet, which has 8 heads everywhere
SD1_HEADS = 8
POOLED = 1280
TIME_IDS = 6  # that SDXL's UNet is told beside it: the picture's original size, its crop, its size
SD2_TEXT_LAYERS = 23  # of 24: the last one's result is not used, and diffusers leaves it out

# The pipeline of each architecture.
PIPELINES: Mapping[str, str] = {
    "sd1": "StableDiffusionPipeline",
    "sd1-inpainting": "StableDiffusionInpaintPipeline",
    "sd1-pix2pix": "StableDiffusionInstructPix2PixPipeline",
    "sd2": "StableDiffusionPipeline",
    "sd2-inpainting": "StableDiffusionInpaintPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sdxl-inpainting": "StableDiffusionXLInpaintPipeline",
    "sdxl-pix2pix": "StableDiffusionXLInstructPix2PixPipeline",
}


def unet_config(shapes: Shapes, family: str, *, size: int, v: bool, pooled: int = POOLED) -> Config:
    """`unet/config.json`; `size`: of the latents, `pooled`: of the vector that SDXL's second text encoder gives.

    Raises MissingTensors for a UNet that lacks what tells it.
    """
    widths = [
        _shape(shapes, f"down_blocks.{n}.resnets.0.conv1.weight")[0] for n in range(_count(shapes, "down_blocks."))
    ]
    attention = [f"down_blocks.{n}.attentions.0.norm.weight" in shapes for n in range(len(widths))]
    depths = [max(1, _count(shapes, f"down_blocks.{n}.attentions.0.transformer_blocks.")) for n in range(len(widths))]
    depths[-1] = max(1, _count(shapes, "mid_block.attentions.0.transformer_blocks."))
    config = {
        **_written("UNet2DConditionModel"),
        "act_fn": "silu",
        "attention_head_dim": SD1_HEADS if family == "sd1" else [max(1, width // HEAD) for width in widths],
        "block_out_channels": widths,
        "center_input_sample": False,
        "cross_attention_dim": _shape(shapes, "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight")[1],
        "down_block_types": ["CrossAttnDownBlock2D" if each else "DownBlock2D" for each in attention],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": _shape(shapes, "conv_in.weight")[1],
        "layers_per_block": _count(shapes, "down_blocks.0.resnets."),
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "out_channels": _shape(shapes, "conv_out.weight")[0],
        "sample_size": size,
        "transformer_layers_per_block": depths,
        "up_block_types": ["CrossAttnUpBlock2D" if each else "UpBlock2D" for each in reversed(attention)],
        "use_linear_projection": len(_shape(shapes, "mid_block.attentions.0.proj_in.weight")) == 2,
    }
    if family == "sd2" and v:
        config["upcast_attention"] = True  # as SD 2.1's: its attention overflows in float16
    if family == "sdxl":
        inputs = _shape(shapes, "add_embedding.linear_1.weight")[1]
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": (inputs - pooled) // TIME_IDS,
            "projection_class_embeddings_input_dim": inputs,
        }
    return config


def vae_config(shapes: Shapes, family: str, *, size: int) -> Config:
    """`vae/config.json`; `size`: of the pictures."""
    levels = _count(shapes, "encoder.down_blocks.")
    widths = [_shape(shapes, f"encoder.down_blocks.{n}.resnets.0.conv1.weight")[0] for n in range(levels)]
    return {
        **_written("AutoencoderKL"),
        "act_fn": "silu",
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "force_upcast": family == "sdxl",  # SDXL's own overflows in float16
        "in_channels": _shape(shapes, "encoder.conv_in.weight")[1],
        "latent_channels": _shape(shapes, "decoder.conv_in.weight")[1],
        "layers_per_block": _count(shapes, "encoder.down_blocks.0.resnets."),
        "norm_num_groups": 32,
        "out_channels": _shape(shapes, "decoder.conv_out.weight")[0],
        "sample_size": size,
        "scaling_factor": 0.13025 if family == "sdxl" else 0.18215,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def text_config(shapes: Shapes, *, openclip: bool) -> Config:
    """`config.json` of a text encoder."""
    words, width = _shape(shapes, "text_model.embeddings.token_embedding.weight")
    projection = shapes.get("text_projection.weight")
    return {
        "architectures": ["CLIPTextModelWithProjection" if projection else "CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "dropout": 0.0,
        "eos_token_id": 2,  # stands for "the largest id": the published files' own
        "hidden_act": "gelu" if openclip else "quick_gelu",
        "hidden_size": width,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": _shape(shapes, "text_model.encoder.layers.0.mlp.fc1.weight")[0],
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": _shape(shapes, "text_model.embeddings.position_embedding.weight")[0],
        "model_type": "clip_text_model",
        "num_attention_heads": max(1, width // HEAD),
        "num_hidden_layers": _count(shapes, "text_model.encoder.layers."),
        "pad_token_id": 1,
        "projection_dim": projection[0] if projection else width,
        "vocab_size": words,
    }


def scheduler_config(family: str, *, v: bool, zero_snr: bool) -> Config:
    """`scheduler/scheduler_config.json`; `zero_snr`: trained with a schedule that ends in pure noise."""
    common = {
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction" if v else "epsilon",
        "steps_offset": 1,
        "timestep_spacing": "trailing" if zero_snr else "leading",
        "rescale_betas_zero_snr": zero_snr,
    }
    if family == "sdxl":
        return {**_written("EulerDiscreteScheduler"), **common}
    return {**_written("DDIMScheduler"), **common, "clip_sample": False, "set_alpha_to_one": False}


def model_index(architecture: str, text_classes: Mapping[str, str], scheduler: str) -> Config:
    """`model_index.json`. `text_classes`: of each text encoder, by its component."""
    index: Config = {
        **_written(PIPELINES[architecture]),
        "feature_extractor": [None, None],
        "scheduler": ["diffusers", scheduler],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    for component, name in text_classes.items():
        index[component] = ["transformers", name]
        index[component.replace("text_encoder", "tokenizer")] = ["transformers", "CLIPTokenizer"]
    if architecture.startswith("sdxl"):
        return {**index, "image_encoder": [None, None], "force_zeros_for_empty_prompt": True}
    return {**index, "safety_checker": [None, None], "requires_safety_checker": False}


def _written(name: str) -> Config:
    return {"_class_name": name, "_diffusers_version": VERSION}


def _shape(shapes: Shapes, name: str) -> tuple[int, ...]:
    found = shapes.get(name)
    if found is None:
        hint = "take a whole model: `mergekit-sd inspect` tells what is in it"
        raise MissingTensors("A tensor that tells the model's configuration is missing.", key=name, hint=hint)
    return found


def _count(shapes: Shapes, start: str) -> int:
    """How many numbers follow a beginning: layers, blocks."""
    found = re.compile(re.escape(start) + r"(\d+)\.")
    return len({match[1] for name in shapes if (match := found.match(name))})
