"""A pass cut into pieces of work: which elements of which tensor, in the order of the file.

The cut depends on nothing but the plan, so the bytes do not depend on threads or memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mergekit_sd.formats.hashing import LEAF
from mergekit_sd.planning.values import PlannedOutput, PlannedTensor

# Elements that are computed at once: three float32 buffers of it stay in a core's cache.
CHUNK = 256 * 1024
# Vector units work on up to 64 elements at once; a chunk's tail is padded to a multiple of it,
# because torch's scalar path for the rest differs in the last bit for some functions.
PAD = 64


@dataclass(frozen=True, slots=True)
class Task:
    """Elements `start` to `stop` of a tensor; for copies and constants, bytes."""

    tensor: PlannedTensor
    start: int
    stop: int


def cut(output: PlannedOutput) -> Iterator[Task]:
    """The tasks of an output in the order of their bytes. Empty tensors have none.

    A task covers whole leaves of the content hash of everything that it reads and writes, so that
    hashes are made from the bytes as they pass.
    """
    for tensor in sorted(output.tensors, key=lambda tensor: tensor.info.offset):
        length, step = _length_and_step(tensor)
        for start in range(0, length, step):
            yield Task(tensor, start, min(start + step, length))


def _length_and_step(tensor: PlannedTensor) -> tuple[int, int]:
    if tensor.how in ("copied", "constant"):
        return tensor.info.nbytes, LEAF
    length = tensor.info.numel
    if tensor.program.whole:
        return length, max(length, 1)
    smallest = min(dtype.itemsize for dtype in (tensor.info.dtype, *(read.dtype for read in tensor.program.reads)))
    return length, LEAF // smallest
