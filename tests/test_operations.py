"""Laws that every operation keeps, over the whole registry, against formulas in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mergekit_sd.operations import OPERATIONS

BLENDS = ("weighted_sum", "sum_twice", "triple_sum", "slerp")
SHAPES = [(), (0,), (1,), (7,), (64,), (3, 5), (2, 3, 3, 3), (4, 0, 2)]


def slerp(a, b, *, alpha):
    x, y = a.ravel(), b.ravel()
    na, nb = np.linalg.norm(x), np.linalg.norm(y)
    cosine = np.clip(x @ y / (na * nb), -1, 1) if na and nb else 1.0
    angle = np.arccos(cosine)
    if min(na, nb) <= 1e-30 * max(na, nb):
        return (1 - alpha) * a + alpha * b
    if not 1e-4 < angle < math.pi - 1e-4:
        return (1 - alpha) * a + alpha * b
    turned = (np.sin((1 - alpha) * angle) * a / na + np.sin(alpha * angle) * b / nb) / np.sin(angle)
    return turned * ((1 - alpha) * na + alpha * nb)


# What each operation means, in float64. An operation without an entry fails `test_every_operation_is_known`.
FORMULAS = {
    "weighted_sum": lambda a, b, alpha: (1 - alpha) * a + alpha * b,
    "add_difference": lambda a, b, c, alpha: a + alpha * (b - c),
    "sum_twice": lambda a, b, c, alpha, beta: (1 - beta) * ((1 - alpha) * a + alpha * b) + beta * c,
    "triple_sum": lambda a, b, c, alpha, beta: (1 - alpha - beta) * a + alpha * b + beta * c,
    "subtract": lambda a, b: a - b,
    "add": lambda a, b: a + b,
    "scale": lambda a, alpha: alpha * a,
    "slerp": slerp,
}

every_operation = pytest.mark.parametrize("name", sorted(FORMULAS))
unit = st.floats(0, 1, allow_nan=False)
kinds = st.sampled_from(["normal", "zero", "huge", "tiny", "equal", "opposite"])


def numbers(shape, kind, seed):
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape)
    if kind in ("equal", "opposite"):
        values = np.random.default_rng(0).standard_normal(shape) * (1 if kind == "equal" else -1)
    factor = {"zero": 0.0, "huge": 1e30, "tiny": 1e-40}.get(kind, 0.1)
    return torch.from_numpy(np.asarray(values * factor)).float()


@st.composite
def cases(draw, names=tuple(FORMULAS)):
    operation = OPERATIONS[draw(st.sampled_from(names))]
    shape = draw(st.sampled_from(SHAPES))
    tensors = [numbers(shape, draw(kinds), seed) for seed, _ in enumerate(operation.operands, draw(st.integers(0, 99)))]
    return operation, tensors, {parameter.name: draw(unit) for parameter in operation.parameters}


def test_every_operation_is_known_here():
    assert set(FORMULAS) <= set(OPERATIONS)


@given(cases())
def test_result_is_the_formula(case):
    operation, tensors, parameters = case
    result = operation.function(*tensors, **parameters)
    assert result.dtype == torch.float32
    assert result.shape == tensors[0].shape
    assert torch.isfinite(result).all()
    wide = [np.asarray(each.double().numpy()) for each in tensors]
    with np.errstate(all="ignore"):
        oracle = FORMULAS[operation.name](*wide, **parameters)
    largest = max((float(np.abs(each).max()) for each in wide if each.size), default=0.0)
    # A norm is a property of the whole tensor: slerp's quotient may lose some bits near a straight line.
    slack = 2e-4 if operation.name == "slerp" else 4e-7
    np.testing.assert_allclose(result.double().numpy(), oracle, rtol=0, atol=slack * largest + 3e-45)


@given(cases())
def test_out_changes_nothing_and_operands_stay(case):
    operation, tensors, parameters = case
    before = [each.clone() for each in tensors]
    free = operation.function(*tensors, **parameters)
    out = torch.full(tensors[0].shape, math.nan)
    given_out = operation.function(*tensors, **parameters, out=out)
    assert torch.equal(free, given_out)
    if not operation.whole:
        assert given_out.data_ptr() == out.data_ptr()
    assert all(torch.equal(one, other) for one, other in zip(before, tensors, strict=True))


@given(cases())
def test_folding_is_what_the_function_gives(case):
    operation, tensors, parameters = case
    for corner in range(2 ** len(parameters)):
        ends = {name: float(corner >> bit & 1) for bit, name in enumerate(parameters)}
        folds_to = operation.folds_to(ends)
        if folds_to is None:
            continue
        operand = tensors[[each.name for each in operation.operands].index(folds_to)]
        largest = max((float(each.abs().max()) for each in tensors if each.numel()), default=0.0)
        torch.testing.assert_close(operation.function(*tensors, **ends), operand, rtol=0, atol=2e-7 * largest)


def test_alpha_0_gives_a():
    for name in ("weighted_sum", "slerp", "add_difference"):
        assert OPERATIONS[name].folds_to({"alpha": 0.0}) == "a"
    for name in ("sum_twice", "triple_sum"):
        assert OPERATIONS[name].folds_to({"alpha": 0.0, "beta": 0.0}) == "a"
        assert OPERATIONS[name].folds_to({"alpha": 0.0, "beta": 1.0}) == "c"
        assert OPERATIONS[name].folds_to({"alpha": 1.0, "beta": 0.0}) == "b"
    assert OPERATIONS["scale"].folds_to({"alpha": 1.0}) == "a"
    assert OPERATIONS["subtract"].folds_to({}) is None


@given(cases(names=BLENDS))
def test_blend_of_equals_is_the_same(case):
    operation, (first, *_), parameters = case
    result = operation.function(*[first.clone() for _ in operation.operands], **parameters)
    torch.testing.assert_close(result, first, rtol=3e-7, atol=3e-45)


@given(cases(names=("weighted_sum", "slerp")))
def test_symmetry(case):
    operation, (a, b), parameters = case
    forth = operation.function(a, b, alpha=parameters["alpha"])
    back = operation.function(b, a, alpha=1 - parameters["alpha"])
    largest = max((float(each.abs().max()) for each in (a, b) if each.numel()), default=0.0)
    # Subnormal numbers are 1.4e-45 apart: a few of those steps are rounding, too.
    torch.testing.assert_close(forth, back, rtol=1e-5, atol=2e-6 * largest + 6e-45)


@given(cases(names=("weighted_sum", "add_difference", "sum_twice", "triple_sum", "subtract", "add", "slerp")))
def test_scaling_the_operands_scales_the_result(case):
    operation, tensors, parameters = case
    largest = max((float(each.abs().max()) for each in tensors if each.numel()), default=0.0)
    assume(largest == 0 or largest > 1e-30)  # four times a subnormal number is another rounding
    scaled = operation.function(*[each * 4 for each in tensors], **parameters)
    torch.testing.assert_close(scaled, operation.function(*tensors, **parameters) * 4, rtol=1e-6, atol=1e-6 * largest)


@given(st.integers(1, 400), st.floats(0.01, 0.99), st.integers(0, 50))
def test_slerp_keeps_the_norm(size, alpha, seed):
    a, b = numbers((size,), "normal", seed), numbers((size,), "normal", seed + 1)
    b *= a.double().norm() / b.double().norm()
    cosine = float(torch.dot(a.double(), b.double()) / a.double().norm() ** 2)
    assume(abs(cosine) < 0.999)
    result = OPERATIONS["slerp"].function(a, b, alpha=alpha)
    assert float(result.double().norm()) == pytest.approx(float(a.double().norm()), rel=1e-5)


@settings(max_examples=20)
@given(st.floats(0, 1))
def test_slerp_of_unlike_sizes_is_finite(alpha):
    tiny, huge = numbers((64,), "tiny", 1), numbers((64,), "huge", 2) * 1e7
    for pair in ((tiny, huge), (huge, tiny)):
        assert torch.isfinite(OPERATIONS["slerp"].function(*pair, alpha=alpha)).all()


@every_operation
def test_nonfinite_operands_show(name):
    operation = OPERATIONS[name]
    parameters = {parameter.name: 0.5 for parameter in operation.parameters}
    for bad in (math.nan, math.inf):
        tensors = [torch.ones(8) for _ in operation.operands]
        tensors[0][3] = bad
        assert not torch.isfinite(operation.function(*tensors, **parameters)).all()
