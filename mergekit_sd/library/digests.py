"""The hashes of many files, in one pass over each: content and weights out of the same bytes.

Owns the reading and the threads. What the hashes are is `formats.hashing`'s and `inspection.identity`'s;
the leaves of both begin at the same elements, and those of a float16 tensor are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from mergekit_sd.errors import InputError
from mergekit_sd.formats.dtypes import F16, Dtype
from mergekit_sd.formats.hashing import LEAF, OnBytes, content_hash, default_threads, leaf_digest
from mergekit_sd.formats.reading import InputFile
from mergekit_sd.formats.tensor import TensorInfo
from mergekit_sd.inspection.streaming import as_tensor, batches, in_parallel
from mergekit_sd.lazy import torch
from mergekit_sd.library.entry import WEIGHTS, Opened

_LEAF_ELEMENTS = LEAF // F16.itemsize  # of a weights hash


@dataclass(frozen=True, eq=False)
class Wanted:
    """A file to hash: its content and every component's weights, or the weights of its VAE alone."""

    opened: Opened
    vae_only: bool = False


Hashes = dict[str, str]
OnHashed = Callable[[Wanted, Hashes | InputError], None]


def hash_files(
    wanted: Iterable[Wanted], on_hashed: OnHashed, on_bytes: OnBytes | None = None, threads: int | None = None
) -> None:
    """Hash files, in their order, several at once where they are small.

    Both listeners are called in this thread: `on_hashed` with a file's hashes by kind, or with why it has
    none (the others go on); `on_bytes` with the bytes read since the last call. What they raise ends the work.
    """
    jobs: set[_Job] = set()

    def finish(job: _Job) -> None:
        jobs.discard(job)
        on_hashed(job.wanted, job.result())

    def tasks() -> Iterator[_Task]:
        for each in wanted:
            try:
                job = _Job(each)
            except InputError as error:
                on_hashed(each, error)
                continue
            jobs.add(job)
            parts = list(batches(job.reads(), lambda read: read.nbytes))
            job.left = len(parts)
            yield from (_Task(job, part) for part in parts)
            if not parts:
                finish(job)

    def take(task: _Task, digests: list[_Digests] | InputError) -> None:
        task.job.take(task, digests)
        if on_bytes:
            on_bytes(sum(read.nbytes for read in task.reads))
        if not task.job.left:
            finish(task.job)

    try:
        in_parallel(tasks(), _Worker, take, threads or default_threads())
    finally:
        for job in jobs:
            job.file.close()


# A tensor, or a part of it that begins and ends where leaves of both hashes do; and its bytes.
_Piece: TypeAlias = tuple[TensorInfo, int]
# The digests of a piece's leaves, as they are stored and as they are rounded to float16.
_Digests: TypeAlias = tuple[list[bytes], list[bytes]]


@dataclass(frozen=True, slots=True)
class _Read:
    """Pieces that lie one after the other in a file. Most tensors are small: together they cost one call."""

    offset: int
    nbytes: int
    pieces: list[_Piece]


