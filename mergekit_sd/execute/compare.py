"""A sink that writes nothing: it compares what a run would write with a file that is there."""

from __future__ import annotations

import bisect
import threading
from collections.abc import Sequence

from mergekit_sd.formats.reading import InputFile
from mergekit_sd.formats.tensor import TensorInfo

HEADER = "(header)"


class Comparison:
    """Collects the names of the tensors whose bytes differ; from any thread."""

    def __init__(self, there: InputFile, tensors: Sequence[TensorInfo]) -> None:
        self._there = there
        self._lock = threading.Lock()
        self._tensors = sorted(tensors, key=lambda tensor: tensor.offset)
        self._offsets = [tensor.offset for tensor in self._tensors]
        self.different: set[str] = set()

    def write(self, buffer: memoryview, offset: int) -> None:
        """Compare bytes that belong at `offset`."""
        found = memoryview(bytearray(len(buffer)))
        self._there.read_into(found, offset)
        if found != buffer:
            index = bisect.bisect_right(self._offsets, offset) - 1
            with self._lock:
                self.different.add(self._tensors[index].name if index >= 0 else HEADER)

    def copy(self, source: InputFile, source_offset: int, offset: int, length: int) -> None:
        """Compare bytes of an input."""
        data = memoryview(bytearray(length))
        source.read_into(data, source_offset)
        self.write(data, offset)
