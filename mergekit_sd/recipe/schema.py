"""The form of a recipe: every table and key, strictly, and the JSON Schema for editors.

Owns which keys there are and what each takes; a step's keys are read off the operation registry.
Must not know whether names refer to anything (`graph`) or what weights mean (`weights`).
pydantic does the checking; its words reach nobody.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    BaseModel,
    Field,
    Tag,
    ValidationError,
    create_model,
)
from pydantic_core import ErrorDetails

from mergekit_sd.operations import OPERATIONS
from mergekit_sd.recipe.fields import (
    BY_SHAPE,
    DtypeName,
    FileName,
    LoraEntry,
    Name,
    Pixels,
    SamplerName,
    Seed,
    Sha256,
    Table,
    operand_field,
    parameter_field,
)
from mergekit_sd.recipe.positions import KeyPath, Where, described
from mergekit_sd.recipe.samplers import DEFAULT_SAMPLER
from mergekit_sd.text import did_you_mean, shown

VERSION = 1

# --- tables ---------------------------------------------------------------------------------------


class ModelEntry(Table):
    """An input file."""

    file: FileName = Field(description="Beside the recipe or under a model root; root:name for a registered root.")
    sha256: Sha256 | None = Field(None, description="A pin, checked before a byte is written.")
    weights: Literal["file", "ema"] = Field("file", description="ema: take the EMA weights as the UNet.")


class DtypeEntry(Table):
    """A dtype per component."""

    default: DtypeName = "fp16"
    unet: DtypeName | None = None
    vae: DtypeName | None = None
    text_encoder: DtypeName | None = None
    text_encoder_2: DtypeName | None = None


class SamplingEntry(Table):
    """How pictures of a model are made where nothing else is asked: for distilled models, which need few steps."""

    steps: int | None = Field(None, ge=1, le=1000)
    cfg: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    sampler: SamplerName | None = None
    size: list[Pixels] | None = Field(None, min_length=2, max_length=2, description="Width and height.")
    clip_skip: int | None = Field(None, ge=1, le=12)


class OutputEntry(Table):
    """A file to write."""

    model: Name = Field(description="The model or step to write.")
    file: FileName = Field(description="Under the recipe's folder, --output-root, or a registered root.")
    dtype: Annotated[Annotated[DtypeName, Tag("<text>")] | Annotated[DtypeEntry, Tag("<table>")], BY_SHAPE] = Field(
        "fp16", description="What it is stored as; keep: as the first operand has it."
    )
    overflow: Literal["error", "clamp"] = Field("error", description="When a value does not fit the dtype.")
    vae: Name | None = Field(None, description="A model or step whose VAE is baked in.")
    junk: Literal["drop", "keep"] = Field("drop", description="Tensors that are no part of a model.")
    ema: Literal["drop", "keep"] = Field("drop", description="keep: only where the UNet is an untouched copy.")
    position_ids: Literal["reset", "keep"] = Field("reset", description="The text encoder's position ids.")
    prediction: Literal["epsilon", "v"] | None = Field(None, description="Only where the parents disagree.")
    sampling: SamplingEntry | None = Field(None, description="How to sample it; becomes modelspec.usage_hint.")


class ControlEntry(Table):
    """A ControlNet and the picture that it is shown, ready for it: edges, a depth map, a pose."""

    net: FileName = Field(description="The ControlNet's file, or its folder of diffusers.")
    picture: FileName
    weight: float = Field(1.0, ge=0, le=10, allow_inf_nan=False)
    start: float = Field(0.0, ge=0, le=1, description="A share of the steps.")
    end: float = Field(1.0, ge=0, le=1, description="A share of the steps.")


class SampleEntry(Table):
    """Validation pictures."""

    of: list[Name] = Field(min_length=1, description="Models, steps and outputs.")
    prompt: str
    negative: str = ""
    seeds: list[Seed] = Field(default=[0], min_length=1, description="One picture for each.")
    steps: int = Field(20, ge=1, le=1000)
    cfg: float = Field(7.0, ge=0, le=100, allow_inf_nan=False)
    sampler: SamplerName = DEFAULT_SAMPLER
    size: list[Pixels] | None = Field(None, min_length=2, max_length=2, description="Width and height.")
    clip_skip: int | None = Field(None, ge=1, le=12)
    cfg_rescale: float = Field(0.0, ge=0, le=1, description="For v-prediction: how far guidance keeps the spread.")
    extras: list[FileName] = Field(default=[], description="LoRAs, embeddings, hypernetworks that prompts name.")
    control: list[ControlEntry] = Field(default=[], description="ControlNets.")


class RecipeFile(Table):
    """A recipe of mergekit-sd: models, the steps that merge them, and the files to write."""

    recipe: Literal[1] = Field(description="The version of the recipe language.")
    title: str | None = Field(None, description="Becomes modelspec.title.")
    seed: Seed = Field(0, description="For operations that draw random numbers.")
    date: datetime.date | None = Field(None, description="Becomes modelspec.date; without it no date is written.")
    models: dict[
        Name, Annotated[Annotated[FileName, Tag("<text>")] | Annotated[ModelEntry, Tag("<table>")], BY_SHAPE]
    ] = Field(min_length=1, description="Every input file, by name.")
    steps: dict[Name, dict[str, Any]] = Field(default={}, description="Operations, by name; order does not matter.")
    outputs: dict[Name, OutputEntry] = Field(default={}, description="The files to write, by name.")
    samples: list[SampleEntry] = Field(default=[], description="Validation pictures.")


def sound_setting(name: str, value: object) -> bool:
    """Whether an output could declare this for its pictures."""
    try:
        return SamplingEntry.model_validate({name: value}).model_dump()[name] is not None
    except ValidationError:
        return False


@cache
def step_model(op: str) -> type[Table]:
    """The table of a step of this operation: its operands are names, its parameters weights."""
    operation = OPERATIONS[op]
    fields: dict[str, Any] = {"op": (Literal[op], Field(description=operation.purpose))}
    for operand in operation.operands:
        fields[operand.name] = operand_field(operand)
    for parameter in operation.parameters:
        fields[parameter.name] = parameter_field(parameter)
    if operation.seeded:
        fields["seed"] = (
            Seed | None,
            Field(None, description="For its random numbers; the recipe's seed unless given."),
        )
    fields["extrapolate"] = (bool, Field(False, description="Allow numbers outside the bounds."))
    table: type[Table] = create_model(
        f"Step_{op}", __base__=Table, __doc__=f"{operation.formula}. {operation.summary}", **fields
    )
    return table


# --- checking -------------------------------------------------------------------------------------


class Form(NamedTuple):
    """A recipe whose form is right; weights and names are still as written."""

    file: RecipeFile
    steps: dict[str, Table]


def check_form(data: Mapping[str, Any], where: Where) -> Form:
    """Check every table and key; raises the first fault in the file's order, the others as details."""
    _check_version(data, where)
    faults: list[_Fault] = []
    file: RecipeFile | None = None
    try:
        file = RecipeFile.model_validate(data)
    except ValidationError as error:
        faults += [_fault(details, _KEYS) for details in error.errors(include_url=False)]
    written = data.get("steps")
    steps: dict[str, Table] = {}
    for name, step in written.items() if isinstance(written, Mapping) else ():
        if isinstance(step, Mapping):
            table = _check_step(str(name), step, faults)
            if table:
                steps[name] = table
    if faults or file is None:
        raise _first(faults, where)
    return Form(file, steps)


