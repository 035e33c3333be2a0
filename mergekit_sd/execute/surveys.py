"""The pass before the pass: what operations must learn of whole models before any tensor is made.

Owns how a survey's tensors are made, on threads, one tensor of each operand at a time. What is
found is kept in the plan, so that a second output does not look again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from mergekit_sd.execute.worker import Worker
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


def survey_models(survey: Survey, worker: Callable[[], Worker], threads: int, *, kept: bool = False) -> None:
    """Make a survey, and keep what it found. `worker` makes a worker; one is made for each thread.

    `kept`: what is read is hashed.
    """
    assert survey.operation.survey
    with ThreadPoolExecutor(threads) as pool:
        survey.result = survey.operation.survey(_Models(survey, worker, pool, kept))
    survey.done = True


class _Models:
    """`operations.survey.Models` over the expressions of a plan."""

    def __init__(self, survey: Survey, worker: Callable[[], Worker], pool: ThreadPoolExecutor, kept: bool) -> None:
        self._survey, self._new_worker, self._pool, self._kept = survey, worker, pool, kept
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

        def one(name: str) -> T:
            with self._worker().at_work():
                return function(self.keys[name], self._made(name))

        return list(self._pool.map(one, names))

    def _made(self, name: str) -> tuple[Tensor, ...]:
        programs = [(compile_expression(operand), operand.shape) for operand in self._survey.operands[name]]
        return tuple(self._worker().whole(program, shape, kept=self._kept) for program, shape in programs)

    def _worker(self) -> Worker:
        if not hasattr(self._own, "worker"):
            torch.set_num_threads(1)
            self._own.worker = self._new_worker()
        worker: Worker = self._own.worker
        return worker
