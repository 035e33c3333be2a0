"""recover and verify: a recipe out of a file makes the same file; records of other tools become recipes."""

from __future__ import annotations

import datetime
import hashlib
import json
import string
import tomllib

import models
import pytest
import story
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mergekit_sd as mk
from mergekit_sd.plan.metadata import RECIPE_KEY
from mergekit_sd.provenance import SDXL_BLOCKS, UNET_BLOCKS, NoRecipe
from mergekit_sd.recipe.load import recipe_from_data

SHA = {slot: slot * 64 for slot in "abcde"}


@pytest.fixture
def place(tmp_path_factory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return story.room(tmp_path_factory, tmp_path)


@pytest.fixture
def shell(capsys):
    return story.Shell(capsys)


@pytest.fixture
def tiny(room, monkeypatch):
    """A folder of even smaller models of all families."""
    monkeypatch.chdir(room)
    return room


def again(place, shell, name="out.safetensors", *options):
    """The bytes of a file, and of what its recovered recipe makes beside the same models."""
    made = (place / name).read_bytes()
    shell("verify", name)
    shell("recover", name, "-o", "again.toml")
    (place / name).unlink()
    shell("run", "again.toml", *options)
    return made, (place / name).read_bytes()


def short(data):
    """The data with models as text says them: the file alone where there is nothing else."""
    entries = {name: entry["file"] if list(entry) == ["file"] else entry for name, entry in data["models"].items()}
    return {**data, "models": entries}


# --- ours -------------------------------------------------------------------------------------------

STEP = {"op": "weighted_sum", "a": "a", "b": "b", "alpha": 0.3}
TABLE = {
    "default": 0.2,
    "preset": "GRAD_V",
    "text_encoder": 0.4,
    "OUT03-OUT05": 0.8,
    "OUT05.attn2": 1.0,
    "*.norm*": 0.1,
}
RECIPES = {
    "title, seed and date": ({}, {"title": 'Lan"tern\n[/x]', "seed": 7, "date": datetime.date(2026, 1, 31)}, {}),
    "a table of weights": ({"alpha": TABLE}, {}, {}),
    "a preset": ({"alpha": "SMOOTHSTEP"}, {}, {}),
    "a pasted list": ({"alpha": ",".join(["0.5"] * 26)}, {}, {}),
    "whole numbers": ({"alpha": 1}, {}, {}),
    "small numbers": ({"alpha": 1e-7}, {}, {}),
    "extrapolation": ({"alpha": -0.5, "extrapolate": True}, {}, {}),
    "dtypes": ({}, {}, {"dtype": {"default": "bf16", "vae": "fp32", "unet": "keep"}}),
    "a baked VAE": ({}, {}, {"vae": "mse"}),
    "all of an output": ({}, {}, {"overflow": "clamp", "junk": "keep", "position_ids": "keep", "prediction": "v"}),
}


@pytest.mark.parametrize("what", RECIPES)
def test_a_recovered_recipe_makes_the_same_bytes(tiny, shell, what):
    step, top, output = RECIPES[what]
    date = top.get("date")
    inputs = {"a": "sd1-a.safetensors", "b": "sd1-b.safetensors", "mse": "sd1-c.safetensors"}
    outputs = {"my file": {"model": "mix", "file": "out.safetensors", **output}}
    path = models.recipe(
        tiny, inputs, {"mix": {**STEP, **step}}, outputs, **{k: v for k, v in top.items() if k != "date"}
    )
    if date:
        path.write_text(path.read_text().replace("recipe = 1", f"recipe = 1\ndate = {date}"))
    shell("run", "r.toml")
    made, remade = again(tiny, shell)
    assert made == remade
    recovered = tomllib.loads((tiny / "again.toml").read_text())
    assert recovered["steps"]["mix"] == {**STEP, **step}
    assert recovered["outputs"]["my file"] == {"model": "mix", "file": "out.safetensors", **output}


def test_ema_weights_and_pins_come_back(tiny, shell):
    models.write(tiny / "ema.safetensors", models.with_ema(models.checkpoint()))
    pin = hashlib.sha256((tiny / "sd1-b.safetensors").read_bytes()).hexdigest()
    inputs = {"a": {"file": "ema.safetensors", "weights": "ema"}, "b": {"file": "sd1-b.safetensors", "sha256": pin}}
    models.recipe(tiny, inputs, {"mix": STEP})
    shell("run", "r.toml")
    made, remade = again(tiny, shell)
    assert made == remade
    recovered = mk.recover("out.safetensors").data["models"]
    assert recovered["a"]["weights"] == "ema"
    assert recovered["b"]["sha256"] == pin


def test_only_what_an_output_is_made_of_is_in_it(tiny, shell):
    """In the order in which it is done, whatever the order of the names."""
    inputs = {"z": "sd1-a.safetensors", "b": "sd1-b.safetensors", "c": "sd1-c.safetensors"}
    second = {"op": "add_difference", "a": "z-first", "b": "c", "c": "b", "alpha": 0.5}
    steps = {"other": {**STEP, "a": "c"}, "a-second": second, "z-first": {**STEP, "a": "z"}}
    outputs = {
        "one": {"model": "a-second", "file": "one.safetensors"},
        "two": {"model": "other", "file": "two.safetensors"},
    }
    models.recipe(tiny, inputs, steps, outputs)
    shell("run", "r.toml")
    made, remade = again(tiny, shell, "one.safetensors")
    assert made == remade
    found = tomllib.loads(shell("recover", "one.safetensors")[0])
    assert list(found["steps"]) == ["z-first", "a-second"]
    assert list(found["models"]) == ["z", "b", "c"]
    assert list(found["outputs"]) == ["one"]


def test_python_and_webui_records_verify_and_come_back(tiny, shell):
    a, b = (mk.open(tiny / f"sd1-{letter}.safetensors") for letter in "ab")
    mk.save(mk.ops.weighted_sum(a, b, alpha={"M00": 0.5, "default": 0.1}), tiny / "out.safetensors", metadata="webui")
    made, remade = again(tiny, shell, "out.safetensors", "--metadata", "webui")
    assert made == remade


def test_a_model_under_a_root(tiny, tmp_path_factory, shell):
    root = tmp_path_factory.mktemp("webui")
    (tiny / "sd1-b.safetensors").rename(root / "elsewhere.safetensors")
    shell("roots", "add", "webui", root)
    models.recipe(tiny, {"a": "sd1-a.safetensors", "b": "webui:elsewhere.safetensors"}, {"mix": STEP})
    shell("run", "r.toml")
    made, remade = again(tiny, shell)
    assert made == remade


def test_models_in_folders_below(tiny, shell):
    (tiny / "below").mkdir()
    (tiny / "sd1-b.safetensors").rename(tiny / "below" / "b.safetensors")
    models.recipe(tiny, {"a": "sd1-a.safetensors", "b": "below/b.safetensors"}, {"mix": STEP})
    shell("run", "r.toml")
    made, remade = again(tiny, shell)
    assert made == remade


# --- recover on the command line --------------------------------------------------------------------


def test_recover_prints_writes_and_reports(place, shell):
    shell("run", "r.toml")
    printed, _ = shell("recover", "out.safetensors")
    assert printed.startswith("# recovered from out.safetensors (mergekit-sd)\n# anime: content hash")
    out, err = shell("recover", "out.safetensors", "-o", "again.toml")
    assert (out, (place / "again.toml").read_text()) == ("", printed)
    assert err == "again.toml: written; its models are looked for beside it\n"
    report = shell.json("recover", "out.safetensors")
    assert report["source"] == "mergekit-sd"
    assert short(report["recipe"]) == tomllib.loads(printed)
    assert set(report["content"]) == {"base", "anime"}


def test_recover_overwrites_nothing_unasked(place, shell):
    shell("run", "r.toml")
    before = story.state(place)
    assert shell.refused("OutputExists", 2, "recover", "out.safetensors", "-o", "r.toml")["file"] == "r.toml"
    shell.refused("OutputIsInput", 2, "recover", "out.safetensors", "-o", "./out.safetensors", "--force")
    shell.refused("NotWritable", 4, "recover", "out.safetensors", "-o", "no/again.toml")
    assert story.state(place) == before
    shell("recover", "out.safetensors", "-o", "r.toml", "--force")
    assert (place / "r.toml").read_text().startswith("# recovered")


def damaged(change):
    """Metadata whose recipe was changed by hand."""
    recipe = {
        "recipe": 1,
        "models": {"a": {"file": "a.safetensors", "content": "0" * 32}},
        "outputs": {"out": {"model": "a"}},
    }
    change(recipe)
    return {RECIPE_KEY: json.dumps(recipe)}


DAMAGED = {
    "nothing": {},
    "no JSON": {RECIPE_KEY: "{"},
    "no object": {RECIPE_KEY: "[1]"},
    "nested": {RECIPE_KEY: "[" * 100_000},
    "no outputs": damaged(lambda recipe: recipe.pop("outputs")),
    "two outputs": damaged(lambda recipe: recipe["outputs"].update(more={"model": "a"})),
    "models of another type": damaged(lambda recipe: recipe.update(models=[1])),
    "a model of another type": damaged(lambda recipe: recipe["models"].update(a=3)),
    "steps of another type": damaged(lambda recipe: recipe.update(steps={"s": 5})),
    "an unknown operation": damaged(lambda recipe: recipe.update(steps={"s": {"op": "teleport"}})),
    "a cycle": damaged(lambda recipe: recipe.update(steps={"s": {**STEP, "a": "s", "b": "s"}})),
    "a later version": damaged(lambda recipe: recipe.update(recipe=2)),
    "no date": damaged(lambda recipe: recipe.update(date="yesterday\x1b")),
    "a record of no JSON": {"sd_merge_recipe": "}"},
    "a record of another type": {"sd_merge_recipe": "7"},
    "models of no JSON": {"sd_merge_recipe": "{}", "sd_merge_models": "{"},
}


@pytest.mark.parametrize("what", DAMAGED)
def test_metadata_without_a_sound_recipe_is_refused(tmp_path, monkeypatch, shell, what):
    monkeypatch.chdir(tmp_path)
    models.write(tmp_path / "x.safetensors", {"t": models.torch.ones(2)}, {"format": "pt", **DAMAGED[what]})
    before = story.state(tmp_path)
    for command in (["recover"], ["recover", "-o", "r.toml"], ["verify"]):
        error = shell.refused("NoRecipe", 3, *command, "x.safetensors")
        assert error["file"] == "x.safetensors"
        assert error["hint"]
    assert story.state(tmp_path) == before


# --- verify -----------------------------------------------------------------------------------------


def test_verify_names_the_tensor_that_was_changed(place, shell):
    shell("run", "r.toml")
    before = story.state(place)
    assert shell("verify", "out.safetensors") == ("out.safetensors: the same bytes as its recipe makes\n", "")
    assert shell.json("verify", "out.safetensors")["inputs"] == {
        "base": "base.safetensors",
        "anime": "anime.safetensors",
    }
    assert story.state(place) == before
    key = "model.diffusion_model.middle_block.0.in_layers.2.weight"
    start = 8 + int.from_bytes((place / "out.safetensors").read_bytes()[:8], "little")
    header = json.loads((place / "out.safetensors").read_bytes()[8:start])
    with (place / "out.safetensors").open("r+b") as file:
        file.seek(start + header[key]["data_offsets"][0] + 5)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    error = shell.refused("PinMismatch", 3, "verify", "out.safetensors")
    assert error["details"] == [key]
    assert error["message"] == "The file is not what its recipe makes: 1 part differs."


def test_verify_finds_the_models(place, shell, tmp_path_factory):
    shell("run", "r.toml")
    other = tmp_path_factory.mktemp("other")
    (place / "out.safetensors").rename(other / "out.safetensors")
    error = shell.refused("MissingInput", 3, "verify", other / "out.safetensors")
    assert error["hint"] == "name the folder that the models are in: --models DIR"
    shell("verify", other / "out.safetensors", "--models", place)
    assert shell.refused("UsageError", 2, "verify", other / "out.safetensors", "--models", "no")["file"] == "no"


@pytest.mark.parametrize("style", ["full", "webui"])
def test_verify_names_the_model_that_is_another(place, shell, style):
    shell("run", "r.toml", "--metadata", style)
    (place / "anime.safetensors").unlink()
    (place / "photo.safetensors").rename(place / "anime.safetensors")
    error = shell.refused("PinMismatch", 3, "verify", "out.safetensors")
    assert error["message"].startswith('"anime" is not the model that was used')
    assert (error["file"], error["key"]) == ("anime.safetensors", "models.anime")


def test_only_our_files_can_be_verified(tmp_path):
    record = {"type": "webui", "interp_method": "No interpolation", "primary_model_hash": SHA["a"]}
    path = models.write(
        tmp_path / "x.safetensors", {"t": models.torch.ones(2)}, {"sd_merge_recipe": json.dumps(record)}
    )
    with pytest.raises(NoRecipe, match="Only files that mergekit-sd made"):
        mk.verify(path)


# --- other tools' records ---------------------------------------------------------------------------

A1111 = {
    "type": "webui",
    "primary_model_hash": SHA["a"],
    "secondary_model_hash": SHA["b"],
    "tertiary_model_hash": SHA["c"],
    "interp_method": "Weighted sum",
    "multiplier": 0.3,
    "save_as_half": True,
    "custom_name": "",
    "config_source": 0,
    "bake_in_vae": "None",
    "discard_weights": "",
    "is_inpainting": False,
    "is_instruct_pix2pix": False,
}
KNOWN = {
    SHA["a"]: {"name": "sub\\first.safetensors", "legacy_hash": "12345678", "sd_merge_recipe": None},
    SHA["b"]: {"name": "second.safetensors", "legacy_hash": "12345678", "sd_merge_recipe": None},
}
SUPERMERGER = {
    "type": "sd-webui-supermerger",
    "weights_alpha": None,
    "weights_beta": None,
    "weights_alpha_orig": None,
    "weights_beta_orig": None,
    "model_a": SHA["a"],
    "model_b": SHA["b"],
    "model_c": SHA["c"],
    "base_alpha": 0.4,
    "base_beta": 0.2,
    "mode": "Weight sum",
    "mbw": False,
    "elemental_merge": "",
    "calcmode": "normal",
    "Off": [""],
}


def recovered(folder, record, known=KNOWN):
    """The recipe that a record becomes; it is sound, and its text says the same."""
    metadata = {"format": "pt", "sd_merge_recipe": json.dumps(record)}
    metadata |= {} if known is None else {"sd_merge_models": json.dumps(known)}
    path = models.write(folder / "merged.safetensors", {"t": models.torch.ones(2)}, metadata)
    found = mk.recover(path)
    assert tomllib.loads(mk.recipe_text(found.data, found.notes)) == short(found.data)
    return found


def test_a1111_weighted_sum(tmp_path):
    found = recovered(tmp_path, A1111)
    assert found.source == "a1111"
    assert found.notes == ()
    assert found.data == {
        "recipe": 1,
        "title": "merged",
        "models": {
            "a": {"file": "sub/first.safetensors", "sha256": SHA["a"]},
            "b": {"file": "second.safetensors", "sha256": SHA["b"]},
        },
        "steps": {"merge": {"op": "weighted_sum", "a": "a", "b": "b", "alpha": 0.3}},
        "outputs": {"output": {"model": "merge", "file": "merged.safetensors"}},
    }


def test_a1111_add_difference_as_it_can_be(tmp_path):
    record = A1111 | {
        "interp_method": "Add difference",
        "multiplier": 1.4,
        "custom_name": "Mine",
        "save_as_half": False,
    }
    data = recovered(tmp_path, record, None).data
    assert data["title"] == "Mine"
    assert data["models"]["c"] == {"file": "cccccccccc.safetensors", "sha256": SHA["c"]}
    assert data["steps"]["merge"] == {
        **{"op": "add_difference", "a": "a", "b": "b", "c": "c"},
        **{"alpha": 1.4, "extrapolate": True},
    }
    assert data["outputs"]["output"]["dtype"] == "keep"


def test_a1111_no_interpolation_with_a_vae(tmp_path):
    record = A1111 | {
        "interp_method": "No interpolation",
        "bake_in_vae": "mse.safetensors",
        "discard_weights": "ema\x1b",
    }
    found = recovered(tmp_path, record | {"secondary_model_hash": None, "tertiary_model_hash": None})
    assert "steps" not in found.data
    assert list(found.data["models"]) == ["a", "vae"]
    assert found.data["outputs"]["output"] == {"model": "a", "file": "merged.safetensors", "vae": "vae"}
    assert found.notes == ("the WebUI left out weights that match 'ema\\x1b'; the recipe does not",)


@pytest.mark.parametrize("mode", ["Weight sum", "Add difference", "Triple sum", "sum Twice", "Weight", "Twice"])
def test_supermerger_modes(tmp_path, mode):
    found = recovered(tmp_path, SUPERMERGER | {"mode": mode})
    step = found.data["steps"]["merge"]
    operations = {"Weight": "weighted_sum", "Add": "add_difference", "Triple": "triple_sum", "Twice": "sum_twice"}
    assert step["op"] == next(operation for word, operation in operations.items() if word in mode)
    assert step["alpha"] == 0.4
    assert step.get("beta") == (0.2 if mode in ("Triple sum", "sum Twice", "Twice") else None)
    assert list(found.data["models"]) == (["a", "b"] if "Weight" in mode else ["a", "b", "c"])
    assert found.data["models"]["b"] == {"file": "second.safetensors", "sha256": SHA["b"]}
    assert found.notes


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("blocks", [UNET_BLOCKS, [*SDXL_BLOCKS, "vae"], SDXL_BLOCKS])
def test_supermerger_block_weights(tmp_path, blocks, as_text):
    numbers = [round(index / 32, 3) for index in range(len(blocks))]
    weights = ",".join(map(str, numbers)) if as_text else numbers
    more = {"mode": "sum Twice", "mbw": True, "weights_alpha": weights, "weights_beta": weights}
    step = recovered(tmp_path, SUPERMERGER | more).data["steps"]["merge"]
    assert step["alpha"] == {"base": 0.4, **dict(zip(blocks, numbers, strict=True))}
    assert step["beta"] == {"base": 0.2, **dict(zip(blocks, numbers, strict=True))}


def test_supermerger_beyond_one_and_models_by_name(tmp_path):
    record = SUPERMERGER | {"base_alpha": -0.2, "model_a": "mine.safetensors [0123456789]", "model_b": "other.ckpt"}
    data = recovered(tmp_path, record, None).data
    assert data["models"] == {"a": {"file": "mine.safetensors"}, "b": {"file": "other.ckpt"}}
    assert data["steps"]["merge"]["extrapolate"] is True


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (A1111 | {"interp_method": "Train difference"}, '"Train difference"'),
        (A1111 | {"interp_method": None}, '"None"'),
        (A1111 | {"secondary_model_hash": None}, "which file model b was"),
        (A1111 | {"multiplier": "x\x1b"}, "cannot be used"),
        (A1111 | {"multiplier": None}, "cannot be used"),
        (SUPERMERGER | {"mode": "Swap\x1b"}, "mode Swap\\x1b"),
        (SUPERMERGER | {"calcmode": "cosineA"}, "calculation cosineA"),
        (SUPERMERGER | {"calcmode": "trainDifference"}, "calculation trainDifference"),
        (SUPERMERGER | {"elemental_merge": ["OUT05:attn:0.5"]}, "elemental merge"),
        (SUPERMERGER | {"Exclude": ["BASE", ""]}, "Exclude blocks"),
        (SUPERMERGER | {"model_b": ""}, "which file model b was"),
        (SUPERMERGER | {"base_alpha": "much"}, "no weights in base_alpha"),
        (SUPERMERGER | {"mbw": True, "weights_alpha": [0.5] * 24}, "24 block weights in weights_alpha"),
        (SUPERMERGER | {"mbw": True, "weights_alpha": None}, "no weights in weights_alpha"),
        (SUPERMERGER | {"mbw": True, "weights_alpha": [[]]}, "no weights in weights_alpha"),
    ],
)
def test_records_without_a_counterpart_are_refused_by_name(tmp_path, monkeypatch, shell, record, said):
    monkeypatch.chdir(tmp_path)
    metadata = {"sd_merge_recipe": json.dumps(record), "sd_merge_models": json.dumps(KNOWN)}
    models.write(tmp_path / "x.safetensors", {"t": models.torch.ones(2)}, metadata)
    error = shell.refused("NoRecipe", 3, "recover", "x.safetensors")
    _, err = shell("recover", "x.safetensors", code=3)
    assert said in err
    assert "\x1b" not in err
    assert error["hint"]


