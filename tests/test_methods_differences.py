"""The three-model methods on numbers worked out by hand, on the hardest ones, and SciPy as the median's judge."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import scipy.ndimage
import torch
from oracle import KINDS, numbers
from oracle_differences import METHODS

from mergekit_sd.operations import OPERATIONS
from mergekit_sd.operations.smoothing import median_filter


def merge(name, a, b, c, **parameters):
    """The operation on numbers, as a list."""
    tensors = [torch.tensor(each, dtype=torch.float32) for each in (a, b, c)]
    return OPERATIONS[name].function(*tensors, **parameters).tolist()


# --- worked out by hand -----------------------------------------------------------------------------


def test_train_difference_adds_more_where_a_is_far_from_b():
    # |b − a| and |b − c|: 1 and 1, 3 and 1, 0 and 1, 2 and 0
    found = merge("train_difference", [0.0, 4.0, 1.0, 3.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0])
    assert found == pytest.approx([0.9, 4.0 + 1.35, 1.0, 3.0])
    assert merge("train_difference", [0.0], [-1.0], [0.0], alpha=0.5) == pytest.approx([-0.45])


def test_add_opposite_knows_what_a_learned():
    # a − c and b − c: the opposite, the same, nothing and 1, 1 and nothing, half of the opposite
    a, b, c = [-1.0, 1.0, 0.0, 1.0, -0.5], [1.0, 1.0, 1.0, 0.0, 1.0], [0.0] * 5
    assert merge("add_opposite", a, b, c) == pytest.approx([-1 + 2, 1, 0 + 1, 1, -0.5 + 1.5])
    assert merge("add_strict_opposite", a, b, c) == pytest.approx([-1 + 2, 1, 0, 1, -0.5 + 1])
    assert merge("add_strict_opposite", a, b, c, alpha=0.25) == pytest.approx([-1 + 0.5, 1, 0, 1, -0.5 + 0.25])


def test_add_perpendicular_adds_what_is_across_the_change_of_a():
    assert merge("add_perpendicular", [2.0, 1.0], [4.0, 4.0], [1.0, 1.0], alpha=0.5) == pytest.approx([2.0, 2.5])
    assert merge("add_perpendicular", [1.0, 1.0], [4.0, 3.0], [1.0, 1.0]) == pytest.approx([4.0, 3.0])
    assert merge("add_perpendicular", [2.0, 1.0], [4.0, 1.0], [1.0, 1.0]) == pytest.approx([2.0, 1.0])


def test_similarity_add_difference_mixes_what_is_alike_and_adds_to_what_is_not():
    # equal, opposite, both zero: added where likeness is 0, mixed half and half where it is 1
    a, b, c = [2.0, 1.0, 0.0], [2.0, -1.0, 0.0], [1.0, 1.0, 1.0]
    assert merge("similarity_add_difference", a, b, c) == pytest.approx([2.0, -1.0, 0.0])
    assert merge("similarity_add_difference", a, b, c, beta=0.0) == pytest.approx([3.0, -1.0, -1.0])
    assert merge("similarity_add_difference", a, b, c, beta=0.5) == pytest.approx([2.5, -1.0, -0.5])
    # half as large: likeness (½ + 1)/2
    assert merge("similarity_add_difference", [2.0], [1.0], [5.0]) == pytest.approx([0.25 * -2 + 0.75 * 1.5])


def test_multiply_quotient_takes_back_what_b_undoes():
    # a/c and b/c: 4 and ¼ (back to c), 4 and ½ (by the square of a half), 2 and ¼ (no further than c), 4 and 2 (stays)
    found = merge("multiply_quotient", [4.0, 4.0, 2.0, 4.0], [0.25, 0.5, 0.25, 2.0], [1.0] * 4)
    assert found == pytest.approx([1.0, 4 * 0.5**0.5, 1.0, 4.0])
    # the fourth power of −1 has the angle π/4
    assert merge("multiply_quotient", [16.0], [-1 / 16], [1.0], alpha=0.25) == pytest.approx([8 * math.sqrt(0.5)])
    assert merge("multiply_quotient", [4.0], [-0.25], [1.0]) == pytest.approx([-1.0])
    assert merge("multiply_quotient", [-4.0], [0.25], [1.0]) == pytest.approx([-1.0])


@pytest.mark.parametrize("zero", range(3))
def test_without_a_quotient_a_stays(zero):
    values = [4.0, 0.25, 1.0]
    values[zero] = 0.0
    assert merge("multiply_quotient", *([each] for each in values)) == [values[0]]


def test_multiply_difference_is_the_geometric_mean_of_the_changes():
    found = merge("multiply_difference", [3.0, -3.0, 3.0, 5.0], [9.0, -9.0, 1.0, -1.0], [1.0] * 4)
    assert found == pytest.approx([1 + 4, 1 - math.sqrt(40), 1.0, 1 + math.sqrt(8)])
    assert merge("multiply_difference", [3.0, 3.0], [0.0, -0.0], [0.0, 0.0], alpha=0.0, beta=1.0) == [3.0, 3.0]
    assert merge("multiply_difference", [5.0], [-1.0], [1.0], alpha=0.75, beta=1.0) == pytest.approx([1 - 2**1.25])


def test_euclidean_add_difference_keeps_the_length_of_the_weighted_sum():
    # changes (3, 0) and (0, 4): half of each is 2.5 long, and d is in their proportions
    assert merge("euclidean_add_difference", [4.0, 1.0], [1.0, 5.0], [1.0, 1.0]) == pytest.approx([2.5, 3.0])
    # changes (2, 4) and (−2, 4): the sum keeps (0, 4), of which half falls to what it cancels
    found = merge("euclidean_add_difference", [2.0, 4.0], [-2.0, 4.0], [0.0, 0.0])
    assert found == pytest.approx([4 / math.sqrt(5), 8 / math.sqrt(5)])
    # beyond: 2·(0, 4) − (3, 0), of which d can only keep what is b's
    found = merge("euclidean_add_difference", [3.0, 0.0], [0.0, 4.0], [0.0, 0.0], alpha=2.0)
    assert found == pytest.approx([0.0, math.hypot(3, 8)])


def test_similar_features_adds_what_is_alike():
    a, b, c = [[1.0, 1.0]] * 4, [[3.0, 1.0]] * 4, [[5.0, 1.0], [-3.0, 1.0], [1.0, 5.0], [1.0, 1.0]]
    # the same direction, the opposite, a right angle, no change: cosines 1, −1, 0, 0
    found = merge("similar_features", a, b, c, gamma=1.0)
    assert np.ravel(found) == pytest.approx([4, 1, 1, 1, 1 + 0.5, 1 + 1, 1 + 0.5, 1])
    found = merge("similar_features", a, b, c, alpha=0.25, beta=1.0, gamma=2.0)
    assert np.ravel(found) == pytest.approx([1, 1, 1 + 0.5, 1, 1 + 0.75 * 1.5, 1 + 0.75, 1 + 0.75 * 1.5, 1])


def test_smooth_add_drops_what_stands_alone():
    zero, single, broad = np.zeros((9, 9)), np.zeros((9, 9)), np.ones((9, 9))
    single[4, 4] = 8.0
    assert merge("smooth_add", zero, single, zero) == zero.tolist()
    assert np.ravel(merge("smooth_add", zero, 2 * broad, broad, alpha=0.5)) == pytest.approx(0.5)


def test_smooth_add_blurs_an_edge():
    step = np.repeat([0.0, 1.0], 10)
    weights = np.exp(-0.5 * np.arange(-4, 5) ** 2) / np.exp(-0.5 * np.arange(-4, 5) ** 2).sum()
    blurred = np.concatenate([np.zeros(6), np.cumsum(weights)[:-1], np.ones(6)])
    assert merge("smooth_add", np.zeros(20), step, np.zeros(20)) == pytest.approx(blurred, abs=1e-7)


# --- the hardest numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(METHODS))
def test_all_kinds_of_three_models_give_numbers(name):
    for seed, kinds in enumerate(product(KINDS, repeat=3)):
        operands = [numbers((4, 2), kind, seed + index) for index, kind in enumerate(kinds)]
        assert torch.isfinite(OPERATIONS[name].function(*operands)).all(), kinds


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("which", ["b", "c"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_shows(name, which, bad):
    if name == "smooth_add" and bad == math.inf:
        pytest.skip("to a median, one infinity is a large number and is dropped as such")
    operands = {each: numbers((4, 4), "normal", seed) for seed, each in enumerate("abc")}
    operands[which][2, 1] = bad
    assert not torch.isfinite(OPERATIONS[name].function(**operands)).all()


# --- the median -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [
        (1,),
        (2,),
        (9,),
        (1, 6),
        (5, 3),
        (17, 12),
        (2, 2, 2),
        (4, 3, 1, 1),
        (1, 1, 3, 3),
        (6, 5, 3, 3),
        (7, 4, 3, 3),
        (2,) * 5,
    ],
)
@pytest.mark.parametrize("coarse", [False, True])
def test_the_median_is_scipys(shape, coarse):
    values = np.random.default_rng(len(shape)).standard_normal(shape).astype("f4")
    values = np.round(values) if coarse else values
    before = values.copy()
    found = median_filter(values)
    np.testing.assert_array_equal(found, scipy.ndimage.median_filter(values, size=3, mode="reflect"))
    np.testing.assert_array_equal(values, before)
    assert found.dtype == np.float32


def test_the_median_takes_views_and_what_is_empty():
    values = np.random.default_rng(0).standard_normal((6, 5, 3, 3)).astype("f4").transpose(2, 1, 3, 0)[:, ::-1]
    np.testing.assert_array_equal(median_filter(values), scipy.ndimage.median_filter(values, size=3, mode="reflect"))
    assert median_filter(np.zeros((4, 0, 2), "f4")).shape == (4, 0, 2)
    assert median_filter(np.float32(3.0).reshape(())) == 3.0
