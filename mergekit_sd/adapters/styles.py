"""How each tool spells the keys of LoRA-family files: endings for the parts, beginnings for the components.

Owns the spellings, as tables. Must not know checkpoints (`targets`) nor what the parts are for. Parts
have kohya's and LyCORIS' names here, whatever the file calls them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from mergekit_sd.errors import UsageError

# kohya: lora_unet_down_blocks_0_….lora_down.weight       peft: unet.down_blocks.0.….lora_A.weight
# diffusers: unet.down_blocks.0.….lora.down.weight        comfyui: diffusion_model.input_blocks.1.….lora_down.weight
Style: TypeAlias = Literal["kohya", "peft", "diffusers", "comfyui"]
STYLES: tuple[Style, ...] = get_args(Style)

DOWN, UP, ALPHA, DORA_SCALE = "lora_down.weight", "lora_up.weight", "alpha", "dora_scale"
OFT_R = "oft_R"
_COMMON = (ALPHA, "scale", DORA_SCALE)  # say nothing of the style
PARTS = (
    *_COMMON,
    *(DOWN, UP, "lora_mid.weight"),
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_t1", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    *("a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight"),
    *("oft_blocks", "oft_diag", "rescale"),
    *("diff", "diff_b", "w_norm", "b_norm"),
    *("q_layer.weight", "p_layer.weight", "lambda_layer"),
)
BIAS_PARTS = frozenset({"diff_b", "b_norm"})
_IA3 = ("weight", "on_input")  # everyday words: only behind a prefix of kohya's or LyCORIS'

_FACTORS: Mapping[Style, Mapping[str, str]] = {
    "peft": {DOWN: "lora_A.weight", UP: "lora_B.weight", DORA_SCALE: "lora_magnitude_vector"},
    "diffusers": {DOWN: "lora.down.weight", UP: "lora.up.weight", DORA_SCALE: "lora_magnitude_vector"},
}
_TEXT_FACTORS = {DOWN: "lora_linear_layer.down.weight", UP: "lora_linear_layer.up.weight"}
_ENDINGS: Mapping[str, tuple[str, Style | None]] = {
    **{part: (part, None) for part in _COMMON},
    **{ending: (part, "diffusers") for part, ending in _TEXT_FACTORS.items()},
    **{ending: (part, style) for style, parts in _FACTORS.items() for part, ending in parts.items()},
    "oft_R.weight": (OFT_R, "peft"),
    "oft_R.default.weight": (OFT_R, "peft"),
    "lora_A.default.weight": (DOWN, "peft"),
    "lora_B.default.weight": (UP, "peft"),
    "lora_magnitude_vector": (DORA_SCALE, "peft"),
    "lora_magnitude_vector.weight": (DORA_SCALE, "peft"),
    "lora_magnitude_vector.default": (DORA_SCALE, "peft"),
    "lora_magnitude_vector.default.weight": (DORA_SCALE, "peft"),
}
_LONGEST = 3  # pieces between dots, of these and of PARTS

# Diffusers before 0.22 named the projections so, in the UNet and in the text encoders.
_OLD_PROJECTIONS = {
    "to_q_lora": ("to_q", "q_proj"),
    "to_k_lora": ("to_k", "k_proj"),
    "to_v_lora": ("to_v", "v_proj"),
    "to_out_lora": ("to_out.0", "out_proj"),
}
_OLD_FACTORS = {"down.weight": DOWN, "up.weight": UP}

# What a module's name starts with, by component; None: one does not say. Each stands before those that it begins with.
_PREFIXES: tuple[tuple[str, str | None], ...] = (
    ("lora_unet_", "unet"),
    ("oft_unet_", "unet"),
    ("lora_te1_", "text_encoder"),
    ("lora_te2_", "text_encoder_2"),
    ("lora_te_", "text_encoder"),
    ("lycoris_", None),
    ("model.diffusion_model.", "unet"),
    ("diffusion_model.", "unet"),
    ("unet.", "unet"),
    ("text_encoder_2.", "text_encoder_2"),
    ("text_encoder.", "text_encoder"),
    ("text_encoders.clip_l.transformer.", "text_encoder"),
    ("text_encoders.clip_h.transformer.", "text_encoder"),
    ("text_encoders.clip_g.transformer.", "text_encoder_2"),
)
_UNDERSCORED = tuple(prefix for prefix, _ in _PREFIXES if prefix.endswith("_"))
_PEFT_WRAPPER = "base_model.model."
_ONLY_ENCODER = "lora_te_"

_KOHYA_PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}
_KOHYA_FIRST_OF_TWO = "lora_te1_"
_COMFYUI_PREFIXES = {
    ("unet", "unet"): "diffusion_model.",
    ("text_encoder", "clip"): "text_encoders.clip_l.transformer.",
    ("text_encoder", "openclip"): "text_encoders.clip_h.transformer.",
    ("text_encoder_2", "openclip"): "text_encoders.clip_g.transformer.",
}


@dataclass(frozen=True, slots=True)
class Key:
    """What one key says: its module, the part of it, and the style where the ending tells one."""

    module: str
    part: str
    style: Style | None


def parse(key: str) -> Key | None:
    """The module and the part that a key names; None if it ends in no part.

    The module is spelt as in the file, but for old diffusers' `attn1.processor.to_q_lora`: that is `attn1.to_q`.
    """
    pieces = key.split(".")
    old = _OLD_FACTORS.get(".".join(pieces[-2:]))
    if old and len(pieces) > 3 and pieces[-3] in _OLD_PROJECTIONS:
        above = _without_processor(pieces[:-3])
        in_text_encoder = above[-1:] == ["self_attn"]
        return Key(".".join([*above, _OLD_PROJECTIONS[pieces[-3]][in_text_encoder]]), old, "diffusers")
    for length in range(min(_LONGEST, len(pieces) - 1), 0, -1):
        module = ".".join(_without_processor(pieces[:-length]))
        found = _ending(".".join(pieces[-length:]), module)
        if module and found:
            return Key(module, *found)
    return None


def component_of(module: str) -> tuple[str | None, str]:
    """The component that a module's name says, None if it says none, and what stands behind its prefixes."""
    rest = module.removeprefix(_PEFT_WRAPPER)
    for prefix, component in _PREFIXES:
        if rest.startswith(prefix):
            return component, rest.removeprefix(prefix).removeprefix(_PEFT_WRAPPER)
    return None, rest


