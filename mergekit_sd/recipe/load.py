"""A recipe, loaded: text and `--set` in, one frozen value out that is valid by construction.

Owns the value `Recipe` and how overrides are laid over a recipe's data. Must not open a model, look
for files on disk, or know what a plan is.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mergekit_sd.errors import RecipeError
from mergekit_sd.operations import OPERATIONS, Operation, Parameter
from mergekit_sd.operations.types import NumberKind
from mergekit_sd.recipe.fields import Table
from mergekit_sd.recipe.formula import Sum, parse_formula
from mergekit_sd.recipe.graph import check_names
from mergekit_sd.recipe.loras import LoraUse, parse_lora
from mergekit_sd.recipe.overrides import apply_overrides, plain
from mergekit_sd.recipe.positions import KeyPath, Positions, Where
from mergekit_sd.recipe.read import parse_text, read_document
from mergekit_sd.recipe.schema import (
    DtypeEntry,
    Form,
    ModelEntry,
    OutputEntry,
    SampleEntry,
    check_form,
)
from mergekit_sd.recipe.weights import BlockWeights, parse_weights
from mergekit_sd.text import count


@dataclass(frozen=True)
class ModelRef:
    """An input file as the recipe names it; `file` is not looked for here."""

    name: str
    file: str
    sha256: str | None = None
    weights: Literal["file", "ema"] = "file"


@dataclass(frozen=True)
class Step:
    """One operation on models and steps; operands and parameters are in the operation's order.

    Of a list of models each is an operand of its own, `models.0`, `models.1`, …, and so is the
    weight of each: `weights.0`, …. `settings` are the parameters that are the same for all tensors.
    """

    name: str
    operation: Operation
    operands: dict[str, str]
    parameters: dict[str, BlockWeights]
    settings: dict[str, Any] = field(default_factory=dict)
    formula: Sum | None = None
    seed: int | None = None
    extrapolate: bool = False
    loras: dict[str, LoraUse] = field(default_factory=dict)
    """How LoRA operands are used, by their label."""

    def path_of(self, label: str) -> KeyPath:
        """Where an operand is written."""
        if self.formula:
            return ("steps", self.name, "expr")
        name, _, index = label.partition(".")
        return ("steps", self.name, name, *([int(index)] if index else []))


@dataclass(frozen=True)
class OutputSpec:
    """A file to write. `dtype` maps "default" and, where told apart, components to dtype names."""

    name: str
    model: str
    file: str
    dtype: dict[str, str] = field(default_factory=lambda: {"default": "fp16"})
    overflow: Literal["error", "clamp"] = "error"
    vae: str | None = None
    junk: Literal["drop", "keep"] = "drop"
    ema: Literal["drop", "keep"] = "drop"
    position_ids: Literal["reset", "keep"] = "reset"
    prediction: Literal["epsilon", "v"] | None = None
    sampling: Mapping[str, Any] | None = None
    """How to sample it, by the names of a sample's settings."""

    def dtype_of(self, component: str | None) -> str:
        """The dtype's name ("fp16", …, "keep") for tensors of a component, or of none."""
        return self.dtype.get(component or "default", self.dtype["default"])


@dataclass(frozen=True)
class ControlUse:
    """A ControlNet's file, the picture it is shown, how much it counts and from when to when (shares of the steps)."""

    net: str
    picture: str
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0


@dataclass(frozen=True)
class Sample:
    """Validation pictures; `size` None: the model's own. `extras`: files or folders of what prompts name.

    `given`: the settings that the recipe says, which no model's own defaults replace.
    """

    of: tuple[str, ...]
    prompt: str
    negative: str
    seeds: tuple[int, ...]
    steps: int
    cfg: float
    sampler: str
    size: tuple[int, int] | None
    clip_skip: int | None
    cfg_rescale: float = 0.0
    extras: tuple[str, ...] = ()
    control: tuple[ControlUse, ...] = ()
    given: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Recipe:
    """A recipe in which every key, name, number and space has been checked."""

    path: Path | None
    folder: Path
    title: str | None
    seed: int
    date: datetime.date | None
    models: dict[str, ModelRef]
    steps: dict[str, Step]
    outputs: dict[str, OutputSpec]
    samples: tuple[Sample, ...]
    data: dict[str, Any] = field(repr=False)
    """The plain parsed TOML, overrides applied."""
    positions: Positions = field(repr=False)
    warnings: tuple[str, ...] = ()

    def where(self, *path: str | int) -> Where:
        """A place in this recipe."""
        return Where(str(self.path) if self.path else None, path, self.positions)

    def error(self, message: str, path: KeyPath = (), *, hint: str | None = None) -> RecipeError:
        """A refusal that points into the recipe."""
        return self.where(*path).error(message, hint=hint)


def load_recipe(path: str | Path, overrides: Mapping[str, object] = {}) -> Recipe:
    """Read and check a recipe file; `overrides` maps dotted paths to values (`--set`)."""
    path = Path(path)
    data, positions = read_document(path)
    data, replaced = apply_overrides(data, overrides)
    return recipe_from_data(data, folder=path.parent, path=path, positions=positions.replacing(replaced))


def parse_recipe(text: str, folder: str | Path, path: str | Path | None = None) -> Recipe:
    """Check a recipe's text; relative files lie under `folder`, `path` is the file that errors name."""
    where = Path(path) if path else None
    data, positions = parse_text(text, str(path) if path else None)
    return recipe_from_data(data, folder=Path(folder), path=where, positions=positions)


