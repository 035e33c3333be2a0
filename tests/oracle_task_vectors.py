"""Formulas of the merges of fine-tunes of one base."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from hypothesis import strategies as st
from oracle import KINDS, Case
from oracle_averages import Weights

# What a number is divided by makes its rounding larger; quarters do not round it at all.
quarters = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])
small_factors = st.sampled_from([-1.5, -0.3, 0.0, 0.7, 1.0])


def top(values, count):
    """The positions of the `count` largest magnitudes; of equal ones the first."""
    return sorted(range(values.size), key=lambda i: (-abs(values[i]), i))[: max(count, 0)]


def kept_of(change, positions):
    kept = np.zeros(change.size)
    kept[positions] = change.ravel()[positions]
    return kept.reshape(change.shape)


def draws(draw, like, stream):
    return draw.uniform(torch.from_numpy(like), stream=stream).double().numpy()


def task_arithmetic(base, models, *, weights, scale):
    return base + scale * sum(w * (m - base) for w, m in zip(weights, models, strict=True))


def elected_mean(changes, weights, vote="sum", ballots=None):
    """Element by element: the elected sign, and the mean of what has it."""
    result = np.zeros(changes[0].shape)
    for at in np.ndindex(result.shape):
        values = [change[at] for change in changes]
        heaviest = max(map(abs, weights)) or 1
        pulls = [v * (b / heaviest) for v, b in zip(values, ballots or weights, strict=True)]
        sign = np.sign(sum(np.sign(pulls)) if vote == "count" else sum(pulls))
        agreed = [(v, w) for v, w in zip(values, weights, strict=True) if np.sign(v * w) == sign != 0]
        if agreed:
            result[at] = sum(v * w for v, w in agreed) / sum(abs(w) for _, w in agreed)
    return result


def ties(base, models, *, weights, density, vote, scale):
    changes = [m - base for m in models]
    changes = [kept_of(c, top(c.ravel(), round(density * c.size))) for c in changes]
    return base + scale * elected_mean(changes, weights, vote)


def dropped(base, models, density, draw):
    return [np.where(draws(draw, base, i) < density, (m - base) / (density or 1), 0) for i, m in enumerate(models)]


def dare_linear(base, models, *, weights, density, draw):
    return base + sum(w * c for w, c in zip(weights, dropped(base, models, density, draw), strict=True))


def dare_ties(base, models, *, weights, density, draw):
    return base + elected_mean(dropped(base, models, density, draw), weights)


def della(base, models, *, weights, density, epsilon, draw):
    epsilon = min(epsilon, density, 1 - density)
    changes = []
    for stream, model in enumerate(models):
        change = model - base
        lines = np.reshape(
            change, (change.shape[0], int(np.prod(change.shape[1:]))) if change.ndim > 1 else (1, change.size)
        )
        uniform = draws(draw, base, stream).reshape(lines.shape)
        kept = np.zeros(lines.shape)
        for row, line in enumerate(lines):
            for rank, column in enumerate(reversed(top(line[::-1], line.size))):
                column = line.size - 1 - column
                place = rank / (line.size - 1) if line.size > 1 else 0.5
                chance = density + epsilon * (2 * place - 1)
                if uniform[row, column] < chance:
                    kept[row, column] = line[column] / chance
        changes.append(kept.reshape(change.shape))
    return base + elected_mean(changes, weights)


def breadcrumbs(base, models, *, weights, density, gamma):
    result = base.copy()
    for weight, model in zip(weights, models, strict=True):
        change = model - base
        kept = round(density * change.size)
        gone = min(round(gamma * change.size), change.size - kept)
        result = result + weight * kept_of(change, top(change.ravel(), gone + kept)[gone:])
    return result


def sce(base, models, *, density):
    n = len(models)
    # The variance by the differences of all pairs: of equal ones exactly 0.
    pairs = [((x - y) / n) ** 2 for x, y in itertools.combinations(models, 2)]
    variance = sum(pairs, np.zeros(base.shape)).ravel()
    chosen = top(np.sqrt(variance), round(density * base.size))
    if density < 1:
        chosen = [i for i in chosen if variance[i] > 0]
    changes = [kept_of(m - base, chosen) for m in models]
    weights = [np.mean(c**2) if c.size else 0.0 for c in changes]
    return base + elected_mean(changes, [w / (max(weights) or 1) for w in weights], ballots=[1.0] * n)


def model_stock(base, models):
    changes = [(m - base).ravel() for m in models]
    n = len(changes)
    cosines = [
        x @ y / (np.linalg.norm(x) * np.linalg.norm(y)) if x.any() and y.any() else 0.0
        for x, y in itertools.combinations(changes, 2)
    ]
    c = max(0.0, np.mean(cosines)) if n > 1 else 1.0
    t = n * c / (1 + (n - 1) * c)
    return t * np.mean(models, axis=0) + (1 - t) * base


def ramplus_tl(base, models, *, epsilon, r, alpha):
    changes = [m - base for m in models]
    result = base.copy()
    changed = [abs(c) > epsilon for c in changes]
    unique = [sum(sum(m[at] for m in changed) == 1 and mask[at] for at in np.ndindex(base.shape)) for mask in changed]
    for at in np.ndindex(base.shape):
        those = [i for i, mask in enumerate(changed) if mask[at]]
        if len(those) == 1:
            (i,) = those
            result[at] += changes[i][at] * (1 + r * min((changed[i].sum() - unique[i]) / unique[i], alpha))
        elif those:
            result[at] += sum(changes[i][at] for i in those) / len(those)
    return result


def ram(base, models, *, epsilon):
    return ramplus_tl(base, models, epsilon=epsilon, r=0.0, alpha=0.0)


SYMMETRIC = {"equal", "scales", "commutes"}
# Weighed, subnormal numbers become zero: those have no sign to elect.
signed = tuple(kind for kind in KINDS if kind != "tiny")
# Of three values on a grid many have one variance, or a sum that cancels when divided, but for rounding.
off_any_grid = tuple(kind for kind in signed if kind not in ("bf16", "fp8", "dyadic"))

METHODS = {
    # Four models' changes, each up to twice the largest value, times the weights.
    "task_arithmetic": Case(task_arithmetic, SYMMETRIC, 1e-6, Weights(scale=small_factors)),
    "dare_linear": Case(dare_linear, {"equal", "scales"}, 2e-6, Weights(density=quarters)),
    "breadcrumbs": Case(breadcrumbs, SYMMETRIC, 1e-6, Weights()),
    "model_stock": Case(model_stock, SYMMETRIC),
    "ram": Case(ram, {"equal", "commutes"}),
    "ramplus_tl": Case(ramplus_tl, {"equal", "commutes"}, 1e-6, {"r": st.floats(0, 1), "alpha": st.floats(0, 1)}),
    "ties": Case(ties, SYMMETRIC, 1e-6, Weights(scale=small_factors), signed),
    "dare_ties": Case(dare_ties, {"equal", "scales"}, 2e-6, Weights(density=quarters), signed),
    "della": Case(della, {"equal", "scales"}, 4e-6, Weights(density=quarters), off_any_grid),
    "sce": Case(sce, SYMMETRIC, 1e-6, kinds=off_any_grid),
}
