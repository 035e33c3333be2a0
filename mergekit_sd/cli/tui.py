"""tui: the terminal UI, which is a package of its own on top of the API."""

from __future__ import annotations

import importlib
from pathlib import Path

import click

from mergekit_sd.errors import EnvironmentFault

NEEDED = "textual"


@click.command("tui")
@click.argument("path", required=False, type=click.Path(exists=True, path_type=Path))
def tui_command(path: Path | None) -> int:
    """Look at models, mark, mend and merge them in the terminal.

    PATH is a recipe to open, a folder of models to scan, or a model to look into. ? shows the keys of a screen,
    Ctrl-Q leaves.
    """
    # By name, when called: the engine must be importable, and testable, without the UI that stands on it.
    try:
        start = importlib.import_module("mergekit_sd_tui.__main__")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != NEEDED:
            raise
        hint = "pip install 'mergekit-sd[tui]'"
        raise EnvironmentFault("The terminal UI needs Textual, which is not installed.", hint=hint) from error
    code: int = start.main(path)
    return code
