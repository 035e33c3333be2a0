"""Steps that the plan carries out itself: formulas, and which function does which surgery.

A formula's arithmetic becomes expressions like any other step's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from mergekit_sd.operations import OPERATIONS
from mergekit_sd.operations.planned import PAIR
from mergekit_sd.planning import surgery
from mergekit_sd.planning.adapters import inject_loras
from mergekit_sd.planning.embeddings import merge_embeddings, merge_hypernetworks
from mergekit_sd.planning.expression import Apply, Expression, RestChannels
from mergekit_sd.planning.forms import convert
from mergekit_sd.planning.lora import extract_lora
from mergekit_sd.planning.lora_files import merge_loras, rename_lora, resize_lora
from mergekit_sd.planning.models import (
    Model,
    StepReport,
    apply_step,
    check_families,
    dropped_names,
    narrowed,
    narrowed_channels,
)
from mergekit_sd.recipe.formula import Sum, Term, count_of, counts_of
from mergekit_sd.recipe.load import Step


def follow_step(step: Step, operands: Mapping[str, Model], seed: int) -> tuple[Model, StepReport]:
    """Apply a step, whoever carries it out. `operands` by label, in the step's order; `seed`: the recipe's."""
    if step.formula:
        return _apply_formula(step, step.formula, operands)
    if step.operation.name == "inject_lora":
        return inject_loras(step, operands, seed if step.seed is None else step.seed)
    if step.operation.name in MAKING:
        return MAKING[step.operation.name](step, operands, seed)
    if step.operation.name in SURGERY:
        model = SURGERY[step.operation.name](*operands.values(), **step.settings)
        return replace(model, name=step.name), _unchanged(step, model, operands)
    return apply_step(step, operands, seed)


MAKING: Mapping[str, Callable[[Step, Mapping[str, Model], int], tuple[Model, StepReport]]] = {
    "extract_lora": extract_lora,
    "merge_loras": merge_loras,
    "resize_lora": resize_lora,
    "rename_lora": rename_lora,
    "merge_embeddings": merge_embeddings,
    "merge_hypernetworks": merge_hypernetworks,
}
SURGERY: Mapping[str, Callable[..., Model]] = {
    "prune": surgery.prune,
    "fix": surgery.fix,
    "extract": surgery.extract,
    "convert": convert,
    "replace": surgery.exchange,
    "exchange_ema": surgery.exchange_ema,
}


def _unchanged(step: Step, model: Model, operands: Mapping[str, Model]) -> StepReport:
    """The report of a step that computes nothing."""
    first = next(iter(operands.values()))
    removed: dict[str, list[str]] = {}
    if step.operation.name == "prune":
        for name in first.tensors:
            if name not in model.tensors:
                removed.setdefault(first.layout.places[name].role.value, []).append(name)
    return StepReport(
        step.name,
        step.operation.name,
        dict(step.operands),
        {},
        step.settings,
        merged=0,
        folded=0,
        carried=len(model.tensors),
        kept=(),
        dropped=(),
        removed={what: tuple(names) for what, names in removed.items()},
    )


# --- formulas -----------------------------------------------------------------------------------------


class _Missing(Exception):
    """A whole model lacks the tensor."""


def _apply_formula(step: Step, formula: Sum, operands: Mapping[str, Model]) -> tuple[Model, StepReport]:
    check_families(operands)
    counts = counts_of({name: model.space for name, model in operands.items()})
    first = operands[formula.leading(counts) or next(formula.names())]
    others = [model for model in operands.values() if model is not first]
    is_weight = count_of(formula, counts) == 1
    work = set(first.mergeable())
    tensors: dict[str, Expression] = {}
    kept: list[str] = []
    for name, expression in first.tensors.items():
        made: Expression | None = expression if is_weight else None
        if name in work:
            try:
                made = _tensor(name, formula, operands, counts, first)
            except _Missing:
                kept.append(name)
        if made is not None:
            tensors[name] = made
    folded = sum(tensors.get(name) is first.tensors[name] for name in work) - (len(kept) if is_weight else 0)
    report = StepReport(
        step.name,
        step.operation.name,
        dict(step.operands),
        {},
        step.settings,
        merged=len(work) - len(kept) - folded,
        folded=folded,
        carried=len(first.tensors) - len(work),
        kept=tuple(kept),
        dropped=dropped_names(first, others),
    )
    return Model(step.name, "weight" if is_weight else "delta", first.layout, tensors, first.origin), report


def _tensor(
    name: str, formula: Sum, operands: Mapping[str, Model], counts: Mapping[str, float], first: Model
) -> Expression | None:
    """The formula for one tensor; None where it has no difference. Raises _Missing."""
    values = {label: model.tensors[name] for label, model in operands.items() if name in model.tensors}
    mine = next(label for label, model in operands.items() if model is first)
    ordered = {mine: values[mine], **values}
    narrow = narrowed_channels(name, {label: operands[label] for label in ordered}, list(ordered.values()))
    if narrow:
        values = {label: narrowed(value, narrow) for label, value in values.items()}
    made = _sum(formula, values, counts)
    whole = first.tensors[name]
    if isinstance(made, Apply):
        made = replace(made, dtype=whole.dtype)
    return RestChannels(made, whole, whole.shape, whole.dtype) if narrow and made else made


def _sum(formula: Sum, values: Mapping[str, Expression], counts: Mapping[str, float]) -> Expression | None:
    """The sum of what is there: a difference that lacks a tensor counts nothing, a model must have it."""
    found: list[tuple[float, Expression]] = []
    for factor, term in formula.terms:
        value = _term(term, values, counts)
        if value is not None:
            found.append((factor, value))
        elif count_of(term, counts) != 0:
            if count_of(formula, counts) == 0:
                return None
            raise _Missing
    return _added([(factor, value) for factor, value in found if factor != 0])


def _term(term: Term, values: Mapping[str, Expression], counts: Mapping[str, float]) -> Expression | None:
    return values.get(term) if isinstance(term, str) else _sum(term, values, counts)


def _added(terms: list[tuple[float, Expression]]) -> Expression | None:
    """The terms added up one by one, which needs two buffers however many there are."""
    if not terms:
        return None
    (factor, total), *rest = terms
    if not rest and factor != 1:
        return Apply(OPERATIONS["scale"], (total,), {"alpha": factor}, total.shape, total.dtype)
    for other in rest:
        total = _pair((factor, total), other)
        factor = 1.0
    return total


def _pair(one: tuple[float, Expression], other: tuple[float, Expression]) -> Apply:
    (factor, first), (other_factor, second) = one, other
    return Apply(PAIR, (first, second), {"factors": (factor, other_factor)}, first.shape, first.dtype)
