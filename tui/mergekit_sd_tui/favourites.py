"""The favourites among a folder's pictures, in `favourites.json` beside its report.

Owns that file: it is there whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

NAME = "favourites.json"


def load_favourites(folder: Path) -> frozenset[str]:
    """The names of the files; none where no file of ours is there."""
    try:
        names = json.loads((folder / NAME).read_text(encoding="utf-8"))["favourites"]
        return frozenset(name for name in names if isinstance(name, str))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return frozenset()


def save_favourites(folder: Path, names: Iterable[str]) -> None:
    """Keep these names. Raises OSError where that cannot be."""
    path = folder / NAME
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps({"favourites": sorted(names)}, indent=2) + "\n", encoding="utf-8")
    fresh.replace(path)
