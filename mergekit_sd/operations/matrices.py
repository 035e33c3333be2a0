"""Operations on weights as matrices: rotations between them, and their rank.

All decompositions are of matrices of the smaller side's size and in float64.
Annotations are evaluated (no `from __future__ import annotations` here): they are the schema.
"""

import math
from collections.abc import Iterable
from functools import reduce

from mergekit_sd.lazy import torch
from mergekit_sd.operations.registry import operation
from mergekit_sd.operations.types import Out, PerBlock, Same, Tensor

# Elements worked on at a time, in float64.
PIECE = 1 << 20
# Radians from half a turn below which it is one: in which plane it turns is rounding then.
NO_PLANE = 1e-6


@operation(
    "by structure",
    "(a − mean a)·Q^alpha + lerp(mean a, mean b, alpha); Q the rotation of a's rows nearest to b's",
    by="tensor",
    fold=lambda alpha, beta: {(0.0, 0.0): "a", (1.0, 1.0): "b"}.get((alpha, beta)),
    also=("rotate (sd-mecha)", "orthogonal Procrustes"),
)
def rotate(a: Same, b: Same, *, alpha: PerBlock = 1.0, beta: PerBlock = 0.0, out: Out = None) -> Same:
    """Turns a's rows towards b's as one rigid body: alpha is how far (1: as near as turning gets).

    Rows are a linear layer's units, or a convolution's kernels; a mean is over rows. Q is the
    orthogonal matrix with the least ‖(a − mean a)Q − (b − mean b)‖ (Schönemann, "A generalized solution
    of the orthogonal Procrustes problem", 1966), the nearest to no turn of all where there are
    several; Q^alpha turns by alpha of each of its angles. A mirrored direction has two shortest ways
    round: it gets their mean, its length times cos(alpha·π). beta is sd-mecha's alpha (alpha its
    alignment): a's rows are first mixed with b's turned back to them; alpha and beta 1 give b.
    Vectors, which are their own mean, get the straight line. As in sd-mecha, except for matrices wider
    than high: there its matrix is not orthogonal. Slow: a second of a core for 1280 × 1280 values, ten
    for 1280 × 5120.
    """
    if a.ndim < 2 or not a.numel():
        return torch.lerp(a, b, alpha, out=out)
    rows_a, rows_b = _kernels(a), _kernels(b)
    mean_a, mean_b = _mean(rows_a), _mean(rows_b)
    if not (mean_a + mean_b).isfinite().all():
        return torch.full_like(a, math.nan)
    basis, points_a, points_b = None, rows_a, rows_b
    if _is_wide(rows_a):
        basis, points_a, points_b = _common_basis(rows_a - mean_a, rows_b - mean_b)
    centre_a, centre_b = _mean(points_a), _mean(points_b)
    pairs = list(zip(_pieces(points_a), _pieces(points_b), strict=True))
    turn = _nearest_turn(_sum((x - centre_a).T @ (y - centre_b) for x, y in pairs)[: min(rows_a.shape)])
    part = turn if alpha == 1 else _power(turn, alpha)
    if basis is not None:
        part = part @ basis.T
    result = torch.empty(a.shape, device=a.device) if out is None else out
    for (x, y), turned in zip(pairs, torch.split(_kernels(result), len(pairs[0][0])), strict=True):
        shape = torch.lerp(x - centre_a, (y - centre_b) @ turn.T, beta) if beta else x - centre_a
        turned.copy_((shape @ part).add_(torch.lerp(mean_a, mean_b, alpha)))
    return result


