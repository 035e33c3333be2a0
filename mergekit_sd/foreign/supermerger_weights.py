"""supermerger's weights: which number it gives each tensor, and how a recipe says that.

Its quirks are followed, so that the recipe makes what supermerger made: blocks that it names by
another block's name, words that mean more than they say, tensors that it leaves out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from mergekit_sd.architectures import Layout, Role, detect
from mergekit_sd.foreign.records import NO_COUNTERPART, refused
from mergekit_sd.formats.tensor import ModelFile
from mergekit_sd.recipe.elemental import BASE, Rule, Words
from mergekit_sd.recipe.presets import SD_BLOCKS
from mergekit_sd.text import shown

SDXL_BLOCKS = (*SD_BLOCKS[:9], "M00", *SD_BLOCKS[13:22])
_SD_ORDER, _SDXL_ORDER = (BASE, *SD_BLOCKS), (BASE, *SDXL_BLOCKS)
_INCLUDES = ("Include", "Exclude")
# What supermerger leaves as in A: parts of SDXL's UNet, and what is neither "weight" nor "bias".
_TIME_EMBED = "*.time_embed.*"
_NOT_MERGED_XL = (_TIME_EMBED, "*.label_emb.*")
_NOT_MERGED = ("*.positional_embedding", "*.text_projection", "*.logit_scale")
SKIPPED = ("*to_out*", "*proj_out*", "*norm*")
"""What modes that change A by itself leave alone."""
_ADJUSTED = ("diffusion_model.input_blocks.0.0.", "diffusion_model.out.")


@dataclass(frozen=True)
class Merge:
    """A record, and the file that it made. `places`: the block of each weight by its logical name."""

    file: ModelFile
    record: dict[str, Any]
    places: Mapping[str, str | None]
    xl: bool

    @classmethod
    def of(cls, file: ModelFile, record: dict[str, Any]) -> Merge:
        """What a file's record tells of, with the file's names."""
        layout: Layout = detect(file.tensors)
        places = {n: place.block for n, place in layout.places.items() if place.role in (Role.weight, Role.unknown)}
        said = record.get("weights_alpha")
        count = len(said.split(",") if isinstance(said, str) else said) if isinstance(said, str | list) else 0
        family = layout.architecture.family if layout.architecture else ""
        return cls(file, record, places, family == "sdxl" if family else count in (19, 20))

    @property
    def recent(self) -> bool:
        """Of a version that merges SDXL and has Include and Exclude; some before it are as these."""
        return self.xl or any(key in self.record for key in ("Off", *_INCLUDES))

    @property
    def order(self) -> tuple[str, ...]:
        """BASE and the architecture's blocks."""
        return _SDXL_ORDER if self.xl else _SD_ORDER

    def number_of(self, name: str) -> int:
        """The block that supermerger takes a tensor to be in; in SD1 time_embed is in OUT11 by a slip."""
        if ".time_embed." in name and self.recent and not self.xl:
            return len(SD_BLOCKS)
        return self.own_number_of(name)

    def own_number_of(self, name: str) -> int:
        """The block that a tensor is in, which a recipe goes by."""
        block = self.places[name]
        return self.order.index(block) if block in self.order else 0


@dataclass(frozen=True)
class _Rule:
    """An elemental rule as supermerger reads it: `hits` are numbers of blocks."""

    hits: frozenset[int]
    but_blocks: bool
    elements: tuple[str, ...]
    but_elements: bool
    ratio: float

    @property
    def names_shifted(self) -> bool:
        """Whether it tells blocks apart that SD1 and SDXL call by different names."""
        return len(self.hits) < len(_SD_ORDER) and max(self.hits, default=0) > SDXL_BLOCKS.index("M00")

    def means(self, name: str, block: int) -> bool:
        """Whether it means a tensor in a block."""
        key = name + _SD_ORDER[block]
        return (block in self.hits) != self.but_blocks and any(e in key for e in self.elements) != self.but_elements

    def text(self, order: Sequence[str]) -> str | None:
        """The rule in the names of an architecture's blocks; None where it can mean none."""
        hits = sorted(number for number in self.hits if number < len(order))
        every = len(hits) == len(order)
        if (every if self.but_blocks else not hits) or ("" in self.elements and self.but_elements):
            return None
        blocks = Words(() if every else _ranges(hits, order), self.but_blocks and bool(hits))
        parts = () if "" in self.elements else self.elements
        elements = Words(parts, self.but_elements and bool(parts))
        return Rule(blocks, elements, self.ratio).text


