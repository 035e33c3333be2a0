"""ops, presets, schema: what they print is true, complete, and quick."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest

from mergekit_sd.cli.main import run
from mergekit_sd.operations import OPERATIONS
from mergekit_sd.operations.types import Key, NumberKind
from mergekit_sd.recipe.load import load_recipe
from mergekit_sd.recipe.presets import PRESETS, SD_BLOCKS, preset
from mergekit_sd.recipe.schema import recipe_json_schema
from mergekit_sd.reference import example_recipe, find_operation, folds, markdown, one_shot

REPOSITORY = Path(__file__).parents[1]


def ran(capsys, *arguments):
    code = run(list(arguments))
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


def refused(capsys, *arguments):
    code = run(list(arguments))
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    return err


def narrow(text):
    return max(map(len, text.splitlines())) <= 80


# --- ops ---


def test_ops_lists_every_operation_with_its_formula_by_purpose(capsys):
    out = ran(capsys, "ops")
    flat = " ".join(out.split())
    for operation in OPERATIONS.values():
        assert f"{operation.name} {' '.join(operation.formula.split())}" in flat
        assert out.count(f"{operation.purpose}:\n") == 1
    assert narrow(out)


def test_ops_json_tells_all_of_each(capsys):
    every = json.loads(ran(capsys, "ops", "--json"))["operations"]
    assert sorted(each["name"] for each in every) == sorted(OPERATIONS)
    for each in every:
        operation = OPERATIONS[each["name"]]
        assert each["formula"] == operation.formula
        for told, parameter in zip(each["parameters"], operation.parameters, strict=True):
            default = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
            assert (told["name"], told["default"]) == (parameter.name, default)
            assert told["low"] == getattr(parameter.kind, "low", None)
            assert told["high"] == getattr(parameter.kind, "high", None)
            assert told["options"] == list(getattr(parameter.kind, "options", ()))
        assert [(o["name"], o["space"]) for o in each["operands"]] == [(o.name, o.space) for o in operation.operands]
        assert each["whole_tensor"] is operation.whole
        assert each["by"] == operation.by


@pytest.mark.parametrize("name", OPERATIONS)
def test_ops_name_explains_it_within_80_columns(capsys, name):
    operation, out = OPERATIONS[name], ran(capsys, "ops", name)
    flat = " ".join(out.split())
    for text in (operation.summary, operation.formula, *operation.also, *(p.name for p in operation.parameters)):
        assert " ".join(text.split()) in flat
    assert narrow(out)
    assert ("on whole tensors" if operation.whole else "streaming") in flat.replace("works on", "on")
    assert json.loads(ran(capsys, "ops", name, "--json"))["name"] == name


@pytest.mark.parametrize("name", ["merge_embeddings", "merge_hypernetworks"])
def test_weights_of_files_without_blocks_are_not_told_per_block(capsys, name):
    takes = {each["name"]: each["takes"] for each in json.loads(ran(capsys, "ops", name, "--json"))["parameters"]}
    assert takes["weights"] == "must be given; for each file, any number"


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_example_is_a_recipe_that_loads(tmp_path, name):
    path = tmp_path / "example.toml"
    path.write_text(example_recipe(OPERATIONS[name]), encoding="utf-8")
    recipe = load_recipe(path, {})
    assert name in {step.operation.name for step in recipe.steps.values()}
    assert not recipe.warnings


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_printed_recipe_can_be_copied(capsys, name):
    printed = ran(capsys, "ops", name).split("In a recipe:\n")[1].split("Without a recipe:")[0]
    assert tomllib.loads(printed) == tomllib.loads(example_recipe(OPERATIONS[name]))


@pytest.mark.parametrize("name", [name for name, each in OPERATIONS.items() if one_shot(each)])
def test_a_printed_command_is_one_that_is_taken(capsys, name):
    from mergekit_sd.cli.main import cli

    printed = ran(capsys, "ops", name).split("Without a recipe:\n")[1]
    words = shlex.split(printed.replace("\\\n", " "))
    assert words == shlex.split(one_shot(OPERATIONS[name]))
    assert words[0] == "mergekit-sd"
    command = cli.get_command(click.Context(cli), words[1])
    context = command.make_context(words[1], words[2:])
    if words[1] == "merge":
        assert context.params["method"] == name
        assert name == "formula" or OPERATIONS[name].takes(len(context.params["models"]))


def test_what_takes_or_gives_a_difference_has_no_command(capsys):
    for name in ("subtract", "add"):
        assert one_shot(OPERATIONS[name]) is None
        assert "Without a recipe" not in ran(capsys, "ops", name)


def test_folds_are_found_and_are_true():
    assert folds(OPERATIONS["weighted_sum"]) == [({"alpha": 0.0}, "a"), ({"alpha": 1.0}, "b")]
    assert folds(OPERATIONS["sum_twice"]) == [
        ({"beta": 1.0}, "c"),
        ({"alpha": 0.0, "beta": 0.0}, "a"),
        ({"alpha": 1.0, "beta": 0.0}, "b"),
    ]
    assert folds(OPERATIONS["subtract"]) == []
    for operation in OPERATIONS.values():
        for where, operand in folds(operation):
            rest = {p.name: 0.61 if isinstance(p.kind, NumberKind) else p.default for p in operation.parameters}
            assert operation.folds_to(rest | where, Key("a.weight", "sd1", "unet", "IN04")) == operand


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Add difference", "add_difference"),
        ("ADD DIFFERENCE (A1111)", "add_difference"),
        ("Add (supermerger)", "add_difference"),
        ("add", "add"),
        ("加权和", "weighted_sum"),
        ("Weighted-Sum", "weighted_sum"),
        ("modelmergesimple", "weighted_sum"),
        ("SLERP", "slerp"),
        ("Twice", "sum_twice"),
        ("  sum twice ", "sum_twice"),
    ],
)
def test_another_tools_name_finds_it(text, name):
    assert find_operation(text).name == name


def test_every_alias_finds_its_own():
    for operation in OPERATIONS.values():
        for alias in operation.also:
            assert find_operation(alias) is operation


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("weigted_sum", 'did you mean "weighted_sum"?'),
        ("Ad difference", 'did you mean "Add difference"?'),
        ("qqqqqqqq", "known: weighted_sum"),
        ("", "known: weighted_sum"),
    ],
)
def test_an_unknown_operation_is_refused_with_a_way_out(capsys, text, says):
    err = refused(capsys, "ops", text)
    assert "There is no operation" in err
    assert says in err


def test_an_unknown_operation_is_refused_in_json(capsys):
    assert run(["ops", "weigted_sum", "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["type"], error["hint"]) == ("UsageError", 'did you mean "weighted_sum"?')


def test_a_name_with_escapes_does_not_reach_the_terminal(capsys):
    for command in ("ops", "presets", "completion"):
        assert "\x1b[31m" not in refused(capsys, command, "\x1b[31mred")


def test_a_name_of_several_is_refused_naming_them(monkeypatch):
    from dataclasses import replace

    from mergekit_sd.errors import UsageError

    for name in ("slerp", "scale"):
        monkeypatch.setitem(OPERATIONS, name, replace(OPERATIONS[name], also=("Both (tool)",)))
    with pytest.raises(UsageError) as caught:
        find_operation("both")
    assert sorted(detail.split(":")[0] for detail in caught.value.details) == ["scale", "slerp"]


# --- docs/operations.md ---


def test_the_page_is_the_registrys():
    committed = (REPOSITORY / "docs" / "operations.md").read_text(encoding="utf-8")
    assert committed == markdown(), "python -m mergekit_sd.reference > docs/operations.md"


def test_the_page_is_made_by_the_module():
    command = [sys.executable, "-m", "mergekit_sd.reference"]
    assert subprocess.run(command, capture_output=True, check=True).stdout == markdown().encode()


# --- presets ---


def test_presets_lists_all_38_with_a_curve_of_25_bars(capsys):
    out = ran(capsys, "presets")
    rows = [line.split(maxsplit=2) for line in out.splitlines() if line.split(" ")[0] in PRESETS]
    assert [row[0] for row in rows] == list(PRESETS)
    assert len(rows) == 38
    assert all(len(row[2].replace(" ", "")) == 25 and set(row[2]) <= set(" ▁▂▃▄▅▆▇█") for row in rows)
    assert [row[1] for row in rows] == ["0"] * 37 + ["1"]
    curve = next(row[2] for row in rows if row[0] == "GRAD_V").replace(" ", "")
    assert (curve[0], curve[12], curve[24]) == ("█", "▁", "█")
    assert narrow(out)


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_text_is_the_preset(capsys, name):
    described = json.loads(ran(capsys, "presets", name.lower(), "--json"))
    base, values = preset(name)
    assert [float(number) for number in described["text"].split(",")] == [base, *values]
    assert described["blocks"] == dict(zip(SD_BLOCKS, values, strict=True))
    small = [value for block, value in zip(SD_BLOCKS, values, strict=True) if block[-2:] not in ("09", "10", "11")]
    assert [float(number) for number in described["sdxl_text"].split(",")] == [base, *small]
    assert len(small) == 19


def test_a_presets_numbers_are_printed_to_be_copied(capsys):
    out = ran(capsys, "presets", "OUT12_5")
    assert "\n0,0,0,0,0,0,0,0,0,0,0,0,0,0.5,1,1,1,1,1,1,1,1,1,1,1,1\n" in out
    for block in SD_BLOCKS:
        assert f"{block} " in out
    assert narrow(out.replace(out.splitlines()[4], "").replace(out.splitlines()[8], ""))


def test_presets_json_is_one_report(capsys):
    every = json.loads(ran(capsys, "presets", "--json"))["presets"]
    assert [each["name"] for each in every] == list(PRESETS)


def test_a_pasted_preset_gives_the_presets_weights(tmp_path, capsys):
    described = json.loads(ran(capsys, "presets", "COSINE", "--json"))
    path = tmp_path / "pasted.toml"
    path.write_text(example_recipe(OPERATIONS["weighted_sum"]), encoding="utf-8")
    recipe = load_recipe(path, {"steps.result.alpha": described["text"]})
    assert recipe.data["steps"]["result"]["alpha"] == described["text"]


def test_an_unknown_preset_is_refused_with_a_way_out(capsys):
    assert 'did you mean "SMOOTHSTEP"?' in refused(capsys, "presets", "smoothstp")


# --- schema ---


def test_schema_is_the_recipes_with_and_without_json(capsys):
    assert json.loads(ran(capsys, "schema")) == recipe_json_schema()
    assert ran(capsys, "schema") == ran(capsys, "schema", "--json")


def test_surplus_arguments_are_refused(capsys):
    for command in (["ops", "add", "scale"], ["presets", "COSINE", "X"], ["schema", "X"]):
        assert "unexpected extra argument" in refused(capsys, *command)


# --- all of them ---


@pytest.mark.parametrize("command", ["ops", "ops slerp", "presets", "presets COSINE", "schema", "ops --json"])
def test_no_torch_is_imported(command):
    code = (
        "import sys; from mergekit_sd.cli.main import run; "
        f"code = run({command.split()!r}); sys.exit(code or 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, env={"LANG": "C"})
    assert result.returncode == 0, result.stderr
