"""Words for people: escaping of foreign names, sizes, and "did you mean".

Owns how a value looks in a message or a table. Must not know files, recipes or terminals.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def shown(text: str) -> str:
    """`text` with everything that is not printable escaped (`\\x1b`, `\\n`, bidi marks).

    Names of tensors and files come from strangers: they reach a terminal only through here.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def size(count: int) -> str:
    """Bytes for people, in binary units: `2.13 GiB`, `66.0 MiB`, `512 B`."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """The hint for a misspelt name: `did you mean "alpha"?`, else the list of what is known."""
    names = list(known)
    close = difflib.get_close_matches(word.lower(), [name.lower() for name in names], n=1, cutoff=0.6)
    if close:
        match = next(name for name in names if name.lower() == close[0])
        return f'did you mean "{match}"?'
    if not names:
        return None
    listed = ", ".join(names[:12]) + (f", … ({len(names)} in all)" if len(names) > 12 else "")
    return f"known: {listed}"


def listed(names: Iterable[str], most: int = 5) -> str:
    """The first few names, escaped, and how many more there are."""
    every = [shown(name) for name in names]
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(every[:most]) + more


def count(number: int, noun: str) -> str:
    """`1 tensor`, `1,143 tensors`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
