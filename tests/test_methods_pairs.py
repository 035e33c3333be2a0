"""Methods for two models on numbers that can be checked by hand, and where their formulas have corners."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import numbers

from mergekit_sd.operations import OPERATIONS


def merge(name, *operands, **parameters):
    return OPERATIONS[name].apply([torch.as_tensor(each, dtype=torch.float32) for each in operands], parameters, None)


def close(result, expected, atol=1e-6):
    torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float32), rtol=1e-6, atol=atol)


# --- products, projections, bounds ----------------------------------------------------------------------


def test_geometric_sum_by_signs():
    found = merge("geometric_sum", [4.0, -4.0, 4.0, -4.0, 0.0], [9.0, -9.0, -9.0, 9.0, 5.0], alpha=1 / 3)
    mean = 4 ** (2 / 3) * 9 ** (1 / 3)
    close(found, [mean, -mean, mean / 2, -mean / 2, 0.0])


def test_geometric_sum_half_way_between_signs_is_zero():
    close(merge("geometric_sum", [4.0, -4.0], [-9.0, 9.0], alpha=0.5), [0.0, 0.0])


@pytest.mark.parametrize(("alpha", "which"), [(0.0, 0), (1.0, 1)])
def test_geometric_sum_ends_are_exact_whatever_is_zero(alpha, which):
    pair = torch.tensor([0.0, 0.0, -2.0, 3.0]), torch.tensor([0.0, -5.0, 0.0, -1.0])
    assert torch.equal(merge("geometric_sum", *pair, alpha=alpha), pair[which])


def test_perpendicular_by_hand():
    close(merge("perpendicular", [[2.0, 0.0], [0.0, 2.0]], [[3.0, 1.0], [5.0, 7.0]]), [[-2.0, 1.0], [5.0, 2.0]])
    close(merge("perpendicular", [0.0, 0.0], [3.0, 1.0]), [3.0, 1.0])


@given(st.integers(2, 300), st.integers(0, 50))
def test_perpendicular_is_at_a_right_angle(size, seed):
    a, b = numbers((size,), "normal", seed), numbers((size,), "normal", seed + 1)
    rest = merge("perpendicular", a, b).double()
    assert abs(float(rest @ a.double())) <= 1e-6 * float(a.double().norm() * b.double().norm())


def test_nearswap_by_hand():
    close(merge("nearswap", [1.0, 1.0, 1.0, 1.0], [1.0, 1.25, 2.0, -1.0], t=0.5), [1.0, 1.25, 1.5, 0.5])


def test_nearswap_gives_what_is_near_bit_for_bit():
    a, b = numbers((500,), "normal", 1), numbers((500,), "normal", 2)
    assert torch.equal(merge("nearswap", a, b, t=1.0), b)
    assert torch.equal(merge("nearswap", a, b, t=0.0), a)


def test_weighted_subtraction_undoes_a_weighted_sum():
    a, b = numbers((50,), "normal", 1), numbers((50,), "normal", 2)
    mixed = merge("weighted_sum", a, b, alpha=0.2)
    close(merge("weighted_subtraction", mixed, b, alpha=0.4, beta=0.5), a.tolist())


def test_weighted_subtraction_of_all_is_finite():
    found = merge("weighted_subtraction", [1.0, 2.0, 1e31], [1.0, 1.0, -1e31], alpha=1.0, beta=1.0)
    assert torch.isfinite(found).all()
    assert found[0] == 1.0
    assert found[1] == pytest.approx(1e6, rel=1e-3)


def test_clamp_by_hand():
    close(merge("clamp", [-1.0, 2.0, 9.0], [0.0, 1.0, 5.0], [3.0, 4.0, 2.0], stiffness=0.0), [0.0, 2.0, 5.0])
    close(merge("clamp", [-1.0, 2.0], [5.0, 6.0], stiffness=0.7), [5.0, 6.0])


@pytest.mark.parametrize(("stiffness", "low", "high"), [(0.0, 0.0, 10.0), (0.5, 1.0, 8.0), (1.0, 2.0, 6.0)])
def test_clamp_stiffens_towards_the_bounds_next_to_their_mean(stiffness, low, high):
    bounds = [[0.0, 0.0], [2.0, 2.0], [6.0, 6.0], [10.0, 10.0]]
    close(merge("clamp", [-99.0, 99.0], *bounds, stiffness=stiffness), [low, high])


def test_clamp_at_a_bound_that_is_the_mean():
    close(merge("clamp", [-99.0, 99.0], [1.0, 1.0], [3.0, 3.0], [2.0, 2.0], stiffness=1.0), [2.0, 2.0])


@pytest.mark.parametrize("stiffness", [0.0, 0.5])
@pytest.mark.parametrize("at", [0, 1, 3])
def test_clamp_shows_nan(stiffness, at):
    operands = [[0.5, 0.5], [0.0, 0.0], [0.2, 0.2], [1.0, 1.0]]
    operands[at] = [0.5, math.nan]
    found = merge("clamp", *operands, stiffness=stiffness)
    assert not found[0].isnan()
    assert found[1].isnan()


# --- Arcee's fusion -------------------------------------------------------------------------------------


def test_arcee_fusion_takes_what_stands_out():
    a = torch.zeros(1, 9)
    b = torch.tensor([[1e-3, 2e-3, -1e-3, 3e-3, -2e-3, 1e-3, 2e-3, -1.0, 1e-3]])
    # Of one row the divergence is one factor: magnitudes decide. Quartiles of 1 1 1 1 2 2 2 3 1000 are 1, 2, 2.
    close(merge("arcee_fusion", a, b), [[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0, 0.0]])


def test_arcee_fusion_of_a_1x1_kernel_is_not_all_of_b():
    a, b = numbers((8, 6, 1, 1), "normal", 1), numbers((8, 6, 1, 1), "normal", 2)
    found = merge("arcee_fusion", a, b)
    assert torch.equal(found.flatten(1), merge("arcee_fusion", a.flatten(1), b.flatten(1)))
    assert not torch.equal(found, b)
    assert not torch.equal(found, a)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_arcee_fusion_hides_nothing(bad, which):
    operands = [numbers((8, 8), "normal", index) for index in range(2)]
    operands[which][3, 3] = bad
    assert not merge("arcee_fusion", *operands).isfinite().all()


# --- slices ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alpha", "beta", "from_b"),
    [
        (0.25, 0.0, [0, 1]),
        (0.3, 0.5, [4, 5]),  # up to row 6.4
        (0.375, 0.75, [0, 6, 7]),
        (1.0, 0.25, [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_tensor_sum_by_hand(alpha, beta, from_b):
    expected = torch.zeros(8, 2)
    expected[from_b] = 1.0
    assert torch.equal(merge("tensor_sum", torch.zeros(8, 2), torch.ones(8, 2), alpha=alpha, beta=beta), expected)


def test_tensor_sum_counts_as_supermerger_does():
    """0.3 + 0.9 − 1 is a little less than 0.2 to the machine: of ten rows that is one."""
    found = merge("tensor_sum", torch.zeros(10), torch.ones(10), alpha=0.3, beta=0.9)
    assert found.nonzero().flatten().tolist() == [0, 9]


def test_tensor_sum_in_columns():
    ones = torch.ones(4, 200)
    found = merge("tensor_sum", 0 * ones, ones, alpha=0.25, beta=0.5, dim=1)
    assert found[0].nonzero().flatten().tolist() == list(range(100, 150))
    assert torch.equal(found, found[:1].expand(4, 200))
    # As supermerger's tensor2: of 40 rows 10 … 20, counted in 100 columns.
    few = merge("tensor_sum", torch.zeros(40, 100), torch.ones(40, 100), alpha=0.25, beta=0.25, dim=1)
    assert few[0].nonzero().flatten().tolist() == list(range(10, 20))
    # A vector's rows.
    assert merge("tensor_sum", [0.0] * 4, [1.0] * 4, alpha=0.5, beta=0.0, dim=1).tolist() == [1.0, 1.0, 0.0, 0.0]


def test_tensor_sum_of_a_single_value():
    """One row, be it a vector's or not."""
    for alpha, beta, expected in ((0.9, 0.0, 0.0), (1.0, 0.0, 1.0), (0.5, 0.5, 1.0), (0.0, 1.0, 0.0)):
        for dim in (0, 1):
            assert merge("tensor_sum", 0.0, 1.0, alpha=alpha, beta=beta, dim=dim).item() == expected
            assert merge("tensor_sum", [0.0], [1.0], alpha=alpha, beta=beta, dim=dim).item() == expected


