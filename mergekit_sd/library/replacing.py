"""A file replaced by a link to an equal one, or deleted: compared once more, recorded, then done by one rename.

Owns every call that does it. Must not choose what is replaced.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import signal
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, TypeAlias

from mergekit_sd.errors import TargetLocked
from mergekit_sd.formats.claims import WINDOWS, claim
from mergekit_sd.formats.reading import file_state
from mergekit_sd.formats.tensor import FileState
from mergekit_sd.library import reflink
from mergekit_sd.library.journal import Journal, Step
from mergekit_sd.text import shown

Link: TypeAlias = Literal["hard", "sym", "reflink", "delete"]

PIECE = 4 << 20  # bytes per read
KEPT = "the kept file"
OTHER_DISK = "it is on another disk than the kept file"
_NO_REFLINKS = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY, errno.ENOSYS)


class Refused(Exception):
    """Why one file is left as it is; `failed` where it is the system that refuses."""

    def __init__(self, reason: str, *, failed: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.failed = failed


@dataclass(frozen=True, slots=True)
class Pair:
    """A file to replace and the one to keep, and both as they were looked at."""

    path: Path
    state: FileState
    kept: Path
    kept_state: FileState


def replace_file(pair: Pair, link: Link, journal: Journal, on_bytes: Callable[[int], None]) -> None:
    """Replace or delete a file that is byte for byte equal to the kept one.

    Raises Refused, and leaves everything as it was, if it is not, if either has changed or is being written
    to, or if the system refuses.
    """
    step: Step | None = None
    try:
        with contextlib.ExitStack() as stack:
            kept = stack.enter_context(_held(pair.kept, pair.kept_state, KEPT))
            other = stack.enter_context(_held(pair.path, pair.state, "it"))
            step = _step(pair, os.fstat(other.fileno()), _digest(kept, other, on_bytes))
            os.fsync(kept.fileno())  # it may have been downloaded a moment ago
            journal.step(step)
            if WINDOWS:
                stack.close()  # open files can be neither replaced nor removed there
            _check(pair.kept, pair.kept_state, KEPT)
            _check(pair.path, pair.state, "it")
            _take(step, link, pair, kept)
    except (Refused, OSError) as error:
        if step:
            journal.note("failed", step)
        if isinstance(error, Refused):
            raise
        raise Refused(_words(error, link), failed=error.errno != errno.EXDEV) from error


def _take(step: Step, link: Link, pair: Pair, kept: BinaryIO) -> None:
    """What the step says; the rename comes last."""
    if link == "delete":
        step.path.unlink()
        return
    try:
        _make(step, link, kept)
    except (FileExistsError, TargetLocked):
        raise Refused(f"{shown(step.temporary.name)} is there: another run's, or left by one", failed=True) from None
    try:
        _check(step.kept if link == "reflink" else step.temporary, pair.kept_state, KEPT)
        _check(step.path, pair.state, "it")
        step.temporary.replace(step.path)
    finally:
        step.temporary.unlink(missing_ok=True)  # also where a rename onto a link of the same file did nothing


def _make(step: Step, link: Link, kept: BinaryIO) -> None:
    """What replaces the file, under its temporary name."""
    if link == "hard":
        os.link(step.kept, step.temporary)
    elif link == "sym":
        step.temporary.symlink_to(os.path.relpath(step.kept, step.path.parent))
    else:
        _clone(step, kept)


def _clone(step: Step, kept: BinaryIO) -> None:
    """A file that shares its bytes with the kept one, with the owner, times and permissions of the one replaced."""
    descriptor = claim(step.temporary, step.path)
    try:
        os.fchown(descriptor, step.uid, step.gid)
        os.fchmod(descriptor, step.mode)  # before there is anything to read
        reflink.clone(kept.fileno(), descriptor)
        shutil.copystat(step.path, step.temporary)
        os.fsync(descriptor)
    except BaseException:
        step.temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _held(path: Path, state: FileState, whose: str) -> Iterator[BinaryIO]:
    """The file, opened; while it is, nobody can begin to write to it, where the system can see to that."""
    _check(path, state, whose)
    if os.path.realpath(path) != str(path):
        raise Refused(f"{whose} is reached through a link by now")
    with path.open("rb") as file:
        if file_state(os.fstat(file.fileno())) != state:
            raise Refused(f"{whose} has changed meanwhile")
        if not _keep_writers_out(file.fileno()):
            raise Refused(f"another program has {whose} open to write")
        yield file


def _check(path: Path, state: FileState, whose: str) -> None:
    try:
        if file_state(path.stat()) == state:
            return
    except OSError:
        pass
    raise Refused(f"{whose} has changed meanwhile")


def _keep_writers_out(descriptor: int) -> bool:
    """Whether nobody has the file open to write; who wants to waits until it is closed. Only Linux knows."""
    try:
        import fcntl

        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)  # does nothing; the usual SIGIO would end us
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except (ImportError, AttributeError):
        return True
    except OSError as error:  # any other: not our file, or a file system without leases
        return error.errno != errno.EAGAIN
    return True


def _digest(kept: BinaryIO, other: BinaryIO, on_bytes: Callable[[int], None]) -> str:
    """The sha256 of two equal files, both read whole."""
    digest = hashlib.sha256()
    while True:
        piece = kept.read(PIECE)
        if other.read(PIECE) != piece:
            raise Refused("its bytes are not those of the kept file")
        if not piece:
            return digest.hexdigest()
        digest.update(piece)
        on_bytes(2 * len(piece))


def _step(pair: Pair, status: os.stat_result, sha256: str) -> Step:
    mode = stat.S_IMODE(status.st_mode)
    owner = status.st_uid, status.st_gid
    return Step(pair.path, pair.kept, sha256, status.st_size, status.st_ino, mode, status.st_mtime_ns, *owner)


def _words(error: OSError, link: Link) -> str:
    if error.errno == errno.EXDEV:
        return OTHER_DISK
    if link == "reflink" and error.errno in _NO_REFLINKS:
        return "this file system has no reflinks: take another --link"
    return f"the system says: {error.strerror or error}"
