"""The gallery: pictures as cells, the grid, two in one place, favourites, the report; told as stories."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
import termios
import threading
from pathlib import Path

import numpy as np
import pytest
import sampling_reports
import tui_stage as stage
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from textual.widgets import Input

import mergekit_sd as mk
from mergekit_sd.sampling.values import Check, Picture, Settings
from mergekit_sd_tui import pictures as drawing
from mergekit_sd_tui.favourites import favourites_file, load_favourites, save_favourites
from mergekit_sd_tui.jobs import Job
from mergekit_sd_tui.messages import JobEnded
from mergekit_sd_tui.picture_grid import PictureGrid, Places, fit
from mergekit_sd_tui.pictures import PictureView
from mergekit_sd_tui.screens import gallery

COLOURS = {"base": (200, 30, 30), "night": (30, 30, 200), "mix": (0, 0, 0)}


@pytest.fixture
def drawn(tmp_path):
    """A folder of three models by two seeds, each model of a colour; the mix is all black."""
    settings = Settings("a [b]red\x1b[31m circle", seeds=(0, 7))
    pictures = tuple(
        Picture(model, settings, seed, np.full((16, 16, 3), colour, np.uint8))
        for model, colour in COLOURS.items()
        for seed in settings.seeds
    )
    checks = (
        Check("blank", "sound", "failed", "mix", "Two pictures are all black."),
        Check("contrast", "looks", "ok", "base", "As it should be."),
    )
    report = sampling_reports.report(models=tuple(COLOURS), pictures=pictures, checks=checks)
    mk.write_samples(report, tmp_path / "drawn")
    return tmp_path / "drawn"


async def shows(pilot, folder, *words):
    """Go to the gallery with a folder, and wait until its pictures are read."""
    pilot.app.show_pictures(folder)
    await stage.sees(pilot, "pictures of", *words)
    grid = pilot.app.screen.query_one(PictureGrid)
    found = mk.read_samples(folder).pictures
    await stage.until(pilot, lambda: all(grid.shot_of(each.path) for each in found), "all pictures")
    await pilot.pause(0.05)


def colours(app):
    """The colours of letters on the screen."""
    strips = app.screen._compositor.render_strips()
    return {
        tuple(segment.style.color.triplet)
        for strip in strips
        for segment in strip
        if segment.style and segment.style.color and drawing.UPPER in segment.text
    }


def about(app):
    """The three lines under the pictures."""
    return str(app.screen.query_one("#about").render())


# --- cells ----------------------------------------------------------------------------------------------


def test_a_cell_is_two_pixels():
    pixels = np.arange(24, dtype=np.uint8).reshape(4, 2, 3)
    rows = drawing.half_cells(Image.fromarray(pixels), 2, 2)
    seen = [[(tuple(cell.style.color.triplet), tuple(cell.style.bgcolor.triplet)) for cell in row] for row in rows]
    assert seen == [[(tuple(pixels[2 * y, x]), tuple(pixels[2 * y + 1, x])) for x in range(2)] for y in range(2)]


@pytest.mark.parametrize(("dark", "words"), [(True, " =@"), (False, "@+ ")])
def test_shades_go_by_brightness(dark, words):
    picture = Image.fromarray(np.array([[0, 120, 255]], np.uint8))
    assert [[cell.text for cell in row] for row in drawing.shades(picture, 3, 1, dark=dark)] == [[words]]


@given(st.integers(1, 2000), st.integers(1, 2000), st.integers(1, 300), st.integers(1, 100))
def test_a_picture_fits_its_room_and_keeps_its_shape(width, height, columns, lines):
    wide, high = drawing.fitted((width, height), columns, lines)
    assert 1 <= wide <= columns
    assert 1 <= high <= lines
    assert wide == columns or high == lines
    assert abs(wide * height - 2 * high * width) <= max(height, 2 * width)  # to half a cell, or one cell at least


@given(st.integers(1, 300), st.integers(1, 100), st.integers(0, 12), st.integers(0, 40))
def test_what_is_seen_fits_the_screen(width, height, across, down):
    room = fit(width, height, across, down)
    assert room.columns >= 1
    assert room.lines >= 1
    if width >= 4 and height >= 4:
        assert min(room.across, max(across, 1)) * (room.columns + 1) <= width
        assert min(room.down, max(down, 1)) * (room.lines + 1) <= height - 1


def test_alike_pictures_have_their_own_rows():
    every = [mk.SavedPicture(Path(f"{n}.png"), "base", 0, "p", "s") for n in range(3)]
    places = Places.of(every)
    assert [places.at[row, "base"] for row in places.rows] == every


@pytest.mark.parametrize(
    ("write", "problem"),
    [
        (lambda path: None, "the file is gone"),
        (lambda path: path.write_bytes(b"nothing"), "no picture"),
        (lambda path: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "no picture"),
        (lambda path: path.mkdir(), "cannot be read"),
        (lambda path: cut(path), "cannot be read"),
        (lambda path: huge(path), "too large: 9000 x 8000"),
    ],
)
def test_what_is_no_picture_is_told(tmp_path, write, problem):
    write(tmp_path / "a.png")
    shot = drawing.read_shot(tmp_path / "a.png")
    assert shot.picture is None
    assert problem in shot.problem


def cut(path):
    Image.fromarray(sampling_reports.pixels(0, 64, 64)).save(path)
    path.write_bytes(path.read_bytes()[:3000])


def huge(path):
    Image.new("1", (9000, 8000)).save(path)


# --- the grid -------------------------------------------------------------------------------------------


def test_models_by_seeds_in_their_colours(drawn):
    async def story(pilot):
        await shows(pilot, drawn, "6 [Gallery]", "base", "night", "mix", "[0]", "7")
        assert colours(pilot.app) == set(COLOURS.values())
        assert "6 pictures of 3 models; 2 checks, 1 not in order" in stage.status(pilot.app)
        assert "base, seed 0" in about(pilot.app)
        assert "a [b]red\\x1b[31m circle" in about(pilot.app)
        await pilot.press("right", "right", "down")
        assert "mix, seed 7" in about(pilot.app)
        assert "failed: blank: Two pictures are all black." in about(pilot.app)
        await pilot.press("right", "down", "down")
        assert "mix, seed 7" in about(pilot.app)
        await pilot.press("left", "up")
        assert "night, seed 0" in about(pilot.app)

    stage.play(story)


def test_enter_enlarges_and_arrows_go_on(drawn):
    async def story(pilot):
        await shows(pilot, drawn)
        await pilot.press("enter")
        await stage.until(pilot, lambda: colours(pilot.app) == {COLOURS["base"]})
        await pilot.press("right")
        await stage.until(pilot, lambda: colours(pilot.app) == {COLOURS["night"]})
        await pilot.press("escape")
        await stage.until(pilot, lambda: colours(pilot.app) == set(COLOURS.values()))
        grid = pilot.app.screen.query_one(PictureGrid)
        await pilot.click(grid, offset=(40, 4))
        assert "mix, seed 0" in about(pilot.app)
        await pilot.click(grid, offset=(40, 4))
        await stage.until(pilot, lambda: colours(pilot.app) == {COLOURS["mix"]})

    stage.play(story)


def test_two_are_compared_in_one_place(drawn, monkeypatch):
    monkeypatch.setattr(gallery, "FLICKER", 0.05)

    async def story(pilot):
        await shows(pilot, drawn)
        await pilot.press("c")
        assert "Choose two pictures: space on each." in stage.told(pilot.app)
        await pilot.press("space", "right", "space")
        await stage.sees(pilot, "0 A", "[0 B]")
        await pilot.press("c")
        await stage.until(pilot, lambda: colours(pilot.app) == {COLOURS["base"]})
        assert stage.status(pilot.app) == "A: base, seed 0"
        await pilot.press("c")
        await stage.until(pilot, lambda: colours(pilot.app) == {COLOURS["night"]})
        await pilot.press("t")
        seen = []
        await stage.until(pilot, lambda: seen.append(frozenset(colours(pilot.app))) or len(set(seen)) == 2, "both")
        assert "in turn" in stage.status(pilot.app)
        await pilot.press("t")
        still = stage.status(pilot.app)
        await pilot.pause(0.2)
        assert stage.status(pilot.app) == still
        await pilot.press("escape")
        await stage.sees(pilot, "0 A", "[0 B]")
        # A third one: the oldest goes.
        await pilot.press("right", "space")
        await stage.sees(pilot, "0 A", "[0 B]", "mix, seed 0 (B)")

    stage.play(story)


def test_leaving_the_screen_stops_the_flicker(drawn, monkeypatch):
    monkeypatch.setattr(gallery, "FLICKER", 0.05)

    async def story(pilot):
        await shows(pilot, drawn)
        await pilot.press("space", "right", "t")
        screen = pilot.app.screen
        assert screen._flicker is not None
        await pilot.press("1")
        await stage.until(pilot, lambda: screen._flicker is None)

    stage.play(story)


def test_favourites_outlive_a_folder_that_is_drawn_anew(drawn, tmp_path):
    shutil.copytree(drawn, tmp_path / "again")

    async def first(pilot):
        await shows(pilot, drawn)
        await pilot.press("right", "f")
        await stage.sees(pilot, "[0 *]", "night, seed 0 (*)")

    async def second(pilot):
        await shows(pilot, drawn, "0 *")
        await pilot.press("right", "f")
        await stage.sees(pilot, "[0]")

    stage.play(first)
    assert load_favourites(drawn) == {"night-seed-0.png"}
    shutil.rmtree(drawn)
    shutil.move(tmp_path / "again", drawn)
    stage.play(second)
    assert load_favourites(drawn) == frozenset()


def test_each_folder_has_its_own_favourites(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_favourites(tmp_path / "a", ["1.png", "0.png"])
    save_favourites(Path("b"), ["2.png"])
    assert load_favourites(Path("a")) == {"0.png", "1.png"}
    save_favourites(tmp_path / "a", [])
    assert json.loads(favourites_file().read_text()) == {str(tmp_path / "b"): ["2.png"]}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"DIR": 3}', '{"DIR": [1, {}]}', "\xff"])
def test_a_broken_file_of_favourites_is_none(tmp_path, text):
    favourites_file().parent.mkdir(parents=True, exist_ok=True)
    favourites_file().write_text(text.replace("DIR", str(tmp_path)), encoding="latin-1")
    assert load_favourites(tmp_path) == frozenset()


def test_favourites_that_cannot_be_kept_are_told(drawn):
    favourites_file().with_suffix(".new").mkdir(parents=True)

    async def story(pilot):
        await shows(pilot, drawn)
        await pilot.press("f")
        assert "Favourites cannot be kept" in stage.told(pilot.app)
        assert "(*)" not in about(pilot.app)

    stage.play(story)


@pytest.mark.parametrize(("opens", "words"), [(True, "The browser shows"), (False, "No browser opens here")])
def test_the_report_is_opened_or_its_path_told(drawn, monkeypatch, opens, words):
    asked = []
    monkeypatch.setattr(gallery.webbrowser, "open", lambda url: asked.append(url) or opens)

    async def story(pilot):
        await shows(pilot, drawn)
        await pilot.press("o")
        assert words in stage.told(pilot.app)
        assert str(drawn / "report.html") in stage.told(pilot.app)
        (drawn / "report.html").unlink()
        await pilot.press("o")
        assert "There is no report here." in stage.told(pilot.app)

    stage.play(story)
    assert asked == [(drawn / "report.html").as_uri()]


def test_broken_pictures_say_so_in_their_cells(drawn):
    (drawn / "base-seed-0.png").unlink()
    (drawn / "night-seed-7.png").write_bytes(b"no picture at all")

    async def story(pilot):
        await shows(pilot, drawn, "the file is", "no picture")
        await pilot.press("enter")
        await stage.sees(pilot, "the file is gone")

    stage.play(story)


# --- folders --------------------------------------------------------------------------------------------


def test_without_samples_it_says_what_to_do(tmp_path, drawn, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")

    async def story(pilot):
        await pilot.press("6")
        await stage.sees(
            pilot, "No samples were found.", "s on the Mix screen (3)", "g opens a folder", "No samples yet"
        )
        await pilot.press("enter", "space", "c", "t", "f", "o", "n", "left", "escape")
        await pilot.press("g")
        await stage.sees(pilot, "Show the samples in:")
        await pilot.press(*"nowhere", "enter")
        await stage.sees(pilot, "There is no folder nowhere.")
        pilot.app.screen.query_one(Input).value = str(drawn)
        await pilot.press("enter")
        await stage.sees(pilot, "6 pictures of 3 models")

    stage.play(story)


def test_folders_beside_the_models_are_found(tmp_path, drawn, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    model = stage.small_file(tmp_path / "a.safetensors")
    shutil.copytree(drawn, tmp_path / "again")

    async def story(pilot):
        pilot.app.current = model
        await pilot.press("6")
        await stage.sees(pilot, "1 of 2: again  in", "6 pictures")
        await pilot.press("n")
        await stage.sees(pilot, "2 of 2: drawn  in", "6 pictures")
        await pilot.press("g")
        await stage.sees(pilot, "Tab goes to those found.")
        await pilot.press("tab", "enter")
        await stage.sees(pilot, "1 of 2: again  in", "6 pictures")

    stage.play(story)


def test_pictures_of_a_job_are_one_key_away(drawn):
    job = Job(1, "run r.toml", ("run", "r.toml"), "done", report={"samples": {"folder": str(drawn)}})

    async def story(pilot):
        pilot.app.post_message(JobEnded(job))
        await stage.until(pilot, lambda: "6 shows its pictures" in stage.told(pilot.app))
        await pilot.press("6")
        await stage.sees(pilot, "[Gallery]", "drawn  in", "6 pictures")

    stage.play(story)


def test_a_report_that_is_none_is_told(tmp_path):
    (tmp_path / "report.json").write_text("{}")

    async def story(pilot):
        pilot.app.show_pictures(tmp_path)
        await stage.until(pilot, lambda: "This is no report of samples." in stage.told(pilot.app))

    stage.play(story)


# --- terminals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("LC_ALL", "C"), ("TERM", "dumb")])
def test_without_colours_pictures_are_shades(drawn, monkeypatch, name, value):
    monkeypatch.setenv(name, value)

    async def story(pilot):
        await shows(pilot, drawn)
        await pilot.press("enter")
        await stage.sees(pilot, "--------")  # red is rather dark
        assert drawing.UPPER not in stage.shown(pilot.app)

    stage.play(story)


@pytest.mark.parametrize("size", [(20, 5), (1, 1)])
def test_a_tiny_terminal(drawn, size):
    async def story(pilot):
        pilot.app.show_pictures(drawn)
        await stage.until(pilot, lambda: pilot.app.screen.query(PictureGrid))
        await stage.until(pilot, lambda: "pictures of" in stage.status(pilot.app))
        for key in ("right", "down", "enter", "left", "escape", "space", "left", "c", "t", "escape"):
            await pilot.press(key)
        await pilot.resize_terminal(80, 24)
        await stage.sees(pilot, "base", "night", "mix")

    stage.play(story, size)


TERMINAL = """
import sys
from mergekit_sd_tui import pictures
pictures.ask_terminal()
print("GRAPHICS", getattr(pictures.graphics(), "__module__", None))
"""


@pytest.mark.parametrize(
    ("answer", "environment", "found"),
    [
        (b"\x1b[?62;4;22c", {}, "textual_image.widget.sixel"),
        (b"\x1b[?62;22c", {}, "None"),
        (b"", {}, "None"),
        (b"\x1b[?62;4;22c", {"NO_COLOR": "1"}, "None"),
        (b"\x1b[?62;4;22c", {"TERM": "dumb"}, "None"),
        (b"\x1b[?62;4;22c", {"TEXTUAL_DRIVER": "textual.drivers.web_driver:WebDriver"}, "None"),
    ],
)
def test_the_terminal_is_asked_for_graphics(answer, environment, found):
    """On a terminal of our own, which says what it can do, or nothing at all."""
    near, far = pty.openpty()
    termios.tcsetwinsize(far, (24, 80))
    keep = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "TERM", "TEXTUAL_DRIVER")}
    child = subprocess.Popen(
        [sys.executable, "-c", TERMINAL],
        stdin=far,
        stdout=far,
        stderr=subprocess.DEVNULL,
        env={**keep, "TERM": "xterm-256color", **environment},
    )
    os.close(far)
    said = b""

    def talk():
        nonlocal said
        told = False
        while True:
            try:
                more = os.read(near, 4096)
            except OSError:
                return
            said += more
            if answer and not told and b"\x1b[c" in said:
                told = True
                os.write(near, answer)

    thread = threading.Thread(target=talk)
    thread.start()
    assert child.wait(60) == 0
    thread.join(10)
    os.close(near)
    assert f"GRAPHICS {found}" in said.decode(errors="replace")


def test_nothing_is_asked_where_there_is_no_terminal():
    done = subprocess.run([sys.executable, "-c", TERMINAL], capture_output=True, text=True, check=True, input="")
    assert done.stdout.strip() == "GRAPHICS None"


def test_pixels_are_drawn_where_the_terminal_can(drawn, monkeypatch):
    from textual_image.widget import SixelImage

    monkeypatch.setattr(drawing, "_GRAPHICS", [SixelImage])

    async def story(pilot):
        await shows(pilot, drawn)
        assert not pilot.app.screen.query(".pixels")
        await pilot.press("enter")
        await stage.until(pilot, lambda: pilot.app.screen.query(SixelImage))
        await stage.until(pilot, lambda: any("\x1bP" in strip.text for strip in strips(pilot.app)), "Sixel")
        assert pilot.app.screen.query_one(SixelImage).image == drawn / "base-seed-0.png"
        assert not pilot.app.screen.query_one(PictureView).display
        await pilot.press("right")
        assert pilot.app.screen.query_one(SixelImage).image == drawn / "night-seed-0.png"
        await pilot.press("escape")
        await stage.until(pilot, lambda: not pilot.app.screen.query(".pixels"))

    stage.play(story)


def strips(app):
    return app.screen._compositor.render_strips()


@pytest.mark.parametrize("size", [(80, 24), (120, 40)])
def test_the_screen(drawn, size, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(gallery.GalleryScreen, "_tell_name", lambda self: self._put("name", "drawn  in /pictures"))

    async def story(pilot):
        await shows(pilot, drawn)
        await pilot.press("space", "right", "f", "right")
        await pilot.pause(0.2)
        await stage.looks(pilot, f"gallery-{size[0]}x{size[1]}")

    stage.play(story, size)
