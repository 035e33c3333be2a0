"""What an operation that must know whole models sees of them before any tensor is made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from mergekit_sd.operations.types import Key, Tensor

T = TypeVar("T")


class Models(Protocol):
    """The operands of one step: every tensor that it merges, made when asked for and not kept."""

    @property
    def keys(self) -> Mapping[str, Key]:
        """The tensors that the step merges, by name, in the first operand's order."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Their shapes."""

    def tensors(self, name: str) -> tuple[Tensor, ...]:
        """One tensor of each operand, whole, float32."""

    def map(self, function: Callable[[Key, tuple[Tensor, ...]], T], names: Iterable[str]) -> list[T]:
        """`function` of each tensor's key and operands, on the run's threads; results in the order of `names`."""

    def held(self, tensor: Tensor) -> Tensor:
        """A tensor of the result, as it may wait to be written: rounded already where all outputs round alike."""
