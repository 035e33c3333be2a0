"""What a single value of a recipe may be: names, files, hashes, numbers, words, in pydantic's terms.

Owns the validators and how each is said in JSON Schema. Must not know the tables that they stand in.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, WithJsonSchema
from pydantic_core import PydanticCustomError
from typing_extensions import TypeAliasType

from mergekit_sd.formats.dtypes import OUTPUT_DTYPES
from mergekit_sd.operations import Operand, Parameter
from mergekit_sd.operations.types import ChoiceKind, FormulaKind, ListKind, SettingKind
from mergekit_sd.recipe.positions import described
from mergekit_sd.recipe.samplers import SAMPLERS
from mergekit_sd.recipe.weights import WEIGHTS_SCHEMA
from mergekit_sd.text import did_you_mean, shown

LARGEST_SEED = 2**63 - 1


def _refuse(message: str, hint: str | None = None) -> PydanticCustomError:
    return PydanticCustomError("ours", "{say}", {"say": message, "hint": hint})


def _checked_name(name: str) -> str:
    if not name.strip():
        raise _refuse("A name is empty.", "give it a name")
    if not name.isprintable():
        raise _refuse(f'The name "{shown(name)}" holds characters that cannot be seen.', "use letters and digits")
    return name


def _checked_file(text: str) -> str:
    if not text.isprintable():
        # `"D:\test"` is TOML: a tab, then "est".
        raise _refuse("A file's name holds a control character.", f"write '{shown(text)}', in single quotes")
    return _checked_name(text)


def _checked_sha256(text: str) -> str:
    if re.fullmatch("[0-9a-fA-F]{64}", text):
        return text.lower()
    if re.fullmatch("[0-9a-fA-F]{8}|[0-9a-fA-F]{10}", text):
        raise _refuse("This is the WebUI's short form of a hash.", "write all 64 digits: mergekit-sd hash FILE")
    raise _refuse("sha256 is 64 hexadecimal digits.", "mergekit-sd hash FILE prints it")


def _one_of(noun: str, options: Iterable[str | int]) -> AfterValidator:
    """A validator of what must be one of the words or whole numbers."""
    known = list(options)

    def check(value: str | int) -> str | int:
        if value in known and not isinstance(value, bool):
            return known[known.index(value)]
        if isinstance(value, str):
            raise _refuse(f'There is no {noun} "{shown(value)}".', did_you_mean(value, map(str, known)))
        raise _refuse(f"{noun} cannot be {described(value)}.", f"write one of: {', '.join(map(str, known))}")

    return AfterValidator(check)


def _enum(options: Iterable[str | int]) -> WithJsonSchema:
    return WithJsonSchema({"enum": list(options)})


def _numbers(name: str, names: Sequence[str]) -> AfterValidator:
    """A validator of numbers that have a meaning each, as a list or as text; it fills up with zeros."""
    hint = f"write up to {len(names)} numbers: {', '.join(names)}"

    def check(value: object) -> tuple[float, ...]:
        given = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
        if not isinstance(given, list | tuple) or not 1 <= len(given) <= len(names):
            raise _refuse(f"{name} takes up to {len(names)} numbers, not {described(value)}.", hint)
        numbers = []
        for item, label in zip(given, names, strict=False):
            try:
                number = float(item) if isinstance(item, str | int | float) and not isinstance(item, bool) else math.nan
            except (ValueError, OverflowError):
                number = math.nan
            if not math.isfinite(number):
                raise _refuse(f"{label} of {name} is {described(item)}, which is no finite number.", hint)
            numbers.append(number)
        return (*numbers, *[0.0] * (len(names) - len(numbers)))

    return AfterValidator(check)


def _numbers_schema(count: int) -> WithJsonSchema:
    array = {"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": count}
    return WithJsonSchema({"anyOf": [array, {"type": "string"}]})


def shape_of(value: object) -> str | None:
    """Which of two forms a value has: text, or a table."""
    return "<table>" if isinstance(value, Mapping) else "<text>" if isinstance(value, str) else None


BY_SHAPE = Discriminator(shape_of)
Name = Annotated[str, AfterValidator(_checked_name), Field(min_length=1)]
FileName = Annotated[str, AfterValidator(_checked_file), Field(min_length=1)]
Sha256 = Annotated[str, AfterValidator(_checked_sha256), Field(json_schema_extra={"pattern": "^[0-9a-fA-F]{64}$"})]
DTYPES = [*OUTPUT_DTYPES, "keep"]
DtypeName = Annotated[str, _one_of("dtype", DTYPES), _enum(DTYPES)]
SamplerName = Annotated[str, _one_of("sampler", SAMPLERS), _enum(SAMPLERS)]
Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]
Pixels = Annotated[int, Field(ge=64, le=8192, multiple_of=8)]

Weights = TypeAliasType("Weights", Annotated[Any, WithJsonSchema(WEIGHTS_SCHEMA)])
_EACH = {"anyOf": [WEIGHTS_SCHEMA, {"type": "array", "items": WEIGHTS_SCHEMA, "minItems": 1}]}
WeightsList = TypeAliasType("WeightsList", Annotated[Any, WithJsonSchema(_EACH)])


class Table(BaseModel):
    """A table that takes its own keys and no others."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, hide_input_in_errors=True)


