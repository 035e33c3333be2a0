"""Editing a recipe's text: what is written, what stays, and that bars show what the engine resolves."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mergekit_sd as mk
from mergekit_sd.errors import RecipeError, UsageError
from mergekit_sd_tui import drafting, weights
from mergekit_sd_tui.operands import Kind, labels
from mergekit_sd_tui.state import Draft

RECIPE = """# what this is for
recipe = 1  # version

# the parents
[models]
anything = "anything.safetensors"  # the first
# a pinned one
orange = { file = "orange.safetensors", sha256 = "%s" }
third = "third.safetensors"

# first both
[steps.mix]  # a step
op = "weighted_sum"  # method
a = "anything"
# the second
b = "orange"
alpha = { preset = "GRAD_V", base = 0.50, "OUT05.attn2" = 1.0 }  # weights

# then the third
[steps.dream]
op = "add_difference"
a = "mix"
b = "third"
c = "orange"
alpha = 0.7  # strong

# what comes out
[outputs.final]
model = "dream"  # all of it
file = "final.safetensors"

# to look at
[[samples]]
of = ["anything", "final"]
prompt = "a lantern"
""" % ("0" * 64)
COMMENTS = {line.partition("#")[2] for line in RECIPE.splitlines() if "#" in line}


def data(text):
    """The plain data of a text that is a recipe."""
    mk.parse_recipe(text, Path())
    return tomllib.loads(text)


def line(text, start):
    """The line that begins so."""
    return next(each for each in text.splitlines() if each.startswith(start))


# --- a new recipe ---


def test_two_models_become_a_weighted_sum(tmp_path):
    paths = [tmp_path / "sub" / "Anything v3.safetensors", Path("/elsewhere/mix.safetensors")]
    draft = drafting.new_mix(paths, tmp_path)
    assert (draft.path, draft.is_saved) == (None, False)
    assert draft.text == (
        'recipe = 1\n\n[models]\nanything-v3 = "sub/Anything v3.safetensors"\n'
        'mix-2 = "/elsewhere/mix.safetensors"\n\n'
        '[steps.mix]\nop = "weighted_sum"\na = "anything-v3"\nb = "mix-2"\nalpha = 0.5\n\n'
        '[outputs.final]\nmodel = "mix"\nfile = "mix.safetensors"\n'
    )


@pytest.mark.parametrize(("number", "op"), [(3, "add_difference"), (4, "linear"), (7, "linear")])
def test_more_models_take_a_method_for_as_many(tmp_path, number, op):
    draft = drafting.new_mix([tmp_path / f"m{index}.ckpt" for index in range(number)], tmp_path)
    assert data(draft.text)["steps"]["mix"]["op"] == op
    assert len(labels(data(draft.text)["steps"]["mix"])) == number


def test_one_model_has_no_step_and_loras_go_into_the_result(tmp_path):
    assert "steps" not in data(drafting.new_mix([tmp_path / "a.safetensors"], tmp_path).text)
    text = drafting.new_mix([tmp_path / "a.safetensors"], tmp_path, [tmp_path / "fog.safetensors"]).text
    assert data(text)["steps"] == {"styled": {"op": "inject_lora", "model": "a", "loras": ["fog"]}}


def test_nothing_to_merge_is_refused(tmp_path):
    with pytest.raises(UsageError, match="nothing to merge"):
        drafting.new_mix([], tmp_path)


def test_files_under_a_registered_root_are_named_by_it(tmp_path):
    (tmp_path / "store").mkdir()
    mk.add_root("store", tmp_path / "store")
    assert drafting.file_text(tmp_path / "store" / "x" / "a.ckpt", tmp_path / "here") == "store:x/a.ckpt"


NAMES = st.text(st.characters(exclude_characters="/", exclude_categories=["C"]), min_size=1).filter(str.isprintable)


@given(st.lists(NAMES, min_size=1))
@settings(max_examples=40, deadline=None)
def test_any_file_names_make_a_recipe(names):
    paths = [Path("/models") / name for name in names if name not in (".", "..")] or [Path("/models/a")]
    text = drafting.new_mix(paths, Path("/some/dir")).text
    assert [Path(file) for file in data(text)["models"].values()] == paths


# --- parameters ---


def test_one_block_of_a_preset_sets_one_selector_and_keeps_the_rest():
    text = drafting.set_block(RECIPE, "mix", "alpha", {"IN04": 0.35}, "sd1")
    assert line(text, "alpha = {") == (
        'alpha = { preset = "GRAD_V", base = 0.50, "OUT05.attn2" = 1.0, IN04 = 0.35 }  # weights'
    )
    again = drafting.set_block(text, "mix", "alpha", {"IN04": 0.1 + 0.2}, "sd1")
    assert line(again, "alpha = {").endswith("IN04 = 0.3 }  # weights")


def test_one_block_of_a_number_makes_a_table():
    text = drafting.set_block(RECIPE, "dream", "alpha", {"IN04": 0.35}, "sd1")
    assert "alpha = { default = 0.7, IN04 = 0.35 }  # strong\n" in text
    assert data(text)["steps"]["dream"]["alpha"] == {"default": 0.7, "IN04": 0.35}


@pytest.mark.parametrize("count", [25, 26])
def test_one_block_of_a_list_or_of_pasted_text_changes_there(count):
    numbers = [0.5] * count
    in_list = drafting.set_parameter(RECIPE, "dream", "alpha", numbers)
    in_text = drafting.set_parameter(RECIPE, "dream", "alpha", ", ".join(map(str, numbers)))
    for text in (in_list, in_text):
        changed = drafting.set_block(text, "dream", "alpha", {"IN01": 0.2, "OUT11": 1}, "sd1")
        value = data(changed)["steps"]["dream"]["alpha"]
        items = value if isinstance(value, list) else [float(item) for item in value.split(",")]
        assert len(items) == count
        assert (items[-25 + 1], items[-1], items.count(0.5)) == (0.2, 1, count - 2)
        based = drafting.set_block(text, "dream", "alpha", {"base": 0.3}, "sd1")
        assert weights.numbers_of(data(based)["steps"]["dream"]["alpha"], "sd1")["base"] == 0.3


def test_a_weight_of_one_model_leaves_the_others():
    text = drafting.set_method(RECIPE, "dream", "linear")
    text = drafting.set_block(text, "dream", "weights.1", {"M00": 0.5}, "sd1")
    assert data(text)["steps"]["dream"]["weights"] == [1.0, {"default": 1.0, "M00": 0.5}, 1.0]
    text = drafting.set_operand(text, "dream", "models.3", "anything")
    assert data(text)["steps"]["dream"]["weights"] == [1.0, {"default": 1.0, "M00": 0.5}, 1.0, 1.0]
    text = drafting.set_operand(text, "dream", "models.0", None)
    assert data(text)["steps"]["dream"]["weights"] == [{"default": 1.0, "M00": 0.5}, 1.0, 1.0]


def test_a_preset_keeps_the_base():
    assert weights.with_preset(0.4, "GRAD_A", "sd1") == {"preset": "GRAD_A", "base": 0.4}
    assert weights.with_preset({"preset": "GRAD_V", "vae": 1.0, "IN03": 0.1}, "GRAD_A", "sdxl") == {
        "preset": "GRAD_A",
        "vae": 1.0,
    }


def test_many_blocks_become_a_list_and_parts_stay():
    numbers = weights.numbers_of(0.5, "sdxl")
    changes = weights.curve(numbers | {"IN00": 0.0, "OUT08": 1.0}, "IN00", "OUT08", "linear")
    made = weights.changed({"default": 0.5, "vae": 0.0, "OUT03.attn2": 1.0, "IN00-IN03": 0.1}, changes, "sdxl")
    assert list(made) == ["weights", "vae", "OUT03.attn2"]
    assert made["weights"][0] == 0.5
    assert made["weights"][1:] == [weights.tidy(index / 18) for index in range(19)]


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_copied_text_is_what_a_paste_makes(family):
    numbers = weights.numbers_of({"preset": "COSINE", "base": 0.25, "M00": 0.125}, family)
    text = weights.as_text(numbers)
    assert text.count(",") == len(mk.family_blocks(family)) - 1
    pasted = weights.numbers_of(weights.pasted(0.9, text, family), family)
    assert pasted == pytest.approx(numbers, abs=1e-9)
    without = weights.pasted(0.9, text.partition(",")[2], family)
    assert weights.numbers_of(without, family) == pytest.approx(numbers | {"base": 0.9}, abs=1e-9)


@pytest.mark.parametrize("text", ["", "1,2,3", "0.1 0.2", "grad_x", ",".join(["0.5"] * 20), ",".join(["x"] * 26)])
def test_text_that_is_no_weights_is_refused(text):
    with pytest.raises((UsageError, RecipeError)):
        weights.pasted(0.5, text, "sd1")


def test_curves_run_from_one_number_to_the_other():
    numbers = weights.numbers_of({"default": 0.0, "IN02": 0.2, "IN06": 0.6}, "sd1")
    for name in weights.CURVES:
        for ends in (("IN02", "IN06"), ("IN06", "IN02")):
            made = weights.curve(numbers, *ends, name)
            assert list(made) == ["IN02", "IN03", "IN04", "IN05", "IN06"]
            assert (made["IN02"], made["IN06"]) == (0.2, 0.6)
            assert all(0.2 <= value <= 0.6 for value in made.values())
    assert weights.curve(numbers, "IN02", "IN06", "linear")["IN04"] == 0.4


def test_scaling_stays_within_bounds_and_inverting_twice_is_nothing():
    numbers = weights.numbers_of({"default": 0.3, "IN02": 0.8}, "sd1")
    assert weights.scaled(numbers, 2, 0.0, 1.0)["IN02"] == 1.0
    assert weights.scaled(numbers, 2, 0.0, None)["IN02"] == 1.6
    assert weights.inverted(weights.inverted(numbers)) == numbers


# --- steps, operands, methods ---


def test_a_new_step_takes_the_outputs_of_what_it_changes():
    text, name = drafting.add_step(RECIPE, "weighted_sum", ["dream", "orange"])
    assert data(text)["steps"][name] == {"op": "weighted_sum", "a": "dream", "b": "orange", "alpha": 0.5}
    assert data(text)["outputs"]["final"]["model"] == name
    assert (
        'alpha = 0.7  # strong\n\n[steps.step1]\nop = "weighted_sum"\na = "dream"\nb = "orange"\nalpha = 0.5\n\n'
        "# what comes out\n[outputs.final]\n"
    ) in text


def test_the_first_step_stands_before_the_outputs(tmp_path):
    draft = drafting.new_mix([tmp_path / "a.ckpt"], tmp_path)
    text, name = drafting.add_step(draft.text, "prune", ["a"])
    assert text.index("[models]") < text.index(f"[steps.{name}]") < text.index("[outputs.final]")


def test_a_removed_step_gives_its_place_to_its_first_operand():
    text = drafting.remove_step(RECIPE, "mix")
    assert data(text)["steps"]["dream"]["a"] == "anything"
    assert "# then the third" in text
    assert data(drafting.remove_step(text, "dream"))["outputs"]["final"]["model"] == "anything"


def test_operands_stand_before_parameters_with_their_comments():
    given = """\
