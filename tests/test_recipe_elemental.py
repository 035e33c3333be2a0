"""Elemental rules: the text that supermerger reads, against its rules said again in the plainest way."""

from __future__ import annotations

import json
import tomllib

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from test_recipe_weights import NUMBERS, SD1, SDXL, UNKNOWN, parse, refused, unresolved

from mergekit_sd.errors import RecipeError
from mergekit_sd.recipe.load import load_recipe
from mergekit_sd.recipe.positions import Where, scan
from mergekit_sd.recipe.weights import WEIGHTS_SCHEMA, parse_weights
from mergekit_sd.recipe.write import recipe_text


def in_block(word, block, order):
    if "-" not in word:
        return word == block
    ends = [order.index(end) for end in word.split("-")]
    return min(ends) <= order.index(block) <= max(ends)


def reference(text, layout, name):
    """What a text says of a tensor: rule after rule, the last that means it wins."""
    order = ["BASE", *layout.architecture.blocks]
    block = layout.places[name].block or "BASE"
    ratio = None
    for rule in text.replace("\n", ",").split(","):
        if not rule.strip():
            continue
        blocks, elements, number = rule.split(":")
        meant = []
        for words, test in (
            (blocks.split(), lambda word: in_block(word, block, order)),
            (elements.split(), lambda word: word in name),
        ):
            if not words:
                meant.append(True)
            elif words[0] == "NOT":
                meant.append(not any(test(word) for word in words[1:]))
            else:
                meant.append(any(test(word) for word in words))
        if all(meant):
            ratio = float(number)
    return ratio


def rules_for(layout):
    order = ("BASE", *layout.architecture.blocks)
    block = st.sampled_from(order)
    word = block | st.tuples(block, block).map("-".join)
    element = st.sampled_from(["attn", "attn1", "attn2.to_k", "norm", "weight", "0", "first_stage_model"])
    ratio = st.sampled_from(["0", "0.25", "1", "+.5", "1e-1"])

    def part(words):
        return st.tuples(st.sampled_from(["", "NOT "]), st.lists(words, min_size=1, max_size=3)).map(
            lambda both: both[0] + " ".join(both[1])
        ) | st.just("")

    rule = st.tuples(part(word), part(element), ratio).map(":".join)
    separator = st.sampled_from([",", ", ", "\n", ",\n", " , ,"])
    return st.lists(st.tuples(rule, separator).map("".join), min_size=1, max_size=5).map("".join)


@given(st.sampled_from([SD1, SDXL]).flatmap(lambda layout: st.tuples(st.just(layout), rules_for(layout))))
def test_every_text(case):
    layout, text = case
    expected = {name: reference(text, layout, name) for name in layout.names}
    weights = parse(text)
    assert weights == parse(weights.describe())
    for rule in weights.elemental:
        assume(any(reference(rule.text, layout, name) is not None for name in layout.names))
    assert weights.resolve(layout, layout.names) == {name: value or 0.0 for name, value in expected.items()}
    table = parse({"preset": "GRAD_A", "elemental": text}).resolve(layout, layout.names)
    under = parse("GRAD_A").resolve(layout, layout.names)
    assert table == {name: under[name] if value is None else value for name, value in expected.items()}


def values(text, layout, *parts):
    """The numbers that tensors whose name has one of these parts have."""
    resolved = parse(text).resolve(layout, layout.names)
    return [{resolved[name] for name in layout.names if part in name} for part in parts]


def test_the_examples_of_supermergers_page():
    parts = (".out03.0.attn2", ".out05.0.attn1", ".out05.0.norm", ".out06.0.attn2")
    assert values("OUT03 OUT04 OUT05:attn2 attn1.to_q:0.5", SD1, *parts) == [{0.5}, {0.5}, {0.0}, {0.0}]
    parts = (".out06.0.attn1", ".out06.0.attn2.to_k", ".out06.0.norm")
    assert values("OUT06:attn:0.5,OUT06:attn2.to_k:0.2", SD1, *parts) == [{0.5}, {0.2}, {0.0}]
    parts = (".out04.0.attn1", ".out05.0.attn1", "in00.0.attn1", "first_stage_model")
    assert values("NOT OUT04:attn:1", SD1, *parts) == [{0.0}, {1.0}, {1.0}, {0.0}]
    assert values("OUT05:NOT attn proj:0.2", SD1, ".out05.0.attn1", ".out05.0.norm") == [{0.0}, {0.2}]


