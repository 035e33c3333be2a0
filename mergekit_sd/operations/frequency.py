"""Mixing by frequency: what changes slowly over a tensor's dimensions from one model, what changes fast from another.

Annotations are evaluated (no `from __future__ import annotations` here): they are the schema.
"""

import math

from mergekit_sd.lazy import torch
from mergekit_sd.operations.registry import operation
from mergekit_sd.operations.types import Out, PerBlock, Same, Tensor

# A cut this narrow is a sharp one; at the cut itself the share is alpha, so that the ends come out even.
SHARP = 1e-9


@operation(
    "mix two models",
    "irfftn((1 − F)·rfftn a + F·rfftn b), F = clip((f − (1 − alpha)) / tan(tilt·π/2) + alpha, 0, 1)",
    by="tensor",
    fold=lambda alpha, tilt: {0.0: "a", 1.0: "b"}.get(alpha),
    also=("crossover (sd-mecha)", "frequency crossover"),
)
def crossover(a: Same, b: Same, *, alpha: PerBlock = 0.5, tilt: PerBlock = 0.0, out: Out = None) -> Same:
    """The low frequencies of a and the high ones of b: alpha is how far down b's reach.

    sd-mecha's crossover. f is the distance from the constant part, 1 at the highest frequency; tilt
    0 cuts sharply at 1 − alpha, 0.5 is a ramp as wide as the band, and 1 is the weighted sum. For
    b's low frequencies swap a and b and give 1 − alpha. A dimension of length 1 has no frequencies
    and does not count (in sd-mecha it does: a 1×1 kernel then gets no further than f = 0.71); a
    single value gets the weighted sum.
    """
    mixed = _high_part((b - a).squeeze(), alpha, math.tan(tilt * math.pi / 2))
    return torch.add(a, mixed.reshape(a.shape), out=out)


@operation(
    "mix three models",
    "as crossover, of a and b sorted by c; F = clip((f − (1 − alpha)) / beta + alpha, 0, 1)",
    by="tensor",
    fold=lambda alpha, beta: {0.0: "a", 1.0: "b"}.get(alpha),
    mixes=(("a", "b"),),
    also=("distribution_crossover (meh)",),
)
def distribution_crossover(
    a: Same, b: Same, c: Same, *, alpha: PerBlock = 0.5, beta: PerBlock = 0.0, out: Out = None
) -> Same:
    """The low frequencies of a and the high ones of b, of values in the order that c's have.

    meh's formula, with alpha as b's share (in meh it is a's) and the ramp, beta wide, slid as in
    sd-mecha's crossover, so that alpha 0 is a and alpha 1 is b for every beta. c gives the order only.
    """
    order = torch.argsort(c.flatten(), stable=True)
    in_order = _high_part((b - a).flatten()[order], alpha, beta)
    mixed = torch.empty_like(in_order)
    mixed[order] = in_order
    # c − c is zero; but what is not finite has no rank, and must show.
    return torch.add(a, mixed.reshape(a.shape), out=out).add_(c - c)


def _high_part(difference: Tensor, alpha: float, width: float) -> Tensor:
    """What of a difference lies above the cut: so both models need one transform, and where they agree none is felt."""
    if difference.numel() < 2:
        return difference * alpha
    spectrum = torch.fft.rfftn(difference)
    share = _distances(difference)
    share.sub_(1.0 - alpha).div_(max(width, SHARP)).add_(alpha).clamp_(0.0, 1.0)
    high: Tensor = torch.fft.irfftn(spectrum.mul_(share), s=difference.shape)
    return high


def _distances(values: Tensor) -> Tensor:
    """Of each frequency of the values' transform, its distance from the constant part: 1 for the highest."""
    squares = values.new_zeros(())
    for axis, length in enumerate(values.shape):
        last = axis == values.ndim - 1
        steps = torch.arange(length // 2 + 1 if last else length, device=values.device)
        frequency = torch.minimum(steps, length - steps) / (length // 2)
        squares = squares + frequency.square_().reshape([-1] + [1] * (values.ndim - 1 - axis))
    return squares.div_(values.ndim).sqrt_()