recipe = 1
[models]
a = "a.safetensors"
b = "b.safetensors"
c = "c.safetensors"

[steps.mix]
op = "weighted_sum"  # the method
a = "a"
# two halves
alpha = 0.5  # half
b = "b"

# written
[outputs.final]
model = "mix"
file = "f.safetensors"
"""
    wanted = given.replace("weighted_sum", "add_difference").replace('# two halves\nalpha = 0.5  # half\nb = "b"\n', "")
    wanted = wanted.replace('a = "a"\n\n#', 'a = "a"\nb = "b"\nc = "c"\n# two halves\nalpha = 0.5  # half\n\n#')
    assert drafting.set_method(given, "mix", "add_difference") == wanted


def test_a_text_that_moves_names_what_lies_beside_it(tmp_path, monkeypatch):
    (tmp_path / "below").mkdir()
    for name in ("a", "below/b"):
        (tmp_path / f"{name}.safetensors").touch()
    text = (
        'recipe = 1\n[models]\na = "a.safetensors"  # A\nb = { file = "below/b.safetensors" }\nc = "none.safetensors"\n'
    )
    moved = drafting.moved(text, tmp_path, tmp_path / "below")
    assert tomllib.loads(moved)["models"] == {
        "a": str(tmp_path / "a.safetensors"),
        "b": {"file": "b.safetensors"},
        "c": "none.safetensors",
    }
    assert "# A" in moved
    assert drafting.moved(text, tmp_path, tmp_path) == text
    assert drafting.moved("recipe = [", tmp_path, tmp_path / "below") == "recipe = ["


def test_a_method_takes_the_operands_over_and_keeps_what_it_knows():
    text = drafting.set_method(RECIPE, "mix", "add_difference")
    step = data(text)["steps"]["mix"]
    assert (step["a"], step["b"], step["c"]) == ("anything", "orange", "third")
    assert step["alpha"]["preset"] == "GRAD_V"
    assert "c = " in text.partition("# then the third")[0]
    back = data(drafting.set_method(text, "mix", "n_average"))["steps"]["mix"]
    assert back == {"op": "n_average", "models": ["anything", "orange", "third"]}


@pytest.mark.parametrize("op", mk.OPERATIONS)
def test_every_method_can_be_taken_or_says_why_not(op):
    operation = mk.OPERATIONS[op]
    if "delta" in {operand.space for operand in operation.operands} | {operation.result} or operation.result == "lora":
        with pytest.raises(RecipeError) as caught:
            drafting.set_method(RECIPE, "mix", op)
        assert caught.value.hint
    else:
        assert data(drafting.set_method(RECIPE, "mix", op))["steps"]["mix"]["op"] == op


def test_what_would_be_no_recipe_is_refused_and_nothing_has_happened():
    with pytest.raises(RecipeError, match="circle"):
        drafting.set_operand(RECIPE, "mix", "a", "dream")
    with pytest.raises(RecipeError, match="must be between 0 and 1"):
        drafting.set_block(RECIPE, "dream", "alpha", {"IN04": 1.5}, "sd1")
    with pytest.raises(RecipeError, match="There is no model or step"):
        drafting.remove_model(RECIPE, "third")
    with pytest.raises(RecipeError):
        drafting.set_parameter("recipe = ", "mix", "alpha", 0.5)


def test_models_and_outputs_and_samples_are_added(tmp_path):
    text = drafting.add_models(RECIPE, [tmp_path / "third.safetensors"], tmp_path)
    assert data(text)["models"]["third-2"] == "third.safetensors"
    assert text.index("third-2 = ") < text.index("# first both")
    text = drafting.set_model(text, "orange", tmp_path / "new.safetensors", tmp_path)
    assert data(text)["models"]["orange"] == {"file": "new.safetensors"}
    text = drafting.set_output(text, "final", "dtype", "fp32")
    assert text.index("dtype = ") < text.index("# to look at")
    text = drafting.add_sample(text, ["mix"], 'a "cat"', steps=8)
    assert data(text)["samples"][1] == {"of": ["mix"], "prompt": 'a "cat"', "steps": 8}


def test_a_detached_recipe_finds_its_models_from_anywhere(tmp_path):
    (tmp_path / "orange.safetensors").touch()
    text = drafting.detached(Draft(RECIPE, tmp_path / "r.toml"))
    models = data(text)["models"]
    assert models["orange"]["file"] == str(tmp_path / "orange.safetensors")
    assert models["anything"] == "anything.safetensors"  # not there: looked for as ever
    assert "samples" not in data(text)


# --- any sequence of edits ---

BLOCKS = mk.family_blocks("sd1")
NUMBERS = st.floats(0, 1).map(weights.tidy)
EDITS = st.one_of(
    st.tuples(st.just("block"), st.sampled_from(BLOCKS), NUMBERS),
    st.tuples(st.just("curve"), st.sampled_from(BLOCKS), st.sampled_from(BLOCKS), st.sampled_from([*weights.CURVES])),
    st.tuples(
        st.just("value"), st.one_of(NUMBERS, st.sampled_from(mk.PRESETS), st.lists(NUMBERS, min_size=26, max_size=26))
    ),
    st.tuples(st.just("preset"), st.sampled_from(mk.PRESETS)),
    st.tuples(st.just("step"), st.sampled_from(["weighted_sum", "add_difference", "linear", "ties"])),
    st.tuples(
        st.just("method"), st.sampled_from(["slerp", "sum_twice", "linear", "add_difference", "task_arithmetic"])
    ),
    st.tuples(st.just("operand"), st.sampled_from(["anything", "orange", "third", "mix", "dream"])),
    st.tuples(st.just("model"), st.sampled_from(["x.ckpt", "y z.ckpt"])),
    st.tuples(st.just("output"), st.sampled_from(["fp32", "keep"])),
)


def apply(text, step, edit):
    """One edit of a step, by any of the functions; where it would be no recipe, the text as it was."""
    what, *values = edit
    plain = data(text)["steps"][step]
    others = {
        "step": lambda op: drafting.add_step(text, op, [step, "third"])[0],
        "method": lambda op: drafting.set_method(text, step, op),
        "operand": lambda name: drafting.set_operand(text, step, next(iter(labels(plain))), name),
        "model": lambda name: drafting.add_models(text, [Path(name)], Path.cwd()),
        "output": lambda dtype: drafting.set_output(text, "final", "dtype", dtype),
    }
    try:
        return others[what](*values) if what in others else apply_weights(text, step, plain, what, values)
    except RecipeError:
        return text


def apply_weights(text, step, plain, what, values):
    """The same for the step's first weights; the bars show what was set."""
    bars = [p for p in mk.OPERATIONS[plain["op"]].parameters if Kind.of(p) is Kind.BLOCKS]
    if not bars:
        return text
    parameter = f"{bars[0].name}.0" if bars[0].kind.each else bars[0].name
    now = drafting.value_of(text, step, parameter)
    if what in ("value", "preset"):
        value = values[0] if what == "value" else weights.with_preset(now, values[0], "sd1")
        return drafting.set_parameter(text, step, parameter, value)
    numbers = weights.numbers_of(now, "sd1")
    changes = {values[0]: values[1]} if what == "block" else weights.curve(numbers, *values)
    made = drafting.set_block(text, step, parameter, changes, "sd1")
    shown = weights.numbers_of(drafting.value_of(made, step, parameter), "sd1")
    assert shown == pytest.approx(numbers | changes, abs=1e-9)  # no part selector covers most of a block
    return made


