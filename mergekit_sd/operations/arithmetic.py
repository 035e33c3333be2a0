"""Straight lines and differences: the operations that most merges are made of.

Each function takes float32 tensors of one shape and returns a float32 tensor of that shape.
`out`, if given, is a buffer of that shape that overlaps no operand; the result is written there.
Annotations are evaluated (no `from __future__ import annotations` here): they are the schema.
"""

from typing import Annotated

from mergekit_sd.lazy import torch
from mergekit_sd.operations.registry import operation
from mergekit_sd.operations.types import ChoiceKind, Delta, Factor, Out, PerBlock, Same, Weight

TORCH_NAMES = {
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
    "fp8_e4m3fn": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
}
DTYPES = tuple(TORCH_NAMES)


@operation(
    "mix two models",
    "(1 − alpha)·a + alpha·b",
    fold=lambda alpha: {0.0: "a", 1.0: "b"}.get(alpha),
    also=("Weighted sum (A1111)", "Weight (supermerger)", "linear (mergekit)", "lerp", "ModelMergeSimple", "加权和"),
)
def weighted_sum(a: Same, b: Same, *, alpha: PerBlock = 0.5, out: Out = None) -> Same:
    """The straight line from a (alpha 0) to b (alpha 1)."""
    return torch.lerp(a, b, alpha, out=out)


@operation(
    "carry a difference onto a model",
    "a + alpha·(b − c)",
    fold=lambda alpha: "a" if alpha == 0 else None,
    mixes=(("b", "c"),),
    also=("Add difference (A1111)", "Add (supermerger)", "task arithmetic of one model", "加上差值"),
)
def add_difference(a: Weight, b: Weight, c: Weight, *, alpha: PerBlock = 1.0, out: Out = None) -> Weight:
    """What b learned since c, added to a."""
    difference = torch.sub(b, c, out=out)
    return torch.add(a, difference, alpha=alpha, out=difference)


@operation(
    "mix three models",
    "(1 − beta)·((1 − alpha)·a + alpha·b) + beta·c",
    fold=lambda alpha, beta: "c" if beta == 1 else {0.0: "a", 1.0: "b"}.get(alpha) if beta == 0 else None,
    also=("Twice (supermerger)", "sum Twice"),
)
def sum_twice(a: Same, b: Same, c: Same, *, alpha: PerBlock = 0.5, beta: PerBlock = 0.5, out: Out = None) -> Same:
    """Two weighted sums in a row: a with b by alpha, the result with c by beta."""
    first = torch.lerp(a, b, alpha, out=out)
    return torch.lerp(first, c, beta, out=first)


@operation(
    "mix three models",
    "(1 − alpha − beta)·a + alpha·b + beta·c",
    fold=lambda alpha, beta: {(0.0, 0.0): "a", (1.0, 0.0): "b", (0.0, 1.0): "c"}.get((alpha, beta)),
    also=("Triple (supermerger)", "Triple sum"),
)
def triple_sum(a: Same, b: Same, c: Same, *, alpha: PerBlock = 0.33, beta: PerBlock = 0.33, out: Out = None) -> Same:
    """Three models at once: alpha is b's share, beta is c's, a has the rest."""
    share = torch.mul(a, 1.0 - alpha - beta, out=out)
    return share.add_(b, alpha=alpha).add_(c, alpha=beta)


@operation("plain arithmetic", "a − b", also=("difference", "task vector"))
def subtract(a: Same, b: Same, *, out: Out = None) -> Delta:
    """The difference of two models: a delta, which `add` and `scale` take."""
    return torch.sub(a, b, out=out)


@operation("plain arithmetic", "a + b", also=("apply a task vector",))
def add(a: Same, b: Delta, *, out: Out = None) -> Same:
    """A delta added to a model, or to another delta."""
    return torch.add(a, b, out=out)


@operation(
    "plain arithmetic",
    "alpha·a",
    fold=lambda alpha: "a" if alpha == 1 else None,
    also=("self (supermerger)", "倍率"),
)
def scale(a: Same, *, alpha: Factor = 1.0, out: Out = None) -> Same:
    """A model's or a delta's values times alpha; any number is allowed."""
    return torch.mul(a, alpha, out=out)


@operation(
    "plain arithmetic",
    "a rounded to dtype",
    also=("cast (sd-mecha)", "convert precision"),
)
def cast(a: Same, *, dtype: Annotated[str, ChoiceKind(DTYPES)], out: Out = None) -> Same:
    """The values rounded to a dtype, which `dtype = "keep"` in an output then writes.

    An output's own dtype rounds once, at the end; this rounds on the way.
    """
    rounded = a.to(getattr(torch, TORCH_NAMES[dtype]))
    return rounded.float() if out is None else out.copy_(rounded)
