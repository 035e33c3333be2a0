"""Fine-tunes of one base by what each changed of it: sums of the changes (task vectors), whole or in part.

Methods in which the models first vote on a sign are in `elections`.

Annotations are evaluated (no `from __future__ import annotations` here): they are the schema.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from mergekit_sd.lazy import torch
from mergekit_sd.operations.averages import FOR_ALL, blend, gram
from mergekit_sd.operations.measures import largest
from mergekit_sd.operations.noise import LEAST_DENSITY
from mergekit_sd.operations.registry import operation
from mergekit_sd.operations.types import (
    Factor,
    Out,
    PerBlock,
    PerModel,
    Positive,
    Random,
    Tensor,
    Weight,
    Weights,
)


def nothing_or_one(weights: Sequence[float], density: float = 1.0, scale: float = 1.0) -> str | None:
    """The operand that base + scale·Σ weightᵢ·(modelᵢ − base) equals, if it does."""
    factors = [scale * weight for weight in weights]
    if density == 0 or not any(factors):
        return "base"
    alone = density == 1 and factors.count(0.0) == len(factors) - 1 and 1.0 in factors
    return f"models.{factors.index(1.0)}" if alone else None


@operation(
    "merge fine-tunes of one base",
    "base + scale·Σ weightᵢ·(modelᵢ − base)",
    fold=lambda weights, scale: nothing_or_one(weights, scale=scale),
    also=("task_arithmetic (mergekit)", "add difference of many models", "task vectors"),
)
def task_arithmetic(
    base: Weight, models: Weights, *, weights: PerModel = FOR_ALL, scale: Factor = 1.0, out: Out = None
) -> Weight:
    """Adds up what each fine-tune changed of the base: add-difference with any number of models.

    Ilharco et al., "Editing models with task arithmetic" (2023). A weight below zero takes away what
    its model learned. The changes add up; they are not averaged: many full weights overshoot.
    """
    return _add_up(base, (model - base for model in models), [scale * weight for weight in weights], out)


@operation(
    "merge fine-tunes of one base",
    "base + Σ weightᵢ·(modelᵢ − base)·Bernoulli(density) / density",
    fold=lambda weights, density: nothing_or_one(weights, density),
    also=("dare_linear (mergekit)", "DARE", "supermario"),
)
def dare_linear(
    base: Weight,
    models: Weights,
    *,
    weights: PerModel = FOR_ALL,
    density: PerBlock = 0.5,
    draw: Random,
    out: Out = None,
) -> Weight:
    """Drops most of each fine-tune's changes at random, scales up the rest, and adds them up.

    Yu et al., "Language models are Super Mario" (2024). Each change stays with the chance density
    and is divided by it, so that the mean stays (mergekit scales by what the draw left of Σ|change|,
    which it does not keep). Every model has draws of its own. Density 0 gives the base.
    """
    rest = 1.0 / density if density >= LEAST_DENSITY else 0.0
    changes = ((model - base).mul_(draw.uniform(base, stream=index).lt_(density)) for index, model in enumerate(models))
    return _add_up(base, changes, [rest * weight for weight in weights], out)


@operation(
    "merge fine-tunes of one base",
    "base + Σ weightᵢ·(modelᵢ − base), where |modelᵢ − base| is neither of the largest nor of the smallest",
    by="tensor",
    fold=lambda weights, density, gamma: nothing_or_one(weights, density),
    also=("breadcrumbs (mergekit)", "Model Breadcrumbs"),
)
def breadcrumbs(
    base: Weight,
    models: Weights,
    *,
    weights: PerModel = FOR_ALL,
    density: PerBlock = 0.9,
    gamma: PerBlock = 0.01,
    out: Out = None,
) -> Weight:
    """Leaves out each fine-tune's largest changes and its smallest, and adds up the rest; per tensor.

    Davari & Belilovsky, "Model Breadcrumbs" (2023), in mergekit's terms: density is the share that
    stays, gamma the share of the largest that go; the smallest make up the rest. Where there is no
    room for gamma beside density, fewer of the largest go.
    """
    changes = ((model - base).mul_(_middle(model - base, density, gamma)) for model in models)
    return _add_up(base, changes, weights, out)


def _middle(change: Tensor, density: float, gamma: float) -> Tensor:
    """A mask of `density` of the elements: the largest after the first `gamma`."""
    size = max(1, change.numel())
    kept = round(density * size)
    left_out = min(round(gamma * size), size - kept)
    return largest(change, (left_out + kept) / size) ^ largest(change, left_out / size)


def _add_up(base: Tensor, changes: Iterable[Tensor], factors: Sequence[float], out: Tensor | None) -> Tensor:
    total = torch.zeros_like(base) if out is None else out.zero_()
    for change, factor in zip(changes, factors, strict=True):
        total.add_(change, alpha=factor)
    return total.add_(base)


@operation(
    "merge fine-tunes of one base",
    "(1 − t)·base + t·mean(models), t = n·c / (1 + (n − 1)·c), c = the mean cosine of the pairs of changes",
    by="tensor",
    also=("model_stock (mergekit)", "n_model_stock (sd-mecha)"),
)
def model_stock(base: Weight, models: Weights, *, out: Out = None) -> Weight:
    """The mean of the fine-tunes, pulled back to the base as far as their changes disagree; per tensor.

    Jang et al., "Model Stock" (2024): from the angles between the changes it reckons where the middle
    of all such fine-tunes is. All pairs count (sd-mecha: neighbours in the list only). Changes at
    right angles, or that pull apart, give the base (the formula goes on to minus infinity there);
    equal ones give the mean. One model is the result itself. A model that changed nothing is at a
    right angle to all.
    """
    n, c = len(models), _mean_cosine(gram(models, base)) if len(models) > 1 else 1.0
    mean = blend(models, [1.0 / n] * n, out)
    return torch.lerp(base, mean, n * c / (1.0 + (n - 1) * c), out=mean)


def _mean_cosine(inner: Any) -> float:
    """The mean of the cosines of all pairs, from their inner products; 0 to 1."""
    import numpy as np

    norms = np.sqrt(np.diag(inner))
    lengths = norms * norms[:, None]
    with np.errstate(invalid="ignore"):
        cosines = np.divide(inner, lengths, out=np.zeros_like(inner), where=lengths != 0)
    return float(np.clip(cosines[~np.eye(len(inner), dtype=bool)].mean(), 0.0, 1.0))


# --- what one changed, and what several did --------------------------------------------------------------


@operation(
    "merge fine-tunes of one base",
    "base + the mean of those modelᵢ − base that are more than epsilon",
    also=("ram (mergekit)", "Reinforced Agent Merging"),
)
def ram(base: Weight, models: Weights, *, epsilon: Positive = 1e-5, out: Out = None) -> Weight:
    """Keeps whole what one fine-tune alone changed, and takes the mean where several changed the same value.

    Yuan et al., "Behavior Knowledge Merge in Reinforced Agentic Models" (2026): RAM. A plain mean
    makes a change of one model among n an n-th of it. Changes up to epsilon are none.
    """
    total = torch.zeros_like(base) if out is None else out.zero_()
    count = torch.zeros_like(base)
    for model in models:
        change = model - base
        changed = change.abs().gt_(epsilon)
        total.addcmul_(change, changed)
        count.add_(changed)
    return total.div_(count.clamp_(min=1)).add_(base)


@operation(
    "merge fine-tunes of one base",
    "as ram; what only modelᵢ changed, times 1 + r·min(sharedᵢ/uniqueᵢ, alpha)",
    by="tensor",
    also=("ramplus_tl (mergekit)", "RAM+"),
)
def ramplus_tl(
    base: Weight,
    models: Weights,
    *,
    epsilon: Positive = 1e-5,
    r: Positive = 0.1,
    alpha: Positive = 0.2,
    out: Out = None,
) -> Weight:
    """As ram, and strengthens a fine-tune's own changes the more of its others are averaged; per tensor.

    RAM+ of the same paper (Yuan et al. 2026), reckoned for each tensor as in mergekit. Of the values
    that a model changed, `shared` others changed, too, and `unique` it alone; alpha bounds what of
    their quotient counts, r is how much.
    """
    changed = [(model - base).abs() > epsilon for model in models]
    count = torch.zeros_like(base)
    for each in changed:
        count.add_(each)
    alone = count == 1
    count.clamp_(min=1)
    total = torch.zeros_like(base)
    for model, each in zip(models, changed, strict=True):
        unique = int((each & alone).sum())
        shared = int(each.sum()) - unique
        gain = 1.0 + r * min(shared / max(unique, 1), alpha)
        total.add_((model - base).mul_(each).mul_(torch.where(alone, gain, 1.0)))
    return total.div_(count).add_(base)
