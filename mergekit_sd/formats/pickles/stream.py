"""The bytes of a pickle, taken in order; nothing is allocated for a length that the file does not have."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from mergekit_sd.errors import MalformedFile
from mergekit_sd.formats.reading import InputFile

PIECE = 1 << 20  # bytes that are read ahead: an object's pickle of the old format ends nowhere in particular
MAX_LINE = 1 << 20  # bytes of a text argument of the oldest protocols
MAX_PICKLE = 128 << 20  # bytes of pickles without their tensors; a training checkpoint has a few million

DAMAGED = "the file is damaged or made to deceive: download it again, or get the model as .safetensors"


class Stream:
    """A position in bytes that are there already, or in a file that is read as far as needed."""

    def __init__(self, path: Path, data: bytes = b"", file: InputFile | None = None) -> None:
        self.path = path
        self._file = file
        self._end = len(data) if file is None else min(file.state.size, MAX_PICKLE)
        self._buffer = data
        self._begin = 0  # the position of the buffer's first byte
        self._at = 0

    @property
    def position(self) -> int:
        """How many bytes have been taken."""
        return self._begin + self._at

    @property
    def left(self) -> int:
        """How many bytes can be taken."""
        return self._end - self.position

    def take(self, count: int) -> bytes:
        """The next `count` bytes. Raises MalformedFile if there are fewer."""
        stop = self._at + count
        if stop > len(self._buffer):
            self._fill(count)
            stop = count
        piece = self._buffer[self._at : stop]
        self._at = stop
        return piece

    def unsigned(self, width: int) -> int:
        """The next whole number of that many bytes."""
        return int.from_bytes(self.take(width), "little")

    def counted(self, width: int) -> bytes:
        """Bytes with their count before them, itself of `width` bytes."""
        return self.take(self.unsigned(width))

    def line(self) -> bytes:
        """The bytes up to the next line feed, which is taken, too."""
        end = self._buffer.find(b"\n", self._at, self._at + MAX_LINE)
        if end < 0:
            self._fill(min(MAX_LINE, self.left))
            end = self._buffer.find(b"\n", 0, MAX_LINE)
        if end < 0:
            self.refuse("A line in the pickle does not end.")
        line = self._buffer[self._at : end]
        self._at = end + 1
        return line

    def refuse(self, message: str) -> NoReturn:
        """Raises MalformedFile."""
        raise MalformedFile(message, file=self.path, hint=DAMAGED)

    def _fill(self, count: int) -> None:
        """Have `count` bytes from the position on at the buffer's beginning."""
        if count > self.left:
            end = "cut short" if self._end < MAX_PICKLE else f"longer than {MAX_PICKLE:,} bytes, or cut short"
            self.refuse(f"The pickle is {end}: at its byte {self.position:,} {count:,} more are needed.")
        if self._file is None:
            self._buffer, self._begin, self._at = self._buffer[self._at :], self.position, 0
            return
        data = bytearray(min(max(count, PIECE), self.left))
        self._file.read_into(memoryview(data), self.position)
        self._buffer, self._begin, self._at = bytes(data), self.position, 0