def test_blocks_are_the_architectures_own():
    parts = (".in08.", ".m00.", ".out00.", ".out08.", "time_embed", "first_stage_model", "conditioner.1")
    assert values("M00-OUT00::1", SDXL, *parts) == [{0.0}, {1.0}, {1.0}, {0.0}, {0.0}, {0.0}, {0.0}]
    assert values("OUT00-IN08::1", SDXL, *parts) == [{1.0}, {1.0}, {1.0}, {0.0}, {0.0}, {0.0}, {0.0}]
    assert values("BASE-IN00::1", SDXL, *parts) == [{0.0}, {0.0}, {0.0}, {0.0}, {1.0}, {1.0}, {1.0}]
    assert values("BASE:first_stage_model:1", SDXL, *parts) == [{0.0}, {0.0}, {0.0}, {0.0}, {0.0}, {1.0}, {0.0}]
    assert values("NOT BASE::1", SDXL, *parts) == [{1.0}, {1.0}, {1.0}, {1.0}, {1.0}, {0.0}, {0.0}]


def test_rules_lie_above_blocks_and_parts_and_below_globs_and_names():
    name = "model.diffusion_model.out05.0.attn2.to_k.weight"
    glob = {"*.attn1.to_q.weight": 0.3}
    table = {"weights": NUMBERS, "OUT05": 0.1, "OUT05.attn2": 0.2, "elemental": "OUT05:attn:0.7", **glob}
    resolved = parse(table).resolve(SD1, SD1.names)
    assert resolved[name] == 0.7
    assert resolved[name.replace("attn2.to_k", "attn1.to_q")] == 0.3
    assert resolved["model.diffusion_model.out05.0.norm.weight"] == 0.1
    assert parse(table | {name: 0.9}).resolve(SD1, SD1.names)[name] == 0.9
    # where a rule decides, selectors below it may differ, and where globs decide, a rule may
    clash = {"default": 0, "OUT03-OUT05": 0.1, "OUT05-OUT07": 0.2}
    assert "different" in unresolved(clash, SD1).message
    assert parse(clash | {"elemental": "OUT05::1"}).resolve(SD1, SD1.names)[name] == 1
    assert parse({"default": 0, "elemental": "M00::1", "*.m00.*": 0.5}).resolve(SD1, SD1.names)


def test_one_spelling_for_one_meaning():
    text = " OUT03-OUT05 : attn1   attn2:.50\n,NOT M00::1.0,\n"
    assert parse(text).describe() == "OUT03-OUT05:attn1 attn2:0.5, NOT M00::1"
    assert parse(text) == parse({"elemental": text, "default": 0})
    assert hash(parse(text)) == hash(parse(parse(text).describe()))
    for table in (
        {"elemental": "M00::1"},
        {"preset": "GRAD_V", "elemental": "M00::1"},
        {"default": 1, "elemental": "M00::0"},
    ):
        described = parse(table).describe()
        assert described == table
        assert parse(json.loads(json.dumps(described))) == parse(table)
    assert parse("M00::0") != parse("M00::-0.5", extrapolate=True)


# --- refusals --------------------------------------------------------------------------------------

