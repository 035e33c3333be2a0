"""What a scan tells while it goes on, and its report at the end.

Owns these values; must not know how a scan is done.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, TypeAlias

from mergekit_sd.events import Event
from mergekit_sd.library.entry import LibraryEntry

News: TypeAlias = Literal["new", "changed", "same"]


@dataclass(frozen=True, slots=True)
class FileRead(Event):
    """A file was come across; `entry` is what is known of it now, its `error` why nothing is."""

    kind: ClassVar[str] = "file"
    news: News
    entry: LibraryEntry

    def as_json(self) -> dict[str, object]:
        """The event as one flat object."""
        return {"event": self.kind, "news": self.news, **self.entry.as_json()}


@dataclass(frozen=True, slots=True)
class FileGone(Event):
    """A file is no longer there, and was forgotten."""

    kind: ClassVar[str] = "gone"
    path: str


@dataclass(frozen=True, slots=True)
class HashingStarted(Event):
    """All headers are read; so many files, and so many bytes of them, are to be hashed."""

    kind: ClassVar[str] = "hashing_started"
    files: int
    bytes: int


@dataclass(frozen=True, slots=True)
class HashingProgressed(Event):
    """`done` of `bytes` are hashed; `seconds` since hashing began."""

    kind: ClassVar[str] = "hashing_progress"
    done: int
    bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class FileHashed(Event):
    """A file has its hashes."""

    kind: ClassVar[str] = "hashed"
    entry: LibraryEntry

    def as_json(self) -> dict[str, object]:
        """The event as one flat object."""
        return {"event": self.kind, **self.entry.as_json()}


@dataclass
class ScanReport:
    """What a scan found: counts of files, those that cannot be read, and how much was hashed."""

    folders: tuple[Path, ...]
    files: int = 0
    new: int = 0
    changed: int = 0
    gone: int = 0
    hashed: int = 0
    hashed_bytes: int = 0
    seconds: float = 0.0
    unreadable: list[LibraryEntry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, object]:
        """The report as plain data."""
        return {
            "folders": [str(folder) for folder in self.folders],
            "files": self.files,
            "new": self.new,
            "changed": self.changed,
            "gone": self.gone,
            "hashed": self.hashed,
            "hashed_bytes": self.hashed_bytes,
            "seconds": self.seconds,
            "unreadable": [{"path": str(entry.path), "error": entry.error} for entry in self.unreadable],
            "notes": self.notes,
        }
