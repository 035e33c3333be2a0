"""The whole story: two models of the trained family, mixed by hand, undone, planned, run, drawn, saved, run again."""

from __future__ import annotations

import shutil

import pytest
import tui_stage as stage
from click.testing import CliRunner
from textual.widgets import Input

pytest.importorskip("diffusers")

import mergekit_sd as mk
from mergekit_sd.cli.main import cli
from mergekit_sd.family import write_family
from mergekit_sd_tui.pictures import PictureView

pytestmark = pytest.mark.slow


@pytest.fixture
def family(tmp_path, monkeypatch):
    """A folder of models, apart from the one that the workbench runs in."""
    folder = tmp_path / "models"
    folder.mkdir()
    write_family(folder)
    (tmp_path / "recipes").mkdir()
    monkeypatch.chdir(tmp_path / "recipes")
    monkeypatch.setattr(stage, "PATIENCE", 60.0)
    stage.scanned(folder)
    return folder


async def marks(pilot, name):
    """Filter the library, mark what is left."""
    await pilot.press("slash", *name, "enter")
    await stage.until(pilot, lambda: stage.status(pilot.app).startswith("1 of "), f"only {name}")
    await pilot.press("space", "escape")
    await stage.sees(pilot, "* ")


async def answers(pilot, words):
    """Type into what is asked, and take it."""
    await stage.until(pilot, lambda: pilot.app.screen.is_modal)
    pilot.app.screen.query_one(Input).value = words
    await pilot.press("enter")
    await stage.until(pilot, lambda: not pilot.app.screen.is_modal)


async def mixes(pilot):
    """Two models by a preset; IN04 changed, taken back, and done again."""
    app = pilot.app
    await stage.library(pilot, "night.safetensors")
    await marks(pilot, "base.saf")
    await marks(pilot, "night.saf")
    assert [path.name for path in app.workspace.marked] == ["base.safetensors", "night.safetensors"]
    await pilot.press("m")
    await stage.sees(pilot, "[Mix]", "(sd1)", "weighted_sum of base, night", "alpha at base: 0.5")
    await pilot.press("p")
    await answers(pilot, "GRAD_A")
    await stage.sees(pilot, "GRAD_A")
    preset = app.workspace.draft.text
    await pilot.press(*["right"] * 5, "down", "down")
    await stage.sees(pilot, "alpha at IN04: 0.2333")
    changed = app.workspace.draft.text
    await pilot.press("z")
    assert app.workspace.draft.text not in (preset, changed)
    await pilot.press("z")
    assert app.workspace.draft.text == preset
    await pilot.press("Z", "Z")
    assert app.workspace.draft.text == changed


async def runs(pilot, path):
    """Planned, saved under a name, run."""
    app = pilot.app
    await pilot.press("f5")
    await stage.sees(pilot, "[Recipe]", "reads ", "IN04 0.233")
    assert app.jobs == ()
    await pilot.press("f6")
    await stage.sees(pilot, "Save the recipe as")
    await answers(pilot, str(path))
    await stage.sees(pilot, "[Jobs]", f"run {path.name}")
    await stage.until(pilot, lambda: app.jobs[0].is_over, "the end of the run")
    assert app.jobs[0].state == "done", app.jobs[0]


async def draws(pilot):
    """A picture of the mix, beside the bars and in the gallery."""
    app = pilot.app
    await pilot.press("3", "s")
    await answers(pilot, "a red circle on a white background")
    await stage.until(pilot, lambda: len(app.jobs) == 2 and app.jobs[1].is_over, "the picture")
    assert app.jobs[1].state == "done", app.jobs[1]
    await stage.sees(pilot, "mix is drawn", "mix: a red circle")
    assert app.screen.query_one(PictureView).display
    assert "before the last changes" not in stage.shown(app)
    await pilot.press("up")
    await stage.sees(pilot, "before the last changes")
    await pilot.press("z", "6")
    await stage.sees(pilot, "[Gallery]", "1 picture of 1 model", "a red circle on a white background")


def test_from_two_models_to_a_recipe_that_gives_the_same_bytes(family, tmp_path):
    recipe = tmp_path / "recipes" / "dusk.toml"

    async def story(pilot):
        app = pilot.app
        await mixes(pilot)
        await runs(pilot, recipe)
        await draws(pilot)
        app.clear_notifications()
        await pilot.press("4", "ctrl+s")
        await stage.until(pilot, lambda: "dusk.toml is saved" in stage.told(app), "the saving")
        await pilot.press("1")
        await stage.sees(pilot, "mix.safetensors")

    app = stage.play(story, (120, 40))
    assert recipe.read_text() == app.workspace.draft.text
    assert sorted(path.name for path in recipe.parent.iterdir()) == ["dusk.lock", "dusk.toml", "mix.safetensors"]
    made = recipe.with_name("mix.safetensors").read_bytes()
    again = CliRunner().invoke(cli, ["run", str(recipe), "--force"], standalone_mode=False)
    assert again.exit_code == 0, again.output
    assert recipe.with_name("mix.safetensors").read_bytes() == made

    # In another folder the models are found, too.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(recipe, elsewhere)
    mk.run(elsewhere / "dusk.toml")
    assert (elsewhere / "mix.safetensors").read_bytes() == made
