"""What an algorithm of the LoRA family is: the parts of a module that it knows, and its formula.

Owns the type. Must not know files, names of layers, or any formula. Parts have kohya's and LyCORIS'
names ("lora_down.weight", "hada_w1_a", …), whatever the file calls them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from mergekit_sd.operations.types import Tensor

Shape: TypeAlias = tuple[int, ...]
Parts: TypeAlias = Mapping[str, Tensor]


class Shaped(Protocol):
    """A tensor, or what a file's header says of one."""

    @property
    def shape(self) -> Shape:
        """Its size along each axis."""


Shapes: TypeAlias = Mapping[str, Shaped]


@dataclass(frozen=True, slots=True)
class Single:
    """The shape of a part that is one number, and stands in no file's header."""

    shape: Shape = ()


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One way to say what a module changes in a weight. It has either `delta` or `change`.

    `needs`: the sets of parts of which one must be there; `takes`: all parts that it knows. `check` refuses parts
    whose shapes do not fit a weight of that shape; the formulas rely on it. `rank` is None where there is none.
    """

    name: str
    needs: tuple[frozenset[str], ...]
    takes: frozenset[str]
    check: Callable[[Shapes, Shape], None]
    rank: Callable[[Shapes], int | None] = lambda _: None
    delta: Callable[[Parts, Shape], Tensor] | None = None
    """ΔW of that shape: the new weight is W + strength·ΔW."""
    change: Callable[[Tensor, Parts, float], Tensor] | None = None
    """The new weight, of a weight and a strength, where the change depends on the weight."""

    @property
    def additive(self) -> bool:
        """Whether it adds the same to any weight: then −strength takes out what strength put in, to rounding."""
        return self.delta is not None
