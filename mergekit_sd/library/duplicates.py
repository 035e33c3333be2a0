"""What the user has more than once: equal files, and equal components in files that differ.

Owns the comparison, over hashes that are in the index. Must not read model files.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from mergekit_sd.library.entry import WEIGHTS, LibraryEntry
from mergekit_sd.library.folders import existing_folder
from mergekit_sd.library.index import Library
from mergekit_sd.library.published import published_name


@dataclass(frozen=True, slots=True)
class DuplicateGroup:
    """Files that are equal (`component` None), or that hold an equal component, in the order of their paths.

    `name` is what a published VAE or model is known as. Hard links and links are one file: `copies` counts
    what really lies on the disk, `repeated` is the bytes of all copies but the largest.
    """

    hash: str
    component: str | None
    name: str | None
    entries: tuple[LibraryEntry, ...]
    copies: int
    repeated: int

    def as_json(self) -> dict[str, object]:
        """The group as plain data."""
        return {
            "hash": self.hash,
            "component": self.component,
            "name": self.name,
            "copies": self.copies,
            "repeated": self.repeated,
            "files": [str(entry.path) for entry in self.entries],
        }


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Equal files, whose copies could go; and equal components of different files, what weighs most first.

    `unhashed` counts files that a scan has not hashed, `changed` those that are not as they were scanned:
    nothing is known of them.
    """

    files: tuple[DuplicateGroup, ...]
    components: tuple[DuplicateGroup, ...]
    unhashed: int
    changed: int

    @property
    def saves(self) -> int:
        """The bytes that equal files take besides one of each."""
        return sum(group.repeated for group in self.files)

    def as_json(self) -> dict[str, object]:
        """The report as plain data."""
        return {
            "files": [group.as_json() for group in self.files],
            "components": [group.as_json() for group in self.components],
            "saves": self.saves,
            "unhashed": self.unhashed,
            "changed": self.changed,
        }


def find_duplicates(folders: Collection[str | Path] = ()) -> Duplicates:
    """What is in the index more than once, or below some folders. Only files that are as they were scanned count."""
    with Library() as library:
        every = library.entries([existing_folder(folder) for folder in folders])
    current = [entry for entry in every if entry.is_current()]
    readable = [entry for entry in current if not entry.error]
    components = dict.fromkeys(name for entry in readable for name in entry.components)
    shared = [group for component in components for group in shared_components(readable, component)]
    return Duplicates(
        tuple(sorted(equal_files(readable), key=lambda group: -group.repeated)),
        tuple(sorted(shared, key=lambda group: -group.repeated)),
        unhashed=sum(1 for entry in readable if entry.content is None),
        changed=len(every) - len(current),
    )


def also_in(entry: LibraryEntry) -> dict[str, list[LibraryEntry]]:
    """The other files of the index with the same tensors ("content") and with the same weights, by component.

    Hard links of the file itself are left out, and of those with the same weights the ones that are equal.
    """
    found: dict[str, list[LibraryEntry]] = {}
    with Library() as library:
        for kind, value in entry.hashes.items():
            others = [each for each in library.with_hash(value, [kind]) if _file(each) != _file(entry)]
            if kind == "content":
                found[kind] = others
            elif kind.startswith(WEIGHTS):
                found[kind.removeprefix(WEIGHTS)] = [each for each in others if _content(each) != _content(entry)]
    return {name: others for name, others in found.items() if others}


def equal_files(entries: Iterable[LibraryEntry]) -> list[DuplicateGroup]:
    """The groups of files with the same tensors that lie on the disk more than once."""
    groups = []
    for value, members in by_hash(entries, "content").items():
        sizes = _sizes(members, _file, lambda entry: entry.state.size)
        if len(sizes) > 1:
            name = published_name(members)
            groups.append(DuplicateGroup(value, None, name, tuple(members), len(sizes), sum(sizes) - max(sizes)))
    return groups


def shared_components(entries: Iterable[LibraryEntry], component: str) -> list[DuplicateGroup]:
    """The groups of files that are not equal but have the same weights of a component."""
    groups = []
    for value, members in by_hash(entries, WEIGHTS + component).items():
        sizes = _sizes(members, _content, lambda entry: entry.components[component])
        if len(sizes) > 1:
            name = published_name(members, component)
            groups.append(DuplicateGroup(value, component, name, tuple(members), len(sizes), sum(sizes) - max(sizes)))
    return groups


def by_hash(entries: Iterable[LibraryEntry], kind: str) -> dict[str, list[LibraryEntry]]:
    """Entries by their hash of a kind; those without are left out."""
    found: dict[str, list[LibraryEntry]] = {}
    for entry in entries:
        if kind in entry.hashes:
            found.setdefault(entry.hashes[kind], []).append(entry)
    return found


def _sizes(
    members: Iterable[LibraryEntry], identity: Callable[[LibraryEntry], object], size: Callable[[LibraryEntry], int]
) -> list[int]:
    """The sizes of what is told apart by `identity`."""
    return list({identity(entry): size(entry) for entry in members}.values())


def _file(entry: LibraryEntry) -> object:
    """What links have in common."""
    try:
        status = entry.path.stat()
    except (OSError, ValueError):
        return entry.path
    return (status.st_dev, status.st_ino) if status.st_ino else entry.path


def _content(entry: LibraryEntry) -> object:
    return entry.content or _file(entry)
