"""Whole recipes: the contract's example, every refusal of form with its place, and `--set`."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType

import pytest

from mergekit_sd.errors import RecipeError
from mergekit_sd.operations import OPERATIONS
from mergekit_sd.recipe.load import ModelRef, load_recipe, recipe_from_data
from mergekit_sd.recipe.samplers import SAMPLERS
from mergekit_sd.recipe.schema import recipe_json_schema
from mergekit_sd.recipe.weights import BlockWeights

SHA = "543bcb" + "0" * 58
EXAMPLE = f"""\
recipe = 1                              # language version
title  = "Lantern mix"                  # becomes modelspec.title
seed   = 7                              # for the seeded operations
date   = 2026-01-31

[models]                                # every input file, by name
anything = "anything-v3.safetensors"    # relative to this file
orange   = {{ file = "orangemix.safetensors", sha256 = "{SHA}" }}
sd15     = {{ file = "webui:v1-5-pruned.ckpt", weights = "ema" }}
db       = "my-dreambooth.safetensors"
mse      = "vae/vae-ft-mse-840000.safetensors"

[steps.mix]                             # a step = one operation
op    = "weighted_sum"
a     = "anything"
b     = "orange"
alpha = {{ preset = "GRAD_V", base = 0.5, "OUT03-OUT05" = 0.8, "OUT05.attn2" = 1.0 }}

[steps.dream]
op = "add_difference"
a = "mix"
b = "db"
c = "sd15"
alpha = 0.7

[outputs.final]
model = "dream"
file  = "lantern.safetensors"
dtype = "fp16"
overflow = "error"
vae   = "mse"
junk  = "drop"
ema   = "drop"
position_ids = "reset"
# prediction = "v"

