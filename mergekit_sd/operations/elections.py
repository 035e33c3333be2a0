"""Fine-tunes of one base that pull a value up and down: the majority's sign wins, what agrees is averaged.

The methods differ in what of each model's changes they keep for the election.

Annotations are evaluated (no `from __future__ import annotations` here): they are the schema.
"""

from collections.abc import Sequence
from typing import Annotated

from mergekit_sd.lazy import torch
from mergekit_sd.operations.averages import FOR_ALL
from mergekit_sd.operations.measures import PIECE, largest, norm, rows
from mergekit_sd.operations.noise import LEAST_DENSITY
from mergekit_sd.operations.registry import operation
from mergekit_sd.operations.task_vectors import nothing_or_one
from mergekit_sd.operations.types import ChoiceKind, Factor, Out, PerBlock, PerModel, Random, Tensor, Weight, Weights

# So much of a tensor is merged at once that what is made on the way stays in a core's cache.
BLOCK = 1 << 16
# The smallest normal float32.
LEAST_SHARE = 2.0**-126


def _folds(weights: Sequence[float], density: float, scale: float = 1.0) -> str | None:
    # Of weights only their proportions matter: that of a model alone is 1.
    return nothing_or_one([1.0 if weight > 0 else weight for weight in weights], density, scale)


@operation(
    "merge fine-tunes of one base",
    "base + scale·mean of those weighted changes that have the elected sign, of each model's largest",
    by="tensor",
    fold=lambda weights, density, vote, scale: _folds(weights, density, scale),
    also=("ties (mergekit)", "TIES-Merging", "add_difference_ties (sd-mecha)", "ties_sum (sd-mecha)"),
)
def ties(
    base: Weight,
    models: Weights,
    *,
    weights: PerModel = FOR_ALL,
    density: PerBlock = 0.2,
    vote: Annotated[str, ChoiceKind(("sum", "count"))] = "sum",
    scale: Factor = 1.0,
    out: Out = None,
) -> Weight:
    """Keeps each fine-tune's largest changes, lets the models vote on the sign, averages those that agree.

    Yadav et al., "TIES-Merging" (2023). Of each model the share density with the largest |change| of
    a tensor stays. The elected sign is that of the sum of weight·change (vote = "sum") or of most of
    them ("count"); a draw elects none. Σ weight·change / Σ |weight| of those that agree, times scale,
    is added to the base: a weight below zero turns its model's changes round. As in mergekit, a
    single model's weight does not matter.
    """
    kept = [largest(model - base, density) for model in models]
    return _elect(base, models, kept, weights, by_count=vote == "count", scale=scale, out=out)


@operation(
    "merge fine-tunes of one base",
    "as ties, of changes that stay with the chance density and are divided by it",
    fold=lambda weights, density: _folds(weights, density),
    also=("dare_ties (mergekit)", "add_ties_with_dare (sd-mecha)"),
)
def dare_ties(
    base: Weight,
    models: Weights,
    *,
    weights: PerModel = FOR_ALL,
    density: PerBlock = 0.5,
    draw: Random,
    out: Out = None,
) -> Weight:
    """Drops most of each fine-tune's changes at random, scales up the rest, then elects signs as ties.

    Yu et al., "Language models are Super Mario" (2024), with the election of Yadav et al. (2023). What
    is dropped neither votes nor counts in the mean. Every model has draws of its own; see `dare_linear`.
    """
    kept = [draw.uniform(base, stream=index).lt_(density) for index, _ in enumerate(models)]
    rest = 1.0 / density if density >= LEAST_DENSITY else 0.0
    return _elect(base, models, kept, weights, scale=rest, out=out)


@operation(
    "merge fine-tunes of one base",
    "as ties, of changes that stay with the chance p and are divided by it, "
    "p = density ± epsilon by the rank of |change| in its row",
    by="row",
    fold=lambda weights, density, epsilon: _folds(weights, density),
    also=("della (mergekit)", "DELLA-Merging", "MAGPRUNE"),
)
def della(
    base: Weight,
    models: Weights,
    *,
    weights: PerModel = FOR_ALL,
    density: PerBlock = 0.5,
    epsilon: PerBlock = 0.15,
    draw: Random,
    out: Out = None,
) -> Weight:
    """As dare_ties, but large changes are likelier to stay than small ones of the same output unit.

    Deep et al., "DELLA-Merging" (2024). The chance goes from density − epsilon, of a row's smallest
    change, to density + epsilon (mergekit's epsilon; the paper's is twice that). A row is all inputs
    of an output unit; a vector is one row. Where the chance would leave 0 to 1, epsilon is made
    smaller (mergekit refuses), so that density is the share that stays.
    """
    kept = [_by_rank(model - base, density, epsilon, draw.uniform(base, stream=i)) for i, model in enumerate(models)]
    return _elect(base, models, kept, weights, out=out)


