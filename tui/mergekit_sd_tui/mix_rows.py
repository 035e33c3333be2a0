"""The Mix screen's lists in words: the recipe as a small graph, and what a step is made of.

Owns lines and their ids. Must not know widgets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mergekit_sd as mk
from mergekit_sd.text import shown
from mergekit_sd_tui import drafting, weights
from mergekit_sd_tui.glyphs import glyphs
from mergekit_sd_tui.operands import Kind


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a list. `id`: what it is of, "step:mix", "operand:models.0", …; `None` cannot be chosen."""

    id: str | None
    label: str
    words: str = ""

    def text(self, width: int) -> str:
        """The label in a column of its own, then the words."""
        return f"{shown(self.label):<{width}}  {shown(self.words)}" if self.words else shown(self.label)


def graph(recipe: mk.Recipe, step: str | None) -> list[Line]:
    """Models, then steps so that operands come first, then outputs: what is made of what, from top to bottom."""
    signs = glyphs()
    lines = [Line(f"model:{name}", f" {name}", ref.file) for name, ref in recipe.models.items()]
    for name, each in recipe.steps.items():
        sources = ", ".join(each.operands.values())
        sign = signs.here if name == step else " "
        lines.append(Line(f"step:{name}", f"{sign}{name}", f"{each.operation.name} of {sources}"))
    for name, output in recipe.outputs.items():
        lines.append(Line(f"output:{name}", f"{signs.arrow}{name}", f"{output.model} {signs.arrow} {output.file}"))
    return lines


def fields(step: Any, table: Mapping[str, Any], parameter: str | None) -> list[Line]:
    """A step's method, operands and parameters, as they are written or by default."""
    dots = glyphs().ellipsis
    lines = [Line("method", " method", step.operation.name)]
    for operand in step.operation.operands:
        if operand.many:
            entries = [(label, name) for label, name in step.operands.items() if label.startswith(f"{operand.name}.")]
            lines += [Line(f"operand:{label}", f" {label}", name) for label, name in entries]
            lines.append(Line(f"operand:{operand.name}.{len(entries)}", f" {operand.name}", f"one more {dots}"))
        else:
            lines.append(Line(f"operand:{operand.name}", f" {operand.name}", step.operands.get(operand.name, "none")))
    lines += _parameters(step, table, parameter)
    if any(Kind.of(each) is Kind.BLOCKS and not _is_free(each) for each in step.operation.parameters):
        lines.append(Line("extrapolate", " extrapolate", "true" if step.extrapolate else "false"))
    if step.operation.seeded:
        lines.append(Line("seed", " seed", "the recipe's" if step.seed is None else str(step.seed)))
    return lines


def _is_free(parameter: Any) -> bool:
    return parameter.kind.low is None and parameter.kind.high is None


def _parameters(step: Any, table: Mapping[str, Any], here: str | None) -> Iterator[Line]:
    for parameter in step.operation.parameters:
        if Kind.of(parameter) is not Kind.BLOCKS:
            value = table.get(parameter.name, parameter.default)
            words = ", ".join(f"{each:g}" for each in value) if isinstance(value, list | tuple) else str(value)
            yield Line(f"parameter:{parameter.name}", f" {parameter.name}", words)
            continue
        for name in names_of(step, parameter):
            value = drafting.value_in(table, name)
            sign = glyphs().here if name == here else " "
            yield Line(f"parameter:{name}", f"{sign}{name}", weights.shortly(value))


def names_of(step: Any, parameter: Any) -> list[str]:
    """`alpha`; of one that each model has its own of, `weights.0`, `weights.1`, …."""
    if not parameter.kind.each:
        return [parameter.name]
    return [name for name in step.parameters if name.startswith(f"{parameter.name}.")]


def bars_of(step: Any) -> list[str]:
    """The parameters of a step that have a number per block."""
    return [
        name
        for parameter in step.operation.parameters
        if Kind.of(parameter) is Kind.BLOCKS
        for name in names_of(step, parameter)
    ]


def formula(operation: Any) -> str:
    """How a method computes, and what it is for, out of its own docstring."""
    told = mk.describe_operation(operation)
    return f"{told['formula']}    {told['summary']}"
