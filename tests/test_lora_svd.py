"""The greatest singular values by products, against all of them in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_sd.errors import NonFiniteResult
from mergekit_sd.lora import svd
from mergekit_sd.lora.ranks import Rule
from mergekit_sd.lora.svd import Decomposition, spectrum, svd_by_rule, truncated_svd
from mergekit_sd.operations.draws import Draw

DRAW = Draw(0, "tensor")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """As in the engine, whose own threads torch's would only get in the way of."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def order(size: int) -> np.ndarray:
    return np.arange(1, size + 1, dtype=float)


SHAPES = {
    "low rank and noise": lambda i: np.where(i <= 24, 1 / i, 1e-3),
    "low rank and loud noise": lambda i: np.where(i <= 24, 1 / i, 0.05 * (1 - i / (len(i) + 1))),
    "equal, then less": lambda i: np.where(i <= 32, 1.0, 0.05),
    "all equal": np.ones_like,
    "one more than the rank": lambda i: np.where(i <= 33, 1.0, 0.9),
    "1/i": lambda i: 1 / i,
    "i^-1/2": lambda i: i**-0.5,
    "i^-3": lambda i: i**-3.0,
    "1/log": lambda i: 1 / np.log(i + 1),
    "linear": lambda i: 1 - i / (len(i) + 1),
    "noise": lambda i: np.sqrt(1 - (i - 1) / len(i)),
    "steep": lambda i: 10 ** (-i / 8),
    "plateaus": lambda i: np.floor(20 * (1 - i / len(i))) / 20 + 0.01,
    "one giant": lambda i: np.where(i == 1, 1.0, 1e-3 * i**-0.5),
    "one giant and noise": lambda i: np.where(i == 1, 1.0, 1e-3 * (1 - i / (len(i) + 1))),
    "rank 5": lambda i: np.where(i <= 5, 1.0, 0.0),
}


def matrix_of(values: np.ndarray, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    u, v = (
        torch.linalg.qr(torch.randn(side, len(values), generator=generator, dtype=torch.float64)).Q
        for side in (rows, columns)
    )
    return ((u * torch.from_numpy(values)) @ v.T).float()


def again(parts: Decomposition) -> np.ndarray:
    return ((parts.u.double() * parts.s) @ parts.vh.double()).numpy()


def is_orthonormal(columns: torch.Tensor, bound: float = 5e-6) -> bool:
    wide = columns.double()
    return float((wide.T @ wide - torch.eye(wide.shape[1], dtype=torch.float64)).abs().max()) < bound


def check(matrix: torch.Tensor, rank: int, parts: Decomposition) -> None:
    """The error bar, and the shape of what comes out."""
    exact = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    size, norm = min(rank, len(exact)), float(np.linalg.norm(exact))
    assert parts.u.shape == (matrix.shape[0], size)
    assert parts.vh.shape == (size, matrix.shape[1])
    assert (parts.u.dtype, parts.s.dtype, parts.vh.dtype) == (torch.float32, torch.float64, torch.float32)
    assert bool((parts.s[:-1] >= parts.s[1:]).all())
    assert is_orthonormal(parts.u)
    assert is_orthonormal(parts.vh.T)
    assert parts.energy == pytest.approx(norm**2, rel=1e-5)
    error = float(np.linalg.norm(matrix.double().numpy() - again(parts)))
    assert error <= 1.001 * float(np.linalg.norm(exact[size:])) + 1e-6 * norm


@pytest.mark.parametrize(("rows", "columns"), [(320, 256), (200, 700)])
@pytest.mark.parametrize("rank", [1, 8, 32])
@pytest.mark.parametrize("name", SHAPES)
def test_the_error_is_within_a_thousandth_of_the_least(name: str, rank: int, rows: int, columns: int) -> None:
    matrix = matrix_of(SHAPES[name](order(min(rows, columns))), rows, columns)
    check(matrix, rank, truncated_svd(matrix, rank, draw=DRAW))


@pytest.mark.parametrize("name", ["low rank and noise", "i^-1/2", "noise"])
def test_the_error_bar_at_the_size_of_a_layer(name: str) -> None:
    matrix = matrix_of(SHAPES[name](order(640)), 1024, 640)
    check(matrix, 32, truncated_svd(matrix, 32, draw=DRAW))


def test_a_first_gain_is_not_taken_for_the_last() -> None:
    """Values just above the rest: they move little in the first round, and much in the next."""
    values = np.where(order(1280) <= 33, 1.0, 0.9)
    matrix = matrix_of(values, 1280, 1280)
    parts = truncated_svd(matrix, 32, draw=DRAW)
    least = float(np.square(values[32:]).sum())
    assert parts.energy - float(parts.s.square().sum()) <= 1.002 * least


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 100), st.integers(0, 5), st.sampled_from(list(SHAPES)))
def test_any_shape_and_rank(rows: int, columns: int, rank: int, seed: int, name: str) -> None:
    matrix = matrix_of(SHAPES[name](order(min(rows, columns))), rows, columns, seed)
    check(matrix, rank, truncated_svd(matrix, rank, draw=Draw(seed, name)))


