"""Positional reads of input files, and the positional descriptor that reading and writing share.

Owns every call that reads a tensor's bytes. Must not know what the bytes mean.

Where a platform lacks a call (`preadv`, `pwrite`), plain seeks under a lock do the same.
"""

from __future__ import annotations

import bisect
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from mergekit_sd.errors import InputChanged, UnreadableInput
from mergekit_sd.formats.tensor import FilePart, FileState, ModelFile, View
from mergekit_sd.formats.views import Views

_READ_FLAGS = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


class Positional:
    """Reads and writes at offsets on one descriptor, from several threads."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._seek_lock = threading.Lock()

    def read(self, buffer: memoryview, offset: int) -> int:
        """Read into `buffer`; returns how many bytes came (0 at the end). Raises OSError."""
        if hasattr(os, "preadv"):
            return os.preadv(self.descriptor, [buffer], offset)
        with self._seek_lock:
            os.lseek(self.descriptor, offset, os.SEEK_SET)
            piece = os.read(self.descriptor, len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)

    def write(self, buffer: memoryview, offset: int) -> int:
        """Write from `buffer`; returns how many bytes went. Raises OSError."""
        if hasattr(os, "pwrite"):
            return os.pwrite(self.descriptor, buffer, offset)
        with self._seek_lock:
            os.lseek(self.descriptor, offset, os.SEEK_SET)
            return os.write(self.descriptor, buffer)


def file_state(status: os.stat_result) -> FileState:
    """What of a `stat` tells whether a file is still the one that was opened.

    Windows gives a path and a descriptor of one file different numbers in some versions of Python.
    """
    device, inode = (0, 0) if os.name == "nt" else (status.st_dev, status.st_ino)
    return FileState(device, inode, status.st_size, status.st_mtime_ns)


class InputFile:
    """An input that is read by position. Short reads and errors name the file.

    A model in several files is read as if these lay one behind the other. Offsets beyond the end are
    those of its `views`.
    """

    def __init__(
        self, path: Path, state: FileState, views: Sequence[View] = (), parts: Sequence[FilePart] = ()
    ) -> None:
        self.path = path
        self.state = state
        self._views = Views(views, path) if views else None
        self._files: list[_OpenFile] = []
        try:
            for part in parts or (FilePart(path, state, 0),):
                self._files.append(_OpenFile(part))
        except BaseException:
            self.close()
            raise
        self._starts = [file.part.start for file in self._files]

    @classmethod
    def of(cls, model: ModelFile) -> InputFile:
        """The file of a model, to read its tensors. Raises InputChanged if it is not as it was opened."""
        return cls(model.path, model.state, model.views, model.parts)

    def in_file(self, offset: int) -> tuple[int, int] | None:
        """For kernel copies: the open descriptor and the place in it of what lies at `offset`; None for a view."""
        if offset >= self.state.size:
            return None
        file = self._file_at(offset)
        return file.descriptor, offset - file.part.start

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with the bytes at `offset`, all of one file. Raises InputChanged if it ends before."""
        if not len(buffer):
            return  # an empty tensor may lie at the end, where a view begins
        if self._views and offset >= self.state.size:
            self._views.read_into(buffer, offset, self.read_into)
            return
        file = self._file_at(offset)
        file.read_into(buffer, offset - file.part.start)

    def _file_at(self, offset: int) -> _OpenFile:
        return self._files[bisect.bisect_right(self._starts, offset) - 1]

    def check_unchanged(self) -> None:
        """Raises InputChanged if a path no longer leads to the file that was opened, as it was."""
        for file in self._files:
            file.check_unchanged()

    def close(self) -> None:
        """Close the descriptors."""
        for file in self._files:
            file.close()


class _OpenFile:
    """One file of an input."""

    def __init__(self, part: FilePart) -> None:
        self.part = part
        try:
            self._file = Positional(os.open(part.path, _READ_FLAGS))
        except OSError as error:
            raise UnreadableInput(f"Cannot open it: {error.strerror}.", file=part.path) from error
        if file_state(os.fstat(self._file.descriptor)) != part.state:
            self.close()
            raise self._changed()

    @property
    def descriptor(self) -> int:
        return self._file.descriptor

    def read_into(self, buffer: memoryview, offset: int) -> None:
        done = 0
        while done < len(buffer):
            try:
                count = self._file.read(buffer[done:], offset + done)
            except OSError as error:
                raise UnreadableInput(f"Reading it failed: {error.strerror}.", file=self.part.path) from error
            if count == 0:
                raise self._changed()
            done += count

    def check_unchanged(self) -> None:
        try:
            now = file_state(self.part.path.stat())
        except OSError:
            raise self._changed() from None
        if now != self.part.state:
            raise self._changed()

    def _changed(self) -> InputChanged:
        return InputChanged(
            "This input was replaced, truncated or written to during the run.",
            file=self.part.path,
            hint="let the other program finish, then run again",
        )

    def close(self) -> None:
        """Its number may be another file's a moment later, so only once."""
        descriptor, self._file.descriptor = self._file.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
