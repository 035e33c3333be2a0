"""Two models other than by a straight line: products, projections, bounds, choices.

Annotations are evaluated (no `from __future__ import annotations` here): they are the schema.
"""

import functools
import math

from mergekit_sd.lazy import torch
from mergekit_sd.operations.measures import PIECE, dot, norm, rows
from mergekit_sd.operations.registry import operation
from mergekit_sd.operations.spherical import NEARLY_ZERO
from mergekit_sd.operations.types import Out, PerBlock, Positive, Same, Sames, Tensor

# What weighted_subtraction divides by at the least: a million times the difference is no model any more.
LEAST_REST = 1e-6
# What mergekit adds to a softmax, so that no logarithm is of zero.
SOFTMAX_FLOOR = 1e-8


@operation(
    "mix two models",
    "Re(a^(1 − alpha) · b^alpha)",
    fold=lambda alpha: {0.0: "a", 1.0: "b"}.get(alpha),
    also=("geometric_sum (sd-mecha)", "Geometric Sum (Chattiori)", "geometric mean"),
)
def geometric_sum(a: Same, b: Same, *, alpha: PerBlock = 0.5, out: Out = None) -> Same:
    """The weighted geometric mean: a value stays large only where both models have it large.

    sd-mecha's formula, the real part of complex powers: of two negative values the mean is
    negative; of opposite signs it is cos(π·alpha) times the mean of the magnitudes, with a's sign.
    Zero to the power of 0 is 1, so that alpha 0 is a and alpha 1 is b, and zero otherwise.
    """
    # The angle of the product is 0, π, or π·alpha away from a's: its cosine needs no complex numbers.
    turned = torch.signbit(a) ^ torch.signbit(b)
    mean = torch.abs(a, out=out).pow_(1.0 - alpha).mul_(torch.abs(b).pow_(alpha))
    mean.copysign_(a)
    return mean.mul_(torch.where(turned, math.cos(math.pi * alpha), 1.0))


@operation(
    "mix two models",
    "b − (a·b / a·a)·a",
    by="tensor",
    also=("perpendicular_component (sd-mecha)", "vector rejection"),
)
def perpendicular(a: Same, b: Same, *, out: Out = None) -> Same:
    """What b has that is not along a: the part of b at a right angle to a; per tensor.

    The Gram-Schmidt step (sd-mecha's perpendicular_component). Most useful of differences: what
    one fine-tune learned that the other did not. Where a is zero, all of b.
    """
    norm_a, norm_b = norm(a), norm(b)
    share = 0.0 if norm_a <= NEARLY_ZERO * norm_b else dot(a, b) / norm_a**2
    return torch.sub(b, a, alpha=share, out=out)


@operation(
    "mix two models",
    "(1 − k)·a + k·b, k = min(t / |a − b|, 1)",
    fold=lambda t: "a" if t == 0 else None,
    also=("nearswap (mergekit)",),
)
def nearswap(a: Same, b: Same, *, t: Positive = 1e-4, out: Out = None) -> Same:
    """Takes b's value where it is nearer to a's than t; elsewhere a moves towards b by t.

    alchemonaut's NearSwap, as in mergekit (which takes no distance for less than 1e-6).
    """
    # a + k(b − a) goes min(t, |b − a|) from a towards b: it is b within t of a. No division is needed.
    low = torch.sub(a, t, out=out)
    return torch.clamp(b, low, a + t, out=low)


