"""Formulas of the methods for two models that are no straight line: element by element, row by row."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from oracle import KINDS, SHAPES, Case
from oracle_basics import slerp
from scipy.special import rel_entr, softmax


def by_rows(function, *arrays):
    """A function of rows, of what is a matrix of output units' rows; a vector or a number is one row."""
    first = arrays[0]
    if not first.size:
        return first
    units = first.shape[0] if first.ndim > 1 else 1
    matrices = [each.reshape(units, first.size // units) for each in arrays]
    return np.stack([function(*rows) for rows in zip(*matrices, strict=True)]).reshape(first.shape)


def nuslerp(a, b, base=None, *, alpha):
    origin = np.zeros_like(a) if base is None else base
    return by_rows(lambda x, y, o: o + slerp(x - o, y - o, alpha=alpha), a, b, origin)


def geometric_sum(a, b, *, alpha):
    return (np.power(a + 0j, 1 - alpha) * np.power(b + 0j, alpha)).real


def perpendicular(a, b):
    length = np.linalg.norm(a.ravel())
    if length <= 1e-30 * np.linalg.norm(b.ravel()):
        return b
    unit = a / length
    return b - unit * np.sum(unit * b)


def nearswap(a, b, *, t):
    k = np.where(a == b, 0.0, np.minimum(t / np.abs(a - b), 1.0))
    return (1 - k) * a + k * b


def arcee_fusion(a, b):
    def importance(x, y):
        return np.abs(y - x) * rel_entr(softmax(y) + 1e-8, softmax(x) + 1e-8).sum()

    if not a.size:
        return a
    found = by_rows(importance, a, b)
    ordered = sorted(found.ravel())
    first, median, third = (ordered[int(share * (len(ordered) - 1))] for share in (0.25, 0.5, 0.75))
    return np.where(found >= median + 1.5 * (third - first), b, a)


def weighted_subtraction(a, b, *, alpha, beta):
    return (a - alpha * beta * b) / (1 - alpha * beta)


def clamp(a, bounds, *, stiffness):
    result = np.empty_like(a)
    for place in np.ndindex(a.shape):
        values = [bound[place] for bound in bounds]
        # Sums and not means: the mean of three equal numbers may be rounded away from them.
        low = max(value for value in values if value * len(values) <= sum(values))
        high = min(value for value in values if value * len(values) >= sum(values))
        low = (1 - stiffness) * min(values) + stiffness * low
        high = (1 - stiffness) * max(values) + stiffness * high
        result[place] = min(max(a[place], low), high)
    return result


def tensor_sum(a, b, *, alpha, beta, dim):
    """supermerger's bounds, and its loop turned over: each row asks whose it is."""
    if not a.ndim:
        return tensor_sum(a[None], b[None], alpha=alpha, beta=beta, dim=0)[0]
    axis = dim if a.ndim > 1 else 0
    n = a.shape[1] if axis == 1 and a.shape[1] > 100 else a.shape[0]

    def from_b(row):
        if alpha + beta <= 1:
            return int(n * beta) <= row < int(n * (alpha + beta))
        return not int(n * (alpha + beta - 1)) <= row < int(n * beta)

    whose = np.array([from_b(row) for row in range(a.shape[axis])], dtype=bool)
    return np.where(whose.reshape([-1 if each == axis else 1 for each in range(a.ndim)]), b, a)


def top_k_tensor_sum(a, b, *, alpha, beta):
    n, x = a.size, a.ravel()
    by_size = sorted(abs(value) for value in x)

    def up_to(share, value):
        kept = round(share * n)
        return kept > 0 and abs(value) <= by_size[kept - 1]

    def moved(value):
        if alpha + beta <= 1:
            return up_to(alpha + beta, value) and not up_to(beta, value)
        return not up_to(beta, value) or up_to(alpha + beta - 1, value)

    result = x.copy()
    for value, place in zip(sorted(x), np.argsort(b.ravel(), kind="stable"), strict=True):
        if moved(value):
            result[place] = value
    return result.reshape(a.shape)


def share_of_b(f, alpha, width):
    """The ramp of a width whose middle goes from beyond the highest frequency to below the lowest."""
    if alpha in (0, 1) or width > 1e12:
        return np.full_like(f, alpha)
    if width < 1e-9:
        return (f > 1 - alpha).astype(float)
    middle = 1 - alpha + width * (0.5 - alpha)
    return np.clip((f - middle) / width + 0.5, 0, 1)


def crossover(a, b, *, alpha, tilt):
    lengths = [length for length in a.shape if length != 1]
    if a.size < 2:
        return (1 - alpha) * a + alpha * b
    x, y = a.reshape(lengths), b.reshape(lengths)
    highest = [np.abs(np.fft.fftfreq(length)).max() for length in lengths]
    grid = np.meshgrid(*(np.abs(np.fft.fftfreq(length)) for length in lengths), indexing="ij")
    f = np.sqrt(np.mean([np.square(each / top) for each, top in zip(grid, highest, strict=True)], axis=0))
    share = share_of_b(f, alpha, np.tan(tilt * np.pi / 2))
    return np.fft.ifftn((1 - share) * np.fft.fftn(x) + share * np.fft.fftn(y)).real.reshape(a.shape)


def distribution_crossover(a, b, c, *, alpha, beta):
    if a.size < 2:
        return (1 - alpha) * a + alpha * b
    order = np.argsort(c.ravel(), kind="stable")
    f = np.abs(np.fft.fftfreq(a.size))
    share = share_of_b(f / f.max(), alpha, beta)
    result = np.empty(a.size)
    result[order] = np.fft.ifft((1 - share) * np.fft.fft(a.ravel()[order]) + share * np.fft.fft(b.ravel()[order])).real
    return result.reshape(a.shape)


# A sharp cut decides by a comparison: no frequency of these shapes is at n/97 (but 0 and 1).
off_the_grid = st.integers(0, 97).map(lambda n: n / 97)
ends = st.sampled_from([0.0, 1.0])
width = ends | st.floats(0.05, 1)  # steeper, a ramp is a factor on the rounding of frequencies
# A transform's sums of subnormal numbers are rounded to their wide steps again and again.
normal_numbers = tuple(kind for kind in KINDS if kind != "tiny")
# Distances on a grid are often a threshold that is made of three of them, but for rounding.
off_any_grid = tuple(kind for kind in KINDS if kind not in ("bf16", "fp8", "dyadic"))

METHODS = {
    "nuslerp": Case(nuslerp, {"equal", "alpha 0", "scales", "symmetric"}, slack=2e-4),
    "geometric_sum": Case(
        geometric_sum,
        {"equal", "alpha 0", "scales", "symmetric"},
        # The power of zero jumps at the exponent 0, which in float32 some small ones are, too.
        parameters={"alpha": ends | st.floats(1e-6, 1 - 1e-6)},
        # ln(1e31) times the rounding of the two exponents.
        slack=6e-6,
    ),
    "perpendicular": Case(perpendicular, {"scales"}),
    "nearswap": Case(nearswap, {"equal"}),
    "arcee_fusion": Case(arcee_fusion, {"equal"}, kinds=off_any_grid),
    "weighted_subtraction": Case(
        weighted_subtraction,
        {"equal", "alpha 0", "scales"},
        # The result is up to 1/(1 − 0.9²) times as large as the operands.
        parameters={"alpha": st.floats(0, 0.9), "beta": st.floats(0, 0.9)},
        slack=4e-6,
    ),
    "maximum": Case(np.maximum, {"equal", "scales"}),
    # What is outside is brought inside, be it infinite.
    "clamp": Case(clamp, {"equal", "scales", "commutes"}, shows=False),
    # What is replaced does not show. The last shape has more than 100 columns.
    "tensor_sum": Case(tensor_sum, {"equal", "alpha 0", "scales"}, shapes=(*SHAPES, (3, 130)), shows=False),
    "top_k_tensor_sum": Case(top_k_tensor_sum, {"equal", "alpha 0", "scales"}),
    "crossover": Case(
        crossover,
        {"equal", "alpha 0", "scales"},
        parameters={"alpha": off_the_grid, "tilt": width},
        kinds=normal_numbers,
        shapes=(*SHAPES, (6, 4, 1, 1), (1, 9)),
        slack=1e-6,
    ),
    "distribution_crossover": Case(
        distribution_crossover,
        {"equal", "alpha 0", "scales"},
        parameters={"alpha": off_the_grid, "beta": width},
        kinds=normal_numbers,
        slack=1e-6,
    ),
}
