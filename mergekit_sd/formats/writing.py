"""Outputs that appear whole or not at all.

Owns every call that changes the disk: the temporary file beside the target, its lock,
preallocation, positional writes, kernel copies, flushing, the rename. Must not know what the
bytes mean.

Where a platform lacks a call (`copy_file_range`, `posix_fallocate`, `flock`), the fallback below
it does the same through a buffer, by size, or with the platform's own lock.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from mergekit_sd.errors import DiskFull, EnvironmentFault, NotWritable, TargetBusy, UsageError
from mergekit_sd.formats import claims
from mergekit_sd.formats.claims import LONGEST_NAME, claim, is_still, sweep, temporary_name
from mergekit_sd.formats.reading import InputFile, Positional
from mergekit_sd.text import shown, size

COPY_PIECE = 1 << 20
RENAME_TRIES = 20
RENAME_PAUSE = 0.05  # seconds: on Windows, virus scanners hold a new file for a moment
FLUSH_INTERVAL = 0.15  # seconds between flushes behind the writers

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_FOLDER_SYNC = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES, errno.EPERM)


def free_bytes(folder: Path) -> int:
    """Bytes that this user can still write on the folder's disk."""
    return shutil.disk_usage(folder).free


def check_target(target: Path) -> None:
    """Only a regular file is replaced: no folder, device, pipe, or loop of links."""
    try:
        mode = Path(os.path.realpath(target)).lstat().st_mode
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UsageError("The output's name is too long.", file=target, hint="choose a shorter one") from None
        return  # not there yet; what else is wrong, `check_folder` tells
    if stat.S_ISDIR(mode):
        raise UsageError("The output is a folder.", file=target, hint="name a file in it")
    if stat.S_ISLNK(mode):
        raise UsageError("The output is a loop of links.", file=target, hint="remove the links, or name another file")
    if not stat.S_ISREG(mode):
        raise UsageError("The output is a device or a pipe, not a file.", file=target, hint="name a regular file")


def check_folder(folder: Path, needed: int) -> None:
    """Before any work: the folder exists, can be written to, and has `needed` bytes free."""
    try:
        if not folder.is_dir():
            raise NotWritable(
                "The output's folder does not exist.", file=folder, hint="create it, or name another output"
            )
        if not os.access(folder, os.W_OK | os.X_OK):
            raise NotWritable("The output's folder cannot be written to.", file=folder, hint="check its permissions")
        free = free_bytes(folder)
    except OSError as error:
        message = f"The output's folder cannot be looked at: {error.strerror or error}."
        raise NotWritable(message, file=folder, hint="check the disk") from error
    if needed > free:
        raise DiskFull(
            f"The disk has too little room: {needed:,} bytes ({size(needed)}) needed, "
            f"{free:,} bytes ({size(free)}) free.",
            file=folder,
            hint="free some space, or write to another disk (--output-root)",
        )


