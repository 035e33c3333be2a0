"""The VAEs below some folders, wherever they are: files of their own, and baked into checkpoints.

Owns which are one VAE, and their names. Comparing bytes and replacing files is `dedupe`'s.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from mergekit_sd.errors import Cancelled, InputError, UsageError
from mergekit_sd.events import CancelToken, Listener, Noted, ignore
from mergekit_sd.library.duplicates import by_hash
from mergekit_sd.library.entry import WEIGHTS, LibraryEntry
from mergekit_sd.library.events import HashingProgressed, HashingStarted
from mergekit_sd.library.index import Library
from mergekit_sd.library.known import hashes_by_kind, known_file_hashes
from mergekit_sd.library.published import published_name
from mergekit_sd.library.scan import PROGRESS_SECONDS, scan_library

VAE_WEIGHTS = WEIGHTS + "vae"


@dataclass(frozen=True, slots=True)
class VaeGroup:
    """One VAE, and the files that hold it in the order of their paths.

    `hash` is its weights hash: one for every container and dtype. `name` is what a published VAE is known as.
    """

    hash: str
    name: str | None
    entries: tuple[LibraryEntry, ...]

    @property
    def files(self) -> tuple[LibraryEntry, ...]:
        """Those that are a VAE and nothing else."""
        return tuple(entry for entry in self.entries if is_vae_file(entry))

    def as_json(self) -> dict[str, object]:
        """The group as plain data."""
        return {
            "hash": self.hash,
            "name": self.name,
            "files": [str(entry.path) for entry in self.entries],
            "members": [_member(entry) for entry in self.entries],
        }


@dataclass(frozen=True, slots=True)
class VaeList:
    """Every VAE that was found, what is held by most files first; and the files that cannot be read."""

    groups: tuple[VaeGroup, ...]
    unreadable: tuple[LibraryEntry, ...]

    def as_json(self) -> dict[str, object]:
        """The list as plain data."""
        return {
            "groups": [group.as_json() for group in self.groups],
            "unreadable": [{"path": str(entry.path), "error": entry.error} for entry in self.unreadable],
        }


def list_vaes(
    folders: Collection[str | Path],
    *,
    threads: int | None = None,
    on_event: Listener = ignore,
    cancel: CancelToken | None = None,
) -> VaeList:
    """The VAEs below some folders, by their weights. What is not in the index yet is read first.

    Of VAE files the sha256 is made as well: published ones are known by it. Raises UsageError for what is no
    folder, and Cancelled.
    """
    if not folders:
        raise UsageError("No folder is named.", hint="name the folders to look in")
    report = scan_library(folders, hashes="vae", threads=threads, on_event=on_event, cancel=cancel)
    with Library() as library:
        found = [entry for entry in library.entries(report.folders) if VAE_WEIGHTS in entry.hashes]
    found = _with_sha256([entry for entry in found if entry.is_current()], on_event, cancel)
    groups = []
    with Library() as library:
        for value, members in by_hash(found, VAE_WEIGHTS).items():
            name = published_name([*members, *library.with_hash(value, [VAE_WEIGHTS])], "vae")
            groups.append(VaeGroup(value, name, tuple(members)))
    groups.sort(key=lambda group: (-len(group.entries), group.name or "~", group.entries[0].path))
    return VaeList(tuple(groups), tuple(report.unreadable))


def is_vae_file(entry: LibraryEntry) -> bool:
    """Whether a file is a VAE, not a checkpoint that holds one."""
    return entry.kind == "vae"


def _with_sha256(entries: list[LibraryEntry], on_event: Listener, cancel: CancelToken | None) -> list[LibraryEntry]:
    """The entries, those of VAE files with their sha256."""
    lacking = {entry.path: entry for entry in entries if is_vae_file(entry) and "sha256" not in entry.hashes}
    advance = Advance(len(lacking), sum(entry.state.size for entry in lacking.values()), on_event, cancel)
    for path, entry in lacking.items():
        try:
            found = hashes_by_kind(known_file_hashes(path, advance))
        except InputError as error:
            on_event(Noted(f"{path} was not hashed: {error.message}"))
        else:
            lacking[path] = replace(entry, hashes={**entry.hashes, **found})
    return [lacking.get(entry.path, entry) for entry in entries]


class Advance:
    """Takes numbers of bytes; tells their sum now and then, and raises Cancelled once that is asked for."""

    def __init__(self, files: int, nbytes: int, on_event: Listener, cancel: CancelToken | None) -> None:
        self._tell, self._cancel = on_event, cancel
        self._done, self._bytes = 0, nbytes
        self._begun = self._last = time.monotonic()
        if files:
            on_event(HashingStarted(files, nbytes))

    def __call__(self, nbytes: int) -> None:
        """So many more bytes are done."""
        if self._cancel and self._cancel.cancelled:
            raise Cancelled
        self._done += nbytes
        now = time.monotonic()
        if now - self._last > PROGRESS_SECONDS:
            self._last = now
            self._tell(HashingProgressed(self._done, max(self._bytes, self._done), now - self._begun))


def _member(entry: LibraryEntry) -> dict[str, object]:
    return {
        "path": str(entry.path),
        "kind": entry.kind,
        "architecture": entry.architecture,
        "size": entry.state.size,
        "vae_bytes": entry.components["vae"],
        "sha256": entry.hashes.get("sha256"),
    }
