"""The formula of balanced attention: a query of 8 heads, beside a key that is always the same."""

from __future__ import annotations

import numpy as np
import scipy.linalg
from oracle import Case, numbers
from oracle_rebasin import Pair

from mergekit_sd.operations.balance import RIDGE, find_turns
from mergekit_sd.operations.types import Key

HEADS = 8
AT = "input_blocks.1.1.transformer_blocks.0.attn1."
QUERY, KEY = (Key(f"{AT}to_{each}.weight", "sd1", "unet", "IN01") for each in "qk")


class One(Pair):
    """One model in memory, as a survey sees it."""

    def __init__(self, keys, tensors):
        super().__init__(keys, tensors, tensors)
        self.models = (tensors,)


def surveyed(operands):
    tensors = {QUERY.name: operands[0], KEY.name: numbers(tuple(operands[0].shape), "normal", 77)}
    return {"key": QUERY, "survey": find_turns(One({QUERY.name: QUERY, KEY.name: KEY}, tensors))}


def mean_of(a, b):
    """A # B = A·(A⁻¹B)^½ (Bhatia, "Positive definite matrices", 2007, §4.1)."""
    return a @ scipy.linalg.sqrtm(np.linalg.solve(a, b)).real


def even(gram):
    size = np.trace(gram) / len(gram)
    return gram + RIDGE * (size if size > 0 else 1) * np.eye(len(gram))


def balance_attention(a, *, key, survey):
    if a.ndim != 2 or len(a) % HEADS or not a.size:
        return a
    other = numbers(a.shape, "normal", 77).numpy().astype(np.float64)
    heads = []
    for q, k in zip(np.split(a, HEADS), np.split(other, HEADS), strict=True):
        turn = scipy.linalg.sqrtm(mean_of(np.linalg.inv(even(q @ q.T)), even(k @ k.T))).real
        heads.append(turn @ q)
    return np.concatenate(heads)


METHODS = {
    "balance_attention": Case(
        balance_attention,
        context=surveyed,
        slack=1e-5,
        kinds=("normal", "opposite", "bf16", "fp8"),
        shapes=((16, 12), (8, 5), (24, 40), (7,), (3, 5)),
    )
}
