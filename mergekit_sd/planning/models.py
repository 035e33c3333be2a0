"""Models and steps as the plan sees them: for each tensor's name, the expression that makes it.

Owns what a step does to names: which tensors are merged, kept, carried, dropped; folding to
copies; the inpainting rule. Must not know outputs, torch, or how expressions are computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from mergekit_sd.architectures import Layout, Role, ema_name
from mergekit_sd.errors import FamilyMismatch, MissingTensors, ShapeMismatch
from mergekit_sd.formats.tensor import ModelFile
from mergekit_sd.operations import Operation
from mergekit_sd.operations.types import Space
from mergekit_sd.planning.expression import Apply, Expression, FirstChannels, Read, RestChannels
from mergekit_sd.recipe.load import ModelRef, Step
from mergekit_sd.text import count, listed

MERGEABLE = (Role.weight, Role.unknown)
PLAIN_CHANNELS = 4
EXTRA_CHANNELS = (8, 9)  # instruct-pix2pix, inpainting


@dataclass(frozen=True)
class Model:
    """A model or a step: `tensors` by logical name, in the order of the first operand's file.

    A delta holds only tensors that differ can: what is absent from it is no difference.
    `origin` is the input whose layout and untouched tensors it carries (the first operand's).
    """

    name: str
    space: Space
    layout: Layout
    tensors: Mapping[str, Expression]
    origin: int

    def mergeable(self) -> list[str]:
        """The names that operations work on: floating-point weights, neither junk nor schedule."""
        places = self.layout.places
        return [n for n, e in self.tensors.items() if places[n].role in MERGEABLE and e.dtype.is_float]


@dataclass(frozen=True)
class StepReport:
    """What a step does, for `plan` and for the report of a run.

    `weights`: for each parameter, each block's (or component's) least and greatest value.
    `kept` are missing from another operand and stay as they are; `dropped` are only elsewhere.
    """

    name: str
    operation: str
    operands: Mapping[str, str]
    weights: Mapping[str, Mapping[str, tuple[float, float]]]
    merged: int
    folded: int
    carried: int
    kept: tuple[str, ...]
    dropped: tuple[str, ...]


def model_of_file(number: int, ref: ModelRef, file: ModelFile, layout: Layout) -> Model:
    """Input number `number` as a model; with `weights = "ema"` its EMA weights as the UNet."""
    tensors: dict[str, Expression] = {
        layout.canonical[name]: Read(number, tensor) for name, tensor in file.tensors.items()
    }
    if ref.weights == "ema":
        unet = [name for name in tensors if layout.places[name].component == "unet"]
        missing = [name for name in unet if ema_name(name) not in tensors]
        if missing or not unet:
            raise MissingTensors(
                f"It has no EMA weights for {count(len(missing), 'tensor')} of its UNet.",
                file=file.path,
                hint='leave out weights = "ema" for this model',
                details=missing,
            )
        tensors.update({name: tensors[ema_name(name)] for name in unet})
    return Model(ref.name, "weight", layout, tensors, number)


def with_markers(model: Model, source: Model) -> Model:
    """The model with another's markers: a UNet that is wholly another file's brings along what tells its prediction."""
    places = source.layout.places
    markers = {name: e for name, e in source.tensors.items() if places[name].role == Role.marker}
    own = {name: e for name, e in model.tensors.items() if model.layout.places[name].role != Role.marker}
    layout = replace(model.layout, places={**model.layout.places, **{name: places[name] for name in markers}})
    return replace(model, tensors=own | markers, layout=layout)


def apply_step(step: Step, operands: Mapping[str, Model]) -> tuple[Model, StepReport]:
    """Apply a step to its operands, by operand name in the operation's order."""
    operation = step.operation
    first, *others = operands.values()
    _check_families(operands)
    mergeable = first.mergeable()
    _check_common(operands, mergeable)
    weights = {name: spec.resolve(first.layout, mergeable) for name, spec in step.parameters.items()}
    space = _result_space(operation, operands)
    work = set(mergeable)
    tensors: dict[str, Expression] = {}
    kept: list[str] = []
    folded = 0
    for name, expression in first.tensors.items():
        values = [expression, *(other.tensors[name] for other in others if name in other.tensors)]
        if name in work and len(values) == len(operands):
            numbers = {parameter: resolved[name] for parameter, resolved in weights.items()}
            tensors[name] = _fused(name, operation, operands, values, numbers)
            folded += tensors[name] in values
        else:
            if name in work:
                kept.append(name)
            if space == "weight" or first.space == "delta":
                tensors[name] = expression
    dropped = {
        n: None for o in others for n in o.tensors if n not in first.tensors and o.layout.places[n].role != Role.ema
    }
    report = StepReport(
        step.name,
        operation.name,
        dict(step.operands),
        {name: _by_block(first.layout, resolved) for name, resolved in weights.items()},
        merged=len(mergeable) - len(kept) - folded,
        folded=folded,
        carried=len(first.tensors) - len(mergeable),
        kept=tuple(kept),
        dropped=tuple(dropped),
    )
    return Model(step.name, space, first.layout, tensors, first.origin), report


