"""The files that belong to a model: its config, previews, notes; and renaming it with all of them.

Owns which names go together. Must not know what is in these files.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable
from pathlib import Path

from mergekit_sd.errors import MergekitError, MissingInput, NotWritable, OutputExists, UsageError
from mergekit_sd.formats.open import MODEL_SUFFIXES
from mergekit_sd.library.entry import whole_path
from mergekit_sd.library.index import Library
from mergekit_sd.library.store import library_file
from mergekit_sd.text import listed, shown

# What WebUIs, ComfyUI and download managers put beside `name.safetensors`, after `name`.
SIDECARS = (
    ".yaml",
    ".yml",
    ".vae.pt",
    ".vae.ckpt",
    ".vae.safetensors",
    ".preview.png",
    ".preview.jpg",
    ".preview.jpeg",
    ".preview.webp",
    ".png",
    ".jpg",
    ".jpeg",
    ".webp",
    ".gif",
    ".civitai.info",
    ".cm-info.json",
    ".metadata.json",
    ".json",
    ".description.txt",
    ".txt",
)
_NOT_ON_WINDOWS = '<>:"|?*'


def sidecars(path: str | Path) -> list[Path]:
    """The files beside a model that belong to it, in the order of their names."""
    path = Path(path)
    stem = _stem(path.name)
    return [each for each in _beside(path) if each.name.startswith(stem) and each.name[len(stem) :].lower() in SIDECARS]


def rename_model(path: str | Path, name: str) -> list[tuple[Path, Path]]:
    """Give a model and its sidecars another name, all or none; never over a file. Returns old and new paths.

    `name` may lack the model's suffix, and may not change it. Raises OutputExists where a name is taken,
    UsageError for a name that cannot be, NotWritable where the system refuses: then all have their old names.
    """
    path = Path(path)
    if not os.path.lexists(path):
        raise MissingInput("There is no such file.", file=path, hint="check the path")
    stem = _new_stem(path, name)
    old_stem = _stem(path.name)
    beside = sidecars(path)
    _check_siblings(path, beside)
    moves = [(each, each.with_name(stem + each.name[len(old_stem) :])) for each in (path, *beside)]
    moves = [(old, new) for old, new in moves if old != new]
    taken = [new.name for old, new in moves if os.path.lexists(new) and not _is_one(old, new)]
    if taken:
        hint = "take another name, or move these files"
        raise OutputExists(f"There are such files already: {listed(taken)}.", file=path, hint=hint)
    _move_all(moves)
    _tell_index(moves)
    return moves


def _stem(name: str) -> str:
    suffix = Path(name).suffix
    return name[: -len(suffix)] if suffix.lower() in MODEL_SUFFIXES else name


def _beside(path: Path) -> list[Path]:
    """The other files of a model's folder."""
    try:
        return sorted(each for each in path.parent.iterdir() if each.name != path.name and not each.is_dir())
    except OSError:
        return []


def _new_stem(path: Path, name: str) -> str:
    suffix = Path(name).suffix
    if suffix.lower() in MODEL_SUFFIXES and suffix.lower() != path.suffix.lower():
        raise UsageError(f"A {path.suffix} file stays one.", file=path, hint=f"leave {suffix} out: it is added")
    stem = _stem(name)
    bad = "/\\" + (_NOT_ON_WINDOWS if os.name == "nt" else "")
    if not stem.strip() or stem.startswith(".") or not stem.isprintable() or any(sign in stem for sign in bad):
        hint = "take a plain name, without a folder"
        raise UsageError(f'"{shown(name)}" cannot name a model.', file=path, hint=hint)
    return stem


def _check_siblings(path: Path, beside: Iterable[Path]) -> None:
    """Refuse where a second model has the same name: whose are the sidecars?"""
    stem = _stem(path.name)
    others = [each.name for each in _beside(path) if each.name != stem and _stem(each.name) == stem]
    if others and any(beside):
        message = f"{listed(others)} has the same name, and the same files beside it."
        raise UsageError(message, file=path, hint="move one of the models to another folder, or rename by hand")


def _move_all(moves: Iterable[tuple[Path, Path]]) -> None:
    done: list[tuple[Path, Path]] = []
    try:
        for old, new in moves:
            _move(old, new)
            done.append((old, new))
    except OSError as error:
        stuck = _undo(done)
        details = [f"{new.name} is still to be called {old.name}" for old, new in stuck]
        what = "Some files have new names" if stuck else "All files have their old names"
        message = f"{shown(old.name)} cannot be renamed: {error.strerror or error}. {what}."
        kind = OutputExists if isinstance(error, FileExistsError) else NotWritable
        hint = "close the programs that use it, and check the folder's permissions"
        raise kind(message, file=old, details=details, hint=hint) from error


def _undo(done: Iterable[tuple[Path, Path]]) -> list[tuple[Path, Path]]:
    stuck = []
    for old, new in reversed(list(done)):
        try:
            _move(new, old)
        except OSError:
            stuck.append((old, new))
    return stuck


def _move(old: Path, new: Path) -> None:
    """Rename, but never over a file that came in between."""
    if os.name == "nt" or _is_one(old, new):
        old.rename(new)
        return
    try:
        os.link(old, new, follow_symlinks=False)
    except FileExistsError:
        raise
    except (OSError, NotImplementedError):  # a file system without hard links
        if os.path.lexists(new):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
        old.rename(new)
        return
    try:
        old.unlink()
    except OSError:
        new.unlink()
        raise


def _is_one(old: Path, new: Path) -> bool:
    """Whether only the case changes, and no other file has the new name: on some systems both are one name."""
    return old.name.casefold() == new.name.casefold() and new not in list(old.parent.iterdir())


def _tell_index(moves: Iterable[tuple[Path, Path]]) -> None:
    """So that hashes go along. A scan would find out, too: no reason to fail."""
    if library_file().exists():
        with contextlib.suppress(MergekitError), Library() as library:
            for old, new in moves:
                library.move(whole_path(old), whole_path(new))
