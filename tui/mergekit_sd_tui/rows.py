"""How a model of the index reads: the cells of its row, the orders of rows, what a filter finds, its details.

Owns these words. All foreign text in them is escaped. Must not know widgets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from rich.text import Text

import mergekit_sd as mk
from mergekit_sd.text import count, shown, size
from mergekit_sd_tui.leaves import PARTS

NAME_WIDTH = 34
MOST_LINES = 3  # of the reason why a file cannot be read, in its row
MARK = "*"


@dataclass(frozen=True, slots=True)
class Column:
    """A column: its width, how an entry reads in it, and its order."""

    name: str
    width: int
    words: Callable[[mk.LibraryEntry], str]
    order: Callable[[mk.LibraryEntry], Any]


def _dtype(entry: mk.LibraryEntry) -> str:
    """The dtype of most tensors; a plus where there are others."""
    names = sorted(entry.dtypes, key=lambda name: -entry.dtypes[name])
    return "" if not names else names[0].lower() + ("+" if len(names) > 1 else "")


def _besides(entry: mk.LibraryEntry) -> str:
    """What a prune or a fix would mend."""
    found = (("EMA", entry.ema), ("junk", entry.junk), ("ids!", entry.position_ids == "corrupt"))
    return " ".join(word for word, there in found if there)


def _hash(entry: mk.LibraryEntry) -> str:
    """As WebUIs show it, else the beginning of the content hash."""
    sha256 = entry.hashes.get("sha256")
    return sha256[:10] if sha256 else (entry.content or "")[:10]


def _name(entry: mk.LibraryEntry) -> str:
    return entry.path.name.casefold()


COLUMNS = (
    Column("name", NAME_WIDTH, lambda entry: entry.path.name, _name),
    Column(
        "family", 8, lambda entry: entry.architecture or "", lambda entry: (entry.architecture or "~", _name(entry))
    ),
    Column("kind", 10, lambda entry: entry.what, lambda entry: (entry.what, _name(entry))),
    Column("size", 9, lambda entry: size(entry.state.size), lambda entry: (-entry.state.size, _name(entry))),
    Column("dtype", 5, _dtype, lambda entry: (_dtype(entry) or "~", _name(entry))),
    Column("besides", 8, _besides, lambda entry: (-entry.ema - entry.junk, _name(entry))),
    Column(
        "VAE", 3, lambda entry: "yes" if "vae" in entry.components else "", lambda entry: (_no_vae(entry), _name(entry))
    ),
    Column("hash", 10, _hash, lambda entry: (_hash(entry) or "~", _name(entry))),
)


def _no_vae(entry: mk.LibraryEntry) -> bool:
    return "vae" not in entry.components


def cells(entry: mk.LibraryEntry, marked: bool) -> list[Text]:
    """The row: the mark, then the columns."""
    right = {"size"}
    row = [Text(MARK if marked else " ")]
    for column in COLUMNS:
        words = shown(column.words(entry))
        row.append(Text(words, no_wrap=True, overflow="ellipsis", justify="right" if column.name in right else "left"))
    if entry.error:
        row[1] = Text.assemble(_cut(shown(entry.path.name)), "\n", (_reason(entry), "italic"))
    return row


def height(entry: mk.LibraryEntry) -> int:
    """The lines of a row: those of a file that cannot be read say why."""
    return 1 + (_reason(entry).count("\n") + 1 if entry.error else 0)


def _cut(name: str) -> str:
    return name if len(name) <= NAME_WIDTH else name[: NAME_WIDTH - 1] + "…"


def _reason(entry: mk.LibraryEntry) -> str:
    """Why a file cannot be read, in lines as wide as the column."""
    import textwrap

    return "\n".join(textwrap.wrap(shown(entry.error or ""), NAME_WIDTH, max_lines=MOST_LINES, placeholder=" …"))


def has(entry: mk.LibraryEntry, words: Iterable[str]) -> bool:
    """Whether all words (in lower case) are in path, kind, family or title."""
    text = "\n".join((str(entry.path), entry.what, entry.architecture or "", entry.title or "", entry.trained_as or ""))
    return all(word in text.casefold() for word in words)


def details(entry: mk.LibraryEntry, beside: Iterable[str] | None) -> Text:
    """All that is known of a model; `beside`: the names of its sidecars, None while they are looked for."""
    text = Text()
    text.append(shown(entry.path.name), style="bold")
    text.append(f"\n{shown(str(entry.path.parent))}\n")
    if entry.error:
        text.append(f"\nCannot be read: {shown(entry.error)}\n", style="bold")
    for label, words in _facts(entry):
        text.append(f"\n{label:<13}", style="dim")
        text.append(shown(words))
    if beside is not None:
        text.append("\nbeside it    ", style="dim")
        text.append(", ".join(map(shown, beside)) or "nothing")
    return text


def _facts(entry: mk.LibraryEntry) -> Iterable[tuple[str, str]]:
    said = (
        ("is", "" if entry.error else f"{entry.architecture or ''} {entry.what}".strip()),
        ("format", entry.format),
        ("size", size(entry.state.size)),
        ("written", f"{entry.modified:%Y-%m-%d %H:%M}"),
        ("title", entry.title),
        ("trained as", entry.trained_as),
    )
    yield from ((label, words) for label, words in said if words)
    for name, nbytes in entry.components.items():
        yield PARTS.get(name, name), size(nbytes)
    for label, nbytes in (("EMA", entry.ema), ("junk", entry.junk)):
        if nbytes:
            yield label, f"{size(nbytes)}, Prune drops it"
    if entry.dtypes:
        yield "dtypes", ", ".join(f"{name} {number:,}" for name, number in entry.dtypes.items())
    if entry.position_ids:
        mend = ": Fix mends them" if entry.position_ids == "corrupt" else ""
        yield "position_ids", entry.position_ids + mend
    for parent in entry.parents:
        yield "made of", parent.get("name", "?")
    yield from entry.hashes.items()


def group_words(group: mk.DuplicateGroup) -> str:
    """What the row above a group of duplicates says."""
    named = f"{shown(group.name)}: " if group.name else ""
    if group.component is None:
        return f"{named}{count(group.copies, 'equal file')}, {size(group.repeated)} could be saved"
    part = PARTS.get(group.component, group.component)
    return f"{named}one {shown(part)} in {count(group.copies, 'file')}, {size(group.repeated)} repeated"
