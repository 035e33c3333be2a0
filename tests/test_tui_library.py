"""The library's screen: what it finds, shows, filters, sorts, marks and hashes, told as stories."""

from __future__ import annotations

from pathlib import Path

import pytest
import tui_stage as stage
from PIL import Image

import mergekit_sd as mk
from mergekit_sd_tui import rows
from mergekit_sd_tui.messages import EntriesFound
from mergekit_sd_tui.model_table import ModelTable


@pytest.fixture
def models(tmp_path):
    """A folder of three models and a broken one, scanned."""
    folder = tmp_path / "models"
    stage.small_file(folder / "apple.safetensors", 1, {"modelspec.title": "[/b] Apple"})
    stage.small_file(folder / "pear.safetensors", 2)
    stage.small_file(folder / "plum.vae.safetensors", 3, only="vae")
    (folder / "broken.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0nothing at all!!")
    stage.scanned(folder)
    return folder


def names(app):
    """The names in the table, from top to bottom."""
    table = app.screen.query_one(ModelTable)
    return [table.get_cell_at((row, 1)).plain.split(".")[0] for row in range(table.row_count)]


def test_models_are_listed_with_what_they_are(models):
    async def story(pilot):
        await stage.library(pilot, "apple.safetensors", "checkpoint", "sd1", "plum.vae", "4 models")
        text = stage.shown(pilot.app)
        row = next(line for line in text.splitlines() if line.startswith("    apple"))
        assert "KiB" in row
        assert "[/b] Apple" in text
        # The row of what cannot be read says why.
        assert "The header does not begin with" in text

    stage.play(story, (120, 30))


def test_an_empty_library_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    stage.small_file(tmp_path / "models" / "late.safetensors")
    mk.add_root("mine", tmp_path / "models")

    async def story(pilot):
        await stage.library(pilot, "These folders of models were found", "root mine", "Press r to scan")
        await pilot.press("r")
        await stage.library(pilot, "late.safetensors", "1 model: 1 new")

    stage.play(story, (100, 24))


def test_without_any_folder_the_command_line_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(mk, "model_folders", list, raising=False)

    async def story(pilot):
        await stage.library(pilot, "No folders of models were found", "mergekit-sd roots add NAME DIR")

    stage.play(story)


def test_a_filter_narrows_and_esc_brings_all_back(models):
    async def story(pilot):
        await stage.library(pilot, "apple")
        await pilot.press("slash", *"pl", "enter")
        await stage.until(pilot, lambda: names(pilot.app) == ["apple", "plum"])
        assert "2 of 4 models" in stage.status(pilot.app)
        await pilot.press("slash", *"um sd2", "enter")
        await stage.until(pilot, lambda: names(pilot.app) == [])
        await pilot.press("escape")
        await stage.until(pilot, lambda: names(pilot.app) == ["apple", "broken", "pear", "plum"])

    stage.play(story)


def test_letters_of_a_filter_are_no_keys(models):
    async def story(pilot):
        await stage.library(pilot, "apple")
        await pilot.press("slash", "1", "2", "s", "z", "x", "question_mark")
        assert pilot.app.screen.query_one("#filter").value == "12szx?"
        assert pilot.app.current_mode == "library"

    stage.play(story)


def test_s_sorts_by_the_next_column_and_a_header_by_its_own(models):
    async def story(pilot):
        await stage.library(pilot, "apple")
        await pilot.press("s", "s", "s")
        await stage.until(pilot, lambda: names(pilot.app) == ["apple", "pear", "plum", "broken"], "by size")
        assert "Sorted by size" in stage.status(pilot.app)
        table = pilot.app.screen.query_one(ModelTable)
        await pilot.click(table, offset=(8, 0))
        await stage.until(pilot, lambda: names(pilot.app) == ["apple", "broken", "pear", "plum"], "by name")

    stage.play(story)


def test_the_cursor_stays_on_its_model(models):
    async def story(pilot):
        await stage.library(pilot, "apple")
        await pilot.press("end")
        table = pilot.app.screen.query_one(ModelTable)
        assert table.under_cursor.path.name == "plum.vae.safetensors"
        await pilot.press("s", "s")
        await pilot.pause()
        assert table.under_cursor.path.name == "plum.vae.safetensors"
        await pilot.press("slash", *"plum", "enter")
        await stage.until(pilot, lambda: names(pilot.app) == ["plum"])
        await pilot.press("escape")
        await stage.until(pilot, lambda: len(names(pilot.app)) == 4)
        assert table.under_cursor.path.name == "plum.vae.safetensors"

    stage.play(story)