def _check_version(data: Mapping[str, Any], where: Where) -> None:
    version = data.get("recipe")
    if version is None:
        raise where.error("There is no recipe key.", hint=f"write recipe = {VERSION} as the first line")
    if isinstance(version, bool) or not isinstance(version, int):
        raise where.at("recipe").error(f"recipe takes {VERSION}, not {described(version)}.", hint=f"write {VERSION}")
    if version > VERSION:
        message = f"The recipe is of version {version}; this mergekit-sd reads version {VERSION}."
        raise where.at("recipe").error(message, hint="update mergekit-sd")
    if version != VERSION:
        raise where.at("recipe").error(f"There is no recipe version {version}.", hint=f"write recipe = {VERSION}")


class _Fault(NamedTuple):
    path: KeyPath
    message: str
    hint: str | None
    missing: bool = False


def _check_step(name: str, step: Mapping[str, Any], faults: list[_Fault]) -> Table | None:
    path = ("steps", name)
    op = step.get("op")
    if op is None:
        close = next((key for key in step if did_you_mean(str(key), ["op"]) == 'did you mean "op"?'), None)
        hint = f'did you mean "op" by "{shown(str(close))}"?' if close else 'write op = "weighted_sum" or another'
        faults.append(_Fault(path, f'The step "{shown(name)}" has no op.', hint))
    elif not isinstance(op, str):
        faults.append(_Fault((*path, "op"), f"op takes text in quotes, not {described(op)}.", None))
    elif op not in OPERATIONS:
        faults.append(_Fault((*path, "op"), f'There is no operation "{shown(op)}".', did_you_mean(op, OPERATIONS)))
    else:
        try:
            return step_model(op).model_validate(step)
        except ValidationError as error:
            keys: _Keys = {(): (f"a step of {op}", list(step_model(op).model_fields)), **_LORA_KEYS}
            for details in error.errors(include_url=False):
                fault = _fault(details, keys)
                faults.append(fault._replace(path=(*path, *fault.path)))
    return None


def _first(faults: list[_Fault], where: Where) -> Exception:
    far = (1 << 62, 0)
    placed = [(where.positions.at((*where.path, *fault.path)) or far, fault) for fault in faults]
    # What is missing comes last: most often it is there, misspelt.
    (_, first), *others = sorted(placed, key=lambda pair: (pair[1].missing, pair[0]))
    details = [f"line {at[0]}: {fault.message}" if at != far else fault.message for at, fault in others]
    return where.at(*first.path).error(first.message, hint=first.hint, details=details)


# --- pydantic's faults in our words ----------------------------------------------------------------

