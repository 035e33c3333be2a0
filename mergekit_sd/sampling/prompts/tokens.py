"""Tokens: CLIP's ids of a text, and how a prompt of any length is cut into chunks of 75.

Owns the tokenizer and the WebUI's rules of chunks. Must not know networks or files of textual inversions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any, TypeAlias

from mergekit_sd.errors import EnvironmentFault
from mergekit_sd.formats.diffusers.tokenizer import END, tokenizer_files
from mergekit_sd.sampling.packages import INSTALL, need_packages, quiet
from mergekit_sd.sampling.prompts.parse import Section

BOS, EOS, ZERO = 49406, 49407, 0
CHUNK = 75
COMMA = 267
BACKTRACK = 20  # a comma among so many last tokens of a full chunk: what follows it goes to the next chunk


@dataclass(frozen=True, slots=True)
class Word:
    """A textual inversion in a prompt: of `tokens` ids that name it come `vectors` places of a chunk."""

    name: str
    tokens: int
    vectors: int


Find: TypeAlias = Callable[[Sequence[int], int], Word | None]
"""The textual inversion that is named at a place of a text's ids."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """At most 75 ids and their weights; `words`: the places where textual inversions begin, whose ids are 0."""

    ids: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    words: tuple[tuple[int, str], ...] = ()

    def row(self, pad: int) -> list[int]:
        """All 77 ids: BOS, the chunk's, EOS, and `pad` to the end (SD1 EOS, OpenCLIP 0)."""
        return [BOS, *self.ids, EOS, *[pad] * (CHUNK - len(self.ids))]

    def row_weights(self) -> list[float]:
        """The weights of all 77."""
        return [1.0, *self.weights, *[1.0] * (CHUNK + 1 - len(self.weights))]


@lru_cache(maxsize=4096)
def ids_of(text: str) -> tuple[int, ...]:
    """CLIP's ids of a text, without BOS and EOS. Raises EnvironmentFault without the packages."""
    encodable = text.encode("utf-8", "replace").decode()
    return tuple(_tokenizer()(encodable, add_special_tokens=False).input_ids)


@cache
def _tokenizer() -> Any:
    need_packages()
    files = tokenizer_files(END)
    if files is None:
        raise EnvironmentFault(f"The vocabulary of openai-clip is missing: {INSTALL}")
    from transformers import CLIPTokenizer

    merges: Any = [tuple(line.split(" ")) for line in files["merges.txt"].split("\n")[1:-1]]
    with quiet():
        return CLIPTokenizer(vocab=json.loads(files["vocab.json"]), merges=merges)


def chunks_of(prompt: Sequence[Section], find: Find | None = None) -> tuple[Chunk, ...]:
    """A parsed prompt in chunks, at least one. A BREAK ends a chunk, even an empty one; at the end none is added."""
    made: list[Chunk] = []
    chunk = _Open()
    for number, section in enumerate(prompt):
        if number:
            made.append(chunk.taken())
        for text, weight in section:
            ids, place = ids_of(text), 0
            while place < len(ids):
                if chunk.is_full:
                    made.append(chunk.taken(at_comma=ids[place] != COMMA))
                word = find(ids, place) if find else None
                if word and len(chunk.ids) + word.vectors > CHUNK:
                    made.append(chunk.taken())
                chunk.add(ids[place], weight, word)
                place += word.tokens if word else 1
    if chunk.ids or not made:
        made.append(chunk.taken())
    return tuple(made)


@dataclass(slots=True)
class _Open:
    """The chunk that is being filled."""

    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    words: list[tuple[int, str]] = field(default_factory=list)

    @property
    def is_full(self) -> bool:
        return len(self.ids) == CHUNK

    def add(self, token: int, weight: float, word: Word | None) -> None:
        """A token, or the places of a textual inversion's vectors."""
        if word:
            self.words.append((len(self.ids), word.name))
        new = [ZERO] * word.vectors if word else [token]
        self.ids += new
        self.weights += [weight] * len(new)

    def taken(self, *, at_comma: bool = False) -> Chunk:
        """What there is so far, which leaves the rest: nothing, or with `at_comma` what follows a late comma."""
        end = len(self.ids)
        if at_comma:
            commas = [place for place in range(end - BACKTRACK, end) if self.ids[place] == COMMA]
            end = commas[-1] + 1 if commas else end
        chunk = Chunk(tuple(self.ids[:end]), tuple(self.weights[:end]), tuple(w for w in self.words if w[0] < end))
        self.words = [(place - end, name) for place, name in self.words if place >= end]
        del self.ids[:end], self.weights[:end]
        return chunk