def test_marks_are_undone_and_redone(models):
    async def story(pilot):
        await stage.library(pilot, "apple")
        marks = lambda: [path.stem for path in pilot.app.workspace.marked]  # noqa: E731
        await pilot.press("space", "down", "space")  # apple, past what cannot be read, pear
        assert marks() == ["apple", "pear"]
        await stage.sees(pilot, " *  apple", " *  pear")
        await pilot.press("z")
        assert marks() == ["apple"]
        await stage.until(pilot, lambda: " *  pear" not in stage.shown(pilot.app))
        await pilot.press("z", "z", "Z", "Z")
        assert marks() == ["apple", "pear"]
        await pilot.press("Z")
        assert "Nothing to redo" in stage.told(pilot.app)

    stage.play(story)


def test_what_cannot_be_read_is_neither_marked_nor_inspected(models):
    async def story(pilot):
        await stage.library(pilot, "broken")
        await pilot.press("down", "space", "enter")
        assert pilot.app.workspace.marked == ()
        assert pilot.app.current_mode == "library"
        assert "does not begin with" in stage.told(pilot.app)

    stage.play(story)


def test_hashes_come_into_the_row(models):
    async def story(pilot):
        await stage.library(pilot, "apple")
        await pilot.press("h")
        await stage.library(pilot, "1 model hashed")
        table = pilot.app.screen.query_one(ModelTable)
        expected = mk.look_up(models / "apple.safetensors").hashes["sha256"][:10]
        assert table.get_cell(str(models / "apple.safetensors"), "hash").plain == expected

    stage.play(story)


def test_what_is_there_twice_is_grouped(models):
    (models / "copy.safetensors").write_bytes((models / "apple.safetensors").read_bytes())

    async def story(pilot):
        await stage.library(pilot, "copy.safetensors")
        await pilot.press("H")
        await stage.library(pilot)
        await stage.until(pilot, lambda: "nothing new" in stage.status(pilot.app), "the hashes")
        await pilot.press("u")
        await stage.sees(pilot, "2 equal files")
        assert names(pilot.app)[1:3] == ["apple", "copy"]
        await pilot.press("enter")
        assert "no model under the cursor" in stage.told(pilot.app)
        await pilot.press("escape")
        await stage.until(pilot, lambda: len(names(pilot.app)) == 5)

    stage.play(story)


def test_a_file_that_is_gone_leaves_the_list(models):
    (models / "pear.safetensors").unlink()

    async def story(pilot):
        await stage.library(pilot, "apple")
        await stage.until(pilot, lambda: names(pilot.app) == ["apple", "broken", "plum"])

    stage.play(story)


def test_a_worker_that_raises_is_told_and_the_app_answers(models, monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))

    def fails(*_args, **_options):
        raise ValueError("[/x] a bug")

    monkeypatch.setattr(mk, "scan_library", fails, raising=False)

    async def story(pilot):
        await stage.library(pilot, "apple")
        await stage.until(pilot, lambda: "This is a bug" in stage.told(pilot.app))
        assert "ValueError: [/x] a bug" in stage.told(pilot.app)
        assert "The scan failed" in stage.status(pilot.app)
        await pilot.press("down", "down", "space")
        assert [path.stem for path in pilot.app.workspace.marked] == ["pear"]

    stage.play(story)


def test_a_scan_is_stopped_when_it_says_so(models, monkeypatch):
    def endless(*_args, on_event, cancel, **_options):
        import time

        while not cancel.cancelled:
            time.sleep(0.01)
        time.sleep(0.3)
        raise mk_cancelled()

    def mk_cancelled():
        from mergekit_sd.errors import Cancelled

        return Cancelled()

    monkeypatch.setattr(mk, "scan_library", endless, raising=False)

    async def story(pilot):
        await stage.sees(pilot, "Scanning")
        await pilot.press("r")
        assert "The scan is under way: ^x stops it" in stage.told(pilot.app)
        await pilot.press("ctrl+x")
        assert "stopping" in stage.status(pilot.app)
        assert pilot.app.screen.busy
        await stage.library(pilot, "The scan was stopped")

    stage.play(story)


def test_leaving_stops_a_scan(models, monkeypatch):
    seen = []

    def endless(*_args, on_event, cancel, **_options):
        import time

        while not cancel.cancelled:
            time.sleep(0.01)
        seen.append("cancelled")

    monkeypatch.setattr(mk, "scan_library", endless, raising=False)

    async def story(pilot):
        await stage.sees(pilot, "Scanning")
        await pilot.press("ctrl+q")

    stage.play(story)
    assert seen == ["cancelled"]


def test_an_entry_that_comes_again_renews_its_row(models):
    async def story(pilot):
        await stage.library(pilot, "apple")
        entry = mk.look_up(models / "apple.safetensors")
        from dataclasses import replace

        pilot.app.screen.post_message(EntriesFound((replace(entry, hashes={"sha256": "f" * 64}),)))
        table = pilot.app.screen.query_one(ModelTable)
        await stage.until(pilot, lambda: table.get_cell(str(entry.path), "hash").plain == "f" * 10)
        assert len(names(pilot.app)) == 4

    stage.play(story)


def test_every_column_orders_every_entry(models):
    entries = mk.list_library()
    for column in rows.COLUMNS:
        assert len(sorted(entries, key=column.order)) == len(entries)


