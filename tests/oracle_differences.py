"""Formulas of the operations on three models, each as its source has it."""

from __future__ import annotations

import cmath
import math

import numpy as np
from hypothesis import strategies as st
from oracle import Case
from scipy.ndimage import median_filter

# Where changes cancel but for their last bits, float32 and float64 may each find another sign: no kinds of few
# different values, whose changes are multiples of each other.
DOUBTLESS = ("normal", "zero", "huge", "sparse")
# A change of 0 to the power of alpha is 0, but 1 for alpha 0: an alpha of 1e-99 is 0 in float32.
SHARE = st.one_of(st.just(0.0), st.floats(1e-9, 1.0 - 1e-6), st.just(1.0))


def train_difference(a, b, c, *, alpha):
    """supermerger's, branch by branch."""
    result = a.copy()
    for at in np.ndindex(a.shape):
        apart, learned = abs(b[at] - a[at]), abs(b[at] - c[at])
        scale = np.sign(b[at] - c[at]) * apart / (learned + apart) if learned + apart else 0.0
        result[at] += scale * learned * alpha * 1.8
    return result


def masked(mask):
    """A mask as sd-mecha has it, NaN for 0/0, times b − c, on a."""
    return lambda a, b, c, alpha: a + alpha * np.nan_to_num(mask(a, b, c)) * (b - c)


def add_perpendicular(a, b, c, *, alpha):
    x, y = (a - c).ravel(), (b - c).ravel()
    if np.linalg.norm(x) <= 1e-30 * np.linalg.norm(y):  # as good as zero
        return a + alpha * (b - c)
    share, *_ = np.linalg.lstsq(x[:, None] / np.linalg.norm(x), y) if x.any() else ([0.0],)
    return a + alpha * (y - x / max(np.linalg.norm(x), 1e-300) * share[0]).reshape(a.shape)


def similarity_add_difference(a, b, c, *, alpha, beta):
    greater = np.maximum(abs(a), abs(b))
    share = np.nan_to_num((a * b / greater**2 + 1) / 2 * beta, nan=beta)
    return (1 - share) * (a + alpha * (b - c)) + share * ((1 - alpha / 2) * a + alpha / 2 * b)


def multiply_quotient(a, b, c, *, alpha):
    """In complex numbers."""
    result = a.copy()
    for at in np.ndindex(a.shape):
        if not (a[at] and b[at] and c[at]):
            continue
        log_a, log_b = (math.log(abs(each[at])) - math.log(abs(c[at])) for each in (a, b))
        greater = max(abs(log_a), abs(log_b))
        power = alpha * max(0.0, -log_a * log_b / greater**2) if greater else 0.0
        result[at] *= cmath.exp(power * cmath.log(complex(b[at]) / complex(c[at]))).real
    return result


def multiply_difference(a, b, c, *, alpha, beta):
    size = abs(a - c) ** (1 - alpha) * abs(b - c) ** alpha
    return c + np.copysign(size, (1 - beta) * (a - c) + beta * (b - c) + 0.0)


def euclidean_add_difference(a, b, c, *, alpha):
    blend = (1 - alpha) * (a - c) + alpha * (b - c)
    size = np.copysign(np.hypot(math.sqrt(1 - alpha) * (a - c), math.sqrt(alpha) * (b - c)), blend)
    return c + size / (np.linalg.norm(size) or 1.0) * np.linalg.norm(blend)


def similar_features(a, b, c, *, alpha, beta, gamma):
    result = np.empty_like(a)
    for at in np.ndindex(a.shape[:-1]):
        x, y = (np.atleast_1d(each[at] - a[at]).astype(np.longdouble) for each in (b, c))
        product = math.sqrt((x @ x) * (y @ y))
        cosine = float(np.clip((x @ y) / product, -1, 1)) if product else 0.0
        alike = ((cosine + 1) / 2) ** gamma
        changed = (1 - alpha) * x + alpha * y
        result[at] = a[at] + (changed * ((1 - beta) * alike + beta * (1 - alike))).reshape(a[at].shape)
    return result


def smooth_add(a, b, c, *, alpha):
    """SciPy's median; the Gaussian as weights over 9 neighbours, axis by axis."""
    smooth = median_filter(b - c, size=3, mode="reflect") if b.ndim and b.size else b - c
    weights = np.exp(-0.5 * np.arange(-4, 5) ** 2)
    weights /= weights.sum()
    for axis, size in enumerate(smooth.shape):
        places = np.pad(np.arange(size), 4, mode="symmetric") if size else []
        blur = np.zeros((size, size))
        for row in range(size):
            np.add.at(blur[row], places[row : row + 9], weights)
        smooth = np.moveaxis(np.tensordot(blur, smooth, (1, axis)), 0, axis)
    return a + alpha * smooth


CARRIED = {"equal", "alpha 0", "scales"}
METHODS = {
    "train_difference": Case(train_difference, CARRIED),
    "add_opposite": Case(masked(lambda a, b, c: 2 * abs(a - b) / (abs(a - b) + abs(a + b - 2 * c))), CARRIED),
    "add_strict_opposite": Case(
        masked(lambda a, b, c: 2 * np.maximum(0, (c - a) * (b - c) / np.maximum(abs(a - c), abs(b - c)) ** 2)), CARRIED
    ),
    "add_perpendicular": Case(add_perpendicular, CARRIED),
    "similarity_add_difference": Case(similarity_add_difference, CARRIED),
    "multiply_quotient": Case(multiply_quotient, CARRIED),
    # An exponent is rounded by 3e-8, which at 1e31, whose logarithm is 71, is 2e-6 of the power.
    "multiply_difference": Case(
        multiply_difference,
        {"equal", "scales"},
        slack=5e-6,
        parameters={"alpha": SHARE, "beta": SHARE},
        kinds=DOUBTLESS,
    ),
    "euclidean_add_difference": Case(euclidean_add_difference, {"equal", "alpha 0", "scales"}, kinds=DOUBTLESS),
    "similar_features": Case(similar_features, {"equal", "scales"}),
    "smooth_add": Case(smooth_add, CARRIED),
}