@operation(
    "merge fine-tunes of one base",
    "base + Σ wᵢ·changeᵢ / Σ wᵢ of those with the sign of Σ changeᵢ, where they vary most; wᵢ = mean changeᵢ²",
    by="tensor",
    fold=lambda density: "base" if density == 0 else None,
    also=("sce (mergekit)", "SCE-Merging", "FuseChat 3.0"),
)
def sce(base: Weight, models: Weights, *, density: PerBlock = 0.1, out: Out = None) -> Weight:
    """Takes the changes in which the fine-tunes differ most; the more a model changed, the more it counts.

    Wan et al., "FuseChat: Knowledge Fusion of Chat Models" (2024): select, calculate, erase; per tensor. The share
    density with the largest variance over the models is selected, of these each model's mean square
    is its weight, and what is against the sign of the sum is erased. Where the models agree nothing
    is selected, unless density is 1; so a single model does something at density 1 only.
    """
    kept = _most_varied(models, density)
    sizes = [norm((model - base).mul_(kept)) for model in models]
    largest_size = max(sizes) or 1.0
    weights = [(size / largest_size) ** 2 for size in sizes]
    return _elect(base, models, [kept] * len(models), weights, unweighted=True, out=out)


# --- what is kept --------------------------------------------------------------------------------------


def _by_rank(change: Tensor, density: float, epsilon: float, uniform: Tensor) -> Tensor:
    """1/p where a change is kept, else 0; its chance p goes by its rank in its row."""
    kept = change.new_empty(change.shape)
    columns = rows(change).shape[1]
    width = min(epsilon, density, 1.0 - density) if columns > 1 else 0.0
    by_rank = torch.linspace(density - width, density + width, columns, device=change.device)
    length = max(1, PIECE // max(1, columns))
    for changes, numbers, piece in zip(
        *(torch.split(rows(each), length) for each in (change, uniform, kept)), strict=True
    ):
        order = torch.argsort(changes.abs(), dim=1, stable=True)
        chance = torch.empty_like(changes).scatter_(1, order, by_rank.expand_as(order))
        stays = (numbers < chance) & (chance >= LEAST_DENSITY)
        piece.copy_(torch.where(stays, chance.reciprocal_(), 0.0))
    return kept


def _most_varied(models: Sequence[Tensor], density: float) -> Tensor:
    """A mask of the share `density` of elements that vary most over the models; without any that do not."""
    spread = models[0].new_zeros(models[0].shape)
    if not spread.numel():
        return spread.bool()
    for into, *pieces in zip(*(torch.split(each.flatten(), BLOCK) for each in (spread, *models)), strict=True):
        wide = torch.stack(pieces).double()
        # From the first model, so that equal ones are at no distance from their mean.
        wide = wide - wide[0]
        into.copy_((wide - wide.mean(dim=0)).square_().sum(dim=0).sqrt_())
    chosen = largest(spread, density)
    return chosen if density >= 1 else chosen & (spread > 0)


# --- the election --------------------------------------------------------------------------------------


def _elect(
    base: Tensor,
    models: Sequence[Tensor],
    kept: Sequence[Tensor],
    weights: Sequence[float],
    *,
    by_count: bool = False,
    unweighted: bool = False,
    scale: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """base + scale·Σ wᵢ·changeᵢ / Σ |wᵢ| over the changes of the elected sign; changeᵢ = keptᵢ·(modelᵢ − base).

    The sign is elected by Σ wᵢ·changeᵢ: by the count of its terms' signs, or unweighted.
    """
    heaviest = max(map(abs, weights)) or 1.0
    # Equal weights of any size become 1: changes that cancel do so exactly.
    weights = [weight / heaviest for weight in weights]
    result = base.new_empty(base.shape) if out is None else out
    tensors = (result, base, *models, *kept)
    for piece, start, *parts in zip(*(torch.split(each.flatten(), BLOCK) for each in tensors), strict=True):
        those, masks = parts[: len(models)], parts[len(models) :]
        changes = [model.sub(start).mul_(mask) for model, mask in zip(those, masks, strict=True)]
        votes, share, total = (torch.zeros_like(start) for _ in range(3))
        for change, weight in zip(changes, weights, strict=True):
            if unweighted:
                votes.add_(change)
            change.mul_(weight)
            if not unweighted:
                votes.add_(change.sign() if by_count else change)
        votes.sign_()
        for change, weight in zip(changes, weights, strict=True):
            # As numbers, 0 and 1: arithmetic with booleans is five times as slow.
            agrees = change.sign().eq_(votes)
            share.add_(agrees, alpha=abs(weight))
            total.addcmul_(change, agrees)
        # Where none agrees, total is 0, too.
        torch.addcdiv(start, total, share.clamp_(min=LEAST_SHARE), value=scale, out=piece)
    return result
