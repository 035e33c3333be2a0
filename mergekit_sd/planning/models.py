"""Models and steps as the plan sees them: for each tensor's name, the expression that makes it.

Owns what a step does to names: which tensors are merged, kept, carried, dropped; folding to
copies; the inpainting rule. Must not know outputs, torch, or how expressions are computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mergekit_sd.architectures import Layout, Role, ema_name
from mergekit_sd.errors import FamilyMismatch, MissingTensors, ShapeMismatch, WrongFormat
from mergekit_sd.formats.dtypes import OUTPUT_DTYPES
from mergekit_sd.formats.tensor import ModelFile
from mergekit_sd.operations import Operation
from mergekit_sd.operations.draws import Draw
from mergekit_sd.operations.types import Key, Space
from mergekit_sd.planning.expression import Apply, Expression, FirstChannels, Read, RestChannels, Survey
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
    file: ModelFile | None = None
    """Where it is a file as it is."""
    making: Any = None
    """Of a LoRA that a step makes: its `planning.values.Making`."""
    form: Any = None
    """Of a textual inversion or a hypernetwork: how it is to be stored, its `planning.forms.Form`."""

    def mergeable(self) -> list[str]:
        """The names that operations work on: floating-point weights, neither junk nor schedule."""
        places = self.layout.places
        return [n for n, e in self.tensors.items() if places[n].role in MERGEABLE and e.dtype.is_float]


@dataclass(frozen=True)
class StepReport:
    """What a step does, for `plan` and for the report of a run.

    `operands`: names by label. `weights`: for each parameter, each block's (or component's) least and greatest value.
    `settings`: the parameters that are the same for all tensors.
    `kept` are missing from another operand and stay as they are; `dropped` are only elsewhere.
    `removed`: what surgery took out, by what it was ("junk", "ema", …).
    """

    name: str
    operation: str
    operands: Mapping[str, str]
    weights: Mapping[str, Mapping[str, tuple[float, float]]]
    settings: Mapping[str, Any]
    merged: int
    folded: int
    carried: int
    kept: tuple[str, ...]
    dropped: tuple[str, ...]
    removed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    """What people should know, in words."""


def model_of_file(number: int, ref: ModelRef, file: ModelFile, layout: Layout) -> Model:
    """Input number `number` as a model; with `weights = "ema"` its EMA weights as the UNet."""
    tensors: dict[str, Expression] = {
        layout.canonical[name]: Read(number, tensor) for name, tensor in file.tensors.items()
    }
    model = Model(ref.name, "weight", layout, tensors, number, file)
    return with_ema(model, file.path) if ref.weights == "ema" else model


def with_ema(model: Model, path: Path | None = None) -> Model:
    """The model with its EMA weights as the UNet; the copies stay. Raises MissingTensors where one is missing."""
    used = {name: model.tensors[copy] for name, copy in ema_pairs(model, path).items()}
    return replace(model, tensors={**model.tensors, **used})


def ema_pairs(model: Model, path: Path | None = None) -> dict[str, str]:
    """Each weight of the UNet with the name of its EMA copy. Raises MissingTensors where one is missing."""
    places = model.layout.places
    unet = [n for n in model.tensors if places[n].component == "unet" and places[n].role == Role.weight]
    pairs = {name: ema_name(name) for name in unet}
    missing = [name for name, copy in pairs.items() if copy not in model.tensors]
    if missing or not unet:
        raise MissingTensors(
            f'"{model.name}" has no EMA weights for {count(len(missing), "tensor")} of its UNet.',
            file=path,
            hint="take a checkpoint that holds its EMA weights (pruned ones do not), or do without them",
            details=missing,
        )
    return pairs


def with_markers(model: Model, source: Model) -> Model:
    """The model with another's markers: a UNet that is wholly another file's brings along what tells its prediction."""
    places = source.layout.places
    markers = {name: e for name, e in source.tensors.items() if places[name].role == Role.marker}
    own = {name: e for name, e in model.tensors.items() if model.layout.places[name].role != Role.marker}
    layout = replace(model.layout, places={**model.layout.places, **{name: places[name] for name in markers}})
    return replace(model, tensors=own | markers, layout=layout)


def apply_step(step: Step, operands: Mapping[str, Model], seed: int) -> tuple[Model, StepReport]:
    """Apply a step to its operands, by operand label in the step's order. `seed`: the recipe's."""
    first, *others = operands.values()
    _check_models(operands)
    check_families(operands)
    mergeable = first.mergeable()
    _check_common(operands, mergeable)
    seed = seed if step.seed is None else step.seed
    weights = {label: spec.resolve(first.layout, mergeable, seed) for label, spec in step.parameters.items()}
    survey = Survey(step.name, step.operation) if step.operation.survey else None
    space = _result_space(step.operation, operands)
    work = set(mergeable)
    tensors: dict[str, Expression] = {}
    kept: list[str] = []
    folded = 0
    for name, expression in first.tensors.items():
        values = [expression, *(other.tensors[name] for other in others if name in other.tensors)]
        if name in work and len(values) == len(operands):
            key = key_of(first, name)
            context = {"key": key, "draw": Draw(seed, name), "survey": survey}
            given = {what: context[what] for what in step.operation.context}
            tensors[name] = _fused(name, step, operands, values, _parameters(step, weights, name), given, key)
            folded += tensors[name] in values
        else:
            if name in work:
                kept.append(name)
            if space == "weight" or first.space == "delta":
                tensors[name] = expression
    report = StepReport(
        step.name,
        step.operation.name,
        dict(step.operands),
        {label: _by_block(first.layout, resolved) for label, resolved in weights.items()},
        step.settings,
        merged=len(mergeable) - len(kept) - folded,
        folded=folded,
        carried=len(first.tensors) - len(mergeable),
        kept=tuple(kept),
        dropped=dropped_names(first, others),
    )
    return Model(step.name, space, first.layout, tensors, first.origin), report


def key_of(model: Model, name: str) -> Key:
    """What an operation may know of a tensor beside its values."""
    place, architecture = model.layout.places[name], model.layout.architecture
    if architecture is None:
        return Key(name)
    prefix = architecture.components.get(place.component or "", "")
    return Key(name.removeprefix(prefix), architecture.family, place.component, place.block)


def dropped_names(first: Model, others: Iterable[Model]) -> tuple[str, ...]:
    """The tensors that only other operands have; EMA weights, which are never merged, do not count."""
    only = (n for o in others for n in o.tensors if n not in first.tensors and o.layout.places[n].role != Role.ema)
    return tuple(dict.fromkeys(only))


def _parameters(step: Step, weights: Mapping[str, Mapping[str, float]], name: str) -> dict[str, Any]:
    """The operation's parameters for one tensor: numbers, a tuple where each model has its own, settings."""
    found: dict[str, Any] = {}
    for parameter in step.operation.parameters:
        if parameter.name in step.settings:
            found[parameter.name] = step.settings[parameter.name]
        elif parameter.name in weights:
            found[parameter.name] = weights[parameter.name][name]
        else:
            labels = [label for label in weights if label.startswith(f"{parameter.name}.")]
            found[parameter.name] = tuple(weights[label][name] for label in labels)
    return found


