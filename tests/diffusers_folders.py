"""Small models made, saved and loaded by diffusers and transformers: true blocks of SD1, SD2, SDXL, few channels.

Imported only where both are installed: `pytest.importorskip("diffusers")` comes first.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

WIDTHS = (32, 64, 96, 96)  # multiples of the 32 groups of GroupNorm, and shortcuts wherever the real ones have them
TEXT = 64
DOWN = {True: "CrossAttnDownBlock2D", False: "DownBlock2D"}
UP = {True: "CrossAttnUpBlock2D", False: "UpBlock2D"}
PIPELINES = {"sd1": "StableDiffusionPipeline", "sd2": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}


def unet(family: str, channels: int = 4) -> UNet2DConditionModel:
    attention = [False, True, True] if family == "sdxl" else [True, True, True, False]
    options = {"use_linear_projection": family != "sd1"}
    if family == "sdxl":
        options |= {
            "transformer_layers_per_block": [1, 2, 10],
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": TEXT + 6 * 8,
        }
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=channels,
        block_out_channels=WIDTHS[: len(attention)],
        down_block_types=[DOWN[each] for each in attention],
        up_block_types=[UP[each] for each in reversed(attention)],
        cross_attention_dim=2 * TEXT if family == "sdxl" else TEXT,
        attention_head_dim=8 if family == "sd1" else 1,
        **options,
    )


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=WIDTHS,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=2,
    )


def text(kind=CLIPTextModel, activation: str = "quick_gelu", layers: int = 2, vocabulary: int = 100):
    return kind(
        CLIPTextConfig(
            hidden_size=TEXT,
            intermediate_size=2 * TEXT,
            num_attention_heads=1,
            num_hidden_layers=layers,
            projection_dim=TEXT,
            hidden_act=activation,
            vocab_size=vocabulary,
        )
    )


def components(family: str, **options) -> dict[str, torch.nn.Module]:
    """A model's components by their folders."""
    made = {"unet": unet(family, options.pop("channels", 4)), "vae": vae()}
    made["text_encoder"] = text(activation="gelu" if family == "sd2" else "quick_gelu", **options)
    if family == "sdxl":
        made["text_encoder_2"] = text(CLIPTextModelWithProjection, "gelu", **options)
    return made


def save(folder: Path, family: str, made: dict[str, torch.nn.Module], prediction: str = "epsilon", **saving) -> Path:
    """The components as diffusers saves them, with an index and a scheduler's configuration."""
    index = {"_class_name": PIPELINES[family], "scheduler": ["diffusers", "EulerDiscreteScheduler"]}
    for name, module in made.items():
        module.save_pretrained(folder / name, **saving)
        index[name] = ["transformers" if name.startswith("text") else "diffusers", type(module).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"prediction_type": prediction}))
    return folder