@pytest.mark.parametrize("exponent", [-120, -100, 40, 100])
@pytest.mark.parametrize("rank", [8, 150])
def test_any_size_of_values(exponent: int, rank: int) -> None:
    matrix = matrix_of(SHAPES["i^-1/2"](order(160)), 200, 160)
    parts, scaled = (truncated_svd(each, rank, draw=DRAW) for each in (matrix, matrix * 2.0**exponent))
    np.testing.assert_allclose(scaled.s.numpy(), parts.s.numpy() * 2.0**exponent, rtol=1e-5)
    assert is_orthonormal(scaled.u)
    assert is_orthonormal(scaled.vh.T)
    assert scaled.energy == pytest.approx(parts.energy * 4.0**exponent, rel=1e-6)


def test_numbers_below_the_normal_ones_and_near_the_greatest() -> None:
    for value in (1e-45, 1e-40, 3e38):
        parts = truncated_svd(torch.full((100, 90), value), 2, draw=DRAW)
        assert float(parts.s[0]) == pytest.approx(float(np.float32(value)) * math.sqrt(9000), rel=1e-5)
        assert float(parts.s[1]) < 1e-5 * float(parts.s[0])


def test_a_matrix_of_zeros() -> None:
    for rows, columns in ((100, 60), (60, 100)):
        parts = truncated_svd(torch.zeros(rows, columns), 4, draw=DRAW)
        assert (parts.u.shape, parts.vh.shape, parts.energy) == ((rows, 4), (4, columns), 0.0)
        assert not parts.s.any()
        assert is_orthonormal(parts.u)
        assert is_orthonormal(parts.vh.T)


@pytest.mark.parametrize("where", [(0, 0), (59, 99), (31, 0)])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_refused_by_name(where: tuple[int, int], value: float) -> None:
    matrix = torch.ones(60, 100)
    matrix[where] = value
    for call in (lambda: truncated_svd(matrix, 4, draw=Draw(0, "to_q")), lambda: spectrum(matrix, "to_q")):
        with pytest.raises(NonFiniteResult, match="NaN or Inf") as refusal:
            call()
        assert refusal.value.key == "to_q"


def test_sparse_matrices_of_one_row_or_element() -> None:
    single, row = torch.zeros(120, 300), torch.zeros(120, 300)
    single[7, 11] = -3.0
    row[48] = torch.linspace(-1, 1, 300)
    for matrix in (single, row, torch.eye(120, 300)):
        check(matrix, 4, truncated_svd(matrix, 4, draw=DRAW))
        check(matrix.T, 4, truncated_svd(matrix.T, 4, draw=DRAW))


def test_the_result_is_the_draws() -> None:
    matrix = matrix_of(SHAPES["noise"](order(128)), 150, 128)
    first, second = (truncated_svd(matrix, 8, draw=Draw(3, "a")) for _ in range(2))
    assert torch.equal(first.u, second.u)
    assert torch.equal(first.vh, second.vh)
    assert not torch.equal(first.u, truncated_svd(matrix, 8, draw=Draw(4, "a")).u)
    assert not torch.equal(first.u, truncated_svd(matrix, 8, draw=Draw(3, "b")).u)