def test_top_k_tensor_sum_by_hand():
    a, b = [4.0, -1.0, 3.0, 2.0], [10.0, 40.0, 20.0, 30.0]
    # All of a in b's order; then only what has one of the two largest magnitudes: 3 goes third, 4 fourth.
    close(merge("top_k_tensor_sum", a, b, alpha=1.0, beta=0.0), [-1.0, 4.0, 2.0, 3.0])
    close(merge("top_k_tensor_sum", a, b, alpha=0.5, beta=0.5), [4.0, 4.0, 3.0, 3.0])
    # The largest and the smallest.
    close(merge("top_k_tensor_sum", a, b, alpha=0.5, beta=0.75), [-1.0, 4.0, 3.0, 2.0])


@pytest.mark.parametrize("name", ["tensor_sum", "top_k_tensor_sum"])
def test_a_share_beyond_all_is_all(name):
    a, b = numbers((8, 3), "normal", 1), numbers((8, 3), "normal", 2)
    for beyond, end in ((-0.5, 0.0), (2.5, 1.0)):
        for beta in (0.0, 0.25):
            assert torch.equal(merge(name, a, b, alpha=beyond, beta=beta), merge(name, a, b, alpha=end, beta=beta))


@given(st.floats(0, 1))
def test_top_k_tensor_sum_of_no_width_is_a(beta):
    a, b = numbers((40,), "normal", 1), numbers((40,), "normal", 2)
    assert torch.equal(merge("top_k_tensor_sum", a, b, alpha=0.0, beta=beta), a)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("name", "which", "ends"),
    [("top_k_tensor_sum", 0, (0.5, 1)), ("top_k_tensor_sum", 1, (0.5, 1)), ("distribution_crossover", 2, (0.5,))],
)
def test_what_has_no_rank_shows(name, which, ends, bad):
    for alpha in ends:
        operands = [numbers((8, 8), "normal", index) for index, _ in enumerate(OPERATIONS[name].operands)]
        operands[which][3, 3] = bad
        assert not merge(name, *operands, alpha=alpha).isfinite().all()


