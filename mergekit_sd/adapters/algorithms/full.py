"""Whole differences: `diff` of any weight, `w_norm` of a norm's. ΔW is in the file, and alpha means nothing.

`diff_b` and `b_norm` are those of biases; LyCORIS and ComfyUI put them beside other algorithms' parts, too.
"""

from __future__ import annotations

from mergekit_sd.adapters.algorithms.algorithm import Algorithm, Parts, Shape, Shapes
from mergekit_sd.adapters.algorithms.parts import alike, mismatch, shape_of, spelt
from mergekit_sd.adapters.styles import ALPHA
from mergekit_sd.operations.types import Tensor


def expect_whole(parts: Shapes, name: str, shape: Shape) -> None:
    """Refuse a part that has not the shape of the tensor that it is added to."""
    if not alike(shape_of(parts, name), shape):
        raise mismatch(parts, name, f"{spelt(shape)}, as what it is added to")


def whole(parts: Parts, name: str, shape: Shape) -> Tensor:
    """A part that is a difference as it stands; a new tensor."""
    return parts[name].reshape(shape).clone()


def _algorithm(name: str, part: str) -> Algorithm:
    return Algorithm(
        name,
        (frozenset({part}),),
        frozenset({part, ALPHA}),
        check=lambda parts, shape: expect_whole(parts, part, shape),
        delta=lambda parts, shape: whole(parts, part, shape),
    )


FULL = _algorithm("full difference", "diff")
NORM = _algorithm("norm's difference", "w_norm")
