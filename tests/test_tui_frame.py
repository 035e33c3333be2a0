"""What holds for every screen: keys and words from one registry, hostile names, tiny terminals, speed, settings."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import replace

import pytest
import tui_stage as stage
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style
from textual.color import Color
from textual.events import Key

import mergekit_sd as mk
from mergekit_sd.cli.tui import tui_command
from mergekit_sd_tui.actions import ACTIONS, SCREENS, actions_of
from mergekit_sd_tui.app import Workbench
from mergekit_sd_tui.glyphs import AsciiFilter
from mergekit_sd_tui.history import MOST, History
from mergekit_sd_tui.model_table import ModelTable
from mergekit_sd_tui.settings import load_settings, save_theme, settings_file
from mergekit_sd_tui.state import Draft

MANY = 5000
FIRST_ROW = 1.0  # seconds
ANSWER = 0.1
HEADER = 0.0005  # as long as a scan takes for one
TERMINAL_TAKES = {"ctrl+m", "ctrl+i", "ctrl+h", "ctrl+j"}


# --- the registry -------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", SCREENS)
def test_no_key_is_bound_twice_on_a_screen(place):
    keys = Counter(key for action in actions_of(place) for key in action.keys.split(","))
    assert {key: number for key, number in keys.items() if number > 1} == {}
    assert not TERMINAL_TAKES & set(keys)


def test_ids_are_unique_and_every_action_is_there():
    async def story(pilot):
        app = pilot.app
        for place in SCREENS:
            app.action_show_screen(place)
            await pilot.pause()
            for action in actions_of(place):
                owner, _, name = action.call.partition(".")
                target = app if owner == "app" else app.screen
                assert hasattr(target, f"action_{name.partition('(')[0]}"), action.id

    assert len({action.id for action in ACTIONS}) == len(ACTIONS)
    stage.play(story)


def test_every_key_of_the_footer_is_in_the_help_and_the_palette():
    async def story(pilot):
        app = pilot.app
        for place in SCREENS:
            app.action_show_screen(place)
            await stage.sees(pilot, f"[{SCREENS[place]}]", "Quit")
            footer = [one.binding for one in app.screen.active_bindings.values() if one.binding.show]
            ours = [binding for binding in footer if binding.id]
            assert len(ours) >= 6
            palette = [(each.title, each.help.partition(" Key: ")[2]) for each in app.get_system_commands(app.screen)]
            every = [(action.label, app.keys_of(action.id)) for action in actions_of(place)]
            assert set(every) - set(palette) == {("Menu", "^p")}
            await pilot.press("f1")
            await stage.sees(pilot, "Everywhere")
            helped = {(row[1], row[0]) for section in app.screen.sections for row in section.rows}
            assert {(binding.description, app.keys_of(binding.id)) for binding in ours} <= set(every) <= helped
            await pilot.press("escape")
            await stage.until(pilot, lambda: len(app.screen_stack) == 1)
            assert app.current_mode == place

    stage.play(story, (120, 60))


@pytest.mark.parametrize("locale", ["C.UTF-8", "C"])
def test_every_footer_fits_eighty_columns(monkeypatch, locale):
    monkeypatch.setenv("LC_ALL", locale)

    async def story(pilot):
        for place in SCREENS:
            pilot.app.action_show_screen(place)
            await stage.sees(pilot, f"[{SCREENS[place]}]")
            await stage.until(pilot, lambda: stage.shown(pilot.app).endswith(" Quit"), f"the footer of {place}")
            assert " Help " in stage.shown(pilot.app).splitlines()[-1]

    stage.play(story)


def test_help_begins_with_the_focused_widget(tmp_path):
    stage.scanned(stage.small_file(tmp_path / "m" / "a.safetensors", only="vae").parent)

    async def story(pilot):
        app = pilot.app
        await stage.library(pilot, "a.safetensors")
        for keys, title, first in (
            ("1 f1", "Here: the table of models", "Inspect"),
            ("1 slash f1", "Here: the filter", "Move cursor left"),
            ("3 f1", "Here: the block weights", "Set"),
            ("4 enter f1", "Here: the text", "Cursor"),
            ("5 f1", "Here: the list of jobs", "Open"),
        ):
            for key in keys.split():
                await pilot.press(key)
                await pilot.pause()
            await stage.sees(pilot, title)
            lines = stage.shown(app).splitlines()
            place = next(number for number, line in enumerate(lines) if title in line)
            assert first in "".join(lines[place + 1 : place + 4]), (title, lines)
            await pilot.press("escape")
            await stage.until(pilot, lambda: len(app.screen_stack) == 1)
            await pilot.press("escape")

    stage.play(story, (100, 30))


def test_every_action_can_have_another_key():
    free = [f"alt+{sign}" for sign in "abcdefghijklmnopqrstuvwxyz"]
    for place in SCREENS:
        ids = [action.id for action in ACTIONS if action.place == place]
        keys = dict(zip(ids, free, strict=False))
        lines = "\n".join(f'"{name}" = "{key}"' for name, key in keys.items())
        settings_file().parent.mkdir(parents=True, exist_ok=True)
        settings_file().write_text(f"[keys]\n{lines}\n")

        async def story(pilot, place=place, keys=keys):
            pilot.app.action_show_screen(place)
            await stage.sees(pilot, f"[{SCREENS[place]}]")
            bound = {each.binding.id: key for key, each in pilot.app.screen.active_bindings.items()}
            bound = {name: key for name, key in bound.items() if name in keys}
            assert bound.items() <= keys.items()
            assert len(bound) >= len(keys) - 1  # in the Recipe's text Enter is no key

        stage.play(story)


def test_the_palette_does_what_it_says():
    async def story(pilot):
        await stage.library(pilot)
        await pilot.press("ctrl+p")
        await pilot.pause(0.1)
        await pilot.press(*"inspector")
        await pilot.pause(0.3)
        await pilot.press("enter")
        await stage.until(pilot, lambda: pilot.app.current_mode == "inspector")

    stage.play(story)


# --- settings -------------------------------------------------------------------------------------------


def test_users_have_their_own_keys_and_theme():
    settings_file().parent.mkdir(parents=True, exist_ok=True)
    settings_file().write_text('theme = "nord"  # mine\n[keys]\n"app.help" = "ctrl+g"\nlibrary.sort = "o"\n')

    async def story(pilot):
        assert pilot.app.theme == "nord"
        await stage.library(pilot)
        await pilot.press("ctrl+g")
        await stage.sees(pilot, "Esc closes this.", "^g", "o ")
        await pilot.press("escape")
        await stage.until(pilot, lambda: len(pilot.app.screen_stack) == 1)
        await pilot.press("s")
        assert "Sorted" not in stage.status(pilot.app)
        await pilot.press("o")
        await stage.until(pilot, lambda: "Sorted by family" in stage.status(pilot.app))
        pilot.app.theme = "gruvbox"
        await stage.until(pilot, lambda: 'theme = "gruvbox"  # mine' in settings_file().read_text())

    stage.play(story, (100, 50))
    assert load_settings().keys == {"app.help": "ctrl+g", "library.sort": "o"}


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("theme = ", "cannot be read"),
        ("theme = 3", "theme must be a text"),
        ('theme = "[/x]"', 'no theme "[/x]"'),
        ("keys = 3", "must be a table"),
        ('[keys]\n"library.sortt" = "o"', 'did you mean "library.sort"?'),
        ("[keys]\nlibrary.sort = 3", "the key of library.sort must be a text"),
        ('[keys]\nlibrary.sort = "r"', "r is the key of library.sort and of library.rescan"),
    ],
)
def test_a_wrong_file_of_settings_is_told_and_changes_nothing(text, note):
    settings_file().parent.mkdir(parents=True, exist_ok=True)
    settings_file().write_text(text)

    async def story(pilot):
        await pilot.press("r")
        await stage.until(pilot, lambda: note in stage.told(pilot.app), note)
        assert pilot.app.theme == "textual-dark"

    stage.play(story)


def test_a_theme_is_kept_where_no_file_was():
    save_theme("nord")
    assert load_settings().theme == "nord"


# --- names of strangers -----------------------------------------------------------------------------------


def test_hostile_names_are_shown_as_they_are(tmp_path):
    folder = tmp_path / "[" / "x]"
    for number, name in enumerate(stage.HOSTILE):
        stage.small_file(folder / name, number, {"[/b]": "[/x] \x1b[31m"}, only="vae")
    (folder / "[b] bad.safetensors").write_bytes(b"no")
    stage.scanned(folder)

    async def story(pilot):
        await stage.library(pilot, "[b] bold.safetensors", "[x=1 a.safetensors", "\\x1b[31mred.safetensors", "[/x]")
        for number in range(len(stage.HOSTILE) + 1):
            await pilot.press("home", *["down"] * number, "enter")
            await pilot.pause(0.1)
            if pilot.app.current_mode == "inspector":
                await stage.sees(pilot, "[/b]: [/x] \\x1b[31m")
                await pilot.press("p")
                await stage.sees(pilot, "Esc leaves it")
                assert "\x1b" not in stage.shown(pilot.app)
                await pilot.press("escape", "escape")
            assert "\x1b" not in stage.shown(pilot.app)
        await pilot.press("h")
        await stage.library(pilot)
        assert "\x1b" not in stage.shown(pilot.app)

    stage.play(story, (130, 40))


def test_a_name_that_is_no_unicode_is_shown(tmp_path):
    try:
        stage.small_file(tmp_path / "a.safetensors", only="vae").rename(tmp_path / os.fsdecode(b"caf\xe9.safetensors"))
    except OSError:
        pytest.skip("this file system has Unicode names only")
    stage.scanned(tmp_path)

    async def story(pilot):
        await stage.library(pilot, "caf\\udce9.safetensors")
        await pilot.press("enter")
        await stage.sees(pilot, "248 tensors")
        await pilot.press("p")
        await stage.sees(pilot, "Esc leaves it")
        stage.shown(pilot.app).encode()

    stage.play(story, (100, 30))


# --- terminals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(20, 5), (1, 1)])
def test_a_tiny_terminal_works_and_grows(tmp_path, size):
    stage.scanned(stage.small_file(tmp_path / "m" / "a.safetensors").parent)

    async def story(pilot):
        await stage.until(pilot, lambda: not pilot.app.screen.busy and pilot.app.screen.query_one(ModelTable).row_count)
        for keys in (("down", "space", "question_mark", "escape"), ("enter",), ("enter", "f", "escape"), ("ctrl+p",)):
            await pilot.press(*keys)
            await pilot.pause(0.05)
        await pilot.press("escape")
        for width, height in ((80, 24), (1, 1), (20, 5), (200, 60), (80, 24)):
            await pilot.resize_terminal(width, height)
            await pilot.pause(0.05)
        await stage.sees(pilot, "a.safetensors", "UNet")

    stage.play(story, size)


def test_a_mark_is_no_colour(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    stage.scanned(stage.small_file(tmp_path / "m" / "a.safetensors").parent)

    async def story(pilot):
        await stage.library(pilot, "a.safetensors")
        await pilot.press("space")
        await stage.sees(pilot, " *  a.safetensors", "[Library]")

    app = stage.play(story)
    assert app.no_color


@given(st.text(max_size=20))
def test_in_ascii_every_sign_keeps_its_width(text):
    (made,) = AsciiFilter().apply([Segment(text, Style(bold=True))], Color(0, 0, 0))
    assert made.text.isascii()
    assert made.style == Style(bold=True)
    if all(cell_len(sign) == 1 for sign in text):
        assert made.cell_length == cell_len(text)


# --- speed ---------------------------------------------------------------------------------------------------


@pytest.fixture
def many(tmp_path):
    """An index of many models, none of which is looked at."""
    one = stage.small_file(tmp_path / "m" / "model.safetensors", only="vae")
    stage.scanned(one.parent)
    (entry,) = mk.list_library()
    with mk.Library() as index:
        index.keep(replace(entry, path=one.with_name(f"model-{number:05}.safetensors")) for number in range(MANY))


def test_many_models_are_there_at_once_and_keys_are_answered(many, monkeypatch):
    """The scan goes on all the while; a busy machine may be three times as slow as the promise."""
    answered = threading.Event()

    def slow_scan(*_args, on_event, cancel, **_options):
        for entry in mk.list_library():
            on_event(mk.FileRead("changed", entry))
            answered.wait(HEADER)
        answered.wait(stage.PATIENCE)
        return mk.ScanReport(())

    monkeypatch.setattr(mk, "scan_library", slow_scan, raising=False)
    seen = {}
    begun = time.monotonic()

    async def story(pilot):
        table = pilot.app.screen.query_one(ModelTable)
        await stage.until(pilot, lambda: table.row_count > 0)
        seen["first row"] = time.monotonic() - begun
        answers = []
        for _ in range(10):
            row = table.cursor_row
            asked = time.monotonic()
            pilot.app.post_message(Key("down", None))  # Pilot itself waits for idleness
            while table.cursor_row == row:
                await asyncio.sleep(0.002)
            answers.append(time.monotonic() - asked)
        assert pilot.app.screen.busy
        answered.set()
        seen["answer"] = sorted(answers)[len(answers) // 2]
        await stage.until(pilot, lambda: table.row_count > MANY)
        seen["all rows"] = time.monotonic() - begun
        await pilot.press("slash", *"04999", "enter")
        await stage.until(pilot, lambda: table.row_count == 1)

    stage.play(story, (120, 40))
    print(seen)
    assert seen["first row"] < 3 * FIRST_ROW
    assert seen["answer"] < 3 * ANSWER


# --- the command, the engine without it ----------------------------------------------------------------------


def test_the_engine_never_imports_the_ui():
    code = "import sys, mergekit_sd.cli.tui, mergekit_sd as mk; [getattr(mk, name) for name in mk.__all__];"
    code += "print([name for name in sys.modules if name.startswith(('textual', 'mergekit_sd_tui'))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_without_textual_the_command_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] in ("textual", "mergekit_sd_tui")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "textual", None)
    result = CliRunner().invoke(tui_command, [])
    assert result.exception.exit_code == 4
    assert result.exception.hint == "pip install 'mergekit-sd[tui]'"


def test_the_command_starts_the_workbench(monkeypatch):
    import mergekit_sd_tui.__main__ as entry

    monkeypatch.setattr(entry.Workbench, "run", lambda self: setattr(self, "_return_code", 0))
    result = CliRunner().invoke(tui_command, [], standalone_mode=False)
    assert result.return_value == 0


# --- undo ------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 5), max_size=30))
def test_undo_and_redo_are_each_others_inverse(values):
    history = History(-1)
    for value in values:
        history = history.edited(value)
    end = history
    steps = 0
    while history.past:
        assert history.undone().redone() == history
        history, steps = history.undone(), steps + 1
    assert history.now == -1
    for _ in range(steps):
        history = history.redone()
    assert history == end
    assert history.redone() is history


def test_history_is_bounded():
    history = History(0)
    for value in range(1, 2 * MOST):
        history = history.edited(value)
    assert len(history.past) == MOST


def test_a_bug_leaves_with_a_sentence_and_loses_no_recipe(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def broken(self):
        raise ValueError("[b]oops[/b] \x1b[31m")

    monkeypatch.setattr(Workbench, "action_help", broken)
    app = Workbench()

    async def story(pilot):
        app.edit(replace(app.workspace, draft=Draft("recipe = 1\n# mine\n")))
        await pilot.press("f1")

    with pytest.raises(ValueError, match="oops"):
        stage.play(story, app=app)
    words = app.last_words
    assert "This is a bug: ValueError: [b]oops[/b] \\x1b[31m" in words
    assert "Traceback" not in words
    (recipe,) = tmp_path.glob("*.toml")
    assert recipe.read_text(encoding="utf-8") == "recipe = 1\n# mine\n"
    (log,) = tmp_path.glob("*.log")
    assert "ValueError" in log.read_text(encoding="utf-8")
    assert str(recipe) in words
    assert str(log) in words
