"""What the files of a model say of themselves that matters to pictures: the size it was trained at, how to use it.

Owns the keys of metadata that say it. What a file says is not trusted further than a setting.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from mergekit_sd.planning.diffusers import LATENT_PIXELS
from mergekit_sd.planning.values import Plan

LARGEST = 4096  # pixels on a side
_SIZE = re.compile(r"\s*(\d{1,5})\s*(?:[xX×]\s*(\d{1,5})\s*)?")


def declared_size(plan: Plan) -> tuple[int, int] | None:
    """Width and height by `modelspec.resolution` ("64x64"); None where no file says a size that can be sampled."""
    for text in _said(plan, "modelspec.resolution"):
        found = _SIZE.fullmatch(text)
        if found:
            width, height = int(found[1]), int(found[2] or found[1])
            if all(0 < side <= LARGEST and side % LATENT_PIXELS == 0 for side in (width, height)):
                return width, height
    return None


def usage_hint(plan: Plan) -> str | None:
    """`modelspec.usage_hint`: the author's words on prompts and settings."""
    return next((text.strip() for text in _said(plan, "modelspec.usage_hint") if text.strip()), None)


def _said(plan: Plan, key: str) -> Iterator[str]:
    """What the files say that the output's UNet is made of, in the recipe's order."""
    unet = {read.input for t in plan.outputs[0].tensors if t.component == "unet" for read in t.reads}
    for number in sorted(unet):
        if text := plan.inputs[number].file.metadata.get(key):
            yield text
