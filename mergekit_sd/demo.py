"""The demo: the small trained family as real files, and the quickstart recipe that merges it and draws."""

from __future__ import annotations

import shutil
from importlib.resources import files
from pathlib import Path

from mergekit_sd.errors import NotWritable, OutputExists
from mergekit_sd.family import ADAPTERS, MODELS, write_family

QUICKSTART = "quickstart.toml"


def make_demo(folder: Path, *, force: bool = False) -> Path:
    """Put the models, the adapters and the quickstart recipe into a folder; returns the recipe's path."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NotWritable(f"The folder cannot be made: {error.strerror}.", file=folder) from error
    wanted = [*(f"{name}.safetensors" for name in MODELS), *ADAPTERS, QUICKSTART]
    there = next((folder / name for name in wanted if (folder / name).exists()), None)
    if there and not force:
        raise OutputExists("The demo was made here already.", file=there, hint="name another folder, or give --force")
    write_family(folder)
    with (folder / QUICKSTART).open("wb") as copy, files("mergekit_sd.recipes").joinpath(QUICKSTART).open("rb") as own:
        shutil.copyfileobj(own, copy)
    return folder / QUICKSTART
