"""DoRA: an additive algorithm's sum, with every row (or column) given a length of its own.

Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation" (2024): with V = W + ΔW, W₁ = V·m/‖V‖; at any
strength W + strength·(W₁ − W).
"""

from __future__ import annotations

from mergekit_sd.adapters.algorithms.algorithm import Algorithm, Parts, Shape, Shapes
from mergekit_sd.adapters.algorithms.parts import mismatch, shape_of
from mergekit_sd.adapters.styles import DORA_SCALE
from mergekit_sd.lazy import torch
from mergekit_sd.operations.types import Tensor


def decomposed(inner: Algorithm) -> Algorithm:
    """The DoRA of an additive algorithm: what it needs, and `dora_scale`."""
    assert inner.delta is not None
    delta = inner.delta

    def check(parts: Shapes, shape: Shape) -> None:
        inner.check(parts, shape)
        _axis(parts, shape)

    def change(weight: Tensor, parts: Parts, strength: float) -> Tensor:
        shape = tuple(weight.shape)
        axis = _axis(parts, shape)
        moved = weight + delta(parts, shape)
        others = [each for each in range(weight.ndim) if each != axis]
        lengths = torch.linalg.vector_norm(moved, dim=others, keepdim=True)
        factors = parts[DORA_SCALE].reshape(lengths.shape) / lengths
        factors = torch.where(lengths > 0.0, factors, 0.0)  # a row of zeros has no direction: it stays
        return torch.lerp(weight, moved.mul_(factors), strength)

    return Algorithm(
        f"DoRA ({inner.name})",
        tuple(need | {DORA_SCALE} for need in inner.needs),
        inner.takes | {DORA_SCALE},
        check=check,
        rank=inner.rank,
        change=change,
    )


def _axis(parts: Shapes, shape: Shape) -> int:
    """Whose lengths they are: of rows (0) for (out,) and (out, 1, …), of columns (1) for (1, in, …)."""
    found = shape_of(parts, DORA_SCALE)
    ones = (1,) * len(found)
    if found and found[0] == shape[0] and found[1:] == ones[1:]:
        return 0
    if len(found) > 1 and found[:2] == (1, shape[1]) and found[2:] == ones[2:]:
        return 1
    raise mismatch(parts, DORA_SCALE, f"{shape[0]} numbers for the rows, or 1×{shape[1]} for the columns")
