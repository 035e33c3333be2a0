"""What an extraction or a resize kept of each module's change, and of each block's.

Owns the numbers that are told. Must not know how they are shown.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModuleKept:
    """One module: `change` is ‖Δ‖_F, `kept` the share of it in the factors (0 to 1), `size` their bytes.

    Rank 0: the module was left out. A module without a change has kept all of it.
    """

    name: str
    block: str
    rank: int
    size: int
    change: float
    kept: float

    def as_json(self) -> dict[str, object]:
        """One flat object."""
        return {
            "name": self.name,
            "block": self.block,
            "rank": self.rank,
            "bytes": self.size,
            "change": self.change,
            "kept": self.kept,
        }


@dataclass(frozen=True, slots=True)
class BlockKept:
    """The modules of a block (IN00 to OUT11, M00) or of a text encoder, or all: norms are over all their values."""

    name: str
    modules: int
    least_rank: int
    greatest_rank: int
    size: int
    change: float
    kept: float

    def as_json(self) -> dict[str, object]:
        """One flat object."""
        return {
            "name": self.name,
            "modules": self.modules,
            "least_rank": self.least_rank,
            "greatest_rank": self.greatest_rank,
            "bytes": self.size,
            "change": self.change,
            "kept": self.kept,
        }


def total(name: str, modules: Iterable[ModuleKept]) -> BlockKept:
    """The modules (at least one) taken together."""
    those = list(modules)
    ranks = [each.rank for each in those]
    change = math.hypot(*(each.change for each in those))
    kept = math.hypot(*(each.change * each.kept for each in those))
    size = sum(each.size for each in those)
    return BlockKept(name, len(those), min(ranks), max(ranks), size, change, kept / change if change else 1.0)


def by_block(modules: Iterable[ModuleKept]) -> list[BlockKept]:
    """One summary a block, in the order in which the blocks first appear."""
    blocks: dict[str, list[ModuleKept]] = {}
    for each in modules:
        blocks.setdefault(each.block, []).append(each)
    return [total(name, those) for name, those in blocks.items()]
