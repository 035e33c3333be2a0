"""What the formulas share: the checking of shapes, alpha over rank, products of factors.

A part fits a weight whatever trailing 1×1 either has: a LoRA made for a 1×1 convolution fits a linear
layer and the reverse. A kernel may be flattened into the columns.
"""

from __future__ import annotations

import math

from mergekit_sd.adapters.algorithms.algorithm import Parts, Shape, Shapes
from mergekit_sd.adapters.styles import ALPHA
from mergekit_sd.errors import MalformedFile, ShapeMismatch
from mergekit_sd.lazy import torch
from mergekit_sd.operations.types import Tensor
from mergekit_sd.text import listed, shown

SCALE = "scale"
SETTINGS = frozenset({ALPHA, SCALE})

# --- shapes ---------------------------------------------------------------------------------------------


def spelt(shape: Shape) -> str:
    """A shape for people: `320×640×3×3`; a single number has none."""
    return "×".join(map(str, shape)) or "a single number"


def mismatch(parts: Shapes, name: str, expected: str) -> ShapeMismatch:
    """The refusal of a part's shape."""
    return ShapeMismatch(
        f'The part "{shown(name)}" is {spelt(tuple(parts[name].shape))}; expected: {expected}.',
        hint="the file is broken, or made for another model",
    )


def alike(found: Shape, wanted: Shape) -> bool:
    """Whether shapes are equal but for trailing ones, or `found` is `wanted` flattened."""
    return _without_ones(found) == _without_ones(wanted) or found == (math.prod(wanted),)


def expect(parts: Shapes, name: str, shape: Shape, rows: int, columns: Shape) -> None:
    """Refuse a part that is not `rows` by `columns`, for a weight of that shape.

    Raises MalformedFile if it is not there, ShapeMismatch if it has another shape.
    """
    found = shape_of(parts, name)
    if len(found) < 2 or found[0] != rows or not alike(found[1:], columns):
        raise mismatch(parts, name, f"{spelt((rows, *columns))}, for a weight of {spelt(shape)}")


def shape_of(parts: Shapes, name: str) -> Shape:
    """A part's shape. Raises MalformedFile if it is not there."""
    if name not in parts:
        there = f"there are: {listed(sorted(parts), 20)}"
        raise MalformedFile(f'The part "{shown(name)}" is missing.', details=[there])
    return tuple(parts[name].shape)


def expect_matrix(shape: Shape, what: str) -> None:
    """Refuse a weight that has no rows and columns: a bias, a norm."""
    if len(shape) < 2:
        raise ShapeMismatch(f"{what} is for weights with rows and columns; this tensor is {spelt(shape)}.")


def rank_from(parts: Shapes, name: str) -> int:
    """The rank: as many rows as this part has. Raises ShapeMismatch for a vector, and for rank 0."""
    found = shape_of(parts, name)
    if len(found) < 2 or found[0] < 1:
        raise mismatch(parts, name, "a matrix with one row or more for the rank")
    return found[0]


def _without_ones(shape: Shape) -> Shape:
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape


# --- numbers --------------------------------------------------------------------------------------------


def number(parts: Parts, name: str) -> float | None:
    """A part that is one finite number, () or (1,), of any dtype; None if it is not there.

    Raises ShapeMismatch for more than one number, MalformedFile for NaN and Inf.
    """
    if name not in parts:
        return None
    expect_number(parts, name)
    value = float(parts[name].item())
    if not math.isfinite(value):
        raise MalformedFile(f'The part "{shown(name)}" is {value}; it must be a finite number.')
    return value


def expect_number(parts: Shapes, name: str) -> None:
    """Refuse a part that is not one number."""
    if math.prod(shape_of(parts, name)) != 1:
        raise mismatch(parts, name, "one number")


def scale(parts: Parts, rank: int) -> float:
    """What a product of factors is multiplied by: alpha/rank, 1 without alpha; alpha 0 stands for the rank.

    A part "scale" stands for all of it.
    """
    given = number(parts, SCALE)
    if given is not None:
        return given
    return (number(parts, ALPHA) or rank) / rank


# --- products -------------------------------------------------------------------------------------------


def flat(parts: Parts, name: str) -> Tensor:
    """A part as a matrix: a row for each of its first axis."""
    return parts[name].flatten(1)


def tucker(core: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Σ core[i,j,…]·left[i,p]·right[j,q], the kernel flattened: (p, q, k)."""
    cube = core.reshape(left.shape[0], right.shape[0], -1)
    # Two by two: of three, which pair goes first depends on whether opt_einsum is installed, and so does rounding.
    return torch.einsum("pjk,jq->pqk", torch.einsum("ijk,ip->pjk", cube, left), right)
