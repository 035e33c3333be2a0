"""What diffusers calls the tensors that checkpoints know by LDM's names, and the other way round.

Owns the two spellings, as textual rules: the numbers in a name say all that there is to know, so no
architecture is needed, and a model of other widths or depths goes the same way. Names are those
within a component, without its prefix.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeAlias

# A UNet, a VAE, a text encoder as transformers has it (SD1, SDXL's first), one as OpenCLIP has it (SD2, SDXL's second).
Part: TypeAlias = Literal["unet", "vae", "clip", "openclip"]


@dataclass(frozen=True, slots=True)
class Twin:
    """A tensor's other name.

    `rows` = (index, of): the named tensor is that equal share of the other's rows, for the query, key and
    value rows that OpenCLIP keeps in one. `transposed`: the one is the other's transpose.
    """

    name: str
    rows: tuple[int, int] | None = None
    transposed: bool = False


def to_diffusers(part: Part, name: str) -> tuple[Twin, ...]:
    """Diffusers' tensors that an LDM tensor is made of: one, three for fused rows, none for a name we do not know."""
    return _TO_DIFFUSERS[part](name)


def to_ldm(part: Part, names: Collection[str]) -> dict[str, Twin]:
    """The LDM tensors that diffusers' tensors of one component are, or whose rows they are; unknown names are left out.

    All names of the component at once: where an upsampler lies depends on what is beside it.
    """
    found = ((name, _TO_LDM[part](name, names)) for name in names)
    return {name: twin for name, twin in found if twin is not None}


# --- UNet --------------------------------------------------------------------------------------------------

_UNET_TOPS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
_LDM_BLOCK = re.compile(r"(input_blocks|output_blocks)\.(\d+)\.(\d+)\.(.+)")
_LDM_MIDDLE = re.compile(r"middle_block\.([012])\.(.+)")
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)")
_SAMPLER = re.compile(r"(down|up)_blocks\.(\d+)\.(?:down|up)samplers\.0\.conv\.(.+)")
_MID = re.compile(r"mid_block\.(resnets\.[01]|attentions\.0)\.(.+)")


def _unet_to_diffusers(name: str) -> tuple[Twin, ...]:
    found = _renamed(name, _UNET_TOPS) or _unet_block(name)
    return (Twin(found),) if found else ()


def _unet_block(name: str) -> str | None:
    if middle := _LDM_MIDDLE.fullmatch(name):
        return _in_block("mid_block." + _MIDDLE[middle[1]], middle[2], resnet=middle[1] != "1", known=_RESNET)
    block = _LDM_BLOCK.fullmatch(name)
    if block is None:
        return None
    side, number, slot, rest = block[1], int(block[2]), block[3], block[4]
    if side == "input_blocks":
        level, place = divmod(number - 1, 3)
        if rest.startswith("op."):
            return f"down_blocks.{level}.downsamplers.0.conv.{rest[3:]}" if place == 2 and slot == "0" else None
        start = f"down_blocks.{level}"
    else:
        level, place = divmod(number, 3)
        if rest.startswith("conv.") and slot in "12":
            return f"up_blocks.{level}.upsamplers.0.conv.{rest[5:]}" if place == 2 else None
        start = f"up_blocks.{level}"
    if slot not in "01" or number - (side == "input_blocks") < 0 or (side == "input_blocks" and place == 2):
        return None
    inner = "resnets" if slot == "0" else "attentions"
    return _in_block(f"{start}.{inner}.{place}", rest, resnet=slot == "0", known=_RESNET)


def _in_block(start: str, rest: str, *, resnet: bool, known: Mapping[str, str]) -> str | None:
    """A name in a block: the parts of a residual block have other names, those of attention the same."""
    inner = _renamed(rest, known) if resnet else rest
    return f"{start}.{inner}" if inner else None


def _unet_to_ldm(name: str, names: Collection[str]) -> Twin | None:
    found = _renamed(name, _swapped("unet")) or _unet_block_to_ldm(name, names)
    return Twin(found) if found else None


def _unet_block_to_ldm(name: str, names: Collection[str]) -> str | None:
    known = _swapped("resnet")
    if middle := _MID.fullmatch(name):
        slot = _swapped("middle")[middle[1]]
        return _in_block(f"middle_block.{slot}", middle[2], resnet=slot != "1", known=known)
    if sampler := _SAMPLER.fullmatch(name):
        level, last = int(sampler[2]), 3 * int(sampler[2]) + 2
        if sampler[1] == "down":
            return f"input_blocks.{last + 1}.0.op.{sampler[3]}"
        attention = any(each.startswith(f"up_blocks.{level}.attentions.") for each in names)
        return f"output_blocks.{last}.{2 if attention else 1}.conv.{sampler[3]}"
    block = _BLOCK.fullmatch(name)
    if block is None:
        return None
    number = 3 * int(block[2]) + int(block[4])
    start = f"input_blocks.{number + 1}" if block[1] == "down" else f"output_blocks.{number}"
    resnet = block[3] == "resnets"
    return _in_block(f"{start}.{0 if resnet else 1}", block[5], resnet=resnet, known=known)


