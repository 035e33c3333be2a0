"""Which tensors of one model the weights of a parameter mean.

Owns selectors and elemental rules applied to names, and their refusals. Must not know how weights
are written, files, or how a layout is detected: it sees a layout through the protocols below.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import translate
from typing import Protocol

from mergekit_sd.recipe.elemental import BASE, Rule
from mergekit_sd.recipe.positions import Where
from mergekit_sd.recipe.presets import BLOCKS, WORDS, Rank, Selector, close_to
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


class Matcher:
    """The tensors of one model, and which selectors mean which of them."""

    def __init__(self, layout: Layout, names: list[str], where: Where) -> None:
        self.names, self.where, self.architecture = names, where, layout.architecture
        self.unmatched: list[Selector | Rule] = []
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

    def follow(self, rules: Sequence[Rule]) -> dict[str, float]:
        """What elemental rules say, the last that matches a tensor; a rule may mean what a higher rank has decided."""
        order = self.known("an elemental rule").blocks
        blocks = [(block or BASE, names) for block, names in self.blocks.items()]
        found: dict[str, float] = {}
        for rule in rules:
            matched = rule.tensors(blocks, order)
            if not matched:
                self.unmatched.append(rule)
            found.update(dict.fromkeys(matched, rule.ratio))
        self.decided.update(found)
        return found

    def _matched(self, selector: Selector) -> Sequence[str]:
        if selector.rank is Rank.DEFAULT:
            return self.names
        if selector.rank is Rank.GLOB:
            matches = re.compile(translate(selector.text)).match
            return [name for name in self.names if matches(name)]
        if selector.rank is Rank.NAME:
            return [name for name in self.names if name == selector.text]
        if selector.rank in (Rank.RANGE, Rank.BLOCK, Rank.PART):
            order = self.known(selector.text).blocks
            inside = [name for block in selector.blocks(order) for name in self.blocks.get(block, ())]
            return [name for name in inside if selector.part in name]
        return self._component(selector.text)

    def _component(self, word: str) -> Sequence[str]:
        first, second = self.components.get("text_encoder", []), self.components.get("text_encoder_2", [])
        if word == "base":
            self.known(word)
            return [name for part, names in self.components.items() if part != "unet" for name in names]
        if word == "text_encoder":
            return first + second
        if word == "clip_l":
            return first if self.two_encoders or (self.architecture and self.architecture.family == "sd1") else []
        return second if word == "clip_g" else self.components.get(word, [])

    def per_block(self, base: float, numbers: Mapping[str, float]) -> dict[str, float]:
        """Each block's number; `base` for everything that is in no block of the UNet."""
        return {name: numbers.get(block or "", base) for block, names in self.blocks.items() for name in names}

    def known(self, what: str) -> Architecture:
        """The architecture, which `what` cannot do without."""
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
            where = first.where if isinstance(first, Rule) else self.where.at(first.text)
            raise where.error(f"{quoted} {verb} no tensor.", hint=self._hint(first), details=texts)
        left = [name for name in self.names if name not in chosen]
        if left:
            message = f"No weight for {_tensors(left)}: {listed(left, 3)}."
            raise self.where.error(message, hint="add default = … to the table", details=left)

    def _hint(self, selector: Selector | Rule) -> str | None:
        if isinstance(selector, Rule):
            return "elements are parts of tensors' names, such as attn1.to_k"
        if selector.rank in (Rank.RANGE, Rank.BLOCK) and self.architecture:
            return f"blocks of {self.architecture.name}: {', '.join(self.architecture.blocks)}"
        if selector.rank is Rank.NAME and close_to(selector.text, self.names):
            return did_you_mean(selector.text, self.names)
        parts = sorted(part for part in self.components if part)
        return f"parts that are there: {', '.join(parts)}" if parts and selector.text in WORDS else None


def _tensors(names: Sequence[object]) -> str:
    return count(len(names), "tensor")
