"""What the files of a model say of themselves that matters to pictures: the size it was trained at, how to use it.

Owns the keys of metadata that say it. What a file says is not trusted further than a setting.
"""

from __future__ import annotations

import re

from mergekit_sd.planning.diffusers import LATENT_PIXELS
from mergekit_sd.planning.metadata import PROBES_KEY, agreed
from mergekit_sd.planning.values import Plan

LARGEST = 4096  # pixels on a side
_SIZE = re.compile(r"\s*(\d{1,5})\s*(?:[xX×]\s*(\d{1,5})\s*)?")


def picture_size(plan: Plan) -> tuple[int, int]:
    """Width and height that a model makes by default: what its files say, or what its kind was published with."""
    output = plan.outputs[0]
    assert output.layout.architecture is not None
    side = output.layout.architecture.published_as("epsilon" if output.prediction == "epsilon" else None)[1]
    return declared_size(plan) or (side, side)


def declared_size(plan: Plan) -> tuple[int, int] | None:
    """Width and height by `modelspec.resolution` ("64x64"); None where no file says a size that can be sampled."""
    found = _SIZE.fullmatch(_said(plan, "modelspec.resolution"))
    if found:
        width, height = int(found[1]), int(found[2] or found[1])
        if all(0 < side <= LARGEST and side % LATENT_PIXELS == 0 for side in (width, height)):
            return width, height
    return None


def usage_hint(plan: Plan) -> str | None:
    """`modelspec.usage_hint`: the author's words on prompts and settings."""
    return _said(plan, "modelspec.usage_hint").strip() or None


def probe_set(plan: Plan) -> str | None:
    """`mergekit_sd.probes`: the set of probes that means something to the model."""
    return _said(plan, PROBES_KEY).strip() or None


def _said(plan: Plan, key: str) -> str:
    """What all files say that the output's UNet is made of: what a written file would say, too."""
    return agreed(plan, plan.outputs[0], key) or ""
