"""IA3: each output, or each input, is made stronger or weaker. W' = W·(1 + strength·w).

Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning"
(2022), with LyCORIS' w, which is 0 where nothing changes (PEFT's is 1 there).
"""

from __future__ import annotations

from math import prod

from mergekit_sd.adapters.algorithms.algorithm import Algorithm, Parts, Shape, Shapes
from mergekit_sd.adapters.algorithms.parts import expect_matrix, expect_number, mismatch, number, shape_of
from mergekit_sd.adapters.styles import ALPHA
from mergekit_sd.operations.types import Tensor

WEIGHT, ON_INPUT = "weight", "on_input"


def _check(parts: Shapes, shape: Shape) -> None:
    """As many numbers as there are outputs or inputs; LyCORIS has (1, n, 1, 1) for a convolution."""
    expect_matrix(shape, "IA3")
    expect_number(parts, ON_INPUT)
    _expect_length(parts, shape[:2])


def _expect_length(parts: Shapes, lengths: Shape) -> None:
    if prod(shape_of(parts, WEIGHT)) not in lengths:
        raise mismatch(parts, WEIGHT, " or ".join(map(str, lengths)) + " numbers")


def _change(weight: Tensor, parts: Parts, strength: float) -> Tensor:
    axis = 1 if number(parts, ON_INPUT) else 0
    _expect_length(parts, (weight.shape[axis],))
    along = [1] * weight.ndim
    along[axis] = -1
    return weight * (1.0 + strength * parts[WEIGHT].reshape(along))


IA3 = Algorithm(
    "IA3", (frozenset({WEIGHT, ON_INPUT}),), frozenset({WEIGHT, ON_INPUT, ALPHA}), check=_check, change=_change
)
