"""Every operation of the registry against its formula in float64, and the laws that it keeps."""

from __future__ import annotations

import importlib
import inspect
import math
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from oracle import CASES, LAWS, examples, numbers

from mergekit_sd.operations import OPERATIONS

for _path in sorted(Path(__file__).parent.glob("oracle_*.py")):
    CASES.update(importlib.import_module(_path.stem).METHODS)

every_method = pytest.mark.parametrize("name", sorted(CASES))


def keeping(law):
    """Parametrised over the operations that keep a law."""
    return pytest.mark.parametrize("name", sorted(name for name, case in CASES.items() if law in case.laws))


def test_every_operation_has_an_oracle():
    assert set(CASES) == {name for name, operation in OPERATIONS.items() if not operation.planned}
    assert all(set(case.laws) <= set(LAWS) for case in CASES.values())


def test_every_operation_says_its_source():
    for operation in OPERATIONS.values():
        assert operation.formula, operation.name
        assert inspect.getdoc(operation.function), operation.name


@every_method
@settings(max_examples=60)
@given(data=st.data())
def test_the_result_is_the_formula(name, data):
    example = data.draw(examples([name]))
    result = example.call()
    first = example.operands[0]
    assert result.dtype == torch.float32
    assert result.shape == first.shape
    if CASES[name].finite:
        assert torch.isfinite(result).all()
    atol = CASES[name].slack * example.largest + 3e-45
    expected = example.oracle()
    assert expected.shape == tuple(first.shape)
    np.testing.assert_allclose(result.double().numpy(), expected, rtol=0, atol=atol)


@every_method
@settings(max_examples=20)
@given(data=st.data())
def test_out_changes_nothing_and_operands_stay(name, data):
    example = data.draw(examples([name]))
    before = [each.clone() for each in example.operands]
    free = example.call()
    out = torch.full(example.operands[0].shape, math.nan)
    given_out = example.call(out=out)
    torch.testing.assert_close(free, given_out, rtol=0, atol=0, equal_nan=True)
    if not example.operation.whole:
        assert given_out.data_ptr() == out.data_ptr()
    assert all(given_out.data_ptr() != each.data_ptr() for each in example.operands if each.numel())
    assert all(torch.equal(one, other) for one, other in zip(before, example.operands, strict=True))


@pytest.mark.parametrize("name", sorted(name for name in CASES if not OPERATIONS[name].whole))
@settings(max_examples=20)
@given(data=st.data())
def test_what_works_by_element_works_on_any_piece(name, data):
    example = data.draw(examples([name], shapes=[(256,)]))
    whole = example.call()
    piece = [each[64:192].clone() for each in example.operands]
    context = example.context
    if "draw" in context:
        draw = context["draw"]
        context = {**context, "draw": type(draw)(draw.seed, draw.name, 64)}
    keywords = {**example.parameters, **context}
    assert torch.equal(example.operation.apply(piece, keywords, None), whole[64:192])


@every_method
@settings(max_examples=20)
@given(data=st.data())
def test_folding_is_what_the_function_gives(name, data):
    example = data.draw(examples([name], kinds=["normal", "bf16", "sparse"]))
    operation, parameters = example.operation, dict(example.parameters)
    for corner in range(2 ** len(parameters)):
        ends = dict(parameters)
        for bit, each in enumerate(parameters):
            if isinstance(parameters[each], float):
                ends[each] = float(corner >> bit & 1)
            elif isinstance(parameters[each], tuple):
                ends[each] = tuple(float(corner >> (bit + at) & 1) for at, _ in enumerate(parameters[each]))
        folds_to = operation.folds_to(ends, example.context.get("key"))
        if folds_to is None:
            continue
        label, _, index = folds_to.partition(".")
        names = [each.name for each in operation.operands]
        operand = example.operands[names.index(label) + int(index or 0)]
        atol = max(CASES[name].slack, 4e-7) * example.largest
        torch.testing.assert_close(example.call(**ends), operand, rtol=0, atol=atol)


