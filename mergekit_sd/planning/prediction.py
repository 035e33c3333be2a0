"""What a model predicts, noise (epsilon) or velocity (v): seen in the file, decided for an output.

A sampler that assumes the other one makes grey or burnt pictures, so parents must agree.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergekit_sd.architectures import Layout
from mergekit_sd.formats.open import read_bytes
from mergekit_sd.formats.tensor import ModelFile
from mergekit_sd.formats.values import decode

if TYPE_CHECKING:  # `inspect` asks for a file's prediction, and needs no recipe for it
    from mergekit_sd.planning.values import Input
    from mergekit_sd.recipe.load import OutputSpec, Recipe

# SD2's keys do not show it. ComfyUI's rule (model_detection): a wide last norm means v-prediction.
TELLTALE = "output_blocks.11.1.transformer_blocks.0.norm1.bias"
WIDE = 0.09
SPELLINGS = {"v": "v", "v_prediction": "v", "v-prediction": "v", "epsilon": "epsilon", "eps": "epsilon"}


def file_prediction(file: ModelFile, layout: Layout) -> str | None:
    """ "epsilon", "v", or None where nothing tells: by metadata, else by markers, else by SD2's telltale."""
    told = SPELLINGS.get(file.metadata.get("modelspec.prediction_type", "").lower())
    hint = told or layout.prediction
    if hint or layout.architecture is None or layout.architecture.family != "sd2":
        return hint
    prefix = layout.prefix_of("unet") or ""
    tensor = file.tensors.get(prefix + TELLTALE)
    values = decode(read_bytes(file, tensor), tensor.dtype) if tensor else ()
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    return "v" if statistics.stdev(values) > WIDE else "epsilon"


def output_prediction(recipe: Recipe, spec: OutputSpec, parents: Sequence[Input]) -> str | None:
    """What the output predicts: as the recipe says, else as all parents of its UNet do."""
    if spec.prediction:
        return spec.prediction
    found = {parent.prediction for parent in parents if parent.prediction}
    if len(found) > 1:
        each = ", ".join(f'"{parent.name}" {parent.prediction}' for parent in parents if parent.prediction)
        raise recipe.error(
            f"The parents predict different things: {each}.",
            ("outputs", spec.name),
            hint='mixing them seldom works; if you mean it, say prediction = "v" or "epsilon" in this output',
        )
    return found.pop() if found else None
