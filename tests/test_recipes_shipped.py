"""The recipes that ship: each says what it is for, and runs on small models of the names it uses."""

from __future__ import annotations

from pathlib import Path

import pytest
import small_files
import story
import torch

from mergekit_sd.family import write_family

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.toml"))


@pytest.fixture
def place(tmp_path_factory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return story.room(tmp_path_factory, tmp_path, recipe=None)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_runs(place, capsys, recipe):
    shell = story.Shell(capsys)
    (place / recipe.name).write_bytes(recipe.read_bytes())
    for name in ("ink", "light"):  # what those with LoRAs name
        shell("lora", "extract", "anime.safetensors", "base.safetensors", "--rank", "2", "-o", f"{name}.safetensors")
    if recipe.stem == "embedding":
        for name in ("lantern", "fog"):
            small_files.plain(place / f"{name}.safetensors", torch.randn(3, 768))
    if recipe.stem == "quickstart":  # the demo's own models
        for path in place.glob("*.safetensors"):
            path.unlink()
        write_family(place)
    assert shell("check", recipe.name)[1] == ""
    assert "problem" not in shell.json("plan", recipe.name)
    report = shell.json("run", recipe.name, "--no-samples")
    assert not report["warnings"]
    counts = report["outputs"][0]["counts"]
    small = recipe.stem == "embedding"
    assert counts["merged"] > 500 or "lora" in recipe.stem or small
    assert counts["merged"] + counts["constant"] > 200 or small
    shell("verify", report["outputs"][0]["path"])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_says_what_it_is_for(recipe):
    text = recipe.read_text(encoding="utf-8")
    header = text.partition("recipe = 1")[0].splitlines()
    assert len(header) >= 2
    assert all(line.startswith("# ") and len(line) <= 100 for line in header)
    assert recipe.stem in text.partition("[outputs")[2]


def test_there_are_recipes():
    assert len(RECIPES) >= 6
