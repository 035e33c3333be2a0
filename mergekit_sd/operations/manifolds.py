"""Means of many models on the sphere: of their directions, with the mean of their norms.

All that is on the way to such a mean is a weighted sum of the models, so it is worked out on the
inner products of the pairs, in float64; the tensors are read once before and once after.

Annotations are evaluated (no `from __future__ import annotations` here): they are the schema.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Any

from mergekit_sd.lazy import torch
from mergekit_sd.operations.averages import FOR_ALL, blend, gram, only_one, shares
from mergekit_sd.operations.registry import operation
from mergekit_sd.operations.spherical import NEARLY_PARALLEL, NEARLY_ZERO
from mergekit_sd.operations.types import NumberKind, Out, PerModel, Same, Sames, Tensor

Masses = Annotated[tuple[float, ...], NumberKind(0.0, None, each=True)]
# What is left to go, in radians, when a mean is found; and how often to look.
CLOSE = 1e-10
ROUNDS = 200


@operation(
    "mix many models",
    "exp(m, Σ shareᵢ·log(m, modelᵢ/‖modelᵢ‖)) · Σ shareᵢ·‖modelᵢ‖, m = the direction of Σ shareᵢ·modelᵢ/‖modelᵢ‖",
    by="tensor",
    fold=lambda weights: only_one(weights),
    also=("multislerp (mergekit)", "Multi-SLERP", "slerp of many models"),
)
def multislerp(models: Sames, *, weights: PerModel = FOR_ALL, out: Out = None) -> Same:
    """slerp for any number of models: directions turn, norms go in a straight line; per tensor.

    Goddard's Multi-SLERP (mergekit): the models as seen from their mean direction, averaged there.
    Of two models it is `slerp`. mergekit leaves out the angle when it looks (it projects instead of
    taking the logarithm), and so gives the mean direction itself. Where directions cancel or one is
    opposite to the mean there is no one arc: those tensors get the straight line, as in `slerp`. A
    zero tensor has no direction, and only makes the norm smaller.
    """
    return _on_sphere(models, weights, 1, out)


@operation(
    "mix many models",
    "argmin u: Σ shareᵢ·angle(u, modelᵢ)², · Σ shareᵢ·‖modelᵢ‖",
    by="tensor",
    fold=lambda weights: only_one(weights),
    also=("karcher (mergekit)", "Karcher mean", "Fréchet mean", "Riemannian mean"),
)
def karcher(models: Sames, *, weights: Masses = FOR_ALL, out: Out = None) -> Same:
    """The mean direction by angles, with the mean of the norms: the middle of the models on a sphere; per tensor.

    The Karcher mean on the sphere (Karcher 1977; Buss & Fillmore, "Spherical averages", 2001): what
    `multislerp` comes to when it looks again from where it got to, until nothing moves. Of two models
    it is `slerp`. Opposite and zero tensors are as there.
    """
    return _on_sphere(models, weights, ROUNDS, out)


def _on_sphere(models: Sequence[Tensor], weights: Sequence[float], rounds: int, out: Tensor | None) -> Tensor:
    import numpy as np

    parts = np.array(shares(weights))
    inner = gram(models)
    norms = np.sqrt(np.diag(inner))
    used = (norms > NEARLY_ZERO * norms.max()) & (parts != 0)
    direction = _mean_direction(inner[np.ix_(used, used)], norms[used], parts[used], rounds)
    if direction is None:
        return blend(models, parts.tolist(), out)
    factors = np.zeros(len(models))
    factors[used] = direction / norms[used] * (parts @ norms)
    result = torch.mul(models[0], float(factors[0]), out=out)
    for model, factor in zip(models[1:], factors[1:], strict=True):
        result.add_(model, alpha=float(factor))
    return result


def _mean_direction(inner: Any, norms: Any, parts: Any, rounds: int) -> Any:
    """What of each unit vector makes their mean direction; None where there is no one such."""
    import numpy as np

    cosines = inner / norms / norms[:, None]
    length = math.sqrt(max(0.0, parts @ cosines @ parts))
    # The shares that are left may cancel, too.
    if not (length > NEARLY_PARALLEL and abs(parts.sum()) > NEARLY_PARALLEL):
        return None
    parts, mean = parts / parts.sum(), parts / length
    for _ in range(rounds):
        cosine = np.clip(cosines @ mean, -1.0, 1.0)
        angle = np.arccos(cosine)
        if angle.max() > math.pi - NEARLY_PARALLEL:
            return None
        # numpy's sinc(x) is sin(πx)/(πx), with its limit at 0.
        tangent = parts / np.sinc(angle / math.pi)
        tangent -= tangent @ cosine * mean
        length = math.sqrt(max(0.0, tangent @ cosines @ tangent))
        mean = math.cos(length) * mean + np.sinc(length / math.pi) * tangent
        mean /= math.sqrt(mean @ cosines @ mean)
        if length < CLOSE:
            break
    return mean
