"""Random numbers: a function of (seed, tensor name, stream, element), with the distributions they claim."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergekit_sd.operations.draws import Draw

N = 200_000
kinds = pytest.mark.parametrize("kind", ["uniform", "normal"])


def draw(kind, size, start=0, *, seed=7, name="a.weight", stream=0):
    return getattr(Draw(seed, name, start), kind)(torch.zeros(size), stream)


@given(st.sampled_from(["uniform", "normal"]), st.integers(0, 500), st.integers(1, 300))
def test_any_piece_is_the_same_as_in_the_whole(kind, block, size):
    whole = draw(kind, 8 * 500 + 300)
    assert torch.equal(draw(kind, size, 8 * block), whole[8 * block : 8 * block + size])


@kinds
def test_seed_name_and_stream_make_other_numbers(kind):
    first = draw(kind, 1000)
    others = [draw(kind, 1000, seed=8), draw(kind, 1000, name="b.weight"), draw(kind, 1000, stream=1)]
    for number, other in enumerate(others):
        assert abs(np.corrcoef(first, other)[0, 1]) < 0.12, number
    assert torch.equal(first, draw(kind, 1000))


def test_uniform_is_uniform():
    values = draw("uniform", N).double().numpy()
    assert values.min() >= 0
    assert values.max() < 1
    assert scipy.stats.kstest(values, "uniform").pvalue > 0.01
    assert np.array_equal(values * 2**24, np.round(values * 2**24))


def test_normal_is_normal():
    values = draw("normal", N).double().numpy()
    assert scipy.stats.kstest(values, "norm").pvalue > 0.01
    assert abs(np.corrcoef(values[::2], values[1::2])[0, 1]) < 0.01  # the two of a pair


def test_the_shape_is_the_tensors():
    assert Draw(1, "x").normal(torch.zeros(3, 5)).shape == (3, 5)
    assert Draw(1, "x").uniform(torch.zeros(())).shape == ()
    assert Draw(1, "x").normal(torch.zeros(4, 0)).shape == (4, 0)


def test_the_numbers_stay_what_they_are():
    """Recipes made with them must give the same bytes with the next version."""
    uniform = draw("uniform", 4, seed=1, name="x")
    normal = draw("normal", 4, seed=1, name="x")
    torch.testing.assert_close(uniform, torch.tensor(UNIFORM), rtol=0, atol=0)
    torch.testing.assert_close(normal, torch.tensor(NORMAL), rtol=1e-6, atol=0)


UNIFORM = [0.6077372431755066, 0.9044227600097656, 0.3137199282646179, 0.5632823705673218]
NORMAL = [0.8233951926231384, -0.5639551877975464, -1.4038774967193604, -0.5896071791648865]
