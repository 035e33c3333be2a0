"""The arithmetic of a pass: one worker per thread, with its own buffers.

Reads chunks at their offsets, computes in float32, rounds once, writes at the tensor's offset.
Must not know recipes or the command line. Torch is used here and in `operations` only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from mergekit_sd.execute.ledger import LeafHasher, Ledger
from mergekit_sd.execute.tasks import CHUNK, PAD, Task
from mergekit_sd.formats.dtypes import F32, F64, Dtype
from mergekit_sd.formats.reading import InputFile
from mergekit_sd.lazy import torch
from mergekit_sd.operations.types import Tensor
from mergekit_sd.planning.expression import Apply, Constant, Expression, FirstChannels, Program, Read, RestChannels
from mergekit_sd.planning.values import PlannedTensor


class Sink(Protocol):
    """Where output bytes go: a file in the making, or a file to compare with."""

    def write(self, buffer: memoryview, offset: int) -> None:
        """Take bytes that belong at `offset`."""

    def copy(self, source: InputFile, source_offset: int, offset: int, length: int) -> None:
        """Take bytes of an input, unseen."""


class Buffer:
    """Memory that files read into and torch computes on."""

    def __init__(self, nbytes: int) -> None:
        self.bytes = memoryview(bytearray(max(nbytes, 8)))
        self._chunks: dict[str, Tensor] = {}

    def elements(self, dtype: Dtype, length: int, start: int = 0) -> Tensor:
        """Elements `start` on of the buffer as a flat tensor of a dtype. Whole chunks' views are kept."""
        if start == 0 and length == CHUNK and dtype.name in self._chunks:
            return self._chunks[dtype.name]
        usable = len(self.bytes) // dtype.itemsize * dtype.itemsize
        whole = torch.frombuffer(self.bytes[:usable], dtype=getattr(torch, dtype.torch_name))
        view = whole[start : start + length]
        if start == 0 and length == CHUNK:
            self._chunks[dtype.name] = view
        return view