@given(st.lists(st.tuples(st.sampled_from(["mix", "dream"]), EDITS), max_size=8))
@settings(max_examples=60, deadline=None)
def test_any_edits_keep_comments_and_order_and_give_a_recipe(edits):
    text = RECIPE
    for step, edit in edits:
        text = apply(text, step, edit)
        now = data(text)
        assert list(now)[:4] == ["recipe", "models", "steps", "outputs"]
        gone = {"# the second"} if "b" not in now["steps"]["mix"] else set()
        assert all(f"#{comment}" in text for comment in COMMENTS if f"#{comment}" not in gone | ON_LINES)
    assert [name for name in now["steps"] if name in ("mix", "dream")] == ["mix", "dream"] if edits else True


# Comments behind a value: a parameter that a method does not have takes its own with it.
ON_LINES = {"# weights", "# strong"}


@given(
    st.dictionaries(st.sampled_from([*BLOCKS, "default", "preset", "IN00-IN05", "vae"]), NUMBERS, min_size=1),
    st.sampled_from(["sd1", "sd2", "sdxl"]),
)
@settings(max_examples=60, deadline=None)
def test_bars_show_what_the_engine_gives_each_tensor(table, family):
    table = {key: "SMOOTHSTEP" if key == "preset" else value for key, value in table.items()}
    try:
        bars = mk.block_weights(table, family)
    except RecipeError:
        return
    names = mk.family_blocks(family)
    for block in names[1:]:
        number = names.index(block) - 1
        inside = "IN00-IN05" in table and block in [f"IN{index:02}" for index in range(6)]
        one = table.get(block, table["IN00-IN05"] if inside else None)
        if one is None:
            full = dict(zip(mk.SD_BLOCKS, mk.preset("SMOOTHSTEP")[1], strict=True))
            one = full[block] if "preset" in table else table["default"]
        assert (bars[block].value, bars[block].is_one) == (one, True), number
    assert bars["base"].is_one or "vae" in table


def test_families_have_their_own_blocks_and_others_are_refused():
    assert [len(mk.family_blocks(family)) for family in ("sd1", "sd2", "sdxl")] == [26, 26, 20]
    assert mk.family_blocks("sd1") == ("base", *mk.SD_BLOCKS)
    with pytest.raises(UsageError, match="no architecture"):
        mk.block_weights(0.5, "sd9")
    with pytest.raises(RecipeError, match="no preset"):
        mk.block_weights("GRAD_X", "sd1")
