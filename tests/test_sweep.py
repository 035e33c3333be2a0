"""Sweeps: which variants a recipe with `{ try = […] }` has, each as its own recipe would be."""

from __future__ import annotations

import pytest

from mergekit_sd.errors import RecipeError
from mergekit_sd.recipe.load import load_recipe
from mergekit_sd.recipe.sweep import MOST, read_sweep

RECIPE = """\
recipe = 1
[models]
a = "a.safetensors"
b = "b.safetensors"
[steps.mix]
op = "weighted_sum"
a = "a"
b = "b"
alpha = {alpha}
[steps.more]
op = "weighted_sum"
a = "mix"
b = "b"
alpha = {more}
[outputs.final]
model = "more"
file = "final.safetensors"
vae = "a"
[[samples]]
of = ["a", "final"]
prompt = "x"
[[samples]]
of = ["b"]
prompt = "y"
"""


@pytest.fixture
def write(tmp_path):
    def write(alpha="{ try = [0.25, 0.5] }", more="0.5", text=RECIPE):
        path = tmp_path / "r.toml"
        path.write_text(text.replace("{alpha}", alpha).replace("{more}", more), encoding="utf-8")
        return path

    return write


def test_a_variant_is_the_recipe_with_its_value(write):
    path = write()
    variants = read_sweep(path)
    assert [each.name for each in variants] == ["alpha 0.25", "alpha 0.5"]
    for each, value in zip(variants, (0.25, 0.5), strict=True):
        assert each.values == {"steps.mix.alpha": value}
        plain = load_recipe(write(str(value)))
        assert each.recipe.steps["mix"].parameters == plain.steps["mix"].parameters
        output = each.recipe.outputs[each.name]
        assert (output.model, output.vae) == ("more", "a")
        write()


def test_what_no_choice_changes_is_drawn_once(write):
    first, second = read_sweep(write())
    assert [sample.of for sample in first.recipe.samples] == [("a", "alpha 0.25"), ("b",)]
    assert [sample.of for sample in second.recipe.samples] == [("alpha 0.5",)]


def test_choices_multiply_and_are_told_apart(write):
    variants = read_sweep(write(more="{ default = 0, OUT05 = { try = [0, 1, 0.125] } }"))
    assert [each.name for each in variants][:4] == [
        "alpha 0.25, OUT05 0",
        "alpha 0.25, OUT05 1",
        "alpha 0.25, OUT05 0.125",
        "alpha 0.5, OUT05 0",
    ]
    assert len(variants) == 6
    same = read_sweep(write(more="{ try = [0, 1] }"))
    assert same[0].name == "mix.alpha 0.25, more.alpha 0"


def test_set_can_try_as_well(write):
    path = write("0.5")
    assert len(read_sweep(path, {"steps.mix.alpha": {"try": [0, 1]}})) == 2


def test_a_sampled_step_gets_a_variant_too(write):
    text = RECIPE.replace('of = ["b"]', 'of = ["mix"]')
    first = read_sweep(write(text=text))[0].recipe
    assert first.outputs["mix, alpha 0.25"].model == "mix"
    assert [sample.of for sample in first.samples] == [("a", "final, alpha 0.25"), ("mix, alpha 0.25",)]


@pytest.mark.parametrize(
    ("alpha", "says", "hint"),
    [
        ("0.5", "Nothing is tried", "try = [0.2"),
        ("{ try = [] }", "nothing to try", "one value"),
        (f"{{ try = {list(range(MOST + 1))} }}", "101 variants", "fewer"),
        ("{ try = [0.5, 2] }", "", ""),
        ('{ try = ["nothing"] }', "", ""),
    ],
)
def test_refusals_say_where(write, alpha, says, hint):
    with pytest.raises(RecipeError) as caught:
        read_sweep(write(alpha))
    assert says in caught.value.message
    assert hint in (caught.value.hint or "")
    assert caught.value.file


def test_a_sweep_without_an_end_is_refused(write):
    text = RECIPE.partition("[outputs")[0]
    with pytest.raises(RecipeError, match="no output"):
        read_sweep(write(text=text))
