"""Formulas of supermerger's cosine modes, column by column."""

from __future__ import annotations

import numpy as np
import torch
from oracle import Case

from mergekit_sd.operations import OPERATIONS
from mergekit_sd.operations.types import Key


class WholeModels:
    """What a survey sees, of tensors in memory: (key, operands) for each name."""

    def __init__(self, tensors):
        self.keys = {key.name: key for key, _ in tensors}
        self.shapes = {key.name: tuple(operands[0].shape) for key, operands in tensors}
        self._tensors = {key.name: operands for key, operands in tensors}

    def tensors(self, name):
        return self._tensors[name]

    def map(self, function, names):
        return [function(self.keys[name], self._tensors[name]) for name in names]


def columns(a):
    """Dim 0's columns; a vector or a number is one."""
    return list(a.reshape(len(a), -1).T) if a.ndim > 1 else [a.ravel()]


def cosine(x, y):
    lengths = np.linalg.norm(x) * np.linalg.norm(y)
    return np.dot(x, y) / lengths if lengths else 0.0


def unit(a):
    lengths = [np.linalg.norm(x) for x in columns(a)]
    return np.stack([x / n if n else x for x, n in zip(columns(a), lengths, strict=True)])


def likeness_a(a, b):
    each = np.array([cosine(x, y) for x, y in zip(columns(a), columns(b), strict=True)])
    return (each + cosine(unit(a).ravel(), unit(b).ravel())) / 2


def likeness_b(a, b):
    each = np.array([cosine(x, y) for x, y in zip(columns(a), columns(b), strict=True)])
    return (each + cosine(a.ravel(), b.ravel())) / 2


def mix(likeness):
    def formula(a, b, *, alpha, key, survey):
        if not a.size:
            return a
        least, most = survey
        k = np.clip((likeness(a, b) - least) / (most - least) - alpha, 0, 1).reshape(a.shape[1:])
        return k * a + (1 - k) * b

    return formula


def surveyed(name):
    """The survey of models of which the operands are one tensor; the others give it a spread."""

    def context(operands):
        rng = np.random.default_rng(5)
        more = [torch.from_numpy(rng.standard_normal((2, 30, 8)).astype(np.float32)) for _ in range(3)]
        tensors = [operands, *((a, a + noise * b) for (a, b), noise in zip(more, (0.1, 0.5, 2), strict=True))]
        models = WholeModels([(Key(f"{at}", "sd1", "unet", "IN04"), pair) for at, pair in enumerate(tensors)])
        return {"survey": OPERATIONS[name].survey(models)}

    return context


METHODS = {
    "cosine_a": Case(mix(likeness_a), {"equal", "scales"}, context=surveyed("cosine_a")),
    "cosine_b": Case(mix(likeness_b), {"equal", "scales"}, context=surveyed("cosine_b")),
}