@operation(
    "mix two models",
    "b where |b − a|·KL(softmax b ‖ softmax a) ≥ median + 1.5·(Q3 − Q1) of all, else a",
    by="tensor",
    also=("arcee_fusion (mergekit)", "Arcee Fusion"),
)
def arcee_fusion(a: Same, b: Same, *, out: Out = None) -> Same:
    """Takes from b only what stands out among its changes to a; the rest stays a's.

    Arcee's Fusion, as in mergekit, of a as the base. A row's softmax runs over all inputs of an
    output unit (in mergekit over the last dimension, which of a 1×1 kernel is one number: the
    divergence is 0 and all of b is taken). Quartiles are of all values (mergekit: of a sample).
    """
    changes = a.new_empty(a.shape)
    length = max(1, PIECE // max(1, rows(a).shape[1]))
    for x, y, change in zip(*(torch.split(rows(each), length) for each in (a, b, changes)), strict=True):
        # In float32 the divergence of near models would be lost in the rounding of its terms.
        p, q = (torch.softmax(each.double(), 1).add_(SOFTMAX_FLOOR) for each in (y, x))
        divergence = (p * (p / q).log_()).sum(1, keepdim=True)
        gap = (y.double() - x).abs_()
        # The second term is zero, or NaN where an operand is not finite: the result shows it below.
        change.copy_(gap * divergence + (gap - gap))
    chosen = torch.where(changes >= _outlying(changes), b, a)
    return torch.where(changes.isnan(), changes, chosen)


def _outlying(values: Tensor) -> Tensor:
    """The median and one and a half times the distance of the quartiles, none interpolated, for any size."""
    if not values.numel():
        return values.new_zeros(())
    last = values.numel() - 1
    first, median, third = (torch.kthvalue(values.flatten(), int(last * q) + 1).values for q in (0.25, 0.5, 0.75))
    return median + 1.5 * (third - first)


@operation(
    "mix two models",
    "(a − alpha·beta·b) / (1 − alpha·beta)",
    fold=lambda alpha, beta: "a" if alpha * beta == 0 else None,
    also=("weighted_subtraction (meh)",),
)
def weighted_subtraction(a: Same, b: Same, *, alpha: PerBlock = 0.5, beta: PerBlock = 0.5, out: Out = None) -> Same:
    """Takes b out of a: what would have to be mixed with b, at alpha·beta, to give a.

    meh's formula. At alpha = beta = 1 nothing is left to divide by (meh divides by 1e-10): the rest
    1 − alpha·beta counts as a millionth at the least, so that the result is finite, but no model.
    """
    share = alpha * beta
    rest = 1.0 - share if abs(1.0 - share) > LEAST_REST else LEAST_REST
    # The same as a + share/rest·(a − b), which keeps what both models have as it is.
    difference = torch.sub(a, b, out=out)
    return torch.add(a, difference, alpha=share / rest, out=difference)


@operation("mix two models", "max(a, b)", also=("Max Merge (Chattiori)",))
def maximum(a: Same, b: Same, *, out: Out = None) -> Same:
    """The greater of the two values, element by element.

    Of signed values: −0.1 is greater than −0.5.
    """
    return torch.maximum(a, b, out=out)


@operation(
    "plain arithmetic",
    "min(max(a, lowest of bounds), highest of bounds)",
    also=("clamp (sd-mecha)", "clip", "clamp_to_ab"),
)
def clamp(a: Same, bounds: Sames, *, stiffness: PerBlock = 0.0, out: Out = None) -> Same:
    """Keeps every value of a between the lowest and the highest of the bounds; one bound is the result itself.

    sd-mecha's clamp. Of three bounds or more, stiffness narrows the room: at 1 it is between the
    two bounds next to their mean, below and above it.
    """
    low, high = functools.reduce(torch.minimum, bounds), functools.reduce(torch.maximum, bounds)
    if stiffness:
        # Compared as sums in float64, so that rounding the mean puts no bound on its other side.
        total = sum(bound.double() for bound in bounds)
        as_sums = [(bound, bound.double() * len(bounds)) for bound in bounds]
        below = functools.reduce(torch.maximum, (torch.where(each <= total, bound, low) for bound, each in as_sums))
        above = functools.reduce(torch.minimum, (torch.where(each >= total, bound, high) for bound, each in as_sums))
        low, high = torch.lerp(low, below, stiffness), torch.lerp(high, above, stiffness)
    return torch.clamp(a, low, high, out=out)
