"""What a ControlNet file holds: whose names it has, and which family it steers.

Owns the telling marks of its names. Reads no values.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mergekit_sd.formats.tensor import ModelFile
from mergekit_sd.inspection.adapters import CONTEXTS

_STYLES = (
    ("lllite", re.compile(r"^lllite_")),
    ("control-lora", re.compile(r"^lora_controlnet$")),
    ("diffusers", re.compile(r"(^|\.)(controlnet_cond_embedding|controlnet_down_blocks)\.")),
    ("ldm", re.compile(r"(^|\.)(zero_convs|input_hint_block)\.|^control_model\.")),
)
# ControlLoRA splits weights into `.down` (rank, in) and `.up`; LLLite's layers have names of their own.
_CONTEXT = re.compile(r"attn2[._]to_k\.(weight|down)$")
_RANK = re.compile(r"attn[12]\.to_[qkv]\.down$")
_LLLITE_SDXL = re.compile(r"transformer_blocks_[1-9]")


@dataclass(frozen=True, slots=True)
class ControlNet:
    """A ControlNet. `rank` is a ControlLoRA's; `checkpoint` says that a whole model lies in the file besides."""

    style: str | None
    family: str | None
    rank: int | None
    checkpoint: bool

    def as_json(self) -> dict[str, object]:
        """One flat object."""
        return {"style": self.style, "family": self.family, "rank": self.rank, "checkpoint": self.checkpoint}


def controlnet_of(model: ModelFile) -> ControlNet:
    """What the names and shapes say."""
    tensors = model.tensors
    style = next((style for style, mark in _STYLES if any(map(mark.search, tensors))), None)
    contexts = [each.shape for name, each in tensors.items() if _CONTEXT.search(name) and len(each.shape) == 2]
    family = CONTEXTS.get(contexts[0][1]) if contexts else None
    if style == "lllite" and any(map(_LLLITE_SDXL.search, tensors)):
        family = "sdxl"
    ranks = (each.shape[0] for name, each in tensors.items() if _RANK.search(name) and each.shape)
    return ControlNet(
        style, family, next(ranks, None), any(name.startswith("model.diffusion_model.") for name in tensors)
    )
