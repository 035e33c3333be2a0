"""Whether a CLIP text encoder's position_ids are what they must be: 0 to 76.

Merging them as floats is the classic corruption. Owns their state; must not know other tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from mergekit_sd import architectures
from mergekit_sd.architectures import Layout
from mergekit_sd.formats.open import read_bytes
from mergekit_sd.formats.tensor import ModelFile
from mergekit_sd.formats.values import decode

State: TypeAlias = Literal["ok", "missing", "corrupt"]

_MOST_IDS = 1024  # a tensor of more elements is no list of ids: not worth reading


@dataclass(frozen=True, slots=True)
class PositionIds:
    """`wrong` lists the indices that differ; a float dtype is corrupt even where none does."""

    state: State
    wrong: tuple[int, ...] = ()
    dtype: str | None = None
    count: int = 0

    def as_json(self) -> dict[str, object]:
        """As `inspect --json` has it."""
        return {"state": self.state, "wrong": list(self.wrong)}


def position_ids(model: ModelFile, layout: Layout) -> PositionIds | None:
    """The state of a file's position_ids; None where there is no text encoder that has them."""
    name = _name(layout)
    if name is None:
        return None
    expected = architectures.get("sd1").position_count
    stored = next((each for each in model.tensors if layout.canonical[each] == name), None)
    if stored is None:
        return PositionIds("missing", count=expected)
    tensor = model.tensors[stored]
    values = decode(read_bytes(model, tensor), tensor.dtype) if tensor.numel <= _MOST_IDS else ()
    wrong = _wrong(values, expected)
    state: State = "corrupt" if wrong or tensor.dtype.is_float else "ok"
    return PositionIds(state, wrong, tensor.dtype.name, expected)


def _name(layout: Layout) -> str | None:
    """The canonical name that they have, or would have, in this file."""
    prefix = layout.prefix_of("text_encoder")
    if prefix is None:
        return None
    # The first encoder of SD1 and SDXL is the same CLIP ViT-L; SD2's has other names, and no ids.
    clip = architectures.get("sd1")
    assert clip.position_ids is not None
    name = clip.position_ids.removeprefix(clip.components["text_encoder"])
    siblings = prefix + name.rpartition(".")[0] + "."
    return prefix + name if any(each.startswith(siblings) for each in layout.places) else None


def _wrong(values: Sequence[float], expected: int) -> tuple[int, ...]:
    """Indices whose value, cut to an integer as every tool does on loading, is not the index."""
    differing = [i for i, value in enumerate(values) if not math.isfinite(value) or int(value) != i or i >= expected]
    return (*differing, *range(len(values), expected))
