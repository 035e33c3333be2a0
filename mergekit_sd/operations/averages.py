"""Means of many models, and what else is made of them alone: shares, inner products.

Annotations are evaluated (no `from __future__ import annotations` here): they are the schema.
"""

import math
from collections.abc import Sequence
from typing import Any

from mergekit_sd.lazy import torch
from mergekit_sd.operations.measures import PIECE
from mergekit_sd.operations.registry import operation
from mergekit_sd.operations.types import Out, PerModel, Same, Sames, Tensor

# A parameter that each model has its own of may be given as one number, which the engine repeats.
FOR_ALL: Any = 1.0
# Weights whose sum is this small beside them cancel: no model is a millionth of what it is made of.
LEAST_SUM = 1e-6
# Points this near each other, beside the farthest, are one: inner products do not tell them apart.
NEARNESS = 1e-7
ROUNDS = 1000


@operation("mix many models", "(models.0 + models.1 + …) / n", also=("n_average (sd-mecha)", "mean", "uniform soup"))
def n_average(models: Sames, *, out: Out = None) -> Same:
    """The plain mean of any number of models: all count the same.

    "Uniform soup" in Wortsman et al., "Model soups" (2022). Where all models are equal, so is the
    result, bit for bit.
    """
    return blend(models, [1.0 / len(models)] * len(models), out)


@operation(
    "mix many models",
    "Σ weightᵢ·modelᵢ / Σ weightᵢ",
    fold=lambda weights: only_one(weights),
    also=("weighted average", "model soup"),
)
def linear(models: Sames, *, weights: PerModel = FOR_ALL, out: Out = None) -> Same:
    """The weighted mean of any number of models; only the weights' proportions matter.

    mergekit's linear, normalised. A weight below zero takes its model away from the others. Where
    weights cancel (their sum is less than a millionth of their magnitudes', or all are 0) there is
    no such mean: all models count the same then.
    """
    return blend(models, shares(weights), out)


@operation(
    "mix many models",
    "argmin x: Σ ‖x − modelᵢ‖",
    by="tensor",
    also=("geometric_median (sd-mecha)", "Weiszfeld", "robust mean"),
)
def geometric_median(models: Sames, *, out: Out = None) -> Same:
    """The point with the least sum of distances to all models: one odd model hardly moves it; per tensor.

    Weiszfeld (1937), with Vardi & Zhang's step where it meets a model (2000). It can be one of the
    models: then it is that one exactly. Of two models it is the mean; of models on one line, where
    many points are as good, it is the first that is found on the way from the mean.
    """
    return blend(models, _nearest_to_all(gram(models, models[0])), out)


# --- sums of models ------------------------------------------------------------------------------------


def only_one(weights: Sequence[float]) -> str | None:
    """The model that a mean consists of, if only one has a weight."""
    counting = [index for index, weight in enumerate(weights) if weight or len(weights) == 1]
    return f"models.{counting[0]}" if len(counting) == 1 else None


def shares(weights: Sequence[float]) -> list[float]:
    """What each weight is of their sum; equal shares where they cancel."""
    total = math.fsum(weights)
    if abs(total) <= LEAST_SUM * math.fsum(map(abs, weights)):
        return [1.0 / len(weights)] * len(weights)
    return [weight / total for weight in weights]


def blend(models: Sequence[Tensor], parts: Sequence[float], out: Tensor | None) -> Tensor:
    """Σ partᵢ·modelᵢ for parts that add up to 1, as a running mean: what is equal stays so, bit for bit.

    The largest part comes first: no sum on the way is near zero, even where some are negative.
    """
    (total, mean), *others = sorted(zip(parts, models, strict=True), key=lambda pair: -pair[0])
    for part, model in others or [(0.0, mean)]:
        total += part
        mean = out = torch.lerp(mean, model, part / total, out=out)
    return mean


def gram(models: Sequence[Tensor], origin: Tensor | None = None) -> Any:
    """The inner products of all pairs of models (of what they are from `origin`): float64, a numpy matrix.

    What is made of weighted sums can be worked out on these few numbers instead of on the models.
    """
    total = torch.zeros(len(models), len(models), dtype=torch.float64, device=models[0].device)
    given = models if origin is None else (origin, *models)
    for pieces in zip(*(torch.split(each.flatten(), PIECE) for each in given), strict=True):
        wide = torch.stack(pieces).double()
        if origin is not None:
            wide = wide[1:] - wide[0]
        total += wide @ wide.T
    return total.cpu().numpy()


def _nearest_to_all(inner: Any) -> list[float]:
    """The parts of the geometric median of points, from their inner products."""
    import numpy as np

    if not np.isfinite(inner).all():
        return [1.0 / len(inner)] * len(inner)
    squares = np.diag(inner)
    near = NEARNESS * math.sqrt(max(0.0, np.max(squares[:, None] + squares - 2 * inner)))

    def look(parts: Any) -> tuple[Any, float, int]:
        """From a point of these parts: where the other models draw it, how hard, and how many are here."""
        products = inner @ parts
        distances = np.sqrt(np.maximum(parts @ products - 2 * products + squares, 0.0))
        here = distances <= near
        pulls = np.divide(1.0, distances, out=np.zeros_like(distances), where=~here)
        if not pulls.any():
            return parts, 0.0, int(here.sum())
        toward = pulls / pulls.sum()
        way = toward - parts
        return toward, float(pulls.sum() * math.sqrt(max(0.0, way @ inner @ way))), int(here.sum())

    for point in np.eye(len(inner)):
        _, force, here = look(point)
        if force < here * (1 - NEARNESS):
            return list(map(float, point))
    parts = np.full(len(inner), 1.0 / len(inner))
    for _ in range(ROUNDS):
        toward, force, here = look(parts)
        stay = min(1.0, here / force) if force else 1.0
        step = (1.0 - stay) * (toward - parts)
        parts = parts + step
        if np.abs(step).max() <= 1e-12:
            break
    return list(map(float, parts))
