"""Low-rank factors of a change, as LoRA files hold them: made, joined, made smaller.

Owns the arithmetic of ΔW = scale · up · down. Must not know names or files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_sd.errors import ShapeMismatch
from mergekit_sd.lazy import torch
from mergekit_sd.lora.ranks import Rule, Spectrum
from mergekit_sd.lora.svd import Decomposition

if TYPE_CHECKING:
    from mergekit_sd.operations.types import Tensor


@dataclass(frozen=True, slots=True)
class Factors:
    """ΔW = scale · up · down: up (out, r) and down (r, in), float32 matrices.

    A file's alpha is scale · r.
    """

    up: Tensor
    down: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """How many columns `up` has."""
        return len(self.down)

    @property
    def alpha(self) -> float:
        """What a file says for the scale: scale · rank."""
        return self.scale * self.rank

    def change(self) -> Tensor:
        """ΔW (out, in)."""
        return (self.up @ self.down).mul_(self.scale)

    def in_shape(self, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Up and down for a weight of that shape: (out, in), or (out, in, kh, kw) of a convolution.

        A convolution's are (out, r, 1, 1) and (r, in, kh, kw): down looks at pixels, up mixes.
        """
        ones = [1] * (len(shape) - 2)
        return self.up.reshape(*self.up.shape, *ones), self.down.reshape(self.rank, *shape[1:])


def from_shape(up: Tensor, down: Tensor, scale: float = 1.0) -> Factors:
    """The factors of a linear layer or of a convolution, in whatever of the two shapes they are stored.

    Raises `ShapeMismatch` where up is not of down's rank.
    """
    flat_up, flat_down = up.flatten(1), down.flatten(1)
    if flat_up.shape[1] != len(flat_down):
        raise ShapeMismatch(
            f"The up factor is of rank {flat_up.shape[1]}, the down factor of rank {len(flat_down)}.",
            hint="The file is damaged, or its factors are of a kind that has more than two.",
        )
    return Factors(flat_up, flat_down, scale)


def split(parts: Decomposition, *, balanced: bool = False) -> Factors:
    """up = U·S and down = Vᵀ, as kohya has them, or √S on either side; scale 1, so that alpha is the rank."""
    if not balanced:
        return Factors(parts.u * parts.s.to(parts.u.dtype), parts.vh)
    root = parts.s.sqrt().to(parts.u.dtype)
    return Factors(parts.u * root, parts.vh * root[:, None])


def clamp(factors: Factors, quantile: float) -> Factors:
    """Both factors cut off at the `quantile` of their |values| taken together.

    kohya's extraction does so, at 0.99 of the values with their signs; it costs accuracy.
    """
    sizes = torch.cat([factors.up.flatten(), factors.down.flatten()]).abs_()
    most = torch.kthvalue(sizes, max(1, math.ceil(quantile * len(sizes)))).values
    return Factors(factors.up.clamp(-most, most), factors.down.clamp(-most, most), factors.scale)


def decompose(factors: Factors) -> Decomposition:
    """All r singular values of ΔW (fewer if it has fewer rows or columns), exact, without ΔW itself.

    By QR of both factors and the singular values of an (r, r) matrix, in float64.
    """
    left, upper = torch.linalg.qr(factors.up.double())
    right, lower = torch.linalg.qr(factors.down.double().T)
    u, s, vh = torch.linalg.svd(factors.scale * (upper @ lower.T), full_matrices=False)
    dtype = factors.up.dtype
    return Decomposition((left @ u).to(dtype), s, (vh @ right.T).to(dtype), float(s.square().sum()))


def resize(factors: Factors, rule: Rule) -> tuple[Factors, Decomposition]:
    """The best factors of the rank that the rule asks for; and the whole decomposition they are from.

    Exact for every rule: of a ΔW of rank r, all other singular values are 0.
    """
    parts = decompose(factors)
    rank = rule.rank(Spectrum(parts.s.cpu().numpy(), parts.energy, len(parts.s)))
    assert rank is not None  # all values are known
    return split(parts.first(rank)), parts


def concatenate(parts: Sequence[tuple[Factors, float]]) -> Factors:
    """Σ strengthᵢ·ΔWᵢ exactly, with the ranks added up; scale 1.

    √|strength·scale| goes on either factor, so that the change is multiplied by it once, and the
    sign on up. Raises `ShapeMismatch` where the changes are not of one shape.
    """
    shapes = {(len(each.up), each.down.shape[1]) for each, _ in parts}
    if len(shapes) > 1:
        told = " and ".join(f"{rows} × {columns}" for rows, columns in sorted(shapes))
        raise ShapeMismatch(
            f"The changes to merge are of different shapes: {told}.",
            hint="Merge LoRAs that were made for one family of models.",
        )
    roots = [math.sqrt(abs(strength * each.scale)) for each, strength in parts]
    signed = [math.copysign(root, strength * each.scale) for root, (each, strength) in zip(roots, parts, strict=True)]
    up = torch.cat([each.up * root for root, (each, _) in zip(signed, parts, strict=True)], dim=1)
    down = torch.cat([each.down * root for root, (each, _) in zip(roots, parts, strict=True)])
    return Factors(up, down)