def _ranges(numbers: Sequence[int], order: Sequence[str]) -> tuple[str, ...]:
    """Blocks by number, neighbours as a range."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return tuple(order[run[0]] if len(run) == 1 else f"{order[run[0]]}-{order[run[-1]]}" for run in runs)


@dataclass(frozen=True)
class BlockNumbers:
    """A parameter's numbers: of all, or of the base and each block; the last rule that means a tensor wins."""

    base: float
    blocks: tuple[float, ...] = ()
    rules: tuple[_Rule, ...] = ()

    def of(self, name: str, block: int) -> float:
        """The number of a tensor in a block."""
        found = self.blocks[block - 1] if block and self.blocks else self.base
        return next((rule.ratio for rule in reversed(self.rules) if rule.means(name, block)), found)

    def without_zeros(self) -> BlockNumbers:
        """The same with 1 for 0."""
        rules = tuple(replace(rule, ratio=rule.ratio or 1.0) for rule in self.rules)
        return BlockNumbers(self.base or 1.0, tuple(number or 1.0 for number in self.blocks), rules)

    def is_beyond(self) -> bool:
        """Whether a number is not in [0, 1]."""
        numbers = (self.base, *self.blocks, *(rule.ratio for rule in self.rules))
        return any(not 0 <= number <= 1 for number in numbers)

    def written(self, merge: Merge) -> Any:
        """As a recipe says it. A rule that means no tensor is left out: a recipe must not have one."""
        texts = [
            text
            for rule in self.rules
            if (text := rule.text(merge.order))
            and any(rule.means(name, merge.own_number_of(name)) for name in merge.places)
        ]
        table = {"base": self.base, **dict(zip(merge.order[1:], self.blocks, strict=True))} if self.blocks else None
        moved = self._moved(merge)
        if not table and not texts and not moved:
            return self.base
        return (table or {"default": self.base}) | ({"elemental": ", ".join(texts)} if texts else {}) | moved

    def _moved(self, merge: Merge) -> dict[str, float]:
        """The numbers of the tensors that supermerger takes to be in another block: a glob, or each by its name."""
        names = [name for name in merge.places if merge.number_of(name) != merge.own_number_of(name)]
        numbers = {name: self.of(name, merge.number_of(name)) for name in names}
        if all(number == self.of(name, merge.own_number_of(name)) for name, number in numbers.items()):
            return {}
        return {_TIME_EMBED: numbers[names[0]]} if len(set(numbers.values())) == 1 else numbers


def as_table(weights: Any) -> dict[str, Any]:
    """Weights to which selectors can be added."""
    return weights if isinstance(weights, dict) else {"default": weights}


def number_in(merge: Merge, key: str) -> float:
    """A number of the record."""
    try:
        return float(merge.record[key])
    except (KeyError, TypeError, ValueError):
        raise refused(merge.file, f"Its record has no weights in {key}.") from None


def block_weights(merge: Merge, which: str) -> BlockNumbers:
    """The base and 25 blocks for SD1; for SDXL 19, and a slot for the VAE that supermerger does not use."""
    base, key = number_in(merge, f"base_{which}"), f"weights_{which}"
    if not merge.record.get("mbw"):
        return BlockNumbers(base)
    said = merge.record.get(key)
    try:
        numbers = tuple(float(part) for part in (said if isinstance(said, list) else str(said).split(",")))
    except (TypeError, ValueError):
        raise refused(merge.file, f"Its record has no weights in {key}.") from None
    if merge.xl and len(numbers) == len(SDXL_BLOCKS) + 1:
        numbers = numbers[:-1]
    if len(numbers) != len(merge.order) - 1:
        message = f"Its record has {len(numbers)} block weights in {key}; 25 were expected, for SDXL 19 or 20."
        raise refused(merge.file, message)
    return BlockNumbers(base, numbers)


