"""`op = "formula"`: what may be written, what counts as a model or a difference, and what comes out."""

from __future__ import annotations

import models
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import f64, recipe
from test_merge import check, load, triple

import mergekit_sd as mk
from mergekit_sd.errors import RecipeError, ShapeMismatch, UsageError
from mergekit_sd.recipe.formula import parse_formula, space_of
from mergekit_sd.recipe.positions import Where

WEIGHTS = {"a": "weight", "b": "weight", "c": "weight"}


def formula(expr, **more):
    return {"m": {"op": "formula", "expr": expr, **more}}


def value(term, values):
    """What a parsed formula comes to for plain numbers."""
    if isinstance(term, str):
        return values[term]
    return sum(factor * value(inner, values) for factor, inner in term.terms)


numbers = st.integers(1, 9).map(str) | st.floats(0.1, 9).map(lambda x: f"{x:.3f}")
expressions = st.recursive(
    st.sampled_from(["a", "b", "c"]),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+-"), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
        st.tuples(inner, st.sampled_from("+-"), inner).map(lambda t: f"{t[0]} {t[1]} ({t[2]})"),
        st.tuples(numbers, inner).map(lambda t: f"{t[0]}*({t[1]})"),
        st.tuples(inner, numbers).map(lambda t: f"({t[0]})/{t[1]}"),
        inner.map(lambda t: f"-({t})"),
        st.tuples(numbers, numbers, inner).map(lambda t: f"({t[0]} - {t[1]}*0.5) * ({t[2]})"),
    ),
    max_leaves=12,
)


@given(expressions)
def test_a_formula_means_what_python_means(text):
    values = {"a": 3.25, "b": -1.5, "c": 0.75}
    expected = eval(text, {}, values)
    parsed = parse_formula(text, Where())
    assert value(parsed, values) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert parsed.count(dict.fromkeys(values, 1.0)) == pytest.approx(
        eval(text, {}, dict.fromkeys(values, 1.0)), rel=1e-9, abs=1e-9
    )
    again = parse_formula(parsed.text({name: name for name in values}), Where())
    assert value(again, values) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a + ", "a name, a number or ( is expected (character 5)"),
        ("(a + b", "a bracket is not closed"),
        ("a b", '"b" is not expected here (character 3)'),
        ("a * b", "models cannot be multiplied"),
        ("a + 1", "a sum needs a model beside the number 1"),
        ("2 * 3", "the formula needs a model"),
        ("a / b", "only numbers divide"),
        ("a / 0", "only numbers divide"),
        ("a ^ b", '"^" is not expected here (character 3)'),
        ("(" * 60 + "a" + ")" * 60, "nested too deeply"),
        ("-" * 60 + "a", "nested too deeply"),
        ('a + "b', "is not expected here (character 5)"),
    ],
)
def test_what_cannot_be_read_says_where(text, says):
    with pytest.raises(RecipeError) as caught:
        parse_formula(text, Where())
    assert says in caught.value.message


@pytest.mark.parametrize(
    ("text", "space"),
    [
        ("a + 0.7*(b - c)", "weight"),
        ("0.3*a + 0.6*b + 0.1*c", "weight"),
        ("(a + b + c)/3", "weight"),
        ("a - b", "delta"),
        ("0.5*(a - b) + 2*(b - c)", "delta"),
        ("−a + 2·b", "weight"),
        ("d*3 + a", "weight"),
        ("d", "delta"),
    ],
)
def test_models_and_differences_are_told_apart(text, space):
    assert space_of(parse_formula(text, Where()), WEIGHTS | {"d": "delta"}, Where()) == space


@pytest.mark.parametrize(("text", "models"), [("a + b", "2"), ("a + 0.5*b", "1.5"), ("0.5*a", "0.5"), ("a-2*b", "-1")])
def test_a_sum_of_whole_models_is_refused(tmp_path, text, models):
    where = recipe(tmp_path, {"a": "a.safetensors", "b": "b.safetensors"}, formula(text))
    with pytest.raises(RecipeError, match=f"sums up to {models} models") as caught:
        mk.load(where)
    assert caught.value.line
    assert caught.value.key == "steps.m.expr"


def test_an_unknown_name_is_refused_at_the_formula(tmp_path):
    where = recipe(tmp_path, {"mix": "a.safetensors"}, formula("mix + 0.7*(mix - mxi)"))
    with pytest.raises(RecipeError, match='no model or step "mxi"') as caught:
        mk.load(where)
    assert caught.value.hint == 'did you mean "mix"?'
    assert caught.value.key == "steps.m.expr"


def test_a_cycle_through_a_formula_is_seen(tmp_path):
    steps = {"x": {"op": "formula", "expr": "a + (y - a)"}, "y": {"op": "scale", "a": "x"}}
    with pytest.raises(RecipeError, match="x → y → x"):
        mk.load(recipe(tmp_path, {"a": "a.safetensors"}, steps))


