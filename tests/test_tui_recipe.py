"""The Recipe screen: typed, checked, saved, changed by others, planned and run, told as stories."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tui_stage as stage
from click.testing import CliRunner

import mergekit_sd as mk
from mergekit_sd.cli.main import cli
from mergekit_sd.errors import MergekitError, NotWritable
from mergekit_sd_tui import recipe_file
from mergekit_sd_tui.app import Workbench
from mergekit_sd_tui.editor import Editor
from mergekit_sd_tui.history import History
from mergekit_sd_tui.recipe_file import ChangedOutside, write_recipe
from mergekit_sd_tui.screens import recipe as recipe_screen
from mergekit_sd_tui.state import Draft

TEXT = """\
recipe = 1
# by hand, kept as it is
[models]
a = "a.safetensors"
b = "b.safetensors"

[steps.mix]
op = "weighted_sum"
a = "a"
b = "b"
alpha = { preset = "GRAD_V" }

[outputs.out]
model = "mix"
file = "out.safetensors"
"""
SOUND = "2 models, 1 step, 1 output"


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe beside its two models, in the current folder."""
    folder = tmp_path / "work"
    for seed, name in enumerate("ab"):
        stage.small_file(folder / f"{name}.safetensors", seed)
    path = folder / "mix.toml"
    path.write_text(TEXT)
    monkeypatch.chdir(folder)
    return path


async def opened(pilot, path):
    pilot.app.open_recipe(path)
    await stage.sees(pilot, "[Recipe]", SOUND, "Write")
    await pilot.press("enter")
    await stage.sees(pilot, "esc Keys")
    return pilot.app.screen.query_one(Editor)


def problem(app):
    line = app.screen.query_one("#problem")
    return str(line.render()) if line.has_class("open") else ""


def underlined(app):
    """What the screen shows underlined, line by line."""
    lines = app.screen._compositor.render_strips()
    cut = ["".join(part.text for part in strip if part.style and part.style.underline) for strip in lines]
    return [text.strip() for text in cut if text.strip()]


# --- typing ------------------------------------------------------------------------------------------------


def test_a_problem_is_told_with_line_column_and_hint(recipe):
    recipe.write_text(TEXT.replace("weighted_sum", "weighted_sun"))

    async def story(pilot):
        pilot.app.open_recipe(recipe)
        await stage.sees(pilot, "[Recipe]", "line 8, column", 'did you mean "weighted_sum"?', "a problem")
        assert underlined(pilot.app)[0].endswith('"weighted_sun"')
        editor = pilot.app.screen.query_one(Editor)
        editor.move_cursor((7, 18))
        await pilot.press("enter", "backspace", "m")
        await stage.sees(pilot, SOUND)
        assert problem(pilot.app) == ""
        assert 'op = "weighted_sum"' in pilot.app.workspace.draft.text
        assert not any("weighted" in text for text in underlined(pilot.app))

    stage.play(story)


def test_what_is_no_toml_is_told_where(recipe):
    async def story(pilot):
        editor = await opened(pilot, recipe)
        editor.move_cursor((3, 0))
        await pilot.press("[")
        await stage.until(pilot, lambda: problem(pilot.app).startswith("line 4"), "the problem")

    stage.play(story)


def test_a_burst_of_typing_is_one_edit(recipe, monkeypatch):
    monkeypatch.setattr(recipe_screen, "PAUSE", 30.0)  # a busy machine types slowly; Esc ends a burst, too

    async def story(pilot):
        app = pilot.app
        editor = await opened(pilot, recipe)
        await pilot.press(*"# 1z?Z")
        await pilot.press("escape", "1")
        await stage.sees(pilot, "[Library]")
        assert app.workspace.draft.text == "# 1z?Z" + TEXT
        await pilot.press("4", "z")
        await stage.until(pilot, lambda: editor.text == TEXT)
        await pilot.press("Z")
        assert app.workspace.draft.text == "# 1z?Z" + TEXT
        await stage.until(pilot, lambda: editor.text == "# 1z?Z" + TEXT)
        await pilot.press("enter", "x", "ctrl+z")
        assert editor.text == "# 1z?Z" + TEXT

    stage.play(story)


