"""Names: cycles, spaces, what is used, and the order of steps."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_sd.errors import RecipeError
from mergekit_sd.recipe.graph import order, reachable, spaces
from mergekit_sd.recipe.load import load_recipe, recipe_from_data


def recipe_of(steps, outputs=None, models="abc", samples=()):
    """Steps as `name: "op x y"`."""
    operands = {"add_difference": "abc", "weighted_sum": "ab", "subtract": "ab", "add": "ab", "scale": "a"}
    tables = {}
    for name, text in steps.items():
        op, *names = text.split()
        tables[name] = {"op": op, **dict(zip(operands[op], names, strict=True))}
    data = {
        "recipe": 1,
        "models": {name: f"{name}.st" for name in models},
        "steps": tables,
        "outputs": {name: {"model": model, "file": f"{name}.st"} for name, model in (outputs or {}).items()},
        "samples": [{"of": list(samples), "prompt": "x"}] if samples else [],
    }
    return recipe_from_data(data, folder=Path())


def refused(*args, **options):
    with pytest.raises(RecipeError) as caught:
        recipe_of(*args, **options)
    assert caught.value.exit_code == 2
    return caught.value


def test_cycles_are_printed():
    error = refused({"x": "weighted_sum a y", "y": "weighted_sum z b", "z": "scale x"}, {"o": "a"})
    assert "x → y → z → x" in error.message
    assert error.key == "steps.x.b"
    assert error.hint
    assert "x → x" in refused({"x": "weighted_sum a x"}).message
    error = refused({"u": "scale x", "x": "scale y", "y": "scale x"}, {"o": "a"})
    assert error.message.endswith(": x → y → x.")


def test_a_cycle_has_a_place(tmp_path):
    path = tmp_path / "r.toml"
    lines = ["recipe = 1", "[models]", "m = 'm'", "[steps.x]", "op = 'scale'", "  a = 'y'", "[steps.y]", "op = 'scale'"]
    path.write_text("\n".join([*lines, "a = 'x'"]), encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert (caught.value.key, caught.value.line, caught.value.column) == ("steps.x.a", 6, 3)


@pytest.mark.timeout(20)
def test_long_chains():
    steps = {f"s{n}": f"scale s{n + 1}" for n in range(3000)} | {"s3000": "scale a"}
    recipe = recipe_of(steps, {"o": "s0"}, models="a")
    assert [step.name for step in order(recipe)] == [f"s{n}" for n in range(3000, -1, -1)]
    assert "circle" in refused(steps | {"s3000": "scale s0"}, models="a").message


def test_operands_meant_otherwise():
    error = refused({"mix": "weighted_sum a bb"}, {"o": "mix"})
    assert error.message == 'There is no model or step "bb".'
    assert error.key == "steps.mix.b"
    error = refused({"mix": "weighted_sum a b", "more": "weighted_sum mxi b"}, {"o": "mix"})
    assert error.hint == 'did you mean "mix"?'
    error = refused({"mix": "weighted_sum a b", "more": "weighted_sum final b"}, {"final": "mix"})
    assert 'an output; write "mix"' in error.hint


def test_spaces():
    steps = {"d": "subtract a b", "half": "scale d", "dd": "weighted_sum d half", "m": "add c dd", "e": "add dd d"}
    recipe = recipe_of(steps, {"o": "m"})
    found = spaces(recipe)
    assert [name for name in found if found[name] == "delta"] == ["d", "half", "dd", "e"]
    assert found["m"] == found["a"] == "weight"


SPACES = {
    "model_as_delta": ({"x": "add a b"}, "steps.x.b", '"b" is a model, but b of add takes a difference', "subtract"),
    "delta_as_model": (
        {"d": "subtract a b", "x": "add_difference a d c"},
        "steps.x.b",
        '"d" is a difference of models, but b of add_difference takes a model',
        "add",
    ),
    "mixed": (
        {"d": "subtract a b", "x": "weighted_sum d c"},
        "steps.x.b",
        '"c" is a model, but a is a difference of models',
        "add",
    ),
    "output": ({"d": "subtract a b"}, "outputs.o.model", '"d" is a difference', "add"),
}


@pytest.mark.parametrize("name", SPACES)
def test_refused_spaces(name):
    steps, key, says, hint = SPACES[name]
    error = refused(steps, {"o": "d"} if name == "output" else {"o": "a"})
    assert error.key == key
    assert says in error.message
    assert hint in error.hint


def test_a_sample_of_a_difference():
    error = refused({"d": "subtract a b"}, {"o": "a"}, samples=["d"])
    assert error.key == "samples.0.of.0"
    # an output of that name is what is meant
    assert recipe_of({"d": "subtract a b"}, {"d": "a"}, samples=["d"])


def test_warnings():
    steps = {"mix": "weighted_sum a b", "lost": "scale mix", "more": "scale lost"}
    recipe = recipe_of(steps, {"o": "mix"})
    assert recipe.warnings == (
        'The step "lost" is used by no output and no sample.',
        'The step "more" is used by no output and no sample.',
        'The model "c" is used by nothing.',
    )
    assert recipe_of(steps, {"o": "mix"}, samples=["more", "c"]).warnings == ()
    assert recipe_of({}, models="a").warnings == (
        "The recipe has no outputs and no samples: there is nothing to make.",
    )


def test_reachable():
    steps = {"z": "weighted_sum y a", "y": "scale c", "x": "scale b"}
    recipe = recipe_of(steps, {"o": "z", "p": "x"})
    assert reachable(recipe, ["o"]) == (["a", "c"], ["y", "z"])
    assert reachable(recipe, ["p", "a"]) == (["a", "b"], ["x"])
    assert reachable(recipe, ["o", "p"]) == (["a", "b", "c"], ["y", "z", "x"])
    assert reachable(recipe, []) == ([], [])


@given(st.permutations(range(7)), st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=7, max_size=7))
def test_order_is_topological_and_repeats(where, pairs):
    def name(number, limit):
        return f"s{number % limit}" if limit and number < limit else "ab"[number % 2]

    steps = {f"s{n}": f"weighted_sum {name(pairs[n][0], n)} {name(pairs[n][1], n)}" for n in range(7)}
    shuffled = {f"s{n}": steps[f"s{n}"] for n in where}
    recipe = recipe_of(shuffled, {"o": "s6"})
    names = [step.name for step in order(recipe)]
    assert sorted(names) == sorted(steps)
    assert names == [step.name for step in order(recipe_of(shuffled, {"o": "s6"}))]
    for position, each in enumerate(names):
        for operand in recipe.steps[each].operands.values():
            assert operand in "ab" or operand in names[:position]
