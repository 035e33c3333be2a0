"""The formula of Git Re-Basin for one group of units, and models in memory for its survey."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from oracle import Case
from scipy.optimize import linear_sum_assignment

from mergekit_sd.operations.rebasin import find_orders
from mergekit_sd.operations.types import Key

# Its rows are units of a transformer's stream; alone, they can be permuted as one likes.
ROWS = Key("input_blocks.1.1.proj_in.weight", "sd1", "unet", "IN01")


class Pair:
    """Two models in memory, as a survey sees them; `asked` lists the tensors that it asked for."""

    def __init__(self, keys, a, b, threads=1):
        self.keys = keys
        self.shapes = {name: tuple(a[name].shape) for name in keys}
        self.models = (a, b)
        self.threads = threads
        self.asked = []

    def tensors(self, name):
        self.asked.append(name)
        return tuple(model[name] for model in self.models)

    def map(self, function, names):
        with ThreadPoolExecutor(self.threads) as pool:
            return list(pool.map(lambda name: function(self.keys[name], self.tensors(name)), list(names)))


def surveyed(operands):
    a, b = operands
    return {"key": ROWS, "survey": find_orders(Pair({"x": ROWS}, {"x": a}, {"x": b}))}


def rebasin(a, b, *, alpha, key, survey):
    order = survey.get(key, {}).get(0, np.arange(len(a) if a.ndim else 0))
    if a.ndim:
        assert sorted(order) == list(range(len(a)))
        one, other = (np.reshape(each, (len(a), -1)) if each.size else np.zeros((len(a), 1)) for each in (a, b))
        likeness = one @ other.T
        best = likeness[linear_sum_assignment(-likeness)].sum()
        found = sum(likeness[at, order[at]] for at in range(len(a)))
        assert found >= best - 1e-5 * np.abs(likeness).max(initial=0) * len(a)
        b = np.stack([b[source] for source in order]) if len(a) else b
    return (1 - alpha) * a + alpha * b


METHODS = {"rebasin": Case(rebasin, {"equal", "alpha 0", "scales"}, context=surveyed)}
