"""Operations on LoRA files and their relatives: what they take is declared here, the plan carries them out.

Annotations are evaluated (no `from __future__ import annotations` here): they are the schema.
"""

from typing import Annotated

from mergekit_sd.operations.registry import operation
from mergekit_sd.operations.types import ChoiceKind, Lora, Loras, Out, SettingKind, Weight

RANK_RULES = ("fixed", "threshold", "ratio", "quantile", "norm", "error")


@operation(
    "LoRA and its relatives",
    "W + Σ strength·ΔW",
    planned=True,
    also=("Merge LoRA into checkpoint (supermerger)", "bake LoRA", "LoraLoader (ComfyUI)"),
)
def inject_lora(model: Weight, loras: Loras, *, out: Out = None) -> Weight:
    """Puts LoRA files into a model, each at its strength: as if they stood in every prompt.

    Any of LoRA, LoCon, LoHa, LoKr, IA3, GLoRA, OFT, BOFT, full differences and DoRA, under the names of any
    trainer. An entry is a name, a prompt's "<lora:style:0.8>" (text encoder and UNet apart:
    "<lora:style:0.5:0.8>"), or a table { lora, strength, text_encoder, blocks }. One after the other; those that only
    add may come in any order, and a negative strength takes out what the positive put in.
    """
    raise NotImplementedError("planned")


@operation(
    "LoRA and its relatives",
    "up·down ≈ tuned − base, layer by layer (truncated SVD)",
    planned=True,
    also=("extract LoRA (kohya, supermerger)", "make LoRA (supermerger)", "LoRA extraction"),
)
def extract_lora(
    tuned: Weight,
    base: Weight,
    *,
    rank: Annotated[int, SettingKind(1, None, whole=True)] = 32,
    conv_rank: Annotated[int, SettingKind(0, None, whole=True)] = 0,
    rule: Annotated[str, ChoiceKind(RANK_RULES)] = "fixed",
    amount: Annotated[float, SettingKind(0.0, None)] = 0.9,
    size_mb: Annotated[float, SettingKind(0.0, None)] = 0.0,
    clamp: Annotated[float, SettingKind(0.0, 1.0)] = 1.0,
    text_encoder: Annotated[str, ChoiceKind(("keep", "drop", "threshold"))] = "keep",
    min_diff: Annotated[float, SettingKind(0.0, None)] = 0.01,
    style: Annotated[str, ChoiceKind(("kohya", "comfyui"))] = "kohya",
    out: Out = None,
) -> Lora:
    """A LoRA file of what training (or a merge) has changed: base with it is nearly tuned.

    Of linear layers and 1×1 convolutions at `rank`; other convolutions at `conv_rank`, none at 0. Other
    rules than "fixed" find each layer's rank, up to these: threshold (singular values above `amount`), ratio (above
    that share of the greatest), quantile (as LyCORIS), norm (that share of the change's norm kept), error (at most that
    share of it lost). `size_mb` shares out a size over the layers, by what each rank gains. A text encoder can be
    dropped, or by threshold: where nothing changed by more than `min_diff`, as kohya does. `clamp` below 1 cuts
    factors off at that quantile, as kohya does at 0.99; it loses accuracy. Factors by a randomised SVD (Halko,
    Martinsson & Tropp 2011; Musco & Musco 2015), within 0.1 % of the least possible error.
    """
    raise NotImplementedError("planned")
