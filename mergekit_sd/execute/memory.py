"""Where a worker keeps numbers: the host's memory, or an accelerator's with pinned buffers between.

Owns how bytes of a file become float32 where they are computed on, and results become bytes
again. Must not know tensors' names, programs or hashes.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from mergekit_sd.errors import EnvironmentFault
from mergekit_sd.execute.tasks import CHUNK
from mergekit_sd.formats.dtypes import F32, Dtype
from mergekit_sd.lazy import torch
from mergekit_sd.operations.types import Tensor

# Pieces of up to 8 bytes an element on their way to the accelerator: one is read while others travel.
IN_FLIGHT = 4
# Bytes from which a buffer is asked of the system itself: it takes memory only where it is used, and gives it back.
LARGE = 1 << 20
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}


class Floats(Protocol):
    """A buffer of float32 numbers, where they are computed on."""

    def part(self, start: int, length: int) -> Tensor:
        """A flat view of some of them."""


class Memory(Protocol):
    """One worker's memory. Not shared between threads."""

    def floats(self, length: int) -> Floats:
        """A new buffer."""

    def load(self, read: Callable[[memoryview], None], dtype: Dtype, length: int, into: Floats, at: int) -> None:
        """`length` numbers of a dtype, whose bytes `read` puts into memory, as float32 to element `at` of a buffer."""

    def rounded(self, values: Tensor, dtype: Dtype) -> memoryview:
        """At most CHUNK numbers as bytes of a dtype; good until the next call."""

    def at_work(self) -> contextlib.AbstractContextManager[Any]:
        """Around all that a thread computes."""


class Buffer:
    """Host memory that files read into and torch computes on."""

    def __init__(self, nbytes: int) -> None:
        self.bytes = memoryview(mmap.mmap(-1, nbytes, **_PRIVATE) if nbytes >= LARGE else bytearray(max(nbytes, 8)))
        self._chunks: dict[str, Tensor] = {}

    def elements(self, dtype: Dtype, length: int, start: int = 0) -> Tensor:
        """Elements `start` on of the buffer as a flat tensor of a dtype. Whole chunks' views are kept."""
        if start == 0 and length == CHUNK and dtype.name in self._chunks:
            return self._chunks[dtype.name]
        usable = len(self.bytes) // dtype.itemsize * dtype.itemsize
        everything = torch.frombuffer(self.bytes[:usable], dtype=getattr(torch, dtype.torch_name))
        view = everything[start : start + length]
        if start == 0 and length == CHUNK:
            self._chunks[dtype.name] = view
        return view

    def part(self, start: int, length: int) -> Tensor:
        """A flat view of some of its elements as float32."""
        return self.elements(F32, length, start)


class HostMemory:
    """The CPU's: float32 is read straight to where it is computed on."""

    def __init__(self) -> None:
        self._raw = Buffer(CHUNK * 8)
        self._rounded = Buffer(CHUNK * 8)

    def floats(self, length: int) -> Buffer:
        """A new buffer."""
        return Buffer(length * F32.itemsize)

    def load(self, read: Callable[[memoryview], None], dtype: Dtype, length: int, into: Floats, at: int) -> None:
        """See Memory."""
        assert isinstance(into, Buffer)
        if dtype == F32:
            read(into.bytes[at * F32.itemsize : (at + length) * F32.itemsize])
            return
        read(self._raw.bytes[: length * dtype.itemsize])
        into.part(at, length).copy_(self._raw.elements(dtype, length))

    def rounded(self, values: Tensor, dtype: Dtype) -> memoryview:
        """See Memory."""
        self._rounded.elements(dtype, values.numel()).copy_(values)
        return self._rounded.bytes[: values.numel() * dtype.itemsize]

    def at_work(self) -> contextlib.AbstractContextManager[Any]:
        """Nothing to set up."""
        return contextlib.nullcontext()


class _Numbers:
    """float32 numbers on an accelerator."""

    def __init__(self, length: int, device: Any) -> None:
        self._tensor = torch.zeros(max(length, 1), dtype=torch.float32, device=device)

    def part(self, start: int, length: int) -> Tensor:
        return self._tensor[start : start + length]


class DeviceMemory:
    """An accelerator's. Each worker has a stream of its own, and a few pinned buffers that bytes travel
    through: while some are on their way, the next is read from disk.
    """

    def __init__(self, device: Any) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        self._stream: Any = torch.cuda.Stream(device) if self._cuda else None  # type: ignore[no-untyped-call]
        size = CHUNK * 8
        self._pinned = [torch.empty(size, dtype=torch.uint8, pin_memory=self._cuda) for _ in range(IN_FLIGHT)]
        self._arrived: list[Any] = [None] * IN_FLIGHT
        self._next = 0
        self._raw = torch.empty(size, dtype=torch.uint8, device=device)
        self._out = torch.empty(size, dtype=torch.uint8, pin_memory=self._cuda)

    def floats(self, length: int) -> _Numbers:
        """A new buffer."""
        return _Numbers(length, self._device)

    def load(self, read: Callable[[memoryview], None], dtype: Dtype, length: int, into: Floats, at: int) -> None:
        """See Memory."""
        slot, self._next = self._next, (self._next + 1) % IN_FLIGHT
        if self._arrived[slot] is not None:
            self._arrived[slot].synchronize()
        nbytes = length * dtype.itemsize
        pinned = self._pinned[slot][:nbytes]
        read(pinned.numpy().data)
        raw = self._raw[:nbytes]
        raw.copy_(pinned, non_blocking=True)
        if self._cuda:
            self._arrived[slot] = self._stream.record_event()
        into.part(at, length).copy_(raw.view(getattr(torch, dtype.torch_name)))

    def rounded(self, values: Tensor, dtype: Dtype) -> memoryview:
        """See Memory."""
        nbytes = values.numel() * dtype.itemsize
        made = values.to(getattr(torch, dtype.torch_name)).view(torch.uint8)
        self._out[:nbytes].copy_(made, non_blocking=True)
        if self._stream is not None:
            self._stream.synchronize()
        return self._out[:nbytes].numpy().data

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """The worker's stream, empty at the end: what was made on it can be used on others."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield
            self._stream.synchronize()


def memory_of(device: str) -> Memory:
    """A worker's memory on "cpu" or "cuda"."""
    return HostMemory() if device == "cpu" else DeviceMemory(torch.device(device))


def check_device(device: str) -> None:
    """Raises EnvironmentFault where the device that was asked for, "cpu" or "cuda", cannot be used."""
    if device != "cpu" and not torch.cuda.is_available():
        raise EnvironmentFault(
            "There is no GPU that torch can use.",
            key=f"--device {device}",
            hint="leave out --device: merging needs no GPU; `mergekit-sd doctor` tells what torch sees",
        )