@operation(
    "by structure",
    "Σ sᵢ·uᵢvᵢᵀ over the round(ratio·n) greatest of a's n singular values",
    by="tensor",
    fold=lambda ratio: "a" if ratio == 1 else None,
    also=("truncate_rank (sd-mecha)", "low-rank approximation"),
)
def truncate_rank(a: Same, *, ratio: PerBlock = 0.5, out: Out = None) -> Same:
    """The nearest tensor of lower rank: ratio is the share of the rank that stays.

    Eckart and Young, "The approximation of one matrix by another of lower rank" (1936). The matrix
    is (units, all else), so a convolution's kernels lie flat. Vectors have no rank to lose and stay.
    """
    if a.ndim < 2 or not a.numel():
        return a.clone()
    # The right singular vectors are the eigenvectors of the smaller product; float64 makes up for the squares.
    squares = _sum(x.double().T @ x.double() for x in _pieces(_tall(a)))
    if not squares.isfinite().all():
        return torch.full_like(a, math.nan)
    full = len(squares)
    kept = torch.linalg.eigh(squares).eigenvectors[:, full - round(ratio * full) :]
    onto = kept @ kept.T
    result = torch.empty(a.shape, device=a.device) if out is None else out
    for x, nearest in zip(_pieces(_tall(a)), _pieces(_tall(result)), strict=True):
        nearest.copy_(x.double() @ onto)
    return result


def _kernels(a: Tensor) -> Tensor:
    """A convolution's kernels, one a row; a linear layer's units; as sd-mecha has it."""
    return a.flatten(0, 1).flatten(1) if math.prod(a.shape[2:]) > 1 else a.flatten(1)


def _is_wide(matrix: Tensor) -> bool:
    return bool(matrix.shape[0] < matrix.shape[1])


def _tall(a: Tensor) -> Tensor:
    """The tensor as a matrix of units, transposed if it has more columns than rows."""
    matrix = a.flatten(1)
    return matrix.T if _is_wide(matrix) else matrix


def _pieces(matrix: Tensor) -> tuple[Tensor, ...]:
    return torch.split(matrix, max(1, PIECE // matrix.shape[1]))


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, tensors)


def _mean(rows: Tensor) -> Tensor:
    return _sum(x.double().sum(0) for x in _pieces(rows)).div_(len(rows))


def _common_basis(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal columns that span the rows of both, and the coordinates of a's and b's rows in them.

    As many columns as a has rows span a: a's other coordinates are zero.
    """
    basis, coordinates = torch.linalg.qr(torch.cat([a, b]).T)
    in_a, in_b = torch.split(coordinates.T, len(a))
    return basis, in_a, in_b


def _nearest_turn(product: Tensor) -> Tensor:
    """The orthogonal Q for AᵀB: of those with the least ‖AQ − B‖ the one nearest to the identity.

    Of AᵀB the lower rows may be left out if they are zero.
    """
    upper, sizes, right = torch.linalg.svd(product)
    left = torch.eye(len(right), dtype=upper.dtype, device=upper.device)
    left[: len(upper), : len(upper)] = upper
    rank = int((sizes > len(right) * torch.finfo(sizes.dtype).eps * sizes[0]).sum())
    # Where the product is zero, any orthogonal map between what is left on both sides is as near to b.
    free_left, free_right = left[:, rank:], right[rank:]
    x, _, y = torch.linalg.svd(free_left.T @ free_right.T)
    return torch.addmm(left[:, :rank] @ right[:rank], free_left @ x, y @ free_right)


def _power(turn: Tensor, share: float) -> Tensor:
    """An orthogonal matrix to a real power: every angle times `share`, half turns the mean of both ways.

    In a plane turned by θ, Q = cos θ + sin θ·J: the symmetric part of Q has the planes as its
    eigenspaces, the antisymmetric part maps a unit vector v of one to sin θ·Jv.
    """
    cosines, vectors = torch.linalg.eigh((turn + turn.T) / 2)
    across = (turn - turn.T) / 2 @ vectors
    sines = torch.linalg.vector_norm(across, dim=0)
    angles = share * torch.atan2(sines, cosines)
    half = (cosines < 0) & (sines < NO_PLANE)
    across *= torch.where(half, 0.0, angles.sin() / sines.clamp_min(torch.finfo(sines.dtype).tiny))
    return torch.mm(vectors * angles.cos() + across, vectors.T)
