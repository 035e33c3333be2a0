"""The greatest singular values and vectors of a matrix, at the cost of a few products with it.

Owns the accuracy: the Frobenius error of what comes out is within 0.1 % of the least possible, or
within a millionth of the matrix's norm where that is more (float32 arithmetic leaves as much). Must
not know what the matrix is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_sd.errors import NonFiniteResult
from mergekit_sd.lazy import torch
from mergekit_sd.lora.ranks import Rule, Spectrum
from mergekit_sd.operations.draws import Draw

if TYPE_CHECKING:
    from mergekit_sd.operations.types import Tensor

# Vectors more than asked for.
OVERSAMPLING = 16
# Of the energy left out at best, the share that may be lost besides by the estimate: a quarter of 0.1 % of the error,
# as the estimate is too low now and then, by a factor of up to three.
TOLERANCE = 5e-4
# Of the whole energy, the share below which what is left out counts as rounding.
ROUNDING = 1e-6
# The greatest share of the matrix's directions that is still looked for by products.
MOST_DIRECTIONS = 1 / 3
# Rounds after which the spectrum is one that products cannot tell apart.
MOST_ROUNDS = 20
# The filter's degree: at first, and at most.
FIRST_DEGREE, MOST_DEGREE = 2, 8
# The greatest amplification by a filter: more would drown the small values in the rounding of the great ones.
AMPLIFICATION = 1e4
# Squares of singular values below this share of the greatest are float32 rounding.
LEAST_SQUARE = 1e-13
# A gain that is to shrink less than so much per round is no guide to what is left.
LEAST_SHRINKING = 0.1
# Outside of 2^±SAFE the squares of float32 numbers, or of the small ones beside them, might not fit.
SAFE = 30
# The rank that is tried first where a rule gives none.
FIRST_RANK = 64
# Elements worked on at a time, in float64.
PIECE = 1 << 18


@dataclass(frozen=True, slots=True)
class Decomposition:
    """matrix ≈ u · diag(s) · vh: u (m, r) and vh (r, n) float32 and orthonormal, s (r,) float64, descending.

    s is float64 as its squares are summed: `energy` is the sum over all singular values, ‖matrix‖²_F.
    """

    u: Tensor
    s: Tensor
    vh: Tensor
    energy: float

    @property
    def spectrum(self) -> Spectrum:
        """The values as rank rules want them."""
        return Spectrum(self.s.cpu().numpy(), self.energy, min(self.u.shape[0], self.vh.shape[1]))

    def first(self, rank: int) -> Decomposition:
        """The `rank` greatest."""
        return Decomposition(self.u[:, :rank], self.s[:rank], self.vh[:rank], self.energy)

    def compact(self) -> Decomposition:
        """The same, without the memory of what it is a part of."""
        return Decomposition(self.u.clone(), self.s.clone(), self.vh.clone(), self.energy)


def truncated_svd(matrix: Tensor, rank: int, *, draw: Draw) -> Decomposition:
    """The `rank` greatest singular values (fewer if the matrix has fewer) of a float32 (m, n) matrix.

    Randomised subspace iteration (Halko, Martinsson and Tropp, "Finding structure with randomness",
    2011), its power iterations replaced by Chebyshev filters (Zhou and Saad, "Self-consistent-field
    calculations using Chebyshev-filtered subspace iteration", 2006). It goes on until what is still to gain no
    longer matters, and is exact where the rank is near the matrix's own. The result depends on the
    matrix and the draw alone. Raises `NonFiniteResult` for NaN and Inf.
    """
    scaled, exponent = _scaled(matrix, draw.name)
    energy = _energy(scaled)
    wide = scaled.shape[0] < scaled.shape[1]
    tall = scaled.T if wide else scaled
    rank = min(rank, tall.shape[1])
    if energy:
        u, s, vh = _by_products(tall, rank, energy, draw) or torch.linalg.svd(tall.double(), full_matrices=False)
        u, s, vh = u[:, :rank].to(tall.dtype), s[:rank], vh[:rank].to(tall.dtype)
    else:
        u, vh = (torch.eye(*shape, device=tall.device) for shape in ((len(tall), rank), (rank, tall.shape[1])))
        s = tall.new_zeros(rank, dtype=torch.float64)
    if wide:
        u, vh = vh.T, u.T
    return Decomposition(u, s * 2.0**exponent, vh, energy * 4.0**exponent)


def svd_by_rule(matrix: Tensor, rule: Rule, *, draw: Draw) -> Decomposition:
    """As `truncated_svd`, of the rank that the rule asks for.

    The number of singular values known doubles until they decide; where that would be most of them,
    all are found, without their vectors. A rank may be off by one where a value is as near to the
    rule's border as float32 arithmetic can tell.
    """
    size = min(matrix.shape)
    known = rule.limit(size) if rule.kind == "fixed" else min(FIRST_RANK, rule.limit(size))
    while _is_cheap(known, size):
        found = truncated_svd(matrix, known, draw=draw)
        rank = rule.rank(found.spectrum)
        if rank is not None and rank <= known:
            return found if rank == known else found.first(rank).compact()
        known = min(2 * known, rule.limit(size)) if known < rule.limit(size) else size
    rank = rule.rank(spectrum(matrix, draw.name))
    assert rank is not None  # a complete spectrum decides
    return truncated_svd(matrix, rank, draw=draw)


def spectrum(matrix: Tensor, name: str) -> Spectrum:
    """All singular values of a float32 (m, n) matrix, exact to 1e-8 of the greatest.

    `name` is the tensor's, for the error: raises `NonFiniteResult` for NaN and Inf.
    """
    scaled, exponent = _scaled(matrix, name)
    tall = scaled.T if scaled.shape[0] < scaled.shape[1] else scaled
    squares = torch.linalg.eigvalsh(_gram(tall)).flip(0).clamp_(min=0)
    values = squares.sqrt().mul_(2.0**exponent).cpu().numpy()
    return Spectrum(values, float(squares.sum()) * 4.0**exponent, len(values))


def _is_cheap(rank: int, size: int) -> bool:
    """Whether products with the matrix are cheaper than all of its directions."""
    return rank + OVERSAMPLING <= MOST_DIRECTIONS * size


def _scaled(matrix: Tensor, name: str) -> tuple[Tensor, int]:
    """The matrix itself, or one in the middle of float32's range, and the exponent of 2 that gives it back."""
    low, high = torch.aminmax(matrix)
    largest = max(-float(low), float(high))
    if not math.isfinite(float(low) + float(high)):
        raise NonFiniteResult(
            "A change has NaN or Inf in it, so that it has no singular values.",
            key=name,
            hint="one of the models is damaged: `mergekit-sd inspect --scan` tells which",
        )
    exponent = min(max(math.frexp(largest)[1], -126), 126)
    if abs(exponent) <= SAFE or not largest:
        return matrix, 0
    return matrix * 2.0**-exponent, exponent


def _energy(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dim=1).double().square_().sum())


