"""The pass before the pass: what operations must learn of whole models before any tensor is made.

Owns how a survey's tensors are made, on threads, one tensor of each operand at a time and only as many at once
as fit in memory. What is found is kept in the plan, so that a second output does not look again.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from mergekit_sd.execute.worker import Worker
from mergekit_sd.formats.dtypes import F32, Dtype
from mergekit_sd.lazy import torch
from mergekit_sd.operations.types import Key, Tensor
from mergekit_sd.planning.expression import Survey, compile_expression
from mergekit_sd.planning.values import PlannedOutput

T = TypeVar("T")


def needed_surveys(output: PlannedOutput) -> list[Survey]:
    """The surveys that an output waits for, those that others need first; done ones left out.

    The one that makes its tensors is no such.
    """
    order: dict[int, Survey] = {}

    def visit(survey: Survey) -> None:
        if id(survey) not in order and not survey.done:
            for operands in survey.operands.values():
                for operand in operands:
                    for inner in compile_expression(operand).surveys:
                        visit(inner)
            order[id(survey)] = survey

    for tensor in output.tensors:
        if tensor.how == "merged":
            for survey in tensor.program.surveys:
                visit(survey)
    if output.making:
        visit(output.making.survey)
        order.pop(id(output.making.survey), None)
    return list(order.values())


def survey_models(
    survey: Survey,
    worker: Callable[[], Worker],
    threads: int,
    memory: int,
    *,
    kept: bool = False,
    dtype: Dtype | None = None,
) -> None:
    """Make a survey, and keep what it found. `worker` makes a worker; one is made for each thread.

    `memory`: bytes that the operands of all threads may take together, but for those of one tensor.
    `kept`: what is read is hashed. `dtype`: what all that is made of the result is rounded to, if it is one.
    """
    assert survey.operation.survey
    with ThreadPoolExecutor(threads) as pool:
        survey.result = survey.operation.survey(_Models(survey, worker, pool, threads, memory, kept, dtype))
    survey.done = True


class _Room:
    """Names that wait for their turn: of those that fit beside what is at work, the first; any where nothing is."""

    def __init__(self, sizes: Mapping[str, int], memory: int) -> None:
        self._waiting, self._free, self._at_work = dict(sizes), memory, 0
        self._changed = threading.Condition()

    def enter(self) -> tuple[str, int] | None:
        """The next, with its size, as soon as there is one; None at the end."""
        with self._changed:
            while self._waiting:
                some = ((name, size) for name, size in self._waiting.items() if size <= self._free or not self._at_work)
                if found := next(some, None):
                    del self._waiting[found[0]]
                    self._free -= found[1]
                    self._at_work += 1
                    return found
                self._changed.wait()
            return None

    def leave(self, size: int) -> None:
        """One is done."""
        with self._changed:
            self._free += size
            self._at_work -= 1
            self._changed.notify_all()

    def close(self) -> None:
        """There is no next."""
        with self._changed:
            self._waiting.clear()
            self._changed.notify_all()


class _Models:
    """`operations.survey.Models` over the expressions of a plan."""

    def __init__(
        self,
        survey: Survey,
        worker: Callable[[], Worker],
        pool: ThreadPoolExecutor,
        threads: int,
        memory: int,
        kept: bool,
        dtype: Dtype | None,
    ) -> None:
        self._survey, self._new_worker, self._pool, self._kept = survey, worker, pool, kept
        self._threads, self._memory, self._dtype = threads, memory, dtype
        self._own = threading.local()

    @property
    def keys(self) -> Mapping[str, Key]:
        """The tensors that the step merges, by name."""
        return self._survey.keys

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Their shapes."""
        return {name: operands[0].shape for name, operands in self._survey.operands.items()}

    def tensors(self, name: str) -> tuple[Tensor, ...]:
        """One tensor of each operand, whole, float32."""
        with self._worker().at_work():
            return self._made(name)

    def map(self, function: Callable[[Key, tuple[Tensor, ...]], T], names: Iterable[str]) -> list[T]:
        """`function` of each tensor's key and operands, on threads; results in the order of `names`."""

        order = list(names)
        # Half: what a thread makes of a tensor takes as much again.
        room, found = _Room({name: self._size(name) for name in order}, self._memory // 2), dict[str, T]()

        def work() -> None:
            try:
                while entered := room.enter():
                    name, size = entered
                    with self._worker().at_work():
                        found[name] = function(self.keys[name], self._made(name))
                    room.leave(size)
            except BaseException:
                room.close()
                raise

        for each in [self._pool.submit(work) for _ in range(self._threads)]:
            each.result()
        return [found.pop(name) for name in order]

    def held(self, tensor: Tensor) -> Tensor:
        """In the outputs' dtype; float32 where that has no such number, for whoever looks for those."""
        if self._dtype is None:
            return tensor
        rounded = tensor.to(getattr(torch, self._dtype.torch_name))
        return rounded if bool(torch.isfinite(rounded).all()) else tensor

    def _size(self, name: str) -> int:
        """The bytes of a name's operands as they are made."""
        return sum(math.prod(operand.shape) * F32.itemsize for operand in self._survey.operands[name])

    def _made(self, name: str) -> tuple[Tensor, ...]:
        programs = [(compile_expression(operand), operand.shape) for operand in self._survey.operands[name]]
        return tuple(self._worker().whole(program, shape, kept=self._kept) for program, shape in programs)

    def _worker(self) -> Worker:
        if not hasattr(self._own, "worker"):
            torch.set_num_threads(1)
            self._own.worker = self._new_worker()
        worker: Worker = self._own.worker
        return worker
