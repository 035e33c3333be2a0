"""What the checks show a model: prompts, pairs of words, timesteps and seeds, read from a TOML file.

Owns the file's form. Must not know what is measured on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import Field, ValidationError
from pydantic_core import ErrorDetails

from mergekit_sd.errors import RecipeError
from mergekit_sd.recipe.fields import Name, Seed, Table
from mergekit_sd.recipe.positions import KeyPath, Where, described
from mergekit_sd.recipe.read import parse_text
from mergekit_sd.text import did_you_mean, shown

DEFAULT_PROBES = Path(__file__).with_name("probes.toml")
DEFAULT_SET = "general"
LARGEST = 1 << 20


Colour: TypeAlias = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Disc:
    """A picture for VAEs that know plain colours alone; colours from 0 to 255."""

    ground: Colour
    disc: Colour


@dataclass(frozen=True, slots=True)
class Probes:
    """One set of probes. `concepts` are prompts by the word the report calls them; `pairs` are such words.

    `neutral` begins with the empty prompt. `timesteps` are of the 1000 that a model is trained on. `picture` is
    what the VAE is shown; None: soft colours, which any VAE of photographs knows.
    """

    name: str
    concepts: Mapping[str, str]
    neutral: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    traced: str
    timesteps: tuple[int, ...]
    seeds: tuple[int, ...]
    picture: Disc | None = None

    @property
    def prompts(self) -> tuple[str, ...]:
        """Every prompt whose prediction is measured, each once."""
        return tuple(dict.fromkeys((*self.neutral, *self.concepts.values())))


_Channels = Annotated[list[Annotated[int, Field(ge=0, le=255)]], Field(min_length=3, max_length=3)]


class _Picture(Table):
    ground: _Channels
    disc: _Channels


class _Set(Table):
    concepts: dict[Name, str] = Field(min_length=1)
    neutral: list[str] = Field(default=[])
    pairs: list[Annotated[list[Name], Field(min_length=2, max_length=2)]] = Field(default=[])
    traced: str
    timesteps: list[Annotated[int, Field(ge=0, le=999)]] = Field(min_length=1)
    seeds: list[Seed] = Field(default=[1], min_length=1)
    picture: _Picture | None = None


def load_probes(path: str | Path | None = None, name: str | None = None) -> Probes:
    """The set `name` of a probes file; without a path the package's own, without a name "general" or the only one.

    Raises RecipeError with file, key and line for a file that cannot be read, and for a set it does not hold.
    """
    file = DEFAULT_PROBES if path is None else Path(path)
    data, positions = parse_text(_read(file), str(file))
    where = Where(str(file), (), positions)
    if not data:
        raise where.error("The file holds no probes.", hint=f"write a table, such as [{DEFAULT_SET}]")
    chosen = name or (next(iter(data)) if len(data) == 1 else DEFAULT_SET)
    if chosen not in data:
        raise where.error(f'There is no set of probes "{shown(chosen)}".', hint=did_you_mean(chosen, data))
    return _checked(chosen, data[chosen], where.at(chosen))


def own_set(name: str | None) -> str | None:
    """A name that a model says, if the package has a set of that name."""
    return name if name in parse_text(_read(DEFAULT_PROBES))[0] else None


def _read(file: Path) -> str:
    try:
        with open(file, "rb") as stream:
            content = stream.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise RecipeError("The probes file is larger than 1 MiB.", file=file, hint="is this a probes file?")
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise RecipeError("The probes file is not UTF-8.", file=file, hint="save it as UTF-8") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a path"
        raise RecipeError(f"The probes file cannot be read: {reason}.", file=file, hint="check the path") from None


def _checked(name: str, data: Any, where: Where) -> Probes:
    try:
        table = _Set.model_validate(data)
    except ValidationError as error:
        raise _refusal(error.errors(include_url=False)[0], where) from None
    for index, pair in enumerate(table.pairs):
        for word in pair:
            if word not in table.concepts:
                place = where.at("pairs", index)
                raise place.error(f'"{shown(word)}" is no concept.', hint=did_you_mean(word, table.concepts))
    return Probes(
        name,
        table.concepts,
        tuple(dict.fromkeys(("", *table.neutral))),
        tuple((first, second) for first, second in table.pairs),
        table.traced,
        tuple(dict.fromkeys(table.timesteps)),
        tuple(dict.fromkeys(table.seeds)),
        _disc(table.picture),
    )


def _disc(table: _Picture | None) -> Disc | None:
    if table is None:
        return None
    ground, disc = ((red, green, blue) for red, green, blue in (table.ground, table.disc))
    return Disc(ground, disc)


_TAKES = {
    "string_type": "takes text in quotes",
    "int_type": "takes a whole number",
    "list_type": "takes a list in brackets",
    "dict_type": "takes a table",
    "model_type": "takes a table",
    "model_attributes_type": "takes a table",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "too_short": "takes at least {min_length}",
    "too_long": "takes at most {max_length}",
}


def _refusal(details: ErrorDetails, where: Where) -> RecipeError:
    """The first fault in our words, at its key."""
    path: KeyPath = tuple(part for part in details["loc"] if part != "[key]")
    kind, context = details["type"], details.get("ctx", {})
    name = shown(str(path[-1])) if path else where.path[-1]
    if kind == "missing":
        return where.error(f'A set of probes needs the key "{name}".', hint=f"write {name} = …")
    place = where.at(*path)
    if kind == "extra_forbidden":
        return place.error(f'"{name}" is no key of a set of probes.', hint=did_you_mean(str(name), _Set.model_fields))
    if kind == "ours":
        return place.error(context["say"], hint=context["hint"])
    if path and isinstance(path[-1], int):
        name = f"Item {path[-1] + 1} of {path[-2]}"
    takes = _TAKES.get(kind, "has a value that it cannot take").format(**context)
    return place.error(f"{name} {takes}, not {described(details['input'])}.")
