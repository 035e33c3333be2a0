"""What a hypernetwork holds: for which widths, of which layers, and how it was made.

Owns the reading of its shapes and of the plain values beside them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from mergekit_sd.formats.tensor import ModelFile
from mergekit_sd.inspection.embeddings import whole

_NAME = re.compile(r"^(\d+)\.[01]\.linear\.?(\d+)\.weight$")  # old files: linear1, linear2
# The text's widths; 320, 640 and 1280 are those of self-attention, which every family has.
_FAMILIES = {768: "sd1", 1024: "sd2", 2048: "sdxl"}


@dataclass(frozen=True, slots=True)
class Hypernetwork:
    """A hypernetwork. `structure` gives its layers' widths as multiples of the input's.

    `activation` and `dropout` are as the file says, None where it says nothing; `layer_norm` is what it holds.
    """

    widths: tuple[int, ...]
    structure: tuple[float, ...]
    activation: str | None
    activates_output: bool
    layer_norm: bool
    dropout: str | None
    step: int | None
    name: str | None
    family: str | None
    trained_on: str | None

    def as_json(self) -> dict[str, object]:
        """One flat object."""
        return {
            "widths": list(self.widths),
            "structure": list(self.structure),
            "activation": self.activation,
            "activates_output": self.activates_output,
            "layer_norm": self.layer_norm,
            "dropout": self.dropout,
            "step": self.step,
            "name": self.name,
            "family": self.family,
            "trained_on": self.trained_on,
        }


def hypernetwork_of(model: ModelFile) -> Hypernetwork:
    """What the shapes and the plain values beside them say."""
    said = model.metadata
    layers = {(int(m[1]), int(m[2])): model.tensors[name].shape for name in model.tensors if (m := _NAME.match(name))}
    widths = tuple(sorted({width for width, _ in layers}))
    return Hypernetwork(
        widths=widths,
        structure=_structure(widths, layers),
        activation=said.get("activation_func"),
        activates_output=said.get("activate_output", "True") == "True",
        layer_norm=any(len(shape) == 1 for shape in layers.values()),
        dropout=_dropout(said),
        step=whole(said.get("step", "")),
        name=said.get("name"),
        family=next((_FAMILIES[width] for width in widths if width in _FAMILIES), None),
        trained_on=said.get("sd_checkpoint_name"),
    )


def _structure(widths: tuple[int, ...], layers: Mapping[tuple[int, int], tuple[int, ...]]) -> tuple[float, ...]:
    """The widths in and out of the linear layers of one net, each divided by its input's."""
    if not widths or not widths[0]:
        return ()
    linear = [shape for (width, _), shape in sorted(layers.items()) if width == widths[0] and len(shape) == 2]
    sizes = [size / widths[0] for size in (*(shape[1] for shape in linear[:1]), *(shape[0] for shape in linear))]
    return tuple(int(size) if size.is_integer() else size for size in sizes)


def _dropout(said: Mapping[str, str]) -> str | None:
    """A probability per layer where they are listed, else whether there was any."""
    try:
        listed = json.loads(said.get("dropout_structure", "null"))
    except ValueError:
        listed = None
    if isinstance(listed, list) and any(listed):
        return ", ".join(f"{each:g}" for each in listed if isinstance(each, int | float))
    return {"True": "yes", "False": "no"}.get(said.get("use_dropout", ""))