# --- VAE ---------------------------------------------------------------------------------------------------

_VAE_LEVELS = 4  # of every Stable Diffusion's VAE: LDM counts the decoder's from the other end
_VAE_TOPS = {"encoder.norm_out": "encoder.conv_norm_out", "decoder.norm_out": "decoder.conv_norm_out"}
_VAE_SAME = (
    "encoder.conv_in",
    "encoder.conv_out",
    "decoder.conv_in",
    "decoder.conv_out",
    "quant_conv",
    "post_quant_conv",
)
_VAE_RESNET = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "nin_shortcut": "conv_shortcut",
}
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_VAE_OLD_ATTENTION = {"query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}  # diffusers before 0.18
_VAE_MIDDLE = {"block_1": "resnets.0", "attn_1": "attentions.0", "block_2": "resnets.1"}
_LDM_VAE_BLOCK = re.compile(r"(encoder|decoder)\.(?:down|up)\.(\d+)\.block\.(\d+)\.(.+)")
_LDM_VAE_SAMPLER = re.compile(r"(encoder|decoder)\.(?:down|up)\.(\d+)\.(?:down|up)sample\.conv\.(.+)")
_LDM_VAE_MIDDLE = re.compile(r"(encoder|decoder)\.mid\.(block_1|attn_1|block_2)\.(.+)")
_VAE_BLOCK = re.compile(r"(encoder|decoder)\.(?:down|up)_blocks\.(\d+)\.resnets\.(\d+)\.(.+)")
_VAE_SAMPLER = re.compile(r"(encoder|decoder)\.(?:down|up)_blocks\.(\d+)\.(?:down|up)samplers\.0\.conv\.(.+)")
_VAE_MID = re.compile(r"(encoder|decoder)\.mid_block\.(resnets\.0|attentions\.0|resnets\.1)\.(.+)")


def _vae_to_diffusers(name: str) -> tuple[Twin, ...]:
    found = name if name.startswith(_VAE_SAME) else _renamed(name, _VAE_TOPS) or _vae_block(name)
    return (Twin(found),) if found else ()


def _vae_block(name: str) -> str | None:
    if middle := _LDM_VAE_MIDDLE.fullmatch(name):
        known = _VAE_ATTENTION if middle[2] == "attn_1" else _VAE_RESNET
        inner = _renamed(middle[3], known)
        return inner and f"{middle[1]}.mid_block.{_VAE_MIDDLE[middle[2]]}.{inner}"
    found = _LDM_VAE_SAMPLER.fullmatch(name) or _LDM_VAE_BLOCK.fullmatch(name)
    if found is None:
        return None
    side, level = ("down", int(found[2])) if found[1] == "encoder" else ("up", _VAE_LEVELS - 1 - int(found[2]))
    start = f"{found[1]}.{side}_blocks.{level}"
    if found.re is _LDM_VAE_SAMPLER:
        return f"{start}.{side}samplers.0.conv.{found[3]}"
    inner = _renamed(found[4], _VAE_RESNET)
    return inner and f"{start}.resnets.{found[3]}.{inner}"


def _vae_to_ldm(name: str, _: Collection[str]) -> Twin | None:
    found = name if name.startswith(_VAE_SAME) else _renamed(name, _swapped("vae")) or _vae_block_to_ldm(name)
    return Twin(found) if found else None


def _vae_block_to_ldm(name: str) -> str | None:
    if middle := _VAE_MID.fullmatch(name):
        slot = _swapped("vae_middle")[middle[2]]
        known = _swapped("vae_attention") if slot == "attn_1" else _swapped("vae_resnet")
        inner = _renamed(middle[3], known)
        return inner and f"{middle[1]}.mid.{slot}.{inner}"
    found = _VAE_SAMPLER.fullmatch(name) or _VAE_BLOCK.fullmatch(name)
    if found is None:
        return None
    side, level = ("down", int(found[2])) if found[1] == "encoder" else ("up", _VAE_LEVELS - 1 - int(found[2]))
    start = f"{found[1]}.{side}.{level}"
    if found.re is _VAE_SAMPLER:
        return f"{start}.{side}sample.conv.{found[3]}"
    inner = _renamed(found[4], _swapped("vae_resnet"))
    return inner and f"{start}.block.{found[3]}.{inner}"


# --- text encoders -----------------------------------------------------------------------------------------

_CLIP_LEVEL = "text_model."
_CLIP_PARTS = ("embeddings.", "encoder.", "final_layer_norm.")


def _clip_to_diffusers(name: str) -> tuple[Twin, ...]:
    return (Twin(name),) if name.startswith(_CLIP_LEVEL) else ()


def _clip_to_ldm(name: str, _: Collection[str]) -> Twin | None:
    if name.startswith(_CLIP_PARTS):  # transformers from 5.6 on writes them so
        return Twin(_CLIP_LEVEL + name)
    return Twin(name) if name.startswith(_CLIP_LEVEL) else None


_OPENCLIP_TOPS = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding": "text_model.embeddings.token_embedding",
    "ln_final": "text_model.final_layer_norm",
}
_OPENCLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_FUSED = ("q_proj", "k_proj", "v_proj")  # in the order of their rows
_RESBLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")
_LAYER = re.compile(r"(?:text_model\.)?encoder\.layers\.(\d+)\.(.+)")


