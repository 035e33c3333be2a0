"""Numbers per block, and back: what bars show of a parameter's value, and the value after a change of some.

Owns how a change is written: as little as a person would. Values are plain ones of TOML; what they mean is the
engine's to say (`mk.block_weights`). Must not know widgets or the recipe's text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import mergekit_sd as mk
from mergekit_sd.errors import UsageError
from mergekit_sd.text import count, shown

BASE = "base"
DIGITS = 10  # of a number that is written; a sum of steps of 0.05 has noise beyond
FEW = 6  # blocks that are written by name; more become a list
_PARTS = ("vae", "text_encoder", "clip_l", "clip_g")
_BLOCKS = re.compile(r"(?:IN|M|OUT)[0-9]{2}(?:-(?:IN|M|OUT)[0-9]{2})?")

Numbers: TypeAlias = dict[str, float]
"""Each block's number, "base" first."""

CURVES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: x,
    "ease": lambda x: x * x * (3 - 2 * x),
    "ease in": lambda x: x * x,
    "ease out": lambda x: x * (2 - x),
    "cosine": lambda x: (1 - math.cos(math.pi * x)) / 2,
    "step": lambda x: float(x >= 0.5),
}
"""From 0 to 1, by name."""


def tidy(number: float) -> float:
    """Without the noise of sums."""
    return round(number, DIGITS) + 0.0


def numbers_of(value: object, family: str, *, parameter: str = "alpha", seed: int = 0) -> Numbers:
    """Each block's number; raises RecipeError as `mk.block_weights` does."""
    resolved = mk.block_weights(value, family, parameter=parameter, seed=seed)
    return {block: each.value for block, each in resolved.items()}


def changed(value: object, changes: Mapping[str, float], family: str) -> Any:
    """The value with other numbers at some blocks.

    A list or pasted text changes there alone. A preset or a table gets selectors, a number becomes a table. Where
    many blocks change, a list takes the place of all that was said by block; what parts, rules and names say stays.
    """
    wanted = {block: tidy(number) for block, number in changes.items()}
    blocks = mk.family_blocks(family)
    if isinstance(value, list) or _is_pasted(value):
        return _in_list(value, wanted, blocks)
    if len(wanted) > FEW:
        return _as_list(value, numbers_of(value, family) | wanted)
    if isinstance(value, dict):
        return {**value, **wanted}
    if isinstance(value, str):
        return {**_named(value), **wanted}
    return {"default": value, **wanted}


def _is_pasted(value: object) -> bool:
    return isinstance(value, str) and ":" not in value and ("," in value or ";" in value)


def _named(text: str) -> dict[str, Any]:
    """The table that a preset's name or elemental rules stand for."""
    return {"default": 0.0, "elemental": text} if ":" in text else {"preset": text}


def _in_list(value: Any, wanted: Mapping[str, float], blocks: Sequence[str]) -> Any:
    items = re.split("[,;]", value.strip().rstrip(",;")) if isinstance(value, str) else list(value)
    if len(items) < len(blocks):
        if BASE in wanted:  # a list without a base has 0 there
            items.insert(0, "0" if isinstance(value, str) else 0.0)
        else:
            blocks = blocks[1:]
    for block, number in wanted.items():
        items[blocks.index(block)] = f"{number:.{DIGITS}g}" if isinstance(value, str) else number
    return ",".join(item.strip() for item in items) if isinstance(value, str) else items


def _as_list(value: object, numbers: Numbers) -> Any:
    kept = _beside_blocks(value)
    every = [tidy(number) for number in numbers.values()]
    if len(set(every)) == 1 and not kept:
        return every[0]
    return {"weights": every, **kept} if kept else every


def _beside_blocks(value: object) -> dict[str, Any]:
    """What a table says that a list of blocks does not: parts outside the UNet, rules, globs and names."""
    if isinstance(value, str) and ":" in value:
        return {"elemental": value}
    if not isinstance(value, dict):
        return {}
    general = ("default", "unet", BASE, "preset", "weights", "random", "seed")
    return {key: each for key, each in value.items() if key not in general and not _BLOCKS.fullmatch(key)}


