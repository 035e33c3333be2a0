"""Reading tensors piece by piece, on several threads, in bounded memory.

Owns the cutting into pieces and the threads. Must not know what is done with the pieces.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from mergekit_sd.formats.dtypes import Dtype
from mergekit_sd.formats.reading import InputFile
from mergekit_sd.formats.tensor import TensorInfo
from mergekit_sd.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 256 * 1024  # elements: what torch computes on lies in the processor's cache
BATCH = 16 << 20  # bytes per task: small tensors together, or handing them out costs more than the work

_AHEAD = 4  # tasks under way per thread: an error or a cancel does not wait for more

Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Piece:
    """`count` elements of a tensor, from element `start` on; never none."""

    tensor: TensorInfo
    start: int
    count: int

    @property
    def nbytes(self) -> int:
        """How many bytes they are in the file."""
        return self.count * self.tensor.dtype.itemsize


def pieces(tensor: TensorInfo, elements: int = CHUNK) -> Iterator[Piece]:
    """A tensor in pieces of that many elements, the last one shorter; none of an empty tensor."""
    for start in range(0, tensor.numel, elements):
        yield Piece(tensor, start, min(elements, tensor.numel - start))


def batches(tasks: Iterable[Task], nbytes: Callable[[Task], int]) -> Iterator[list[Task]]:
    """Tasks in their order, together until they reach BATCH bytes."""
    batch: list[Task] = []
    filled = 0
    for task in tasks:
        batch.append(task)
        filled += nbytes(task)
        if filled >= BATCH:
            yield batch
            batch, filled = [], 0
    if batch:
        yield batch


class Buffer:
    """Memory that one thread reads pieces into."""

    def __init__(self, nbytes: int) -> None:
        self._bytes = bytearray(nbytes)

    def read(self, file: InputFile, piece: Piece) -> memoryview:
        """The bytes of a piece; valid until the next read."""
        data = memoryview(self._bytes)[: piece.nbytes]
        file.read_into(data, piece.tensor.offset + piece.start * piece.tensor.dtype.itemsize)
        return data


def as_tensor(data: memoryview, dtype: Dtype) -> Tensor:
    """The bytes of a piece as a flat tensor on the same memory."""
    return torch.frombuffer(data, dtype=getattr(torch, dtype.torch_name))


def in_parallel(
    tasks: Iterable[Task],
    make_worker: Callable[[], Callable[[Task], Result]],
    on_result: Callable[[Task, Result], None],
    threads: int,
) -> None:
    """Do tasks on threads, each with a worker of its own, and hand over the results in their order.

    `on_result` is called in the calling thread. The first error ends the work and is raised; no
    thread runs any more when this returns, so that the caller can close its files.
    """
    own = threading.local()

    def work(task: Task) -> Result:
        if not hasattr(own, "worker"):
            own.worker = make_worker()
        result: Result = own.worker(task)
        return result

    under_way: deque[tuple[Task, Future[Result]]] = deque()

    def take() -> None:
        task, future = under_way.popleft()
        on_result(task, future.result())

    pool = ThreadPoolExecutor(threads, "inspect")
    try:
        for task in tasks:
            under_way.append((task, pool.submit(work, task)))
            if len(under_way) >= _AHEAD * threads:
                take()
        while under_way:
            take()
    finally:
        pool.shutdown(cancel_futures=True)
