"""What was done to the user's files, so that it can be undone: a file of JSON lines for each run.

Owns the records, where they are kept, and the lock of those who write them. Must not know how a step is
taken or undone. A step is on the disk before it is taken: what was really done, the files themselves show.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_sd.errors import EnvironmentFault, NotWritable, TargetLocked
from mergekit_sd.formats.claims import claim, temporary_name
from mergekit_sd.library.store import DATA_VARIABLE, data_folder

VERSION = 1


@dataclass(frozen=True, slots=True)
class Step:
    """A file that is replaced, as it was; `sha256` is that of its bytes and of the kept file's."""

    path: Path
    kept: Path
    sha256: str
    size: int
    inode: int
    mode: int
    mtime_ns: int
    uid: int
    gid: int

    @property
    def temporary(self) -> Path:
        """Where what replaces the file is made, beside it."""
        return self.path.with_name(temporary_name(f"{self.path.name}.link"))


@dataclass(frozen=True, slots=True)
class DedupeRun:
    """A run of dedupe: its steps in order, and those of them that are neither undone nor failed (`pending`)."""

    number: int
    link: str
    time: datetime.datetime
    steps: tuple[Step, ...]
    pending: tuple[Step, ...]
    under_way: Step | None
    """What the run, or an undo of it, was about last: of a killed one something may lie around."""

    @property
    def bytes(self) -> int:
        """The sizes of the files replaced."""
        return sum(step.size for step in self.steps)

    def as_json(self) -> dict[str, object]:
        """The run as plain data."""
        return {
            "run": self.number,
            "link": self.link,
            "time": self.time.isoformat(timespec="seconds"),
            "files": len(self.steps),
            "bytes": self.bytes,
            "pending": len(self.pending),
        }


def dedupe_runs() -> list[DedupeRun]:
    """Every run that replaced something, the oldest first. Raises EnvironmentFault for a damaged record."""
    with _told():
        paths = [path for path in _folder().glob("*.jsonl") if path.stem.isdecimal()]
        return [run for path in sorted(paths, key=_number) if (run := _read(path)) is not None]


@contextlib.contextmanager
def exclusive() -> Iterator[None]:
    """One dedupe or undo at a time; what a killed one left is swept first. Raises TargetLocked."""
    with _told():
        _folder().mkdir(parents=True, exist_ok=True)
        lock = _folder() / "lock"
        try:
            descriptor = claim(lock, lock)
        except TargetLocked:
            hint = "wait for it; if none is running, delete this file"
            raise TargetLocked("Another dedupe or undo is under way.", file=lock, hint=hint) from None
    try:
        for run in dedupe_runs():
            if run.under_way:
                with contextlib.suppress(OSError):
                    run.under_way.temporary.unlink()
        yield
    finally:
        with contextlib.suppress(OSError):  # an open file stays on Windows, and the next run sweeps it
            lock.unlink()
        os.close(descriptor)


class Journal:
    """The record of one run under way; use within `exclusive()`. A new one begins with its first step."""

    def __init__(self, link: str) -> None:
        self._link = link
        self._descriptor = -1
        self.number: int | None = None

    @classmethod
    def of(cls, run: DedupeRun) -> Journal:
        """The record of a former run, to go on with."""
        journal = cls(run.link)
        with _told():
            journal._open(run.number, 0)
        return journal

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def step(self, step: Step) -> None:
        """Record what is about to be done; on the disk when this returns."""
        with _told():
            if self._descriptor < 0:
                self._begin()
            texts = {"path": str(step.path), "kept": str(step.kept)}
            numbers = {
                name: getattr(step, name) for name in ("sha256", "size", "inode", "mode", "mtime_ns", "uid", "gid")
            }
            self._write({"record": "step", **texts, **numbers})

    def note(self, record: str, step: Step) -> None:
        """Record that a step failed, is being undone ("undoing"), or is undone."""
        with _told():
            self._write({"record": record, "path": str(step.path)})

    def _begin(self) -> None:
        numbers = [_number(path) for path in _folder().glob("*.jsonl") if path.stem.isdecimal()]
        self._open(max(numbers, default=0) + 1, os.O_CREAT | os.O_EXCL)
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        self._write({"record": "run", "version": VERSION, "link": self._link, "time": now})
        with contextlib.suppress(OSError):  # not every system syncs folders
            descriptor = os.open(_folder(), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def _open(self, number: int, flags: int) -> None:
        path = _folder() / f"{number:04}.jsonl"
        self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | getattr(os, "O_BINARY", 0) | flags, 0o666)
        self.number = number
        whole = path.read_bytes().rfind(b"\n") + 1
        os.ftruncate(self._descriptor, whole)  # a line that a power cut tore

    def _write(self, record: dict[str, Any]) -> None:
        line = memoryview(json.dumps(record).encode("ascii") + b"\n")  # half surrogates of names are escaped
        while line:
            line = line[os.write(self._descriptor, line) :]
        os.fsync(self._descriptor)


def _folder() -> Path:
    return data_folder() / "dedupe"


def _number(path: Path) -> int:
    return int(path.stem)


def _read(path: Path) -> DedupeRun | None:
    """A run from its record; None where no step of it was taken."""
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline, a power cut tore
    if not lines:
        return None
    try:
        head, *records = [json.loads(line) for line in lines]
        if head["version"] != VERSION:
            raise EnvironmentFault("A newer mergekit-sd kept this record.", file=path, hint="update mergekit-sd")
        steps: dict[str, Step] = {}
        pending: dict[str, Step] = {}
        under_way: Step | None = None
        for record in records:
            kind, name = record.pop("record"), record["path"]
            if kind == "step":
                steps[name] = pending[name] = _step(record)
            under_way = steps[name] if kind in ("step", "undoing") else None
            if kind in ("failed", "undone"):
                pending.pop(name, None)
            if kind == "failed":
                del steps[name]
        if not steps:
            return None
        time = datetime.datetime.fromisoformat(head["time"])
        return DedupeRun(_number(path), head["link"], time, tuple(steps.values()), tuple(pending.values()), under_way)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        hint = "what it says cannot be undone here; move the file away"
        raise EnvironmentFault("The record of a dedupe is damaged.", file=path, hint=hint) from error


def _step(record: dict[str, Any]) -> Step:
    return Step(**{**record, "path": Path(record["path"]), "kept": Path(record["kept"])})


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        message = f"The record of what is done cannot be kept here: {error.strerror}."
        raise NotWritable(message, file=_folder(), hint=f"check the disk, or set {DATA_VARIABLE}") from error
