"""The small models of `mergekit-sd demo` and the command line around them, for tests that play a user."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from noise_models import write_small_model

from mergekit_sd.cli.main import run

NAMES = ("base", "anime", "dreambooth", "photo")

MIX = """\
recipe = 1
title = "Mix"

[models]
base = "base.safetensors"
anime = "anime.safetensors"

[steps.mix]
op = "weighted_sum"
a = "base"
b = "anime"
alpha = 0.3

[outputs.out]
model = "mix"
file = "out.safetensors"
"""


def small_models(factory: pytest.TempPathFactory) -> Path:
    """The folder of the small models, made once in a session."""
    folder = factory.getbasetemp() / "small-models"
    if not folder.exists():
        folder.mkdir()
        for name in NAMES:
            write_small_model(folder / f"{name}.safetensors", name)
    return folder


def room(factory: pytest.TempPathFactory, folder: Path, *, recipe: str | None = MIX) -> Path:
    """A folder with links to the small models and, as r.toml, a recipe."""
    for path in small_models(factory).iterdir():
        os.link(path, folder / path.name)
    if recipe is not None:
        (folder / "r.toml").write_text(recipe, encoding="utf-8")
    return folder


def state(folder: Path) -> dict[str, tuple[int, int, int]]:
    """What lies in a folder, hidden files too: by name the file's identity, size and time."""
    stats = {path.relative_to(folder).as_posix(): path.lstat() for path in folder.rglob("*")}
    return {name: (each.st_ino, each.st_size, each.st_mtime_ns) for name, each in stats.items() if name != "config"}


class Shell:
    """Calls the command line in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: object, code: int = 0) -> tuple[str, str]:
        """stdout and stderr of a call that must end with `code`."""
        self._capsys.readouterr()
        found = run([str(each) for each in arguments])
        out, err = self._capsys.readouterr()
        assert found == code, out + err
        return out, err

    def json(self, *arguments: object, code: int = 0) -> Any:
        """The one document on stdout of a call with --json; every line of stderr is an object."""
        out, err = self(*arguments, "--json", code=code)
        for line in err.splitlines():
            assert "event" in json.loads(line)
        return json.loads(out)

    def refused(self, kind: str, code: int, *arguments: object) -> dict[str, Any]:
        """The error of a call that is refused, told once as text and once as JSON, without a traceback."""
        _, err = self(*arguments, code=code)
        assert "Traceback" not in err
        error: dict[str, Any] = self.json(*arguments, code=code)["error"]
        assert (error["type"], error["exit_code"]) == (kind, code), error
        for place in ("message", "file", "key", "hint"):
            assert error.get(place, "") in err
        return error