@keeping("alpha 0")
@settings(max_examples=20)
@given(data=st.data())
def test_alpha_0_gives_the_first(name, data):
    example = data.draw(examples([name]))
    assert OPERATIONS[name].folds_to({**example.parameters, "alpha": 0.0}, example.context.get("key")) in (
        OPERATIONS[name].operands[0].name,
        None,
    )
    result = example.call(alpha=0.0)
    torch.testing.assert_close(result, example.operands[0], rtol=0, atol=4e-7 * example.largest + 3e-45)


@keeping("equal")
@settings(max_examples=20, suppress_health_check=[HealthCheck.filter_too_much])  # weights that all add up are rare
@given(data=st.data())
def test_a_blend_of_equals_is_the_same(name, data):
    example = data.draw(examples([name]))
    first = example.operands[0]
    if example.operation.many and any(isinstance(each, tuple) for each in example.parameters.values()):
        weights = [each for each in example.parameters.values() if isinstance(each, tuple)]
        assume(all(sum(each) > 0.1 and min(each) >= 0 for each in weights))
    result = example.call([first.clone() for _ in example.operands])
    torch.testing.assert_close(result, first, rtol=6e-7, atol=3e-45 + CASES[name].slack * float(_top(first)))


def _top(tensor):
    return tensor.abs().max() if tensor.numel() else 0.0


@keeping("symmetric")
@settings(max_examples=20)
@given(data=st.data())
def test_symmetry(name, data):
    example = data.draw(examples([name]))
    a, b, *rest = example.operands
    forth = example.call()
    back = example.call([b, a, *rest], alpha=1 - example.parameters["alpha"])
    # Subnormal numbers are 1.4e-45 apart: a few of those steps are rounding, too.
    torch.testing.assert_close(forth, back, rtol=1e-5, atol=2e-6 * example.largest + 6e-45)


@keeping("scales")
@settings(max_examples=20)
@given(data=st.data())
def test_scaling_the_operands_scales_the_result(name, data):
    kinds = [kind for kind in CASES[name].kinds if kind not in ("huge", "tiny")]
    example = data.draw(examples([name], kinds=kinds))
    scaled = example.call([each * 4 for each in example.operands])
    atol = max(CASES[name].slack, 1e-6) * example.largest
    torch.testing.assert_close(scaled, example.call() * 4, rtol=1e-6, atol=4 * atol)


@keeping("commutes")
@settings(max_examples=20)
@given(data=st.data())
def test_the_order_of_the_list_does_not_matter(name, data):
    example = data.draw(examples([name]))
    single = len(example.operation.operands) - 1
    turned = [*example.operands[:single], *reversed(example.operands[single:])]
    swapped = {
        each: tuple(reversed(value)) if isinstance(value, tuple) else value
        for each, value in example.parameters.items()
    }
    back = example.call(turned, **swapped)
    atol = max(CASES[name].slack, 4e-7) * example.largest + 6e-45
    torch.testing.assert_close(example.call(), back, rtol=0, atol=2 * atol)


@pytest.mark.parametrize("name", sorted(name for name, case in CASES.items() if case.shows))
def test_nonfinite_operands_show(name):
    operation = OPERATIONS[name]
    for bad in (math.nan, math.inf):
        example = oracle_example(operation)
        tensors = [each.clone() for each in example.operands]
        tensors[0].view(-1)[3] = bad
        assert not torch.isfinite(example.call(tensors)).all()


def oracle_example(operation):
    """One plain example, parameters at their defaults or in the middle."""
    operands = [numbers((8, 8), "normal", index) for index, _ in enumerate(operation.operands)]
    parameters = {}
    for parameter in operation.parameters:
        default = parameter.default
        if default is None:
            default = getattr(parameter.kind, "options", (0.5,))[0]
        parameters[parameter.name] = (default,) if getattr(parameter.kind, "each", False) else default
    context = dict(CASES[operation.name].context(operands))
    given: dict = {"draw": oracle.Draw(1, "x"), "key": oracle.Key("x", "sd1", "unet", "IN04")}
    context |= {what: given[what] for what in operation.context if what in given and what not in context}
    return oracle.Example(operation, operands, parameters, context)


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
