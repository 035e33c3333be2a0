"""What an operation's signature asks of a step: its operands by label, its parameters by kind.

Owns which names go where when a method changes. Must not know texts or widgets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

import mergekit_sd as mk
from mergekit_sd.errors import UsageError


class Kind(Enum):
    """How a parameter is asked for: bars, a choice of words, a number, several numbers, an expression."""

    BLOCKS = "blocks"
    CHOICE = "choice"
    NUMBER = "number"
    NUMBERS = "numbers"
    FORMULA = "formula"

    @classmethod
    def of(cls, parameter: Any) -> Kind:
        """The kind of a parameter of an operation's signature."""
        kind = parameter.kind
        if hasattr(kind, "each"):
            return cls.BLOCKS
        if hasattr(kind, "options"):
            return cls.CHOICE
        if hasattr(kind, "whole"):
            return cls.NUMBER
        return cls.NUMBERS if hasattr(kind, "names") else cls.FORMULA


def labels(step: Mapping[str, Any]) -> dict[str, str | None]:
    """The operands of a step as it is written: label to name; None where one may be and is not given."""
    operation = mk.OPERATIONS[step["op"]]
    found: dict[str, str | None] = {}
    for operand in operation.operands:
        given = step.get(operand.name)
        if operand.many:
            found |= {f"{operand.name}.{index}": _name(each) for index, each in enumerate(given or ())}
        else:
            found[operand.name] = given
    return found


def _name(entry: Any) -> str:
    """What a member of a list names; of a LoRA with its strengths, the LoRA."""
    if isinstance(entry, Mapping):
        return str(entry["lora"])
    text = str(entry)
    return text.removeprefix("<lora:").partition(":")[0].rstrip(">") if text.startswith("<lora:") else text


def fitting(operation: Any, names: Sequence[str], others: Sequence[str] = ()) -> dict[str, Any]:
    """The operands of a new step: the names in their order, then others that there are, then the first again.

    Raises UsageError where a model is asked for and there is none.
    """
    pool = [*dict.fromkeys([*names, *others])]
    if not pool and operation.operands:
        raise UsageError(f"{operation.name} needs models, and there are none.", hint="add models first")
    given = list(dict.fromkeys(names)) or pool[:1]
    rest = [name for name in pool if name not in given]
    found: dict[str, Any] = {}
    for operand in operation.operands:
        if operand.many:
            found[operand.name] = given or rest[:1] or pool[:1]
            given = []
        elif not operand.optional:
            found[operand.name] = given.pop(0) if given else rest.pop(0) if rest else pool[0]
    return found


def method_for(models: int) -> str:
    """The method that one begins with for so many models."""
    return {2: "weighted_sum", 3: "add_difference"}.get(models, "linear")


def expression(names: Sequence[str]) -> str:
    """A formula to begin with: one model, the mean of two, or the first with the difference of two others."""
    quoted = [name if name.isidentifier() else f"'{name}'" for name in names]
    if len(quoted) == 2:
        return f"0.5*{quoted[0]} + 0.5*{quoted[1]}"
    return f"{quoted[0]} + {quoted[1]} - {quoted[2]}" if len(quoted) > 2 else "".join(quoted)
