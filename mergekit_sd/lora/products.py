"""A change as a product of another kind: LoHa's of elements (Hadamard), LoKr's of blocks (Kronecker).

Owns how the factors are found. Must not know names or files. Formulas are in LyCORIS' terms (Yeh et
al., "Navigating text-to-image customization: from LyCORIS fine-tuning to model evaluation", 2024).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mergekit_sd.lazy import torch
from mergekit_sd.lora.factors import Factors, split
from mergekit_sd.lora.svd import truncated_svd
from mergekit_sd.operations.draws import Draw

if TYPE_CHECKING:
    from mergekit_sd.operations.types import Tensor

# Sweeps over both halves of a LoHa at most, and the share of the distance that one must gain for there to be a next.
SWEEPS, SETTLED = 64, 1e-3
# What the half that starts as ones starts with besides, so that its other columns have a way to go.
SPREAD = 0.1
# Added to the diagonal of least squares, relative to it, so that columns that are not needed have an answer.
RIDGE = 1e-6


@dataclass(frozen=True, slots=True)
class Hadamard:
    """ΔW = (w1_a·w1_b) ⊙ (w2_a·w2_b): a's are (out, r), b's (r, in)."""

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor

    def change(self) -> Tensor:
        """ΔW (out, in)."""
        return (self.w1_a @ self.w1_b).mul_(self.w2_a @ self.w2_b)


@dataclass(frozen=True, slots=True)
class Kronecker:
    """ΔW = kron(w1, w2): w1 (a, b) whole, w2 (c, d) whole or as factors; out is a·c, in is b·d."""

    w1: Tensor
    w2: Tensor | Factors

    def change(self) -> Tensor:
        """ΔW (out, in)."""
        return torch.kron(self.w1, self.w2.change() if isinstance(self.w2, Factors) else self.w2)


def hadamard(change: Tensor, rank: int, *, draw: Draw) -> Hadamard:
    """A LoHa of that rank near a float32 (out, in) change.

    There is no closed form. With one half given, each row and each column of the other is a problem
    of least squares, and the halves take turns, from the best plain LoRA and a half of ones, until
    a turn gains next to nothing. The result is no farther from the change than that LoRA, which is
    half the size. It is often not the nearest: turns end in local minima, even where the change is
    a LoHa, and a LoRA of the same size (of rank 2r) may be nearer. Slow beside a LoRA: r² products
    with the matrix in place of r.
    """
    rank = min(rank, *change.shape)
    first = split(truncated_svd(change, rank, draw=draw), balanced=True)
    best = Hadamard(first.up, first.down, *_ones(change, rank))
    least = _distance(change, best)
    # Columns of zeros would never grow.
    spread = [draw.normal(each, stream=1).mul_(SPREAD) for each in (best.w2_a, best.w2_b)]
    now = replace(best, w2_a=best.w2_a + spread[0], w2_b=best.w2_b + spread[1])
    last = math.inf
    for _ in range(SWEEPS):
        now = Hadamard(now.w1_a, now.w1_b, *_half(change, now.w1_a @ now.w1_b, now.w2_b))
        now = Hadamard(*_half(change, now.w2_a @ now.w2_b, now.w1_b), now.w2_a, now.w2_b)
        distance = _distance(change, now)
        if distance < least:
            best, least = now, distance
        if last - distance <= SETTLED * distance:
            break
        last = distance
    return best


def kronecker(change: Tensor, factor: int, *, draw: Draw, rank: int | None = None) -> Kronecker:
    """The nearest LoKr to a float32 (out, in, …) change; of a convolution, w2's columns are its in·kh·kw.

    w1 has the greatest divisors of out and in that are no more than `factor` and than what they leave
    (a + c and b + d as small as can be). The nearest product is the first singular pair of the change
    with its blocks as rows (Van Loan and Pitsianis, "Approximation with Kronecker products", 1993).
    `rank`: w2 is then factored by its own singular values.
    """
    out, columns = change.shape[:2]
    a, b = (_divisor(size, factor) for size in (out, columns))
    blocks = change.reshape(a, out // a, b, -1).transpose(1, 2)
    first = split(truncated_svd(blocks.reshape(a * b, -1), 1, draw=draw), balanced=True)
    w1, w2 = first.up.reshape(a, b), first.down.reshape(out // a, -1)
    return Kronecker(w1, w2 if rank is None else split(truncated_svd(w2, rank, draw=draw)))


def _ones(like: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of that rank whose product is ones."""
    a, b = like.new_zeros(like.shape[0], rank), like.new_zeros(rank, like.shape[1])
    a[:, 0], b[0] = 1, 1
    return a, b


def _half(change: Tensor, other: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest a for b, then the nearest b for that a, with other ⊙ (a·b) for the change."""
    a = _least_squares(change, other, b)
    return a, _least_squares(change.T, other.T, a.T).T


def _least_squares(change: Tensor, other: Tensor, b: Tensor) -> Tensor:
    """The a with the least ‖change − other ⊙ (a·b)‖: for each row, (r, r) normal equations."""
    rank, columns = b.shape
    pairs = (b[:, None] * b[None]).reshape(rank * rank, columns)
    normal = (other.square() @ pairs.T).reshape(-1, rank, rank).double()
    wanted = ((other * change) @ b.T).double()
    diagonal = normal.diagonal(dim1=1, dim2=2)
    diagonal.add_(RIDGE * diagonal.mean(1, keepdim=True) + torch.finfo(change.dtype).tiny)
    solved: Tensor = torch.linalg.solve(normal, wanted)
    return solved.to(change.dtype)


def _distance(change: Tensor, product: Hadamard) -> float:
    return float(torch.linalg.vector_norm(change - product.change()))


def _divisor(size: int, factor: int) -> int:
    """The greatest divisor of `size` up to `factor` and to its own square root."""
    return max(each for each in range(1, min(factor, math.isqrt(size)) + 1) if size % each == 0)
