"""A planned output's tensors in memory instead of a file: what the file would hold, to the bit, in a dtype of choice.

Owns the memory that they lie in and the count of NaN and Inf. Must not know what becomes of them.
"""

from __future__ import annotations

import bisect
import threading
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

from mergekit_sd.events import CancelToken, Listener, ignore
from mergekit_sd.execute.run import RunOptions, compute
from mergekit_sd.formats.dtypes import Dtype
from mergekit_sd.formats.reading import InputFile
from mergekit_sd.formats.tensor import TensorInfo
from mergekit_sd.lazy import torch
from mergekit_sd.operations.types import Tensor
from mergekit_sd.planning.values import Plan, PlannedOutput

ALIGNED = 64  # bytes: what vector units load at once
PIECE = 1 << 20  # bytes of an input that are read at once where they change their dtype


@dataclass(frozen=True, slots=True)
class InMemory:
    """An output's tensors by name, all views of one buffer, and how many elements of which are NaN or Inf."""

    tensors: Mapping[str, Tensor]
    nonfinite: Mapping[str, int]


def compute_in_memory(
    plan: Plan,
    output: PlannedOutput,
    dtype: Dtype,
    *,
    threads: int | None = None,
    on_event: Listener = ignore,
    cancel: CancelToken | None = None,
) -> InMemory:
    """Compute an output's tensors, rounded as its file's would be, then cast to `dtype` (but for integers).

    The memory taken is that of the result and the threads' buffers. NaN, Inf and overflow are counted,
    not refused. Tells its progress under the output's name. Raises Cancelled, and what reading raises.
    """
    placed, end = [], 0
    for tensor in output.tensors:
        placed.append(replace(tensor, info=replace(tensor.info, offset=end)))
        end += tensor.info.nbytes
    sink = _MemorySink([tensor.info for tensor in placed], dtype)
    compute(plan, replace(output, tensors=tuple(placed)), sink, RunOptions(threads=threads), on_event, cancel)
    return InMemory(sink.tensors, dict(sorted(sink.nonfinite.items())))


class _MemorySink:
    """Takes an output's bytes by their place in the file and puts them, cast, into memory."""

    def __init__(self, infos: list[TensorInfo], dtype: Dtype) -> None:
        self._infos = [info for info in infos if info.nbytes]  # an empty one shares its place with the next
        self._starts = [info.offset for info in self._infos]
        self._lock = threading.Lock()
        self.nonfinite: dict[str, int] = defaultdict(int)
        wanted = {info.name: dtype if info.dtype.is_float else info.dtype for info in infos}
        places, end = {}, 0
        for info in infos:
            places[info.name] = end
            end += -(-info.numel * wanted[info.name].itemsize // ALIGNED) * ALIGNED
        memory = torch.empty(end, dtype=torch.uint8)
        self._flat = {
            info.name: memory[places[info.name] :][: info.numel * wanted[info.name].itemsize].view(
                getattr(torch, wanted[info.name].torch_name)
            )
            for info in infos
        }
        self.tensors = {info.name: self._flat[info.name].view(info.shape) for info in infos}

    def write(self, buffer: memoryview, offset: int) -> None:
        """See Sink: part of one tensor, whole elements."""
        info, part = self._part(offset, len(buffer))
        writable = bytearray(buffer) if buffer.readonly else buffer  # torch warns of what it could change
        part.copy_(torch.frombuffer(writable, dtype=getattr(torch, info.dtype.torch_name)))
        self._count(info, part)

    def copy(self, source: InputFile, source_offset: int, offset: int, length: int) -> None:
        """See Sink. Read right into its place where the dtype stays, else piece by piece."""
        info, part = self._part(offset, length)
        if part.dtype == getattr(torch, info.dtype.torch_name):
            source.read_into(part.view(torch.uint8).numpy().data, source_offset)
            self._count(info, part)
            return
        piece = bytearray(min(PIECE, length))
        for start in range(0, length, PIECE):
            data = memoryview(piece)[: min(PIECE, length - start)]
            source.read_into(data, source_offset + start)
            self.write(data, offset + start)

    def _part(self, offset: int, length: int) -> tuple[TensorInfo, Tensor]:
        """The tensor that bytes of the file belong to, and its elements that they are."""
        info = self._infos[bisect.bisect_right(self._starts, offset) - 1]
        first, elements = (offset - info.offset) // info.dtype.itemsize, length // info.dtype.itemsize
        return info, self._flat[info.name][first : first + elements]

    def _count(self, info: TensorInfo, part: Tensor) -> None:
        if not info.dtype.is_float or bool(torch.isfinite(part.sum(dtype=torch.float32))):
            return
        bad = int((~torch.isfinite(part)).sum())
        if bad:
            with self._lock:
                self.nonfinite[info.name] += bad