class Worker:
    """Does tasks, one after the other. Not shared between threads."""

    def __init__(
        self,
        inputs: Sequence[InputFile],
        sink: Sink,
        ledger: Ledger,
        check: Callable[[], None],
        *,
        hashing: bool,
        scan: bool,
        clamp: bool,
    ) -> None:
        self._inputs = inputs
        self._sink = sink
        self._ledger = ledger
        self._check = check  # raises when the run is to stop
        self._hashing = hashing
        self._scan = scan
        self._clamp = clamp
        self._raw = Buffer(CHUNK * 8)
        self._rounded = Buffer(CHUNK * 8)
        self._registers: list[Buffer] = []

    def do(self, task: Task) -> None:
        """Make the task's part of its tensor and hand it to the sink."""
        if task.tensor.how == "constant":
            self._write_constant(task)
        elif task.tensor.how == "copied":
            self._copy(task)
        elif task.tensor.program.whole:
            self._compute_whole(task)
        else:
            self._compute_chunks(task)

    # --- bytes that do not change ----------------------------------------------------------------

    def _write_constant(self, task: Task) -> None:
        expression = task.tensor.expression
        assert isinstance(expression, Constant)
        data = memoryview(expression.data)[task.start : task.stop]
        self._emit(task.tensor, data, task.start, hasher := self._hasher())
        self._keep_made(hasher, task.tensor, task.start)

    def _copy(self, task: Task) -> None:
        tensor, read = task.tensor, task.tensor.expression
        assert isinstance(read, Read)
        source = self._inputs[read.input]
        scan = self._scan and read.dtype.is_float
        if not self._hashing and not scan:
            self._sink.copy(
                source, read.tensor.offset + task.start, tensor.info.offset + task.start, task.stop - task.start
            )
            self._ledger.advance(task.stop - task.start)
            return
        hasher = self._hasher()
        piece = CHUNK * read.dtype.itemsize
        for start in range(task.start, task.stop, piece):
            self._check()
            data = self._raw.bytes[: min(piece, task.stop - start)]
            source.read_into(data, read.tensor.offset + start)
            if scan:
                elements = len(data) // read.dtype.itemsize
                values = self._raw.elements(read.dtype, elements)
                self._find_nonfinite(tensor, values if read.dtype == F64 else values.to(torch.float32))
            self._emit(tensor, data, start, hasher)
        self._keep_made(hasher, tensor, task.start)
        self._keep_read(hasher, read, task.start)

    # --- arithmetic ------------------------------------------------------------------------------

    def _compute_chunks(self, task: Task) -> None:
        tensor, program = task.tensor, task.tensor.program
        while len(self._registers) < program.registers:
            self._registers.append(Buffer(CHUNK * F32.itemsize))
        hashers = {id(read): self._hasher() for read in program.reads}
        written = self._hasher()
        for start in range(task.start, task.stop, CHUNK):
            self._check()
            length = min(CHUNK, task.stop - start)
            padded = -(-length // PAD) * PAD
            result = self._run(program, start, length, padded, hashers)
            self._store(tensor, result if length == padded else result[:length], start, written)
        self._finish(task, hashers, written)

    def _run(self, program: Program, start: int, length: int, padded: int, hashers: dict[int, Any]) -> Tensor:
        """Run an elementwise program on one chunk; the result has `padded` elements."""
        views = [register.elements(F32, padded) for register in self._registers[: program.registers]]
        values = list(views)
        for step in program.instructions:
            target = views[step.target]
            if isinstance(step.node, Read):
                self._load(step.node, start, length, self._registers[step.target], 0, hashers[id(step.node)])
                if length < padded:
                    target[length:].zero_()
                values[step.target] = target
            else:
                values[step.target] = _applied(step.node, [values[source] for source in step.sources], target)
        return values[program.result]

    def _compute_whole(self, task: Task) -> None:
        tensor, program = task.tensor, task.tensor.program
        hashers = {id(read): self._hasher() for read in program.reads}
        values: dict[int, Tensor] = {}
        for step in program.instructions:
            self._check()
            sources = [values[source] for source in step.sources]
            values.pop(step.target, None)  # frees the register's former value
            values[step.target] = self._whole_value(step.node, sources, hashers)
        result = values[program.result].reshape(-1)
        values.clear()
        written = self._hasher()
        for start in range(0, tensor.info.numel, CHUNK):
            self._check()
            self._store(tensor, result[start : start + CHUNK], start, written)
        self._finish(task, hashers, written)

    def _whole_value(self, node: Expression, sources: list[Tensor], hashers: dict[int, Any]) -> Tensor:
        if isinstance(node, Read):
            numel = node.tensor.numel
            buffer = Buffer(numel * F32.itemsize)
            for start in range(0, numel, CHUNK):
                self._check()
                self._load(node, start, min(CHUNK, numel - start), buffer, start, hashers[id(node)])
            return buffer.elements(F32, numel).reshape(node.shape)
        return _applied(node, sources, None)

    def _load(self, read: Read, start: int, length: int, into: Buffer, at: int, hasher: LeafHasher | None) -> None:
        """Elements `start` on of a tensor, as float32, to element `at` of a buffer."""
        size = read.dtype.itemsize
        direct = read.dtype == F32
        data = into.bytes[at * 4 : (at + length) * 4] if direct else self._raw.bytes[: length * size]
        self._inputs[read.input].read_into(data, read.tensor.offset + start * size)
        if hasher:
            hasher.update(data)
        if not direct:
            into.elements(F32, length, at).copy_(self._raw.elements(read.dtype, length))

    def _store(self, tensor: PlannedTensor, values: Tensor, start: int, hasher: LeafHasher | None) -> None:
        """Check a chunk of the result, round it once, write it."""
        dtype = tensor.info.dtype
        low, high = torch.aminmax(values)
        if not max(-float(low), float(high)) < dtype.overflow:  # NaN compares as out of range, too
            values = self._out_of_range(tensor, values)
        length = values.numel()
        self._rounded.elements(dtype, length).copy_(values)
        self._emit(tensor, self._rounded.bytes[: length * dtype.itemsize], start * dtype.itemsize, hasher)

    def _out_of_range(self, tensor: PlannedTensor, values: Tensor) -> Tensor:
        """Note NaN, Inf and overflow of a chunk; clamp what is finite, if the recipe says so."""
        self._find_nonfinite(tensor, values)
        finite = torch.isfinite(values)
        large = finite & (values.abs() >= tensor.info.dtype.overflow)
        elements = int(large.sum())
        if elements:
            found = self._ledger.clamped if self._clamp else self._ledger.overflow
            self._ledger.note(found, tensor.info.name, elements, float(values[large].abs().max()))
        if not self._clamp:
            return values
        largest = tensor.info.dtype.largest
        return torch.where(finite, values.clamp(-largest, largest), values)

    def _find_nonfinite(self, tensor: PlannedTensor, values: Tensor) -> None:
        low, high = torch.aminmax(values)
        if not (math.isfinite(float(low)) and math.isfinite(float(high))):
            bad = int((~torch.isfinite(values)).sum())
            self._ledger.note(self._ledger.nonfinite, tensor.info.name, bad, math.inf)

    # --- bytes on their way ----------------------------------------------------------------------

    def _hasher(self) -> LeafHasher | None:
        return LeafHasher() if self._hashing else None

    def _emit(self, tensor: PlannedTensor, data: memoryview, start: int, hasher: LeafHasher | None) -> None:
        if hasher:
            hasher.update(data)
        self._sink.write(data, tensor.info.offset + start)
        self._ledger.advance(len(data))

    def _keep_made(self, hasher: LeafHasher | None, tensor: PlannedTensor, start: int) -> None:
        if hasher:
            hasher.finish()
            self._ledger.made.keep(0, tensor.info.name, start, hasher.digests)

    def _keep_read(self, hasher: LeafHasher | None, read: Read, start: int) -> None:
        if hasher:
            hasher.finish()
            self._ledger.read.keep(read.input, read.tensor.name, start, hasher.digests)

    def _finish(self, task: Task, hashers: dict[int, LeafHasher | None], written: LeafHasher | None) -> None:
        """Keep the leaves of everything that a computed task read and wrote."""
        for read in task.tensor.program.reads:
            self._keep_read(hashers[id(read)], read, task.start * read.dtype.itemsize)
        self._keep_made(written, task.tensor, task.start * task.tensor.info.dtype.itemsize)


def _applied(node: Expression, sources: list[Tensor], out: Tensor | None) -> Tensor:
    match node:
        case Apply():
            result: Tensor = node.operation.function(*sources, **dict(node.parameters), out=out)
            return result
        case FirstChannels():
            return sources[0][:, : node.channels].contiguous()
        case RestChannels():
            whole = sources[1].clone()
            whole[:, : sources[0].shape[1]] = sources[0]
            return whole
        case _:
            raise TypeError(type(node).__name__)