def _openclip_to_diffusers(name: str) -> tuple[Twin, ...]:
    if name == "text_projection":
        return (Twin("text_projection.weight", transposed=True),)
    block = _RESBLOCK.fullmatch(name)
    if block is None:
        found = _renamed(name, _OPENCLIP_TOPS)
        return (Twin(found),) if found else ()
    start = f"text_model.encoder.layers.{block[1]}"
    if block[2] in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = block[2].rpartition("_")[2]
        return tuple(Twin(f"{start}.self_attn.{part}.{kind}", (index, 3)) for index, part in enumerate(_FUSED))
    inner = _renamed(block[2], _OPENCLIP_LAYER)
    return (Twin(f"{start}.{inner}"),) if inner else ()


def _openclip_to_ldm(name: str, _: Collection[str]) -> Twin | None:
    if name == "text_projection.weight":
        return Twin("text_projection", transposed=True)
    layer = _LAYER.fullmatch(name)
    if layer is None:
        level = _CLIP_LEVEL if name.startswith(_CLIP_PARTS) else ""
        found = _renamed(level + name, _swapped("openclip"))
        return Twin(found) if found else None
    start = f"transformer.resblocks.{layer[1]}"
    part, _dot, kind = layer[2].removeprefix("self_attn.").partition(".")
    if part in _FUSED and kind in ("weight", "bias"):
        return Twin(f"{start}.attn.in_proj_{kind}", (_FUSED.index(part), 3))
    inner = _renamed(layer[2], _swapped("openclip_layer"))
    return Twin(f"{start}.{inner}") if inner else None


# --- common ------------------------------------------------------------------------------------------------

_TO_DIFFUSERS: Mapping[Part, Callable[[str], tuple[Twin, ...]]] = {
    "unet": _unet_to_diffusers,
    "vae": _vae_to_diffusers,
    "clip": _clip_to_diffusers,
    "openclip": _openclip_to_diffusers,
}
_TO_LDM: Mapping[Part, Callable[[str, Collection[str]], Twin | None]] = {
    "unet": _unet_to_ldm,
    "vae": _vae_to_ldm,
    "clip": _clip_to_ldm,
    "openclip": _openclip_to_ldm,
}
_TABLES: Mapping[str, Mapping[str, str]] = {
    "unet": _UNET_TOPS,
    "resnet": _RESNET,
    "middle": _MIDDLE,
    "vae": _VAE_TOPS,
    "vae_middle": _VAE_MIDDLE,
    "vae_resnet": _VAE_RESNET,
    "vae_attention": _VAE_ATTENTION,
    "openclip": _OPENCLIP_TOPS,
    "openclip_layer": _OPENCLIP_LAYER,
}


@cache
def _swapped(table: str) -> Mapping[str, str]:
    """A table the other way round, and what older versions of diffusers wrote."""
    swapped = {theirs: ours for ours, theirs in _TABLES[table].items()}
    return swapped | _VAE_OLD_ATTENTION if table == "vae_attention" else swapped


def _renamed(name: str, known: Mapping[str, str]) -> str | None:
    """The name with its known beginning, up to a dot or its end, exchanged; None if it is not known."""
    for start, other in known.items():
        if name == start or name.startswith(start + "."):
            return other + name[len(start) :]
    return None
