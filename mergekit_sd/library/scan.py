"""A scan: headers of what is new or changed, then hashes of what has none, kept in the index as it goes.

Owns the order of things, and what is told on the way. Must not know who listens.

Headers come first, so that everything can be listed after seconds, though hashing takes as long as
reading the disk. Whatever ends a scan, what it has found by then is kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeAlias

from mergekit_sd.errors import Cancelled, InputError, UsageError
from mergekit_sd.events import CancelToken, Listener, Noted, ignore
from mergekit_sd.formats.hashing import file_hashes
from mergekit_sd.formats.reading import file_state
from mergekit_sd.formats.tensor import FileState
from mergekit_sd.library.digests import Hashes, Wanted, hash_files
from mergekit_sd.library.entry import NOWHERE, WEIGHTS, LibraryEntry, Opened, open_header, read_entry
from mergekit_sd.library.events import (
    FileGone,
    FileHashed,
    FileRead,
    HashingProgressed,
    HashingStarted,
    News,
    ScanReport,
)
from mergekit_sd.library.folders import existing_folder, model_folders
from mergekit_sd.library.index import Library
from mergekit_sd.library.known import hashes_by_kind
from mergekit_sd.library.walk import Walk

Level: TypeAlias = Literal["none", "vae", "all"]

COMMIT_SECONDS = 0.5
MOST_OPENED = 100_000  # tensors of headers that are kept from the first pass for the second: some 40 MB
PROGRESS_SECONDS = 0.1

# One file on the disk: its first path, and the entries of all its paths.
_Groups: TypeAlias = dict[Path, list[LibraryEntry]]


def scan_library(
    folders: Collection[str | Path] = (),
    *,
    hashes: Level = "all",
    sha256: bool = False,
    threads: int | None = None,
    on_event: Listener = ignore,
    cancel: CancelToken | None = None,
) -> ScanReport:
    """Bring the index up to date with some folders; without any, with all that are found or were scanned before.

    `hashes`: none; of the VAEs' weights, in whatever file they are; or of all tensors and components, which
    reads every byte once. `sha256` makes the hashes of whole files besides, in a pass of its own. Only what is
    new or changed is read. Events are told in this thread. Raises Cancelled; what was found by then is kept.
    """
    named = [existing_folder(folder) for folder in folders]
    with Library() as library:
        scan = _Scan(library, named or _known_folders(library), on_event, cancel)
        if library.renewed:
            scan.note("the library's file was damaged: it was put aside, and everything is read anew")
        library.note_folders(named)
        scan.read_headers()
        if hashes != "none":
            scan.make_hashes(hashes == "vae", threads)
        if sha256:
            scan.make_file_hashes()
        return scan.done()


def _known_folders(library: Library) -> list[Path]:
    found = [folder.path for folder in model_folders()]
    found += [folder for folder in library.folders() if folder.is_dir()]
    if not found:
        raise UsageError("No folders of models were found.", hint="name them: mergekit-sd library scan DIR")
    return list(dict.fromkeys(found))


class _Scan:
    """One scan under way."""

    def __init__(self, library: Library, folders: list[Path], on_event: Listener, cancel: CancelToken | None) -> None:
        self._library = library
        self._tell = on_event
        self._cancel = cancel
        self._begun = time.monotonic()
        self._entries: dict[Path, LibraryEntry] = {}  # what it has come across
        self._by_state: dict[FileState, LibraryEntry] = {}
        self._opened: dict[Path, Opened] = {}
        self._room = MOST_OPENED
        self._hashed: set[Path] = set()
        self._report = ScanReport(tuple(folders))

    def done(self) -> ScanReport:
        """The report, complete."""
        self._report.files = len(self._entries)
        self._report.hashed = len(self._hashed)
        self._report.unreadable = [entry for entry in self._entries.values() if entry.error]
        self._report.seconds = time.monotonic() - self._begun
        return self._report

    def note(self, message: str) -> None:
        """Tell of something odd, and keep it for the report."""
        self._report.notes.append(message)
        self._tell(Noted(message))

    def _check(self) -> None:
        if self._cancel and self._cancel.cancelled:
            raise Cancelled

    # --- headers ---

    def read_headers(self) -> None:
        """All files of the folders into the index; those that are gone out of it."""
        known = {entry.path: entry for entry in self._library.entries(self._report.folders)}
        walk = Walk(self._report.folders, self._check)
        self._read_each(walk, known)
        for folder, reason in walk.unreadable.items():
            self.note(f"{folder} cannot be looked into: {reason}")
        gone = [path for path in known if path not in self._entries and not walk.hides(path)]
        self._library.drop(gone)
        self._report.gone = len(gone)
        for path in gone:
            self._tell(FileGone(str(path)))

    def _read_each(self, walk: Walk, known: dict[Path, LibraryEntry]) -> None:
        outdated = self._library.outdated()
        fresh: list[LibraryEntry] = []
        last = time.monotonic()
        try:
            for path in walk:
                self._check()
                news, entry = self._look(path, known.get(path), path in outdated)
                if entry is not known.get(path):
                    fresh.append(entry)
                self._count(news, entry)
                if time.monotonic() - last > COMMIT_SECONDS:
                    self._library.keep(fresh)
                    fresh, last = [], time.monotonic()
        finally:
            self._library.keep(fresh)

    def _look(self, path: Path, old: LibraryEntry | None, outdated: bool) -> tuple[News, LibraryEntry]:
        """What is known of a file; its header is read where that is not of this very state of it."""
        state = _state(path)
        if old is None or old.state != state:
            twin = self._twin(state)
            entry = self._read(path) if twin is None else replace(twin, path=path)
            return "new" if old is None else "changed", entry
        # What could not be read may have been mended without a trace: rights, another version of ours.
        if outdated or old.error:
            kept = {kind: value for kind, value in old.hashes.items() if not kind.startswith(WEIGHTS)}
            return "same", replace(self._read(path), hashes=kept)
        return "same", old

    def _twin(self, state: FileState) -> LibraryEntry | None:
        """The same file under another path: a hard link, or where it was before it moved."""
        if not state.inode:
            return None
        twin = self._by_state.get(state) or self._library.same_file(state)
        return None if twin is None or twin.error else twin

    def _read(self, path: Path) -> LibraryEntry:
        entry, opened = read_entry(path)
        if opened is not None and len(opened.model.tensors) <= self._room:
            self._room -= len(opened.model.tensors)
            self._opened[path] = opened
        return entry

    def _count(self, news: News, entry: LibraryEntry) -> None:
        self._entries[entry.path] = self._by_state[entry.state] = entry
        self._report.new += news == "new"
        self._report.changed += news == "changed"
        self._tell(FileRead(news, entry))

    # --- hashes ---

    def make_hashes(self, vae_only: bool, threads: int | None) -> None:
        """The hashes that files lack, one file after the other as they lie in their folders."""
        lacks = _lacks_vae if vae_only else _lacks_any
        groups = self._groups(lacks)
        sizes = [each[0].components["vae"] if vae_only else each[0].state.size for each in groups.values()]
        advance = self._progress(len(groups), sum(sizes))

        def keep(wanted: Wanted, found: Hashes | InputError) -> None:
            self._keep(groups[wanted.opened.model.path], found)

        hash_files(self._wanted(groups, vae_only, lacks), keep, advance, threads)

    def _wanted(self, groups: _Groups, vae_only: bool, lacks: Callable[[LibraryEntry], bool]) -> Iterator[Wanted]:
        for path, entries in groups.items():
            self._check()
            twin = self._library.same_file(entries[0].state)  # another scan, of another path, may have been here
            if twin is not None and not lacks(twin):
                self._keep(entries, dict(twin.hashes))
                continue
            try:
                opened = self._opened.pop(path, None) or open_header(path)
            except InputError as error:
                self._keep(entries, error)
            else:
                yield Wanted(opened, vae_only)

    def make_file_hashes(self) -> None:
        """sha256 and its kin; of what is no model we can read, too: it may be known by it."""
        groups = self._groups(lambda entry: entry.state.size > 0 and "sha256" not in entry.hashes)
        advance = self._progress(len(groups), sum(entries[0].state.size for entries in groups.values()))
        for path, entries in groups.items():
            try:
                found = file_hashes(path, advance)
            except InputError as error:
                self._keep(entries, error)
                continue
            self._keep(entries, hashes_by_kind(found))

    def _groups(self, lacks: Callable[[LibraryEntry], bool]) -> _Groups:
        """The files that lack hashes."""
        groups: dict[object, list[LibraryEntry]] = {}
        for entry in self._entries.values():
            if lacks(entry):
                groups.setdefault(entry.state if entry.state.inode else entry.path, []).append(entry)
        return {entries[0].path: entries for entries in groups.values()}

    def _keep(self, entries: list[LibraryEntry], found: Hashes | InputError) -> None:
        """The hashes of one file, under each of its paths."""
        if isinstance(found, InputError):
            self.note(f"{entries[0].path} was not hashed: {found.message}")
            return
        self._library.add_hashes(entries, found)
        self._hashed.add(entries[0].path)
        for entry in entries:
            hashed = replace(entry, hashes={**entry.hashes, **found})
            self._entries[entry.path] = hashed
            self._tell(FileHashed(hashed))

    def _progress(self, files: int, total: int) -> Callable[[int], None]:
        """Takes numbers of bytes; tells their sum now and then, and sees a cancel."""
        begun = last = time.monotonic()
        done = 0
        if files:
            self._tell(HashingStarted(files, total))

        def advance(nbytes: int) -> None:
            nonlocal done, last
            self._check()
            done += nbytes
            self._report.hashed_bytes += nbytes
            now = time.monotonic()
            if now - last > PROGRESS_SECONDS:
                last = now
                self._tell(HashingProgressed(done, max(total, done), now - begun))

        return advance


def _state(path: Path) -> FileState:
    try:
        return file_state(path.stat())
    except (OSError, ValueError):
        return NOWHERE


def _lacks_vae(entry: LibraryEntry) -> bool:
    return "vae" in entry.components and WEIGHTS + "vae" not in entry.hashes


def _lacks_any(entry: LibraryEntry) -> bool:
    wanted = ["content", *(WEIGHTS + component for component in entry.components)]
    return not entry.error and any(kind not in entry.hashes for kind in wanted)
