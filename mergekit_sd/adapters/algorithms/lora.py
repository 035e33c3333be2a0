"""LoRA and what its files hold alike: LoCon, LoRA-FA, DyLoRA. ΔW = s·up·down.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021). With a middle part it is LyCORIS'
Tucker decomposition of a convolution.
"""

from __future__ import annotations

from mergekit_sd.adapters.algorithms.algorithm import Algorithm, Parts, Shape, Shapes
from mergekit_sd.adapters.algorithms.parts import SETTINGS, expect, expect_matrix, flat, rank_from, scale, tucker
from mergekit_sd.adapters.styles import DOWN, UP
from mergekit_sd.operations.types import Tensor

MID = "lora_mid.weight"


def _rank(parts: Shapes) -> int:
    return rank_from(parts, DOWN)


def _check(parts: Shapes, shape: Shape) -> None:
    """down (r, in, …), up (out, r); or down (r, in), mid (r, r, …), up (out, r)."""
    expect_matrix(shape, "LoRA")
    rank = _rank(parts)
    if MID in parts:
        expect(parts, DOWN, shape, rank, shape[1:2])
        expect(parts, MID, shape, rank, (rank, *shape[2:]))
    else:
        expect(parts, DOWN, shape, rank, shape[1:])
    expect(parts, UP, shape, shape[0], (rank,))


def _delta(parts: Parts, shape: Shape) -> Tensor:
    down, up = flat(parts, DOWN), flat(parts, UP)
    up = up * scale(parts, down.shape[0])
    product = tucker(parts[MID], up.T, down) if MID in parts else up @ down
    return product.reshape(shape)


LORA = Algorithm(
    "LoRA", (frozenset({DOWN, UP}),), frozenset({DOWN, UP, MID}) | SETTINGS, check=_check, rank=_rank, delta=_delta
)
