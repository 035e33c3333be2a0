"""Choosing among the entries of the index, and looking one up.

Owns filters and orders. Must not know how entries are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from mergekit_sd.library.entry import LibraryEntry, entry_of, open_header, whole_path
from mergekit_sd.library.index import Library
from mergekit_sd.library.store import library_file

Order: TypeAlias = Literal["name", "size", "date", "kind"]

_KEYS: dict[str, Callable[[LibraryEntry], Any]] = {
    "name": lambda entry: entry.path.name.casefold(),
    "size": lambda entry: -entry.state.size,
    "date": lambda entry: -entry.state.mtime_ns,
    "kind": lambda entry: (entry.what, entry.architecture or "", entry.path.name.casefold()),
}


def list_library(words: Sequence[str] = (), *, kind: str | None = None, sort: Order = "name") -> list[LibraryEntry]:
    """The entries in which every word is found: in the path, kind, architecture or title, in any case.

    `kind` is one of inspect's, or "unreadable". The largest and the newest come first.
    """
    wanted = [word.casefold() for word in words]
    with Library() as library:
        every = library.entries()
    found = [entry for entry in every if kind in (None, entry.what) and _has(entry, wanted)]
    return sorted(found, key=_KEYS[sort])


def _has(entry: LibraryEntry, words: Sequence[str]) -> bool:
    text = "\n".join((str(entry.path), entry.what, entry.architecture or "", entry.title or "", entry.trained_as or ""))
    return all(word in text.casefold() for word in words)


def look_up(path: str | Path) -> LibraryEntry:
    """What is known of a file: out of the index if it is as it was scanned, else read from its header now.

    Raises an InputError if it cannot be read.
    """
    path = Path(path)
    if library_file().exists():
        with Library() as library:
            entry = library.entry(whole_path(path))
        if entry is not None and not entry.error and entry.is_current():
            return entry
    return entry_of(open_header(path))
