"""What each block of a family gets of a parameter, before there is a model: what bars are drawn from.

Owns the view by block. The numbers are the engine's own, resolved tensor by tensor. Must not open files.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache

from mergekit_sd.architectures import catalog, places
from mergekit_sd.architectures.layout import Layout, Role
from mergekit_sd.recipe.positions import Where
from mergekit_sd.recipe.weights import parse_weights

BASE = "base"


@dataclass(frozen=True, slots=True)
class BlockNumber:
    """What a block gets: the number of most of its tensors, and the lowest and highest of them."""

    value: float
    low: float
    high: float

    @property
    def is_one(self) -> bool:
        """Whether all its tensors have the same number."""
        return self.low == self.high


def family_blocks(family: str) -> tuple[str, ...]:
    """The blocks of a family's UNet in their order, "base" (all outside the UNet) first.

    Families are sd1, sd2, sdxl and sdxl-refiner; raises UsageError on others.
    """
    return (BASE, *catalog.get(family).blocks)


def block_weights(value: object, family: str, *, parameter: str = "alpha", seed: int = 0) -> dict[str, BlockNumber]:
    """Each block's number, in the order of `family_blocks`, for any form in which a recipe writes weights.

    `parameter` and the recipe's `seed` are what random weights depend on. Raises RecipeError where the value is no
    weights, or does not fit the family.
    """
    layout, names, block_of = _whole_model(family)
    weights = parse_weights(value, where=Where(None, (*parameter.split("."),)))
    found: dict[str, Counter[float]] = {block: Counter() for block in family_blocks(family)}
    for name, number in weights.resolve(layout, names, seed).items():
        found[block_of[name]][number] += 1
    return {
        block: BlockNumber(numbers.most_common(1)[0][0], min(numbers), max(numbers)) for block, numbers in found.items()
    }


@cache
def _whole_model(family: str) -> tuple[Layout, list[str], dict[str, str]]:
    """A model of the family that has everything: its layout, what is weighed, and the block of each."""
    architecture = catalog.get(family)
    found = places.of_architecture(architecture, architecture.tensors, bare_unet=False)
    block_of = {name: place.block or BASE for name, place in found.items() if place.role is Role.weight}
    layout = Layout("checkpoint", architecture, {name: name for name in found}, found)
    return layout, list(block_of), block_of
