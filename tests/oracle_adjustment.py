"""Formulas of supermerger's Adjust and of what draws random numbers for one model."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st
from oracle import Case

from mergekit_sd.operations.types import Key

NAMES = {(4,): "out.2.bias", (4, 8, 3, 3): "out.2.weight", (8, 4, 3, 3): "input_blocks.0.0.weight", (64,): "out.0.bias"}


def which(operands):
    """A key for the operand's shape: one that is adjusted for some."""
    return {"key": Key(NAMES.get(tuple(operands[0].shape), "middle_block.0.weight"), "sd1", "unet", None)}


def adjust(a, *, values, key):
    noise, late, detail, contrast, bright, *colours = values
    match key.name:
        case "input_blocks.0.0.weight":
            return a * (1 - 0.01 * noise)
        case "out.0.bias":
            return a * (1 + 0.02 * late)
        case "out.2.weight":
            return a * (1 - 0.01 * detail)
        case "out.2.bias":
            c1, c2, c3 = colours
            second, third, fourth = -bright + c1 + c3, bright / 3 + c1 - c2, 2 * bright / 3 - c2 + c3
            return a + 0.02 * np.array([contrast, second, third, fourth])
    return a


def random_noise(a, *, alpha, draw):
    return a + alpha * draw.normal(torch.from_numpy(a)).double().numpy()


def dropout(a, *, density, draw):
    kept = draw.uniform(torch.from_numpy(a)).double().numpy() < density
    return np.where(kept, a / (density or 1), 0.0)


METHODS = {
    # A shift, and noise, are as large whatever the operand is: only an operand of their size has room for it.
    "adjust": Case(
        adjust,
        slack=1e-5,
        context=which,
        shapes=((), (0,), (4,), (64,), (3, 5), (4, 8, 3, 3), (8, 4, 3, 3), (4, 0, 2)),
        kinds=("normal", "huge", "equal", "opposite", "constant", "bf16", "fp8", "dyadic"),
    ),
    "random_noise": Case(
        random_noise,
        {"alpha 0"},
        slack=1e-5,
        shapes=((0,), (64,), (16, 12), (2, 3, 3, 3), (4, 0, 2)),
        kinds=("normal", "huge", "constant", "bf16", "dyadic"),
    ),
    "dropout": Case(
        dropout, {"scales"}, slack=5e-6, parameters={"density": st.just(0.0) | st.just(1.0) | st.floats(0.05, 1.0)}
    ),
}