class LoraEntry(Table):
    """A LoRA file and how strongly it works."""

    lora: Name = Field(description="The name of a model that is a LoRA or one of its relatives.")
    strength: float = Field(1.0, allow_inf_nan=False, description="Of the UNet's part; negative takes it out.")
    text_encoder: float | None = Field(
        None, allow_inf_nan=False, description="Of the text encoders' part; as strength unless given."
    )
    text_encoder_2: float | None = Field(
        None, allow_inf_nan=False, description="Of SDXL's second text encoder; as text_encoder unless given."
    )
    blocks: Weights | None = Field(
        None, description="Per block: 17, 26, 12 or 20 numbers, a preset such as OUTALL, or a table."
    )


Lora = Annotated[Annotated[Name, Tag("<text>")] | Annotated[LoraEntry, Tag("<table>")], BY_SHAPE]

# --- a step's keys, read off the registry ---------------------------------------------------------


def operand_field(operand: Operand) -> tuple[Any, Any]:
    """The field that names an operand, or a list of them."""
    if operand.space == "lora" and operand.many:
        return list[Lora], Field(min_length=1, description='LoRA files: names, "<lora:name:0.8>", or tables.')
    kind = {
        "weight": "A model",
        "delta": "A difference of models",
        "same": "A model or a difference",
        "lora": "A LoRA",
    }[operand.space]
    if operand.many:
        return list[Name], Field(min_length=1, description=f"{kind}, each: the names of models or steps.")
    said = f"{kind}: the name of a model or step."
    return (Name | None, Field(None, description=said)) if operand.optional else (Name, Field(description=said))


def parameter_field(parameter: Parameter) -> tuple[Any, Any]:
    """The field of a parameter, by its kind."""
    kind, default = parameter.kind, ... if parameter.default is None else parameter.default
    if isinstance(kind, ChoiceKind):
        return Annotated[Any, _one_of(parameter.name, kind.options), _enum(kind.options)], Field(default)
    if isinstance(kind, SettingKind):
        number: Any = int if kind.whole else float
        return number, Field(default, ge=kind.low, le=kind.high, allow_inf_nan=None if kind.whole else False)
    if isinstance(kind, ListKind):
        described = f"Numbers, or text with commas: {', '.join(kind.names)}; what is left out is 0."
        check = _numbers(parameter.name, kind.names)
        return Annotated[Any, check, _numbers_schema(len(kind.names))], Field(default, description=described)
    if isinstance(kind, FormulaKind):
        return Name, Field(description='Sums of models and differences: "mix + 0.7*(db - sd15)".')
    words = _bounds(kind.low, kind.high)
    if kind.each:
        return WeightsList, Field(default, description=f"For all models, or a list with one for each. {words}")
    return Weights, Field(default, description=words)


def _bounds(low: float | None, high: float | None) -> str:
    if low is None and high is None:
        return "Per block; any number."
    return f"Per block; from {'−∞' if low is None else f'{low:g}'} to {'∞' if high is None else f'{high:g}'}."