# --- frequencies ----------------------------------------------------------------------------------------


def waves(*frequencies, length=16):
    return sum(np.cos(2 * np.pi * each * np.arange(length) / length) for each in frequencies)


@pytest.mark.parametrize(("alpha", "from_b"), [(0.0, 0), (0.2, 1), (0.6, 2), (0.9, 3), (1.0, 4)])
def test_crossover_takes_the_high_frequencies_of_b(alpha, from_b):
    # Of a highest frequency of 8: the constant part, 0.25, 0.5 and 1.
    parts = [0, 2, 4, 8]
    a, b = np.zeros(16), waves(*parts)
    expected = waves(*parts[len(parts) - from_b :]) if from_b else a
    close(merge("crossover", a, b, alpha=alpha, tilt=0.0), np.asarray(expected).tolist())
    grid = merge("crossover", np.zeros((4, 16)), np.tile(b, (4, 1)), alpha=alpha**0.5, tilt=0.0)
    assert grid.shape == (4, 16)


def test_crossover_ramps():
    # At 45° the ramp of alpha 1/2 is the frequency itself: a quarter of 2 of 8, all of 8 of 8.
    found = merge("crossover", np.zeros(16), waves(2, 8), alpha=0.5, tilt=0.5)
    close(found, (0.25 * waves(2) + waves(8)).tolist())


def test_crossover_fully_tilted_is_the_weighted_sum():
    a, b = numbers((6, 5, 3, 3), "normal", 1), numbers((6, 5, 3, 3), "normal", 2)
    torch.testing.assert_close(merge("crossover", a, b, alpha=0.3, tilt=1.0), torch.lerp(a, b, 0.3))


