"""The arithmetic of a pass: one worker per thread, with its own buffers.

Reads chunks at their offsets, computes in float32, rounds once, writes at the tensor's offset.
Must not know recipes or the command line. Torch is used here and in `operations` only.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from mergekit_sd.execute.ledger import LeafHasher, Ledger
from mergekit_sd.execute.memory import Buffer, Floats, Memory
from mergekit_sd.execute.tasks import CHUNK, PAD, Task
from mergekit_sd.formats.dtypes import F64
from mergekit_sd.formats.reading import InputFile
from mergekit_sd.lazy import torch
from mergekit_sd.operations.types import Tensor
from mergekit_sd.planning.expression import (
    Apply,
    Constant,
    Deferred,
    Expression,
    FirstChannels,
    Instruction,
    Program,
    Read,
    RestChannels,
    Rows,
    Transposed,
    operands_of,
)
from mergekit_sd.planning.values import PlannedTensor


class Sink(Protocol):
    """Where output bytes go: a file in the making, or a file to compare with."""

    def write(self, buffer: memoryview, offset: int) -> None:
        """Take bytes that belong at `offset`."""

    def copy(self, source: InputFile, source_offset: int, offset: int, length: int) -> None:
        """Take bytes of an input, unseen."""


class Worker:
    """Does tasks, one after the other. Not shared between threads."""

    def __init__(
        self,
        inputs: Sequence[InputFile],
        sink: Sink,
        ledger: Ledger,
        check: Callable[[], None],
        *,
        memory: Memory,
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
        self._memory = memory
        self._copied: Buffer | None = None  # bytes that are copied and looked at on their way
        self._registers: list[Floats] = []

    def do(self, task: Task) -> None:
        """Make the task's part of its tensor and hand it to the sink."""
        if task.tensor.how == "constant":
            self._write_constant(task)
        elif task.tensor.how == "copied":
            self._copy(task)
        else:
            self._compute(task)

    def at_work(self) -> contextlib.AbstractContextManager[Any]:
        """Around all that it does on its thread."""
        return self._memory.at_work()

    def whole(self, program: Program, shape: Sequence[int], *, kept: bool = False) -> Tensor:
        """A program's result for a whole tensor, in float32; nothing is written. `kept`: what is read is hashed."""
        hashers = {id(read): self._hasher() for read in program.reads} if kept else {}
        held = self._held(program, unread := dict(hashers))
        made = self._made(program.instructions, program.registers, math.prod(shape), held, unread)
        for read in program.reads if kept else ():
            self._keep_read(hashers[id(read)], read, 0)
            self._ledger.advance(read.tensor.nbytes)
        return made.reshape(tuple(shape))

    # --- bytes that do not change ----------------------------------------------------------------

    def _write_constant(self, task: Task) -> None:
        expression = task.tensor.expression
        assert isinstance(expression, Constant | Deferred)
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
        self._copied = buffer = self._copied or Buffer(CHUNK * 8)
        piece = CHUNK * read.dtype.itemsize
        for start in range(task.start, task.stop, piece):
            self._check()
            data = buffer.bytes[: min(piece, task.stop - start)]
            source.read_into(data, read.tensor.offset + start)
            if scan:
                elements = len(data) // read.dtype.itemsize
                values = buffer.elements(read.dtype, elements)
                self._find_nonfinite(tensor, values if read.dtype == F64 else values.to(torch.float32))
            self._emit(tensor, data, start, hasher)
        self._keep_made(hasher, tensor, task.start)
        self._keep_read(hasher, read, task.start)

    # --- arithmetic ------------------------------------------------------------------------------

    def _compute(self, task: Task) -> None:
        tensor, program = task.tensor, task.tensor.program
        hashers = {id(read): self._hasher() for read in program.reads}
        written = self._hasher()
        unread = dict(hashers)
        held = self._held(program, unread)
        slots = [(register, 0) for register in self._registers_for(program.registers)]
        for start in range(task.start, task.stop, CHUNK):
            self._check()
            length = min(CHUNK, task.stop - start)
            result = self._run(program.instructions, slots, start, length, held, unread)
            self._store(tensor, result[:length], start, written)
        self._finish(task, hashers, written)

    def _held(self, program: Program, hashers: dict[int, Any]) -> dict[int, Tensor]:
        """The whole tensors that a program's stages make, flat, by their node's id, as far as they are needed.

        `hashers`, by a read's id, hash what is read; those that are done are taken out.
        """
        held: dict[int, Tensor] = {}
        for stage in program.stages:
            self._check()
            if stage.instructions:
                value = self._made(stage.instructions, stage.registers, _numel(stage.node), held, hashers)
            else:
                operands = [held[id(node)].reshape(node.shape) for node in operands_of(stage.node)]
                value = _applied(stage.node, operands, 0, None).reshape(-1)
                del operands
            held[id(stage.node)] = value
            for node in stage.frees:
                del held[id(node)]
        return held

    def _made(
        self,
        instructions: Sequence[Instruction],
        registers: int,
        numel: int,
        held: dict[int, Tensor],
        hashers: dict[int, Any],
    ) -> Tensor:
        """The result of instructions for a whole tensor, put together from its pieces."""
        made = self._memory.floats(-(-numel // PAD) * PAD)
        slots = [(register, 0) for register in self._registers_for(registers)]
        for start in range(0, numel, CHUNK):
            self._check()
            slots[instructions[-1].target] = (made, start)
            length = min(CHUNK, numel - start)
            result = self._run(instructions, slots, start, length, held, hashers)
            if instructions[-1].held:
                made.part(start, length).copy_(result[:length])
        for instruction in instructions:
            hashers.pop(id(instruction.node), None)
        return made.part(0, numel)

    def _registers_for(self, count: int) -> list[Floats]:
        while len(self._registers) < count:
            self._registers.append(self._memory.floats(CHUNK))
        return self._registers[:count]

    def _run(
        self,
        instructions: Sequence[Instruction],
        slots: Sequence[tuple[Floats, int]],
        start: int,
        length: int,
        held: dict[int, Tensor],
        hashers: dict[int, Any],
    ) -> Tensor:
        """Run instructions on one chunk; the result is padded. A slot is a register: a buffer, and where in it."""
        padded = -(-length // PAD) * PAD
        views = [floats.part(at, padded) for floats, at in slots]
        values = list(views)
        for step in instructions:
            target, (floats, at) = views[step.target], slots[step.target]
            if step.held:
                values[step.target] = _piece(held[id(step.node)], start, padded, target)
            elif isinstance(step.node, Read):
                self._load(step.node, start, length, floats, at, hashers.get(id(step.node)))
                if length < padded:
                    target[length:].zero_()
                values[step.target] = target
            else:
                sources = [values[source] for source in step.sources]
                values[step.target] = _applied(step.node, sources, start, target)
        return values[instructions[-1].target]

    def _load(self, tensor: Read, start: int, length: int, into: Floats, at: int, hasher: LeafHasher | None) -> None:
        """Elements `start` on of a tensor, as float32, to element `at` of a buffer."""
        source, offset = self._inputs[tensor.input], tensor.tensor.offset + start * tensor.dtype.itemsize

        def read(data: memoryview) -> None:
            source.read_into(data, offset)
            if hasher:
                hasher.update(data)

        self._memory.load(read, tensor.dtype, length, into, at)

    def _store(self, tensor: PlannedTensor, values: Tensor, start: int, hasher: LeafHasher | None) -> None:
        """Check a chunk of the result, round it once, write it."""
        dtype = tensor.info.dtype
        low, high = torch.aminmax(values)
        if not max(-float(low), float(high)) < dtype.overflow:  # NaN compares as out of range, too
            values = self._out_of_range(tensor, values)
        self._emit(tensor, self._memory.rounded(values, dtype), start * dtype.itemsize, hasher)

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


def _numel(node: Expression) -> int:
    return math.prod(node.shape)


def _piece(whole: Tensor, start: int, padded: int, target: Tensor) -> Tensor:
    """`padded` elements of a held tensor; at its end, where there are not so many, a copy with zeros."""
    piece = whole[start : start + padded]
    if piece.numel() == padded:
        return piece
    target.zero_()
    target[: piece.numel()] = piece
    return target


def _applied(node: Expression, sources: list[Tensor], start: int, out: Tensor | None) -> Tensor:
    """A node's value for the elements from `start` on, from its operands' values."""
    match node:
        case Apply():
            result: Tensor = node.operation.apply(sources, node.keywords(start), out)
            return result
        case FirstChannels():
            return sources[0][:, : node.channels].contiguous()
        case RestChannels():
            whole = sources[1].clone()
            whole[:, : sources[0].shape[1]] = sources[0]
            return whole
        case Rows():
            return sources[0].chunk(node.of)[node.index].contiguous()
        case Transposed():
            return sources[0].T.contiguous()
        case _:
            raise TypeError(type(node).__name__)