def test_two_bursts_are_two_edits(recipe):
    async def story(pilot):
        app = pilot.app
        await opened(pilot, recipe)
        for letter in "#x":
            await pilot.press(letter)
            await stage.until(pilot, lambda letter=letter: letter in app.workspace.draft.text.partition("recipe")[0])
        await pilot.press("escape", "z")
        assert app.workspace.draft.text == "#" + TEXT

    stage.play(story)


def test_another_screens_edit_keeps_cursor_and_comments(recipe):
    async def story(pilot):
        app = pilot.app
        editor = await opened(pilot, recipe)
        editor.move_cursor((9, 3))
        draft = app.workspace.draft
        app.edit(replace(app.workspace, draft=replace(draft, text=TEXT.replace("GRAD_V", "GRAD_A"))))
        await stage.sees(pilot, "GRAD_A", "(not saved)", "# by hand")
        assert editor.cursor_location == (9, 3)
        assert len(app.history.past) == 2  # nothing but the opening and this

    stage.play(story)


def test_windows_line_ends_are_no_edit(recipe):
    text = TEXT.replace("\n", "\r\n")
    recipe.write_bytes(text.encode())

    async def story(pilot):
        await opened(pilot, recipe)
        await pilot.press("escape", "ctrl+s")
        assert "(not saved)" not in stage.status(pilot.app)
        await pilot.press("enter", "#")
        await pilot.press("ctrl+s")
        await stage.until(pilot, lambda: "mix.toml is saved" in stage.told(pilot.app))

    stage.play(story)
    assert recipe.read_bytes() == b"#" + text.encode()


# --- the file ------------------------------------------------------------------------------------------------


def test_a_new_recipe_is_saved_under_a_name(recipe, tmp_path):
    async def story(pilot):
        app = pilot.app
        await stage.sees(pilot, "Library")
        await pilot.press("4")
        await stage.sees(pilot, "No recipe yet")
        await pilot.press("ctrl+s")
        await stage.until(pilot, lambda: "nothing to save" in stage.told(app))
        app.edit(replace(app.workspace, draft=Draft(TEXT)))
        await stage.sees(pilot, "new recipe (not saved)")
        await pilot.press("ctrl+s")
        await stage.sees(pilot, "Save the recipe as")
        await pilot.press("enter")
        await stage.until(pilot, lambda: "recipe.toml is saved" in stage.told(app))
        assert (recipe.parent / "recipe.toml").read_text() == TEXT
        await pilot.press("escape", "z", "Z")  # undo forgets no saving
        assert app.workspace.draft.is_saved

    stage.play(story)


