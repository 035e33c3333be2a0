"""Makes the README's pictures: real commands and screens on the demo's models, as they come.

python docs/picture.py docs
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.text import Text

COLUMNS = 118
ROWS = 34
SCENES = (
    "mergekit-sd plan quickstart.toml --force",
    "mergekit-sd run quickstart.toml --force --no-samples",
    "mergekit-sd diff base.safetensors quickstart.safetensors | head -16",
)
DUSK = """\
recipe = 1
title = "Dusk"

[models]
base = "base.safetensors"
night = "night.safetensors"
star = "star.safetensors"

[steps.taught]
op = "add_difference"
a = "night"
b = "star"
c = "base"
alpha = 1.0

[steps.dusk]
op = "weighted_sum"
a = "base"
b = "taught"
alpha = { preset = "GRAD_V", base = 0.5, OUT03 = 0.8 }

[outputs.final]
model = "dusk"
file = "dusk-with-a-star.safetensors"
"""
SHEET_WIDTH = 720  # pixels: a page's width


def play(line: str, folder: Path) -> str:
    """What a line of shell prints on a terminal of COLUMNS columns, escape codes and all."""
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "FORCE_COLOR": "1", "TERM": "xterm-256color"}
    environment.pop("NO_COLOR", None)
    command = line.replace("mergekit-sd", f"'{sys.executable}' -m mergekit_sd", 1) + " 2>&1"
    done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def terminal(folder: Path, target: Path) -> None:
    """The scenes, one below the other."""
    console = Console(record=True, width=COLUMNS + 2, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    for line in SCENES:
        console.print(Text.assemble(("$ ", "bold green"), (line, "bold")))
        console.print(Text.from_ansi(play(line, folder)))
    target.write_text(console.export_svg(title="mergekit-sd"), encoding="utf-8")


def sheet(folder: Path, target: Path) -> None:
    """The contact sheet of the demo, smaller."""
    with Image.open(folder / "quickstart-samples" / "sheet.png") as picture:
        height = round(picture.height * SHEET_WIDTH / picture.width)
        smaller = picture.convert("RGB").resize((SHEET_WIDTH, height), Image.Resampling.LANCZOS)
    smaller.quantize(128).save(target, optimize=True)


async def mix(folder: Path, target: Path) -> None:
    """The terminal UI's Mix screen on a recipe with block weights."""
    from mergekit_sd_tui.app import Workbench

    (folder / "dusk.toml").write_text(DUSK, encoding="utf-8")
    app = Workbench(folder / "dusk.toml")
    async with app.run_test(size=(COLUMNS, ROWS)) as pilot:
        await pilot.pause(2)
        await pilot.press("3")
        await pilot.pause(2)
        await pilot.press(*["right"] * 17)
        await pilot.pause(1)
        target.write_text(app.export_screenshot(title="mergekit-sd tui"), encoding="utf-8")


def main(docs: Path) -> None:
    """Make the demo once, and every picture from it."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        os.environ["MERGEKIT_SD_CONFIG"] = os.environ["MERGEKIT_SD_DATA"] = place + "/home"
        play("mergekit-sd demo .", folder)
        sheet(folder, docs / "sheet.png")
        terminal(folder, docs / "demo.svg")
        asyncio.run(mix(folder, docs / "tui.svg"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