def test_the_full_rank_gives_the_matrix_to_float32_rounding() -> None:
    for rows, columns in ((128, 96), (96, 300)):
        matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
        parts = truncated_svd(matrix, 96, draw=DRAW)
        assert np.linalg.norm(matrix.double().numpy() - again(parts)) < 1e-7 * float(matrix.norm())


def test_products_are_what_finds_a_small_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """No matrix of the layer's size is ever decomposed."""
    sizes = []
    for name in ("svd", "eigh", "eigvalsh"):
        real = getattr(torch.linalg, name)
        monkeypatch.setattr(
            torch.linalg, name, lambda a, *rest, real=real, **more: (sizes.append(a.shape), real(a, *rest, **more))[1]
        )
    for name in SHAPES:
        truncated_svd(matrix_of(SHAPES[name](order(320)), 320, 320), 32, draw=DRAW)
    assert sizes
    assert max(max(size) for size in sizes) == 32 + svd.OVERSAMPLING


# --- rules -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(300, 180), (180, 300)])
def test_all_values_are_exact(rows: int, columns: int) -> None:
    values = SHAPES["i^-3"](order(180))
    found = spectrum(matrix_of(values, rows, columns) * 1e-20, "")
    np.testing.assert_allclose(found.values * 1e20, values, atol=1e-7)
    assert found.complete
    assert found.energy * 1e40 == pytest.approx(float(np.square(values).sum()), rel=1e-6)


@pytest.mark.parametrize("name", ["1/i", "i^-1/2", "steep", "low rank and noise"])
@pytest.mark.parametrize(
    "rule",
    [
        Rule("fixed", 12),
        Rule("threshold", 0.0315),
        Rule("ratio", 0.0315),
        Rule("quantile", 0.6),
        Rule("quantile", 0.9, most=20),
        Rule("norm", 0.87),
        Rule("error", 0.11),
        Rule("sv_ratio", 31.7),
        Rule("sv_cumulative", 0.45),
        Rule("sv_fro", 0.7, most=16),
        Rule("threshold", 1e-9),
    ],
    ids=lambda rule: f"{rule.kind}-{rule.amount}",
)
def test_a_rule_gets_the_rank_that_all_values_give(name: str, rule: Rule) -> None:
    matrix = matrix_of(SHAPES[name](order(240)), 300, 240)
    parts = svd_by_rule(matrix, rule, draw=DRAW)
    wanted = rule.rank(spectrum(matrix, ""))
    assert wanted is not None
    assert abs(len(parts.s) - wanted) <= (1 if wanted < 200 else 240)
    check(matrix, len(parts.s), parts)


def test_a_rule_that_few_values_decide_needs_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(svd, "spectrum", lambda *_: pytest.fail("all values were asked for"))
    matrix = matrix_of(SHAPES["low rank and noise"](order(512)), 512, 512)
    for rule in (Rule("ratio", 0.03), Rule("error", 0.05), Rule("norm", 0.9), Rule("sv_cumulative", 0.9, most=8)):
        assert len(svd_by_rule(matrix, rule, draw=DRAW).s) <= 24


def test_a_rule_may_take_several_steps() -> None:
    matrix = matrix_of(np.where(order(640) <= 100, 1.0, 0.01), 640, 640)
    assert len(svd_by_rule(matrix, Rule("threshold", 0.5), draw=DRAW).s) == 100


def test_the_first_of_a_decomposition_are_the_greatest() -> None:
    matrix = matrix_of(SHAPES["1/i"](order(128)), 160, 128)
    parts = truncated_svd(matrix, 16, draw=DRAW)
    np.testing.assert_allclose(parts.first(5).s.numpy(), 1 / order(5), rtol=1e-3)
    check(matrix, 5, parts.first(5))
