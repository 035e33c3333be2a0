"""Where a pickle's tensors lie: as they are in the file, or as views that are made when read.

Owns the refusal of tensors that claim more than their storage holds. Must not know containers: these
say where a storage begins.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from mergekit_sd.errors import MalformedFile, WrongFormat
from mergekit_sd.formats.dtypes import DTYPES
from mergekit_sd.formats.header import byte_count
from mergekit_sd.formats.pickles.stream import DAMAGED
from mergekit_sd.formats.pickles.values import ITEMSIZES, Storage, StoredTensor
from mergekit_sd.formats.tensor import TensorInfo, View
from mergekit_sd.formats.views import Inflated, Strided
from mergekit_sd.text import shown, size

MAX_MADE = 4 << 30  # bytes that are held at once for a tensor that does not lie in the file as it is
ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Place:
    """Where a storage begins in the file, and how many bytes it has; and if it is compressed, into how many."""

    offset: int
    nbytes: int
    packed: int | None = None
    crc: int = 0


FindStorage = Callable[[Storage, str], Place]  # for the tensor of that name; raises MalformedFile


class Placing:
    """Gives tensors their offsets; `views` are those it had to make up, `packed` counts compressed storages."""

    def __init__(self, path: Path, file_size: int, find: FindStorage) -> None:
        self.views: list[View] = []
        self.packed = 0
        self._path = path
        self._find = find
        self._next = file_size
        self._storages: dict[tuple[str | int, int], int] = {}

    def place(self, name: str, tensor: StoredTensor) -> TensorInfo:
        """The tensor as all others of files. Raises MalformedFile or WrongFormat, naming it."""
        dtype = tensor.dtype
        if dtype is None:
            hint = f"known: {', '.join(known.torch_name for known in DTYPES.values())}; convert it with torch"
            raise WrongFormat(f"The tensor's dtype {tensor.element} is unknown.", file=self._path, key=name, hint=hint)
        nbytes = byte_count(tensor.shape, dtype.itemsize)
        if nbytes is None:
            self._bad("The tensor's shape is larger than any file can be.", name)
        if nbytes == 0:
            return TensorInfo(name, dtype, tensor.shape, 0, 0)
        storage = tensor.storage
        start, span = tensor.offset * dtype.itemsize, tensor.extent * dtype.itemsize
        if nbytes > storage.nbytes or start + span > storage.nbytes:
            self._bad(
                f"The tensor's shape {list(tensor.shape)} takes {nbytes:,} bytes ({size(nbytes)}) up to byte "
                f"{start + span:,} of its storage, which has {storage.nbytes:,}.",
                name,
            )
        offset = self._base(storage, name) + storage.start * ITEMSIZES[storage.element] + start
        if not tensor.contiguous:
            self._check_made(span, name)
            begin = self._reserve(nbytes)
            view = Strided(begin, nbytes, offset, span, tensor.shape, tensor.strides, dtype.itemsize)
            self.views.append(view)
            offset = begin
        return TensorInfo(name, dtype, tensor.shape, offset, nbytes)

    def _base(self, storage: Storage, name: str) -> int:
        """Where a storage's bytes begin."""
        known = (storage.key, storage.nbytes)  # the same key with another size is for `find` to judge
        if known not in self._storages:
            place = self._find(storage, name)
            base = place.offset
            if place.packed is not None:
                self._check_made(place.nbytes, name)
                base = self._reserve(place.nbytes)
                self.views.append(Inflated(base, place.nbytes, place.offset, place.packed, place.crc))
                self.packed += 1
            self._storages[known] = base
        return self._storages[known]

    def _reserve(self, nbytes: int) -> int:
        """Offsets beyond the file, and beyond all views before."""
        begin = -(-self._next // ALIGNMENT) * ALIGNMENT
        self._next = begin + nbytes
        return begin

    def _check_made(self, nbytes: int, name: str) -> None:
        if nbytes > MAX_MADE:
            message = f"The tensor is compressed or transposed, and part of {size(nbytes)} that would have to be held."
            hint = "load it with torch, and save it again contiguous and without compression"
            raise WrongFormat(message, file=self._path, key=name, hint=hint)

    def _bad(self, message: str, name: str) -> NoReturn:
        raise MalformedFile(shown(message), file=self._path, key=name, hint=DAMAGED)
