"""The family of a model: its ancestors as far as the library has them, and the models made of it.

Owns what it means that a file is the model that a record names. How records are read is `lineage`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path, PurePosixPath

from mergekit_sd.errors import InputError
from mergekit_sd.formats.open import MODEL_SUFFIXES, open_model
from mergekit_sd.formats.tensor import FileState
from mergekit_sd.library.entry import LibraryEntry, whole_path
from mergekit_sd.library.finding import find_by_hash, find_by_name
from mergekit_sd.library.index import Library
from mergekit_sd.library.lineage import ABOVE, CUT, DEEPEST, LOOP, MOST, Ancestor, read_lineage
from mergekit_sd.library.store import library_file

NAME = "name"
# What a model is looked for by, the surest first.
_KINDS = ("content", "sha256", "autov3", "autov2", "autov1")


@dataclass(frozen=True, slots=True)
class Child:
    """A model whose metadata names another as its parent; `by`: the kind of hash, or "name"."""

    path: Path
    by: str

    def as_json(self) -> dict[str, object]:
        """One flat object."""
        return {"path": str(self.path), "by": self.by}


@dataclass(frozen=True, slots=True)
class FamilyTree:
    """A model with its ancestors, and what the library has that was made of it."""

    root: Ancestor
    children: tuple[Child, ...]

    def as_json(self) -> dict[str, object]:
        """The report as plain data."""
        return {**self.root.as_json(), "children": [child.as_json() for child in self.children]}


def family_tree(path: str | Path) -> FamilyTree:
    """The ancestors of a model, each looked up in the library, and the models made of it.

    A parent that the library has goes on with what its own metadata says. One is found by a hash, else by its
    name: then it may be another model of that name. Raises an InputError if the file cannot be read.
    """
    path = Path(path)
    file = open_model(path)
    entry = _entry_of(path)
    root = read_lineage(file.metadata, path.name)
    hashes = {kind: value for kind, value in entry.hashes.items() if kind in _KINDS} if entry else {}
    root = replace(root, path=whole_path(path), hashes=hashes)
    finder = _Finder()
    return FamilyTree(finder.expanded(root, (file.state,), 0), tuple(_children(path.name, file.state, hashes)))


def _entry_of(path: Path) -> LibraryEntry | None:
    if not library_file().exists():
        return None
    with Library() as library:
        entry = library.entry(whole_path(path))
    return entry if entry is not None and entry.is_current() else None


class _Finder:
    """Puts the library's files into a tree."""

    def __init__(self) -> None:
        self._left = MOST
        self._told: set[FileState] = set()
        self._by_hash = cache(find_by_hash)  # a base model is met again and again
        self._by_name = cache(find_by_name)

    def expanded(self, node: Ancestor, trail: tuple[FileState, ...], depth: int) -> Ancestor:
        """The same with its parents looked up; `trail`: the files that led here, `depth`: steps and models."""
        if node.parents and depth > DEEPEST:
            return replace(node, parents=(), note=CUT)
        parents: list[Ancestor] = []
        for parent in node.parents:
            self._left -= 1
            if self._left < 0:
                return replace(node, parents=tuple(parents), note=CUT)
            look = self.expanded if parent.step else self._model
            parents.append(look(parent, trail, depth + 1))
        return replace(node, parents=tuple(parents))

    def _model(self, said: Ancestor, trail: tuple[FileState, ...], depth: int) -> Ancestor:
        by, entry = self._found(said, trail)
        if entry is None:
            return self.expanded(said, trail, depth)
        node = replace(said, path=entry.path, found_by=by)
        if entry.state in trail:
            return replace(node, made="", parents=(), note=LOOP)
        own = _own_lineage(entry, said.name)
        if own.parents:
            node = replace(node, made=own.made, parents=own.parents, note=own.note)
        if not node.parents:
            return node
        if entry.state in self._told:
            return replace(node, made="", parents=(), note=ABOVE)
        self._told.add(entry.state)
        return self.expanded(node, (*trail, entry.state), depth)

    def _found(self, said: Ancestor, trail: tuple[FileState, ...]) -> tuple[str, LibraryEntry | None]:
        """The library's file that a record means, and how it is known. By its name never a descendant."""
        for kind in _KINDS:
            if kind in said.hashes:
                same = [each for each in self._by_hash(said.hashes[kind]) if not _contradicts(said.hashes, each.hashes)]
                if same:
                    return kind, same[0]
        for name in dict.fromkeys((said.name, _bare(said.name))):
            named = [each for each in self._by_name(name) if not _contradicts(said.hashes, each.hashes)]
            entry = next((each for each in named if each.state not in trail), None)
            if entry is not None:
                return NAME, entry
        return NAME, None


def _own_lineage(entry: LibraryEntry, name: str) -> Ancestor:
    """What a file's own metadata says; nothing where it cannot be read any more."""
    try:
        return read_lineage(open_model(entry.path).metadata, name)
    except InputError:
        return Ancestor(name)


def _contradicts(said: Mapping[str, str], known: Mapping[str, str]) -> bool:
    """Whether hashes of whole files differ. (Our recipes' content hashes are of what was used of a file.)"""
    sha256 = known.get("sha256")
    if sha256 is None:
        return False
    return not sha256.startswith(said.get("sha256") or said.get("autov2") or "")


def _children(name: str, state: FileState, hashes: Mapping[str, str]) -> Iterator[Child]:
    """The models that name this one as a parent, in the order of their paths."""
    if not library_file().exists():
        return
    with Library() as library:
        every = library.entries()
    stem = _stem(name)
    for entry in every:
        if entry.parents and entry.state != state:
            found = [by for parent in entry.parents if (by := _means(parent, stem, hashes))]
            if found and entry.is_current():
                yield Child(entry.path, min(found, key=lambda by: by == NAME))


def _means(parent: Mapping[str, str], stem: str, hashes: Mapping[str, str]) -> str | None:
    """By what a record of a parent means the model of this name and these hashes; None if by nothing."""
    for kind in _KINDS:
        known = hashes.get("sha256" if kind == "autov2" else kind, "")
        if kind in parent and known.startswith(parent[kind]):
            return kind
    return NAME if _stem(parent["name"]) == stem and not _contradicts(parent, hashes) else None


def _stem(name: str) -> str:
    """A name as records spell it in several ways: without folders, suffix and case."""
    bare = PurePosixPath(_bare(name))
    return (bare.stem if bare.suffix in MODEL_SUFFIXES else bare.name).casefold()


def _bare(name: str) -> str:
    """A name without folders, and without the root in "webui:name"."""
    return name.rpartition("/")[2].rpartition(":")[2]
