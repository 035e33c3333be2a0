"""What a merge method must be: its formula in float64 numpy, and the laws that it keeps.

Each `oracle_*.py` beside this file holds METHODS, a Case by operation name, written from the
formula (a paper's or a tool's) and not from our code; `test_operations.py` holds all of them
against the registry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import torch
from hypothesis import strategies as st

from mergekit_sd.operations import OPERATIONS, Operation
from mergekit_sd.operations.draws import Draw
from mergekit_sd.operations.types import ChoiceKind, Key, ListKind, NumberKind

SHAPES = ((), (0,), (1,), (7,), (64,), (3, 5), (16, 12), (2, 3, 3, 3), (4, 0, 2), (0, 3))
KINDS = ("normal", "zero", "huge", "tiny", "equal", "opposite", "sparse", "constant", "bf16", "fp8", "dyadic")
LAWS = {
    "equal": "of equal models the result is that model",
    "alpha 0": "alpha 0 gives the first operand",
    "scales": "scaling all operands scales the result",
    "symmetric": "f(a, b; alpha) = f(b, a; 1 − alpha)",
    "commutes": "the order of the list does not matter",
}


@dataclass(frozen=True)
class Case:
    """`formula`: float64 arrays in, as the operation takes tensors (a list as a list; `draw`, `key`
    and `survey` as it takes them), float64 array out.

    `slack`: how far float32 may be from it, relative to the operands' largest magnitude.
    `parameters`: strategies where the bounds of the signature say too little.
    `kinds`: of operands; fewer where a threshold would turn a rounding into another choice.
    `context`: makes what the engine gives besides draw and key: called with the operands' list.
    """

    formula: Callable[..., Any]
    laws: frozenset[str] | set[str] = frozenset()
    slack: float = 4e-7
    parameters: Mapping[str, st.SearchStrategy[Any]] = field(default_factory=dict)
    kinds: Sequence[str] = KINDS
    shapes: Sequence[tuple[int, ...]] = SHAPES
    context: Callable[[list[torch.Tensor]], dict[str, Any]] = lambda operands: {}
    finite: bool = True
    """Whether finite operands always give a finite result."""
    shows: bool = True
    """Whether NaN or Inf in the first operand always shows in the result."""


def numbers(shape: tuple[int, ...], kind: str, seed: int) -> torch.Tensor:
    """A float32 tensor of a kind; those of kind "equal" are equal, "opposite" their negative."""
    rng = np.random.default_rng(0 if kind in ("equal", "opposite", "constant") else seed)
    values = np.asarray(rng.standard_normal(shape)) * 0.1
    match kind:
        case "zero" | "huge" | "tiny":
            values = values * {"zero": 0.0, "huge": 1e31, "tiny": 1e-39}[kind]
        case "opposite":
            values = -values
        case "sparse":
            values = values * (rng.random(shape) < 0.3)
        case "constant":
            values = np.full(shape, 0.25)
        case "bf16":
            values = values.astype(ml_dtypes.bfloat16)
        case "fp8":
            values = values.astype(ml_dtypes.float8_e4m3fn)
        case "dyadic":  # sums and differences of these are exact in float32, and no two are equal
            size = int(np.prod(shape))
            values = (rng.permutation(2 * size)[:size].reshape(shape) - size + 0.5) / 64
    return torch.from_numpy(np.asarray(values).astype(np.float32))


@dataclass(frozen=True)
class Example:
    """An operation with operands (flat: a list's come one after the other) and keywords."""

    operation: Operation
    operands: list[torch.Tensor]
    parameters: dict[str, Any]
    context: dict[str, Any]

    def call(self, operands: Sequence[torch.Tensor] | None = None, out: Any = None, **changed: Any) -> torch.Tensor:
        """The operation's function, as the engine calls it."""
        keywords = {**self.parameters, **self.context, **changed}
        given = self.operands if operands is None else operands
        if self.operation.survey and operands is not None:
            keywords["survey"] = CASES[self.operation.name].context(list(operands))["survey"]
        return self.operation.apply(given, keywords, out)

    def oracle(self) -> np.ndarray:
        """The formula, in float64."""
        wide: list[Any] = [np.asarray(each.double().numpy()) for each in self.operands]
        if self.operation.many:
            single = len(self.operation.operands) - 1
            wide = [*wide[:single], wide[single:]]
        with np.errstate(all="ignore"):
            found = CASES[self.operation.name].formula(*wide, **self.parameters, **self.context)
        return np.asarray(found, dtype=np.float64)

    @property
    def largest(self) -> float:
        """The operands' largest magnitude."""
        return max((float(each.abs().max()) for each in self.operands if each.numel()), default=0.0)


CASES: dict[str, Case] = {}


@st.composite
def examples(draw: Any, names: Sequence[str], **changed: Any) -> Example:
    """An example of one of these operations; `kinds` and `shapes` may be narrowed."""
    operation = OPERATIONS[draw(st.sampled_from(sorted(names)))]
    case = CASES[operation.name]
    shape = draw(st.sampled_from(changed.get("shapes", case.shapes)))
    single = sum(not (o.many or o.optional) for o in operation.operands)
    more = draw(st.integers(1, 4)) if operation.many else 0
    more = draw(st.integers(0, 1)) if operation.operands[-1].optional else more
    kind = st.sampled_from(changed.get("kinds", case.kinds))
    seed = draw(st.integers(0, 99))
    operands = [numbers(shape, draw(kind), seed + index) for index in range(single + more)]
    parameters = {p.name: draw(case.parameters.get(p.name, strategy(p.kind, more))) for p in operation.parameters}
    context = dict(case.context(operands))
    given: dict[str, Any] = {"draw": Draw(seed, "some.weight"), "key": Key("some.weight", "sd1", "unet", "IN04")}
    context |= {what: given[what] for what in operation.context if what in given and what not in context}
    return Example(operation, operands, parameters, context)


def strategy(kind: NumberKind | ChoiceKind | ListKind, models: int) -> st.SearchStrategy[Any]:
    """Values that a parameter may take."""
    if isinstance(kind, ChoiceKind):
        return st.sampled_from(kind.options)
    if isinstance(kind, ListKind):
        return st.tuples(*[st.floats(-10, 10) for _ in kind.names])
    low = -1.5 if kind.low is None else kind.low
    high = max(low + 2.0, 1.5) if kind.high is None else kind.high
    number = st.floats(low, high, allow_subnormal=False)
    return st.tuples(*[number] * models) if kind.each else number
