"""A parameter's numbers per block: every form in which a recipe writes them, and who gets which.

Owns the forms and their precedence; selectors are read by `presets`, rules by `elemental`, and both
applied by `matching`. Must not know files or how a layout is detected. Forms are checked without a
model (`parse_weights`), matches once a model's names are known (`BlockWeights.resolve`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import xxhash

from mergekit_sd.recipe.elemental import NUMBER, Rule, parse_elemental
from mergekit_sd.recipe.matching import Layout, Matcher
from mergekit_sd.recipe.positions import Where, described
from mergekit_sd.recipe.presets import (
    PRESETS,
    SD_BLOCKS,
    Rank,
    Selector,
    find_preset,
    preset,
    read_selector,
    selector_hint,
)
from mergekit_sd.text import count, did_you_mean, shown

COUNTS = {26: 25, 25: 25, 20: 19, 19: 19}
"""How many numbers an array may have, and the blocks of the UNet that it is for."""
COUNTS_IN_WORDS = "SD1 and SD2 take 26 numbers (base first) or 25, SDXL 20 or 19"
_NUMBERS: dict[str, Any] = {"type": "array", "items": {"type": "number"}, "minItems": 19, "maxItems": 26}
_RULES = {"type": "string", "pattern": ":"}
_SEED = {"type": "integer", "minimum": 0, "maximum": 2**63 - 1}
_BASES = ("preset", "weights", "random")
WEIGHTS_SCHEMA: dict[str, Any] = {
    "description": "Per block: a number, a list (base first), a preset, elemental rules (0 where none matches), "
    "or a table of selectors.",
    "anyOf": [
        {"type": "number"},
        _NUMBERS,
        {"enum": list(PRESETS)},
        {"type": "string", "pattern": ",|:"},
        {
            "type": "object",
            "minProperties": 1,
            "properties": {
                "preset": {"enum": list(PRESETS)},
                "weights": {"anyOf": [_NUMBERS, {"type": "string", "pattern": ","}]},
                "random": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
                "seed": _SEED,
                "elemental": _RULES,
            },
            "additionalProperties": {"type": "number"},
            "dependentRequired": {"seed": ["random"]},
            "allOf": [{"not": {"required": list(pair)}} for pair in zip(_BASES, (*_BASES[1:], _BASES[0]), strict=True)],
        },
    ],
}


@dataclass(frozen=True, slots=True)
class BlockWeights:
    """The numbers of one parameter, before any model is known.

    At most one of `numbers` (base first), `preset` and `random` (the lowest and highest number,
    drawn with `seed` or the recipe's) says what each block has; selectors and elemental rules lie
    above it. A lone number is the selector `default`. Two that mean the same by form are equal.
    """

    numbers: tuple[float, ...] = ()
    preset: str | None = None
    random: tuple[float, float] | None = None
    seed: int | None = None
    selectors: tuple[tuple[str, float], ...] = ()
    elemental: tuple[Rule, ...] = ()
    name: str = field(default="", compare=False)
    """The parameter's, which tells random numbers apart; no part of what it is."""
    where: Where = field(default_factory=Where, compare=False, repr=False)
    """Where it is written, for refusals; no part of what it is."""

    @classmethod
    def constant(cls, value: float) -> BlockWeights:
        """One number for every tensor."""
        return cls(selectors=(("default", float(value)),))

    def describe(self) -> float | str | list[float] | dict[str, Any]:
        """The shortest form as plain JSON, selectors sorted: the same for equal weights."""
        rules = ", ".join(rule.text for rule in self.elemental)
        forms = {
            "preset": self.preset,
            "weights": list(self.numbers) or None,
            "random": list(self.random) if self.random else None,
            "seed": self.seed,
            "elemental": rules or None,
        }
        table = {key: value for key, value in forms.items() if value is not None} | dict(self.selectors)
        if table == {"default": 0.0, "elemental": rules}:
            return rules
        short = next(iter(table)) if len(table) == 1 else ""
        return table[short] if short in ("default", "preset", "weights") else table

    def resolve(self, layout: Layout, names: Iterable[str], seed: int = 0) -> dict[str, float]:
        """Each tensor's number, by the more specific selector; `names` are all tensors it weighs.

        `seed` is the recipe's, for random numbers. Refuses selectors and rules that match none of
        `names`, tensors that nothing matches, and two selectors of one rank that decide a tensor
        differently.
        """
        matcher = Matcher(layout, list(names), self.where)
        by_rank: dict[Rank, list[tuple[Selector, float]]] = {Rank.ELEMENTAL: []} if self.elemental else {}
        for text, value in self.selectors:
            selector = read_selector(text)
            assert isinstance(selector, Selector), "parse_weights has read it"
            by_rank.setdefault(selector.rank, []).append((selector, value))
        layers: dict[Rank, dict[str, float]] = {}
        # From the top, so that a clash counts only where no more specific selector decides.
        for rank in sorted(by_rank, reverse=True):
            layers[rank] = matcher.follow(self.elemental) if rank is Rank.ELEMENTAL else matcher.decide(by_rank[rank])
        if self.numbers or self.preset or self.random:
            layers[Rank.PRESET] = matcher.per_block(*self._of_blocks(matcher, seed))
        chosen: dict[str, float] = {}
        for rank in sorted(layers):
            chosen.update(layers[rank])
        matcher.refuse(chosen)
        return {name: chosen[name] for name in matcher.names}

    def _of_blocks(self, matcher: Matcher, seed: int) -> tuple[float, dict[str, float]]:
        """The base's number and each block's, as a list, a preset or random numbers say them."""
        if self.preset:
            matcher.known(f"preset {self.preset}")
            base, values = preset(self.preset)
            return base, dict(zip(SD_BLOCKS, values, strict=True))
        architecture = matcher.known("random weights" if self.random else "an array of numbers")
        order = architecture.blocks
        if self.random:
            drawn = [self._drawn(block, seed) for block in ("base", *order)]
            return drawn[0], dict(zip(order, drawn[1:], strict=True))
        if len(self.numbers) != len(order) + 1:
            takes = f"{len(order) + 1} numbers (base first) or {len(order)}" if order else "a number"
            message = f"These are weights for {len(self.numbers) - 1} blocks, but {architecture.name} has {len(order)}."
            raise self.where.error(message, hint=f"{architecture.name} takes {takes}")
        return self.numbers[0], dict(zip(order, self.numbers[1:], strict=True))

    def _drawn(self, block: str, seed: int) -> float:
        """A block's random number, a function of seed, parameter and block alone; three decimals, as supermerger's."""
        assert self.random
        low, high = self.random
        seed = seed if self.seed is None else self.seed
        share = xxhash.xxh3_64_intdigest(f"{seed}/{self.name}/{block}".encode()) / 2**64
        return min(max(round(low + (high - low) * share, 3), low), high)


# --- reading ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Bounds:
    low: float | None
    high: float | None
    extrapolate: bool

    def check(self, number: float, where: Where, what: str) -> float:
        if self.extrapolate:
            return number
        low, high = self.low, self.high
        if (low is None or number >= low) and (high is None or number <= high):
            return number
        bounds = f"between {low:g} and {high:g}" if low is not None and high is not None else None
        bounds = bounds or (f"at least {low:g}" if high is None else f"at most {high:g}")
        raise where.error(
            f"{what} is {number:g}; it must be {bounds}.",
            hint="if you mean to go beyond, write extrapolate = true in the step",
        )


def parse_weights(
    value: object,
    *,
    where: Where,
    low: float | None = None,
    high: float | None = None,
    extrapolate: bool = False,
) -> BlockWeights:
    """Read any form of a per-block parameter; refusals carry the place under `where`.

    The parameter's name is the last key there, with an index behind it `weights.0`.
    """
    name = shown(_name_of(where.path)) or "the weight"
    bounds = _Bounds(low, high, extrapolate)
    if isinstance(value, str):
        weights = _parse_text(value, where, bounds, name)
    elif isinstance(value, list | tuple):
        weights = BlockWeights(numbers=_array(value, where, bounds, name))
    elif isinstance(value, Mapping):
        weights = _parse_table(value, where, bounds, name)
    else:
        weights = BlockWeights.constant(_number(value, where, bounds, name))
    return replace(weights, name=_name_of(where.path), where=where)


def _name_of(path: Sequence[str | int]) -> str:
    keys = [number for number, part in enumerate(path) if isinstance(part, str)]
    return ".".join(map(str, path[keys[-1] :])) if keys else ""


def _number(value: object, where: Where, bounds: _Bounds, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise where.error(f"{what} takes a number, not {described(value)}.", hint=_number_hint(value))
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise where.error(f"{what} is {number:g}; it must be a finite number.", hint="write a number such as 0.5")
    return bounds.check(number + 0.0, where, what)  # + 0.0 makes -0.0 and 0.0 one


def _number_hint(value: object) -> str:
    if isinstance(value, str) and NUMBER.fullmatch(value.strip()):
        return f"write {value.strip()} without quotes"
    if isinstance(value, bool):
        return f"write {'1.0' if value else '0.0'}"
    return "write a number such as 0.5"


def _parse_text(value: str, where: Where, bounds: _Bounds, name: str) -> BlockWeights:
    text = value.strip()
    if ":" in text:  # what no rule matches has 0, as the base of a list without one
        return BlockWeights(selectors=(("default", 0.0),), elemental=_rules(value, where, bounds))
    if "," in text or ";" in text:
        return BlockWeights(numbers=_pasted(text, where, bounds, name))
    if NUMBER.fullmatch(text) or text.lower().lstrip("+-") in ("nan", "inf"):
        raise where.error(f"{name} takes a number, not {described(value)}.", hint=_number_hint(value))
    return BlockWeights(preset=_preset(value, where, bounds, name))


def _rules(value: object, where: Where, bounds: _Bounds) -> tuple[Rule, ...]:
    return parse_elemental(value, where, lambda ratio, here, what: _number(ratio, here, bounds, what))


def _pasted(text: str, where: Where, bounds: _Bounds, name: str) -> tuple[float, ...]:
    items = [item.strip() for item in re.split("[,;]", text.rstrip(",; \n"))]
    bad = next((item for item in items if not NUMBER.fullmatch(item)), None)
    if bad is not None:
        position = items.index(bad) + 1
        raise where.error(f'Item {position} of {name} is "{shown(bad[:60])}", which is no number.')
    return _array([float(item) for item in items], where, bounds, name)


def _preset(value: object, where: Where, bounds: _Bounds, name: str) -> str:
    if not isinstance(value, str):
        raise where.error(f"{name} takes the name of a preset, not {described(value)}.", hint=did_you_mean("", PRESETS))
    exact = find_preset(value.strip())
    if exact is None:
        hint = did_you_mean(value, PRESETS) or ""
        every = "" if hint.startswith("did you mean") else "; mergekit-sd presets lists them"
        raise where.error(f'There is no preset "{shown(value)}".', hint=hint + every)
    base, numbers = preset(exact)
    for number, block in zip((base, *numbers), ("base", *SD_BLOCKS), strict=True):
        bounds.check(number, where, f"{block} of preset {exact}")
    return exact


def _array(values: Sequence[object], where: Where, bounds: _Bounds, name: str) -> tuple[float, ...]:
    if len(values) not in COUNTS:
        raise where.error(f"{name} has {count(len(values), 'number')}.", hint=COUNTS_IN_WORDS)
    has_base = len(values) > COUNTS[len(values)]
    numbers = tuple(
        _number(value, where.at(index), bounds, f"Item {index + 1} of {name}") for index, value in enumerate(values)
    )
    return numbers if has_base else (0.0, *numbers)


def _weights_key(value: object, where: Where, bounds: _Bounds, name: str) -> tuple[float, ...]:
    if isinstance(value, str) and ("," in value or ";" in value):
        return _pasted(value.strip(), where, bounds, name)
    if not isinstance(value, list | tuple):
        raise where.error(f"{name} takes a list of numbers, not {described(value)}.", hint=COUNTS_IN_WORDS)
    return _array(value, where, bounds, name)


def _random(value: object, where: Where, bounds: _Bounds, name: str) -> tuple[float, float]:
    hint = "write the lowest and the highest, such as [0.2, 0.8]"
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise where.error(f"{name} takes two numbers.", hint=hint)
    low, high = (
        _number(each, where.at(index), bounds, f"Item {index + 1} of {name}") for index, each in enumerate(value)
    )
    if low > high:
        raise where.error(f"{name} runs from {low:g} down to {high:g}.", hint=hint)
    return low, high


def _seed(value: object, where: Where, is_random: bool) -> int:
    if not is_random:
        raise where.error("seed is for random weights, and these are not.", hint="write random = [0.2, 0.8] beside it")
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise where.error(f"seed takes a whole number, not {described(value)}.", hint="write a number such as 7")
    return value


def _parse_table(table: Mapping[Any, object], where: Where, bounds: _Bounds, name: str) -> BlockWeights:
    if not table:
        raise where.error(f"{name} is an empty table.", hint="write a number, or selectors such as { default = 0.5 }")
    if "try" in table:
        raise where.error(
            f"{name} has {{ try = … }}, which only a sweep takes.",
            hint="write one value here, or use mergekit-sd sweep",
        )
    bases = [key for key in table if key in _BASES]
    if len(bases) > 1:
        message = f"{name} has both {bases[0]} and {bases[1]}, and each gives every block its number."
        raise where.at(bases[1]).error(message, hint="keep one of the two")
    forms: dict[str, Any] = {}
    selectors = []
    for key, value in table.items():
        here = where.at(str(key))
        if key == "preset":
            forms["preset"] = _preset(value, here, bounds, "preset")
        elif key == "weights":
            forms["numbers"] = _weights_key(value, here, bounds, "weights")
        elif key == "random":
            forms["random"] = _random(value, here, bounds, "random")
        elif key == "seed":
            forms["seed"] = _seed(value, here, "random" in table)
        elif key == "elemental":
            forms["elemental"] = _rules(value, here, bounds)
        else:
            selectors.append(_selector(str(key), value, here, bounds))
    return BlockWeights(**forms, selectors=tuple(sorted(selectors)))


def _selector(key: str, value: object, here: Where, bounds: _Bounds) -> tuple[str, float]:
    if isinstance(value, Mapping):
        raise _nested(key, value, here)
    what = read_selector(key)
    if isinstance(what, str):
        raise here.error(f'"{shown(key)}" {what}.', hint=selector_hint(key))
    return what.text, _number(value, here, bounds, f'"{shown(what.text)}"')


def _nested(key: str, value: Mapping[Any, object], here: Where) -> Exception:
    """`OUT05.attn2 = 1` without quotes is a table in a table to TOML."""
    inner: object = value
    while isinstance(inner, Mapping) and len(inner) == 1:
        ((part, inner),) = inner.items()
        if part == "try":
            return here.error(
                f'"{shown(key)}" has {{ try = … }}, which only a sweep takes.', hint="write one value here"
            )
        key, here = f"{key}.{part}", here.at(str(part))
    if isinstance(inner, Mapping):
        return here.error(f'"{shown(key)}" takes a number, not a table.', hint="write a number such as 0.5")
    return here.error(
        f"Without quotes TOML reads {shown(key)} as a table in a table.", hint=f'write "{shown(key)}" in quotes'
    )
