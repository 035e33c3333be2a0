"""LoKr: a Kronecker product of a small factor and a large one. ΔW = s·kron(w1, w2).

Yeh et al., "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation" (2023).
Either factor is whole or a product of two; w2 also Tucker's. A Kronecker product of whole factors has no
rank: alpha means nothing then, and files hold numbers such as 100000 there.
"""

from __future__ import annotations

from itertools import product

from mergekit_sd.adapters.algorithms.algorithm import Algorithm, Parts, Shape, Shapes
from mergekit_sd.adapters.algorithms.parts import (
    SCALE,
    SETTINGS,
    expect,
    expect_matrix,
    flat,
    mismatch,
    number,
    rank_from,
    scale,
    shape_of,
    tucker,
)
from mergekit_sd.operations.types import Tensor

W1, W1_A, W1_B = "lokr_w1", "lokr_w1_a", "lokr_w1_b"
W2, W2_A, W2_B, T2 = "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"
_NEEDS = tuple(frozenset(first + second) for first, second in product(((W1,), (W1_A, W1_B)), ((W2,), (W2_A, W2_B))))


def _rank(parts: Shapes) -> int | None:
    """The rows of w2_b, else of w1_b; None where both factors are whole."""
    pairs = ((W2, W2_B), (W1, W1_B))
    return next((rank_from(parts, b) for whole, b in pairs if whole not in parts), None)


def _check(parts: Shapes, shape: Shape) -> None:
    """w1 (a, b), w2 (out/a, in/b, …); or w1_a (a, r), w1_b (r, b), and so for w2; or t2 with w2_a (r, out/a)."""
    expect_matrix(shape, "LoKr")
    out, inside, *kernel = shape
    a, b = _check_first(parts, shape)
    if W2 in parts:
        expect(parts, W2, shape, out // a, (inside // b, *kernel))
        return
    rank = rank_from(parts, W2_B)
    if T2 in parts:
        expect(parts, T2, shape, rank, (rank, *kernel))
        expect(parts, W2_A, shape, rank, (out // a,))
        expect(parts, W2_B, shape, rank, (inside // b,))
    else:
        expect(parts, W2_A, shape, out // a, (rank,))
        expect(parts, W2_B, shape, rank, (inside // b, *kernel))


def _check_first(parts: Shapes, shape: Shape) -> tuple[int, int]:
    """The height and width of w1, which divide the weight's."""
    tall, wide = (W1, W1) if W1 in parts else (W1_A, W1_B)
    height, width = _side(parts, tall, 0, shape), _side(parts, wide, 1, shape)
    if W1 in parts:
        expect(parts, W1, shape, height, (width,))
    else:
        rank = rank_from(parts, W1_B)
        expect(parts, W1_A, shape, height, (rank,))
        expect(parts, W1_B, shape, rank, (width,))
    return height, width


def _side(parts: Shapes, name: str, axis: int, shape: Shape) -> int:
    found = shape_of(parts, name)
    if len(found) < 2 or not found[axis] or shape[axis] % found[axis]:
        raise mismatch(parts, name, f"a matrix whose {('height', 'width')[axis]} divides {shape[axis]}")
    return found[axis]


def _delta(parts: Parts, shape: Shape) -> Tensor:
    first = flat(parts, W1) if W1 in parts else flat(parts, W1_A) @ flat(parts, W1_B)
    rank = _rank(parts)
    factor = scale(parts, rank) if rank else number(parts, SCALE)
    if factor is not None:
        first = first * factor
    # Not torch.kron: it refuses some strides.
    return (first[:, None, :, None] * _second(parts)[None, :, None, :]).reshape(shape)


def _second(parts: Parts) -> Tensor:
    """w2 as a matrix; its columns count inputs and kernel, so that the product's do, too."""
    if W2 in parts:
        return flat(parts, W2)
    if T2 in parts:
        return tucker(parts[T2], flat(parts, W2_A), flat(parts, W2_B)).flatten(1)
    return flat(parts, W2_A) @ flat(parts, W2_B)


LOKR = Algorithm("LoKr", _NEEDS, frozenset().union(*_NEEDS, {T2}, SETTINGS), check=_check, rank=_rank, delta=_delta)
