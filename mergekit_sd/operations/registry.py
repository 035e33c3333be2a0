"""The registry: one decorated function is one operation, and its signature is its schema.

Owns what the rest of the project knows of an operation. Must not know files, recipes or threads.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal, TypeVar, get_args

from mergekit_sd.operations.types import (
    ChoiceKind,
    ContextKind,
    FormulaKind,
    ListKind,
    NumberKind,
    OperandKind,
    SettingKind,
    Space,
)

F = TypeVar("F", bound=Callable[..., Any])
By = Literal["element", "row", "tensor", "model"]
"""What an operation must see at once: any elements, whole rows (output units), whole tensors, whole models."""


PURPOSES = (
    "mix two models",
    "carry a difference onto a model",
    "mix three models",
    "mix many models",
    "merge fine-tunes of one base",
    "by structure",
    "plain arithmetic",
    "operate on one model",
    "LoRA and its relatives",
    "textual inversions and hypernetworks",
)
"""What operations are for, in the order in which they are listed."""


@dataclass(frozen=True, slots=True)
class Operand:
    """A model or a delta that the operation takes; `many`: a list of them, `optional`: it may be left out."""

    name: str
    space: Space
    many: bool = False
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Parameter:
    """What else a step says: its default (None: must be given) and what it may be."""

    name: str
    default: Any
    kind: NumberKind | SettingKind | ChoiceKind | ListKind | FormulaKind


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
    context: tuple[str, ...]
    """What the engine gives: the names of keywords among `draw`, `key`, `survey`."""
    result: Space
    by: By = "element"
    fold: Callable[..., str | None] | None = None
    """Given the parameters, the operand that the result equals, or None: folds to a copy."""
    survey: Callable[..., Any] | None = None
    """What it must learn of the whole models first: see `operation`."""
    mixes: tuple[tuple[str, str], ...] | None = None
    """The pairs of operands that are blended, where it is not every pair of models."""
    also: tuple[str, ...] = ()
    """What other tools call it."""
    planned: bool = False
    """Done by the plan, which knows names and models; the function only says what it takes."""

    @property
    def whole(self) -> bool:
        """Whether it needs whole tensors; otherwise it is worked in chunks of elements."""
        return self.by != "element"

    @property
    def seeded(self) -> bool:
        """Whether it draws random numbers."""
        return "draw" in self.context

    @property
    def many(self) -> Operand | None:
        """The operand that is a list, if there is one; it is the last."""
        return self.operands[-1] if self.operands and self.operands[-1].many else None

    def takes(self, models: int) -> bool:
        """Whether it works on so many operands; a list takes one or more."""
        needed = sum(not operand.optional for operand in self.operands)
        return needed <= models and (self.many is not None or models <= len(self.operands))

    def operand(self, label: str) -> Operand:
        """The operand of a label: its name, for one of a list `models.0`, …"""
        name = label.partition(".")[0]
        return next(operand for operand in self.operands if operand.name == name)

    def folds_to(self, parameters: Mapping[str, Any], key: object = None) -> str | None:
        """The operand that the result equals for these parameters, if it does; of a list, `models.0`, …"""
        if self.fold is None:
            return None
        return self.fold(**parameters, key=key) if "key" in self.context else self.fold(**parameters)

    def apply(self, operands: Sequence[Any], keywords: Mapping[str, Any], out: Any) -> Any:
        """Call the function with operands in order, the list's one after the other."""
        if self.many:
            single = len(self.operands) - 1
            operands = (*operands[:single], tuple(operands[single:]))
        return self.function(*operands, **keywords, out=out)

    def mixed_operands(self, models: Sequence[str]) -> tuple[tuple[str, str], ...]:
        """The pairs among these operands, all whole models, whose values are blended: what a mixed VAE comes from.

        In `add_difference` only b and c: where they agree, the difference is zero.
        """
        return tuple(combinations(models, 2)) if self.mixes is None else self.mixes


OPERATIONS: dict[str, Operation] = {}


def operation(
    purpose: str,
    formula: str,
    *,
    by: By = "element",
    fold: Callable[..., str | None] | None = None,
    survey: Callable[..., Any] | None = None,
    mixes: tuple[tuple[str, str], ...] | None = None,
    also: tuple[str, ...] = (),
    planned: bool = False,
) -> Callable[[F], F]:
    """Register a pure function of float32 tensors as an operation of the recipe language.

    The function takes its operands by position (a list as one tuple), its parameters and context
    by keyword, and `out`: a buffer for the result (may be ignored when `by` is not "element"). It
    must not change its operands. `fold` takes the parameters (and `key`, if the function does).

    Where `by` is "element" the tensors are flat pieces of a tensor, the same piece of each
    operand, and a piece's end may be padded with zeros: neither shape nor sums mean anything.

    `survey(models)` is called once for a step, before any tensor is made, with a `survey.Models`;
    what it returns comes to the function as its `survey`.
    """

    if purpose not in PURPOSES:
        raise TypeError(f'"{purpose}" is none of {PURPOSES}.')

    def register(function: F) -> F:
        summary = (inspect.getdoc(function) or "").split("\n\n")[0].replace("\n", " ")
        OPERATIONS[function.__name__] = Operation(
            name=function.__name__,
            function=function,
            purpose=purpose,
            formula=formula,
            summary=summary,
            **_read_signature(function),
            by=by,
            fold=fold,
            survey=survey,
            mixes=mixes,
            also=also,
            planned=planned,
        )
        return function

    return register


def _read_signature(function: Callable[..., Any]) -> dict[str, Any]:
    signature = inspect.signature(function)
    operands: list[Operand] = []
    parameters: list[Parameter] = []
    context: list[str] = []
    for name, parameter in signature.parameters.items():
        kind = _word(parameter.annotation)
        if isinstance(kind, OperandKind):
            operands.append(Operand(name, kind.space, kind.many, kind.optional))
        elif isinstance(kind, NumberKind | SettingKind | ChoiceKind | ListKind | FormulaKind):
            default = None if parameter.default is inspect.Parameter.empty else parameter.default
            parameters.append(Parameter(name, default, kind))
        elif isinstance(kind, ContextKind):
            if name != kind.what:
                raise TypeError(f"{function.__name__}: call it {kind.what}, not {name}.")
            context.append(name)
        elif name != "out":
            raise TypeError(f"{function.__name__}: what is {name}? Annotate it with a word of operations.types.")
    if any(operand.many or operand.optional for operand in operands[:-1]):
        raise TypeError(f"{function.__name__}: a list or an operand that may be left out comes last.")
    result = _word(signature.return_annotation)
    assert isinstance(result, OperandKind)
    return {
        "operands": tuple(operands),
        "parameters": tuple(parameters),
        "context": tuple(context),
        "result": result.space,
    }


def _word(annotation: Any) -> object:
    return next((arg for arg in get_args(annotation)[1:] if not isinstance(arg, type)), None)