def recipe_from_data(
    data: Mapping[str, Any], *, folder: Path, path: Path | None = None, positions: Positions | None = None
) -> Recipe:
    """Check a recipe given as plain data; `folder` is what its paths are relative to."""
    where = Where(str(path) if path else None, (), positions or Positions())
    copied: dict[str, Any] = plain(data, where)
    form = check_form(copied, where)
    file = form.file
    recipe = Recipe(
        path=path,
        folder=folder,
        title=file.title,
        seed=file.seed,
        date=file.date,
        models={name: _model(name, entry) for name, entry in file.models.items()},
        steps=_steps(form, copied, where),
        outputs={name: _output(name, entry) for name, entry in file.outputs.items()},
        samples=tuple(_sample(entry) for entry in file.samples),
        data=copied,
        positions=where.positions,
    )
    return replace(recipe, warnings=check_names(recipe))


def _model(name: str, entry: str | ModelEntry) -> ModelRef:
    if isinstance(entry, str):
        return ModelRef(name, entry)
    return ModelRef(name, entry.file, entry.sha256, entry.weights)


def _steps(form: Form, data: Mapping[str, Any], where: Where) -> dict[str, Step]:
    return {
        name: _step(name, table, data["steps"][name], where.at("steps", name)) for name, table in form.steps.items()
    }


def _step(name: str, table: Table, written: Mapping[str, Any], where: Where) -> Step:
    operation = OPERATIONS[written["op"]]
    values = {key: getattr(table, key) for key in type(table).model_fields}
    formula = parse_formula(values["expr"], where.at("expr")) if "expr" in values else None
    loras = _loras(operation, values, where)
    operands = {name: name for name in formula.names()} if formula else _operands(operation, values)
    operands |= {label: use.lora for label, use in loras.items()}
    parameters: dict[str, BlockWeights] = {}
    settings: dict[str, Any] = {}
    models = sum(label.partition(".")[1] == "." for label in operands)
    for each in operation.parameters:
        if isinstance(each.kind, NumberKind):
            parameters |= _weights(each, values[each.name], where.at(each.name), models, values["extrapolate"])
        else:
            settings[each.name] = values[each.name]
    seed, extrapolate = values.get("seed"), values["extrapolate"]
    return Step(name, operation, operands, parameters, settings, formula, seed, extrapolate, loras)


def _operands(operation: Operation, values: Mapping[str, Any]) -> dict[str, str]:
    operands: dict[str, str] = {}
    for operand in operation.operands:
        value = values[operand.name]
        if operand.space == "lora" and operand.many:
            continue
        if operand.many:
            operands |= {f"{operand.name}.{index}": name for index, name in enumerate(value)}
        elif value is not None:
            operands[operand.name] = value
    return operands


def _loras(operation: Operation, values: Mapping[str, Any], where: Where) -> dict[str, LoraUse]:
    return {
        f"{operand.name}.{index}": parse_lora(entry, where.at(operand.name).at(index))
        for operand in operation.operands
        if operand.space == "lora" and operand.many
        for index, entry in enumerate(values[operand.name])
    }


def _weights(
    parameter: Parameter, value: object, where: Where, models: int, extrapolate: bool
) -> dict[str, BlockWeights]:
    """A parameter's weights by its name; of one that each model has its own of, by `weights.0`, ….

    There a list has one entry for each model, in any form that a weight takes; all else is for all.
    """
    kind = parameter.kind
    assert isinstance(kind, NumberKind)

    def parsed(value: object, where: Where) -> BlockWeights:
        return parse_weights(value, where=where, low=kind.low, high=kind.high, extrapolate=extrapolate)

    if not kind.each:
        return {parameter.name: parsed(value, where)}
    if isinstance(value, str) and ":" not in value and "," in value:  # pasted, as the blocks' numbers are
        value = [_number_or_text(part.strip()) for part in value.split(",")]
    if not isinstance(value, list | tuple):
        return {f"{parameter.name}.{index}": parsed(value, where) for index in range(models)}
    if len(value) != models:
        raise where.error(
            f"{parameter.name} is a list of {len(value)} for {count(models, 'model')}.",
            hint="write one number for all, or a list with one entry for each model",
        )
    return {f"{parameter.name}.{index}": parsed(each, where.at(index)) for index, each in enumerate(value)}


def _number_or_text(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _output(name: str, entry: OutputEntry) -> OutputSpec:
    dtype = entry.dtype
    by_part = dtype.model_dump(exclude_none=True) if isinstance(dtype, DtypeEntry) else {"default": dtype}
    sampling = entry.sampling.model_dump(exclude_none=True) if entry.sampling else None
    if sampling and "size" in sampling:
        sampling["size"] = tuple(sampling["size"])
    return OutputSpec(name, dtype=by_part, sampling=sampling, **entry.model_dump(exclude={"dtype", "sampling"}))


def _sample(entry: SampleEntry) -> Sample:
    values = entry.model_dump(exclude={"control"})
    lists = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
    control = tuple(ControlUse(**each.model_dump()) for each in entry.control)
    return Sample(**{**values, **lists}, control=control, given=frozenset(entry.model_fields_set))
