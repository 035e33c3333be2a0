"""How words and numbers stand on the page: everything foreign is escaped here. Must not know the report."""

from __future__ import annotations

import html
import math
import unicodedata
from collections.abc import Mapping
from typing import Any

from mergekit_sd.sampling.values import Level
from mergekit_sd.text import shown, size

# A level is told by its sign and its word; the colour only repeats it.
LEVELS: Mapping[Level, str] = {"failed": "✕ failed", "warning": "▲ warning", "ok": "✓ ok"}


def escaped(text: str) -> str:
    """`text` for the page, in an element or in an attribute; what cannot be printed is shown as `\\x1b`."""
    return html.escape("".join(c if c in "\n\t" or unicodedata.category(c) == "Zs" else shown(c) for c in text))


def name(text: str) -> str:
    """A name, which keeps its direction of writing to itself."""
    return f"<bdi>{escaped(text)}</bdi>"


def number(value: float) -> str:
    """Four digits of it: `0.3141`, `23`, `1.835e+09`."""
    if math.isnan(value):
        return "not a number"
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e9 else f"{value:.4g}"


def fact(key: str, value: Any) -> str:
    """A fact about the machine: bytes as MiB, lists and tables in a line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{escaped(str(each))} {fact(str(each), one)}" for each, one in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(fact(key, one) for one in value)
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "unknown"}[value]
    if isinstance(value, int) and "bytes" in key:
        return size(value)
    return number(value) if isinstance(value, int | float) else escaped(str(value))


def label(key: str) -> str:
    """`peak_memory_bytes` as people write it."""
    return escaped(key.removesuffix("_bytes").replace("_", " "))


def level(value: Level, words: str = "") -> str:
    """A level's sign and word, or its sign and `words`."""
    sign, word = LEVELS[value].split(" ")
    return f'<span class="level {value}"><span aria-hidden="true">{sign}</span> {escaped(words or word)}</span>'


def counts(levels: list[Level]) -> list[str]:
    """How many of each level, the worst first: `✕ 1 failed`, `✓ 12 ok`."""
    found = []
    for each in LEVELS:
        many = levels.count(each)
        plural = "s" if each == "warning" and many > 1 else ""
        if many:
            found.append(level(each, f"{many} {each}{plural}"))
    return found
