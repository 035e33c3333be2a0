"""What several operations measure of whole tensors: inner products, norms, the largest elements.

Sums run in float64, so that tiny and huge tensors have a norm and the result does not depend on
how a library splits a sum.
"""

from __future__ import annotations

import math

from mergekit_sd.lazy import torch
from mergekit_sd.operations.types import Tensor

# Elements that are summed at a time: in float64 they stay in a core's cache.
PIECE = 1 << 18


def dot(a: Tensor, b: Tensor) -> float:
    """The inner product of two tensors of one shape, summed in float64 piece by piece."""
    pieces = zip(torch.split(a.flatten(), PIECE), torch.split(b.flatten(), PIECE), strict=True)
    return math.fsum(float(torch.dot(x.double(), y.double())) for x, y in pieces)


def norm(a: Tensor) -> float:
    """The Euclidean norm of a tensor's elements."""
    return math.sqrt(dot(a, a))


def largest(values: Tensor, share: float) -> Tensor:
    """A mask of the round(share · n) elements of greatest magnitude; of equal ones the first.

    Works by selection, for any size (torch.quantile stops at 2^24 elements).
    """
    n = values.numel()
    kept = min(max(round(share * n), 0), n)
    magnitude = values.abs().flatten()
    if kept in (0, n):
        return torch.full(values.shape, kept == n, dtype=torch.bool, device=values.device)
    threshold = torch.kthvalue(magnitude, n - kept + 1).values
    mask = magnitude > threshold
    ties = torch.nonzero(magnitude == threshold).flatten()
    mask[ties[: kept - int(mask.sum())]] = True
    return mask.reshape(values.shape)


def rows(values: Tensor) -> Tensor:
    """The tensor as a matrix of one row for each output unit (dim 0); vectors and scalars are one row."""
    return values.flatten(1) if values.ndim > 1 else values.reshape(1, -1)
