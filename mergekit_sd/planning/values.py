"""What a plan is: frozen values that can be printed, compared and tested without reading weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from mergekit_sd.architectures import Layout
from mergekit_sd.formats.tensor import ModelFile, TensorInfo
from mergekit_sd.formats.torch_files import SUFFIXES
from mergekit_sd.planning.expression import Expression, Program, Read, Survey, compile_expression, reads_of
from mergekit_sd.planning.models import StepReport
from mergekit_sd.recipe.load import OutputSpec, Recipe

How = Literal["merged", "cast", "copied", "constant"]
MetadataStyle = Literal["full", "webui", "none"]


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of an output: where it goes, how it is made, and where in the model it belongs."""

    info: TensorInfo
    how: How
    expression: Expression
    component: str | None

    @cached_property
    def reads(self) -> tuple[Read, ...]:
        """The tensors that it is made of, each once."""
        return reads_of(self.expression)

    @cached_property
    def program(self) -> Program:
        """The expression, compiled."""
        return compile_expression(self.expression)


@dataclass(frozen=True)
class Input:
    """A model of the recipe, opened: its file, and what the names in it say."""

    name: str
    file: ModelFile
    layout: Layout
    prediction: str | None


@dataclass(frozen=True, eq=False)
class Making:
    """How the tensors of a file are made whose number and shapes only the making tells: a LoRA's.

    `survey`'s result has the `tensors`, float32, by name. `size`: about the bytes that they take. `metadata`
    tells of the result what a file says of itself, `report` what people are told.
    """

    survey: Survey
    size: int
    metadata: Callable[[Any], Mapping[str, str]]
    report: Callable[[Any], Mapping[str, Any]]

    def reads(self) -> list[Read]:
        """The tensors that it is made of."""
        return [read for operands in self.survey.operands.values() for each in operands for read in reads_of(each)]


@dataclass(frozen=True)
class PlannedOutput:
    """An output file before it exists: every tensor's place, and what stays behind."""

    spec: OutputSpec
    path: Path
    size: int
    layout: Layout
    prediction: str | None
    tensors: tuple[PlannedTensor, ...]
    dropped: Mapping[str, tuple[str, ...]]
    """What the first operand has and the output has not, by reason: "ema", "junk", "marker"."""
    making: Making | None = None
    """Of a LoRA: more tensors come in front of `tensors` once they are made (`is_made`)."""
    is_made: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)
    """More metadata of its own."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """What its tensors mean nothing without: a hypernetwork's activation. Never left out."""

    @property
    def name(self) -> str:
        """The output's name in the recipe."""
        return self.spec.name

    @property
    def is_pickle(self) -> bool:
        """Whether it is a textual inversion or a hypernetwork that PyTorch is to read."""
        return self.path.suffix.lower() in SUFFIXES

    def counted(self) -> dict[How, int]:
        """How many tensors are made how."""
        counts: dict[How, int] = {"merged": 0, "cast": 0, "copied": 0, "constant": 0}
        for tensor in self.tensors:
            counts[tensor.how] += 1
        return counts

    def dtypes(self) -> dict[str, int]:
        """How many tensors have which dtype."""
        counts: dict[str, int] = {}
        for tensor in self.tensors:
            counts[tensor.info.dtype.name] = counts.get(tensor.info.dtype.name, 0) + 1
        return counts

    def reads(self) -> dict[int, dict[str, Read]]:
        """What is read of which input: by its number, then by the tensor's name in its file."""
        found: dict[int, dict[str, Read]] = {}
        made = self.making.reads() if self.making else []
        for read in (*made, *(read for tensor in self.tensors for read in tensor.reads)):
            found.setdefault(read.input, {})[read.tensor.name] = read
        return found

    @property
    def read_bytes(self) -> int:
        """Bytes that the pass reads, each tensor of an input once for every tensor made of it."""
        made = self.making.reads() if self.making else []
        return sum(read.tensor.nbytes for read in (*made, *(r for tensor in self.tensors for r in tensor.reads)))


@dataclass(frozen=True)
class Plan:
    """Everything that a run will do, known from headers alone."""

    recipe: Recipe
    inputs: tuple[Input, ...]
    steps: tuple[StepReport, ...]
    outputs: tuple[PlannedOutput, ...]
    warnings: tuple[str, ...]
    metadata: MetadataStyle
