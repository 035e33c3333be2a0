"""A parameter's numbers per block: every form in which a recipe writes them, and who gets which.

Owns the grammar of selectors and their precedence. Must not know files or how a layout is
detected: it sees a layout through the protocols below. Forms are checked without a model
(`parse_weights`), matches once a model's names are known (`BlockWeights.resolve`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import translate
from typing import Any, Protocol

from mergekit_sd.recipe.positions import Where, described
from mergekit_sd.recipe.presets import (
    BLOCKS,
    PRESETS,
    SD_BLOCKS,
    WORDS,
    Rank,
    Selector,
    close_to,
    find_preset,
    preset,
    read_selector,
    selector_hint,
)
from mergekit_sd.text import count, did_you_mean, listed, shown


class Place(Protocol):
    """Which part of a model a tensor belongs to."""

    @property
    def component(self) -> str | None: ...  # noqa: D102
    @property
    def block(self) -> str | None: ...  # noqa: D102


class Architecture(Protocol):
    """What weights need to know of an architecture."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def family(self) -> str: ...  # noqa: D102
    @property
    def blocks(self) -> Sequence[str]: ...  # noqa: D102


class Layout(Protocol):
    """A model's architecture, if it is known, and the place of each tensor."""

    @property
    def architecture(self) -> Architecture | None: ...  # noqa: D102
    @property
    def places(self) -> Mapping[str, Place]: ...  # noqa: D102


COUNTS = {26: 25, 25: 25, 20: 19, 19: 19}
"""How many numbers an array may have, and the blocks of the UNet that it is for."""
COUNTS_IN_WORDS = "SD1 and SD2 take 26 numbers (base first) or 25, SDXL 20 or 19"
WEIGHTS_SCHEMA: dict[str, Any] = {
    "description": "Per block: a number, a list (base first), a preset, or a table of selectors.",
    "anyOf": [
        {"type": "number"},
        {"type": "array", "items": {"type": "number"}, "minItems": 19, "maxItems": 26},
        {"enum": list(PRESETS)},
        {"type": "string", "pattern": ","},
        {
            "type": "object",
            "minProperties": 1,
            "properties": {"preset": {"enum": list(PRESETS)}},
            "additionalProperties": {"type": "number"},
        },
    ],
}
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")


@dataclass(frozen=True, slots=True)
class BlockWeights:
    """The numbers of one parameter, before any model is known.

    Either `numbers` alone (an array, base first) or a preset's name and selectors; a lone number
    is the selector `default`. Two that mean the same by form are equal.
    """

    numbers: tuple[float, ...] = ()
    preset: str | None = None
    selectors: tuple[tuple[str, float], ...] = ()
    where: Where = field(default_factory=Where, compare=False, repr=False)
    """Where it is written, for refusals; no part of what it is."""

    @classmethod
    def constant(cls, value: float) -> BlockWeights:
        """One number for every tensor."""
        return cls(selectors=(("default", float(value)),))

    def describe(self) -> float | str | list[float] | dict[str, float | str]:
        """The shortest form as plain JSON, selectors sorted: the same for equal weights."""
        if self.numbers:
            return list(self.numbers)
        if self.preset and not self.selectors:
            return self.preset
        if not self.preset and len(self.selectors) == 1 and self.selectors[0][0] == "default":
            return self.selectors[0][1]
        return {**({"preset": self.preset} if self.preset else {}), **dict(self.selectors)}

    def resolve(self, layout: Layout, names: Iterable[str]) -> dict[str, float]:
        """Each tensor's number, by the more specific selector; `names` are all tensors it weighs.

        Refuses selectors that match none of `names`, tensors that nothing matches, and two
        selectors of one rank that decide a tensor differently.
        """
        matcher = _Matcher(layout, list(names), self.where)
        by_rank: dict[Rank, list[tuple[Selector, float]]] = {}
        for text, value in self.selectors:
            selector = read_selector(text)
            assert isinstance(selector, Selector), "parse_weights has read it"
            by_rank.setdefault(selector.rank, []).append((selector, value))
        # From the top, so that a clash counts only where no more specific selector decides.
        layers = {rank: matcher.decide(by_rank[rank]) for rank in sorted(by_rank, reverse=True)}
        if self.numbers or self.preset:
            layers[Rank.PRESET] = matcher.per_block(self)
        chosen: dict[str, float] = {}
        for rank in sorted(layers):
            chosen.update(layers[rank])
        matcher.refuse(chosen)
        return {name: chosen[name] for name in matcher.names}


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
    """Read any form of a per-block parameter; refusals carry the place under `where`."""
    name = shown(str(where.path[-1])) if where.path else "the weight"
    bounds = _Bounds(low, high, extrapolate)
    if isinstance(value, str):
        weights = _parse_text(value, where, bounds, name)
    elif isinstance(value, list | tuple):
        weights = _parse_array(value, where, bounds, name)
    elif isinstance(value, Mapping):
        weights = _parse_table(value, where, bounds, name)
    else:
        weights = BlockWeights.constant(_number(value, where, bounds, name))
    return replace(weights, where=where)


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
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        return f"write {value.strip()} without quotes"
    if isinstance(value, bool):
        return f"write {'1.0' if value else '0.0'}"
    return "write a number such as 0.5"