def with_preset(value: object, preset: str, family: str) -> Any:
    """The value with a preset's blocks; the base and the parts outside the UNet keep their numbers."""
    base = numbers_of(value, family)[BASE]
    parts = {key: each for key, each in _beside_blocks(value).items() if key in _PARTS}
    kept = parts if tidy(base) == mk.preset(preset)[0] else {BASE: tidy(base), **parts}
    return {"preset": preset, **kept} if kept else preset


def pasted(value: object, text: str, family: str) -> Any:
    """The value that pasted text stands for: the WebUI's numbers, a number, or a preset's name.

    Numbers without a base leave the base as it is. Raises UsageError or RecipeError where it is none of these.
    """
    items = [item for item in re.split(r"[,;\s]+", text.strip()) if item]
    blocks = mk.family_blocks(family)
    if len(items) == 1:
        name = next((each for each in mk.PRESETS if each.casefold() == items[0].casefold()), None)
        if name:
            return with_preset(value, name, family)
        made: Any = number_in(items[0])
    elif len(items) in (len(blocks), len(blocks) - 1):
        for item in items:
            number_in(item)
        made = ",".join(items)
        if len(items) < len(blocks):
            base = tidy(numbers_of(value, family)[BASE])
            made = {"weights": made, BASE: base} if base else made
    else:
        raise UsageError(
            f"These are {count(len(items), 'number')}.",
            hint=f"{family} takes {len(blocks)} numbers (base first) or {len(blocks) - 1}, with commas between",
        )
    numbers_of(made, family)
    return made


def number_in(text: str) -> float:
    """A number that was typed; a comma may stand for the point. Raises UsageError."""
    try:
        number = float(text.strip().replace(",", "."))
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f'"{shown(text.strip())}" is no number.', hint="write a number such as 0.5")
    return number


def as_text(numbers: Numbers) -> str:
    """The numbers as the WebUI takes them, base first."""
    return ",".join(f"{number:.{DIGITS}g}" for number in numbers.values())


def curve(numbers: Numbers, first: str, last: str, name: str) -> Numbers:
    """The blocks between two, on a curve from the one's number to the other's."""
    order = list(numbers)
    start, end = sorted((order.index(first), order.index(last)))
    low, high = numbers[order[start]], numbers[order[end]]
    bent = CURVES[name]
    return {
        block: tidy(low + (high - low) * bent(index / max(end - start, 1)))
        for index, block in enumerate(order[start : end + 1])
    }


def inverted(numbers: Numbers) -> Numbers:
    """1 less each number."""
    return {block: tidy(1 - number) for block, number in numbers.items()}


def scaled(numbers: Numbers, factor: float, low: float | None, high: float | None) -> Numbers:
    """Each number times a factor, within bounds."""
    return {block: within(number * factor, low, high) for block, number in numbers.items()}


def within(number: float, low: float | None, high: float | None) -> float:
    """The nearest number within bounds."""
    return tidy(min(max(number, -math.inf if low is None else low), math.inf if high is None else high))


def shortly(value: object) -> str:
    """A parameter's value in a few words: `GRAD_V, base 0.5`."""
    if isinstance(value, bool | int | float):
        return f"{value:g}" if not isinstance(value, bool) else str(value).lower()
    if isinstance(value, list) or _is_pasted(value):
        items = value if isinstance(value, list) else re.split("[,;]", str(value))
        return f"{len(items)} numbers" if len(items) > 4 else ", ".join(shortly(item) for item in items)
    if isinstance(value, dict):
        return ", ".join(_said(key, each) for key, each in value.items())
    return shown(str(value))


def _said(key: str, value: object) -> str:
    short = shortly(value)
    return short if key in ("preset", "weights") else f"{shown(key)} {short}"