# --- what is done with models ----------------------------------------------------------------------------


@pytest.fixture
def submitted(monkeypatch):
    """What is given to the queue of jobs, which does not run it."""
    from mergekit_sd_tui.app import Workbench

    every = []
    monkeypatch.setattr(Workbench, "submit", lambda _self, title, arguments: every.append((title, list(arguments))))
    return every


def test_the_marked_are_merged(models):
    async def story(pilot):
        await stage.library(pilot, "apple")
        await pilot.press("space", "down", "space", "m")
        await stage.until(pilot, lambda: pilot.app.workspace.draft.text)
        recipe = mk.parse_recipe(pilot.app.workspace.draft.text, models, None)
        assert [Path(each.file).name for each in recipe.models.values()] == ["apple.safetensors", "pear.safetensors"]

    stage.play(story)


def test_two_marked_are_compared(models):
    async def story(pilot):
        await stage.library(pilot, "apple")
        for key in ("d", "x"):
            await pilot.press(key)
            await stage.until(pilot, lambda: "space on each: 0 marked now." in stage.told(pilot.app))
            pilot.app.clear_notifications()
        await pilot.press("space", "down", "space", "d")
        await stage.sees(pilot, "7 [Diff]", "A apple.safetensors  B pear.safetensors", "All weights:")

    stage.play(story)


def test_a_lora_of_two_marked(models, submitted):
    async def story(pilot):
        await stage.library(pilot, "apple")
        await pilot.press("space", "down", "space", "x")
        await stage.sees(pilot, "A LoRA of what pear.safetensors has over apple.safetensors", "pear-lora.safetensors")
        await pilot.press("ctrl+r")
        await stage.sees(pilot, "A LoRA of what apple.safetensors has over pear.safetensors", "apple-lora.safetensors")
        for rank in ("0", "x", ""):
            pilot.app.screen.query_one("#rank").value = rank
            await pilot.press("enter")
            await stage.sees(pilot, "The rank must be a whole number from 1 on.")
        pilot.app.screen.query_one("#path").value = str(models / "pear.safetensors")
        pilot.app.screen.query_one("#rank").value = "4"
        await pilot.press("enter")
        await stage.sees(pilot, "pear.safetensors exists already")
        pilot.app.screen.query_one("#path").value = str(models / "out.safetensors")
        await pilot.press("enter")
        await stage.until(pilot, lambda: submitted)
        await pilot.press("x", "escape")

    stage.play(story)
    ((title, arguments),) = submitted
    assert title == "LoRA of apple.safetensors"
    assert main_of(arguments) == 0
    found = mk.inspect_file(models / "out.safetensors")
    assert found.kind == "lora"
    assert arguments[2:4] == [str(models / "apple.safetensors"), str(models / "pear.safetensors")]


def test_a_model_is_pruned_as_a_job(models, submitted):
    async def story(pilot):
        await stage.library(pilot, "apple")
        await pilot.press("p")
        await stage.sees(pilot, "Leave EMA and junk out", "apple-pruned.safetensors")
        await pilot.press("enter")
        await stage.until(pilot, lambda: submitted)
        await pilot.press("down", "down", "up", "up")

    stage.play(story)
    ((title, arguments),) = submitted
    assert title == "Prune apple.safetensors"
    assert main_of(arguments) == 0
    assert mk.inspect_file(models / "apple-pruned.safetensors").kind == "checkpoint"


def main_of(arguments):
    """What the command line ends with, given these arguments and what the queue adds."""
    from mergekit_sd.cli.main import run

    return run([*arguments, "--json"])


def test_what_cannot_be_read_is_not_pruned(models, submitted):
    async def story(pilot):
        await stage.library(pilot, "apple")
        await pilot.press("down")
        await stage.until(pilot, lambda: "broken" in str(pilot.app.screen.query_one("#details").render()))
        await pilot.press("p")
        assert "There is nothing to prune" in stage.told(pilot.app)

    stage.play(story)
    assert submitted == []


def test_the_preview_is_beside_the_details(models):
    Image.new("RGB", (30, 30), (10, 200, 30)).save(models / "apple.png")
    Image.new("RGB", (30, 30), (200, 10, 30)).save(models / "apple.preview.png")
    (models / "pear.preview.png").write_bytes(b"no picture")

    async def story(pilot):
        await stage.library(pilot, "apple")
        await stage.sees(pilot, "\u2580" * 10)
        strips = pilot.app.screen._compositor.render_strips()
        seen = {seg.style.color.triplet for strip in strips for seg in strip if "\u2580" in seg.text}
        assert {tuple(each) for each in seen} == {(200, 10, 30)}
        await pilot.press("down", "down")
        await stage.until(pilot, lambda: "\u2580" * 10 not in stage.shown(pilot.app))
        await stage.sees(pilot, "pear.preview.png")
        assert "\u2580" * 10 not in stage.shown(pilot.app)

    stage.play(story, (120, 40))
