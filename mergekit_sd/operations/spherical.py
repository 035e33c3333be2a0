"""Operations on directions: what needs a whole tensor's norm and angle.

Annotations are evaluated (no `from __future__ import annotations` here): they are the schema.
"""

import math

from mergekit_sd.lazy import torch
from mergekit_sd.operations.registry import operation
from mergekit_sd.operations.types import Out, PerBlock, Same, Tensor

# Below this angle (radians) the sine's quotient loses more than a straight line does.
NEARLY_PARALLEL = 1e-4
# A tensor this much smaller than the other is as good as zero, and its share would overflow float32.
NEARLY_ZERO = 1e-30
PIECE = 1 << 20


def dot(a: Tensor, b: Tensor) -> float:
    """The inner product of two tensors of one shape, summed in float64 piece by piece."""
    pieces = zip(torch.split(a.flatten(), PIECE), torch.split(b.flatten(), PIECE), strict=True)
    return math.fsum(float(torch.dot(x.double(), y.double())) for x, y in pieces)


@operation(
    "mix two models",
    "(sin((1 − alpha)Ω)·a/‖a‖ + sin(alpha·Ω)·b/‖b‖) / sin Ω · ((1 − alpha)‖a‖ + alpha‖b‖)",
    whole=True,
    fold=lambda alpha: {0.0: "a", 1.0: "b"}.get(alpha),
    also=("slerp (mergekit, sd-mecha)", "spherical interpolation"),
)
def slerp(a: Same, b: Same, *, alpha: PerBlock = 0.5, out: Out = None) -> Same:
    """The arc from a to b: directions turn, norms go in a straight line; per tensor.

    Shoemake, "Animating rotation with quaternion curves" (1985), with the norms interpolated.
    Parallel, opposite or zero tensors have no one arc: they get the straight line.
    """
    norm_a, norm_b = math.sqrt(dot(a, a)), math.sqrt(dot(b, b))
    cosine = dot(a, b) / (norm_a * norm_b) if norm_a and norm_b else 1.0
    angle = math.acos(max(-1.0, min(1.0, cosine))) if math.isfinite(cosine) else 0.0
    unlike = min(norm_a, norm_b) <= NEARLY_ZERO * max(norm_a, norm_b)
    if unlike or not NEARLY_PARALLEL < angle < math.pi - NEARLY_PARALLEL:
        return torch.lerp(a, b, alpha, out=out)
    norm = (1.0 - alpha) * norm_a + alpha * norm_b
    share_a = math.sin((1.0 - alpha) * angle) / math.sin(angle) * norm / norm_a
    share_b = math.sin(alpha * angle) / math.sin(angle) * norm / norm_b
    return torch.mul(a, share_a, out=out).add_(b, alpha=share_b)
