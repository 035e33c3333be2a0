"""Detail, contrast and colour by hand: the few tensors of a UNet that every image goes through.

Annotations are evaluated (no `from __future__ import annotations` here): they are the schema.
"""

from typing import Annotated

from mergekit_sd.lazy import torch
from mergekit_sd.operations.registry import operation
from mergekit_sd.operations.types import Key, ListKind, Out, Weight, Which

NAMES = ("IN", "OUT", "OUT2", "CONT", "BRI", "COL1", "COL2", "COL3")
# Which of the values acts on which tensor of the UNet, and what one of it adds to the factor 1.
SCALED = {
    "input_blocks.0.0.weight": ("IN", -0.01),
    "input_blocks.0.0.bias": ("IN", 0.02),
    "out.0.weight": ("OUT", -0.01),
    "out.0.bias": ("OUT", 0.02),
    "out.2.weight": ("OUT2", -0.01),
}
# What is added to a value for each latent channel, and how much of it one of CONT, BRI, COL1, COL2 and COL3 adds.
SHIFTED = "out.2.bias"
STEP = 0.02
CHANNELS = ((1, 0, 0, 0), (0, -1, 1 / 3, 2 / 3), (0, 1, 1, 0), (0, 0, -1, -1), (0, 1, 0, 1))
CHANNELS_XL = ((1, 0, 0, 0), (0, 0, 0, 1), (0, 1, 0, 0), (0, -1, -1, 0), (0, -1, 1, 0))


def _change(values: tuple[float, ...], key: Key) -> tuple[float, list[float]]:
    """What a tensor is multiplied by, and what is added to its first four values."""
    if key.component != "unet":
        return 1.0, []
    name, unit = SCALED.get(key.name, ("IN", 0.0))
    shift = []
    if key.name == SHIFTED:
        rows = CHANNELS_XL if (key.family or "").startswith("sdxl") else CHANNELS
        shift = [STEP * sum(f * m for f, m in zip(values[3:], row, strict=True)) for row in zip(*rows, strict=True)]
    return 1.0 + unit * values[NAMES.index(name)], shift


def _fold(values: tuple[float, ...], key: Key) -> str | None:
    factor, shift = _change(values, key)
    return "a" if factor == 1 and not any(shift) else None


@operation(
    "by structure",
    "input and output layers times 1 ∓ 0.01·(IN, OUT, OUT2), output bias + 0.02·(CONT, colours)",
    by="tensor",
    fold=_fold,
    also=("Adjust (supermerger)",),
)
def adjust(
    a: Weight, *, values: Annotated[tuple[float, ...], ListKind(NAMES)] = (0.0,) * 8, key: Which, out: Out = None
) -> Weight:
    """More or less detail, contrast, brightness and colour, by hand; 0 leaves all as it is.

    supermerger's Adjust. IN and OUT are detail and noise, OUT2 detail, CONT contrast, BRI brightness,
    COL1 to COL3 colours (SDXL's latents have other colours than those of SD 1 and 2). Only the UNet's
    first convolution, its last normalisation and its last convolution change: six tensors.
    """
    factor, shift = _change(values, key)
    result = torch.mul(a, factor, out=out)
    if shift:
        result[: len(shift)] += torch.tensor(shift, device=a.device)
    return result
