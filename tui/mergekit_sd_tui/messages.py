"""What workers tell. A worker only posts these; who handles one owns what it changes.

Must not know widgets.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from textual.message import Message

import mergekit_sd as mk
from mergekit_sd.errors import MergekitError
from mergekit_sd_tui.jobs import Job
from mergekit_sd_tui.leaves import Leaf
from mergekit_sd_tui.state import Draft


@dataclass
class Failed(Message):
    """A worker raised. `work` says what it was about, as in "The scan"."""

    work: str
    error: Exception


@dataclass
class Stopped(Message):
    """A worker has seen its token, and nothing of it goes on."""

    work: str


@dataclass
class Advanced(Message):
    """How far a worker is, in words."""

    words: str


@dataclass
class EntriesFound(Message):
    """Models of the index, or of a scan under way."""

    entries: tuple[mk.LibraryEntry, ...]


@dataclass
class EntryGone(Message):
    """A file is no longer there."""

    path: Path


@dataclass
class IndexRead(Message):
    """All that the index has was told. `folders` are those to scan first where it has nothing."""

    empty: bool
    folders: tuple[mk.ModelFolder, ...]


@dataclass
class Scanned(Message):
    """A scan is done."""

    report: mk.ScanReport


@dataclass
class Hashed(Message):
    """The hashing of some files is done."""

    files: int


@dataclass
class DuplicatesFound(Message):
    """What is there more than once."""

    found: mk.Duplicates


@dataclass
class BesideFound(Message):
    """The files that belong to a model."""

    path: Path
    names: tuple[str, ...]


@dataclass
class Inspected(Message):
    """A model's header was read."""

    path: Path
    found: mk.Inspection
    leaves: tuple[Leaf, ...]


@dataclass
class StatisticsMade(Message):
    """The numbers of one tensor; `found` is the API's value."""

    path: Path
    name: str
    found: Any


@dataclass
class FileWritten(Message):
    """A file is under its name."""

    path: Path
    bytes: int


@dataclass
class RecipeChecked(Message):
    """A text was checked: what is in the recipe, in words, or what is wrong with it."""

    text: str
    words: str
    error: MergekitError | None


@dataclass
class RecipeRead(Message):
    """A recipe's file was written since it was last looked at; `text` None: it cannot be read, `error` says why."""

    path: Path
    stamp: tuple[int, int, int]
    text: str | None
    error: MergekitError | None


@dataclass
class Planned(Message):
    """A plan as `plan_as_json` tells it, and what a run would raise before it computes; `report` None: no plan."""

    draft: Draft
    report: dict[str, Any] | None
    error: MergekitError | None


@dataclass
class RunChecked(Message):
    """Whether a saved recipe can be run; `error`: why not."""

    draft: Draft
    error: MergekitError | None


@dataclass
class JobEnded(Message):
    """A job is over, in whatever way."""

    job: Job


@dataclass
class FamilyRead(Message):
    """A model's family; None where it is not known."""

    path: Path
    family: str | None


@dataclass
class StepDrawn(Message):
    """A picture of a step was drawn and read; `shot` is what `pictures` made of it."""

    folder: Path
    picture: mk.SavedPicture
    shot: Any


@dataclass
class ModelsListed(Message):
    """The models of the index, to choose from."""

    entries: tuple[mk.LibraryEntry, ...]


@dataclass
class SamplesFound(Message):
    """The folders of samples that are there."""

    folders: tuple[Path, ...]


@dataclass
class SamplesRead(Message):
    """A folder of samples was read; `favourites` are names of files."""

    samples: mk.SavedSamples
    favourites: frozenset[str]


@dataclass
class PictureRead(Message):
    """A picture's file was read; `shot` is a `pictures.Shot`."""

    path: Path
    shot: Any


@dataclass
class PreviewFound(Message):
    """The preview picture beside a model, as `PictureRead` has it."""

    model: Path
    shot: Any


@dataclass
class Compared(Message):
    """Two models were compared."""

    a: Path
    b: Path
    found: mk.Diff
