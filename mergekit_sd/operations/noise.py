"""Operations that draw random numbers for one model or difference; the run's seed decides them.

Annotations are evaluated (no `from __future__ import annotations` here): they are the schema.
"""

from mergekit_sd.lazy import torch
from mergekit_sd.operations.registry import operation
from mergekit_sd.operations.types import Factor, Out, PerBlock, Random, Same, Weight

# Draws are multiples of this: a lower density keeps nothing but the draw 0.
LEAST_DENSITY = 2.0**-24


@operation(
    "plain arithmetic",
    "a + alpha·N(0, 1)",
    fold=lambda alpha: "a" if alpha == 0 else None,
    also=("plus random (supermerger)",),
)
def random_noise(a: Weight, *, alpha: Factor = 0.01, draw: Random, out: Out = None) -> Weight:
    """Adds noise to every weight: normal random numbers times alpha.

    supermerger's "plus random". It leaves out the keys with `to_out`, `proj_out` and `norm`: give
    those alpha 0 to do as it does. Weights are mostly some hundredths: alpha beyond that drowns them.
    """
    return torch.add(a, draw.normal(a), alpha=alpha, out=out)


@operation(
    "plain arithmetic",
    "a·Bernoulli(density) / density",
    fold=lambda density: "a" if density == 1 else None,
    also=("DARE's drop and rescale",),
)
def dropout(a: Same, *, density: PerBlock = 0.5, draw: Random, out: Out = None) -> Same:
    """Drops values at random and scales up the rest: density is the share that stays.

    Meant for a difference of two models: what DARE does to it (Yu et al., "Language models are Super
    Mario", 2024). Each value stays with the chance density and is divided by it, so that the mean
    stays; density 0 gives zeros. sd-mecha's `probability` is 1 − density.
    """
    factor = 1.0 / density if density >= LEAST_DENSITY else 0.0
    kept = draw.uniform(a).lt_(density).mul_(factor)
    return torch.mul(a, kept, out=out)