def _result_space(operation: Operation, operands: Mapping[str, Model]) -> Space:
    if operation.result != "same":
        return operation.result
    return next(operands[operand.name].space for operand in operation.operands if operand.space == "same")


def _check_families(operands: Mapping[str, Model]) -> None:
    first, *others = operands.values()
    for other in others:
        mine, its = first.layout.architecture, other.layout.architecture
        if mine and its and mine.family != its.family:
            raise FamilyMismatch(
                f'"{first.name}" is {mine.title} and "{other.name}" is {its.title}: '
                "models of different families cannot be merged.",
                hint="take models of one family",
            )


def _check_common(operands: Mapping[str, Model], mergeable: list[str]) -> None:
    first, *others = operands.values()
    for other in others:
        if other.space == "weight" and mergeable and not any(name in other.tensors for name in mergeable):
            raise FamilyMismatch(
                f'"{first.name}" and "{other.name}" have no tensor in common.',
                hint="are both of one kind? `mergekit-sd inspect` tells what a file is",
                details=[f"{first.name}: {listed(first.tensors)}", f"{other.name}: {listed(other.tensors)}"],
            )


def _fused(
    name: str,
    operation: Operation,
    operands: Mapping[str, Model],
    values: list[Expression],
    numbers: dict[str, float],
) -> Expression:
    """The operation on one tensor's expressions, folded to an operand where it equals one."""
    first = values[0]
    folds_to = operation.folds_to(numbers)
    position = list(operands).index(folds_to) if folds_to else None
    if position == 0:
        return first
    narrow = _narrowed_channels(name, operands, values)
    if narrow:
        values = [v if v.shape[1] == narrow else FirstChannels(v, narrow, v.dtype) for v in values]
    parameters = tuple(numbers.items())
    result: Expression = Apply(operation, tuple(values), parameters, values[0].shape, first.dtype)
    if position is not None:
        result = values[position]
    return RestChannels(result, first, first.shape, first.dtype) if narrow else result


def _narrowed_channels(name: str, operands: Mapping[str, Model], values: list[Expression]) -> int | None:
    """The inpainting rule: 4 where only the first 4 input channels are merged, None where shapes agree.

    Raises ShapeMismatch for every other difference of shape (broadcasting is never meant).
    """
    first = values[0]
    shapes = dict(zip(operands, (value.shape for value in values), strict=True))
    odd = next((operand for operand, shape in shapes.items() if shape != first.shape), None)
    if odd is None:
        return None
    hint = "are they variants of one model? `mergekit-sd diff` shows where two files differ"
    if all(len(s) == 4 and (s[0], *s[2:]) == (first.shape[0], *first.shape[2:]) for s in shapes.values()):
        channels = {shape[1] for shape in shapes.values()}
        if first.shape[1] in EXTRA_CHANNELS and channels == {first.shape[1], PLAIN_CHANNELS}:
            return PLAIN_CHANNELS
        if first.shape[1] == PLAIN_CHANNELS and channels - {PLAIN_CHANNELS} <= set(EXTRA_CHANNELS):
            hint = f'swap them: the inpainting or pix2pix model ("{operands[odd].name}") must be the first operand'
    raise ShapeMismatch(
        f'"{operands[odd].name}" has shape {list(shapes[odd])} where '
        f'"{next(iter(operands.values())).name}" has {list(first.shape)}.',
        key=name,
        hint=hint,
    )


def _by_block(layout: Layout, resolved: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    ranges: dict[str, tuple[float, float]] = {}
    for name, value in resolved.items():
        place = layout.places[name]
        label = place.block or place.component or "other"
        low, high = ranges.get(label, (value, value))
        ranges[label] = (min(low, value), max(high, value))
    return ranges
