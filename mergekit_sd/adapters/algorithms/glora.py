"""GLoRA: a low-rank change of the weight's inputs, and a LoRA. ΔW = s·(W·a1·a2 + b1·b2).

Chavan et al., "One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning" (2023). Old files of
LyCORIS have the factors the other way round, ΔW = s·(W·a2·a1 + b2·b1), and count the kernel among the
inputs; shapes tell. Where they do not, since the rank is that of the whole weight, the newer is meant.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from mergekit_sd.adapters.algorithms.algorithm import Algorithm, Parts, Shape, Shapes
from mergekit_sd.adapters.algorithms.parts import (
    SETTINGS,
    expect,
    expect_matrix,
    flat,
    rank_from,
    scale,
    shape_of,
    tucker,
)
from mergekit_sd.lazy import torch
from mergekit_sd.operations.types import Tensor

A1, A2, B1, B2, BM = "a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight"
_FACTORS = frozenset({A1, A2, B1, B2})


@dataclass(frozen=True, slots=True)
class _Roles:
    """Which part is which factor: ΔW = s·(W·first·second + up·down); `columns`: what W's columns count."""

    first: str
    second: str
    up: str
    down: str
    columns: Shape


def _roles(parts: Shapes, shape: Shape) -> _Roles:
    new = shape_of(parts, A1)[:1] == shape[1:2] and shape_of(parts, B1)[:1] == shape[:1]
    if not new and BM not in parts and shape_of(parts, B2)[:1] == shape[:1]:
        return _Roles(A2, A1, B2, B1, shape[1:])
    return _Roles(A1, A2, B1, B2, shape[1:2])


def _rank(parts: Shapes) -> int:
    """The fewer of the rows of a1 and a2: the other has as many as there are inputs."""
    return min(rank_from(parts, A1), rank_from(parts, A2))


def _check(parts: Shapes, shape: Shape) -> None:
    """First (columns, r), second (r, columns), up (out, r), down (r, in, …) or with a core down (r, in)."""
    expect_matrix(shape, "GLoRA")
    roles = _roles(parts, shape)
    rank = rank_from(parts, roles.second)
    expect(parts, roles.first, shape, prod(roles.columns), (rank,))
    expect(parts, roles.second, shape, rank, roles.columns)
    expect(parts, roles.up, shape, shape[0], (rank,))
    if BM in parts:
        expect(parts, BM, shape, rank, (rank, *shape[2:]))
    expect(parts, roles.down, shape, rank, shape[1:2] if BM in parts else shape[1:])


def _change(weight: Tensor, parts: Parts, strength: float) -> Tensor:
    roles = _roles(parts, tuple(weight.shape))
    first, second, up, down = (flat(parts, name) for name in (roles.first, roles.second, roles.up, roles.down))
    factor = strength * scale(parts, second.shape[0])
    columns = weight.reshape(weight.shape[0], first.shape[0], -1)
    turned = torch.einsum("ork,rj->ojk", torch.einsum("oik,ir->ork", columns, first), second)
    added = tucker(parts[BM], up.T, down) if BM in parts else up @ down
    return weight + factor * (turned.reshape(weight.shape) + added.reshape(weight.shape))


GLORA = Algorithm("GLoRA", (_FACTORS,), _FACTORS | {BM} | SETTINGS, check=_check, rank=_rank, change=_change)
