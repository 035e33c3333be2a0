"""Models in little, made by code: the names and ranks of an architecture, no size above 8, two text layers."""

from __future__ import annotations

import re

import torch
from safetensors.torch import save_file

from mergekit_sd import architectures

UNET = "model.diffusion_model."
VAE = "first_stage_model."
CLIP = "cond_stage_model.transformer."

_DEEP = re.compile(r"\.(layers|resblocks)\.(\d+)\.")


def small(name: str, seed: int = 0, *, only: str | None = None) -> dict[str, torch.Tensor]:
    """A float16 model of an architecture, or one component of it; its own values for each seed."""
    architecture = architectures.get(name)
    random = torch.Generator().manual_seed(seed)
    made: dict[str, torch.Tensor] = {}
    for key, spec in architecture.tensors.items():
        deep = _DEEP.search(key) if spec.component != "unet" else None
        if (only and spec.component != only) or (deep and int(deep[2]) > 1):
            continue
        shape = [min(size, 8) for size in spec.shape]
        if key == architecture.conv_in:
            shape[1] = spec.shape[1]
        made[key] = torch.randn(shape, generator=random).half()
    if architecture.position_ids in made:
        made[architecture.position_ids] = torch.arange(77)[None]
    return made


def bare(tensors, prefix):
    """One component out of a checkpoint, without its prefix."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def save(path, tensors, metadata=None):
    """The file's path, once written."""
    save_file(
        {key: value.clone(memory_format=torch.contiguous_format) for key, value in tensors.items()},
        str(path),
        metadata=metadata,
    )
    return path
