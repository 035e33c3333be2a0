"""Rank rules against their definitions over all values, and a size shared out against all ways to do so."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mergekit_sd.errors import UsageError
from mergekit_sd.lora.ranks import RULES, Candidate, Rule, Spectrum, share_out

EIGHT = np.array([8, 4, 2, 1, 0.5, 0.25, 0.125, 0.0625])
SPECTRA = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12).map(lambda each: np.array(sorted(each, reverse=True)))
SHARES = ("ratio", "quantile", "norm", "error", "sv_cumulative", "sv_fro")


def whole(values: np.ndarray) -> Spectrum:
    return Spectrum(values, float(np.square(values).sum()), len(values))


@pytest.mark.parametrize(
    ("kind", "amount", "rank"),
    [
        ("fixed", 3, 3),
        ("fixed", 99, 8),
        ("threshold", 0.5, 4),
        ("threshold", 100, 1),
        ("threshold", 0, 8),
        ("ratio", 0.25, 2),
        ("quantile", 0.9, 3),
        ("quantile", 0, 1),
        ("norm", 0.9, 2),
        ("norm", 1, 8),
        ("error", 0.3, 2),
        ("error", 0, 8),
        ("sv_ratio", 4, 2),
        ("sv_cumulative", 0.9, 4),
        ("sv_fro", 0.9, 2),
    ],
)
def test_the_rules_on_eight_values(kind: str, amount: float, rank: int) -> None:
    assert Rule(kind, amount).rank(whole(EIGHT)) == rank


@given(SPECTRA, st.floats(0.05, 0.95), st.sampled_from(SHARES))
def test_a_rule_is_its_definition(values: np.ndarray, share: float, kind: str) -> None:
    sums, squares = np.cumsum(values), np.cumsum(values**2)
    least = {
        "ratio": int((values > share * values[0]).sum()),
        "quantile": int((sums < share * sums[-1]).sum()),
        "sv_cumulative": 1 + int(np.argmax(sums >= share * sums[-1])),
        "norm": 1 + int(np.argmax(squares >= share**2 * squares[-1])),
        "sv_fro": 1 + int(np.argmax(squares >= share**2 * squares[-1])),
        "error": int(np.argmax(np.append(squares[-1], squares[-1] - squares) <= share**2 * squares[-1])),
    }[kind]
    assume(np.abs(squares / squares[-1] - share**2).min() > 1e-9)
    assume(np.abs(1 - squares / squares[-1] - share**2).min() > 1e-9)
    assert Rule(kind, share).rank(whole(values)) == max(1, least)


@given(SPECTRA, st.floats(0.05, 0.95), st.sampled_from(SHARES), st.integers(1, 12), st.integers(1, 12))
def test_what_is_decided_early_is_decided_right(
    values: np.ndarray, share: float, kind: str, known: int, most: int
) -> None:
    every = whole(values)
    rule = Rule(kind, share, most=most)
    early = rule.rank(Spectrum(values[:known], every.energy, every.size))
    assert early in (None, rule.rank(every))
    assert rule.rank(every) is not None


@pytest.mark.parametrize("kind", ["ratio", "norm", "error", "sv_cumulative", "quantile"])
def test_a_steep_spectrum_is_decided_by_its_greatest_values(kind: str) -> None:
    values = 4.0 ** -np.arange(40)
    rule = Rule(kind, 0.1 if kind in ("ratio", "error") else 0.9)
    every = whole(values)
    found = rule.rank(Spectrum(values[:12], every.energy, every.size))
    assert found == rule.rank(every)
    assert found is not None


def test_a_cap_decides_what_the_values_leave_open() -> None:
    flat = Spectrum(np.ones(10), 1000.0, 1000)
    assert Rule("threshold", 0.5).rank(flat) is None
    assert Rule("threshold", 0.5, most=10).rank(flat) == 10
    assert Rule("quantile", 0.9).rank(flat) is None
    assert Rule("quantile", 0.9, most=8).rank(flat) == 8


def test_equal_values_are_summed_up_from_a_part_of_them() -> None:
    """What is missing can be no larger than the last, and has the energy of just so many."""
    assert Rule("quantile", 0.45).rank(Spectrum(np.ones(10), 20.0, 20)) == 8
    assert Rule("sv_cumulative", 0.45).rank(Spectrum(np.ones(10), 20.0, 20)) == 9


def test_an_error_below_what_float32_can_tell_waits_for_all_values() -> None:
    values = np.array([1.0, 1e-5])
    assert Rule("error", 1e-6).rank(Spectrum(values, 1.0 + 1e-10, 1000)) is None
    assert Rule("error", 1e-6).rank(whole(values)) == 2


def test_a_change_of_nothing_keeps_rank_one() -> None:
    for kind in RULES:
        assert Rule(kind, 1).rank(whole(np.zeros(4))) in (1, 4)
    assert Rule("norm", 0.9).rank(whole(np.zeros(4))) == 1


@pytest.mark.parametrize(
    ("kind", "amount"),
    [
        ("fixed", 0),
        ("fixed", 2.5),
        ("sv_ratio", 0.5),
        ("ratio", 1.5),
        ("norm", -0.1),
        ("error", math.nan),
        ("threshold", math.inf),
        ("fixed", math.inf),
        ("fixed", math.nan),
    ],
)
def test_a_number_that_a_rule_cannot_mean(kind: str, amount: float) -> None:
    with pytest.raises(UsageError, match=f"rank rule {kind} cannot be"):
        Rule(kind, amount)


def test_rules_and_limits_that_there_are_not() -> None:
    with pytest.raises(UsageError, match="no rank rule 'best'") as refusal:
        Rule("best", 1)
    assert "sv_fro" in str(refusal.value.hint)
    with pytest.raises(UsageError, match="greatest rank cannot be 0"):
        Rule("ratio", 0.5, most=0)


# --- a size for all ------------------------------------------------------------------------------------

MODULES = st.lists(
    st.tuples(st.lists(st.floats(0.01, 10), min_size=1, max_size=4), st.integers(1, 9)), min_size=1, max_size=4
)


def candidates(modules: list[tuple[list[float], int]], cost: int | None = None) -> list[Candidate]:
    return [Candidate(np.array(sorted(values, reverse=True)), cost or each) for values, each in modules]


def gain(modules: list[Candidate], ranks: tuple[int, ...] | list[int]) -> float:
    return sum(float(np.square(each.values[:rank]).sum()) for each, rank in zip(modules, ranks, strict=True))


def spent(modules: list[Candidate], ranks: tuple[int, ...] | list[int]) -> int:
    return sum(each.cost * rank for each, rank in zip(modules, ranks, strict=True))


def best(modules: list[Candidate], size: int) -> float:
    every = itertools.product(*(range(len(each.values) + 1) for each in modules))
    return max(gain(modules, ranks) for ranks in every if spent(modules, ranks) <= size)


@given(MODULES, st.integers(0, 60))
def test_modules_of_one_cost_get_the_best_of_all_shares(modules: list[tuple[list[float], int]], size: int) -> None:
    those = candidates(modules, cost=3)
    assert gain(those, share_out(size, those)) == pytest.approx(best(those, size))


@given(MODULES, st.integers(0, 60))
def test_no_share_of_a_size_is_better_by_more_than_one_rank(modules: list[tuple[list[float], int]], size: int) -> None:
    those = candidates(modules)
    ranks = share_out(size, those)
    assert spent(those, ranks) <= size
    unbought = [each.values[rank] ** 2 for each, rank in zip(those, ranks, strict=True) if rank < len(each.values)]
    assert gain(those, ranks) >= best(those, size) - max(unbought, default=0.0) - 1e-9
    # Nothing more fits.
    room = size - spent(those, ranks)
    assert all(each.cost > room for each, rank in zip(those, ranks, strict=True) if rank < len(each.values))


@given(MODULES, st.data())
def test_a_size_that_the_dearest_ranks_fill_is_spent_as_well_as_can_be(
    modules: list[tuple[list[float], int]], data: st.DataObject
) -> None:
    those = candidates(modules)
    by_worth = sorted(((v**2 / each.cost, each.cost) for each in those for v in each.values), reverse=True)
    size = sum(cost for _, cost in by_worth[: data.draw(st.integers(1, len(by_worth)))])
    assert gain(those, share_out(size, those)) == pytest.approx(best(those, size))


def test_zeros_are_not_bought_and_nothing_has_no_share() -> None:
    assert share_out(1000, [Candidate(np.array([2.0, 0.0, 0.0]), 1), Candidate(np.zeros(2), 1)]) == [1, 0]
    assert share_out(10, []) == []
    assert share_out(3, [Candidate(np.ones(4), 2), Candidate(np.ones(4), 1)]) == [0, 3]


def test_huge_values_are_shared_out_too() -> None:
    assert share_out(2, [Candidate(np.array([1e200, 1e190]), 1), Candidate(np.array([1e199]), 1)]) == [1, 1]
