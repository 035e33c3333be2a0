"""Small outputs that are written in one piece, after their tensors have been computed.

Owns the sink that holds them. Must not know how the file is put together (`formats.torch_files`).
"""

from __future__ import annotations

from mergekit_sd.formats.reading import InputFile
from mergekit_sd.formats.torch_files import torch_file
from mergekit_sd.planning.values import PlannedOutput


class Held:
    """A sink that keeps an output in memory."""

    def __init__(self, length: int) -> None:
        self._data = memoryview(bytearray(length))

    def write(self, buffer: memoryview, offset: int) -> None:
        """Keep all of `buffer` at `offset`; from any thread."""
        self._data[offset : offset + len(buffer)] = buffer

    def copy(self, source: InputFile, source_offset: int, offset: int, length: int) -> None:
        """Keep bytes of an input."""
        source.read_into(self._data[offset : offset + length], source_offset)

    def packed(self, output: PlannedOutput) -> bytes:
        """The output's file: what is held, as PyTorch saves it."""
        infos = [tensor.info for tensor in output.tensors]
        return torch_file({i: self._data[i.offset : i.offset + i.nbytes] for i in infos}, output.settings)
