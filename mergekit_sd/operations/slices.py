"""Parts of one model put into another: windows of rows, windows of ranks.

Annotations are evaluated (no `from __future__ import annotations` here): they are the schema.
"""

from typing import Annotated

from mergekit_sd.lazy import torch
from mergekit_sd.operations.registry import operation
from mergekit_sd.operations.types import ChoiceKind, Out, PerBlock, Same, Tensor

# Up to this many columns supermerger's tensor2 counts its window in rows.
FEW_COLUMNS = 100


@operation(
    "mix two models",
    "a, with its rows beta·n … (alpha + beta)·n from b; what passes the end goes on at the start",
    by="tensor",
    fold=lambda alpha, beta, dim: "a" if alpha == 0 else "b" if (alpha, beta, dim) == (1, 0, 0) else None,
    also=("tensor, tensor2 (supermerger)", "tensor_sum (meh, sd-mecha)", "copy_region (sd-mecha)"),
)
def tensor_sum(
    a: Same,
    b: Same,
    *,
    alpha: PerBlock = 0.5,
    beta: PerBlock = 0.0,
    dim: Annotated[int, ChoiceKind((0, 1))] = 0,
    out: Out = None,
) -> Same:
    """Puts whole rows of b into a and blends nothing: alpha is their share, beta where they begin.

    supermerger's modes "tensor" (dim 0: output units) and "tensor2" (dim 1: inputs), to the row.
    As there, dim 1 counts the window in rows where there are no more than 100 columns, so that
    such a tensor gives more or less than its share, and vectors have rows only. A single value is
    one row: it is b's where the window reaches its end.
    """
    start, end, wraps = _window(alpha, beta)
    first, other = (b, a) if wraps else (a, b)
    result = first.clone()
    shape = a.shape or (1,)
    axis = min(dim, len(shape) - 1)
    count = shape[axis] if shape[axis] > FEW_COLUMNS else shape[0]
    part = (slice(None),) * axis + (slice(int(count * start), int(count * end)),)
    result.view(shape)[part] = other.reshape(shape)[part]
    return result


@operation(
    "mix two models",
    "a's value of the rank that b has there, if its |a| ranks from beta·n to (alpha + beta)·n; else a",
    by="tensor",
    fold=lambda alpha, beta: "a" if alpha == 0 else None,
    also=("top_k_tensor_sum (meh, sd-mecha)",),
)
def top_k_tensor_sum(a: Same, b: Same, *, alpha: PerBlock = 1.0, beta: PerBlock = 0.0, out: Out = None) -> Same:
    """Puts a's values where b has its own of the same rank: alpha is the share of them, beta where it begins.

    meh's formula. b gives the order only: at alpha 1 the result is a's values in b's order. The
    window counts magnitudes from the smallest on, and past the largest it goes on at the smallest;
    alpha 0.1 with beta 0.9 moves the largest tenth. (sd-mecha 1.1.8 moves one more, below the window.)
    """
    start, end, wraps = _window(alpha, beta)
    values, places = torch.sort(a.flatten()).values, torch.argsort(b.flatten(), stable=True)
    magnitudes = values.abs()
    moved = _up_to(magnitudes, start) ^ _up_to(magnitudes, end) ^ wraps
    result = a.flatten().clone()
    result[places[moved]] = values[moved]
    # Zero; but what is not finite has no rank, and must show wherever its value went.
    return result.reshape(a.shape) + (a - a) + (b - b)


def _window(alpha: float, beta: float) -> tuple[float, float, bool]:
    """Where b's part begins and ends; if it wraps (True), where the rest does."""
    # `extrapolate` lets through what is no share.
    alpha, beta = (min(max(share, 0.0), 1.0) for share in (alpha, beta))
    if alpha + beta <= 1.0:
        return beta, alpha + beta, False
    return alpha + beta - 1.0, beta, True


def _up_to(magnitudes: Tensor, share: float) -> Tensor:
    """A mask of the smallest round(share · n) magnitudes, and of those equal to the last of them."""
    rank = round(share * magnitudes.numel())
    if not rank:
        return torch.zeros_like(magnitudes, dtype=torch.bool)
    return magnitudes <= torch.kthvalue(magnitudes, rank).values
