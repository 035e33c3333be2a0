"""Checkpoints as torch wrote them before 1.6: pickles one after the other, then the storages.

Owns the order of the parts. The sizes are known from the pickles, so no storage is read.
"""

from __future__ import annotations

from collections.abc import Mapping

from mergekit_sd.errors import MalformedFile, WrongFormat
from mergekit_sd.formats.pickles.allowed import BadArguments, storage_of
from mergekit_sd.formats.pickles.opcodes import unpickle
from mergekit_sd.formats.pickles.placing import Place
from mergekit_sd.formats.pickles.stream import DAMAGED, Stream
from mergekit_sd.formats.pickles.values import Storage
from mergekit_sd.formats.pickles.weights import model_of
from mergekit_sd.formats.reading import InputFile
from mergekit_sd.formats.tensor import ModelFile
from mergekit_sd.text import size

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
COUNT_BYTES = 8  # before each storage, the number of its elements
OLD = "a PyTorch file of the old kind (before 1.6)"

_SAVE_AGAIN = "load it with torch on any PC, and save it again"


class _Storages:
    """The storages that the pickle refers to, by key: the first one of a key says how it is stored."""

    def __init__(self) -> None:
        self.stored: dict[str | int, Storage] = {}

    def __call__(self, identity: object) -> object:
        match identity:
            case ("module", of, *_):
                return of  # with its source code, which is nothing to us
            case ("storage", kind, key, _, numel, None):
                return self._whole(kind, key, numel)
            case ("storage", kind, key, _, numel, (_, start, view_numel)):
                whole, part = self._whole(kind, key, numel), storage_of(kind, key, view_numel, start)
                if part.start + part.numel <= whole.numel:
                    return part
        raise BadArguments

    def _whole(self, kind: object, key: object, numel: object) -> Storage:
        storage = storage_of(kind, key, numel)
        if self.stored.setdefault(storage.key, storage).nbytes != storage.nbytes:
            raise BadArguments
        return storage


def read_torch_legacy(file: InputFile) -> ModelFile:
    """The tensors of a checkpoint. Raises WrongFormat for any other pickle."""
    stream = Stream(file.path, file=file)
    reported: dict[str, None] = {}
    for expected in (MAGIC, PROTOCOL):
        found = unpickle(stream, reported)
        if type(found) is not int or found != expected:
            hint = "load it with the program that wrote it, and save its weights as .safetensors"
            raise WrongFormat("This is a pickle, but not one of PyTorch's.", file=file.path, hint=hint)
    system = unpickle(stream, reported)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        message = "It was written with the bytes of its numbers reversed."
        raise WrongFormat(message, file=file.path, hint=_SAVE_AGAIN)
    storages = _Storages()
    value = unpickle(stream, reported, storages)
    begins = _begins(unpickle(stream, reported), storages.stored, stream, file.state.size)

    def find(storage: Storage, tensor: str) -> Place:
        return _place(file, storages.stored[storage.key], begins[storage.key], tensor)

    return model_of(file, value, reported, find, (OLD,))


def _begins(keys: object, stored: Mapping[str | int, Storage], stream: Stream, file_size: int) -> dict[str | int, int]:
    """Where each storage's count begins. All of them are there, and nothing besides."""
    known = isinstance(keys, list) and all(type(key) in (str, int) for key in keys)
    if not isinstance(keys, list) or not known or len(keys) != len(stored) or {*keys} != {*stored}:
        stream.refuse("The list of the storages does not fit the tensors.")
    begins: dict[str | int, int] = {}
    at = stream.position
    for key in keys:
        begins[key] = at
        at += COUNT_BYTES + stored[key].nbytes
    if at > file_size:
        message = f"The file is cut short: {at:,} bytes ({size(at)}) are needed, it has {file_size:,}."
        raise MalformedFile(message, file=stream.path, hint="download or copy it again")
    if at < file_size:
        stream.refuse(f"After the last storage follow {file_size - at:,} bytes that are no part of it.")
    return begins


def _place(file: InputFile, stored: Storage, begin: int, tensor: str) -> Place:
    count = bytearray(COUNT_BYTES)
    file.read_into(memoryview(count), begin)
    numel = int.from_bytes(count, "little")
    if numel != stored.numel:
        message = f"The tensor's storage of {stored.numel:,} elements has {numel:,} there."
        raise MalformedFile(message, file=file.path, key=tensor, hint=DAMAGED)
    return Place(begin + COUNT_BYTES, stored.nbytes)
