"""The words in which an operation's signature declares its operands and parameters.

An operation is a function of float32 tensors; its annotations say which operands are models
(weights) and which are differences of models (deltas), and what each parameter may be. The
recipe's schema, the command line and the docs are read off them. No torch is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional, TypeAlias

if TYPE_CHECKING:
    import torch

    Tensor: TypeAlias = torch.Tensor
else:
    Tensor = Any

Space = Literal["weight", "delta", "same"]


@dataclass(frozen=True, slots=True)
class OperandKind:
    """What an operand or a result is. `same`: weight or delta, one and the same throughout."""

    space: Space


@dataclass(frozen=True, slots=True)
class ParameterKind:
    """A number per block. `low` and `high` bound it unless the step says `extrapolate = true`."""

    low: float | None
    high: float | None


Weight = Annotated[Tensor, OperandKind("weight")]
Delta = Annotated[Tensor, OperandKind("delta")]
Same = Annotated[Tensor, OperandKind("same")]

PerBlock = Annotated[float, ParameterKind(0.0, 1.0)]
Factor = Annotated[float, ParameterKind(None, None)]

# A buffer of the result's shape that no operand uses, or None to allocate one.
Out: TypeAlias = Optional[Tensor]  # noqa: UP045  (evaluated, and Tensor is Any then)
