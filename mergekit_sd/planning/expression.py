"""How one output tensor is made: a small graph of reads and operations, and its program.

Owns the fused expression and its translation into instructions over registers. Must not know
files on disk, torch, or where the expression came from.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias

from mergekit_sd.formats.dtypes import I64, Dtype
from mergekit_sd.formats.tensor import TensorInfo
from mergekit_sd.operations import Operation
from mergekit_sd.operations.types import Key


@dataclass(frozen=True, eq=False)
class Read:
    """A tensor of input number `input`, as float32."""

    input: int
    tensor: TensorInfo

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return self.tensor.shape

    @property
    def dtype(self) -> Dtype:
        """The tensor's dtype in its file."""
        return self.tensor.dtype


@dataclass(frozen=True, eq=False)
class Constant:
    """Bytes that no input holds: the position_ids that every output gets."""

    dtype: Dtype
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True, eq=False)
class Deferred:
    """Bytes that no input holds either, and that are made each time that they are asked for, so as not to be kept."""

    dtype: Dtype
    shape: tuple[int, ...]
    make: Callable[[], memoryview]

    @property
    def data(self) -> memoryview:
        """The bytes."""
        return self.make()


def position_ids(number: int) -> Constant:
    """The ids 0 … n−1 as int64 of shape [1, n]: [1, 77] for every CLIP text encoder."""
    return Constant(I64, (1, number), struct.pack(f"<{number}q", *range(number)))


@dataclass(eq=False)
class Survey:
    """What a step must learn of whole models before any of its tensors is made.

    `operands` and `keys`: by tensor name, all that the step merges. `result` is found by the first
    run that needs it and kept, so that several outputs of a plan share it.
    """

    step: str
    operation: Operation
    operands: dict[str, tuple[Expression, ...]] = field(default_factory=dict)
    keys: dict[str, Key] = field(default_factory=dict)
    result: Any = None
    done: bool = False


@dataclass(frozen=True, eq=False)
class Apply:
    """An operation on expressions of one shape; parameters are plain values by now.

    `context`: what the operation is given besides: `key`, `draw` (from the tensor's first element
    on), `survey`. `dtype` is what `dtype = "keep"` writes: that of the first operand's tensor in its file.
    """

    operation: Operation
    operands: tuple[Expression, ...]
    parameters: Mapping[str, Any]
    shape: tuple[int, ...]
    dtype: Dtype
    context: Mapping[str, Any] = field(default_factory=dict)

    @property
    def survey(self) -> Survey | None:
        """What it must know of whole models."""
        return self.context.get("survey")

    def keywords(self, start: int) -> dict[str, Any]:
        """What the operation's function is called with for the tensor's elements from `start` on."""
        given = {**self.parameters, **self.context}
        if "draw" in given:
            given["draw"] = replace(given["draw"], start=start)
        if "survey" in given:
            given["survey"] = given["survey"].result
        return given


@dataclass(frozen=True, eq=False)
class FirstChannels:
    """The inpainting rule, going in: the first `channels` of dim 1 of a whole tensor."""

    operand: Expression
    channels: int
    dtype: Dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The operand's shape with dim 1 cut."""
        return (self.operand.shape[0], self.channels, *self.operand.shape[2:])


@dataclass(frozen=True, eq=False)
class RestChannels:
    """The inpainting rule, coming out: `merged` in front, the rest of dim 1 from `operand`."""

    merged: Expression
    operand: Expression
    shape: tuple[int, ...]
    dtype: Dtype


