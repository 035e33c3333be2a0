"""A folder of samples that was written before: which pictures it has, and what was found of them.

Owns how `report.json` is read back; nothing in it is trusted. Must not open pictures, nor import numpy.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_sd.errors import MalformedFile, MissingInput, UnreadableInput
from mergekit_sd.text import shown

REPORT, PAGE = "report.json", "report.html"
LARGEST = 256 * 2**20  # bytes of a report: a sweep of thousands of pictures has a few MiB


@dataclass(frozen=True, slots=True)
class SavedPicture:
    """A picture of a folder: its file, the model's name, the seed, and how it was made."""

    path: Path
    model: str
    seed: int
    prompt: str
    settings: str
    """Steps, CFG and sampler in a few words."""


@dataclass(frozen=True, slots=True)
class SavedCheck:
    """A check of the report that is not in order. `level`: warning or failed."""

    name: str
    level: str
    model: str
    message: str


@dataclass(frozen=True, slots=True)
class SavedSamples:
    """A folder of samples. `checks` is the number of all checks, `findings` are those not in order."""

    folder: Path
    title: str
    models: tuple[str, ...]
    pictures: tuple[SavedPicture, ...]
    checks: int
    findings: tuple[SavedCheck, ...]

    @property
    def page(self) -> Path:
        """The report for people."""
        return self.folder / PAGE


def read_samples(folder: str | Path) -> SavedSamples:
    """Read a folder that `write_samples` wrote.

    Raises MissingInput where there is no report, UnreadableInput or MalformedFile where it cannot be read.
    """
    folder = Path(folder)
    path = folder / REPORT
    try:
        if path.stat().st_size > LARGEST:
            raise MalformedFile("This report is too large to be one of samples.", file=path)
        data = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        hint = "give a folder that `sample` or `run` wrote"
        raise MissingInput("There are no samples: no report.json.", file=folder, hint=hint) from error
    except OSError as error:
        raise UnreadableInput(f"The report cannot be read: {error.strerror}.", file=path) from error
    except (ValueError, RecursionError) as error:
        raise MalformedFile("The report is no JSON.", file=path, hint="draw the samples again") from error
    try:
        return _samples(folder, data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        hint = "give a folder that `sample` or `run` wrote"
        raise MalformedFile("This is no report of samples.", file=path, hint=hint) from error


def samples_in(folders: Iterable[str | Path]) -> tuple[Path, ...]:
    """The folders of samples among these and the folders in them, each once. What cannot be looked into is left out."""
    found = {folder: None for given in folders for folder in _with_children(Path(given)) if _has_samples(folder)}
    return tuple(found)


def _with_children(folder: Path) -> Iterator[Path]:
    yield folder
    try:
        yield from sorted(each for each in folder.iterdir() if each.is_dir())
    except OSError:
        return


def _has_samples(folder: Path) -> bool:
    try:
        return (folder / REPORT).is_file() and (folder / PAGE).is_file()
    except OSError:
        return False


def _samples(folder: Path, data: Any) -> SavedSamples:
    checks = data["checks"]
    return SavedSamples(
        folder=folder,
        title=str(data["title"]),
        models=tuple(str(each) for each in data["models"]),
        pictures=tuple(_picture(folder, each) for each in data["pictures"]),
        checks=len(checks),
        findings=tuple(
            SavedCheck(str(each["name"]), str(each["level"]), str(each["model"]), str(each["message"]))
            for each in checks
            if each["level"] != "ok"
        ),
    )


def _picture(folder: Path, data: Any) -> SavedPicture:
    name, settings = str(data["file"]), data["settings"]
    # A report from elsewhere must not name files of elsewhere.
    if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise ValueError(f"no name of a file: {shown(name)}")
    made = f"{settings['steps']} steps, CFG {settings['cfg']}, {settings['sampler']}"
    return SavedPicture(folder / name, str(data["model"]), int(data["seed"]), str(settings["prompt"]), made)