BAD = {
    "two_parts": ("IN04:attn", '"IN04:attn" is no elemental rule', "blocks:elements:ratio"),
    "four_parts": ("IN04:attn:0.5:1", "is no elemental rule", "blocks:elements:ratio"),
    "second": ("IN04:attn:0.5, M00", '"M00" is no elemental rule', "blocks:elements:ratio"),
    "empty": ({"elemental": " ,\n"}, "holds no rule", "blocks:elements:ratio"),
    "number": ({"elemental": 0.5}, "elemental takes rules, not the number 0.5", "blocks:elements:ratio"),
    "preset": ({"elemental": "GRAD_V"}, '"GRAD_V" is no elemental rule', "blocks:elements:ratio"),
    "ratio": ("IN04:attn:x", 'The ratio of "IN04:attn:x" is no number', "blocks:elements:ratio"),
    "ratio_missing": ("IN04:attn:", "is no number", "blocks:elements:ratio"),
    "ratio_nan": ("IN04:attn:nan", "is no number", "blocks:elements:ratio"),
    "ratio_random": ("IN04:attn:R", "is no number", "random = [0, 1]"),
    "ratio_huge": ("IN04:attn:1e999", "must be a finite number", None),
    "ratio_high": ("IN04:attn:1.5", 'The ratio of "IN04:attn:1.5" is 1.5', "extrapolate = true"),
    "case": ("in04:attn:0.5", '"in04:attn:0.5" names in04, which is not a block', '"IN04"'),
    "base": ("Base::0.5", "names Base, which is not a block", '"BASE"'),
    "short": ("OUT5::0.5", "names OUT5, which is not a block", '"OUT05"'),
    "kind": ("OUT::0.5", "names OUT, which is not a block", "OUT00-OUT11"),
    "vae": ("VAE::0.5", "names VAE, which is not a block", "BASE:first_stage_model"),
    "unlike": ("elbow::0.5", "names elbow, which is not a block", "IN00 to IN11"),
    "range_end": ("IN04-IN12::0.5", "names IN12, which is not a block", "IN00 to IN11"),
    "range_of_three": ("IN04-IN05-IN06::0.5", "names IN04-IN05-IN06, which is not a block", None),
    "range_blank": ("IN04 - IN06::0.5", "names -, which is not a block", None),
    "not_alone": ("NOT:attn:0.5", "NOT stands before nothing", "or nothing"),
    "not_in_the_middle": ("OUT03 NOT OUT04::0.5", "NOT is not the first word", "before the whole list"),
    "escaped": ("M00:\x1b:x", "\\x1b", None),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rules(name):
    value, says, hint = BAD[name]
    error = refused(value)
    assert says in error.message
    assert hint is None or hint in error.hint
    assert error.key == ("steps.mix.alpha.elemental" if isinstance(value, dict) else "steps.mix.alpha")


def test_beyond_the_bounds():
    assert parse("M00::1.5", extrapolate=True).describe() == "M00::1.5"


def test_rules_of_another_architecture():
    error = unresolved("IN08-IN09:attn:0.5", SDXL)
    assert error.message == '"IN08-IN09:attn:0.5" names IN09, which this model does not have.'
    assert error.hint.startswith("its blocks: BASE, IN00, ")
    assert error.hint.endswith("OUT08")
    assert "needs a known architecture" in unresolved(":q:0.5", UNKNOWN).message


def test_a_rule_that_means_no_tensor():
    error = unresolved({"default": 0, "elemental": "M00:attn3:0.5, M00:attn:0.5"}, SD1)
    assert error.message == '"M00:attn3:0.5" matches no tensor.'
    assert error.key == "steps.mix.alpha.elemental"
    assert "attn1.to_k" in error.hint
    error = unresolved({"default": 0, "elemental": "M00:x:0, M00:y:0", "*.z": 1}, SD1)
    assert error.message == '"*.z", "M00:x:0", "M00:y:0" match no tensor.'
    assert unresolved("M00:attn3:0.5", SD1).key == "steps.mix.alpha"
    # one whose tensors all have another number in the end has matched
    assert parse("M00:attn:0.5, M00::1").resolve(SD1, SD1.names)


def test_tensors_that_no_rule_means():
    assert "No weight for" in unresolved({"elemental": "M00::1"}, SD1).message
    assert set(parse("M00::1").resolve(SD1, SD1.names).values()) == {0.0, 1.0}


def test_line_and_column():
    text = '[steps.mix]\nalpha = { default = 0,\telemental = "in04::1" }\nbeta = "in04::1"\n'
    where = Where("r.toml", ("steps", "mix"), scan(text))
    for key, value, place in (("alpha", {"default": 0, "elemental": "in04::1"}, (2, 24)), ("beta", "in04::1", (3, 1))):
        with pytest.raises(RecipeError) as caught:
            parse_weights(value, where=where.at(key))
        assert (caught.value.line, caught.value.column) == place
    weights = parse_weights({"default": 0, "elemental": "M00:x:1"}, where=where.at("alpha"))
    with pytest.raises(RecipeError) as caught:
        weights.resolve(SD1, SD1.names)
    assert (caught.value.line, caught.value.column) == (2, 24)


# --- in recipes ------------------------------------------------------------------------------------

RECIPE = """recipe = 1
models = { a = "a.safetensors", b = "b.safetensors" }
[steps.mix]
op = "weighted_sum"
a = "a"
b = "b"
alpha = 0.5
[outputs.out]
model = "mix"
file = "out.safetensors"
"""


@pytest.fixture
def load(tmp_path):
    def load(text, overrides=()):
        (tmp_path / "r.toml").write_text(text, encoding="utf-8")
        return load_recipe(tmp_path / "r.toml", dict(overrides)).steps["mix"].parameters["alpha"]

    return load


def test_set_on_the_command_line(load):
    assert load(RECIPE, {"steps.mix.alpha.elemental": '"M00:attn:1"'}) == parse(
        {"default": 0.5, "elemental": "M00:attn:1"}
    )
    assert load(RECIPE, {"steps.mix.alpha.elemental": "M00:attn:1"}) == parse(
        {"default": 0.5, "elemental": "M00:attn:1"}
    )
    assert load(RECIPE, {"steps.mix.alpha": "M00:attn:1, OUT05::0.5"}) == parse("M00:attn:1, OUT05::0.5")


@pytest.mark.parametrize(
    "alpha",
    [
        "OUT03-OUT05:attn1 attn2:0.5,\nNOT M00::1",
        {"weights": NUMBERS, "elemental": "M00::1", "OUT05.attn2": 1.0},
        {"random": [0.25, 0.75], "seed": 3, "vae": 0.0},
    ],
)
def test_a_recipe_survives_its_text(load, alpha):
    data = tomllib.loads(RECIPE)
    data["steps"]["mix"]["alpha"] = alpha
    text = recipe_text(data)
    assert tomllib.loads(text) == data
    assert load(text) == parse(alpha)


def valid(value):
    jsonschema = pytest.importorskip("jsonschema")
    return not list(jsonschema.Draft202012Validator(WEIGHTS_SCHEMA).iter_errors(value))


def test_the_json_schema_takes_what_we_take():
    good = [
        "M00:attn:0.5",
        "M00::1\nM00:attn:0",
        {"default": 0, "elemental": "M00::1"},
        {"weights": NUMBERS},
        {"weights": ",".join(map(str, NUMBERS)), "vae": 0},
        {"random": [0.2, 0.8]},
        {"random": [0.2, 0.8], "seed": 3},
    ]
    bad = [
        "M00",
        {"elemental": "M00"},
        {"elemental": 1},
        {"weights": "GRAD_V"},
        {"weights": [0.5] * 3},
        {"random": [0.5]},
        {"preset": "GRAD_V", "random": [0, 1]},
        {"preset": "GRAD_V", "weights": NUMBERS},
        {"weights": NUMBERS, "random": [0, 1]},
        {"default": 0, "seed": 3},
        {"random": [0, 1], "seed": -1},
    ]
    for value in good:
        parse(value)
        assert valid(value), value
    for value in bad:
        refused(value)
        assert not valid(value), value
