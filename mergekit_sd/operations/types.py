"""The words in which an operation's signature declares its operands and parameters.

An operation is a function of float32 tensors; its annotations say which operands are models
(weights) and which are differences of models (deltas), and what each parameter may be. The
recipe's schema, the command line and the docs are read off them. No torch is imported here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional, TypeAlias

from mergekit_sd.operations.draws import Draw

if TYPE_CHECKING:
    import torch

    Tensor: TypeAlias = torch.Tensor
else:
    Tensor = Any

Space = Literal["weight", "delta", "same", "lora"]

# --- what there can be in a signature -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OperandKind:
    """What an operand or a result is. `same`: weight or delta, one and the same throughout; `lora`: a LoRA's file.

    `many`: a list of at least one; it is the last operand. `optional`: may be left out (None).
    """

    space: Space
    many: bool = False
    optional: bool = False


@dataclass(frozen=True, slots=True)
class NumberKind:
    """A number per block. `low` and `high` bound it unless the step says `extrapolate = true`.

    `each`: one for each model of the operation's list.
    """

    low: float | None = None
    high: float | None = None
    each: bool = False


@dataclass(frozen=True, slots=True)
class ChoiceKind:
    """One of a few words or whole numbers, for the whole step."""

    options: tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class SettingKind:
    """A number for the whole step, within bounds. `whole`: a whole number."""

    low: float | None = None
    high: float | None = None
    whole: bool = False


@dataclass(frozen=True, slots=True)
class ListKind:
    """A list of numbers with a meaning each, for the whole step; what is left out at the end is 0."""

    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FormulaKind:
    """An expression over names of models and steps: `"mix + 0.7*(db - sd15)"`."""


@dataclass(frozen=True, slots=True)
class ContextKind:
    """What the engine gives beside the recipe's parameters: `draw`, `key` or `survey`."""

    what: Literal["draw", "key", "survey"]


@dataclass(frozen=True, slots=True)
class Key:
    """Which tensor it is. `name`: within its component ("input_blocks.0.0.weight"); whole where that is unknown.

    `family`: "sd1", …; `component`: "unet", "vae", "text_encoder", …; `block`: "IN00", ….
    """

    name: str
    family: str | None = None
    component: str | None = None
    block: str | None = None


# --- the words ------------------------------------------------------------------------------------------

Weight = Annotated[Tensor, OperandKind("weight")]
Delta = Annotated[Tensor, OperandKind("delta")]
Same = Annotated[Tensor, OperandKind("same")]
Weights = Annotated[Sequence[Tensor], OperandKind("weight", many=True)]
Lora = Annotated[Any, OperandKind("lora")]
Loras = Annotated[Sequence[Any], OperandKind("lora", many=True)]
Sames = Annotated[Sequence[Tensor], OperandKind("same", many=True)]
# Default None; `Optional` because it is evaluated, and Tensor is Any then.
MaybeWeight = Annotated[Optional[Tensor], OperandKind("weight", optional=True)]  # noqa: UP045

PerBlock = Annotated[float, NumberKind(0.0, 1.0)]
Factor = Annotated[float, NumberKind()]
Positive = Annotated[float, NumberKind(0.0, None)]
PerModel = Annotated[tuple[float, ...], NumberKind(each=True)]
Formula = Annotated[str, FormulaKind()]

# Random numbers that depend on (seed, tensor name, element) alone; see `draws`.
Random = Annotated[Draw, ContextKind("draw")]
Which = Annotated[Key, ContextKind("key")]
Surveyed = Annotated[Any, ContextKind("survey")]

# A buffer of the result's shape that no operand uses, or None to allocate one.
Out: TypeAlias = Optional[Tensor]  # noqa: UP045