@pytest.mark.parametrize(
    ("text", "oracle"),
    [
        ("a + 0.7*(b - c)", lambda a, b, c: a + 0.7 * (b - c)),
        ("(a + b + c)/3", lambda a, b, c: (a + b + c) / 3),
        ("0.25*a + 0.75*c", lambda a, b, c: 0.25 * a + 0.75 * c),
        ("a - 0.5*(a - b) - 0.5*(a - c)", lambda a, b, c: 0.5 * b + 0.5 * c),
    ],
)
def test_the_result_is_the_formulas(room, text, oracle):
    mk.run(recipe(room, triple("sd1"), formula(text)))
    a, b, c = load(room, "sd1-a", "sd1-b", "sd1-c")
    made = models.read(room / "out.safetensors")
    check(made, a, lambda key: oracle(f64(a[key]), f64(b[key] if key in b else a[key]), f64(c[key])))


def test_a_formula_over_steps_is_one_pass(room):
    steps = {
        "mix": {"op": "weighted_sum", "a": "a", "b": "b", "alpha": 0.4},
        "task": {"op": "subtract", "a": "c", "b": "b"},
        "m": {"op": "formula", "expr": "mix + 0.5*task"},
    }
    mk.run(recipe(room, triple("sd1"), steps))
    a, b, c = load(room, "sd1-a", "sd1-b", "sd1-c")

    def oracle(key):
        x, y, z = (f64(each[key]) for each in (a, b, c))
        return 0.6 * x + 0.4 * y + 0.5 * (z - y)

    check(models.read(room / "out.safetensors"), a, oracle)


def test_the_leading_model_gives_the_tensors_not_the_first_named(tmp_path):
    a, b, c = (models.checkpoint("sd1", seed) for seed in range(3))
    lost = "model.diffusion_model.out.2.weight"
    del b[lost]
    a["extra.weight"] = a[lost].clone()
    for name, tensors in zip("abc", (a, b, c), strict=True):
        models.write(tmp_path / f"{name}.safetensors", tensors)
    files = {letter: f"{letter}.safetensors" for letter in "abc"}
    mk.run(recipe(tmp_path, files, formula("0.5*(b - c) + a")), force=True)
    made = models.read(tmp_path / "out.safetensors")
    assert set(made) == set(a) - {"extra.weight"}  # junk is dropped
    # A tensor that one of a difference lacks has no difference.
    assert models.same(made[lost], a[lost])
    # One that a whole model lacks stays as the first has it.
    made_plan = mk.plan(recipe(tmp_path, files, formula("0.5*a + 0.5*b"), name="s.toml"))
    assert made_plan.steps[0].kept == (lost,)


def test_inpainting_channels_in_a_formula(tmp_path):
    for name, seed, kind in (("a", 0, "sd1-inpainting"), ("b", 1, "sd1"), ("c", 2, "sd1")):
        models.write(tmp_path / f"{name}.safetensors", models.checkpoint(kind, seed))
    files = {letter: f"{letter}.safetensors" for letter in "abc"}
    mk.run(recipe(tmp_path, files, formula("a + 0.5*(b - c)")))
    a, b, c = (models.read(tmp_path / files[letter])[models.CONV_IN] for letter in "abc")
    made = models.read(tmp_path / "out.safetensors")[models.CONV_IN]
    assert models.same(made[:, 4:], a[:, 4:])
    expected = f64(a[:, :4]) + 0.5 * (f64(b) - f64(c))
    np.testing.assert_allclose(f64(made[:, :4]), expected, atol=2e-4)
    with pytest.raises(ShapeMismatch, match="shape"):
        mk.plan(recipe(tmp_path, files, formula("b + 0.5*(a - c)"), name="s.toml"))


def test_python_writes_formulas_too(room):
    a, b, c = (mk.open(room / f"sd1-{letter}.safetensors") for letter in "abc")
    node = mk.ops.formula("x + 0.7*(y - z)", x=a, y=b, z=c)
    one = mk.save(node, room / "one.safetensors")
    other = mk.save(mk.ops.add_difference(a, b, c, alpha=0.7), room / "other.safetensors")
    assert one.counts == other.counts
    expected = models.read(room / "other.safetensors")
    for key, tensor in models.read(room / "one.safetensors").items():
        np.testing.assert_allclose(f64(tensor), f64(expected[key]), rtol=2e-3)
    with pytest.raises(UsageError, match="by name"):
        mk.ops.formula("x + y", x=a)


@settings(max_examples=5)
@given(st.floats(-2, 2))
def test_a_number_alone_scales_a_difference(factor):
    parsed = parse_formula(f"{factor!r} * (a - b)" if factor >= 0 else f"-{-factor!r} * (a - b)", Where())
    assert value(parsed, {"a": 3.0, "b": 1.0}) == pytest.approx(2 * factor)
