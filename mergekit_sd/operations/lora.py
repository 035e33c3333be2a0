"""Operations on LoRA files and their relatives: what they take is declared here, the plan carries them out.

Annotations are evaluated (no `from __future__ import annotations` here): they are the schema.
"""

from typing import Annotated

from mergekit_sd.operations.registry import operation
from mergekit_sd.operations.types import ChoiceKind, Lora, Loras, Out, SettingKind, Weight

STYLES = ("kohya", "peft", "diffusers", "comfyui")
RESIZE_RULES = ("fixed", "sv_ratio", "sv_cumulative", "sv_fro", "threshold", "ratio", "quantile", "norm", "error")
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
    amount: Annotated[float, SettingKind(0.0, None)] = 0.0,
    size_mb: Annotated[float, SettingKind(0.0, None)] = 0.0,
    clamp: Annotated[float, SettingKind(0.5, 1.0)] = 1.0,
    text_encoder: Annotated[str, ChoiceKind(("keep", "drop", "threshold"))] = "keep",
    min_diff: Annotated[float, SettingKind(0.0, None)] = 0.01,
    algorithm: Annotated[str, ChoiceKind(("lora", "loha", "lokr", "full"))] = "lora",
    rest: Annotated[str, ChoiceKind(("drop", "keep"))] = "drop",
    style: Annotated[str, ChoiceKind(STYLES)] = "kohya",
    out: Out = None,
) -> Lora:
    """A LoRA file of what training (or a merge) has changed: base with it is nearly tuned.

    Of linear layers and 1×1 convolutions at `rank`; other convolutions at `conv_rank`, none at 0. Other
    rules than "fixed" find each layer's rank, up to these: threshold (singular values above `amount`), ratio
    (above that share of the greatest), quantile (as LyCORIS), norm (that share of the change's norm kept),
    error (at most that share of it lost); `amount` 0 stands for what is usual. `size_mb` is the size of the file
    in float16, shared out over the layers by what each rank gains (what `rest` keeps comes on top). A text
    encoder can be dropped, or by threshold: where nothing changed by more than `min_diff`, as kohya does. `clamp`
    below 1 cuts factors off at that quantile, as kohya does at 0.99; it loses accuracy. Other algorithms: "loha"
    at the rank (twice a LoRA's size, never farther from the change than that LoRA), "lokr" with the rank as the
    most rows of its first factor, "full" for the whole difference. `rest` keeps the changes of biases and norms,
    whole. Factors by a randomised SVD (Halko, Martinsson & Tropp, "Finding structure with randomness", 2011),
    within 0.1 % of the least possible error.
    """
    raise NotImplementedError("planned")


@operation(
    "LoRA and its relatives",
    "Σ strength·ΔW, exactly at rank 0 (ranks add up), else truncated",
    planned=True,
    also=("merge LoRAs (kohya svd_merge_lora)", "concat LoRAs", "merge LoRA (supermerger)"),
)
def merge_loras(
    loras: Loras,
    *,
    rank: Annotated[int, SettingKind(0, None, whole=True)] = 0,
    method: Annotated[str, ChoiceKind(("sum", "ties", "dare"))] = "sum",
    density: Annotated[float, SettingKind(0.0, 1.0)] = 0.5,
    style: Annotated[str, ChoiceKind(STYLES)] = "kohya",
    out: Out = None,
) -> Lora:
    """One LoRA that does what several do together, each at its strength.

    At rank 0 factors are put side by side: the same to rounding, and linear in the strengths (kohya's merge
    multiplies both factors, so that 0.5 gives a quarter). A rank truncates the sum, by QR of the factors and a small
    SVD. "ties" and "dare" merge the differences themselves as those methods do (`ties`, `dare_linear`, over a base of
    zeros) and need a rank. Files of different trainers meet by the layers that their names mean.
    """
    raise NotImplementedError("planned")


@operation(
    "LoRA and its relatives",
    "up·down of a lower rank, the nearest there is",
    planned=True,
    also=("resize LoRA (kohya)",),
)
def resize_lora(
    lora: Lora,
    *,
    rank: Annotated[int, SettingKind(1, None, whole=True)] = 16,
    rule: Annotated[str, ChoiceKind(RESIZE_RULES)] = "fixed",
    amount: Annotated[float, SettingKind(0.0, None)] = 0.0,
    out: Out = None,
) -> Lora:
    """A smaller LoRA that does nearly the same: the greatest singular values of every layer's change.

    Rules other than "fixed" find each layer's rank, `rank` at most: sv_ratio (values above the greatest
    divided by `amount`), sv_cumulative and sv_fro (that share of their sum, of their norm) as in kohya's sd-scripts,
    and those of `extract_lora`. Exact, by QR of both factors and the SVD of a small matrix. What is not LoRA in the
    file (LoHa, DoRA, …) stays as it is.
    """
    raise NotImplementedError("planned")


@operation(
    "LoRA and its relatives",
    "the same factors under another trainer's names",
    planned=True,
    also=("convert LoRA",),
)
def rename_lora(lora: Lora, *, style: Annotated[str, ChoiceKind(STYLES)] = "kohya", out: Out = None) -> Lora:
    """A LoRA file under the names of kohya, PEFT, diffusers or ComfyUI.

    PEFT and diffusers have no alpha: it goes into the factors. Only LoRA and DoRA have names there.
    """
    raise NotImplementedError("planned")
