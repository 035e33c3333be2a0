"""The files that everyone has, by the hashes that their publishers name. The list is data."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

from mergekit_sd.library.entry import LibraryEntry
from mergekit_sd.library.folders import DATA


class Published(NamedTuple):
    """A published file: the name people know it by, and what it is."""

    name: str
    kind: str


@cache
def published() -> dict[str, Published]:
    """Every published file by its sha256."""
    entries = tomllib.loads((DATA / "published.toml").read_text(encoding="utf-8"))["file"]
    return {sha256: Published(entry["name"], entry["kind"]) for entry in entries for sha256 in entry["sha256"]}


def published_name(entries: Iterable[LibraryEntry], kind: str | None = None) -> str | None:
    """The name of equal files, if the sha256 of one is known; `kind` leaves out what is published as another."""
    for entry in entries:
        known = published().get(entry.hashes.get("sha256", ""))
        if known is not None and kind in (None, known.kind):
            return known.name
    return None