def is_of_only_encoder(module: str) -> bool:
    """Whether a name is that of a model with a single text encoder: SDXL's first is `lora_te1`, never `lora_te`."""
    return module.startswith(_ONLY_ENCODER)


def kohya_prefix(component: str, *, two_encoders: bool) -> str:
    """What kohya's names of a component start with."""
    first_of_two = two_encoders and component == "text_encoder"
    return _KOHYA_FIRST_OF_TWO if first_of_two else _KOHYA_PREFIXES[component]


def comfyui_prefix(component: str, part: str) -> str:
    """What ComfyUI's names of a component start with; `part`: "unet", "clip" or "openclip"."""
    return _COMFYUI_PREFIXES[component, part]


def key_of(module: str, part: str, style: Style) -> str:
    """The key of a module's part in a style. Raises UsageError for a part that the style has no name for."""
    if style in ("kohya", "comfyui"):
        return f"{module}.{part}"
    in_unet = component_of(module)[0] == "unet"
    endings = _FACTORS[style] if style == "peft" or in_unet else {**_FACTORS[style], **_TEXT_FACTORS}
    if part not in endings:
        raise UsageError(
            f'The style "{style}" has no name for the part "{part}".',
            key=module,
            hint='write "kohya" or "comfyui"; only LoRA and DoRA have other styles, with alpha in the factors',
        )
    return f"{module}.{endings[part]}"


def _ending(ending: str, module: str) -> tuple[str, Style | None] | None:
    if ending in _ENDINGS:
        part, style = _ENDINGS[ending]
        return part, style if style or "." in module else "kohya"
    if ending in PARTS:
        return ending, "comfyui" if "." in module else "kohya"
    if ending in _IA3 and "." not in module and module.startswith(_UNDERSCORED):
        return ending, "kohya"
    return None


def _without_processor(pieces: list[str]) -> list[str]:
    return [piece for piece in pieces if piece != "processor"]
