"""A stage for tests of the terminal UI: models on the disk, a pilot, what the screen shows as text."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import small_models
from textual import _wait
from textual.widgets import Static

import mergekit_sd as mk
from mergekit_sd_tui.app import Workbench

# Pilot waits for idleness after each key, in naps of 20 ms; what a story waits for, it asks for itself.
_wait.SLEEP_GRANULARITY = 0.004

SCREENS = Path(__file__).parent / "screens"
PATIENCE = 30.0  # seconds; a busy machine is slow
HOSTILE = ("[b] bold.safetensors", "[x=1 a.safetensors", "\x1b[31mred.safetensors", "x] end.safetensors")


def small_file(path: Path, seed: int = 0, metadata=None, only=None) -> Path:
    """A small SD1 model."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return small_models.save(path, small_models.small("sd1", seed, only=only), metadata)


def play(story, size=(80, 24), app=None):
    """Run a story, a coroutine that takes the pilot, on an app of that size."""

    async def run():
        nonlocal app
        app = app or Workbench()
        async with app.run_test(size=size, notifications=True) as pilot:
            await story(pilot)

    asyncio.run(run())
    return app


async def until(pilot, condition, what="it"):
    """Wait until something is so."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"{what} never came: {shown(pilot.app)}"
        await pilot.pause(0.02)


def shown(app) -> str:
    """The screen as text, without the blanks at the ends of lines."""
    lines = app.screen._compositor.render_strips()
    return "\n".join(strip.text.rstrip() for strip in lines)


async def sees(pilot, *words):
    """Wait until all these words are on the screen."""
    await until(pilot, lambda: all(word in shown(pilot.app) for word in words), " and ".join(words))


def status(app) -> str:
    """The line that tells."""
    return str(app.screen.query_one("#status", Static).render())


def told(app) -> str:
    """All messages of the corner."""
    return "\n".join(f"{note.title} {note.message}" for note in app._notifications)


def scanned(folder: Path) -> None:
    """The index knows the models of a folder."""
    mk.scan_library([folder], hashes="none")


async def library(pilot, *words):
    """Wait until the library is there and quiet."""
    await until(pilot, lambda: _is_quiet(pilot.app), "the library")
    await sees(pilot, *words)


def _is_quiet(app) -> bool:
    words = status(app)
    return bool(words) and "Reading" not in words and not app.screen.busy


async def looks(pilot, name):
    """The screen comes to look as its file says; `MERGEKIT_SD_RENEW=1` writes it anew."""
    path = SCREENS / f"{name}.txt"
    if os.environ.get("MERGEKIT_SD_RENEW"):
        await pilot.pause(1)
        path.write_text(shown(pilot.app) + "\n", encoding="utf-8")
    expected = path.read_text(encoding="utf-8")
    end = time.monotonic() + PATIENCE
    while (text := shown(pilot.app) + "\n") != expected and time.monotonic() < end:
        await pilot.pause(0.02)
    assert text == expected
