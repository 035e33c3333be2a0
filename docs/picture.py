"""Makes the README's picture: real commands in an empty folder, their real output, as an SVG.

python docs/picture.py docs/demo.svg
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

COLUMNS = 118
SCENES = (
    "mergekit-sd demo .",
    "mergekit-sd plan quickstart.toml --force",
    "mergekit-sd run quickstart.toml --force",
    "mergekit-sd diff base.safetensors quickstart.safetensors | head -16",
)
SHOWN = SCENES[1:]  # the demo only sets the scene


def play(line: str, folder: Path) -> str:
    """What a line of shell prints on a terminal of COLUMNS columns, escape codes and all."""
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "FORCE_COLOR": "1", "TERM": "xterm-256color"}
    environment.pop("NO_COLOR", None)
    command = line.replace("mergekit-sd", f"'{sys.executable}' -m mergekit_sd", 1) + " 2>&1"
    done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def main(target: Path) -> None:
    """Play every scene and write the picture."""
    console = Console(record=True, width=COLUMNS + 2, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    with tempfile.TemporaryDirectory() as folder:
        for line in SCENES:
            output = play(line, Path(folder))
            if line in SHOWN:
                console.print(Text.assemble(("$ ", "bold green"), (line, "bold")))
                console.print(Text.from_ansi(output))
    target.write_text(console.export_svg(title="mergekit-sd"), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