class _Job:
    """One file under way."""

    def __init__(self, wanted: Wanted) -> None:
        model = wanted.opened.model
        self.wanted = wanted
        self.content = not wanted.vae_only
        self.weights = {
            stored: (component, name)
            for stored, (component, name) in wanted.opened.weights().items()
            if self.content or component == "vae"
        }
        self.tensors = [each for each in model.tensors.values() if self.content or each.name in self.weights]
        self.stored: dict[str, list[bytes]] = {tensor.name: [] for tensor in self.tensors}
        self.rounded: dict[str, list[bytes]] = {name: [] for name in self.weights}
        self.left = 0
        self.error: InputError | None = None
        self.file = InputFile.of(model)

    def reads(self) -> Iterator[_Read]:
        """What is read, from the file's beginning to its end."""
        offset = end = 0
        together: list[_Piece] = []
        for tensor in sorted(self.tensors, key=lambda tensor: tensor.offset):
            most = max(LEAF, _LEAF_ELEMENTS * tensor.dtype.itemsize)
            for start in range(tensor.offset, tensor.offset + tensor.nbytes, most):
                nbytes = min(most, tensor.offset + tensor.nbytes - start)
                # What begins beyond the file's end is made when it is read, each tensor for itself.
                fits = start == end < self.file.state.size and end - offset + nbytes <= LEAF
                if together and not fits:
                    yield _Read(offset, end - offset, together)
                    together = []
                if not together:
                    offset = end = start
                together.append((tensor, nbytes))
                end += nbytes
        if together:
            yield _Read(offset, end - offset, together)

    def take(self, task: _Task, digests: list[_Digests] | InputError) -> None:
        """Keep the digests of a task; tasks come in their order."""
        self.left -= 1
        if isinstance(digests, InputError):
            self.error = self.error or digests
            return
        taken = (tensor.name for read in task.reads for tensor, _ in read.pieces)
        for name, (stored, rounded) in zip(taken, digests, strict=False):  # none once an error is known
            self.stored[name] += stored
            if name in self.weights:
                self.rounded[name] += rounded

    def result(self) -> Hashes | InputError:
        """The hashes, once everything is taken; closes the file."""
        try:
            if self.error is None:
                self.file.check_unchanged()
        except InputError as error:
            self.error = error
        finally:
            self.file.close()
        return self.error or self._hashes()

    def _hashes(self) -> Hashes:
        components: dict[str, list[tuple[str, TensorInfo]]] = {}
        for tensor in self.tensors:
            if tensor.name in self.weights:
                component, name = self.weights[tensor.name]
                components.setdefault(component, []).append((name, tensor))
        found = {
            WEIGHTS + component: content_hash((name, F16.name, t.shape, self.rounded[t.name]) for name, t in members)
            for component, members in components.items()
        }
        if self.content:
            found["content"] = content_hash((t.name, t.dtype.name, t.shape, self.stored[t.name]) for t in self.tensors)
        return found


@dataclass(frozen=True, slots=True)
class _Task:
    """Some reads of a file, for one thread."""

    job: _Job
    reads: list[_Read]


class _Worker:
    """Digests pieces, with memory of its own. Torch comes in only where rounding is needed."""

    def __init__(self) -> None:
        self._raw = self._half = memoryview(bytearray(0))

    def __call__(self, task: _Task) -> list[_Digests] | InputError:
        """The digests of a task's pieces, or why they cannot be read."""
        if task.job.error:
            return []
        try:
            return [digests for read in task.reads for digests in self._read(task.job, read)]
        except InputError as error:
            return error

    def _read(self, job: _Job, read: _Read) -> Iterator[_Digests]:
        if read.nbytes > len(self._raw):
            self._raw = memoryview(bytearray(read.nbytes))
        job.file.read_into(self._raw[: read.nbytes], read.offset)
        start = 0
        for tensor, nbytes in read.pieces:
            data = self._raw[start : start + nbytes]
            start += nbytes
            is_half = tensor.dtype is F16
            stored = _leaves(data) if job.content or is_half else []
            if is_half or tensor.name not in job.weights:
                yield stored, stored
            else:
                yield stored, _leaves(self._rounded(data, tensor.dtype))

    def _rounded(self, data: memoryview, dtype: Dtype) -> memoryview:
        torch.set_num_threads(1)  # of this thread only: there are as many as cores
        nbytes = len(data) // dtype.itemsize * F16.itemsize
        if nbytes > len(self._half):
            self._half = memoryview(bytearray(nbytes))
        half = self._half[:nbytes]
        as_tensor(half, F16).copy_(as_tensor(data, dtype))
        return half


def _leaves(data: memoryview) -> list[bytes]:
    if len(data) <= LEAF:
        return [leaf_digest(data)]
    return [leaf_digest(data[start : start + LEAF]) for start in range(0, len(data), LEAF)]
