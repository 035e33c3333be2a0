"""Formulas of the means of many models, on a line and on the sphere."""

from __future__ import annotations

import math

import numpy as np
from oracle import Case

STEPS = (-1.0, -0.5, 0.0, 0.25, 0.5, 1.0)


class Weights(dict):
    """Strategies by parameter, in which `weights`, however many, are of a few that no rounding brings
    near to cancelling: what cancels is divided by next to nothing."""

    def __init__(self, steps=STEPS, **others):
        super().__init__(**others)
        self.steps = steps

    def get(self, name, default=None):
        if name != "weights":
            return super().get(name, default)
        return default.map(lambda weights: tuple(min(self.steps, key=lambda step: abs(step - w)) for w in weights))


def shares(weights):
    total = sum(weights)
    return (
        np.array(weights) / total
        if abs(total) > 1e-6 * sum(map(abs, weights))
        else np.full(len(weights), 1 / len(weights))
    )


def linear(models, *, weights):
    return sum(share * model for share, model in zip(shares(weights), models, strict=True))


def geometric_median(models):
    """Weiszfeld's steps on the points themselves, with Vardi and Zhang's where one is met."""
    points = np.array([model.ravel() for model in models])
    apart = max(np.linalg.norm(x - y) for x in points for y in points)

    def pull(x):
        far = [p for p in points if np.linalg.norm(p - x) > 1e-7 * apart]
        weight = sum(1 / np.linalg.norm(p - x) for p in far)
        force = sum(((p - x) / np.linalg.norm(p - x) for p in far), np.zeros_like(x))
        return force, weight, len(points) - len(far)

    for point in points:
        force, _, here = pull(point)
        if np.linalg.norm(force) < here * (1 - 1e-7):
            return point.reshape(models[0].shape)
    x = points.mean(axis=0)
    for _ in range(1000):
        force, weight, here = pull(x)
        strength = np.linalg.norm(force)
        if strength <= here:
            break
        step = (1 - here / strength) * force / weight
        x = x + step
        if np.linalg.norm(step) <= 1e-12 * apart:
            break
    return x.reshape(models[0].shape)


def on_sphere(models, weights, rounds):
    parts = shares(weights)
    line = linear(models, weights=weights)
    norms = np.array([np.linalg.norm(model) for model in models])
    some = [i for i, norm in enumerate(norms) if norm > 1e-30 * norms.max() and parts[i]]
    units = {i: models[i].ravel() / norms[i] for i in some}
    start = sum((parts[i] * units[i] for i in some), np.zeros(models[0].size))
    rest = sum(parts[i] for i in some)
    if np.linalg.norm(start) <= 1e-4 or abs(rest) <= 1e-4:
        return line
    u = start / np.linalg.norm(start)
    for _ in range(rounds):
        tangent = np.zeros_like(u)
        for i in some:
            # The angle by both its sides: more exact than the arc cosine.
            away = units[i] - (units[i] @ u) * u
            angle = math.atan2(np.linalg.norm(away), units[i] @ u)
            if angle > math.pi - 1e-4:
                return line
            if np.linalg.norm(away):
                tangent += parts[i] / rest * angle * away / np.linalg.norm(away)
        length = np.linalg.norm(tangent)
        if not length:
            break
        u = math.cos(length) * u + math.sin(length) * tangent / length
        u /= np.linalg.norm(u)
        if length < 1e-10:
            break
    return (u * (parts @ norms)).reshape(models[0].shape)


METHODS = {
    "n_average": Case(lambda models: np.mean(models, axis=0), {"equal", "scales", "commutes"}),
    # The sum of weights may be a fifth of the largest: so much larger are the result and its rounding.
    "linear": Case(linear, {"equal", "scales", "commutes"}, slack=1e-6, parameters=Weights()),
    "geometric_median": Case(geometric_median, {"equal", "scales", "commutes"}),
    "multislerp": Case(
        lambda models, weights: on_sphere(models, weights, 1),
        {"equal", "scales", "commutes"},
        slack=1e-6,
        parameters=Weights(),
    ),
    "karcher": Case(
        lambda models, weights: on_sphere(models, weights, 200),
        {"equal", "scales", "commutes"},
        slack=1e-6,
        parameters=Weights(steps=(0.0, 0.25, 0.5, 1.0)),
    ),
}