def test_a_draft_that_is_saved_elsewhere_names_the_same_models(recipe, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    async def story(pilot):
        app = pilot.app
        app.edit(replace(app.workspace, draft=Draft(TEXT)))
        app.edit(replace(app.workspace, draft=Draft(TEXT.replace("GRAD_V", "GRAD_A"))))
        await pilot.press("4")
        await stage.sees(pilot, "new recipe (not saved)")
        await pilot.press("ctrl+s")
        await stage.sees(pilot, "Save the recipe as")
        pilot.app.screen.query_one("Input").value = str(elsewhere / "r.toml")
        await pilot.press("enter")
        await stage.until(pilot, lambda: app.workspace.draft.is_saved, "the saving")
        await stage.sees(pilot, str(recipe.parent)[:20])
        await pilot.press("escape", "z")  # undo leads to a text of the same folder
        assert app.workspace.draft.text == moved.replace("GRAD_A", "GRAD_V")
        assert not app.workspace.draft.is_saved

    moved = TEXT.replace("GRAD_V", "GRAD_A")
    for name in "ab":
        moved = moved.replace(f'"{name}.safetensors"', f'"{recipe.parent / name}.safetensors"')
    stage.play(story)
    assert (elsewhere / "r.toml").read_text() == moved
    assert mk.plan(mk.load(elsewhere / "r.toml")).outputs


def test_saving_asks_before_it_replaces_another_programs_text(recipe):
    async def story(pilot):
        app = pilot.app
        await opened(pilot, recipe)
        await pilot.press("#")
        await stage.sees(pilot, "(not saved)")
        recipe.write_text(TEXT + "# theirs\n")
        await pilot.press("ctrl+s")
        await stage.sees(pilot, "was changed by another program", "Reload", "Keep mine")
        assert recipe.read_text() == TEXT + "# theirs\n"
        await pilot.press("down", "enter")
        await stage.until(pilot, lambda: recipe.read_text() == "#" + TEXT, "mine")
        await pilot.press("escape", "z")
        assert app.workspace.draft.text == TEXT + "# theirs\n"  # nothing is lost
        await pilot.press("Z")
        assert app.workspace.draft.is_saved

    stage.play(story)


def test_reloading_keeps_what_was_typed_for_undo(recipe):
    async def story(pilot):
        app = pilot.app
        await opened(pilot, recipe)
        await pilot.press("#")
        await stage.sees(pilot, "(not saved)")
        recipe.write_text(TEXT + "# theirs\n")
        await pilot.press("ctrl+s")
        await stage.sees(pilot, "Reload")
        await pilot.press("enter")
        await stage.until(pilot, lambda: app.workspace.draft.text == TEXT + "# theirs\n")
        assert app.workspace.draft.is_saved
        await pilot.press("escape", "z")
        assert app.workspace.draft.text == "#" + TEXT
        assert not app.workspace.draft.is_saved

    stage.play(story)
    assert recipe.read_text() == TEXT + "# theirs\n"


def test_a_recipe_broken_outside_is_shown_with_its_place(recipe):
    async def story(pilot):
        app = pilot.app
        await opened(pilot, recipe)
        recipe.write_text(TEXT.replace("[models]", "[models"))
        await stage.sees(pilot, "[models", "line 3, column", "a problem")
        await stage.until(pilot, lambda: "Another program changed" in stage.told(app))
        await pilot.press("escape", "z")
        assert app.workspace.draft.text == TEXT
        await pilot.pause(1.5)  # what was undone is not read again
        assert app.workspace.draft.text == TEXT

    stage.play(story)


def test_what_is_typed_outlives_a_change_outside(recipe):
    async def story(pilot):
        app = pilot.app
        await opened(pilot, recipe)
        await pilot.press("down", *"# mine")
        recipe.write_bytes(b"\xff\xfe broken")
        await stage.sees(pilot, "not UTF-8")
        mine = TEXT.replace("# by", "# mine# by")
        assert app.workspace.draft.text == mine
        await pilot.press("ctrl+s")
        await stage.sees(pilot, "Keep mine")
        assert "Reload" not in stage.shown(app)
        await pilot.press("enter")
        await stage.until(pilot, lambda: recipe.read_bytes() == mine.encode())

    stage.play(story)


def test_a_recipe_is_opened_by_its_path(recipe, tmp_path):
    (recipe.parent / "other [b].toml").write_text("recipe = 1\n# other\n")

    async def story(pilot):
        app = pilot.app
        await opened(pilot, recipe)
        await pilot.press("#", "ctrl+o")
        await stage.sees(pilot, "Open a recipe", "mix.toml, other [b].toml")
        await pilot.press(*"none", "enter")
        await stage.sees(pilot, "no such file")
        await pilot.press(*["backspace"] * 4, *"oth", "right", "enter")
        await stage.sees(pilot, "# other")
        assert app.workspace.draft.path.name == "other [b].toml"
        await stage.until(pilot, lambda: "was not saved" in stage.told(app))
        await pilot.press("escape", "z")
        assert (app.workspace.draft.path, app.workspace.draft.text) == (recipe, "#" + TEXT)

    stage.play(story)


def test_what_cannot_be_opened_is_told(tmp_path):
    async def story(pilot):
        pilot.app.open_recipe(tmp_path / "none.toml")
        await stage.until(pilot, lambda: "There is no such recipe" in stage.told(pilot.app))
        assert pilot.app.current_mode == "library"

    stage.play(story)


def test_leaving_asks_where_the_recipe_is_not_saved(recipe):
    async def story(pilot):
        await opened(pilot, recipe)
        await pilot.press("#", "escape", "ctrl+q")
        await stage.sees(pilot, "The recipe is not saved.", "Leave")
        await pilot.press("escape")
        await stage.sees(pilot, "[Recipe]")

    stage.play(story)


# --- plan and run -----------------------------------------------------------------------------------------------


def test_a_plan_says_what_plan_says(recipe):
    told = CliRunner().invoke(cli, ["plan", str(recipe)], standalone_mode=False).output

    async def story(pilot):
        app = pilot.app
        await opened(pilot, recipe)
        await pilot.press("f5")
        await stage.until(pilot, lambda: "reads" in stage.status(app), "the plan")
        await pilot.pause(0.2)
        plan = stage.shown(app)
        words = set(told.replace("✓", "").split())
        missing = [word for word in words if word not in plan and word not in "─" * 200 and word not in plan.split()]
        headings = ("model", "kind", "size", "path")
        assert [word for word in missing if word not in headings and not word.startswith("/")] == []
        await pilot.press("#")
        await stage.sees(pilot, "Of an earlier text")

    stage.play(story, (140, 60))


def test_a_plan_that_cannot_be_made_says_why(recipe):
    (recipe.parent / "b.safetensors").unlink()

    async def story(pilot):
        await opened(pilot, recipe)
        await pilot.press("f5")
        await stage.sees(pilot, "line 5, column 1 at models.b: There is no such file.", "b.safetensors")
        await stage.sees(pilot, 'did you mean "a.safetensors"?', "a problem")
        assert underlined(pilot.app) == ['b = "b.safetensors"']
        await pilot.pause(0.6)
        assert "no such file" in problem(pilot.app)  # a text that is sound by itself changes nothing of that

    stage.play(story)


def test_a_run_saves_and_asks_before_it_replaces(recipe):
    out = recipe.parent / "out.safetensors"
    out.write_bytes(b"an older one")

    async def story(pilot):
        app = pilot.app
        editor = await opened(pilot, recipe)
        editor.move_cursor((1, 0))
        await pilot.press("#", "f6")
        await stage.sees(pilot, "is there already", "Yes, replace it")
        assert recipe.read_text() == TEXT.replace("# by", "## by")
        await pilot.press("enter")
        await stage.until(pilot, lambda: not app.screen.is_modal)
        assert app.jobs == ()
        assert out.read_bytes() == b"an older one"
        await pilot.press("f6")
        await stage.sees(pilot, "is there already")
        await pilot.press("down", "enter")
        await stage.sees(pilot, "[Jobs]", "run mix.toml")
        await stage.until(pilot, lambda: app.jobs[0].is_over, "the end of the job")
        assert app.jobs[0].state == "done", app.jobs
        assert app.jobs[0].arguments == ("run", str(recipe), "--force")

    stage.play(story)
    made = out.read_bytes()
    mk.run(recipe, force=True)
    assert out.read_bytes() == made


def test_what_cannot_run_is_no_job(recipe):
    (recipe.parent / "b.safetensors").unlink()

    async def story(pilot):
        app = pilot.app
        app.edit(replace(app.workspace, draft=Draft(TEXT, recipe, TEXT)))
        app.run_draft()  # as the Mix screen does
        await stage.sees(pilot, "[Recipe]", "There is no such file.")
        assert app.jobs == ()
        await pilot.press("escape", "1")
        app.plan_draft()
        await stage.sees(pilot, "[Recipe]", "There is no such file.")

    stage.play(story)


# --- the file, alone ------------------------------------------------------------------------------------------------


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "r.toml"
    write_recipe(path, "one", "")
    path.chmod(0o640)
    link = tmp_path / "link.toml"
    link.symlink_to(path)
    write_recipe(link, "two", "one")
    assert link.is_symlink()
    assert (path.read_text(), path.stat().st_mode & 0o777) == ("two", 0o640)
    with pytest.raises(ChangedOutside) as told:
        write_recipe(path, "three", "one")
    assert told.value.found == "two"

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(recipe_file.os, "fsync", full)
    with pytest.raises(NotWritable, match="No space left"):
        write_recipe(path, "three", "two")
    assert path.read_text() == "two"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.toml", "r.toml"]


def test_a_folder_that_is_gone_is_told(tmp_path):
    with pytest.raises(NotWritable):
        write_recipe(tmp_path / "none" / "r.toml", "x", "")


def test_amending_changes_every_step():
    history = History(1).edited(2).edited(3).undone().amended(lambda value: value * 10)
    assert (history.now, history.past, history.future) == (20, (10,), (30,))


# --- what the screen looks like -----------------------------------------------------------------------------------


@pytest.fixture
def at_one_place(recipe, monkeypatch):
    """Paths as if the recipe lay always at one place."""
    as_json = mk.plan_as_json
    here = str(recipe.parent)

    def moved(plan):
        told = as_json(plan)
        for each in (*told["inputs"], *told["outputs"]):
            each["path"] = each["path"].replace(here, "/models")
        return told

    monkeypatch.setattr(mk, "plan_as_json", moved, raising=False)
    return recipe


@pytest.mark.parametrize("size", [(80, 24), (120, 40)])
def test_the_screen(at_one_place, size):
    async def story(pilot):
        await opened(pilot, at_one_place)
        await pilot.press("f5")
        await stage.until(pilot, lambda: "reads" in stage.status(pilot.app), "the plan")
        await pilot.pause(0.3)
        await stage.looks(pilot, f"recipe-{size[0]}x{size[1]}")

    stage.play(story, size)


@pytest.mark.parametrize("size", [(80, 24), (120, 40)])
def test_the_screen_with_a_problem(at_one_place, size):
    at_one_place.write_text(TEXT.replace("weighted_sum", "weighted_sun"))

    async def story(pilot):
        pilot.app.open_recipe(at_one_place)
        await stage.sees(pilot, "did you mean", "a problem", "Write")
        await pilot.pause(0.3)
        await stage.looks(pilot, f"recipe-problem-{size[0]}x{size[1]}")

    stage.play(story, size)


@pytest.mark.parametrize("size", [(20, 5), (1, 1)])
def test_small_terminals(recipe, size):
    async def story(pilot):
        pilot.app.open_recipe(recipe)
        await stage.until(pilot, lambda: pilot.app.screen.query(Editor))
        await pilot.press("f5", "x")
        await pilot.pause(0.5)

    stage.play(story, size)


# --- the command line -----------------------------------------------------------------------------------------------


def test_the_ui_starts_with_a_recipe_a_folder_or_a_model(recipe):
    async def with_recipe(pilot):
        await stage.sees(pilot, "[Recipe]", SOUND)

    async def with_folder(pilot):
        await stage.sees(pilot, "[Library]", "a.safetensors", "b.safetensors")

    async def with_model(pilot):
        await stage.sees(pilot, "[Inspector]", "UNet")

    stage.play(with_folder, (100, 30), Workbench(recipe.parent))
    stage.play(with_recipe, (100, 30), Workbench(recipe))
    stage.play(with_model, (100, 30), Workbench(recipe.parent / "a.safetensors"))


def test_the_command_takes_a_path_that_is_there(recipe, monkeypatch):
    import mergekit_sd_tui.__main__ as entry

    started = []
    monkeypatch.setattr(entry.Workbench, "run", lambda self: started.append(self._start))
    CliRunner().invoke(cli, ["tui", str(recipe)], standalone_mode=False)
    assert started == [recipe]
    refused = CliRunner().invoke(cli, ["tui", str(recipe) + "x"])
    assert refused.exit_code == 2


def test_a_recipes_text_is_read_as_it_stands(tmp_path):
    path = tmp_path / "r.toml"
    path.write_bytes(b"recipe = 1\r\n# \xc3\xa9\r\n")
    assert mk.read_recipe_text(path) == "recipe = 1\r\n# é\r\n"
    path.write_bytes(b"recipe = 1\n# \xff")
    with pytest.raises(MergekitError) as told:
        mk.read_recipe_text(Path(path))
    assert (told.value.line, told.value.column) == (2, 3)