# --- text -------------------------------------------------------------------------------------------

names = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1, max_size=8).filter(
    lambda name: name.isprintable() and name.strip()
)
plain = st.text(string.ascii_letters + string.digits + "-_. ", min_size=1, max_size=8)
numbers = st.floats(0, 1) | st.integers(0, 1)
selectors = st.sampled_from(["base", "vae", "text_encoder", "M00", "IN00-IN05", "OUT05.attn2", "*.norm*", "unet"])
weights = numbers | st.builds(lambda low, rest: {"default": low, **rest}, numbers, st.dictionaries(selectors, numbers))


@st.composite
def recipes(draw):
    """Plain data of a sound recipe: a chain of steps over some models."""
    inputs = draw(st.lists(names, min_size=1, max_size=3, unique=True))
    steps, sources = {}, list(inputs)
    for name in draw(st.lists(names.filter(lambda name: name not in inputs), max_size=3, unique=True)):
        operands = {"a": draw(st.sampled_from(sources)), "b": draw(st.sampled_from(sources))}
        steps[name] = {"op": "weighted_sum", **operands, "alpha": draw(weights)}
        sources.append(name)
    output = {"model": sources[-1], "file": "out.safetensors"}
    output |= draw(
        st.sampled_from([{}, {"dtype": "keep"}, {"dtype": {"default": "fp16", "vae": "fp32"}, "junk": "keep"}])
    )
    data = {"recipe": 1, "models": {name: draw(plain.map(lambda text: f"{text}.safetensors")) for name in inputs}}
    data |= {"title": draw(names)} if draw(st.booleans()) else {}
    data |= {"date": draw(st.dates(datetime.date(1, 1, 1)))} if draw(st.booleans()) else {}
    data |= {"samples": [{"of": [sources[-1]], "prompt": draw(names), "seeds": [1, 2]}]} if draw(st.booleans()) else {}
    return data | ({"steps": steps} if steps else {}) | {"outputs": {draw(names): output}}


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(recipes())
def test_text_of_a_recipe_loads_as_the_same_data(tmp_path, data):
    recipe_from_data(data, folder=tmp_path)
    text = mk.recipe_text(data, ["a comment"])
    path = tmp_path / "r.toml"
    path.write_bytes(text.encode("utf-8"))
    assert mk.load(path).data == data


def test_text_reads_as_a_person_would_say_it():
    data = {
        "models": {"date": "x.safetensors", "b": {"sha256": SHA["a"], "file": "y.safetensors"}},
        "recipe": 1,
        "date": "2026-01-31",
        "steps": {
            "mix": {
                "alpha": {"*.norm*": 1, "OUT05": 0.5, "IN01": 0.5, "default": 0},
                "b": "b",
                "a": "date",
                "op": "slerp",
            }
        },
        "outputs": {"out": {"dtype": "fp16", "file": "out.safetensors", "model": "mix"}},
    }
    assert mk.recipe_text(data) == (
        "recipe = 1\ndate = 2026-01-31\n\n"
        f'[models]\ndate = "x.safetensors"\nb = {{file = "y.safetensors", sha256 = "{SHA["a"]}"}}\n\n'
        '[steps.mix]\nop = "slerp"\na = "date"\nb = "b"\n'
        'alpha = {default = 0, IN01 = 0.5, OUT05 = 0.5, "*.norm*" = 1}\n\n'
        '[outputs.out]\nmodel = "mix"\nfile = "out.safetensors"\ndtype = "fp16"\n'
    )