_Keys = Mapping[KeyPath, tuple[str, list[str]]]

# The tables by their path, `*` for a name or a number, with what they are called.
_KEYS: _Keys = {
    (): ("a recipe", list(RecipeFile.model_fields)),
    ("models", "*"): ("a model", list(ModelEntry.model_fields)),
    ("outputs", "*"): ("an output", list(OutputEntry.model_fields)),
    ("outputs", "*", "dtype"): ("a table of dtypes", list(DtypeEntry.model_fields)),
    ("outputs", "*", "sampling"): ("settings of pictures", list(SamplingEntry.model_fields)),
    ("samples", "*"): ("a sample", list(SampleEntry.model_fields)),
    ("samples", "*", "control", "*"): ("a ControlNet's use", list(ControlEntry.model_fields)),
}
_LORA_KEYS: _Keys = {("loras", "*"): ("a LoRA", list(LoraEntry.model_fields))}

_TAKES = {
    "string_type": "takes text in quotes",
    "int_type": "takes a whole number",
    "int_from_float": "takes a whole number",
    "float_type": "takes a number",
    "finite_number": "takes a finite number",
    "bool_type": "takes true or false",
    "list_type": "takes a list in brackets",
    "dict_type": "takes a table",
    "model_type": "takes a table",
    "date_type": "takes a date such as 2026-01-31, without quotes",
    "date_from_datetime_inexact": "takes a date without a time",
    "union_tag_not_found": "takes text in quotes or a table",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "multiple_of": "must be a multiple of {multiple_of}",
}


def _fault(details: ErrorDetails, keys: _Keys) -> _Fault:
    path = tuple(part for part in details["loc"] if part not in ("<text>", "<table>", "[key]"))
    kind, value, context = details["type"], details["input"], details.get("ctx", {})
    name = f"Item {path[-1] + 1} of {path[-2]}" if path and isinstance(path[-1], int) else shown(str(path[-1]))
    if kind == "ours":
        return _Fault(path, context["say"], context["hint"])
    if kind == "missing":
        table, _ = keys[_pattern(path[:-1], keys)]
        return _Fault(path[:-1], f'{table[0].upper()}{table[1:]} needs the key "{name}".', f"write {name} = …", True)
    if kind == "extra_forbidden":
        return _unknown_key(path, keys)
    if kind == "literal_error":
        options = re.findall(r"'([^']*)'", context["expected"])
        hint = did_you_mean(value, options) if isinstance(value, str) else f"write one of: {', '.join(options)}"
        return _Fault(path, f"{name} cannot be {described(value)}.", hint)
    if kind in ("too_short", "too_long"):
        wanted = context.get("min_length", context.get("max_length"))
        return _Fault(path, f"{name} takes {'at least' if kind == 'too_short' else 'at most'} {wanted}.", None)
    if kind == "string_too_short":
        return _Fault(path, f"{name} is empty.", "write a name")
    takes = _TAKES.get(kind, "has a value that it cannot take").format(**context)
    return _Fault(path, f"{name} {takes}, not {described(value)}.", None)


def _pattern(path: KeyPath, keys: _Keys) -> KeyPath:
    generic = tuple("*" if number == 1 else part for number, part in enumerate(path))
    return generic if generic in keys else ()


def _unknown_key(path: KeyPath, keys: _Keys) -> _Fault:
    table, known = keys[_pattern(path[:-1], keys)]
    word = str(path[-1])
    hint = did_you_mean(word, known)
    if table != "a recipe" and word in ("recipe", "title", "seed", "date"):
        hint = f"{word} stands at the top, before the first [table]"
    return _Fault(path, f'"{shown(word)}" is no key of {table}.', hint)


# --- for editors ------------------------------------------------------------------------------------


def recipe_json_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of a recipe, with a variant of a step for each operation."""
    from pydantic.json_schema import models_json_schema

    tables: list[type[BaseModel]] = [RecipeFile, *(step_model(op) for op in OPERATIONS)]
    _, schema = models_json_schema([(table, "validation") for table in tables], ref_template="#/$defs/{model}")
    definitions = _tidied(schema["$defs"])
    root = definitions.pop("RecipeFile")
    root["properties"]["steps"]["additionalProperties"] = {
        "oneOf": [{"$ref": f"#/$defs/{step_model(op).__name__}"} for op in OPERATIONS]
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "mergekit-sd recipe",
        **root,
        "$defs": definitions,
    }


def _tidied(node: Any) -> Any:
    """Without null, which TOML has not ("X or null" is X), and without pydantic's made-up titles."""
    if isinstance(node, list):
        return [_tidied(each) for each in node]
    if not isinstance(node, dict):
        return node
    noise = {"default": node.get("default", 0) is None, "title": isinstance(node.get("title"), str)}
    clean = {key: _tidied(value) for key, value in node.items() if not noise.get(key)}
    some = [option for option in clean.get("anyOf", ()) if option != {"type": "null"}]
    if len(some) == 1 and len(clean["anyOf"]) == 2:
        return {**some[0], **{key: value for key, value in clean.items() if key != "anyOf"}}
    return clean
