"""Operations that the plan itself carries out, because they know names and models, not only tensors.

The functions here say what they take; `formula` is also what a formula's sums are computed by.
Annotations are evaluated (no `from __future__ import annotations` here): they are the schema.
"""

from dataclasses import replace

from mergekit_sd.lazy import torch
from mergekit_sd.operations.registry import OPERATIONS, operation
from mergekit_sd.operations.types import Formula, Out, Same, Tensor


@operation(
    "plain arithmetic",
    "any sum of models and differences, such as mix + 0.7·(db − sd15)",
    planned=True,
    also=("expression",),
)
def formula(*, expr: Formula, out: Out = None) -> Same:
    """A sum of models and steps, each times a number, written as one would on paper.

    A model counts 1 and a difference 0: the result must sum up to 1 (a model) or to 0 (a
    difference), so that adding two whole models by mistake is told. A tensor that a member of a
    difference in brackets lacks has no difference; one that a whole model lacks stays as the first
    model has it.
    """
    raise NotImplementedError("planned")


def weighted_pair(x: Tensor, y: Tensor, *, factors: tuple[float, float], out: Out = None) -> Tensor:
    """factors[0]·x + factors[1]·y, element by element: a step of a formula."""
    scaled = x if factors[0] == 1 else torch.mul(x, factors[0], out=out)
    return torch.add(scaled, y, alpha=factors[1], out=out)


PAIR = replace(OPERATIONS["formula"], function=weighted_pair, planned=False)
