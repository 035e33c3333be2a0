"""The formulas of the LoRA family: what a module's parts make of a weight or a bias.

Pure functions of float32 (or float64) tensors, on the operands' device; a tensor of the checkpoint is
asked for one by one. Must not know files or names of layers: errors come without them, and who calls
adds them. A row block of a fused tensor is a weight of its own here.
"""

from __future__ import annotations

from collections.abc import Iterable

from mergekit_sd.adapters.algorithms.algorithm import Algorithm, Parts, Shape, Shaped, Shapes, Single
from mergekit_sd.adapters.algorithms.dora import decomposed
from mergekit_sd.adapters.algorithms.full import FULL, NORM, expect_whole, whole
from mergekit_sd.adapters.algorithms.glora import GLORA
from mergekit_sd.adapters.algorithms.ia3 import IA3
from mergekit_sd.adapters.algorithms.loha import LOHA
from mergekit_sd.adapters.algorithms.lokr import LOKR
from mergekit_sd.adapters.algorithms.lora import LORA
from mergekit_sd.adapters.algorithms.oft import BLOCKS, OFT, OFT_OF_ROTATIONS
from mergekit_sd.adapters.algorithms.oft_of_inputs import OFT_OF_INPUTS
from mergekit_sd.adapters.algorithms.parts import SETTINGS, expect_number, number
from mergekit_sd.adapters.styles import ALPHA, BIAS_PARTS
from mergekit_sd.errors import MalformedFile, UsageError, WrongFormat
from mergekit_sd.operations.types import Tensor
from mergekit_sd.text import listed

_PLAIN = (LORA, LOHA, LOKR)
ALGORITHMS = (*_PLAIN, *map(decomposed, _PLAIN), IA3, GLORA, OFT, OFT_OF_ROTATIONS, OFT_OF_INPUTS, FULL, NORM)
_TLORA = {"q_layer.weight", "p_layer.weight", "lambda_layer"}


def identify(names: Iterable[str]) -> Algorithm:
    """What a module with these parts does to a weight. What it says of a bias may stand beside any.

    Raises WrongFormat for T-LoRA, MalformedFile for parts that make no algorithm.
    """
    parts = frozenset(names) - BIAS_PARTS
    for algorithm in ALGORITHMS:
        if parts <= algorithm.takes and any(need <= parts for need in algorithm.needs):
            return algorithm
    raise _unknown(parts)


def rank_of(parts: Shapes) -> int | None:
    """The rank of a module, by shapes alone; None where it has none. Raises as `identify`, and ShapeMismatch."""
    return identify(parts).rank(parts)


def check(parts: Shapes, shape: Shape) -> None:
    """Refuse parts that do not fit a weight of that shape, by shapes alone: headers will do.

    Raises ShapeMismatch, MalformedFile, or WrongFormat.
    """
    identify(parts).check(parts, shape)
    for name in sorted(SETTINGS & parts.keys()):
        expect_number(parts, name)


def check_bias(parts: Shapes, shape: Shape) -> None:
    """As `check`, for what the parts say of a bias."""
    expect_whole(parts, _bias_part(parts), shape)


def apply(weight: Tensor, parts: Parts, strength: float, *, kohya_oft: bool = False) -> Tensor:
    """The weight with a module put into it at a strength; a new tensor. At strength 0 it is equal.

    `kohya_oft`: the module is of kohya's own OFT ("oft_unet_…"), where alpha 0 lets nothing turn; with LyCORIS it
    sets no limit. Raises as `check`, and MalformedFile for numbers that cannot be meant.
    """
    shape = tuple(weight.shape)
    check(parts, shape)
    algorithm = identify(parts)
    nothing_turns = kohya_oft and BLOCKS in parts and number(parts, ALPHA) == 0.0
    if strength == 0.0 or nothing_turns:
        return weight.clone()
    if algorithm.change is not None:
        return algorithm.change(weight, parts, strength)
    return weight.add(delta_of(parts, shape), alpha=strength)


def apply_bias(bias: Tensor, parts: Parts, strength: float) -> Tensor:
    """The bias with what a module says of it added at a strength; a new tensor. Raises as `check_bias`."""
    shape = tuple(bias.shape)
    check_bias(parts, shape)
    return bias.add(whole(parts, _bias_part(parts), shape), alpha=strength)


def delta_of(parts: Parts, shape: Shape) -> Tensor:
    """What an additive module adds at strength 1 to a weight of that shape; a new tensor.

    Raises as `apply`, and UsageError where the change depends on the weight.
    """
    check(parts, shape)
    algorithm = identify(parts)
    if algorithm.delta is None:
        raise UsageError(
            f"What {algorithm.name} changes depends on the weight that it is put into.",
            hint="put it into its base model and take the difference of the two models",
        )
    return algorithm.delta(parts, shape)


def to_full(parts: Parts, shape: Shape) -> dict[str, Tensor]:
    """The parts of a whole difference (`diff`, `diff_b`) that does the same. Raises as `delta_of`."""
    full = {"diff": delta_of(parts, shape)}
    if parts.keys() & BIAS_PARTS:
        full["diff_b"] = parts[_bias_part(parts)].clone()
    return full


def _bias_part(parts: Shapes) -> str:
    name = next((name for name in sorted(BIAS_PARTS) if name in parts), None)
    if name is None:
        raise MalformedFile("Nothing here is for a bias.", details=[_there(parts)])
    return name


def _unknown(parts: frozenset[str]) -> WrongFormat | MalformedFile:
    if parts & _TLORA:
        return WrongFormat(
            "This is T-LoRA: what it adds is not in the file, and differs at each step of sampling.",
            hint="no tool can merge it; train as LoRA",
            details=["it adds the difference from the factors that its training began with", _there(parts)],
        )
    if not parts - SETTINGS:
        return MalformedFile("Nothing here is for a weight.", details=[_there(parts)])
    likely = next((each for each in ALGORITHMS if parts <= each.takes), None)
    if likely is None:
        return MalformedFile("No algorithm has these parts together.", details=[_there(parts)])
    missing = min((need - parts for need in likely.needs), key=lambda names: (len(names), sorted(names)))
    return MalformedFile(f"Parts of {likely.name} are missing: {listed(sorted(missing))}.", details=[_there(parts)])


def _there(parts: Iterable[str]) -> str:
    names = sorted(parts)
    return f"there are: {listed(names, 20)}" if names else "there are no parts"


__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "Parts",
    "Shape",
    "Shaped",
    "Shapes",
    "Single",
    "apply",
    "apply_bias",
    "check",
    "check_bias",
    "delta_of",
    "identify",
    "rank_of",
    "to_full",
]
