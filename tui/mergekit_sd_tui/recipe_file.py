"""A recipe's file: written whole or not at all, and never over what another program wrote meanwhile.

Owns the writing. Reading, and what is refused there, is the engine's.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import TypeAlias

import mergekit_sd as mk
from mergekit_sd.errors import EnvironmentFault, MergekitError, NotWritable

Stamp: TypeAlias = tuple[int, int, int]


class ChangedOutside(EnvironmentFault):
    """The file no longer holds what was read from it; `found` is what it holds, None where that cannot be read."""

    def __init__(self, path: Path, found: str | None) -> None:
        super().__init__("The file was changed by another program.", file=path)
        self.found = found


def stamp_of(path: Path) -> Stamp | None:
    """What tells that a file was written; None where there is none."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def write_recipe(path: Path, text: str, expected: str | None) -> None:
    """Write the text under its name at once, if the file holds what is `expected` or is not there.

    `expected` None: whatever it holds. Raises ChangedOutside or NotWritable; then the file is as it was.
    """
    path = path.resolve()  # a link stays one
    if expected is not None and path.exists():
        found = _read(path)
        if found != expected:
            raise ChangedOutside(path, found)
    try:
        _write(path, text.encode("utf-8", "surrogatepass"))
    except OSError as error:
        raise NotWritable(f"The recipe cannot be written: {error.strerror}.", file=path) from error


def _read(path: Path) -> str | None:
    try:
        return mk.read_recipe_text(path)
    except MergekitError:
        return None


def _write(path: Path, content: bytes) -> None:
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    fresh = Path(name)
    try:
        with open(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        fresh.chmod(path.stat().st_mode & 0o7777 if path.exists() else 0o666 & ~_umask())
        fresh.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
