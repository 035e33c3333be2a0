"""`sample` and `run` with samples as a user calls them: what they say, how they end, what they leave."""

from __future__ import annotations

import json

import models
import pytest
import story
from PIL import Image

pytest.importorskip("diffusers")

import sampling_models as small

import mergekit_sd as mk
from mergekit_sd.errors import EnvironmentFault
from mergekit_sd.sampling import packages

RECIPE = """\
recipe = 1
[models]
night = "night.safetensors"
broken = "broken.safetensors"
[steps.difference]
op = "subtract"
a = "night"
b = "broken"
[steps.mix]
op = "weighted_sum"
a = "night"
b = "night"
[outputs.out]
model = "mix"
file = "out.safetensors"
[[samples]]
of = ["out"]
prompt = "a lantern"
steps = 1
"""
FAST = ("--steps", 1, "--checks", "quick")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    night = small.tensors(0)
    small.write(folder / "night.safetensors", night)
    name = "model.diffusion_model.middle_block.1.proj_in.weight"
    small.write(folder / "broken.safetensors", night | {name: night[name] * float("nan")})
    models.write(folder / "glow.safetensors", small.lora(night))
    return folder


@pytest.fixture
def place(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in files.iterdir():
        (tmp_path / path.name).hardlink_to(path)
    (tmp_path / "r.toml").write_text(RECIPE, encoding="utf-8")
    return tmp_path


@pytest.fixture
def shell(capsys):
    return story.Shell(capsys)


def test_sample_writes_a_folder_and_says_where(place, shell):
    out, err = shell("sample", "night.safetensors", "-p", "a lantern <lora:glow:0.5>", "--seeds", "1-2,5", *FAST)
    assert out.startswith("night-samples: 3 pictures of 1 model in ")
    assert "look at night-samples/report.html" in out.replace("\\", "/")
    assert len(err.splitlines()) <= 1
    assert str(place) not in out + err
    names = {each.name for each in (place / "night-samples").iterdir()}
    assert names == {*(f"night-seed-{n}.png" for n in (1, 2, 5)), "sheet.png", "report.html", "report.json"}
    with Image.open(place / "night-samples" / "night-seed-5.png") as picture:
        assert picture.size == (64, 64)
        assert "Seed: 5" in picture.info["parameters"]
    error = shell.refused("OutputExists", 2, "sample", "night.safetensors", "-p", "a", *FAST)
    assert "--force" in error["hint"]
    told = shell.json("sample", "night.safetensors", "-p", "a", *FAST, "--force")
    assert told["folder"] == "night-samples"
    assert [each["seed"] for each in told["pictures"]] == [0]
    assert not (place / "night-samples" / "night-seed-5.png").exists()


def test_strict_ends_with_3_where_a_check_fails_and_the_pictures_are_there(place, shell):
    asked = ("sample", "broken.safetensors", "-p", "a", *FAST)
    out, err = shell(*asked, "--strict", "-o", "one", code=3)
    assert "  BAD   " in out
    assert "of the pictures failed; the files were written." in err
    bad = [line.removeprefix("  BAD   ") for line in out.splitlines() if line.startswith("  BAD   ")]
    assert not any(line in err for line in bad)  # told once
    told = shell.json(*asked, "--strict", "-o", "two", code=3)
    assert told["error"]["type"] == "ChecksFailed"
    assert told["folder"] == "two"
    assert all((place / name / "sheet.png").is_file() for name in ("one", "two"))
    shell(*asked, "-o", "three")
    assert shell.json("sample", "night.safetensors", "-p", "a", *FAST, "--strict")["checks"]


def test_run_draws_and_no_samples_does_not(place, shell):
    out, err = shell("run", "r.toml", "--no-samples")
    assert "picture" not in out + err
    assert not (place / "r-samples").exists()
    out, _ = shell("run", "r.toml", "--force", "--set", "samples.0.seeds=[3]")
    assert "out.safetensors: " in out
    assert "r-samples: 1 picture of 1 model in " in out
    assert (place / "r-samples" / "out-seed-3.png").is_file()


def test_run_without_the_packages_warns_and_sample_ends_with_4(place, shell, monkeypatch):
    def missing():
        raise EnvironmentFault("Making pictures needs diffusers, not installed here: pip install it")

    monkeypatch.setattr(packages, "need_packages", missing)
    told = shell.json("run", "r.toml", "--strict")
    assert told["samples"] is None
    assert told["warnings"][-1].startswith("no pictures: Making pictures needs diffusers")
    assert told["outputs"][0]["name"] == "out"
    assert "pip install" in shell.refused("EnvironmentFault", 4, "sample", "r.toml")["message"]


def test_plan_and_check_tell_of_samples(place, shell):
    assert "1 picture of [out]: a lantern" in shell("plan", "r.toml")[0]
    assert "1 output, 1 sample)" in shell("check", "r.toml")[0]


NIGHT = ("sample", "night.safetensors", "-p", "a")
REFUSED = {  # the call, the error's type and code, its place, a word of the message and of the hint
    "no prompt": (NIGHT[:2], "UsageError", 2, "--prompt", "nothing to draw", "--prompt"),
    "a sampler": ((*NIGHT, "--sampler", "eulr"), "RecipeError", 2, "--sampler", '"eulr"', "euler"),
    "no LoRA": (("sample", NIGHT[1], "-p", "<lora:nope>"), "RecipeError", 2, "--prompt", 'LoRA "nope"', "--extras"),
    "a LoRA misspelt": (("sample", NIGHT[1], "-p", "<lora:glwo>"), "RecipeError", 2, "--prompt", "glwo", '"glow"'),
    "an open tag": (("sample", NIGHT[1], "-p", "<lora:glow"), "RecipeError", 2, "--prompt", "not closed", ">"),
    "an unknown tag": (("sample", NIGHT[1], "-p", "<lara:x>"), "RecipeError", 2, "--prompt", "unknown", "lora"),
    "negative": ((*NIGHT, "-n", "<lora:glow>"), "RecipeError", 2, "--negative", "negative", "prompt"),
    "extras": ((*NIGHT, "--extras", "nowhere"), "MissingInput", 3, None, "no such file or folder", "prompts"),
    "a size": ((*NIGHT, "--size", "big"), "UsageError", 2, "--size", '"big"', "512x768"),
    "an odd size": ((*NIGHT, "--size", "65x64"), "RecipeError", 2, "--size", "multiple of 8", ""),
    "an endless size": ((*NIGHT, "--size", "9" * 5000 + "x64"), "UsageError", 2, "--size", "no size", ""),
    "seeds": ((*NIGHT, "--seeds", "1,x"), "UsageError", 2, "--seeds", "no seeds", "1-8"),
    "seeds backwards": ((*NIGHT, "--seeds", "8-1"), "UsageError", 2, "--seeds", "no range", "1-8"),
    "a seed without end": ((*NIGHT, "--seeds", "9" * 5000), "UsageError", 2, "--seeds", "no seeds", ""),
    "a large seed": ((*NIGHT, "--seeds", "9" * 20), "RecipeError", 2, "--seeds", "at most", ""),
    "control": ((*NIGHT, "--control", "net"), "UsageError", 2, "--control", '"net"', "edges.png"),
    "no control": ((*NIGHT, "--control", "n.pt=p.png"), "MissingInput", 3, None, "no such file", "ControlNet"),
    "no picture": (
        (*NIGHT, "--control", f"{NIGHT[1]}=r.toml:0.5"),
        "UnreadableInput",
        3,
        None,
        "no picture",
        "PNG",
    ),
    "no hypernetwork": (("sample", NIGHT[1], "-p", "<hypernet:glow>"), "WrongFormat", 3, None, "no hypernetwork", ""),
    "a recipe and a model": ((*NIGHT, "r.toml"), "UsageError", 2, None, "alone", "one recipe"),
    "a delta": (("sample", "r.toml", "-p", "a", "--of", "difference"), "RecipeError", 2, "--of", "difference", "add"),
    "of nothing": (("sample", "r.toml", "-p", "a", "--of", "otu"), "RecipeError", 2, "--of", '"otu"', '"out"'),
    "of no sample": (("sample", "r.toml", "--of", "night"), "UsageError", 2, "--of", '"night"', "out"),
    "of one and another": (("sample", "r.toml", "--of", "out", "--of", "x"), "UsageError", 2, "--of", '"x"', "out"),
    "set of no recipe": ((*NIGHT, "--set", "seed=1"), "UsageError", 2, "--set", "recipe", ""),
    "no file": (("sample", "nihgt.safetensors", "-p", "a"), "MissingInput", 3, None, "no such file", "night"),
    "a LoRA as a model": (
        ("sample", "glow.safetensors", "-p", "a"),
        "WrongFormat",
        3,
        None,
        "cannot be sampled",
        "SD1",
    ),
}


@pytest.mark.parametrize(("call", "kind", "code", "key", "message", "hint"), REFUSED.values(), ids=REFUSED)
def test_refused(place, shell, call, kind, code, key, message, hint):
    error = shell.refused(kind, code, *call)
    assert error.get("key") == key
    assert message in error["message"]
    assert hint in error.get("hint", "")
    assert "samples.0" not in json.dumps(error)
    assert not [each for each in place.iterdir() if each.is_dir()]


SWEPT = RECIPE.replace('b = "night"\n[outputs', 'b = "night"\nalpha = { try = [0.2, 0.4] }\n[outputs')


@pytest.mark.parametrize(("option", "value"), [("--sampler", "eulr"), ("--size", "63x64"), ("--prompt", "<lora:nope>")])
def test_a_sweeps_refusal_names_the_option(place, shell, option, value):
    (place / "r.toml").write_text(SWEPT, encoding="utf-8")
    error = shell.refused("RecipeError", 2, "sweep", "r.toml", option, value)
    assert (error["key"], error.get("file"), error.get("line")) == (option, None, None)


def test_a_fault_in_a_recipes_own_sample_is_told_there(place, shell):
    (place / "r.toml").write_text(RECIPE.replace("a lantern", "<lora:nope>"), encoding="utf-8")
    error = shell.refused("RecipeError", 2, "sample", "r.toml")
    assert (error["file"], error["line"], error["key"]) == ("r.toml", 18, "samples.0.prompt")
    _, err = shell("run", "r.toml")
    assert 'warning: no pictures: There is no LoRA "nope"' in err
    assert (place / "out.safetensors").is_file()
    assert mk.load("r.toml").samples
