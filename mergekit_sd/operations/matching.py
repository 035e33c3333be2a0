"""Weight matching: the permutations of one model's hidden units that bring it nearest to another.

Ainsworth, Hayase & Srinivasa, "Git Re-Basin: merging models modulo permutation symmetries" (2023),
algorithm 1: one group of units after the other gets its best permutation while the others stay
(a linear assignment problem), until nothing changes. Owns that descent; which units belong
together is told by its caller.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from mergekit_sd.lazy import torch
from mergekit_sd.operations.survey import Models
from mergekit_sd.operations.types import Key, Tensor

# A descent that has not come to rest by then would go on for the roundings' sake.
SWEEPS = 50
# What moves must gain more than the inner products' rounding in float32.
ROUNDING = 1e-6
# Elements of the inner products that may be held at a time, one square matrix for each tensor: 256 MiB.
HELD = 1 << 26
# Magnitudes up to 2^40 and down to 2^-40 are multiplied as they are: float32 holds their products' sums.
PLAIN = 40

Orders: TypeAlias = dict[Key, dict[int, Any]]
"""For a tensor's axis, which of its old places (numpy, int64) each new place takes its values from."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a group's units lie in a tensor: on `axis`, one after the other from each of `starts` on."""

    axis: int
    starts: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Group:
    """Units that can only be permuted alike in all these tensors: `units` of them, `size` elements each.

    `blocks` > 1: the units form so many blocks of equal length; a block changes place as a whole,
    and its units only within it.
    """

    units: int
    size: int
    blocks: int
    places: Mapping[str, Place]


def match(models: Models, groups: Sequence[Group]) -> Orders:
    """The orders of the second model's units that match the first's; what stays in place is left out."""
    import numpy as np

    current = {group: np.arange(group.units) for group in groups}
    stale = set(groups)
    orders: Orders = {}
    for _ in range(SWEEPS):
        for group in groups:
            if group not in stale:
                continue
            stale.discard(group)
            cost = _cost(models, group, orders)
            best = assign(cost, group.blocks)
            if _gains(cost, current[group], best):
                current[group] = best
                _reorder(models, group, best, orders)
                stale |= {other for other in groups if _touch(group, other)}
        if not stale:
            break
    return orders


def _touch(one: Group, other: Group) -> bool:
    """Whether the groups permute different axes of some tensor, so that one's best order depends on the other's."""
    return any(name in other.places and other.places[name].axis != place.axis for name, place in one.places.items())


# --- assignments --------------------------------------------------------------------------------------


def assign(cost: Any, blocks: int) -> Any:
    """For each row the column that makes the sum least; with blocks, only columns of one block for one block's rows.

    With blocks it is an assignment of blocks whose costs are the assignments within them.
    """
    import numpy as np
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

    if blocks == 1:
        return linear_sum_assignment(cost)[1]
    length = len(cost) // blocks
    cells = cost.reshape(blocks, length, blocks, length).swapaxes(1, 2)
    inner = np.empty((blocks, blocks, length), dtype=np.int64)
    outer = np.empty((blocks, blocks))
    for row, column in np.ndindex(blocks, blocks):
        inner[row, column] = linear_sum_assignment(cells[row, column])[1]
        outer[row, column] = cells[row, column][np.arange(length), inner[row, column]].sum()
    chosen = linear_sum_assignment(outer)[1]
    return (inner[np.arange(blocks), chosen] + chosen[:, None] * length).ravel()


def _gains(cost: Any, old: Any, new: Any) -> bool:
    """Whether the units that move gain more by it than a rounding."""
    import numpy as np

    moved = np.flatnonzero(old != new)
    before, after = cost[moved, old[moved]], cost[moved, new[moved]]
    return bool((before - after).sum() > ROUNDING * (np.abs(before) + np.abs(after)).sum())


# --- costs --------------------------------------------------------------------------------------------


def _cost(models: Models, group: Group, orders: Orders) -> Any:
    """How little each unit of a is like each unit of b: minus their inner product over all tensors of the group.

    The largest tensors come first, so that threads end together; the sum's order is always the same.
    """
    total = torch.zeros(group.units, group.units, dtype=torch.float64)
    names = sorted(group.places, key=lambda name: -math.prod(models.shapes[name]))
    step = max(1, HELD // group.units**2)
    for start in range(0, len(names), step):
        some = names[start : start + step]
        places = {models.keys[name]: group.places[name] for name in some}
        for products, scale in models.map(_products(group, places, orders), some):
            total.sub_(products, alpha=scale)
    return total.numpy()


def _products(
    group: Group, places: Mapping[Key, Place], orders: Orders
) -> Callable[[Key, tuple[Tensor, ...]], tuple[Tensor, float]]:
    """For `Models.map`: the inner products of a tensor's units, and the number that they are to be multiplied by."""

    def products(key: Key, operands: tuple[Tensor, ...]) -> tuple[Tensor, float]:
        place = places[key]
        a, scale_a = _tamed(operands[0])
        b, scale_b = _tamed(operands[1])
        others = {axis: order for axis, order in orders.get(key, {}).items() if axis != place.axis}
        b = permuted(b, others)
        result = torch.zeros(group.units, group.units, device=a.device)
        for start in place.starts:
            result.addmm_(_as_rows(a, place.axis, start, group), _as_rows(b, place.axis, start, group).T)
        return result.cpu(), scale_a * scale_b

    return products


def _as_rows(values: Tensor, axis: int, start: int, group: Group) -> Tensor:
    """A matrix of one row for each unit."""
    stretch = values.narrow(axis, start, group.units * group.size)
    return stretch.movedim(axis, 0).reshape(group.units, stretch.numel() // group.units)


def _tamed(values: Tensor) -> tuple[Tensor, float]:
    """The values as float32 can multiply them, and what they are to be multiplied by to be what they were.

    NaN and Inf tell nothing of how units match: such a tensor counts for nothing here, and shows in the result.
    """
    top = max(map(abs, map(float, torch.aminmax(values)))) if values.numel() else 0.0
    if not math.isfinite(top):
        return torch.zeros_like(values), 0.0
    exponent = math.frexp(top)[1] if top else 0
    if abs(exponent) <= PLAIN:
        return values, 1.0
    exponent = max(-126, min(126, exponent))
    return values * 2.0**-exponent, 2.0**exponent


# --- orders -------------------------------------------------------------------------------------------


def permuted(values: Tensor, orders: Mapping[int, Any]) -> Tensor:
    """The tensor with these axes' places taken in these orders."""
    for axis, order in orders.items():
        values = values.index_select(axis, torch.from_numpy(order).to(values.device))
    return values


def _reorder(models: Models, group: Group, units: Any, orders: Orders) -> None:
    """Enter a group's order of units into its tensors' axes."""
    import numpy as np

    elements = (units[:, None] * group.size + np.arange(group.size)).ravel()
    for name, place in group.places.items():
        axes = orders.setdefault(models.keys[name], {})
        order = axes.get(place.axis, np.arange(models.shapes[name][place.axis])).copy()
        for start in place.starts:
            order[start : start + elements.size] = start + elements
        axes[place.axis] = order
