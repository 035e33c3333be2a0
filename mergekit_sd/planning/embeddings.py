"""Textual inversions and hypernetworks made of others: which tensors meet, and what does not fit.

Owns the steps whose result is one of these. Must not know their files' forms (`forms`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_sd.architectures import detect
from mergekit_sd.errors import FamilyMismatch, MissingTensors, ShapeMismatch, UsageError
from mergekit_sd.operations.embeddings import LAYER, VECTORS
from mergekit_sd.planning.expression import Apply, Expression
from mergekit_sd.planning.forms import PLAIN, Form, Vectors, check_kind, path_of, settings_of, vectors_of
from mergekit_sd.planning.models import Model, StepReport
from mergekit_sd.recipe.load import Step
from mergekit_sd.text import count

CANCELLED = 1e-6  # of the weights' magnitudes: a sum as small as this is none
NEARLY_ONE = 1e-9
_LINEAR = (None, "", "linear")
_LAYER = re.compile(r"^(\d+\.[01])\.linear\.?(\d+)\.(?:weight|bias)$")


def merge_embeddings(step: Step, operands: Mapping[str, Model], _seed: int) -> tuple[Model, StepReport]:
    """One textual inversion of several; each text encoder's vectors for themselves."""
    found = {label: vectors_of(model) for label, model in operands.items()}
    models, vectors = list(operands.values()), list(found.values())
    for model, each in zip(models, vectors, strict=True):
        _check_fits(models[0], vectors[0], model, each)
    weights, mode = _numbers(step), step.settings["mode"]
    tensors: dict[str, Expression] = {}
    for encoder, first in vectors[0].tensors.items():
        parts = tuple(each.tensors[encoder] for each in vectors)
        rows = [_rows(part) for part in parts]
        shape = (sum(rows) if mode == "concat" else max(rows), first.shape[-1])
        said = {"weights": weights, "mode": mode}
        tensors[encoder or PLAIN] = Apply(VECTORS, parts, said, shape, first.dtype)
    notes = _padded(models, vectors) if mode == "blend" else ()
    form = Form(step.settings["style"], {})
    model = Model(step.name, "weight", detect(tensors), tensors, models[0].origin, form=form)
    return model, _report(step, weights, len(tensors), notes)


def _check_fits(first: Model, vectors: Vectors, other: Model, theirs: Vectors) -> None:
    """Both are for the same text encoders. Raises FamilyMismatch or ShapeMismatch."""
    hint = "`mergekit-sd inspect` tells what each is for"
    if set(vectors.tensors) != set(theirs.tensors):
        two, one = (other, first) if len(theirs.tensors) > 1 else (first, other)
        message = f'"{two.name}" is for the two text encoders of SDXL, "{one.name}" for one.'
        raise FamilyMismatch(message, file=path_of(other), hint=hint)
    for encoder, tensor in vectors.tensors.items():
        width, another = tensor.shape[-1], theirs.tensors[encoder].shape[-1]
        if width != another:
            message = f'The vectors of "{first.name}" have {width:,} numbers, those of "{other.name}" have {another:,}.'
            raise ShapeMismatch(message, file=path_of(other), key=encoder or None, hint=hint)


def _rows(tensor: Expression) -> int:
    return math.prod(tensor.shape[:-1])


def _padded(models: Sequence[Model], vectors: Sequence[Vectors]) -> tuple[str, ...]:
    numbers = [max(map(_rows, each.tensors.values())) for each in vectors]
    most = max(numbers)
    return tuple(
        f'"{model.name}" has {count(number, "vector")} of {most}: zeros stand for the missing ones'
        for model, number in zip(models, numbers, strict=True)
        if number < most
    )


# --- hypernetworks -----------------------------------------------------------------------------------------


