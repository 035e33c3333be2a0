"""How one output tensor is made: a small graph of reads and operations, and its program.

Owns the fused expression and its translation into instructions over registers. Must not know
files on disk, torch, or where the expression came from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

from mergekit_sd.formats.dtypes import Dtype
from mergekit_sd.formats.tensor import TensorInfo
from mergekit_sd.operations import Operation


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
class Apply:
    """An operation on expressions of one shape; parameters are plain numbers by now.

    `dtype` is that of the first operand's tensor in its file: what `dtype = "keep"` writes.
    """

    operation: Operation
    operands: tuple[Expression, ...]
    parameters: tuple[tuple[str, float], ...]
    shape: tuple[int, ...]
    dtype: Dtype


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


Expression: TypeAlias = Read | Constant | Apply | FirstChannels | RestChannels


def _operands(node: Expression) -> tuple[Expression, ...]:
    match node:
        case Apply():
            return node.operands
        case FirstChannels():
            return (node.operand,)
        case RestChannels():
            return (node.merged, node.operand)
        case _:
            return ()


@dataclass(frozen=True)
class Instruction:
    """Make `node`'s value in register `target` from the values in registers `sources`."""

    node: Expression
    sources: tuple[int, ...]
    target: int


@dataclass(frozen=True)
class Program:
    """An expression as a straight line of instructions. Every node is computed once.

    `registers` float32 buffers suffice, however long the chain: a register is free again after
    its last use. The result stands in the last instruction's target. `whole`: the program needs
    whole tensors; otherwise it runs on any chunk of their elements.
    """

    instructions: tuple[Instruction, ...]
    registers: int
    whole: bool

    @cached_property
    def reads(self) -> tuple[Read, ...]:
        """The tensors that it reads, each once."""
        return tuple(i.node for i in self.instructions if isinstance(i.node, Read))

    @property
    def result(self) -> int:
        """The register that holds the result at the end."""
        return self.instructions[-1].target


def inputs_of(expression: Expression) -> frozenset[int]:
    """The numbers of the inputs that an expression reads."""
    return frozenset(node.input for node in _in_order(expression) if isinstance(node, Read))


def _in_order(
    expression: Expression, first: Callable[[Expression], tuple[Expression, ...]] = _operands
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


def _in_frugal_order(expression: Expression) -> list[Expression]:
    """The order that needs few registers: of a node's operands, the one that needs most comes first.

    Sethi and Ullman, "The generation of optimal code for arithmetic expressions" (1970).
    """
    needs: dict[int, int] = {}

    def hungriest_first(node: Expression) -> tuple[Expression, ...]:
        return tuple(sorted(_operands(node), key=lambda operand: -needs[id(operand)]))

    for node in _in_order(expression):
        operands = hungriest_first(node)
        held = [needs[id(operand)] + number for number, operand in enumerate(operands)]
        needs[id(node)] = max(len(operands) + 1, *held) if held else 1
    return _in_order(expression, hungriest_first)


def compile_expression(expression: Expression) -> Program:
    """Translate an expression into a program with as few registers as its order allows."""
    order = _in_frugal_order(expression)
    last_use = {id(operand): index for index, node in enumerate(order) for operand in _operands(node)}
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
        operands = _operands(node)
        instructions.append(Instruction(node, tuple(register[id(operand)] for operand in operands), target))
        register[id(node)] = target
        free.extend({register[id(operand)] for operand in operands if last_use[id(operand)] == index})
    whole = any(
        isinstance(node, FirstChannels | RestChannels) or (isinstance(node, Apply) and node.operation.whole)
        for node in order
    )
    return Program(tuple(instructions), count, whole)
