"""Tensors whose bytes do not lie in their file as they are, but are made from it when they are read.

Owns how they are made, and how long they are kept. A view has an offset beyond the end of its file,
so that whoever reads by offset need not know it from a stretch of the file.
"""

from __future__ import annotations

import bisect
import threading
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mergekit_sd.errors import MalformedFile
from mergekit_sd.formats.tensor import ReadInto, View

KEPT = 128 << 20  # bytes of views that a file keeps; always the last one, whatever its size
PIECE = 1 << 20  # bytes that are inflated at once

_DAMAGED = "the file is damaged: download or copy it again"


@dataclass(frozen=True, slots=True)
class Inflated:
    """A compressed stretch of a file: `packed` bytes from `source` on; `crc` is that of what comes out."""

    start: int
    nbytes: int
    source: int
    packed: int
    crc: int

    def make(self, read: ReadInto) -> memoryview:
        """The bytes in full; never more than they are said to be."""
        made = bytearray(self.nbytes)
        machine, done = zlib.decompressobj(-zlib.MAX_WBITS), 0
        for at in range(0, self.packed, PIECE):
            piece = bytearray(min(PIECE, self.packed - at))
            read(memoryview(piece), self.source + at)
            data: bytes | bytearray = piece
            more = True
            while more and not machine.eof:
                most = max(1, min(PIECE, self.nbytes - done))
                out = machine.decompress(data, most)
                if len(out) > self.nbytes - done:
                    raise zlib.error("more data than announced")
                made[done : done + len(out)] = out
                done, data = done + len(out), machine.unconsumed_tail
                more = len(out) == most  # else, all of the piece is used up
        if not machine.eof or done != self.nbytes or zlib.crc32(made) != self.crc:
            raise zlib.error("other data than announced")
        return memoryview(made)


@dataclass(frozen=True, slots=True)
class Strided:
    """A tensor that is transposed, sliced or repeated: `span` bytes from `source` on, gathered by strides.

    `shape` and `strides` count elements; no stride is negative.
    """

    start: int
    nbytes: int
    source: int
    span: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int

    def make(self, read: ReadInto) -> memoryview:
        """Its elements in order."""
        import numpy as np

        raw = bytearray(self.span)
        read(memoryview(raw), self.source)
        flat = np.frombuffer(raw, f"u{self.itemsize}")
        strides = [stride * self.itemsize for stride in self.strides]
        gathered = np.lib.stride_tricks.as_strided(flat, self.shape, strides, writeable=False)
        return np.ascontiguousarray(gathered).reshape(-1).view(np.uint8).data


@dataclass(frozen=True, slots=True)
class Joined:
    """A tensor that lies in several stretches: `pieces` are their offsets and sizes, in order."""

    start: int
    nbytes: int
    pieces: tuple[tuple[int, int], ...]

    def make(self, read: ReadInto) -> memoryview:
        """The stretches behind each other."""
        made = memoryview(bytearray(self.nbytes))
        done = 0
        for offset, nbytes in self.pieces:
            read(made[done : done + nbytes], offset)
            done += nbytes
        return made


@dataclass(frozen=True, slots=True)
class Shift:
    """Where a file lies in a model of several: it begins at `file_start` there, its views at `views_start`.

    `size` is the file's; offsets beyond it are those of its views.
    """

    size: int
    file_start: int
    views_start: int

    def __call__(self, offset: int) -> int:
        """The model's offset for one of the file."""
        return offset + self.file_start if offset < self.size else offset - self.size + self.views_start


@dataclass(frozen=True, slots=True)
class Shifted:
    """A view of a file that has become part of a model."""

    view: View
    shift: Shift

    @property
    def start(self) -> int:
        """Where it begins in the model."""
        return self.shift(self.view.start)

    @property
    def nbytes(self) -> int:
        """As many as the view's."""
        return self.view.nbytes

    def make(self, read: ReadInto) -> memoryview:
        """What the view makes of its file."""
        return self.view.make(lambda buffer, offset: read(buffer, self.shift(offset)))


class Views:
    """The views of one open file; from any thread."""

    def __init__(self, views: Sequence[View], path: Path) -> None:
        self._views = sorted(views, key=lambda view: view.start)
        self._starts = [view.start for view in self._views]
        self._path = path
        self._lock = threading.RLock()  # a view may be of another view
        self._made: OrderedDict[int, memoryview] = OrderedDict()

    def read_into(self, buffer: memoryview, offset: int, read: ReadInto) -> None:
        """Fill `buffer` from the view that `offset` lies in; `read` reads the file, and its views."""
        index = bisect.bisect_right(self._starts, offset) - 1
        begin = offset - self._starts[index]
        buffer[:] = self._bytes(index, read)[begin : begin + len(buffer)]

    def _bytes(self, index: int, read: ReadInto) -> memoryview:
        with self._lock:
            found = self._made.pop(index, None)
            if found is None:
                try:
                    found = self._views[index].make(read)
                except zlib.error as error:
                    message = f"A compressed tensor in it is damaged ({error})."
                    raise MalformedFile(message, file=self._path, hint=_DAMAGED) from error
            self._made[index] = found  # the last one used lies last
            while len(self._made) > 1 and sum(len(each) for each in self._made.values()) > KEPT:
                self._made.popitem(last=False)
            return found