def _gram(matrix: Tensor) -> Tensor:
    """The products of its columns with each other, in float64."""
    total = torch.zeros(matrix.shape[1], matrix.shape[1], dtype=torch.float64, device=matrix.device)
    for rows in torch.split(matrix, max(1, PIECE // matrix.shape[1])):
        wide = rows.double()
        total.addmm_(wide.T, wide)
    return total


def _by_products(tall: Tensor, rank: int, energy: float, draw: Draw) -> tuple[Tensor, Tensor, Tensor] | None:
    """U, S and Vᵀ of rank `rank`; None where products with the matrix A are not the way to them.

    The subspace is of the smaller side. A round amplifies the directions of the `rank` greatest values
    against those past the oversampling, by a polynomial of AᵀA.
    """
    size = tall.shape[1]
    if not _is_cheap(rank, size):
        return None
    start = draw.normal(tall.new_empty(size, rank + OVERSAMPLING))
    basis, images, squares, turn = _ritz(tall, _orthonormal(tall.T @ (tall @ start)))
    degree = FIRST_DEGREE
    for number in range(MOST_ROUNDS):
        cut = max(float(squares[-1]), LEAST_SQUARE * float(squares[0]))
        degree = min(degree, _greatest_degree(2 * squares[:1] / cut - 1))
        before = squares
        basis, images, squares, turn = _ritz(tall, _filtered(tall, basis, (tall.T @ images) @ turn, degree, cut))
        gain = (squares - before)[:rank].clamp_min_(0)
        shrinking = _shrinking(squares, cut, degree)[:rank]
        to_gain = gain / shrinking
        allowed = TOLERANCE * max(energy - float(squares[:rank].sum()), ROUNDING * energy)
        # At first the squares are far from where they go, and so is what the theory makes of them.
        if float((gain / shrinking.clamp_max(1) if number == 0 else to_gain).sum()) <= allowed:
            return _factors(basis[:, :rank], images @ turn[:, :rank])
        cut = max(float(squares[-1]), LEAST_SQUARE * float(squares[0]))
        ratios = 2 * squares[:rank] / cut - 1
        wanted = (
            each for each in range(1, MOST_DEGREE) if float((to_gain / _chebyshev(each, ratios) ** 2).sum()) <= allowed
        )
        degree = next(wanted, MOST_DEGREE)
    return None


def _ritz(tall: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best directions in the basis; its images; the squares of the directions' (float64, descending).

    The images are the basis' as it was: the last of the four turns them, too (the larger side is dear).
    """
    images = tall @ basis
    squares, turn = torch.linalg.eigh(_gram(images))
    turn = turn.flip(1).to(basis.dtype)
    return basis @ turn, images, squares.flip(0).clamp_min_(0), turn


def _filtered(tall: Tensor, basis: Tensor, product: Tensor, degree: int, cut: float) -> Tensor:
    """An orthonormal basis of T(2·AᵀA/cut − 1)·basis, from the product AᵀA·basis.

    The Chebyshev polynomial T is small for squares below the cut, and grows fast above it.
    """
    older, newer = basis, product.mul_(2 / cut).sub_(basis)
    for _ in range(degree - 1):
        newest = (tall.T @ (tall @ newer)).mul_(4 / cut).sub_(newer, alpha=2).sub_(older)
        older, newer = newer, newest
    return _orthonormal(newer)


def _chebyshev(degree: int, x: Tensor) -> Tensor:
    """T(x) for x ≥ 1."""
    return torch.cosh(degree * torch.acosh(x.clamp_min(1)))


def _greatest_degree(x: Tensor) -> int:
    """The greatest degree that amplifies x no more than rounding allows."""
    allowed = (each for each in range(MOST_DEGREE, 1, -1) if float(_chebyshev(each, x)) <= AMPLIFICATION)
    return next(allowed, 1)


def _shrinking(squares: Tensor, cut: float, degree: int) -> Tensor:
    """For each direction, what it gained in a round over what it still has to gain.

    What a direction lacks is a share of those past the oversampling; it falls by the square of how
    much more the filter amplifies the direction than the last one.
    """
    amplified = _chebyshev(degree, 2 * squares / cut - 1)
    return ((amplified / amplified[-1]) ** 2 - 1).clamp_min_(LEAST_SHRINKING)


def _orthonormal(block: Tensor) -> Tensor:
    """Orthonormal columns that span the block's (any, where it is of lower rank)."""
    sizes = torch.linalg.vector_norm(block, dim=0)
    columns: Tensor = torch.linalg.qr(block / sizes.clamp_min(torch.finfo(block.dtype).tiny)).Q
    return columns


def _factors(basis: Tensor, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, S and Vᵀ of images·basisᵀ.

    By QR of both sides in float64: neither is orthonormal beyond rounding, and of small values the
    images' directions are rounding themselves.
    """
    left, upper = torch.linalg.qr(images.double())
    right, lower = torch.linalg.qr(basis.double())
    u, s, vh = torch.linalg.svd(torch.linalg.solve_triangular(lower, upper, upper=True, left=False))
    return left @ u, s, vh @ right.T
