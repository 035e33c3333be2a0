"""What a file says of its tensors: frozen values, valid by construction. No bytes are read here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

from mergekit_sd.formats.dtypes import Dtype


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file. `offset` counts from the file's first byte, `nbytes` is its length."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        """How many elements; 1 for a scalar (shape `()`)."""
        return self.nbytes // self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class FileState:
    """What tells one state of a file on disk from another: compared before and after a run."""

    device: int
    inode: int
    size: int
    mtime_ns: int


ReadInto: TypeAlias = Callable[[memoryview, int], None]  # fill a buffer with the bytes at an offset


class View(Protocol):
    """Bytes that are made when they are read: `nbytes` of them from `start` on, beyond the end of the file."""

    @property
    def start(self) -> int:
        """The offset that stands for the first of them."""

    @property
    def nbytes(self) -> int:
        """How many they are."""

    def make(self, read: ReadInto) -> memoryview:
        """All of them; `read` reads the file."""


@dataclass(frozen=True, slots=True)
class FilePart:
    """One of the files that a model lies in; its first byte stands at the offset `start`."""

    path: Path
    state: FileState
    start: int


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A model file whose header has been read and checked, or a folder of them.

    `tensors` keeps the header's order. `format` is the container: "safetensors", "pickle" or "diffusers".
    `parts` are the files of a folder, one behind the other: `state.size` is the size of all. `views`
    are the tensors that do not lie in the file as they are, `notes` what people may want to know of it.
    `unread_tensors` lie in the file and are no part of the model (a training checkpoint's optimizer);
    `unread_bytes` is what they take.
    """

    path: Path
    format: str
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    state: FileState
    views: tuple[View, ...] = ()
    notes: tuple[str, ...] = ()
    unread_tensors: int = 0
    unread_bytes: int = 0
    parts: tuple[FilePart, ...] = ()
