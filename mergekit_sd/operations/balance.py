"""Balancing attention: what a head's query and key, or its value and output, share alike between them.

Annotations are evaluated (no `from __future__ import annotations` here): they are the schema.
"""

import re
from dataclasses import dataclass
from typing import Any, TypeAlias

from mergekit_sd.lazy import torch
from mergekit_sd.operations.matching import Group
from mergekit_sd.operations.rebasin import groups_of
from mergekit_sd.operations.registry import operation
from mergekit_sd.operations.survey import Models
from mergekit_sd.operations.types import Key, Out, Surveyed, Tensor, Weight, Which

# Of a Gram matrix' mean diagonal: what keeps one that has no inverse from needing it.
RIDGE = 1e-7
_ROLE = re.compile(r"\.(?:to_)?(?P<role>q|k|v|out|in)(?:_proj)?(?:\.0)?[._](?:weight|bias)$")
_PAIRS = (("q", "k"), ("v", "out"))


@dataclass(frozen=True, eq=False)
class Turn:
    """What the heads that lie on `axis` from `start` on are multiplied by: float64 (heads, size, size)."""

    axis: int
    start: int
    matrices: Any


Turns: TypeAlias = dict[Key, list[Turn]]


def find_turns(models: Models) -> Turns:
    """The matrices that balance every attention of a model, by tensor."""
    groups = {name: group for name, group in groups_of(models.keys, models.shapes).items() if "heads" in name}
    turns: Turns = {}
    for group in groups.values():
        roles = _roles(group)
        for one, other in _PAIRS:
            if one not in roles or other not in roles:
                continue
            first, second = (_gram(models, group, roles[role]) for role in (one, other))
            if not (first.isfinite().all() and second.isfinite().all()):
                continue  # it shows in the result
            matrices = _balancing(first, second)
            for role, made in ((one, matrices), (other, _power(matrices, -1.0))):
                for name, axis, start in roles[role]:
                    turns.setdefault(models.keys[name], []).append(Turn(axis, start, made))
    return turns


@operation(
    "by structure",
    "q → S·q, k → S⁻¹·k in every head, S = (A⁻¹ # B)^½ of their Gram matrices A, B; the same for v and out",
    by="model",
    survey=find_turns,
    also=("balance_attention (sd-mecha)",),
)
def balance_attention(a: Weight, *, key: Which, survey: Surveyed, out: Out = None) -> Weight:
    """Shares each head's strength alike between query and key, and between value and output.

    The model computes what it did before, since a head's scores are qᵀk and what it adds is out·v; but
    of the many ways to write a head this is one that merging, pruning or quantising finds even. # is the
    geometric mean of positive matrices (Pusz & Woronowicz, "Functional calculus for sesquilinear
    forms", 1975); after it both Gram matrices are equal. sd-mecha's takes A⁻¹ # B itself for S, by which
    query and key only change their Gram matrices with each other, and its heads are 64 wide
    everywhere.
    """
    result = a.clone()
    for turn in survey.get(key, ()):
        heads, size = turn.matrices.shape[:2]
        stretch = result.narrow(turn.axis, turn.start, heads * size)
        rows = stretch.movedim(turn.axis, 0)
        turned = torch.bmm(turn.matrices.to(a.device), rows.double().reshape(heads, size, -1))
        rows.copy_(turned.reshape(rows.shape))
    return result


def _roles(group: Group) -> dict[str, list[tuple[str, int, int]]]:
    """The tensors of each of q, k, v and out, with their axis and where they begin on it."""
    roles: dict[str, list[tuple[str, int, int]]] = {}
    for name, place in group.places.items():
        found = _ROLE.search(name)
        if found is not None:
            each = "qkv" if found["role"] == "in" else (found["role"],)  # OpenCLIP's three in one
            for role, start in zip(each, place.starts, strict=True):
                roles.setdefault(role, []).append((name, place.axis, start))
    return roles


def _gram(models: Models, group: Group, places: list[tuple[str, int, int]]) -> Tensor:
    """The inner products of each head's units over all that they are multiplied with, in float64."""
    total = torch.zeros(group.units, group.size, group.size, dtype=torch.float64)
    for name, axis, start in places:
        (values,) = models.tensors(name)
        stretch = values.narrow(axis, start, group.units * group.size).movedim(axis, 0)
        rows = stretch.cpu().double().reshape(group.units, group.size, -1)
        total += rows @ rows.mT
    return total


def _balancing(first: Tensor, second: Tensor) -> Tensor:
    """S with S·first·S = S⁻¹·second·S⁻¹: the root of the geometric mean of first⁻¹ and second."""
    first, second = _invertible(first), _invertible(second)
    root, inverse = _power(first, 0.5), _power(first, -0.5)
    return _power(inverse @ _power(root @ second @ root, 0.5) @ inverse, 0.5)


def _invertible(gram: Tensor) -> Tensor:
    """With a little of the unit matrix, scaled to what is there; a head of zeros counts as even."""
    mean = gram.diagonal(dim1=1, dim2=2).mean(1)
    mean = torch.where(mean > 0, mean, 1.0)
    return gram + (RIDGE * mean)[:, None, None] * torch.eye(gram.shape[1], dtype=gram.dtype)


def _power(matrices: Tensor, exponent: float) -> Tensor:
    """A power of symmetric positive matrices."""
    values, vectors = torch.linalg.eigh((matrices + matrices.mT) / 2)
    least = torch.finfo(values.dtype).eps * values.amax(1, keepdim=True)
    power: Tensor = (vectors * values.clamp_min(least).pow(exponent).unsqueeze(1)) @ vectors.mT
    return power