def _result_space(operation: Operation, operands: Mapping[str, Model]) -> Space:
    if operation.result != "same":
        return operation.result
    return next(model.space for label, model in operands.items() if operation.operand(label).space == "same")


def check_families(operands: Mapping[str, Model]) -> None:
    """Raises FamilyMismatch for SD1 with SDXL and the like."""
    first, *others = operands.values()
    for other in others:
        mine, its = first.layout.architecture, other.layout.architecture
        if mine and its and mine.family != its.family:
            raise FamilyMismatch(
                f'"{first.name}" is {mine.title} and "{other.name}" is {its.title}: '
                "models of different families cannot be merged.",
                hint="take models of one family",
            )


def _check_models(operands: Mapping[str, Model]) -> None:
    """Raises WrongFormat for a LoRA: mixed factor by factor, two of them make neither's change."""
    lora = next((each for each in operands.values() if each.file and each.layout.kind in ("lora", "lycoris")), None)
    if lora is not None and lora.file:
        raise WrongFormat(
            f'"{lora.name}" is a LoRA: its factors cannot be merged as a model\'s weights.',
            file=lora.file.path,
            hint="inject_lora puts it into a model",
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
    step: Step,
    operands: Mapping[str, Model],
    values: list[Expression],
    parameters: dict[str, Any],
    context: dict[str, Any],
    key: Key,
) -> Expression:
    """The operation on one tensor's expressions, folded to an operand where it equals one."""
    operation, first = step.operation, values[0]
    folds_to = operation.folds_to(parameters, key)
    position = list(operands).index(folds_to) if folds_to else None
    if position == 0:
        return first
    narrow = narrowed_channels(name, operands, values)
    if narrow:
        values = [narrowed(value, narrow) for value in values]
    if position is not None:
        result = values[position]
    else:
        dtype = OUTPUT_DTYPES.get(step.settings.get("dtype", ""), first.dtype)
        result = Apply(operation, tuple(values), parameters, values[0].shape, dtype, context)
        if operation.survey:
            context["survey"].operands[name] = result.operands
            context["survey"].keys[name] = key
    return RestChannels(result, first, first.shape, first.dtype) if narrow else result


def narrowed(value: Expression, channels: int) -> Expression:
    """The first `channels` input channels of a tensor, itself if it has no more."""
    return value if value.shape[1] == channels else FirstChannels(value, channels, value.dtype)


def narrowed_channels(name: str, operands: Mapping[str, Model], values: list[Expression]) -> int | None:
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
