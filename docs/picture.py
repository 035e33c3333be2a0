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

COLUMNS = 100
SCENES = (
    ["demo", "models"],
    ["plan", "models/quickstart.toml", "--force"],
    ["diff", "models/base.safetensors", "models/quickstart.safetensors"],
)
SHOWN = (1, 2)  # the demo only sets the scene


def play(arguments: list[str], folder: Path) -> str:
    """What a command prints on a terminal of COLUMNS columns, escape codes and all."""
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "FORCE_COLOR": "1", "TERM": "xterm-256color"}
    environment.pop("NO_COLOR", None)
    command = [sys.executable, "-m", "mergekit_sd", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def main(target: Path) -> None:
    """Play every scene and write the picture."""
    console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    with tempfile.TemporaryDirectory() as folder:
        for number, scene in enumerate(SCENES):
            output = play(list(scene), Path(folder))
            if number in SHOWN:
                console.print(Text.assemble(("$ ", "bold green"), ("mergekit-sd " + " ".join(scene), "bold")))
                console.print(Text.from_ansi(output))
    target.write_text(console.export_svg(title="mergekit-sd"), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
