"""One model file as the index knows it: what its header says, and the hashes made so far.

Owns that value and how it is read from a file. Must not know the index.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mergekit_sd.architectures import Layout, Place, Role, detect
from mergekit_sd.errors import InputError
from mergekit_sd.formats.open import open_model
from mergekit_sd.formats.reading import file_state
from mergekit_sd.formats.tensor import FileState, ModelFile, TensorInfo
from mergekit_sd.inspection.naming import bare_name
from mergekit_sd.inspection.position_ids import position_ids
from mergekit_sd.library.lineage import named_parents

NOWHERE = FileState(0, 0, 0, 0)
LONGEST = 500  # characters kept of a title
UNREADABLE = "unreadable"
WEIGHTS = "weights:"  # begins the kind of a component's weights hash


@dataclass(frozen=True, slots=True)
class LibraryEntry:
    """A model file. `error` says why nothing is known of one that cannot be read.

    `components` gives the bytes of each component that has weights. `title` is ModelSpec's,
    `trained_as` the name that a trainer gave it. `hashes` are by kind: "content", "weights:vae", and
    where they were asked for "sha256", "autov1", "autov3". `parents` are the models that its metadata says
    it was made of: of each the name, and its hashes by kind.
    """

    path: Path
    state: FileState = NOWHERE
    format: str | None = None
    kind: str = "unknown"
    architecture: str | None = None
    dtypes: Mapping[str, int] = field(default_factory=dict)
    components: Mapping[str, int] = field(default_factory=dict)
    ema: int = 0
    junk: int = 0
    position_ids: str | None = None
    title: str | None = None
    trained_as: str | None = None
    error: str | None = None
    parents: Sequence[Mapping[str, str]] = field(default_factory=list)
    hashes: Mapping[str, str] = field(default_factory=dict)

    @property
    def what(self) -> str:
        """The kind, or that it cannot be read."""
        return UNREADABLE if self.error else self.kind

    @property
    def content(self) -> str | None:
        """The content hash, once made."""
        return self.hashes.get("content")

    @property
    def modified(self) -> datetime.datetime:
        """When the file was last written, by the local clock."""
        try:
            return datetime.datetime.fromtimestamp(self.state.mtime_ns / 1e9)
        except (ValueError, OverflowError, OSError):  # a file system may say any number
            return datetime.datetime.fromtimestamp(0)

    def is_current(self) -> bool:
        """Whether the file is still as it was when it was read."""
        try:
            return file_state(self.path.stat()) == self.state
        except (OSError, ValueError):
            return False

    def as_json(self) -> dict[str, object]:
        """One object, as the commands print it."""
        return {
            "path": str(self.path),
            "size": self.state.size,
            "modified": self.modified.isoformat(timespec="seconds"),
            "format": self.format,
            "kind": self.kind,
            "architecture": self.architecture,
            "title": self.title,
            "trained_as": self.trained_as,
            "dtypes": dict(self.dtypes),
            "components": dict(self.components),
            "ema": self.ema,
            "junk": self.junk,
            "position_ids": self.position_ids,
            "parents": [dict(parent) for parent in self.parents],
            "hashes": dict(self.hashes),
            "error": self.error,
        }


@dataclass(frozen=True, slots=True)
class Opened:
    """A file whose header has been read, for who goes on to its bytes."""

    model: ModelFile
    layout: Layout

    def weights(self) -> dict[str, tuple[str, str]]:
        """What weights hashes are made of: component and name without prefix, by stored name."""
        found: dict[str, tuple[str, str]] = {}
        for stored, tensor in self.model.tensors.items():
            if _is_weight(self.layout.places[self.layout.canonical[stored]], tensor):
                component, name = bare_name(self.layout, stored)
                if component is not None:
                    found[stored] = component, name
        return found


def whole_path(path: Path) -> Path:
    """A path as the index has it: from the root, a link at its end not followed."""
    return path.parent.resolve() / path.name


def open_header(path: Path) -> Opened:
    """A file's header. Raises an InputError if it cannot be read."""
    model = open_model(path)
    return Opened(model, detect(model.tensors))


def read_entry(path: Path) -> tuple[LibraryEntry, Opened | None]:
    """What a file's header says; an entry with the reason where it cannot be read."""
    try:
        state = file_state(path.stat())
    except (OSError, ValueError):
        state = NOWHERE
    try:
        opened = open_header(path)
        return entry_of(opened), opened
    except InputError as error:
        return LibraryEntry(path, state, error=error.message), None


def entry_of(opened: Opened) -> LibraryEntry:
    """What an opened file's header says."""
    model, layout = opened.model, opened.layout
    ids = position_ids(model, layout)
    dtypes: dict[str, int] = {}
    components: dict[str, int] = dict.fromkeys(layout.prefixes, 0)
    weighty: set[str] = set()
    shares = dict.fromkeys(Role, 0)
    for stored, tensor in model.tensors.items():
        place = layout.places[layout.canonical[stored]]
        dtypes[tensor.dtype.name] = dtypes.get(tensor.dtype.name, 0) + 1
        shares[place.role] += tensor.nbytes
        if place.component is not None:
            components[place.component] = components.get(place.component, 0) + tensor.nbytes
            if _is_weight(place, tensor):
                weighty.add(place.component)
    return LibraryEntry(
        model.path,
        model.state,
        format=model.format,
        kind=layout.kind,
        architecture=None if layout.architecture is None else layout.architecture.name,
        dtypes=dtypes,
        components={name: nbytes for name, nbytes in components.items() if name in weighty},
        ema=shares[Role.ema],
        junk=shares[Role.junk],
        position_ids=None if ids is None else ids.state,
        title=_cut(model.metadata.get("modelspec.title")),
        trained_as=_cut(model.metadata.get("ss_output_name")),
        parents=named_parents(model.metadata),
    )


def _is_weight(place: Place, tensor: TensorInfo) -> bool:
    """Whether a tensor counts for its component's weights hash (as in `inspection.identity`)."""
    return place.role == Role.weight and tensor.dtype.is_float


def _cut(text: str | None) -> str | None:
    return text[:LONGEST] if text else None
