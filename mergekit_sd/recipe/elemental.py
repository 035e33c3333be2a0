"""Elemental rules: supermerger's `blocks:elements:ratio`, which weigh parts of blocks.

Owns the grammar of the rules and which tensors each means. Several stand in one text, separated by
commas or newlines, and the last one that matches a tensor wins. `blocks` are names and ranges of an
architecture's own blocks, BASE before them (all that is in no block of the UNet); `elements` are
parts of a tensor's name; NOT before a list means all but these, an empty list means all.

supermerger calls SDXL's blocks by SD1's names here (its OUT03 is OUT06) and skips a rule that it
cannot read; here SDXL's blocks have their own names, and such a rule is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

from mergekit_sd.recipe.positions import Where, described
from mergekit_sd.recipe.presets import SD_BLOCKS, close_to, selector_hint
from mergekit_sd.text import shown

BASE = "BASE"
NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_KNOWN = (BASE, *SD_BLOCKS)
_FORM = "write blocks:elements:ratio, such as OUT03-OUT05:attn1 attn2:0.5"


@dataclass(frozen=True, slots=True)
class Words:
    """The words of one part of a rule: these, or with NOT all but these; no words mean all."""

    words: tuple[str, ...]
    inverted: bool = False

    def __str__(self) -> str:
        return " ".join(("NOT", *self.words) if self.inverted else self.words)

    def take(self, named: bool) -> bool:
        """Whether they mean something, of which `named` says whether it is one of them."""
        return not self.words or named != self.inverted


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule, read; two that mean the same by form are equal."""

    blocks: Words
    elements: Words
    ratio: float
    where: Where = field(default_factory=Where, compare=False, repr=False)

    @property
    def text(self) -> str:
        """The rule as it is written, in its shortest form."""
        return f"{self.blocks}:{self.elements}:{repr(self.ratio).removesuffix('.0')}"

    def tensors(self, blocks: Iterable[tuple[str, Collection[str]]], order: Sequence[str]) -> list[str]:
        """The tensors that the rule means, of those in each block; `order`: the architecture's blocks."""
        order = (BASE, *order)
        named = {block for word in self.blocks.words for block in self._range(word, order)}
        inside = [name for block, names in blocks if self.blocks.take(block in named) for name in names]
        return [name for name in inside if self.elements.take(any(word in name for word in self.elements.words))]

    def _range(self, word: str, order: Sequence[str]) -> Sequence[str]:
        ends = word.split("-")
        missing = next((end for end in ends if end not in order), None)
        if missing:
            message = f'"{shown(self.text)}" names {missing}, which this model does not have.'
            raise self.where.error(message, hint=f"its blocks: {', '.join(order)}")
        first, last = sorted(order.index(end) for end in (ends[0], ends[-1]))
        return order[first : last + 1]


def parse_elemental(value: object, where: Where, check: Callable[[float, Where, str], float]) -> tuple[Rule, ...]:
    """Read the rules of a text; `check` refuses a ratio that is out of bounds."""
    if not isinstance(value, str):
        raise where.error(f"elemental takes rules, not {described(value)}.", hint=_FORM)
    texts = [" ".join(text.split()) for text in re.split("[,\n]", value)]
    rules = tuple(_rule(text, where, check) for text in texts if text)
    if not rules:
        raise where.error("elemental holds no rule.", hint=_FORM)
    return rules


def _rule(text: str, where: Where, check: Callable[[float, Where, str], float]) -> Rule:
    parts = [part.strip() for part in text.split(":")]
    if len(parts) != 3:
        raise where.error(f'"{shown(text)}" is no elemental rule.', hint=_FORM)
    blocks, elements = _words(parts[0], text, where), _words(parts[1], text, where)
    for word in blocks.words:
        _check_block(word, text, where)
    if not NUMBER.fullmatch(parts[2]):
        hint = "for random numbers write { random = [0, 1] }" if parts[2] in ("R", "U", "X") else _FORM
        raise where.error(f'The ratio of "{shown(text)}" is no number.', hint=hint)
    return Rule(blocks, elements, check(float(parts[2]), where, f'The ratio of "{shown(text)}"'), where)


def _words(part: str, text: str, where: Where) -> Words:
    words = tuple(part.split())
    inverted = words[:1] == ("NOT",)
    words = words[inverted:]
    if inverted and not words:
        raise where.error(f'NOT stands before nothing in "{shown(text)}".', hint="write what it leaves out, or nothing")
    if "NOT" in words:
        raise where.error(f'NOT is not the first word in "{shown(text)}".', hint="it stands before the whole list")
    return Words(words, inverted)


def _check_block(word: str, text: str, where: Where) -> None:
    ends = word.split("-")
    wrong = next((end for end in ends if end not in _KNOWN), word if len(ends) > 2 else None)
    if wrong is None:
        return
    if wrong.upper() == "VAE":
        hint = "the VAE is in BASE: write BASE:first_stage_model:0.5"
    else:
        hint = f'did you mean "{BASE}"?' if close_to(wrong, [BASE]) else selector_hint(wrong)
    raise where.error(f'"{shown(text)}" names {shown(wrong or word)}, which is not a block.', hint=hint)
