"""What the screens look like, as text: `tests/screens/*.txt`, to be read and compared by eye in a review.

`MERGEKIT_SD_RENEW=1 pytest tests/test_tui_screens.py` writes them anew.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import small_models
import torch
import tui_stage as stage

import mergekit_sd as mk

SIZES = [(80, 24), (120, 40)]
SHELF = Path("/models/Stable-diffusion")


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """Models that lie, as far as the screens know, always at one place, written at one time."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    tensors = small_models.small("sd1", 1)
    tensors["model_ema.decay"] = torch.tensor(0.9999)
    tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"][0, 5] = 7
    tensors["[/x] junk"] = torch.ones(3)
    small_models.save(tmp_path / "lantern-mix.safetensors", tensors, {"modelspec.title": "Lantern [v2] \x1b[31m"})
    stage.small_file(tmp_path / "[b] anything-v3 with a name that is too long for any column.safetensors", 2)
    stage.small_file(tmp_path / "orange.vae.safetensors", 3, only="vae")
    (tmp_path / "broken.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0nothing at all!!")
    stage.scanned(tmp_path)
    there = lambda path: tmp_path / Path(path).name  # noqa: E731
    entries = [
        replace(entry, path=SHELF / entry.path.name, state=replace(entry.state, mtime_ns=1_700_000_000 * 10**9))
        for entry in mk.list_library()
    ]
    inspect, open_model = mk.inspect_file, mk.open
    monkeypatch.setattr(mk, "list_library", lambda: entries, raising=False)
    monkeypatch.setattr(mk, "scan_library", lambda *_, **__: mk.ScanReport((), files=len(entries)), raising=False)
    monkeypatch.setattr(mk, "sidecars", lambda path: [Path("lantern-mix.preview.png")], raising=False)
    monkeypatch.setattr(mk, "inspect_file", lambda path: inspect(there(path)), raising=False)
    monkeypatch.setattr(mk, "open", lambda path: open_model(there(path)), raising=False)


@pytest.mark.parametrize("size", SIZES)
def test_the_library(shelf, size):
    async def story(pilot):
        await stage.library(pilot, "lantern-mix", "nothing new")
        await pilot.press("down", "down", "space", "up")
        await stage.sees(pilot, " *  lantern", "1 model marked")
        await pilot.pause(0.6)
        await stage.looks(pilot, f"library-{size[0]}x{size[1]}")

    stage.play(story, size)


@pytest.mark.parametrize("size", SIZES)
def test_the_inspector(shelf, size):
    async def story(pilot):
        pilot.app.inspect_model(SHELF / "lantern-mix.safetensors")
        await stage.sees(pilot, "UNet")
        await stage.until(pilot, lambda: "tensors" in stage.status(pilot.app))
        await pilot.press("enter", "down", "enter", "down")
        await pilot.pause(0.3)
        await stage.looks(pilot, f"inspector-{size[0]}x{size[1]}")

    stage.play(story, size)


def test_the_help(shelf):
    async def story(pilot):
        await stage.library(pilot, "nothing new")
        await pilot.press("question_mark")
        await stage.sees(pilot, "Here: the table of models")
        await pilot.pause(0.2)
        await stage.looks(pilot, "help-120x40")

    stage.play(story, (120, 40))