@pytest.mark.parametrize("tilt", [0.0, 0.5])
def test_crossover_of_a_1x1_kernel_is_that_of_the_matrix(tilt):
    a, b = numbers((6, 5, 1, 1), "normal", 1), numbers((6, 5, 1, 1), "normal", 2)
    flat = merge("crossover", a[..., 0, 0], b[..., 0, 0], alpha=0.25, tilt=tilt)
    assert torch.equal(merge("crossover", a, b, alpha=0.25, tilt=tilt)[..., 0, 0], flat)
    assert not torch.equal(flat, a[..., 0, 0])


@settings(max_examples=20)
@given(st.floats(0, 1))
def test_frequencies_keep_where_models_agree(alpha):
    a = numbers((5, 4), "normal", 1)
    assert torch.equal(merge("crossover", a, a.clone(), alpha=alpha, tilt=0.3), a)
    assert torch.equal(merge("distribution_crossover", a, a.clone(), -a, alpha=alpha, beta=0.3), a)


def test_distribution_crossover_sorts_by_c():
    """In c's order it is crossover of the vectors."""
    a, b, c = (numbers((24,), "normal", seed) for seed in range(3))
    order = c.argsort()
    found = merge("distribution_crossover", a.view(4, 6), b.view(4, 6), c.view(4, 6), alpha=0.3, beta=0.0)
    assert torch.equal(found.flatten()[order], merge("crossover", a[order], b[order], alpha=0.3, tilt=0.0))
    found = merge("distribution_crossover", a, b, c, alpha=0.3, beta=1.0)
    torch.testing.assert_close(found[order], merge("crossover", a[order], b[order], alpha=0.3, tilt=0.5))


# --- arcs of rows ---------------------------------------------------------------------------------------


def test_nuslerp_turns_each_row_on_its_own():
    a = [[1.0, 0.0], [2.0, 0.0], [3.0, 3.0]]
    b = [[0.0, 1.0], [4.0, 0.0], [-3.0, 3.0]]
    half = math.sqrt(0.5)
    close(merge("nuslerp", a, b, alpha=0.5), [[half, half], [3.0, 0.0], [0.0, 6 * half]])


def test_nuslerp_with_a_base_turns_the_changes():
    base = torch.tensor([[5.0, 7.0], [1.0, 1.0]])
    a, b = base + torch.tensor([[1.0, 0.0], [0.0, 0.0]]), base + torch.tensor([[0.0, 1.0], [2.0, 2.0]])
    half = math.sqrt(0.5)
    close(merge("nuslerp", a, b, base, alpha=0.5), [[5.0 + half, 7.0 + half], [2.0, 2.0]])


def test_nuslerp_of_a_row_is_slerp():
    for shape in ((), (40,), (1, 40), (1, 4, 3, 3)):
        a, b = numbers(shape, "normal", 1), numbers(shape, "normal", 2)
        torch.testing.assert_close(merge("nuslerp", a, b, alpha=0.3), merge("slerp", a, b, alpha=0.3))


def test_rows_are_worked_in_groups(monkeypatch):
    """However many rows are worked on at a time."""
    operands = [numbers((16, 12), "normal", seed) for seed in range(3)]
    expected = merge("nuslerp", *operands, alpha=0.3), merge("arcee_fusion", *operands[:2])
    for module, piece in (("spherical", 24), ("pairs", 40)):
        monkeypatch.setattr(f"mergekit_sd.operations.{module}.PIECE", piece)
    assert torch.equal(merge("nuslerp", *operands, alpha=0.3), expected[0])
    assert torch.equal(merge("arcee_fusion", *operands[:2]), expected[1])


def test_what_works_by_rows_works_on_a_view():
    """Whatever a tensor's strides are."""
    a, b = (numbers((3, 3, 6, 5), "normal", seed).permute(2, 3, 0, 1) for seed in (1, 2))
    for name, parameters in (("nuslerp", {"alpha": 0.3}), ("arcee_fusion", {})):
        expected = merge(name, a.contiguous(), b.contiguous(), **parameters)
        torch.testing.assert_close(merge(name, a, b, **parameters), expected)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_nuslerp_shows_nan(which):
    operands = [numbers((4, 4), "normal", seed) for seed in range(3)]
    operands[which][2, 1] = math.nan
    found = merge("nuslerp", *operands, alpha=0.3)
    assert found[2].isnan().any()
    assert found[[0, 1, 3]].isfinite().all()