def merge_hypernetworks(step: Step, operands: Mapping[str, Model], _seed: int) -> tuple[Model, StepReport]:
    """The mean of several, at the strength that the weights add up to."""
    models = list(operands.values())
    for model in models:
        check_kind(model, "hypernetwork")
        _check_alike(models[0], model)
    weights = _numbers(step)
    strength = math.fsum(weights)
    if abs(strength) <= CANCELLED * math.fsum(map(abs, weights)):
        raise UsageError(
            "The weights add up to 0: that is no mean, and a hypernetwork of strength 0 does nothing.",
            hint="give weights that add up to the strength that you want",
        )
    scaled = set() if abs(strength - 1) <= NEARLY_ONE else _last_layers(models[0])
    shares = tuple(weight / strength for weight in weights)
    tensors: dict[str, Expression] = {}
    for name, first in models[0].tensors.items():
        parts = tuple(model.tensors[name] for model in models)
        times = strength if name in scaled else 1.0
        said = {"shares": shares, "strength": times}
        untouched = not first.dtype.is_float or (len(parts) == 1 and times == 1)
        tensors[name] = first if untouched else Apply(LAYER, parts, said, first.shape, first.dtype)
    kept = ("step", "sd_checkpoint", "sd_checkpoint_name", "name") if len(models) > 1 else ()
    settings = {name: text for name, text in settings_of(models[0]).items() if name not in kept}
    model = Model(step.name, "weight", models[0].layout, tensors, models[0].origin, form=Form(settings=settings))
    return model, _report(step, weights, sum(isinstance(each, Apply) for each in tensors.values()), ())


def _check_alike(first: Model, other: Model) -> None:
    """One structure, and the same between its layers. Raises MissingTensors, ShapeMismatch or FamilyMismatch."""
    file, hint = path_of(other), "`mergekit-sd inspect` tells the structure of each"
    for has, lacks in ((first, other), (other, first)):
        missing = [name for name in has.tensors if name not in lacks.tensors]
        if missing:
            message = f'"{lacks.name}" lacks {count(len(missing), "layer tensor")} that "{has.name}" has.'
            raise MissingTensors(message, file=file, key=missing[0], hint=hint, details=missing)
    for name, tensor in first.tensors.items():
        shape = other.tensors[name].shape
        if tensor.shape != shape:
            message = f'"{other.name}" has shape {list(shape)} where "{first.name}" has {list(tensor.shape)}.'
            raise ShapeMismatch(message, file=file, key=name, hint=hint)
    one, another = _between(first), _between(other)
    if one != another:
        message = f'"{first.name}" has {one} between its layers, "{other.name}" has {another}.'
        raise FamilyMismatch(message, file=file, hint="only hypernetworks that compute alike have a mean")


def _between(model: Model) -> str:
    """What stands between the layers, in words."""
    settings = settings_of(model)
    activation = settings.get("activation_func")
    if activation in _LINEAR:
        return "nothing"
    return f"{activation}, after the last one as well," if _activates_output(settings) else str(activation)


def _activates_output(settings: Mapping[str, str]) -> bool:
    """The WebUI takes it for so where a file says nothing."""
    return settings.get("activate_output", "True") == "True"


def _last_layers(model: Model) -> set[str]:
    """The tensors that a strength goes into: of each net, what comes last. Raises UsageError where none can take it.

    A norm comes after the activation, and its weight and bias take a factor as a linear layer's do.
    """
    layers = {name: (found[1], int(found[2])) for name in model.tensors if (found := _LAYER.match(name))}
    last: dict[str, int] = {}
    for net, place in layers.values():
        last[net] = max(place, last.get(net, 0))
    names = {name for name, (net, place) in layers.items() if place == last[net]}
    settings = settings_of(model)
    linear = any(len(model.tensors[name].shape) == 2 for name in names)
    if linear and settings.get("activation_func") not in _LINEAR and _activates_output(settings):
        raise UsageError(
            f'"{model.name}" has an activation ({settings["activation_func"]}) after its last layer, so no strength '
            "can be put into its weights.",
            file=path_of(model),
            hint="give weights that add up to 1, and the strength in the prompt: <hypernet:name:0.5>",
        )
    return names


# --- both --------------------------------------------------------------------------------------------------


def _numbers(step: Step) -> tuple[float, ...]:
    """Each file's weight. Raises UsageError for weights per block, which these files do not have."""
    numbers = [weights.describe() for weights in step.parameters.values()]
    if not all(isinstance(number, float) for number in numbers):
        raise UsageError(
            f'"{step.name}" takes one number for each file: there are no blocks.', hint="weights = [0.5, 0.5]"
        )
    return tuple(number for number in numbers if isinstance(number, float))


def _report(step: Step, weights: Sequence[float], merged: int, notes: tuple[str, ...]) -> StepReport:
    settings: dict[str, Any] = {**step.settings, "weights": list(weights)}
    return StepReport(
        step.name,
        step.operation.name,
        dict(step.operands),
        {},
        settings,
        merged=merged,
        folded=0,
        carried=0,
        kept=(),
        dropped=(),
        notes=notes,
    )
