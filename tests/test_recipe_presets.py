"""The presets against the formulas written a second time, in numpy float64."""

from __future__ import annotations

import numpy as np
import pytest

from mergekit_sd.recipe.presets import PRESETS, SD_BLOCKS, Rank, find_preset, preset, read_selector, selector_hint

I = np.arange(25)  # noqa: E741
X = I / 24
S = 3 * X**2 - 2 * X**3
ONE, ZERO = np.ones(25), np.zeros(25)


def fold(y):
    y = np.mod(y, 2)
    return np.where(y > 1, 2 - y, y)


def step(x):
    return 3 * x**2 - 2 * x**3


def at(*ones, halves=()):
    values = ZERO.copy()
    values[list(ones)] = 1
    values[list(halves)] = 0.5
    return values


FAKE = 19 / 3 * X**3 - 19 / 2 * X**2 + 25 / 6 * X
TRUE = np.where(I >= 1, FAKE + (2 * X**3 - 3 * X**2 + 1) / 24, 0)
FORWARD = {
    "GRAD_V": abs(1 - I / 12),
    "FLAT_25": ONE / 4,
    "FLAT_75": ONE * 0.75,
    **{f"WRAP{2 * n:02}": ((n > I) | (24 - n < I)).astype(float) for n in (4, 6, 7, 8)},
    "MID12_50": np.where((I >= 5) & (I <= 18), 0.5, 0),
    "OUT07": (I >= 18) * 1.0,
    "OUT12": (I >= 13) * 1.0,
    "OUT12_5": (I >= 13) + (I == 12) * 0.5,
    "RING08_SOFT": at(6, 7, 8, 16, 17, 18, halves=(5, 9, 15, 19)),
    "RING08_5": at(6, 7, 8, 9, 15, 16, 17, 18),
    "RING10_5": at(5, 6, 7, 8, 9, 15, 16, 17, 18, 19),
    "RING10_3": at(6, 7, 8, 9, 10, 14, 15, 16, 17, 18),
    "SMOOTHSTEP": S,
    **{f"SMOOTHSTEP*{q}": fold(q * S) for q in (2, 3, 4)},
    **{f"SMOOTHSTEP/{q}": step(fold(q * X)) for q in (2, 3, 4)},
    "COSINE": (1 + np.cos(np.pi * X)) / 2,
    "FAKE_CUBIC_HERMITE": FAKE,
    "TRUE_CUBIC_HERMITE": TRUE,
    "ALL_A": ZERO,
    "ALL_B": ONE,
}
REVERSED = {
    "GRAD_A": "GRAD_V",
    "REVERSE-SMOOTHSTEP": "SMOOTHSTEP",
    "REVERSE_COSINE": "COSINE",
    "TRUE_REVERSE_CUBIC_HERMITE": "TRUE_CUBIC_HERMITE",
    "FAKE_REVERSE_CUBIC_HERMITE": "FAKE_CUBIC_HERMITE",
    **{f"R_SMOOTHSTEP{s}{q}": f"SMOOTHSTEP{s}{q}" for s in "*/" for q in (2, 3, 4)},
}
EVERY = {**FORWARD, **{name: 1 - FORWARD[base] for name, base in REVERSED.items()}}


def test_there_are_38():
    assert len(PRESETS) == 38
    assert set(PRESETS) == set(EVERY)
    assert len(SD_BLOCKS) == 25


@pytest.mark.parametrize("name", PRESETS)
def test_preset(name):
    base, values = preset(name)
    assert base == (1.0 if name == "ALL_B" else 0.0)
    assert len(values) == 25
    np.testing.assert_allclose(values, EVERY[name], rtol=0, atol=2e-15)
    assert all(0.0 <= value <= 1.0 for value in values)


def test_some_numbers_are_exact():
    assert preset("GRAD_V")[1][12] == 0.0
    assert preset("SMOOTHSTEP")[1][12] == 0.5
    assert preset("FAKE_CUBIC_HERMITE")[1][24] == 1.0
    assert preset("SMOOTHSTEP*2")[1] == preset("SMOOTHSTEP*2")[1][::-1]


def test_names_in_any_case():
    assert find_preset("grad_v") == "GRAD_V"
    assert preset("all_b") == preset("ALL_B")
    assert find_preset("GRAD-V") is None
    with pytest.raises(KeyError):
        preset("nothing")


SELECTORS = {
    "default": Rank.DEFAULT,
    "unet": Rank.HALF,
    "base": Rank.HALF,
    "vae": Rank.COMPONENT,
    "text_encoder": Rank.COMPONENT,
    "clip_l": Rank.ENCODER,
    "clip_g": Rank.ENCODER,
    "IN00-IN05": Rank.RANGE,
    "IN11-OUT00": Rank.RANGE,
    "M00-M00": Rank.RANGE,
    "OUT05": Rank.BLOCK,
    "OUT05.attn2": Rank.PART,
    "IN00-M00.norm.weight": Rank.PART,
    "*.weight": Rank.GLOB,
    "OUT0?": Rank.GLOB,
    "[ab].c": Rank.GLOB,
    "model.diffusion_model.out.2.bias": Rank.NAME,
    "weight": Rank.NAME,
    "seeds": Rank.NAME,
}


@pytest.mark.parametrize("text", SELECTORS)
def test_selectors(text):
    assert read_selector(text).rank is SELECTORS[text]


WRONG = {
    "IN05-IN00": ("backwards", '"IN00-IN05"'),
    "OUT01-IN03.attn1": ("backwards", '"IN03-OUT01.attn1"'),
    "OUT12": ("no architecture", "OUT11"),
    "IN00-IN12": ("no architecture", "IN11"),
    "M01": ("no architecture", "M00"),
    "OUT5": ("not a block", '"OUT05"'),
    "out05": ("not a block", '"OUT05"'),
    "in4.attn2": ("not a block", '"IN04.attn2"'),
    "mid": ("not a block", '"M00"'),
    "OUTALL": ("not a block", '"OUT00-OUT11"'),
    "in": ("not a block", '"IN00-IN11"'),
    "in00-in05": ("not a block", '"IN00-IN05"'),
    "defualt": ("not a selector", '"default"'),
    "Base": ("not a selector", '"base"'),
    "clip-l": ("not a selector", '"clip_l"'),
    "presets": ("not a selector", '"preset"'),
    "elementals": ("not a selector", '"elemental"'),
    "Random": ("not a selector", '"random"'),
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_no_selector(text):
    says, hint = WRONG[text]
    assert says in read_selector(text)
    assert hint in selector_hint(text)
