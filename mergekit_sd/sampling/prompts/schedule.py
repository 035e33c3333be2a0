"""What a prompt says at which step: `[a:b:n]`, `[a|b]`, and the parts that AND joins.

Owns how a prompt changes from step to step. Must not know weights of words, tokens or networks.

`[a:b:n]` is a until step n, then b; `[a::n]` is a until n, `[b:n]` and `[:b:n]` are b from then on. A number
with a dot is a share of the steps, one without counts them. `[a|b|c]` takes another one at each step. They nest.
What is neither (`[a]`, a bracket without its other one, one with a bracket of the other kind in between) stays as
it is: it may be emphasis.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from mergekit_sd.errors import RecipeError
from mergekit_sd.text import shown

_PIECE = re.compile(r"\\.|[^\\()\[\]:|]+|[()\[\]:|\\]", re.DOTALL)
_NUMBER = re.compile(r"\s*([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))\s*")
_AND = re.compile(r"\bAND\b")
_PARTS_WEIGHT = re.compile(r"\s*([+-]?(?:[0-9]+\.?|[0-9]*\.[0-9]+))")
_CLOSES = {"(": ")", "[": "]"}


def steps_of(text: str, steps: int) -> tuple[tuple[int, str], ...]:
    """The prompt's texts in their order, each with the last step that it is for, counted from 1 to `steps`."""
    pieces = _PIECE.findall(text)
    ends = _pairs(pieces)
    texts = [_at(step, steps, pieces, ends) for step in range(1, steps + 1)]
    return tuple((step, each) for step, each in enumerate(texts, 1) if step == steps or texts[step] != each)


def parts_of(text: str) -> tuple[tuple[str, float], ...]:
    """What AND joins, each with its weight: `a cat :1.2 AND a dog` is a cat at 1.2 and a dog at 1.

    As in the WebUI a number after the last colon is a weight where there is no AND, too: "16:9" is 16 at weight 9.
    Raises RecipeError for a weight that is too large to be a number.
    """
    return tuple(_part(each) for each in _AND.split(text))


def _part(text: str) -> tuple[str, float]:
    before, colon, last = text.rstrip().rpartition(":")
    found = _PARTS_WEIGHT.fullmatch(last) if colon else None
    if not found:
        return text, 1.0
    weight = float(found[1])
    if not math.isfinite(weight):
        raise RecipeError(f'The weight of "{shown(before[:60])}" is too large to be a number.', hint="write a cat :1.2")
    return before.rstrip(), weight


@dataclass(slots=True)
class _Bracket:
    """An open bracket at one step: the texts between the marks (":" or "|") that stand right in it."""

    kind: str
    start: int
    texts: list[str] = field(default_factory=lambda: [""])
    marks: list[tuple[int, str]] = field(default_factory=list)

    def plain(self, closed: str = "") -> str:
        """All of it as it was written."""
        marks = [mark for _, mark in self.marks]
        written = "".join(text + mark for text, mark in zip(self.texts, [*marks, closed], strict=True))
        return self.kind + written


def _pairs(pieces: list[str]) -> Mapping[int, int]:
    """Each bracket that has its other one, by place. A bracket without one makes text of all that are around it."""
    ends: dict[int, int] = {}
    waiting: list[int] = []
    for place, piece in enumerate(pieces):
        if piece in _CLOSES:
            waiting.append(place)
        elif piece in _CLOSES.values():
            if waiting and _CLOSES[pieces[waiting[-1]]] == piece:
                ends[waiting.pop()] = place
            else:
                waiting.clear()
    return ends


def _at(step: int, steps: int, pieces: list[str], ends: Mapping[int, int]) -> str:
    """The text at one step, counted from 1."""
    closing = set(ends.values())
    stack = [_Bracket("", -1)]
    for place, piece in enumerate(pieces):
        if place in ends:
            stack.append(_Bracket(piece, place))
        elif place in closing:
            closed = stack.pop()
            stack[-1].texts[-1] += _chosen(closed, step, steps, pieces, place)
        elif piece in (":", "|"):
            stack[-1].marks.append((place, piece))
            stack[-1].texts.append("")
        else:
            stack[-1].texts[-1] += piece
    return stack[0].plain()


def _chosen(bracket: _Bracket, step: int, steps: int, pieces: list[str], end: int) -> str:
    """What a bracket that closes at `end` says at a step."""
    marks = "".join(mark for _, mark in bracket.marks)
    if bracket.kind == "[" and marks and set(marks) == {"|"}:
        return bracket.texts[(step - 1) % len(bracket.texts)]
    if bracket.kind == "[" and marks in (":", "::"):
        number = _NUMBER.fullmatch("".join(pieces[bracket.marks[-1][0] + 1 : end]))
        if number:
            before, after = bracket.texts[:-1] if marks == "::" else ("", bracket.texts[0])
            last = float(number[1]) * (steps if "." in number[1] else 1)
            return before if step <= last else after
    return bracket.plain(pieces[end])
