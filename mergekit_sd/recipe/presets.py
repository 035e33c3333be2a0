"""The names in which weights are written: blocks, selectors, and the 38 presets of the MBW extension.

Owns the grammar of one selector, and the presets' numbers ("merge block weighted": one for each of
the 25 blocks of an SD1 or SD2 UNet, and the base) from their formulas, in fractions, so that ends
and middles are exact. Must not know recipes or layouts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from fractions import Fraction
from functools import cache, lru_cache

from mergekit_sd.text import did_you_mean

SD_BLOCKS: tuple[str, ...] = (
    *(f"IN{number:02}" for number in range(12)),
    "M00",
    *(f"OUT{number:02}" for number in range(12)),
)
"""The blocks that a preset's numbers are for, in their order."""

# --- selectors -------------------------------------------------------------------------------------


class Rank(IntEnum):
    """How specific a selector is; the higher wins."""

    DEFAULT = 0
    PRESET = 1  # and a list of numbers, or random ones: what each block has before anything else
    HALF = 2
    COMPONENT = 3
    ENCODER = 4
    RANGE = 5
    BLOCK = 6
    PART = 7
    ELEMENTAL = 8
    GLOB = 9
    NAME = 10


WORDS: dict[str, Rank] = {
    "default": Rank.DEFAULT,
    "unet": Rank.HALF,
    "base": Rank.HALF,
    "text_encoder": Rank.COMPONENT,
    "vae": Rank.COMPONENT,
    "clip_l": Rank.ENCODER,
    "clip_g": Rank.ENCODER,
}

# Keys of a table that are no selectors; a tensor may be called "weight" or "seed", so these have no close words.
FORMS = ("preset", "random", "elemental")

_BLOCK = "(?:IN[0-9]{2}|M[0-9]{2}|OUT[0-9]{2})"
BLOCKS = re.compile(rf"(?P<first>{_BLOCK})(?:-(?P<last>{_BLOCK}))?(?:\.(?P<part>.+))?", re.DOTALL)
# What was probably meant as a block: refused, so that it is not taken for a tensor's name.
_ALMOST = re.compile(r"(?i)(?:in|m|mid|middle|out)[_ ]?(?:[0-9]+|all)?(?:-(?:in|m|out)?[0-9]*)?(?:\..*)?")


@dataclass(frozen=True, slots=True)
class Selector:
    """One key of a table of weights, read."""

    text: str
    rank: Rank
    first: str = ""
    last: str = ""
    part: str = ""

    def blocks(self, order: Sequence[str]) -> Sequence[str]:
        """The blocks that it names, of those that an architecture has; none if an end is not there."""
        if self.first not in order or self.last not in order:
            return ()
        return order[order.index(self.first) : order.index(self.last) + 1]


@lru_cache(maxsize=4096)
def read_selector(text: str) -> Selector | str:
    """A selector, or what is wrong with it in words."""
    if text in WORDS:
        return Selector(text, WORDS[text])
    match = BLOCKS.fullmatch(text)
    if match:
        return _block_selector(text, match)
    if any(letter in text for letter in "*?["):
        return Selector(text, Rank.GLOB)
    if "." not in text and close_to(text, (*WORDS, *FORMS)):
        return "is not a selector"
    if _ALMOST.fullmatch(text):
        return "is not a block"
    return Selector(text, Rank.NAME)


def close_to(text: str, words: Iterable[str]) -> bool:
    """Whether the text looks like a misspelling of one of the words."""
    return (did_you_mean(text, words) or "").startswith("did you mean")


def _block_selector(text: str, match: re.Match[str]) -> Selector | str:
    first, last, part = match["first"], match["last"], match["part"] or ""
    for end in (first, last or first):
        if end not in SD_BLOCKS:
            return f"names {end}, which no architecture has"
    if last and SD_BLOCKS.index(first) > SD_BLOCKS.index(last):
        return f"runs backwards: {last} comes before {first}"
    rank = Rank.PART if part else Rank.RANGE if last else Rank.BLOCK
    return Selector(text, rank, first, last or first, part)


def selector_hint(text: str) -> str:
    """What was probably meant by a selector that is none."""
    match = re.fullmatch(r"(?i)(in|out|m|mid|middle)[_ ]?([0-9]*)(all)?(\..*)?", text)
    if match:
        kind = match[1].upper() if match[1].lower() in ("in", "out") else "M"
        block = "M00" if kind == "M" else f"{kind}{int(match[2] or 0):02}"
        if kind != "M" and not match[2]:
            return f'write "{kind}00-{kind}11" for all of them'
        if block in SD_BLOCKS:
            return f'did you mean "{block}{match[4] or ""}"?'
    ends = text.upper().split(".")[0].split("-")
    if len(ends) == 2 and all(end in SD_BLOCKS for end in ends):
        first, last = sorted(ends, key=SD_BLOCKS.index)
        return f'write "{first}-{last}{text[len("-".join(ends)) :]}"'
    if close_to(text, (*WORDS, *FORMS)):
        return did_you_mean(text, (*WORDS, *FORMS)) or ""
    return "blocks are IN00 to IN11, M00, OUT00 to OUT11 (SDXL: to IN08 and OUT08)"