class OutputFile:
    """A target file in the making: written to a temporary file beside it, shown by one rename.

    Use as a context manager: leaving it without `commit()` removes everything that was written.
    The temporary file is locked while it is written, so that a second writer of the same target
    is refused, and a later run can tell a killed run's leftovers and sweep them.
    """

    def __init__(self, target: Path, length: int) -> None:
        self.target = Path(os.path.realpath(target))  # a symlinked target is followed
        self.length = length
        folder = self.target.parent
        check_target(self.target)
        check_folder(folder, length)
        sweep(folder)
        self.temporary = folder / temporary_name(self.target.name)
        self._file = Positional(-1)
        self._flusher: _Flusher | None = None
        self._over = False
        try:
            with self._told():
                self._file.descriptor = claim(self.temporary, self.target)
                _preallocate(self._file.descriptor, length)
            self._flusher = _Flusher(self._file.descriptor)
        except BaseException:
            self.abort()
            raise

    def write(self, buffer: memoryview, offset: int) -> None:
        """Write all of `buffer` at `offset`; from any thread."""
        done = 0
        try:
            while done < len(buffer):
                done += self._file.write(buffer[done:], offset + done)
        except OSError as error:
            raise self._fault(error) from error

    def copy(self, source: InputFile, source_offset: int, offset: int, length: int) -> None:
        """Copy bytes from an input, in the kernel where it can."""
        done = 0
        while done < length:
            count = self._copy_in_kernel(source, source_offset + done, offset + done, length - done)
            if count == 0:
                break
            done += count
        buffer = bytearray(min(COPY_PIECE, length - done))
        while done < length:
            piece = memoryview(buffer)[: min(len(buffer), length - done)]
            source.read_into(piece, source_offset + done)
            self.write(piece, offset + done)
            done += len(piece)

    def _copy_in_kernel(self, source: InputFile, source_offset: int, offset: int, length: int) -> int:
        """How many bytes the kernel copied; after an error none, and the buffered copy tells whose fault it is."""
        there = source.in_file(source_offset) if hasattr(os, "copy_file_range") else None
        if there is None:
            return 0  # the kernel does not know views
        try:
            return os.copy_file_range(there[0], self._file.descriptor, length, there[1], offset)
        except OSError:
            return 0

    def sync(self) -> None:
        """Bring everything that was written onto the disk."""
        with self._told():
            if self._flusher:
                self._flusher.stop()
                if self._flusher.error:
                    raise self._flusher.error
            os.fsync(self._file.descriptor)

    def give_up(self) -> None:
        """Drop what is not on the disk yet, so that a sync under way in another thread ends at once."""
        with contextlib.suppress(OSError):
            os.ftruncate(self._file.descriptor, 0)

    def commit(self) -> None:
        """Make the finished, synced file appear under the target's name, at once and for good."""
        with self._told():
            if claims.WINDOWS:
                self._close()  # Windows renames only closed files
            self._rename()
            self._over = True
            sync_folder(self.target.parent)
            self._close()

    def _rename(self) -> None:
        for attempt in range(RENAME_TRIES):
            try:
                self.temporary.replace(self.target)
                return
            except PermissionError:
                if not claims.WINDOWS:
                    raise
                time.sleep(RENAME_PAUSE if attempt + 1 < RENAME_TRIES else 0)
        spare = _spare(self.target)
        self.temporary.replace(spare)
        self._over = True
        raise TargetBusy(
            f"Another program holds the target open, so the finished file is called {shown(spare.name)}.",
            file=self.target,
            hint="unload the old file there, then rename the finished one",
        )

    def abort(self) -> None:
        """Remove what was written, unless it is committed; the target stays as it was."""
        try:
            if not self._over and self._owns_temporary():
                self.give_up()
                if claims.WINDOWS:
                    self._close()  # Windows removes only closed files
                self.temporary.unlink(missing_ok=True)  # before the lock goes with the descriptor
        except OSError:
            pass  # a later run sweeps it
        finally:
            self._over = True
            with contextlib.suppress(OSError):
                self._close()

    def _owns_temporary(self) -> bool:
        """Whether the temporary name is still this file: an interrupt may have hidden that the rename was done."""
        if self._file.descriptor < 0:
            return claims.WINDOWS and self._flusher is not None  # closed to be renamed; never opened otherwise
        return is_still(self.temporary, self._file.descriptor)

    def _close(self) -> None:
        """Close the descriptor once nobody uses it: its number may be another file's a moment later."""
        if self._flusher:
            self._flusher.stop()
        descriptor, self._file.descriptor = self._file.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._fault(error) from error

    def _fault(self, error: OSError) -> EnvironmentFault:
        if error.errno not in _FULL:
            return NotWritable(f"Writing failed: {error.strerror or error}.", file=self.target, hint="check the disk")
        try:
            free = free_bytes(self.target.parent)
        except OSError:
            free = 0
        what, hint = "The disk or quota ran full", "free some space, or write to another disk (--output-root)"
        if error.errno == errno.EFBIG:
            what, hint = "A file of this size is not allowed here", "raise the limit (ulimit -f), or take another disk"
        return DiskFull(
            f"{what}: {self.length:,} bytes ({size(self.length)}) needed, "
            f"{free:,} bytes ({size(free)}) free. Nothing was left behind.",
            file=self.target,
            hint=hint,
        )

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.abort()


class _Flusher:
    """Flushes behind the writers, so that the last sync has little left to do.

    A write error that the kernel reports to a flush is reported once only: it is kept in `error`.
    """

    def __init__(self, descriptor: int) -> None:
        self.error: OSError | None = None
        self._descriptor = descriptor
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if hasattr(os, "fdatasync"):
            self._thread = threading.Thread(target=self._run, name="flusher", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(FLUSH_INTERVAL):
            try:
                os.fdatasync(self._descriptor)
            except OSError as error:
                self.error = error
                return

    def stop(self) -> None:
        """End it, and wait for a flush under way; `error` is final then."""
        self._stop.set()
        if self._thread:
            self._thread.join()


def _spare(target: Path) -> Path:
    """A name beside the target that no file has yet."""
    stem, number = target.stem, 1
    while True:
        name = f"{stem}.finished{'' if number == 1 else f'-{number}'}{target.suffix}"
        if stem and len(os.fsencode(name)) > LONGEST_NAME:
            stem = stem[:-1]
        elif target.with_name(name).exists():
            number += 1
        else:
            return target.with_name(name)


def _preallocate(descriptor: int, length: int) -> None:
    """Reserve the room, so that a full disk or quota shows before any work is done."""
    if claims.WINDOWS:
        return  # its `ftruncate` would write the whole length in zeros first
    if length and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, length)
            return
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
    os.ftruncate(descriptor, length)


def sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut. Windows has no such call and needs none."""
    if claims.WINDOWS:
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:  # file systems that cannot, folders that may not be read
            raise
