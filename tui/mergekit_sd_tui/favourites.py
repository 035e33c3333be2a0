"""The favourites among pictures of samples, by folder and file name, in `favourites.json` beside `tui.toml`.

Owns that file: it is there whole or not at all. It is not in the folder of samples, which is made anew when they
are drawn again; the picture of the same model and seed is a favourite then, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from mergekit_sd_tui.settings import settings_file

NAME = "favourites.json"


def favourites_file() -> Path:
    """Where they are kept."""
    return settings_file().with_name(NAME)


def load_favourites(folder: Path) -> frozenset[str]:
    """The names of a folder's files; none where no file of ours is there."""
    return frozenset(_all().get(str(folder.absolute()), ()))


def save_favourites(folder: Path, names: Iterable[str]) -> None:
    """Keep these names of a folder. Raises OSError where that cannot be."""
    every = {**_all(), str(folder.absolute()): sorted(names)}
    path = favourites_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    kept = {each: found for each, found in every.items() if found}
    fresh.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    fresh.replace(path)


def _all() -> dict[str, list[str]]:
    try:
        every = json.loads(favourites_file().read_text(encoding="utf-8"))
        return {folder: [name for name in names if isinstance(name, str)] for folder, names in every.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}
