"""The command itself on a real pseudo-terminal: keys as bytes, mouse, resizing, signals, and what is left behind."""

from __future__ import annotations

import os
import signal
import sys
import time

import faults
import pytest
import slow_child
import tui_stage as stage

pytest.importorskip("pty", reason="pseudo-terminals")
from terminal import BACKSPACE, CTRL_C, CTRL_Q, END, ENTER, ESCAPE, F6, TAB, Terminal

pytestmark = pytest.mark.slow

LEAVES = 1.0  # seconds from ctrl+q to the shell where nothing is under way; a busy machine may take three times that


@pytest.fixture
def place(tmp_path):
    """A folder of two models and a recipe."""
    slow_child.write_slow_job(tmp_path)
    return tmp_path


def workbench(place, path, size=(80, 24), **environment):
    """`mergekit-sd tui PATH`."""
    return Terminal([sys.executable, "-m", "mergekit_sd", "tui", str(path)], size, environment, folder=place)


def leaves(terminal):
    """Ctrl+q leaves at once, and the terminal is as it was."""
    begun = time.monotonic()
    terminal.types(CTRL_Q)
    assert terminal.end() == 0
    assert time.monotonic() - begun < 3 * LEAVES
    assert terminal.wrong() == []


def test_keys_mouse_and_sizes(place):
    stage.small_file(place / "apple.safetensors", 1, only="vae")
    stage.small_file(place / "pear.safetensors", 2, only="vae")
    with workbench(place, place) as terminal:
        terminal.sees("apple.safetensors", "pear.safetensors")
        terminal.types("/", "pearx", BACKSPACE)
        terminal.until(lambda: "apple.safetensors" not in terminal.text, "the filter")
        terminal.sees("pear.safetensors")
        terminal.types(ENTER, ENTER)
        terminal.sees("[Inspector]", "pear.safetensors", "248 tensors")
        terminal.types(ENTER)
        terminal.sees("▼")
        terminal.types("1", ESCAPE)
        terminal.sees("[Library]", "apple.safetensors")
        terminal.clicks("pear.safetensors")
        terminal.types(" ")
        terminal.sees(" *  pear.safetensors", "1 model marked")
        terminal.clicks("apple.safetensors")
        terminal.types(" ", "x")
        terminal.sees("A LoRA of what apple.safetensors has over pear.safetensors", "apple-lora.safetensors")
        terminal.types(BACKSPACE, "0", TAB, BACKSPACE * 6)
        terminal.sees("  30 ", "apple-lora.safet")
        assert "apple-lora.safete" not in terminal.text
        terminal.types(ESCAPE)
        terminal.until(lambda: "has over" not in terminal.text, "the library")
        terminal.clicks("? Help")
        terminal.sees("Here: the table of models")
        terminal.types(ESCAPE)
        terminal.until(lambda: "Here" not in terminal.text, "the library")
        for columns, lines in ((20, 5), (200, 60), (1, 1), (120, 40), (20, 5), (80, 24)):
            terminal.resize(columns, lines)
            terminal.types("j")
        terminal.sees(" *  pear.safetensors", "^q Quit")
        terminal.types(CTRL_C)
        terminal.sees("quit")
        leaves(terminal)


def test_leaving_asks_for_what_is_not_saved(place):
    with workbench(place, place / "r.toml") as terminal:
        terminal.sees("[Recipe]", "⏎ Write")
        terminal.types(ENTER, "#", ESCAPE)
        terminal.sees("(not saved)")
        terminal.types(CTRL_Q)
        terminal.sees("The recipe is not saved.", "Stay", "Leave")
        terminal.types(ENTER)
        terminal.until(lambda: "Stay" not in terminal.text, "the recipe again")
        terminal.types(CTRL_Q)
        terminal.sees("The recipe is not saved.")
        terminal.types(END)
        begun = time.monotonic()
        terminal.types(ENTER)
        assert terminal.end() == 0
        assert time.monotonic() - begun < 3 * LEAVES
        assert terminal.wrong() == []


@pytest.mark.parametrize("way", [CTRL_Q, signal.SIGTERM, signal.SIGHUP])
def test_leaving_stops_the_job_and_leaves_the_terminal_sane(place, tmp_path, monkeypatch, way):
    mark = slow_child.disturb(monkeypatch, tmp_path, slow_child.SLOW_WRITES)
    with workbench(place, place / "r.toml") as terminal:
        terminal.sees("[Recipe]", "⏎ Write")
        terminal.types(F6)
        terminal.sees("[Jobs]", "running")
        terminal.until(lambda: mark.exists() and faults.left_in(place), "the child's writing")
        if way == CTRL_Q:
            terminal.types(CTRL_Q)
            terminal.sees("1 job under way: leaving cancels.")
            terminal.types(END, ENTER)
        else:
            os.kill(terminal.process.pid, way)
        assert terminal.end() == 0
        assert terminal.wrong() == []
    assert not slow_child.is_alive(int(mark.read_text()))
    assert faults.left_in(place) == []


@pytest.mark.parametrize(
    "environment",
    [{"NO_COLOR": "1", "TERM": "dumb"}, {"LANG": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}],
    ids=["no colour", "LANG=C", "ASCII"],
)
def test_poor_terminals(place, environment):
    stage.small_file(place / "pear ü.safetensors", 2, only="vae")
    with workbench(place, place, **environment) as terminal:
        terminal.sees("[Library]", "pear ", "^q Quit")
        terminal.types(" ")
        terminal.sees(" *  ", "1 model marked")
        for key, words in zip(("2", "3", "4", "5", "6", "7"), EVERYWHERE, strict=True):
            terminal.types(key)
            terminal.sees(words, "^q Quit")
        leaves(terminal)
    if "LC_ALL" in environment or "LANG" in environment:
        drawn = terminal.said.decode("utf-8", "replace")
        assert {sign for sign in drawn if not sign.isascii()} == set()


EVERYWHERE = ("[Inspector]", "[Mix]", "[Recipe]", "[Jobs]", "[Gallery]", "[Diff]")
