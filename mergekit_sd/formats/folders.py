"""Output folders that appear whole or not at all, as `writing` does it for files.

Owns the temporary folder beside the target, its lock, and the rename. Must not know what is written into it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from mergekit_sd.errors import NotWritable, OutputExists, UsageError
from mergekit_sd.formats import claims
from mergekit_sd.formats.claims import claim, sweep, temporary_name
from mergekit_sd.formats.writing import check_folder, sync_folder

MARKS = ("model_index.json", "config.json")  # of a model; only a folder that has one of them is ever replaced


class OutputFolder:
    """A target folder in the making: fill `place`, then `commit()`; leaving it without removes everything.

    A lock beside the target keeps a second writer out, and tells a live run's folder from a killed run's,
    which the next run of the same target removes.
    """

    def __init__(self, target: Path, *, force: bool, marks: Sequence[str] = MARKS) -> None:
        check_new_folder(target, force=force, marks=marks)
        self.target = Path(os.path.realpath(target))  # a symlinked target is followed
        parent, name = self.target.parent, self.target.name
        self.place, self._aside = (parent / f".{name}.mergekit-sd.{what}" for what in ("new", "old"))
        sweep(parent)
        self._lock = parent / temporary_name(name)
        self._descriptor = claim(self._lock, self.target)
        try:
            self._clean()
            check_new_folder(target, force=force, marks=marks)  # a killed run's may have been put back
            self.place.mkdir()
        except BaseException as error:
            self._end()
            if isinstance(error, OSError):
                raise self._fault(error) from error
            raise

    def write(self, name: str, content: str | bytes) -> None:
        """A small file, at a path within the folder; brought onto the disk at once."""
        path = self.place / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._fault(error) from error

    def commit(self) -> None:
        """Make the folder appear under the target's name; one that was there is put aside, and then removed."""
        try:
            for folder in (self.place, *(path for path in self.place.rglob("*") if path.is_dir())):
                sync_folder(folder)
            if self.target.exists():
                self.target.rename(self._aside)
            self.place.rename(self.target)
            sync_folder(self.target.parent)
        except OSError as error:
            raise self._fault(error) from error

    def _clean(self) -> None:
        """Remove what is not, or no more, the target; put back what was put aside for nothing."""
        if self._aside.exists() and not self.target.exists():
            self._aside.rename(self.target)
        for folder in (self.place, self._aside):
            if folder.exists():
                shutil.rmtree(folder)

    def _end(self) -> None:
        with contextlib.suppress(OSError):
            self._clean()  # else, the next run does
        if claims.WINDOWS:
            os.close(self._descriptor)  # Windows removes only closed files
        with contextlib.suppress(OSError):
            self._lock.unlink()
        if not claims.WINDOWS:
            os.close(self._descriptor)

    def _fault(self, error: OSError) -> NotWritable:
        return NotWritable(f"Writing failed: {error.strerror or error}.", file=self.target, hint="check the disk")

    def __enter__(self) -> OutputFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end()


def check_new_folder(target: Path, *, force: bool, marks: Sequence[str] = MARKS) -> None:
    """Before any work: the target can be made, and what it would replace has one of `marks`, and is meant."""
    real = Path(os.path.realpath(target))
    check_folder(real.parent, 0)
    if not os.path.lexists(real):
        return
    if not real.is_dir():
        raise UsageError(
            "The output is a folder of several files, and this is a file.", file=target, hint="name a new folder"
        )
    if not force:
        raise OutputExists("The output exists already.", file=target, hint="give --force to replace it")
    if any(real.iterdir()) and not any((real / mark).is_file() for mark in marks):
        hint = f"name a new folder, or one that holds {' or '.join(marks)}"
        raise UsageError("This folder holds something else, so it is not replaced.", file=target, hint=hint)
