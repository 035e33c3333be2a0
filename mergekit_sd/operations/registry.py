"""The registry: one decorated function is one operation, and its signature is its schema.

Owns what the rest of the project knows of an operation. Must not know files, recipes or threads.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Any, TypeVar, get_args

from mergekit_sd.operations.types import OperandKind, ParameterKind, Space

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Operand:
    """A model or a delta that the operation takes."""

    name: str
    space: Space


@dataclass(frozen=True, slots=True)
class Parameter:
    """A number per block: its default (None: must be given) and its bounds (None: none)."""

    name: str
    default: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Operation:
    """One merge method, as everything outside `operations` sees it."""

    name: str
    function: Callable[..., Any]
    purpose: str
    formula: str
    summary: str
    operands: tuple[Operand, ...]
    parameters: tuple[Parameter, ...]
    result: Space
    whole: bool = False
    """True: needs the whole tensor at once (norms, SVD). False: elementwise, worked in chunks."""
    fold: Callable[..., str | None] | None = None
    """Given the parameters, the operand that the result equals, or None: folds to a copy."""
    mixes: tuple[tuple[str, str], ...] | None = None
    """The pairs of operands that are blended, where it is not every pair of models."""
    also: tuple[str, ...] = ()
    """What other tools call it."""

    def folds_to(self, parameters: dict[str, float]) -> str | None:
        """The operand that the result equals for these parameters, if it does."""
        return self.fold(**parameters) if self.fold else None

    @property
    def mixed_operands(self) -> tuple[tuple[str, str], ...]:
        """The pairs of models whose values are blended: what a mixed VAE comes from.

        In `add_difference` only b and c: where they agree, the difference is zero.
        """
        return (
            self.mixes
            if self.mixes is not None
            else tuple(combinations((o.name for o in self.operands if o.space != "delta"), 2))
        )


OPERATIONS: dict[str, Operation] = {}


def operation(
    purpose: str,
    formula: str,
    *,
    whole: bool = False,
    fold: Callable[..., str | None] | None = None,
    mixes: tuple[tuple[str, str], ...] | None = None,
    also: tuple[str, ...] = (),
) -> Callable[[F], F]:
    """Register a pure function of float32 tensors as an operation of the recipe language.

    The function takes its operands by position, its parameters by keyword, and `out`: a buffer
    for the result (may be ignored when `whole`). It must not change its operands.
    """

    def register(function: F) -> F:
        operands, parameters, result = _read_signature(function)
        summary = (inspect.getdoc(function) or "").split("\n\n")[0].replace("\n", " ")
        OPERATIONS[function.__name__] = Operation(
            name=function.__name__,
            function=function,
            purpose=purpose,
            formula=formula,
            summary=summary,
            operands=operands,
            parameters=parameters,
            result=result,
            whole=whole,
            fold=fold,
            mixes=mixes,
            also=also,
        )
        return function

    return register


def _read_signature(function: Callable[..., Any]) -> tuple[tuple[Operand, ...], tuple[Parameter, ...], Space]:
    signature = inspect.signature(function)
    operands: list[Operand] = []
    parameters: list[Parameter] = []
    for name, parameter in signature.parameters.items():
        kind = next((arg for arg in get_args(parameter.annotation)[1:]), None)
        if isinstance(kind, OperandKind):
            operands.append(Operand(name, kind.space))
        elif isinstance(kind, ParameterKind):
            default = None if parameter.default is inspect.Parameter.empty else float(parameter.default)
            parameters.append(Parameter(name, default, kind.low, kind.high))
        elif name != "out":
            raise TypeError(f"{function.__name__}: what is {name}? Annotate it with a word of operations.types.")
    result = next(arg for arg in get_args(signature.return_annotation)[1:] if isinstance(arg, OperandKind))
    return tuple(operands), tuple(parameters), result.space
