"""run, plan, check as a user calls them: what they say, how they end, and what they leave."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import pytest
import story
import torch
from safetensors.torch import load_file, save_file

import mergekit_sd as mk
from mergekit_sd.errors import Cancelled

CONV = "model.diffusion_model.input_blocks.0.0.weight"
BROKEN = story.MIX.replace("alpha = 0.3", "alpah = 0.3")
NO_MODEL = story.MIX.replace("anime.safetensors", "nowhere.safetensors")
NO_FOLDER = story.MIX.replace("out.safetensors", "sub/out.safetensors")
OUTSIDE = story.MIX.replace("out.safetensors", "../out.safetensors")
ONTO_INPUT = story.MIX.replace("out.safetensors", "./base.safetensors")
PINNED = story.MIX.replace('"anime.safetensors"', '{ file = "anime.safetensors", sha256 = "' + "0" * 64 + '" }')
HTML = story.MIX.replace("anime.safetensors", "page.safetensors")

REFUSED = {  # what is wrong: the recipe, the error's type, exit code, and what it names
    "a misspelt key": (
        BROKEN,
        "RecipeError",
        2,
        {"key": "steps.mix.alpah", "line": 12, "hint": 'did you mean "alpha"?'},
    ),
    "no model": (NO_MODEL, "MissingInput", 3, {"file": "nowhere.safetensors"}),
    "no folder": (NO_FOLDER, "NotWritable", 4, {"message": "The output's folder does not exist."}),
    "a target outside": (OUTSIDE, "RecipeError", 2, {"key": "outputs.out.file", "line": 16}),
    "a target that is an input": (ONTO_INPUT, "OutputIsInput", 2, {"key": "outputs.out.file", "line": 16}),
    "a broken pin": (PINNED, "PinMismatch", 3, {"key": "models.anime.sha256", "line": 6, "file": "anime.safetensors"}),
    "no model file": (HTML, "WrongFormat", 3, {"file": "page.safetensors"}),
    "no TOML": ("recipe = 1\n[models\n", "RecipeError", 2, {"line": 2, "file": "r.toml"}),
}


@pytest.fixture
def place(tmp_path_factory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return story.room(tmp_path_factory, tmp_path)


@pytest.fixture
def shell(capsys):
    return story.Shell(capsys)


def rewritten(place, name, change):
    """A model whose link is replaced by a changed copy."""
    path = place / f"{name}.safetensors"
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path, {"format": "pt"})


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- run ------------------------------------------------------------------------------------------


def test_run_tells_each_file_once_and_writes_its_lock(place, shell):
    out, err = shell("run", "r.toml")
    lock = json.loads((place / "r.lock").read_text())
    first, counts, content = out.splitlines()
    assert first.startswith("out.safetensors: 8.2 MiB in ")
    assert counts == "  1,130 merged, 12 copied, 1 constant"
    assert content == f"  content {lock['outputs']['out']['content']}"
    assert err == ""


def test_run_with_json_gives_one_report_and_events(place, shell):
    out, err = shell("run", "r.toml", "--json")
    report = json.loads(out)
    assert report["recipe"] == "r.toml"
    assert report["lock"] == "r.lock"
    assert report["outputs"][0]["counts"] == {"merged": 1130, "cast": 0, "copied": 12, "constant": 1}
    events = [json.loads(line)["event"] for line in err.splitlines()]
    assert (events[0], events[-1]) == ("output_started", "output_finished")
    assert set(events[1:-1]) == {"progress"}


@pytest.mark.parametrize("command", ["plan", "run", "run --dry-run"])
@pytest.mark.parametrize("wrong", REFUSED)
def test_plan_and_run_refuse_alike(place, shell, wrong, command):
    recipe, kind, code, named = REFUSED[wrong]
    (place / "r.toml").write_text(recipe, encoding="utf-8")
    (place / "page.safetensors").write_text("<!DOCTYPE html><html></html>")
    before = story.state(place)
    error = shell.refused(kind, code, *command.split(), "r.toml")
    assert named.items() <= error.items()
    assert error.get("hint") or wrong == "no TOML"
    assert story.state(place) == before


@pytest.mark.parametrize(
    ("arguments", "kind", "named"),
    [
        (["run", "nowhere.toml"], "RecipeError", {"file": "nowhere.toml"}),
        (["run", "r.toml", "--set", "steps.mix.alpha"], "UsageError", {"hint": "write --set steps.mix.alpha=0.4"}),
        (["run", "r.toml", "--set", "steps.mux.alpha=1"], "RecipeError", {"key": "steps.mux.alpha", "file": "--set"}),
        (["run", "r.toml", "--set", "steps.mix.alpha=nan"], "RecipeError", {"key": "steps.mix.alpha", "file": "--set"}),
        (["plan", "r.toml", "--set", "outputs.out.dtype=fp17"], "RecipeError", {"key": "outputs.out.dtype"}),
    ],
)
def test_usage_is_refused(place, shell, arguments, kind, named):
    before = story.state(place)
    assert named.items() <= shell.refused(kind, 2, *arguments).items()
    assert story.state(place) == before


@pytest.mark.parametrize(
    "arguments",
    [["run"], ["run", "r.toml", "--threads", "0"], ["plan", "r.toml", "x"], ["run", "r.toml", "--fast"], ["rnu"]],
)
def test_what_click_refuses_is_json_too(place, shell, arguments):
    assert shell.json(*arguments, code=2)["error"]["type"] == "UsageError"
    _, err = shell(*arguments, code=2)
    assert "Error: " in err


def test_an_existing_file_is_planned_but_not_replaced(place, shell):
    (place / "out.safetensors").write_bytes(b"mine")
    before = story.state(place)
    for command in (["plan", "r.toml"], ["run", "r.toml", "--dry-run"]):
        out, err = shell(*command, code=2)
        assert "alpha = 0.3 everywhere" in out
        assert "out.safetensors" in err
        assert "give --force to replace it" in err
        report = shell.json(*command, code=2)
        assert report["steps"][0]["weights"]["alpha"]["M00"] == 0.3
        assert report["error"]["type"] == "OutputExists"
        assert "error" not in shell.json(*command, "--force")
    shell.refused("OutputExists", 2, "run", "r.toml")
    assert story.state(place) == before
    shell("run", "r.toml", "--force")
    assert (place / "out.safetensors").stat().st_size > 8_000_000


def test_a_dry_run_writes_nothing(place, shell):
    before = story.state(place)
    planned, dry = shell("plan", "r.toml"), shell("run", "r.toml", "--dry-run")
    assert planned == dry
    assert story.state(place) == before


def test_set_changes_the_result_as_the_recipe_would(place, shell):
    shell("run", "r.toml", "--set", "steps.mix.alpha=0.8", "--set", 'title="Other"')
    by_set = digest(place / "out.safetensors")
    (place / "r.toml").write_text(story.MIX.replace("0.3", "0.8").replace("Mix", "Other"))
    shell("run", "r.toml", "--force")
    assert digest(place / "out.safetensors") == by_set


def test_threads_scan_and_roots_do_not_change_the_bytes(place, shell):
    shell("run", "r.toml")
    (place / "elsewhere").mkdir()
    shell("run", "r.toml", "--output-root", "elsewhere", "--threads", "1", "--scan", "--allow-nonfinite")
    assert digest(place / "elsewhere" / "out.safetensors") == digest(place / "out.safetensors")


def test_metadata(place, shell):
    found = {}
    for style in ("full", "webui", "none"):
        shell("run", "r.toml", "--force", "--metadata", style)
        found[style] = set(shell.json("inspect", "out.safetensors")["metadata"])
    assert found["none"] == {"format"}
    assert found["webui"] - found["full"] == {"sd_merge_recipe", "sd_merge_models"}
    assert {"mergekit_sd.recipe", "modelspec.title"} <= found["full"]


# --- several recipes --------------------------------------------------------------------------------


def test_keep_going_makes_the_rest_and_ends_with_the_first_failure(place, shell):
    (place / "broken.toml").write_text(BROKEN)
    (place / "lost.toml").write_text(NO_MODEL)
    report = shell.json("run", "lost.toml", "r.toml", "broken.toml", "--keep-going", code=3)
    assert [each["name"] for each in report["outputs"]] == ["out"]
    assert [(each["recipe"], each["error"]["exit_code"]) for each in report["failed"]] == [
        ("lost.toml", 3),
        ("broken.toml", 2),
    ]
    assert report["error"] == report["failed"][0]["error"]
    assert (place / "out.safetensors").exists()


def test_the_first_failure_stops_and_what_was_made_is_told(place, shell):
    (place / "second.toml").write_text(story.MIX.replace("out.safetensors", "second.safetensors"))
    out, err = shell("run", "r.toml", "nowhere.toml", "second.toml", code=2)
    assert out.startswith("out.safetensors: ")
    assert err.count("error: ") == 1
    assert not (place / "second.safetensors").exists()
    report = shell.json("run", "r.toml", "nowhere.toml", "second.toml", "--force", code=2)
    assert [each["recipe"] for each in report["outputs"]] == ["r.toml"]
    assert report["error"]["file"] == "nowhere.toml"


def test_cancelling_ends_all_recipes(place, shell, monkeypatch):
    def cancelled(*_, **__):
        raise Cancelled

    monkeypatch.setattr(mk, "run", cancelled, raising=False)
    _, err = shell("run", "nowhere.toml", "r.toml", "--keep-going", code=130)
    assert err.count("Cancelled") == 1
    report = shell.json("run", "r.toml", "r.toml", "--keep-going", code=130)
    assert [each["error"]["type"] for each in report["failed"]] == ["Cancelled"]


# --- the lock ---------------------------------------------------------------------------------------


def test_skip_done(place, shell):
    shell("run", "r.toml", "--skip-done")
    before = story.state(place)
    assert shell("run", "r.toml", "--skip-done")[0] == "r.toml: nothing to do, done already: out\n"
    assert shell.json("run", "r.toml", "--skip-done")["skipped"] == ["out"]
    assert story.state(place) == before
    rewritten(place, "anime", lambda tensors: tensors[CONV].mul_(2))
    assert shell("run", "r.toml", "--skip-done", "--force")[0].startswith("out.safetensors: ")


def test_locked(place, shell):
    assert shell.refused("PinMismatch", 3, "run", "r.toml", "--locked")["hint"]
    shell("run", "r.toml")
    made, lock = digest(place / "out.safetensors"), digest(place / "r.lock")
    shell("run", "r.toml", "--locked", "--force")
    changed = ["--set", "steps.mix.alpha=0.4"]
    assert shell.refused("PinMismatch", 3, "run", "r.toml", "--locked", "--force", *changed)["file"] == "r.lock"
    rewritten(place, "anime", lambda tensors: tensors[CONV].mul_(2))
    before = story.state(place)
    shell.refused("PinMismatch", 3, "run", "r.toml", "--locked", "--force")
    assert story.state(place) == before
    assert (digest(place / "out.safetensors"), digest(place / "r.lock")) == (made, lock)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"lock": 2}', "[" * 100_000, '{"lock": 1, "inputs": 3}', "\xff"])
def test_a_damaged_lock_is_refused(place, shell, content):
    (place / "r.lock").write_text(content, encoding="latin-1")
    error = shell.refused("PinMismatch", 3, "run", "r.toml", "--locked")
    assert error["file"] == "r.lock"
    assert "delete it" in error["hint"]


def test_hashes_for_the_lock(place, shell):
    shell("run", "r.toml", "--hash")
    inputs = json.loads((place / "r.lock").read_text())["inputs"]
    assert inputs["anime"]["sha256"] == digest(place / "anime.safetensors")


# --- findings ---------------------------------------------------------------------------------------


def test_nan_is_refused_with_every_tensor_unless_allowed(place, shell):
    other = CONV.replace("weight", "bias")
    rewritten(
        place, "anime", lambda tensors: (tensors[CONV][0].fill_(float("nan")), tensors[other].fill_(float("inf")))
    )
    before = story.state(place)
    error = shell.refused("NonFiniteResult", 3, "run", "r.toml")
    assert all(any(name in line for line in error["details"]) for name in (CONV, other))
    assert story.state(place) == before
    _, err = shell("run", "r.toml", "--allow-nonfinite")
    assert "warning: NaN or Inf: " in err
    assert f"in 2 tensors: {other}, {CONV}" in err


def test_scan_looks_at_what_is_copied(place, shell):
    rewritten(place, "base", lambda tensors: tensors["betas"].fill_(float("nan")))
    assert "betas" in shell.refused("NonFiniteResult", 3, "run", "r.toml", "--scan")["details"][0]
    shell("run", "r.toml")


def test_clamped_elements_are_counted(place, shell):
    rewritten(place, "anime", lambda tensors: tensors.update({CONV: torch.full_like(tensors[CONV].float(), 1e6)}))
    assert CONV in shell.refused("DtypeOverflow", 3, "run", "r.toml")["details"][0]
    _, err = shell("run", "r.toml", "--set", "outputs.out.overflow=clamp")
    assert "warning: clamped: " in err
    assert f"in 1 tensor: {CONV}" in err


# --- plan -------------------------------------------------------------------------------------------


def test_a_plan_tells_all(place, shell):
    rewritten(
        place, "base", lambda tensors: tensors.update({"extra.junk": torch.ones(3), "model_ema.decay": torch.ones(())})
    )
    rewritten(place, "anime", lambda tensors: (tensors.pop(CONV), tensors.update({"only.in_b": torch.ones(2)})))
    weights = '{ default = 0.25, M00 = 0.75, "OUT05.attn2" = 1.0, vae = 0 }'
    recipe = story.MIX.replace("0.3", weights) + 'dtype = { default = "fp16", vae = "fp32" }\n'
    (place / "r.toml").write_text(recipe)
    out, err = shell("plan", "r.toml")
    lines = out.splitlines()
    assert "step mix: weighted_sum(a = base, b = anime)" in lines
    assert "    M00 0.75▆" in lines
    assert any("text_encoder 0.25▂" in line and "vae 0" in line for line in lines)
    assert any("OUT05 0.25–1" in line for line in lines), out
    assert "  1 tensor missing elsewhere, kept as they are:" in lines
    assert f"    {CONV}" in lines
    assert "  1 tensor only elsewhere, dropped: only.in_b" in lines
    assert "output out: out.safetensors" in lines
    assert any(
        line.startswith("  sd1, predicts epsilon, 8.9 MiB, 1,143 tensors (F16 × 882, F32 × 260") for line in lines
    )
    assert "  1 tensor dropped as junk: extra.junk" in lines
    assert "  1 tensor dropped as ema: model_ema.decay" in lines
    assert lines[-1].startswith("reads 15.")
    assert max(map(len, lines)) <= 80
    assert err == ""


def test_a_plan_as_json_has_each_blocks_weight(place, shell):
    report = shell.json("plan", "r.toml", "--set", "steps.mix.alpha=GRAD_V")
    weights = report["steps"][0]["weights"]["alpha"]
    assert (weights["IN00"], weights["M00"], weights["OUT11"], weights["vae"]) == (1, 0, 1, 0)
    assert len(weights) == 27
    output = report["outputs"][0]
    assert output["tensors"]["total"] == 1143
    assert output["bytes"] == report["write_bytes"]
    assert output["dtypes"] == {"F16": 1130, "F32": 12, "I64": 1}
    assert report["inputs"][1]["architecture"] == "sd1"
    assert report["read_bytes"] > 0


def test_problems_are_part_of_a_plan(place, shell):
    vae = "first_stage_model.decoder.conv_in.bias"
    rewritten(place, "anime", lambda tensors: tensors[vae].add_(1))
    _, err = shell("plan", "r.toml")
    assert err.startswith('warning: step "mix" mixes the different VAEs of "base" and "anime"')
    assert len(shell.json("plan", "r.toml")["warnings"]) == 1
    assert "warning: " in shell("run", "r.toml")[1]


def test_foreign_names_are_shown_escaped(place, shell):
    name = "[/x]\x1b[31m\n"
    rewritten(place, "base", lambda tensors: tensors.update({name: torch.ones(2)}))
    out, _ = shell("plan", "r.toml", "--set", "outputs.out.file=[bold].safetensors")
    assert "dropped as junk: [/x]\\x1b[31m\\n" in out
    assert "output out: [bold].safetensors" in out
    assert "\x1b" not in out


# --- check ------------------------------------------------------------------------------------------


def test_check_opens_no_model(tmp_path, monkeypatch, shell):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.toml").write_text(story.MIX.replace("anime", "nowhere"))
    assert shell("check", "r.toml") == ("r.toml: sound (2 models, 1 step, 1 output)\n", "")
    assert shell.json("check", "r.toml") == {"recipe": "r.toml", "ok": True, "warnings": [], "outputs": ["out"]}


def test_check_refuses_and_warns(place, shell):
    (place / "r.toml").write_text(BROKEN)
    error = shell.refused("RecipeError", 2, "check", "r.toml")
    assert (error["line"], error["column"]) == (12, 1)
    (place / "r.toml").write_text(story.MIX.replace('model = "mix"', 'model = "base"'))
    assert "is used by no output" in shell("check", "r.toml")[1]
    assert len(shell.json("check", "r.toml")["warnings"]) == 1


# --- the process ------------------------------------------------------------------------------------


def test_a_stream_without_our_signs_gets_plain_numbers(place):
    done = subprocess.run(
        [sys.executable, "-m", "mergekit_sd", "plan", "r.toml", "--set", "steps.mix.alpha=GRAD_A"],
        cwd=place,
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        check=True,
    )
    out = done.stdout.decode("ascii")
    assert "M00 1\n" in out.replace("\r", "")
    assert "IN06 0.5" in out
    assert "0.54" not in out
    assert "F16 x 1,130" in out
