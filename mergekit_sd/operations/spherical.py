"""Operations on directions: what needs a whole tensor's norm and angle.

Annotations are evaluated (no `from __future__ import annotations` here): they are the schema.
"""

import math

from mergekit_sd.lazy import torch
from mergekit_sd.operations.measures import PIECE, dot, norm, rows
from mergekit_sd.operations.registry import operation
from mergekit_sd.operations.types import MaybeWeight, Out, PerBlock, Same, Tensor, Weight

# Below this angle (radians) the sine's quotient loses more than a straight line does.
NEARLY_PARALLEL = 1e-4
# A tensor this much smaller than the other is as good as zero, and its share would overflow float32.
NEARLY_ZERO = 1e-30


@operation(
    "mix two models",
    "(sin((1 − alpha)Ω)·a/‖a‖ + sin(alpha·Ω)·b/‖b‖) / sin Ω · ((1 − alpha)‖a‖ + alpha‖b‖)",
    by="tensor",
    fold=lambda alpha: {0.0: "a", 1.0: "b"}.get(alpha),
    also=("slerp (mergekit, sd-mecha)", "spherical interpolation"),
)
def slerp(a: Same, b: Same, *, alpha: PerBlock = 0.5, out: Out = None) -> Same:
    """The arc from a to b: directions turn, norms go in a straight line; per tensor.

    Shoemake, "Animating rotation with quaternion curves" (1985), with the norms interpolated.
    Parallel, opposite or zero tensors have no one arc: they get the straight line.
    """
    norm_a, norm_b, inner = torch.tensor([norm(a), norm(b), dot(a, b)], dtype=torch.float64)
    share_a, share_b = _shares(norm_a, norm_b, inner, alpha)
    return torch.mul(a, float(share_a), out=out).add_(b, alpha=float(share_b))


@operation(
    "mix two models",
    "slerp of each row of (a − base, b − base), onto base",
    by="row",
    fold=lambda alpha: {0.0: "a", 1.0: "b"}.get(alpha),
    mixes=(("a", "b"),),
    also=("nuslerp (mergekit)", "NuSLERP"),
)
def nuslerp(a: Weight, b: Weight, base: MaybeWeight = None, *, alpha: PerBlock = 0.5, out: Out = None) -> Weight:
    """As slerp, but every output unit turns on an arc of its own; with a base, what a and b changed of it turns.

    mergekit's NuSLERP by rows, with the norms interpolated as in `slerp`. Flat, as mergekit does
    it by default, it is `slerp` itself; with a base, `slerp` of two differences added to the base.
    A row is all inputs of an output unit; a vector is one row.
    """
    result = a.new_empty(a.shape)
    length = max(1, PIECE // max(1, rows(a).shape[1]))
    given = [a, b, result] if base is None else [a, b, result, base]
    for x, y, piece, *origin in zip(*(torch.split(rows(each), length) for each in given), strict=True):
        start = origin[0].double() if origin else 0.0
        x, y = x.double() - start, y.double() - start
        norm_x, norm_y = (torch.linalg.vector_norm(each, dim=1, keepdim=True) for each in (x, y))
        share_x, share_y = _shares(norm_x, norm_y, torch.linalg.vecdot(x, y).unsqueeze(1), alpha)
        piece.copy_(x.mul_(share_x).add_(y.mul_(share_y)).add_(start))
    return result


def _shares(norm_a: Tensor, norm_b: Tensor, inner: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """What of a and what of b make the point at alpha on the arc, from their norms and inner product."""
    angle = torch.acos((inner / (norm_a * norm_b)).clamp(-1.0, 1.0))
    unlike = torch.minimum(norm_a, norm_b) <= NEARLY_ZERO * torch.maximum(norm_a, norm_b)
    arc = (angle > NEARLY_PARALLEL) & (angle < math.pi - NEARLY_PARALLEL) & ~unlike
    length = ((1.0 - alpha) * norm_a + alpha * norm_b) / torch.sin(angle)
    share_a = torch.sin((1.0 - alpha) * angle) * length / norm_a
    share_b = torch.sin(alpha * angle) * length / norm_b
    return torch.where(arc, share_a, 1.0 - alpha), torch.where(arc, share_b, alpha)