def elemental(merge: Merge) -> tuple[_Rule, ...]:
    """The record's elemental rules; what is no rule supermerger passes over."""
    said = merge.record.get("elemental_merge") or []
    texts = said if isinstance(said, list) else str(said).replace("\n", ",").split(",")
    return tuple(_read_rule(merge, str(text)) for text in texts if str(text).count(":") == 2)


def _read_rule(merge: Merge, text: str) -> _Rule:
    blocks, elements, ratio = text.split(":")
    words, parts = _expanded(blocks.lstrip()).split(" "), elements.split(" ")
    but_blocks, but_elements = words[0] == "NOT", parts[0] == "NOT"
    words, parts = words[but_blocks:], parts[but_elements:]
    hits = [{number for number, name in enumerate(_SD_ORDER) if word in name} for word in words]
    try:
        if not all(hits):
            raise ValueError("a word that is part of no block's name")
        return _Rule(frozenset().union(*hits), but_blocks, tuple(parts), but_elements, float(ratio))
    except ValueError:
        raise refused(merge.file, f'{NO_COUNTERPART}supermerger, elemental rule "{shown(text.strip())}".') from None


def _expanded(blocks: str) -> str:
    """A list of blocks with its ranges written out, either end first."""
    words: list[str] = []
    for word in blocks.split(" "):
        ends = word.split("-")
        if len(ends) == 2 and all(end in _SD_ORDER for end in ends):
            first, last = sorted(map(_SD_ORDER.index, ends))
            words += _SD_ORDER[first : last + 1]
        else:
            words.append(word)
    return " ".join(words)


# --- supermerger: what stays as in A ---------------------------------------------------------------


def left_alone(merge: Merge, *, skips: bool) -> list[str]:
    """Globs of what stays as in A, of those that mean a tensor; with `skips` SKIPPED, too."""
    xl, recent = _NOT_MERGED_XL if merge.xl else (), _NOT_MERGED if merge.recent else ()
    globs = (*xl, *recent, *(SKIPPED if skips else ()))
    return [glob for glob in globs if any(fnmatchcase(name, glob) for name in merge.places)]


def included(merge: Merge) -> BlockNumbers | None:
    """What Include and Exclude let through: 1 what is merged, 0 what stays. None: all is.

    To supermerger each block and each element that means a tensor turns the answer round; so an
    element in a block that is named, too, undoes it.
    """
    words = _included_words(merge)
    if not words:
        return None
    all_in = bool(merge.record.get("Exclude"))
    turned = 0.0 if all_in else 1.0
    blocks = frozenset(merge.order.index(word) for word in words if word in merge.order)
    elements = _included_elements(merge)
    if blocks and elements:
        rules = [_Rule(blocks, but, elements, not but, turned) for but in (False, True)]
    elif blocks or elements:
        rules = [_Rule(blocks, not blocks, elements or ("",), False, turned)]
    else:
        rules = []
    return BlockNumbers(1.0 - turned, rules=tuple(rules)) if rules or not all_in else None


def _included_words(merge: Merge) -> list[str]:
    said: object = next((merge.record[how] for how in _INCLUDES if merge.record.get(how)), [])
    return [word for word in said if isinstance(word, str) and word] if isinstance(said, list) else []


def _included_elements(merge: Merge) -> tuple[str, ...]:
    """Parts of names: those written, and those that stand for the choices "VAE" and "Adjust"."""
    words = _included_words(merge)
    written = [word for word in words if word not in (*_SD_ORDER, "VAE", "Adjust", "print")]
    chosen = [*(["first_stage_model"] if "VAE" in words else []), *(_ADJUSTED if "Adjust" in words else ())]
    return tuple(word for word in (*chosen, *written) if not re.search("[\\s:]", word))  # no name has these


def two_elements(merge: Merge) -> bool:
    """Whether elements of Include or Exclude undo each other for a tensor."""
    elements = _included_elements(merge)
    found = (sum(element in name for element in elements) for name in merge.places)
    return any(number and number % 2 == 0 for number in found)