# --- presets ---------------------------------------------------------------------------------------

_Formula = Callable[[int], Fraction | float]


def _x(index: int) -> Fraction:
    return Fraction(index, 24)


def _smoothstep(x: Fraction) -> Fraction:
    return 3 * x**2 - 2 * x**3


def _fold(y: Fraction) -> Fraction:
    """There and back again: 0 to 1 to 0 with period 2."""
    rest = y % 2
    return 2 - rest if rest > 1 else rest


def _fake_hermite(index: int) -> Fraction:
    x = _x(index)
    return Fraction(19, 3) * x**3 - Fraction(19, 2) * x**2 + Fraction(25, 6) * x


def _true_hermite(index: int) -> Fraction:
    x = _x(index)
    return _fake_hermite(index) + (2 * x**3 - 3 * x**2 + 1) / 24 if index else Fraction(0)


def _steps(ones: Container[int], halves: Container[int] = ()) -> _Formula:
    half = Fraction(1, 2)
    return lambda index: Fraction(1) if index in ones else half if index in halves else Fraction(0)


def _wrap(width: int) -> _Formula:
    return _steps((*range(width), *range(25 - width, 25)))


def _multiplied(q: int) -> _Formula:
    return lambda index: _fold(q * _smoothstep(_x(index)))


def _divided(q: int) -> _Formula:
    return lambda index: _smoothstep(_fold(q * _x(index)))


def _reversed(formula: _Formula) -> _Formula:
    return lambda index: 1 - formula(index)


def _grad_v(index: int) -> Fraction:
    return abs(1 - Fraction(index, 12))


def _smooth(index: int) -> Fraction:
    return _smoothstep(_x(index))


def _cosine(index: int) -> float:
    return (1 + math.cos(math.pi * index / 24)) / 2


_FORMULAS: dict[str, _Formula] = {
    "GRAD_V": _grad_v,
    "GRAD_A": _reversed(_grad_v),
    "FLAT_25": lambda _: Fraction(1, 4),
    "FLAT_75": lambda _: Fraction(3, 4),
    "WRAP08": _wrap(4),
    "WRAP12": _wrap(6),
    "WRAP14": _wrap(7),
    "WRAP16": _wrap(8),
    "MID12_50": _steps((), range(5, 19)),
    "OUT07": _steps(range(18, 25)),
    "OUT12": _steps(range(13, 25)),
    "OUT12_5": _steps(range(13, 25), (12,)),
    "RING08_SOFT": _steps((6, 7, 8, 16, 17, 18), (5, 9, 15, 19)),
    "RING08_5": _steps((*range(6, 10), *range(15, 19))),
    "RING10_5": _steps((*range(5, 10), *range(15, 20))),
    "RING10_3": _steps((*range(6, 11), *range(14, 19))),
    "SMOOTHSTEP": _smooth,
    "REVERSE-SMOOTHSTEP": _reversed(_smooth),
    **{f"SMOOTHSTEP*{q}": _multiplied(q) for q in (2, 3, 4)},
    **{f"R_SMOOTHSTEP*{q}": _reversed(_multiplied(q)) for q in (2, 3, 4)},
    **{f"SMOOTHSTEP/{q}": _divided(q) for q in (2, 3, 4)},
    **{f"R_SMOOTHSTEP/{q}": _reversed(_divided(q)) for q in (2, 3, 4)},
    "COSINE": _cosine,
    "REVERSE_COSINE": _reversed(_cosine),
    "TRUE_CUBIC_HERMITE": _true_hermite,
    "TRUE_REVERSE_CUBIC_HERMITE": _reversed(_true_hermite),
    "FAKE_CUBIC_HERMITE": _fake_hermite,
    "FAKE_REVERSE_CUBIC_HERMITE": _reversed(_fake_hermite),
    "ALL_A": lambda _: Fraction(0),
    "ALL_B": lambda _: Fraction(1),
}

PRESETS: tuple[str, ...] = tuple(_FORMULAS)
_EXACT = {name.upper(): name for name in PRESETS}


def find_preset(name: str) -> str | None:
    """The preset's own spelling, whatever the case of `name`; None if there is none."""
    return _EXACT.get(name.upper())


@cache
def preset(name: str) -> tuple[float, tuple[float, ...]]:
    """The base weight and the 25 blocks' weights, in the order of `SD_BLOCKS`; KeyError if unknown."""
    exact = _EXACT[name.upper()]
    return 1.0 if exact == "ALL_B" else 0.0, tuple(float(_FORMULAS[exact](index)) for index in range(25))