@dataclass(frozen=True, eq=False)
class Rows:
    """One of `of` equal shares of a whole tensor's rows: a query, key or value out of what LDM keeps in one."""

    operand: Expression
    index: int
    of: int
    dtype: Dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The operand's shape with dim 0 divided."""
        return (self.operand.shape[0] // self.of, *self.operand.shape[1:])


@dataclass(frozen=True, eq=False)
class Transposed:
    """A whole matrix with its rows as columns."""

    operand: Expression
    dtype: Dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The operand's shape the other way round."""
        return self.operand.shape[::-1]


Expression: TypeAlias = Read | Constant | Deferred | Apply | FirstChannels | RestChannels | Rows | Transposed


def operands_of(node: Expression) -> tuple[Expression, ...]:
    """What a node is made of."""
    match node:
        case Apply():
            return node.operands
        case FirstChannels() | Rows() | Transposed():
            return (node.operand,)
        case RestChannels():
            return (node.merged, node.operand)
        case _:
            return ()


@dataclass(frozen=True)
class Instruction:
    """Make `node`'s value in register `target` from the values in registers `sources`.

    `held`: it is made already, whole, by a stage; the piece that is due is taken from it.
    """

    node: Expression
    sources: tuple[int, ...]
    target: int
    held: bool = False


@dataclass(frozen=True)
class Stage:
    """A whole tensor to make and hold: piece by piece by `instructions`, or where there are none,
    by `node`'s operation on tensors that are held. `frees`: what nothing after it needs.
    """

    node: Expression
    instructions: tuple[Instruction, ...]
    registers: int
    frees: tuple[Expression, ...] = ()


@dataclass(frozen=True)
class Program:
    """An expression as a straight line of instructions over pieces of its elements.

    `registers` float32 buffers suffice, however long the chain: a register is free again after
    its last use. The result stands in the last instruction's target. Where operations need whole
    tensors, `stages` make and hold these first; all between them still goes piece by piece.
    """

    instructions: tuple[Instruction, ...]
    registers: int
    stages: tuple[Stage, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether it holds whole tensors; otherwise it runs on any piece by itself."""
        return bool(self.stages)

    @cached_property
    def nodes(self) -> tuple[Expression, ...]:
        """Everything that is read or computed, each once, operands first."""
        every = [*(i for stage in self.stages for i in stage.instructions), *self.instructions]
        calls = [stage.node for stage in self.stages if not stage.instructions]
        return tuple({id(node): node for node in [*(i.node for i in every if not i.held), *calls]}.values())

    @cached_property
    def reads(self) -> tuple[Read, ...]:
        """The tensors that it reads, each once."""
        return tuple(node for node in self.nodes if isinstance(node, Read))

    @cached_property
    def surveys(self) -> tuple[Survey, ...]:
        """What must be known before it can run, each once."""
        return tuple({id(s): s for node in self.nodes if isinstance(node, Apply) and (s := node.survey)}.values())

    @property
    def result(self) -> int:
        """The register that holds the result at the end."""
        return self.instructions[-1].target


def reads_of(expression: Expression) -> tuple[Read, ...]:
    """The tensors that an expression reads, each once."""
    if isinstance(expression, Read):
        return (expression,)
    return tuple(node for node in _in_order(expression) if isinstance(node, Read))


def _in_order(
    expression: Expression, first: Callable[[Expression], tuple[Expression, ...]] = operands_of
) -> list[Expression]:
    """Every node once, operands before what uses them. A loop, not recursion: chains may be long.

    `first` gives a node's operands in the order in which they are to be made.
    """
    order: list[Expression] = []
    seen: set[int] = set()
    stack: list[tuple[Expression, bool]] = [(expression, False)]
    while stack:
        node, ready = stack.pop()
        if ready:
            order.append(node)
        elif id(node) not in seen:
            seen.add(id(node))
            stack.append((node, True))
            stack.extend((operand, False) for operand in reversed(first(node)))
    return order


def _in_frugal_order(expression: Expression, held: frozenset[int]) -> list[Expression]:
    """The order that needs few registers: of a node's operands, the one that needs most comes first.

    What is `held` (by id) needs no operands. Sethi and Ullman, "The generation of optimal code for
    arithmetic expressions" (1970).
    """
    needs: dict[int, int] = {}

    def cut(node: Expression) -> tuple[Expression, ...]:
        return () if id(node) in held else operands_of(node)

    def hungriest_first(node: Expression) -> tuple[Expression, ...]:
        return tuple(sorted(cut(node), key=lambda operand: -needs[id(operand)]))

    for node in _in_order(expression, cut):
        operands = hungriest_first(node)
        taken = [needs[id(operand)] + number for number, operand in enumerate(operands)]
        needs[id(node)] = max(len(operands) + 1, *taken) if taken else 1
    return _in_order(expression, hungriest_first)


def compile_expression(expression: Expression) -> Program:
    """Translate an expression into a program with as few registers as its order allows."""
    stages: list[Stage] = []
    held: dict[int, Expression] = {}
    order = _in_frugal_order(expression, frozenset())
    for node in order:
        if _needs_whole(node):
            for operand in operands_of(node):
                if id(operand) not in held:
                    made_from = frozenset(held)
                    stages.append(Stage(operand, *_instructions(_in_frugal_order(operand, made_from), made_from)))
                    held[id(operand)] = operand
            stages.append(Stage(node, (), 0))
            held[id(node)] = node
    if held:
        order = _in_frugal_order(expression, frozenset(held))
    instructions, registers = _instructions(order, frozenset(held))
    return Program(instructions, registers, _freeing(stages, instructions))


def _needs_whole(node: Expression) -> bool:
    if isinstance(node, Apply):
        return node.operation.whole
    return isinstance(node, FirstChannels | RestChannels | Rows | Transposed)


def _instructions(order: list[Expression], held: frozenset[int]) -> tuple[tuple[Instruction, ...], int]:
    """The straight line that makes the last node of reads and what is held, and how many registers it needs."""
    operands = {id(node): () if id(node) in held else operands_of(node) for node in order}
    last_use = {id(operand): index for index, node in enumerate(order) for operand in operands[id(node)]}
    register: dict[int, int] = {}
    free: list[int] = []
    count = 0
    instructions = []
    for index, node in enumerate(order):
        # The target is taken before the operands' registers are given back: `out` overlaps no operand.
        if not free:
            free.append(count)
            count += 1
        target = free.pop()
        sources = tuple(register[id(operand)] for operand in operands[id(node)])
        instructions.append(Instruction(node, sources, target, id(node) in held))
        register[id(node)] = target
        free.extend({register[id(operand)] for operand in operands[id(node)] if last_use[id(operand)] == index})
    return tuple(instructions), count


def _freeing(stages: list[Stage], tail: tuple[Instruction, ...]) -> tuple[Stage, ...]:
    """The stages, each with what is held until then and needed no more."""
    last_use: dict[int, int] = {}
    for index, stage in enumerate(stages):
        uses = [i.node for i in stage.instructions if i.held] if stage.instructions else operands_of(stage.node)
        last_use.update((id(node), index) for node in uses)
    last_use.update((id(i.node), len(stages)) for i in tail if i.held)
    made = {id(stage.node): stage.node for stage in stages}
    return tuple(
        replace(stage, frees=tuple(node for key, node in made.items() if last_use[key] == index))
        for index, stage in enumerate(stages)
    )
