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

# Vectors more than asked for in each block.
OVERSAMPLING = 16
# Blocks before the first look at what is still to gain: two gains make an estimate.
LEAST_BLOCKS = 3
# Of the energy left out at best, the share that may be lost besides: half of 0.1 % of the error.
TOLERANCE = 1e-3
# Of the whole energy, the share below which float32 arithmetic tells no gain.
ROUNDING = 1e-6
# Outside of 2^±SAFE the squares of float32 numbers, or of the small ones beside them, might not fit.
SAFE = 30
# The rank that is tried first where a rule gives none.
FIRST_RANK = 64
# Elements worked on at a time, in float64.
PIECE = 1 << 20


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


def truncated_svd(matrix: Tensor, rank: int, *, draw: Draw) -> Decomposition:
    """The `rank` greatest singular values (fewer if the matrix has fewer) of a float32 (m, n) matrix.

    A randomised block Krylov method (Musco and Musco, "Randomized block Krylov methods for stronger
    and faster approximate singular value decomposition", 2015), with the oversampling and the start of
    Halko, Martinsson and Tropp ("Finding structure with randomness", 2011). It goes on until what
    another block would gain no longer matters, and is exact where the rank is near the matrix's own. The
    result depends on the matrix and the draw alone. Raises `NonFiniteResult` for NaN and Inf.
    """
    scaled, exponent = _scaled(matrix, draw.name)
    energy = _energy(scaled)
    wide = scaled.shape[0] < scaled.shape[1]
    tall = scaled.T if wide else scaled
    rank = min(rank, tall.shape[1])
    found = _krylov(tall, rank, energy, draw) or torch.linalg.svd(tall.double(), full_matrices=False)
    u, s, vh = found[0][:, :rank].to(matrix.dtype), found[1][:rank], found[2][:rank].to(matrix.dtype)
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
            return found.first(rank)
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
    squares = torch.linalg.eigvalsh(_gram(tall, tall)).flip(0).clamp_(min=0)
    values = squares.sqrt().mul_(2.0**exponent).cpu().numpy()
    return Spectrum(values, float(squares.sum()) * 4.0**exponent, len(values))


def _is_cheap(rank: int, size: int) -> bool:
    """Whether the blocks that are needed at least leave most of the matrix's directions out."""
    return LEAST_BLOCKS * (rank + OVERSAMPLING) <= size


def _scaled(matrix: Tensor, name: str) -> tuple[Tensor, int]:
    """The matrix itself, or one in the middle of float32's range, and the exponent of 2 that gives it back."""
    low, high = torch.aminmax(matrix)
    largest = max(-float(low), float(high))
    if not math.isfinite(float(low) + float(high)):
        raise NonFiniteResult(
            "A change has NaN or Inf in it, so that it has no singular values.",
            key=name,
            hint="Look at both models with `check`: one of them is damaged.",
        )
    exponent = min(max(math.frexp(largest)[1], -126), 126)
    if abs(exponent) <= SAFE or not largest:
        return matrix, 0
    return matrix * 2.0**-exponent, exponent


def _energy(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dim=1).double().square_().sum())


def _gram(a: Tensor, b: Tensor) -> Tensor:
    """aᵀb in float64."""
    length = max(1, PIECE // max(1, a.shape[1]))
    total = torch.zeros(a.shape[1], b.shape[1], dtype=torch.float64, device=a.device)
    for x, y in zip(torch.split(a, length), torch.split(b, length), strict=True):
        total.addmm_(x.double().T, y.double())
    return total


def _krylov(tall: Tensor, rank: int, energy: float, draw: Draw) -> tuple[Tensor, Tensor, Tensor] | None:
    """U, S and Vᵀ of rank `rank`; None where the blocks would fill the space.

    The basis is of the smaller side: block j spans (AᵀA)ʲΩ, made orthogonal to those before.
    """
    size = tall.shape[1]
    if not _is_cheap(rank, size):
        return None
    block = _orthonormal(draw.normal(tall.new_empty(size, rank + OVERSAMPLING)))
    basis, images = block, tall @ block
    squares = _gram(images, images)
    captured = [_captured(squares, rank)]
    while len(captured) < LEAST_BLOCKS or _to_gain(captured) > TOLERANCE * max(energy - float(captured[-1].sum()), ROUNDING*energy):
        if basis.shape[1] + block.shape[1] > size:
            return None
        block = _new_directions(tall.T @ images[:, -block.shape[1] :], basis)
        image = tall @ block
        across = _gram(images, image)
        squares = torch.cat([torch.cat([squares, across], 1), torch.cat([across.T, _gram(image, image)], 1)])
        basis, images = torch.cat([basis, block], 1), torch.cat([images, image], 1)
        captured.append(_captured(squares, rank))
    return _rotated(basis, images, torch.linalg.eigh(squares).eigenvectors[:, -rank:].flip(1))


def _rotated(basis: Tensor, images: Tensor, turn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, S and Vᵀ of images·turn·(basis·turn)ᵀ.

    By QR of both sides: where values are small, the images' directions alone would be rounding.
    """
    left, upper = torch.linalg.qr((images @ turn.to(images.dtype)).double())
    right, lower = torch.linalg.qr((basis @ turn.to(images.dtype)).double())
    u, s, vh = torch.linalg.svd(torch.linalg.solve_triangular(lower, upper, upper=True, left=False))
    return (left @ u).to(basis.dtype), s, (vh @ right.T).to(basis.dtype)


def _captured(squares: Tensor, rank: int) -> Tensor:
    """The energies of the best `rank` directions in the span, from the products of the basis' images."""
    return torch.linalg.eigvalsh(squares)[-rank:]


def _to_gain(captured: list[Tensor]) -> float:
    """The energy that all further blocks would gain, as the gains of each direction fall geometrically (Aitken).

    Each by itself: a great one that has just been found says nothing of the small ones.
    """
    before, last = (captured[-2] - captured[-3]).clamp_min_(0), (captured[-1] - captured[-2]).clamp_min_(0)
    return float(torch.where(before > last, last * last / (before - last), last).sum())


def _new_directions(block: Tensor, basis: Tensor) -> Tensor:
    """Orthonormal columns that span the block's part orthogonal to the basis; any where there is none."""
    block = block / torch.linalg.vector_norm(block, dim=0).clamp_min(torch.finfo(block.dtype).tiny)
    block = torch.linalg.qr(torch.addmm(block, basis, basis.T @ block, alpha=-1)).Q
    # Again: what was left may be rounding, and is no longer orthogonal to the basis once normalised.
    return _orthonormal(torch.addmm(block, basis, basis.T @ block, alpha=-1))


def _orthonormal(block: Tensor) -> Tensor:
    # In float64: energies of a span are sums of squares only as far as its basis is orthonormal.
    return torch.linalg.qr(block.double()).Q.to(block.dtype)
