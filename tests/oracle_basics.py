"""Formulas of the straight lines and differences, and of slerp."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
from oracle import Case


def slerp(a, b, *, alpha):
    x, y = a.ravel(), b.ravel()
    na, nb = np.linalg.norm(x), np.linalg.norm(y)
    cosine = np.clip(x @ y / (na * nb), -1, 1) if na and nb else 1.0
    angle = np.arccos(cosine)
    if min(na, nb) <= 1e-30 * max(na, nb):
        return (1 - alpha) * a + alpha * b
    if not 1e-4 < angle < math.pi - 1e-4:
        return (1 - alpha) * a + alpha * b
    turned = (np.sin((1 - alpha) * angle) * a / na + np.sin(alpha * angle) * b / nb) / np.sin(angle)
    return turned * ((1 - alpha) * na + alpha * nb)


NUMPY = {
    "fp32": np.float32,
    "fp16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "fp8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
}

METHODS = {
    # What does not fit becomes Inf, which the engine refuses.
    "cast": Case(
        lambda a, dtype: a.astype(np.float32).astype(NUMPY[dtype]), kinds=("normal", "zero", "bf16", "fp8", "dyadic")
    ),
    "weighted_sum": Case(lambda a, b, alpha: (1 - alpha) * a + alpha * b, {"equal", "alpha 0", "scales", "symmetric"}),
    "add_difference": Case(lambda a, b, c, alpha: a + alpha * (b - c), {"equal", "alpha 0", "scales"}),
    "sum_twice": Case(
        lambda a, b, c, alpha, beta: (1 - beta) * ((1 - alpha) * a + alpha * b) + beta * c, {"equal", "scales"}
    ),
    "triple_sum": Case(lambda a, b, c, alpha, beta: (1 - alpha - beta) * a + alpha * b + beta * c, {"equal", "scales"}),
    "subtract": Case(lambda a, b: a - b, {"scales"}),
    "add": Case(lambda a, b: a + b, {"scales"}),
    "scale": Case(lambda a, alpha: alpha * a, {"scales"}),
    # A norm is a property of the whole tensor: the quotient may lose some bits near a straight line.
    "slerp": Case(slerp, {"equal", "alpha 0", "scales", "symmetric"}, slack=2e-4),
}