def _parse_text(value: str, where: Where, bounds: _Bounds, name: str) -> BlockWeights:
    text = value.strip()
    if "," in text or ";" in text:
        items = [item.strip() for item in re.split("[,;]", text.rstrip(",; \n"))]
        bad = next((item for item in items if not _NUMBER.fullmatch(item)), None)
        if bad is not None:
            position = items.index(bad) + 1
            raise where.error(f'Item {position} of {name} is "{shown(bad[:60])}", which is no number.')
        return _parse_array([float(item) for item in items], where, bounds, name)
    if _NUMBER.fullmatch(text) or text.lower().lstrip("+-") in ("nan", "inf"):
        raise where.error(f"{name} takes a number, not {described(value)}.", hint=_number_hint(value))
    return BlockWeights(preset=_preset(value, where, bounds, name))


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


def _parse_array(values: Sequence[object], where: Where, bounds: _Bounds, name: str) -> BlockWeights:
    if len(values) not in COUNTS:
        raise where.error(f"{name} has {count(len(values), 'number')}.", hint=COUNTS_IN_WORDS)
    blocks = COUNTS[len(values)]
    has_base = len(values) > blocks
    numbers = tuple(
        _number(value, where.at(index), bounds, f"Item {index + 1} of {name}") for index, value in enumerate(values)
    )
    return BlockWeights(numbers=numbers if has_base else (0.0, *numbers))


def _parse_table(table: Mapping[Any, object], where: Where, bounds: _Bounds, name: str) -> BlockWeights:
    if not table:
        raise where.error(f"{name} is an empty table.", hint="write a number, or selectors such as { default = 0.5 }")
    if "try" in table:
        raise where.error(
            f"{name} has {{ try = … }}, which only a sweep takes.",
            hint="write one value here, or use mergekit-sd sweep",
        )
    chosen = _preset(table["preset"], where.at("preset"), bounds, "preset") if "preset" in table else None
    selectors = []
    for key, value in table.items():
        if key == "preset":
            continue
        here = where.at(str(key))
        if isinstance(value, Mapping):
            raise _nested(str(key), value, here)
        what = read_selector(str(key))
        if isinstance(what, str):
            raise here.error(f'"{shown(str(key))}" {what}.', hint=selector_hint(str(key)))
        selectors.append((what.text, _number(value, here, bounds, f'"{shown(what.text)}"')))
    return BlockWeights(preset=chosen, selectors=tuple(sorted(selectors)))


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


# --- matching --------------------------------------------------------------------------------------


