"""The temporary file beside a target, which is also the lock against a second writer.

Owns its name, creating and locking it, and sweeping those that killed runs left: what is locked is
alive, what is not is rubbish. Must not know what is written into it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import time
from pathlib import Path

from mergekit_sd.errors import TargetLocked
from mergekit_sd.text import shown

WINDOWS = os.name == "nt"
TEMPORARY_SUFFIX = ".mergekit-sd.tmp"
LONGEST_NAME = 255
CLAIM_TRIES = 10
CLAIM_PAUSE = 0.02  # seconds: a sweep looks at a file for far less

_WRITE_FLAGS = os.O_RDWR | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)


def sweep(folder: Path) -> None:
    """Remove the temporary files that killed runs left in a folder; those of live runs stay."""
    with contextlib.suppress(OSError):
        for path in folder.glob(f".*{TEMPORARY_SUFFIX}"):
            _sweep_one(path)


def _sweep_one(path: Path) -> None:
    with contextlib.suppress(OSError):
        if not stat.S_ISREG(path.lstat().st_mode):
            return
        descriptor = os.open(path, _WRITE_FLAGS)
        try:
            dead = _lock(descriptor) and is_still(path, descriptor)
            if dead and not WINDOWS:
                path.unlink()  # while it is locked: nobody can take it for their own
        finally:
            os.close(descriptor)
        if dead and WINDOWS:
            path.unlink()  # only closed files can be removed there, and none that another run has opened since


def temporary_name(name: str) -> str:
    """The name of a target's temporary file; hashed where it would be too long."""
    full = f".{name}{TEMPORARY_SUFFIX}"
    if len(os.fsencode(full)) <= LONGEST_NAME:
        return full
    return f".{hashlib.blake2b(os.fsencode(name), digest_size=16).hexdigest()}{TEMPORARY_SUFFIX}"


def claim(temporary: Path, target: Path) -> int:
    """Create and lock the temporary file; a live one of another run raises TargetLocked."""
    for _ in range(CLAIM_TRIES):
        try:
            descriptor = os.open(temporary, _WRITE_FLAGS | os.O_CREAT | os.O_EXCL, 0o666)  # mode by umask
        except FileExistsError:
            # A live run's; or a dead one's, that another run's sweep has locked for a moment.
            time.sleep(CLAIM_PAUSE)
            _sweep_one(temporary)
            continue
        # Between creating and locking, another run's sweep may take it for a leftover: try again.
        try:
            ours = _lock(descriptor) is not False and is_still(temporary, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        if ours:
            return descriptor
        os.close(descriptor)
    raise TargetLocked(
        "Another run is writing this file.",
        file=target,
        hint=f"wait for it; if none is running, delete {shown(temporary.name)} in that folder",
    )


def is_still(path: Path, descriptor: int) -> bool:
    """Whether the path still leads to the file that the descriptor holds."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    here = os.fstat(descriptor)
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)


def _lock(descriptor: int) -> bool | None:
    """Take the file's lock without waiting; released when the descriptor closes, or by death.

    True: taken. False: another process has it. None: this file system has no locks.
    """
    try:
        import fcntl
    except ImportError:
        return _lock_on_windows(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _lock_on_windows(descriptor: int) -> bool:
    import msvcrt

    try:
        os.lseek(descriptor, 1 << 40, os.SEEK_SET)  # a byte past the data: locked bytes cannot be read
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
    except OSError:
        return False
    return True
