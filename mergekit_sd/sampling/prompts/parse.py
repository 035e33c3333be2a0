"""Emphasis: which part of a prompt has which weight, and where a new chunk begins.

Owns round and square brackets, their weights, backslashes and BREAK. Must not know tokens. The rules are the WebUI's:
`(x)` is ×1.1, `[x]` ÷1.1, `(x:1.3)` ×1.3; nested ones multiply; one that is not closed goes to the end; one that was
not opened is text; a backslash before a bracket or a backslash makes text of it, any other backslash is left out.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable
from typing import NamedTuple, TypeAlias

from mergekit_sd.errors import RecipeError
from mergekit_sd.text import shown

ROUND = 1.1
SQUARE = 1 / ROUND
_PIECE = re.compile(r"\\[()\[\]\\]|:\s*(?P<weight>[+-]?[.0-9]+)\s*\)|[^\\()\[\]:]+|[\\()\[\]:]")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)")
_BREAK = re.compile(r"\bBREAK\b")


class Span(NamedTuple):
    """A part of a prompt with one weight."""

    text: str
    weight: float


Section: TypeAlias = tuple[Span, ...]


def parse(text: str) -> tuple[Section, ...]:
    """The spans of a prompt, in sections that BREAK parts; neighbours of one weight are one span.

    Raises RecipeError for a weight that is no finite number.
    """
    pieces: list[str | None] = []  # None: a BREAK
    weights: list[float] = []
    open_at: dict[str, list[int]] = {"(": [], "[": []}

    def close(bracket: str, factor: float) -> None:
        start = open_at[bracket].pop()
        weights[start:] = [weight * factor for weight in weights[start:]]

    for found in _PIECE.finditer(text):
        piece = found[0]
        if piece in open_at:
            open_at[piece].append(len(pieces))
        elif found["weight"] is not None and open_at["("]:
            close("(", _weight(found["weight"], text, found.end()))
        elif piece == ")" and open_at["("]:
            close("(", ROUND)
        elif piece == "]" and open_at["["]:
            close("[", SQUARE)
        else:
            new = [piece[1:]] if piece.startswith("\\") else _at_breaks(piece)
            pieces += new
            weights += [1.0] * len(new)
    for bracket, factor in (("(", ROUND), ("[", SQUARE)):
        while open_at[bracket]:
            close(bracket, factor)
    if not all(map(math.isfinite, weights)):
        raise RecipeError(f'The weights of "{_cut(text)}" multiply to no finite number.', hint="use fewer brackets")
    return _sections(zip(pieces, weights, strict=True))


def _at_breaks(text: str) -> list[str | None]:
    """The text between BREAKs, with None for each of them."""
    first, *others = _BREAK.split(text)
    parts: list[str | None] = [first.rstrip() if others else first]
    for number, other in enumerate(others, 1):
        parts += [None, other.strip() if number < len(others) else other.lstrip()]
    return parts


def _sections(weighted: Iterable[tuple[str | None, float]]) -> tuple[Section, ...]:
    sections: list[list[tuple[str, float]]] = [[]]
    for piece, weight in weighted:
        if piece is None:
            sections.append([])
        elif piece:
            sections[-1].append((piece, weight))
    return tuple(
        tuple(
            Span("".join(piece for piece, _ in run), weight)
            for weight, run in itertools.groupby(section, key=lambda each: each[1])
        )
        for section in sections
    )


def _weight(number: str, text: str, end: int) -> float:
    """The number before the closing bracket that ends at `end`."""
    weight = float(number) if _NUMBER.fullmatch(number) else math.nan
    if not math.isfinite(weight):
        place = _cut(text[max(0, end - 40) : end])
        raise RecipeError(
            f'The weight in "{place}" is no number.', hint=r"write (words:1.2), or \( and \) for brackets that are text"
        )
    return weight


def _cut(text: str) -> str:
    return shown(text if len(text) <= 60 else text[:57] + "…")
