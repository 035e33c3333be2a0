"""Small random networks for the sampling tests, and what diffusers' pipelines make of them.

Imported only where diffusers is installed: `pytest.importorskip("diffusers")` comes first.
"""

from __future__ import annotations

import warnings

import diffusers
import diffusers_folders as small
import torch

from mergekit_sd.sampling.conditions import Condition, Guidance
from mergekit_sd.sampling.networks import Networks

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SIZE = (64, 32)  # wider than high: a swap of the two shows


def networks(family: str, prediction: str = "epsilon", *, channels: int = 4, zero_snr: bool = False) -> Networks:
    """Random modules of a family, the same at every call."""
    torch.manual_seed(len(family) + channels)
    made = small.components(family, channels=channels)
    for module in made.values():
        module.eval().requires_grad_(False)
    return Networks(
        architecture=family,
        family=family,
        prediction=prediction,
        zero_snr=zero_snr,
        unet=made["unet"],
        vae=made["vae"],
        text_encoders=tuple(module for name, module in made.items() if name.startswith("text")),
        size=SIZE,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


def condition(made: Networks, seed: int, tokens: int = 7) -> Condition:
    source = torch.Generator().manual_seed(seed)
    width = made.unet.config.cross_attention_dim
    pooled = torch.randn((1, small.TEXT), generator=source) if made.family == "sdxl" else None
    return Condition(torch.randn((1, tokens, width), generator=source), pooled)


def constant(positive: Condition, negative: Condition) -> Guidance:
    return Guidance(lambda step: [(positive, 1.0)], lambda step: negative)


def scheduler(name: str, prediction: str = "epsilon", **settings):
    """One of diffusers, set up by hand as its own documentation tells."""
    kind = {"epsilon": "epsilon", "v": "v_prediction"}[prediction]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy's, at how it is given tensors
        return getattr(diffusers, name)(**BETAS, prediction_type=kind, **settings)


def pipeline_latents(made: Networks, scheduling, positive, negative, *, steps, cfg, seeds, size=SIZE, **more):
    """What diffusers' own pipeline leaves for the VAE: one generator for each seed, which draws the first noise too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = _pipeline(made, scheduling, more.pop("controlnet", None))
        pipe.set_progress_bar_config(disable=True)
        count = len(seeds)
        texts = {
            "prompt_embeds": positive.context.expand(count, -1, -1),
            "negative_prompt_embeds": negative.context.expand(count, -1, -1),
        }
        if made.family == "sdxl":
            texts["pooled_prompt_embeds"] = positive.pooled.expand(count, -1)
            texts["negative_pooled_prompt_embeds"] = negative.pooled.expand(count, -1)
        return pipe(
            **texts,
            width=size[0],
            height=size[1],
            num_inference_steps=steps,
            guidance_scale=cfg,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="latent",
            **more,
        ).images


def _pipeline(made: Networks, scheduling, controlnet):
    parts = {"vae": made.vae, "unet": made.unet, "scheduler": scheduling}
    if made.family == "sdxl":
        encoders = {"text_encoder": made.text_encoders[0], "text_encoder_2": made.text_encoders[1]}
        return diffusers.StableDiffusionXLPipeline(
            **parts, **encoders, tokenizer=None, tokenizer_2=None, add_watermarker=False
        )
    parts |= {"text_encoder": made.text_encoders[0], "tokenizer": None, "feature_extractor": None}
    parts |= {"safety_checker": None, "requires_safety_checker": False}
    if controlnet is not None:
        return diffusers.StableDiffusionControlNetPipeline(**parts, controlnet=controlnet)
    return diffusers.StableDiffusionPipeline(**parts)
