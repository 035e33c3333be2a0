"""merge and demo: a merge without a recipe, the recipe it can leave behind, and small models to try it on."""

from __future__ import annotations

import hashlib
import shlex
import sys
import tomllib

import pytest
import story
from safetensors.torch import load_file, save_file

import mergekit_sd as mk

A, B, C = "base.safetensors", "anime.safetensors", "dreambooth.safetensors"


@pytest.fixture
def place(tmp_path_factory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return story.room(tmp_path_factory, tmp_path, recipe=None)


@pytest.fixture
def shell(capsys):
    return story.Shell(capsys)


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


TABLE = '{ default = 0.2, "OUT03-OUT05" = 1, "OUT05.attn2" = 0.3 }'
LIST = ",".join(["0.5", *(f"{i / 24:.3f}" for i in range(25))])
METHODS = {
    "a number": ([A, B, "--alpha", "0.3"], {"alpha": 0.3}),
    "a preset": ([A, B, "--alpha", "GRAD_V"], {"alpha": "GRAD_V"}),
    "a pasted list": ([A, B, "--alpha", LIST], {"alpha": LIST}),
    "an array": ([A, B, "--alpha", f"[{LIST}]"], {"alpha": [float(each) for each in LIST.split(",")]}),
    "a table": ([A, B, "--alpha", TABLE], {"alpha": {"default": 0.2, "OUT03-OUT05": 1, "OUT05.attn2": 0.3}}),
    "beyond 1": ([A, B, "--alpha", "1.5", "--extrapolate"], {"alpha": 1.5, "extrapolate": True}),
    "two parameters": (
        [A, B, C, "--method", "sum_twice", "--alpha", "0.3", "--beta", "0.2"],
        {"alpha": 0.3, "beta": 0.2},
    ),
    "nothing": ([A, B], {}),
}


@pytest.mark.parametrize("how", METHODS)
def test_a_saved_recipe_makes_the_same_bytes(place, shell, how):
    arguments, parameters = METHODS[how]
    shell("merge", *arguments, "-o", "out.safetensors", "--save-recipe", "r.toml")
    made = digest(place / "out.safetensors")
    step = next(iter(tomllib.loads((place / "r.toml").read_text())["steps"].values()))
    assert {key: value for key, value in step.items() if key not in ("op", "a", "b", "c")} == parameters
    shell("check", "r.toml")
    shell("run", "r.toml", "--force", "--locked")
    assert digest(place / "out.safetensors") == made
    shell("verify", "out.safetensors")


def test_without_a_recipe_only_the_file_is_made(place, shell):
    before = set(story.state(place))
    out, err = shell("merge", A, B, "-o", "out.safetensors")
    assert out.splitlines()[1] == "  1,130 merged, 12 copied, 1 constant"
    assert err == ""
    assert set(story.state(place)) - before == {"out.safetensors"}
    assert shell.json("merge", A, B, "-o", "out.safetensors", "--force")["outputs"][0]["name"] == "output"


def test_a_recipe_saved_elsewhere_finds_its_models(place, shell):
    (place / "sub").mkdir()
    (place / "out").mkdir()
    shell("merge", A, B, "-o", "out/o.safetensors", "--save-recipe", "sub/r.toml")
    made = digest(place / "out" / "o.safetensors")
    shell("run", "sub/r.toml", "--force", "--output-root", "out")
    assert digest(place / "out" / "o.safetensors") == made


def test_three_models_with_vae_dtype_and_title(place, shell):
    shell(
        *("merge", A, B, C, "--method", "add_difference", "--alpha", "0.5", "--vae", B, "--dtype", "bf16"),
        *("--title", "[/x] Lantern", "-o", "out.safetensors", "--save-recipe", "r.toml", "--metadata", "webui"),
    )
    saved = tomllib.loads((place / "r.toml").read_text())
    assert saved["models"] == {"base": A, "anime": B, "dreambooth": C}
    assert saved["outputs"]["output"] == {
        "model": "add_difference",
        "file": "out.safetensors",
        "dtype": "bf16",
        "vae": "anime",
    }
    metadata = shell.json("inspect", "out.safetensors")["metadata"]
    assert metadata["modelspec.title"] == "[/x] Lantern"
    assert "sd_merge_recipe" in metadata


def test_the_title_is_the_models_names(place, shell):
    shell("merge", A, B, "-o", "out.safetensors")
    assert shell.json("inspect", "out.safetensors")["metadata"]["modelspec.title"] == "base + anime"


def test_a_dry_run_makes_no_model(place, shell):
    before = story.state(place)
    out, _ = shell("merge", A, B, "-o", "out.safetensors", "--dry-run")
    assert "step weighted_sum: weighted_sum(a = base, b = anime)" in out
    assert story.state(place) == before
    report = shell.json("merge", A, B, "-o", "out.safetensors", "--dry-run", "--save-recipe", "r.toml")
    assert report["outputs"][0]["tensors"]["merged"] == 1130
    assert set(story.state(place)) - set(before) == {"r.toml"}
    (place / "out.safetensors").touch()
    report = shell.json("merge", A, B, "-o", "out.safetensors", "--dry-run", code=2)
    assert report["error"]["type"] == "OutputExists"
    assert report["inputs"]


REFUSED = {
    "a misspelt preset": (
        [A, B, "--alpha", "GRADV"],
        "RecipeError",
        2,
        {"key": "--alpha", "hint": 'did you mean "GRAD_V"?'},
    ),
    "a number beyond": (
        [A, B, "--alpha", "1.5"],
        "RecipeError",
        2,
        {"hint": "if you mean to go beyond, give --extrapolate"},
    ),
    "a wrong count": ([A, B, "--alpha", "0.1,0.2"], "RecipeError", 2, {"message": "alpha has 2 numbers."}),
    "half a table": ([A, B, "--alpha", "{ default = 1"], "UsageError", 2, {"key": "--alpha"}),
    "an unquoted part": ([A, B, "--alpha", "{ M00.attn2 = 1 }"], "RecipeError", 2, {"key": "--alpha M00.attn2"}),
    "a block of nothing": ([A, B, "--alpha", "{ default = 1, IN12 = 1 }"], "RecipeError", 2, {"key": "--alpha IN12"}),
    "a selector of nothing": (
        [A, B, "--alpha", '{ default = 1, "*.nix" = 1 }'],
        "RecipeError",
        2,
        {"key": '--alpha "*.nix"'},
    ),
    "a parameter of others": ([A, B, "--beta", "1"], "UsageError", 2, {"key": "--beta", "hint": "it takes: --alpha"}),
    "a misspelt method": (
        [A, B, "--method", "add_differense"],
        "UsageError",
        2,
        {"hint": 'did you mean "add_difference"?'},
    ),
    "a model too many": ([A, B, C], "UsageError", 2, {"message": "weighted_sum takes 2 models (a, b), not 3."}),
    "a difference": ([A, B, "--method", "subtract"], "RecipeError", 2, {"key": "--method"}),
    "a missing model": ([A, "anima.safetensors"], "MissingInput", 3, {"file": "anima.safetensors"}),
    "a recipe as VAE": ([A, B, "--vae", "note.toml"], "WrongFormat", 3, {"file": "note.toml"}),
    "no VAE": ([A, B, "--vae", "text.safetensors"], "MissingTensors", 3, {"message": '"text" has no VAE.'}),
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_refusals_name_the_option_and_leave_nothing(place, shell, wrong):
    arguments, kind, code, named = REFUSED[wrong]
    (place / "note.toml").write_text("recipe = 1\n")
    text = {key: value for key, value in load_file(A).items() if key.startswith("cond_stage_model.")}
    save_file(text, place / "text.safetensors")
    before = story.state(place)
    error = shell.refused(kind, code, "merge", *arguments, "-o", "out.safetensors", "--save-recipe", "r.toml")
    assert named.items() <= error.items()
    assert error.get("hint") or error["details"]
    assert story.state(place) == before


def test_methods_that_take_as_many_models_are_named(shell):
    hint = shell.refused("UsageError", 2, "merge", A, B, C, "-o", "out.safetensors")["hint"]
    assert hint.startswith("for 3: --method add_difference, ")


def test_lists_choices_and_seeds_are_options_too(place, shell):
    shell(
        "merge",
        A,
        B,
        C,
        "--method",
        "linear",
        "--weights",
        "[1, 0.5, 0.25]",
        "-o",
        "l.safetensors",
        "--save-recipe",
        "l.toml",
    )
    step = tomllib.loads((place / "l.toml").read_text())["steps"]["linear"]
    assert step["weights"] == [1, 0.5, 0.25]
    assert len(step["models"]) == 3
    shell("merge", A, B, "--method", "tensor_sum", "--dim", "1", "--alpha", "0.5", "-o", "t.safetensors")
    made = []
    for seed in ("3", "3", "4"):
        shell(
            "merge",
            A,
            "--method",
            "random_noise",
            "--seed",
            seed,
            "-o",
            "n.safetensors",
            "--force",
            "--metadata",
            "none",
        )
        made.append((place / "n.safetensors").read_bytes())
    assert made[0] == made[1] != made[2]
    error = shell.refused(
        "RecipeError", 2, "merge", A, B, "--method", "tensor_sum", "--dim", "3", "-o", "x.safetensors"
    )
    assert error["key"] == "--dim"


def test_a_target_that_is_an_input_or_the_recipe(place, shell):
    before = story.state(place)
    for more in ([], ["--save-recipe", "r.toml"]):
        error = shell.refused("OutputIsInput", 2, "merge", A, B, "-o", f"./{B}", "--force", *more)
        assert error["key"] == "--output"
    shell.refused("OutputIsInput", 2, "merge", A, B, "-o", "r.toml", "--save-recipe", "r.toml")
    assert story.state(place) == before


def test_files_that_exist_are_kept(place, shell):
    (place / "out.safetensors").write_text("mine")
    (place / "r.toml").write_text("mine, too")
    before = story.state(place)
    shell.refused("OutputExists", 2, "merge", A, B, "-o", "out.safetensors")
    shell.refused("OutputExists", 2, "merge", A, B, "-o", "out.safetensors", "--save-recipe", "new.toml")
    assert (
        shell.refused("OutputExists", 2, "merge", A, B, "-o", "o.safetensors", "--save-recipe", "r.toml")["file"]
        == "r.toml"
    )
    assert story.state(place) == before
    shell.refused("NotWritable", 4, "merge", A, B, "-o", "no/out.safetensors", "--force", "--save-recipe", "r.toml")
    assert (place / "r.toml").read_text() == "mine, too"
    shell.refused("NotWritable", 4, "merge", A, B, "-o", "o.safetensors", "--save-recipe", "no/r.toml")


# --- demo -------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="quotes as cmd does")
def test_demo_draws_and_says_what_to_do_next_and_that_works(tmp_path, monkeypatch, shell):
    pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    out, _ = shell("demo", "my demo")
    folder = tmp_path / "my demo"
    assert (folder / "quickstart.safetensors").stat().st_size > 8_000_000
    assert "checks found nothing wrong" in out
    assert len(list((folder / "quickstart-samples").glob("*-seed-*.png"))) == 28
    assert (folder / "quickstart-samples" / "sheet.png").exists()
    commands = [line.removeprefix("  mergekit-sd ") for line in out.splitlines() if line.startswith("  mergekit-sd ")]
    assert [command.split()[0] for command in commands] == ["plan", "diff", "sample", "sample", "lora", "verify"]
    monkeypatch.chdir(folder)
    for command in commands:
        arguments = shlex.split(command)
        if arguments[0] == "sample":
            arguments += ["--steps", "2", "--checks", "none"]
        if "--draw" in arguments:  # drawn in test_family
            arguments = arguments[: arguments.index("--draw")]
        shell(*arguments)


def test_demo_keeps_what_is_there(tmp_path, monkeypatch, shell):
    monkeypatch.chdir(tmp_path)
    report = shell.json("demo", "--no-samples")
    assert report["folder"] == "mergekit-sd-demo"
    assert report["samples"] is None
    assert report["outputs"][0]["counts"]["merged"] == 1118
    before = story.state(tmp_path)
    assert shell.refused("OutputExists", 2, "demo")["hint"]
    assert story.state(tmp_path) == before
    again = shell.json("demo", "--force", "--no-samples")
    assert again["outputs"][0]["content_hash"] == report["outputs"][0]["content_hash"]


def test_demo_where_no_folder_can_be(tmp_path, monkeypatch, shell):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert "file" in shell.refused("NotWritable", 4, "demo", "file/below")["file"]


def test_small_models_are_whole(place):
    names = {path.stem: mk.inspect_file(path) for path in place.glob("*.safetensors")}
    assert sorted(names) == sorted(story.NAMES)
    for inspection in names.values():
        assert (inspection.kind, inspection.architecture) == ("checkpoint", "sd1")
