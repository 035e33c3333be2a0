"""recover and verify: a recipe out of a file makes the same file."""

from __future__ import annotations

import datetime
import hashlib
import json
import tomllib

import models
import pytest
import story

import mergekit_sd as mk
from mergekit_sd.planning.metadata import RECIPE_KEY
from mergekit_sd.provenance import NoRecipe


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
    assert mk.recipe_text(report["recipe"]) in printed
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
    record = {"type": "webui", "interp_method": "No interpolation", "primary_model_hash": "a" * 64}
    path = models.write(
        tmp_path / "x.safetensors", {"t": models.torch.ones(2)}, {"sd_merge_recipe": json.dumps(record)}
    )
    with pytest.raises(NoRecipe, match="Only files that mergekit-sd made"):
        mk.verify(path)
