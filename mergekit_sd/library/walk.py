"""The model files below some folders.

Owns the way through the folders: each once, whatever links lead to it. Must not open files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from mergekit_sd.formats.diffusers.folder import MODEL_INDEX
from mergekit_sd.formats.open import MODEL_SUFFIXES


class Walk:
    """Goes through folders and all below them; hidden ones are left out, unless they were named.

    So are the folders of a model that diffusers saved as one: they hold its parts.

    `on_folder` is called before each. `unreadable` lists those that could not be looked into, with the
    reason, as they are come across.
    """

    def __init__(self, folders: Iterable[Path], on_folder: Callable[[], None]) -> None:
        self._folders = list(folders)
        self._on_folder = on_folder
        self.unreadable: dict[Path, str] = {}

    def __iter__(self) -> Iterator[Path]:
        """Every path with a model's suffix that is no folder, folder by folder, each in the order of names."""
        seen: set[object] = set()
        waiting = self._folders[::-1]
        links: list[Path] = []  # last: what a link leads to had better be found under its own name
        while waiting or links:
            self._on_folder()
            folder = waiting.pop() if waiting else links.pop(0)
            try:
                identity = _identity(folder)
                if identity in seen:
                    continue
                seen.add(identity)
                with os.scandir(folder) as listing:
                    entries = sorted(listing, key=lambda entry: entry.name)
            except OSError as error:
                self.unreadable[folder] = error.strerror or str(error)
                continue
            below = [entry for entry in entries if not entry.name.startswith(".")]
            if any(entry.name == MODEL_INDEX for entry in below):  # the folders in it are the parts of one model
                below = [entry for entry in below if not _is_folder(entry)]
            waiting += [Path(entry.path) for entry in reversed(below) if entry.is_dir(follow_symlinks=False)]
            links += [Path(entry.path) for entry in below if entry.is_symlink() and _is_folder(entry)]
            yield from (Path(entry.path) for entry in below if _is_model(entry))

    def hides(self, path: Path) -> bool:
        """Whether a path may be there all the same: it lies below a folder that could not be looked into."""
        return any(folder in path.parents for folder in self.unreadable)


def _identity(folder: Path) -> object:
    status = folder.stat()
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(folder)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of links
        return False


def _is_model(entry: os.DirEntry[str]) -> bool:
    return Path(entry.name).suffix.lower() in MODEL_SUFFIXES and not _is_folder(entry)
