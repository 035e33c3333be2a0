"""Surgery on one model, as operations: what they take is declared here, the plan carries them out.

Annotations are evaluated (no `from __future__ import annotations` here): they are the schema.
"""

from typing import Annotated

from mergekit_sd.operations.registry import operation
from mergekit_sd.operations.types import ChoiceKind, Out, Weight

COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")


@operation("operate on one model", "a without junk and EMA weights", planned=True, also=("prune (model-toolkit)",))
def prune(a: Weight, *, ema: Annotated[str, ChoiceKind(("drop", "keep", "use"))] = "drop", out: Out = None) -> Weight:
    """Takes out what is no part of the model: optimizer states, other tools' leftovers, the EMA copy.

    ema = "use" makes the EMA weights the UNet, "keep" leaves them in. Junk is what the model's
    architecture has no place for; a model of no known architecture is refused, never cut by guess.
    """
    raise NotImplementedError("planned")


@operation("operate on one model", "a with sound position ids", planned=True, also=("fix CLIP position_ids",))
def fix(a: Weight, *, out: Out = None) -> Weight:
    """Mends the text encoder's position ids: broken by a merge, stored as float, or missing.

    Every output resets those that are there; this one adds missing ones. NovelAI's names become
    the usual ones in any case.
    """
    raise NotImplementedError("planned")


@operation("operate on one model", "one component of a", planned=True, also=("component extraction",))
def extract(a: Weight, *, component: Annotated[str, ChoiceKind((*COMPONENTS, "ema"))], out: Out = None) -> Weight:
    """The UNet, the VAE or a text encoder as a model of its own, under names without prefix.

    "ema" is the UNet made of the EMA weights.
    """
    raise NotImplementedError("planned")


@operation("operate on one model", "a under other names", planned=True, also=("add or remove prefix (model-toolkit)",))
def convert(
    a: Weight,
    *,
    prefix: Annotated[str, ChoiceKind(("keep", "add", "remove"))] = "keep",
    family: Annotated[str, ChoiceKind(("auto", "sd1", "sd2", "sdxl"))] = "auto",
    style: Annotated[str, ChoiceKind(("auto", "a1111", "diffusers"))] = "auto",
    out: Out = None,
) -> Weight:
    """Names as they are, or those of a component alone with or without the prefix that checkpoints have.

    `first_stage_model.decoder…` is `decoder…` in a VAE file. Pickles, diffusers' folders and NovelAI's names become
    the usual names in any case; the output's dtype does the rest. A CLIP text encoder alone may be SD1's or
    SDXL's: `family` says which. Textual inversions are .safetensors, .pt or .bin, hypernetworks .safetensors or .pt, as
    the output's file is named; `style` says whose names a textual inversion has: unless told, diffusers' in a
    .bin and the WebUI's in a .pt.
    """
    raise NotImplementedError("planned")


@operation(
    "operate on one model",
    "a with a component of b",
    planned=True,
    also=("bake VAE (A1111)", "component replacement"),
)
def replace(
    a: Weight, b: Weight, *, component: Annotated[str, ChoiceKind(COMPONENTS)] = "vae", out: Out = None
) -> Weight:
    """Puts b's VAE, UNet or text encoder in the place of a's; b is a whole model or that part alone.

    Where a has no such component, b's is added. For a VAE, `vae = "…"` in an output says the same.
    """
    raise NotImplementedError("planned")


@operation("operate on one model", "UNet ↔ EMA", planned=True, also=("exchange_ema (sd-mecha)",))
def exchange_ema(a: Weight, *, out: Out = None) -> Weight:
    """The EMA weights as the UNet, and the UNet's weights as EMA.

    To merge EMA weights, `weights = "ema"` beside a model's file is shorter.
    """
    raise NotImplementedError("planned")
