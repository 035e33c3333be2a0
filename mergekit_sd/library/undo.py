"""Undoing a dedupe: links become files of their own again, deleted files come back.

Owns how one step is undone, judged by what lies on the disk: a step may not have been taken, or be undone already.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mergekit_sd.errors import TargetLocked, UsageError
from mergekit_sd.events import CancelToken, Listener, ignore
from mergekit_sd.formats.claims import WINDOWS, claim
from mergekit_sd.library.dedupe import Skipped
from mergekit_sd.library.journal import DedupeRun, Journal, Step, dedupe_runs, exclusive
from mergekit_sd.library.replacing import PIECE, Refused
from mergekit_sd.library.vaes import Advance
from mergekit_sd.text import shown


@dataclass(frozen=True, slots=True)
class UndoReport:
    """What became of a run's files: `restored` as they were; `untouched` were so already; `refused`, and why."""

    run: int
    restored: tuple[Path, ...]
    untouched: tuple[Path, ...]
    refused: tuple[Skipped, ...]

    def as_json(self) -> dict[str, object]:
        """The report as plain data."""
        return {
            "run": self.run,
            "restored": [str(path) for path in self.restored],
            "untouched": [str(path) for path in self.untouched],
            "refused": [each.as_json() for each in self.refused],
        }


def undo_dedupe(
    run: int | None = None, *, on_event: Listener = ignore, cancel: CancelToken | None = None
) -> UndoReport:
    """Undo a dedupe by its number, or the last one that is not undone.

    Each file is a copy of its own again, with its time and permissions, in one step. Where its bytes are not to be
    had any more it is left as it is, and said why. May be called again after whatever ended it. Raises UsageError
    where there is nothing to undo, TargetLocked while a dedupe is under way, and Cancelled.
    """
    with exclusive():
        chosen = _chosen(run)
        restored: list[Path] = []
        untouched: list[Path] = []
        refused: list[Skipped] = []
        advance = Advance(len(chosen.pending), sum(step.size for step in chosen.pending), on_event, cancel)
        with Journal.of(chosen) as journal:
            for step in reversed(chosen.pending):
                advance(0)  # sees a cancel
                try:
                    (restored if _undo(step, chosen.link, journal, advance) else untouched).append(step.path)
                except Refused as error:
                    refused.append(Skipped(step.path, error.reason, error.failed))
                else:
                    journal.note("undone", step)
    return UndoReport(chosen.number, tuple(restored), tuple(untouched), tuple(refused))


def _chosen(number: int | None) -> DedupeRun:
    runs = {run.number: run for run in dedupe_runs()}
    if number is None:
        open_runs = [run for run in runs.values() if run.pending]
        if not open_runs:
            raise UsageError("There is no dedupe to undo.", hint="mergekit-sd library undo --list shows all of them")
        return open_runs[-1]
    if number not in runs:
        raise UsageError(f"There is no run {number}.", hint="mergekit-sd library undo --list shows all of them")
    return runs[number]


def _undo(step: Step, link: str, journal: Journal, advance: Callable[[int], None]) -> bool:
    """Bring a file back as it was; False where it is so already."""
    try:
        there = _lstat(step.path)
        source = _source(step, link, there)
        with _opened(source, step) as file:
            if there is not None and _is_own(there, step, link):
                _hashed(file, None, step, advance, source)
                return False
            journal.note("undoing", step)
            _restore(file, there, step, advance, source)
        return True
    except OSError as error:
        raise Refused(f"the system says: {error.strerror or error}", failed=True) from error


def _lstat(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except FileNotFoundError:
        return None


def _source(step: Step, link: str, there: os.stat_result | None) -> Path:
    """Where the bytes are to be had: in the file itself while it has any, else in the kept one."""
    if there is None:
        if link == "delete":
            return step.kept
        raise Refused("it is gone")
    if stat.S_ISREG(there.st_mode):
        return step.path
    if link == "sym" and os.path.realpath(step.path) == os.path.realpath(step.kept):
        return step.kept
    raise Refused("something else has its name by now")


def _opened(source: Path, step: Step) -> BinaryIO:
    try:
        if not source.is_file():
            raise FileNotFoundError
        return source.open("rb")
    except FileNotFoundError:
        raise Refused(f"the kept file is gone: {shown(str(step.kept))}") from None


def _is_own(there: os.stat_result, step: Step, link: str) -> bool:
    """Whether a file shares nothing with the kept one: never replaced, or undone already."""
    if stat.S_ISLNK(there.st_mode):
        return False
    if link in ("sym", "delete") or there.st_ino == step.inode:
        return True
    return link == "hard" and there.st_nlink == 1 and there.st_mtime_ns == step.mtime_ns


def _hashed(file: BinaryIO, target: int | None, step: Step, advance: Callable[[int], None], source: Path) -> None:
    """Read a file, copying it where there is a target: by reading and writing, so that no bytes are shared.

    Raises Refused where its bytes are not those on record.
    """
    digest = hashlib.sha256()
    while piece := file.read(PIECE):
        digest.update(piece)
        left = memoryview(piece)
        while target is not None and left:
            left = left[os.write(target, left) :]
        advance(len(piece))
    if digest.hexdigest() != step.sha256:
        whose = "its bytes" if source == step.path else f"the bytes of the kept file ({shown(str(source))})"
        raise Refused(f"{whose} have changed since")


def _restore(
    file: BinaryIO, there: os.stat_result | None, step: Step, advance: Callable[[int], None], source: Path
) -> None:
    """A copy with the former owner, permissions and time, in the place of the link."""
    try:
        descriptor = claim(step.temporary, step.path)
    except TargetLocked as error:
        raise Refused("another run is writing it", failed=True) from error
    try:
        if hasattr(os, "fchown"):
            with contextlib.suppress(PermissionError):  # only root gives files away
                os.fchown(descriptor, step.uid, step.gid)
        step.temporary.chmod(step.mode)
        _hashed(file, descriptor, step, advance, source)
        os.utime(step.temporary, ns=(step.mtime_ns, step.mtime_ns))
        os.fsync(descriptor)
        if WINDOWS:  # open files cannot be replaced there
            file.close()
            os.close(descriptor)
            descriptor = -1
        now = _lstat(step.path)
        if (now and (now.st_ino, now.st_mtime_ns)) != (there and (there.st_ino, there.st_mtime_ns)):
            raise Refused("it has changed meanwhile")
        step.temporary.replace(step.path)
    except BaseException:
        with contextlib.suppress(OSError):
            step.temporary.unlink()
        raise
    finally:
        if descriptor >= 0:
            os.close(descriptor)