class _Matcher:
    """The tensors of one model, and which selectors mean which of them."""

    def __init__(self, layout: Layout, names: list[str], where: Where) -> None:
        self.names, self.where, self.architecture = names, where, layout.architecture
        self.unmatched: list[Selector] = []
        self.decided: set[str] = set()
        self.components: dict[str | None, list[str]] = {}
        self.blocks: dict[str | None, list[str]] = {}
        self.two_encoders = any(place.component == "text_encoder_2" for place in layout.places.values())
        for name in names:
            place = layout.places.get(name)
            self.components.setdefault(place.component if place else None, []).append(name)
            self.blocks.setdefault(place.block if place else None, []).append(name)

    def decide(self, selectors: list[tuple[Selector, float]]) -> dict[str, float]:
        """What selectors of one rank say of tensors that no higher rank has decided."""
        found: dict[str, tuple[Selector, float]] = {}
        clashes: list[tuple[str, Selector, Selector]] = []
        for selector, value in selectors:
            matched = self._matched(selector)
            if not matched and selector.rank is not Rank.DEFAULT:
                self.unmatched.append(selector)
            for name in matched:
                if name in self.decided:
                    continue
                first, number = found.setdefault(name, (selector, value))
                if number != value:
                    clashes.append((name, first, selector))
        if clashes:
            _, first, second = clashes[0]
            raise self.where.at(second.text).error(
                f'"{shown(first.text)}" and "{shown(second.text)}" give {_tensors(clashes)} different values.',
                hint="keep one of the two, or say the value with a more specific selector",
                details=[f"{name}: {one.text}, {other.text}" for name, one, other in clashes],
            )
        self.decided.update(found)
        return {name: value for name, (_, value) in found.items()}

    def _matched(self, selector: Selector) -> Sequence[str]:
        if selector.rank is Rank.DEFAULT:
            return self.names
        if selector.rank is Rank.GLOB:
            matches = re.compile(translate(selector.text)).match
            return [name for name in self.names if matches(name)]
        if selector.rank is Rank.NAME:
            return [name for name in self.names if name == selector.text]
        if selector.rank in (Rank.RANGE, Rank.BLOCK, Rank.PART):
            order = self._known(selector.text).blocks
            inside = [name for block in selector.blocks(order) for name in self.blocks.get(block, ())]
            return [name for name in inside if selector.part in name]
        return self._component(selector.text)

    def _component(self, word: str) -> Sequence[str]:
        first, second = self.components.get("text_encoder", []), self.components.get("text_encoder_2", [])
        if word == "base":
            self._known(word)
            return [name for part, names in self.components.items() if part != "unet" for name in names]
        if word == "text_encoder":
            return first + second
        if word == "clip_l":
            return first if self.two_encoders or (self.architecture and self.architecture.family == "sd1") else []
        return second if word == "clip_g" else self.components.get(word, [])

    def per_block(self, weights: BlockWeights) -> dict[str, float]:
        """What an array or a preset says: the base for everything that is in no block of the UNet."""
        architecture = self._known(f"preset {weights.preset}" if weights.preset else "an array of numbers")
        if weights.preset:
            base, values = preset(weights.preset)
            numbers = dict(zip(SD_BLOCKS, values, strict=True))
        else:
            base, order = weights.numbers[0], architecture.blocks
            if len(weights.numbers) != len(order) + 1:
                takes = f"{len(order) + 1} numbers (base first) or {len(order)}" if order else "a number"
                message = f"These are weights for {len(weights.numbers) - 1} blocks, but {architecture.name} has "
                raise self.where.error(f"{message}{len(order)}.", hint=f"{architecture.name} takes {takes}")
            numbers = dict(zip(order, weights.numbers[1:], strict=True))
        return {name: numbers.get(block or "", base) for block, names in self.blocks.items() for name in names}

    def _known(self, what: str) -> Architecture:
        if self.architecture is None:
            raise (self.where.at(what) if what in WORDS or BLOCKS.fullmatch(what) else self.where).error(
                f"{what} needs a known architecture, and this model's is not known.",
                hint="without one, weights are a number, or default, globs and whole tensor names",
            )
        return self.architecture

    def refuse(self, chosen: Mapping[str, float]) -> None:
        """Selectors that matched nothing, tensors that nothing matched."""
        if self.unmatched:
            first, texts = self.unmatched[0], sorted(selector.text for selector in self.unmatched)
            quoted = ", ".join(f'"{shown(text)}"' for text in texts[:5]) + (", …" if len(texts) > 5 else "")
            verb = "matches" if len(texts) == 1 else "match"
            raise self.where.at(first.text).error(f"{quoted} {verb} no tensor.", hint=self._hint(first), details=texts)
        left = [name for name in self.names if name not in chosen]
        if left:
            message = f"No weight for {_tensors(left)}: {listed(left, 3)}."
            raise self.where.error(message, hint="add default = … to the table", details=left)

    def _hint(self, selector: Selector) -> str | None:
        if selector.rank in (Rank.RANGE, Rank.BLOCK) and self.architecture:
            return f"blocks of {self.architecture.name}: {', '.join(self.architecture.blocks)}"
        if selector.rank is Rank.NAME and close_to(selector.text, self.names):
            return did_you_mean(selector.text, self.names)
        parts = sorted(part for part in self.components if part)
        return f"parts that are there: {', '.join(parts)}" if parts and selector.text in WORDS else None


def _tensors(names: Sequence[object]) -> str:
    return count(len(names), "tensor")