[[samples]]
of     = ["anything", "orange", "final"]
prompt = "a lantern in the rain, (film grain:1.2)"
negative = "lowres"
seeds  = [1, 2, 3, 4]
steps  = 20
cfg    = 7.0
sampler = "dpmpp_2m_karras"
size   = [512, 512]
"""

SMALL = """\
recipe = 1
[models]
a = "a.safetensors"
b = "b.safetensors"
[steps.mix]
op = "weighted_sum"
a = "a"
b = "b"
alpha = 0.5
[outputs.out]
model = "mix"
file = "out.safetensors"
[[samples]]
of = ["out"]
prompt = "x"
"""


@pytest.fixture
def load(tmp_path):
    def load(text, overrides=MappingProxyType({})):
        path = tmp_path / "r.toml"
        path.write_text(text, encoding="utf-8")
        return load_recipe(path, overrides)

    return load


def test_the_contracts_example(load, tmp_path):
    recipe = load(EXAMPLE)
    assert recipe.warnings == ()
    assert (recipe.title, recipe.seed, recipe.date) == ("Lantern mix", 7, datetime.date(2026, 1, 31))
    assert (recipe.path, recipe.folder) == (tmp_path / "r.toml", tmp_path)
    assert recipe.models["anything"] == ModelRef("anything", "anything-v3.safetensors")
    assert recipe.models["orange"] == ModelRef("orange", "orangemix.safetensors", SHA)
    assert recipe.models["sd15"] == ModelRef("sd15", "webui:v1-5-pruned.ckpt", None, "ema")
    mix = recipe.steps["mix"]
    assert mix.operation is OPERATIONS["weighted_sum"]
    assert mix.operands == {"a": "anything", "b": "orange"}
    assert mix.parameters["alpha"].describe()["OUT05.attn2"] == 1.0
    assert recipe.steps["dream"].parameters == {"alpha": BlockWeights.constant(0.7)}
    final = recipe.outputs["final"]
    assert (final.name, final.model, final.file, final.vae) == ("final", "dream", "lantern.safetensors", "mse")
    assert (final.overflow, final.junk, final.ema, final.position_ids) == ("error", "drop", "drop", "reset")
    assert (final.dtype_of("unet"), final.dtype_of(None), final.prediction) == ("fp16", "fp16", None)
    (sample,) = recipe.samples
    assert (sample.of, sample.seeds, sample.size) == (("anything", "orange", "final"), (1, 2, 3, 4), (512, 512))
    assert recipe.data["outputs"]["final"]["junk"] == "drop"


def test_defaults(load):
    recipe = load(SMALL.replace("alpha = 0.5\n", ""))
    assert (recipe.title, recipe.seed, recipe.date) == (None, 0, None)
    step = recipe.steps["mix"]
    assert step.parameters == {"alpha": BlockWeights.constant(0.5)}
    assert step.extrapolate is False
    sample = recipe.samples[0]
    assert (sample.negative, sample.seeds, sample.steps, sample.cfg) == ("", (0,), 20, 7.0)
    assert (sample.sampler, sample.size, sample.clip_skip) == ("dpmpp_2m_karras", None, None)


def test_dtypes_per_component(load):
    recipe = load(SMALL.replace('model = "mix"', 'model = "mix"\ndtype = { default = "bf16", vae = "keep" }'))
    output = recipe.outputs["out"]
    assert output.dtype == {"default": "bf16", "vae": "keep"}
    assert [output.dtype_of(part) for part in ("unet", "vae", None)] == ["bf16", "keep", "bf16"]
    assert load(SMALL, {"outputs.out.dtype.vae": "fp32"}).outputs["out"].dtype == {"default": "fp16", "vae": "fp32"}


def test_resolving_later_points_into_the_file(load):
    class Unknown:
        architecture = None
        places = {}  # noqa: RUF012

    recipe = load(SMALL.replace("alpha = 0.5", 'alpha = { default = 0, "OUT05" = 1 }'))
    with pytest.raises(RecipeError) as caught:
        recipe.steps["mix"].parameters["alpha"].resolve(Unknown(), ["x"])
    assert (caught.value.file, caught.value.line, caught.value.column) == (str(recipe.path), 9, 24)
    assert caught.value.key == "steps.mix.alpha.OUT05"


def test_errors_of_a_recipe(load):
    recipe = load(SMALL)
    error = recipe.error("No.", ("outputs", "out", "file"), hint="do")
    assert (error.file, error.key, error.line, error.column) == (str(recipe.path), "outputs.out.file", 12, 1)


# --- refusals: what is replaced in SMALL, by what; where; what is said; the hint -----------------------

REFUSALS = {
    "no_recipe": ("recipe = 1\n", "", 1, 1, None, "no recipe key", "recipe = 1"),
    "text_version": ("recipe = 1", 'recipe = "1"', 1, 1, "recipe", 'takes 1, not the text "1"', "write 1"),
    "true_version": ("recipe = 1", "recipe = true", 1, 1, "recipe", "takes 1, not true", "write 1"),
    "future": ("recipe = 1", "recipe = 2\nnew = 1", 1, 1, "recipe", "version 2", "update"),
    "version_0": ("recipe = 1", "recipe = 0", 1, 1, "recipe", "no recipe version 0", "recipe = 1"),
    "top": ("[models]", "[model]", 2, 2, "model", "no key of a recipe", '"models"'),
    "parameter": ("alpha", "  alpah", 9, 3, "steps.mix.alpah", "no key of a step of weighted_sum", '"alpha"'),
    "operation": ("weighted_sum", "weigthed_sum", 6, 1, "steps.mix.op", "no operation", '"weighted_sum"'),
    "later_operation": ("weighted_sum", "xyzzy_zzz", 6, 1, "steps.mix.op", "no operation", "known: "),
    "op_number": ('op = "weighted_sum"', "op = 1", 6, 1, "steps.mix.op", "text in quotes, not the number 1", None),
    "no_op": ('op = "weighted_sum"', "", 5, 8, "steps.mix", 'step "mix" has no op', 'op = "weighted_sum"'),
    "op_typo": ('op = "weighted_sum"', 'opp = "x"', 5, 8, "steps.mix", "has no op", 'by "opp"'),
    "no_operand": ('b = "b"\n', "", 5, 8, "steps.mix", 'needs the key "b"', "write b = "),
    "operand_list": ('b = "b"\n', 'b = ["b"]\n', 8, 1, "steps.mix.b", "takes text in quotes, not a list", None),
    "operand_name": ('b = "b"\n', 'b = "c"\n', 8, 1, "steps.mix.b", 'no model or step "c"', "known: a, b, mix"),
    "extrapolate": ("alpha", 'extrapolate = "yes"\nalpha', 9, 1, "steps.mix.extrapolate", "true or false", None),
    "weights": ("alpha = 0.5", "alpha = 1.5", 9, 1, "steps.mix.alpha", "between 0 and 1", "extrapolate = true"),
    "step_number": ("[steps.mix]", "[steps]\nmix = 3\n[x]", 6, 1, "steps.mix", "takes a table", None),
    "model_number": ('a = "a.safetensors"', "a = 3", 3, 1, "models.a", "text in quotes or a table, not the", None),
    "model_seed": ('a = "a.safetensors"', "seed = 3", 3, 1, "models.seed", "text in quotes or a table", None),
    "model_empty": ("a.safetensors", "", 3, 1, "models.a", "empty", None),
    "model_tab": ('"a.safetensors"', '"D:\\test"', 3, 1, "models.a", "control character", "'D:\\test'"),
    "model_key": ('"a.safetensors"', '{ flie = "x" }', 3, 7, "models.a.flie", "no key of a model", '"file"'),
    "model_no_file": ('"a.safetensors"', '{ weights = "ema" }', 3, 1, "models.a", 'A model needs the key "file"', None),
    "ema": ('"a.safetensors"', '{ file = "x", weights = "emma" }', 3, 19, "models.a.weights", '"emma"', '"ema"'),
    "short_hash": ('"a.safetensors"', '{ file = "x", sha256 = "543bcb1234" }', 3, 19, "models.a.sha256", "short", "64"),
    "bad_hash": ('"a.safetensors"', '{ file = "x", sha256 = "543" }', 3, 19, "models.a.sha256", "64", "hash FILE"),
    "empty_name": ("a = ", '"" = ', 3, 1, 'models.""', "name is empty", None),
    "odd_name": ("a = ", '"\\u001b" = ', 3, 1, 'models."\\x1b"', "\\x1b", None),
    "output_key": ('file = "out', 'flie = "out', 12, 1, "outputs.out.flie", "no key of an output", '"file"'),
    "output_model": ('model = "mix"', 'model = "mxi"', 11, 1, "outputs.out.model", '"mxi"', '"mix"'),
    "vae": ('model = "mix"', 'model = "mix"\nvae = "z"', 12, 1, "outputs.out.vae", 'no model or step "z"', "known"),
    "dtype": ('model = "mix"', 'model = "mix"\ndtype = "f16"', 12, 1, "outputs.out.dtype", 'no dtype "f16"', '"fp16"'),
    "dtype_part": (
        'model = "mix"',
        'model = "mix"\ndtype = { vea = "fp16" }',
        12,
        11,
        "outputs.out.dtype.vea",
        "no key of a table of dtypes",
        '"vae"',
    ),
    "dtype_list": (
        'model = "mix"',
        'model = "mix"\ndtype = []',
        12,
        1,
        "outputs.out.dtype",
        "a table, not a list",
        None,
    ),
    "overflow": ('model = "mix"', 'model = "mix"\noverflow = "clmp"', 12, 1, "outputs.out.overflow", "clmp", '"clamp"'),
    "prediction": (
        'model = "mix"',
        'model = "mix"\nprediction = 1',
        12,
        1,
        "outputs.out.prediction",
        "1",
        "epsilon, v",
    ),
    "of": ('of = ["out"]', 'of = ["out", "ouz"]', 14, 14, "samples.0.of.1", '"ouz"', "out"),
    "of_text": ('of = ["out"]', 'of = "out"', 14, 1, "samples.0.of", "takes a list in brackets", None),
    "of_none": ('of = ["out"]', "of = []", 14, 1, "samples.0.of", "at least 1", None),
    "sampler": (
        'prompt = "x"',
        'prompt = "x"\nsampler = "euler_b"',
        16,
        1,
        "samples.0.sampler",
        "euler_b",
        '"euler_a"',
    ),
    "width": ('prompt = "x"', 'prompt = "x"\nwidth = 512', 16, 1, "samples.0.width", "no key of a sample", "known"),
    "size": ('prompt = "x"', 'prompt = "x"\nsize = [512]', 16, 1, "samples.0.size", "at least 2", None),
    "size_8": ('prompt = "x"', 'prompt = "x"\nsize = [512, 500]', 16, 14, "samples.0.size.1", "multiple of 8", None),
    "size_small": ('prompt = "x"', 'prompt = "x"\nsize = [8, 512]', 16, 9, "samples.0.size.0", "at least 64", None),
    "steps": ('prompt = "x"', 'prompt = "x"\nsteps = 20.5', 16, 1, "samples.0.steps", "whole number", None),
    "cfg": ('prompt = "x"', 'prompt = "x"\ncfg = nan', 16, 1, "samples.0.cfg", "finite number", None),
    "no_prompt": ('prompt = "x"\n', "", 13, 3, "samples.0", 'A sample needs the key "prompt"', None),
    "seed": ("recipe = 1", "recipe = 1\nseed = -1", 2, 1, "seed", "at least 0", None),
    "seed_bool": ("recipe = 1", "recipe = 1\nseed = true", 2, 1, "seed", "a whole number, not true", None),
    "title": ("recipe = 1", "recipe = 1\ntitle = 5", 2, 1, "title", "text in quotes, not the number 5", None),
    "date": ("recipe = 1", 'recipe = 1\ndate = "2026-01-31"', 2, 1, "date", "without quotes", None),
    "datetime": ("recipe = 1", "recipe = 1\ndate = 2026-01-31T10:00:00", 2, 1, "date", "takes a date", None),
    "late_title": (
        "alpha = 0.5",
        'title = "x"',
        9,
        1,
        "steps.mix.title",
        "no key of a step",
        "before the first [table]",
    ),
    "step_like_model": ("[steps.mix]", "[steps.a]", 5, 8, "steps.a", "both a model and a step", "another name"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(load, name, tmp_path):
    old, new, line, column, key, says, hint = REFUSALS[name]
    assert old in SMALL
    with pytest.raises(RecipeError) as caught:
        load(SMALL.replace(old, new, 1))
    error = caught.value
    assert (error.exit_code, error.file) == (2, str(tmp_path / "r.toml"))
    assert (error.line, error.column, error.key) == (line, column, key), error.message
    assert says in error.message
    assert hint is None or hint in error.hint


def test_no_models(load):
    with pytest.raises(RecipeError, match='needs the key "models"'):
        load("recipe = 1\n")
    with pytest.raises(RecipeError, match="models takes at least 1"):
        load("recipe = 1\n[models]\n")


def test_the_first_fault_is_named_and_the_others_listed(load):
    with pytest.raises(RecipeError) as caught:
        load(SMALL.replace("alpha", "alpah").replace("file =", "flie =").replace("prompt", "promt"))
    error = caught.value
    assert error.key == "steps.mix.alpah"
    assert [detail.partition(":")[0] for detail in error.details] == ["line 12", "line 15", "line 10", "line 13"]
    assert "promt" in error.details[1]


def test_no_words_of_pydantic(load):
    for value in ("1", '"x"', "true", "[1]", "{ x = 1 }", "2026-01-31", "inf", "10:00:00"):
        for key in ("title", "seed", "date", "models", "steps", "outputs", "samples"):
            text = f"recipe = 1\n{key} = {value}\n" + ("" if key == "models" else '[models]\na = "a"\n')
            try:
                load(text)
            except RecipeError as error:
                words = " ".join([error.message, error.hint or "", *error.details])
                wrong = [w for w in ("Input should", "pydantic", "valid ", "cannot take", "<text>") if w in words]
                assert not wrong, words


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers(load, name):
    recipe = load(SMALL.replace('prompt = "x"', f'prompt = "x"\nsampler = "{name}"'))
    assert recipe.samples[0].sampler == name
    assert SAMPLERS[name].scheduler.endswith("Scheduler")


# --- plain data ------------------------------------------------------------------------------------


def data():
    return {
        "recipe": 1,
        "models": {"a": "a.st", "b": "b.st"},
        "steps": {"mix": {"op": "weighted_sum", "a": "a", "b": "b", "alpha": [0.5] * 26}},
        "outputs": {"out": {"model": "mix", "file": "o.st"}},
    }


def test_plain_data_is_copied():
    given = data()
    given["steps"]["mix"]["alpha"] = tuple(given["steps"]["mix"]["alpha"])
    recipe = recipe_from_data(given, folder=Path("x"))
    given["steps"]["mix"]["op"] = "nothing"
    assert recipe.data == data()
    assert (recipe.path, recipe.folder) == (None, Path("x"))


def test_plain_data_is_refused_without_a_line():
    given = data()
    given["steps"]["mix"]["alpha"] = 2
    with pytest.raises(RecipeError) as caught:
        recipe_from_data(given, folder=Path("x"))
    assert (caught.value.file, caught.value.line, caught.value.key) == (None, None, "steps.mix.alpha")
    given["steps"]["mix"]["alpha"] = given
    with pytest.raises(RecipeError, match="nested too deeply"):
        recipe_from_data(given, folder=Path("x"))


# --- overrides -------------------------------------------------------------------------------------


def alpha(recipe):
    return recipe.steps["mix"].parameters["alpha"].describe()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.4", 0.4),
        ("1", 1.0),
        ("GRAD_V", "GRAD_V"),
        ('"GRAD_V"', "GRAD_V"),
        ("'GRAD_V'", "GRAD_V"),
        ("[" + "0," * 26 + "]", [0.0] * 26),
        (",".join(["0"] * 26), [0.0] * 26),
        ("{ preset = 'GRAD_V', OUT05 = 1 }", {"preset": "GRAD_V", "OUT05": 1.0}),
        (0.25, 0.25),
        ((0.5,) * 26, [0.5] * 26),
    ],
)
def test_set_values(load, text, value):
    assert alpha(load(SMALL, {"steps.mix.alpha": text})) == value


def test_set_paths(load):
    assert alpha(load(SMALL, {"steps.mix.alpha.OUT05": "1"})) == {"default": 0.5, "OUT05": 1.0}
    assert alpha(load(SMALL, {"steps.mix.alpha.OUT05.attn2": "1"})) == {"default": 0.5, "OUT05.attn2": 1.0}


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ('"GRAD_V"', {"preset": "GRAD_V"}),
        ('"OUT03:attn:0.5"', {"elemental": "OUT03:attn:0.5"}),
        (f'"{", ".join(["0.5"] * 26)}"', {"weights": [0.5] * 26}),
        (f"{[0.5] * 26}", {"weights": [0.5] * 26}),
    ],
)
def test_set_widens_every_short_form(load, short, long):
    made = alpha(load(SMALL, {"steps.mix.alpha": short, "steps.mix.alpha.OUT05": "1"}))
    assert made == long | {"OUT05": 1.0}
    assert alpha(load(SMALL, {'steps.mix.alpha."OUT05.attn2"': "1"})) == {"default": 0.5, "OUT05.attn2": 1.0}
    assert alpha(load(SMALL, {"steps.mix.alpha.*.attn1.*": "1"})) == {"default": 0.5, "*.attn1.*": 1.0}
    both = {"steps.mix.alpha": "GRAD_V", "steps . mix . alpha.base": "1"}
    assert alpha(load(SMALL, both)) == {"preset": "GRAD_V", "base": 1.0}
    assert load(SMALL, {"models.a.weights": "ema"}).models["a"] == ModelRef("a", "a.safetensors", None, "ema")
    assert load(SMALL, {"models.a": "C:\\x y.ckpt"}).models["a"].file == "C:\\x y.ckpt"
    assert load(SMALL, {"samples.0.steps": "5"}).samples[0].steps == 5
    assert load(SMALL, {"title": "my mix"}).title == "my mix"
    assert load(SMALL, {"date": "2026-01-31"}).date == datetime.date(2026, 1, 31)
    recipe = load(SMALL, {"steps.mix.extrapolate": "true", "steps.mix.alpha": "1.5"})
    assert (alpha(recipe), recipe.data["steps"]["mix"]["alpha"]) == (1.5, 1.5)


SET_REFUSALS = {
    "steps.mxi.alpha": ("0.4", 'no step "mxi"', '"mix"'),
    "models.c": ("x", 'no model "c"', "known: a, b"),
    "outputs.uot.file": ("x", 'no output "uot"', '"out"'),
    "samples.1.steps": ("5", "no sample 1", "samples.0"),
    "samples.x": ("5", "no sample x", "samples.0"),
    "step.mix.alpha": ("0.4", "no key of a recipe", '"steps"'),
    "steps": ("0.4", "no step", "mix"),
    "steps.mix.alpah": ("0.4", "no key of a step", '"alpha"'),
    "steps.mix.alpha": ("1.5", "between 0 and 1", "extrapolate"),
    "title.x": ("1", "takes text in quotes", None),
    "title": ("2026", "text in quotes, not the number", None),
    "outputs.out.model.x": ("1", "no table", None),
    "steps..alpha": ("1", "no dotted path", "steps.NAME.alpha"),
    "": ("1", "no dotted path", "steps.NAME.alpha"),
    "samples.0.of.0": ("x", "is a list", "whole list"),
    "outputs.out.file": ("'x", "not TOML", "quote"),
}


@pytest.mark.parametrize("key", SET_REFUSALS)
def test_set_refusals(load, key):
    value, says, hint = SET_REFUSALS[key]
    with pytest.raises(RecipeError) as caught:
        load(SMALL, {key: value})
    error = caught.value
    assert (error.exit_code, error.file, error.line, error.column) == (2, "--set", None, None)
    assert says in error.message
    assert hint is None or hint in error.hint


def test_a_value_cannot_smuggle_in_other_keys(load):
    assert load(SMALL, {"title": "1\nx = 2"}).title == "1\nx = 2"


# --- for editors -----------------------------------------------------------------------------------


def valid(document):
    jsonschema = pytest.importorskip("jsonschema")
    schema = recipe_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    plain = json.loads(json.dumps(document, default=str))
    return not list(jsonschema.Draft202012Validator(schema).iter_errors(plain))


def test_the_json_schema_takes_what_we_take(load):
    assert valid(load(EXAMPLE).data)
    assert valid(load(SMALL).data)
    bad = load(SMALL).data
    bad["steps"]["mix"]["alpah"] = 1
    assert not valid(bad)
    bad = load(SMALL).data
    bad["outputs"]["out"]["dtype"] = "f16"
    assert not valid(bad)
    for weights in (0.5, [0.5] * 26, "GRAD_V", "0,1,2", {"OUT05": 1}):
        good = data()
        good["steps"]["mix"]["alpha"] = weights
        assert valid(good)


def test_the_shape_of_the_json_schema():
    schema = recipe_json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    variants = {each["$ref"] for each in schema["properties"]["steps"]["additionalProperties"]["oneOf"]}
    assert variants == {f"#/$defs/Step_{op}" for op in OPERATIONS}
    for op, operation in OPERATIONS.items():
        step = schema["$defs"][f"Step_{op}"]
        assert step["properties"]["op"]["const"] == op
        assert step["additionalProperties"] is False
        named = {each.name for each in (*operation.operands, *operation.parameters)}
        assert set(step["properties"]) == named | {"op", "extrapolate"} | ({"seed"} if operation.seeded else set())
        needed = {each.name for each in operation.operands if not each.optional}
        needed |= {each.name for each in operation.parameters if each.default is None}
        assert needed | {"op"} == set(step["required"])
    text = json.dumps(schema)
    assert '"null"' not in text
    references = {part.split('"')[0] for part in text.split('"#/$defs/')[1:]}
    assert references <= set(schema["$defs"])


def test_loading_imports_neither_torch_nor_numpy(tmp_path):
    (tmp_path / "r.toml").write_text(EXAMPLE, encoding="utf-8")
    code = (
        "import sys; from mergekit_sd.recipe.load import load_recipe; load_recipe(sys.argv[1]);"
        "assert not {'torch', 'numpy', 'diffusers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "r.toml")], check=True)
