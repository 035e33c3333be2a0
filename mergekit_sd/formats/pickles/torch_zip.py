"""Checkpoints as torch has written them since 1.6: a zip of a pickle and one member for each storage.

Owns the names in the archive. Storages are found by their members' places; none is read.
"""

from __future__ import annotations

from mergekit_sd.errors import MalformedFile, WrongFormat
from mergekit_sd.formats.pickles.allowed import BadArguments, storage_of
from mergekit_sd.formats.pickles.archive import DEFLATED, Archive
from mergekit_sd.formats.pickles.opcodes import unpickle
from mergekit_sd.formats.pickles.placing import Place
from mergekit_sd.formats.pickles.stream import DAMAGED, MAX_PICKLE, Stream
from mergekit_sd.formats.pickles.values import ITEMSIZES, Storage
from mergekit_sd.formats.pickles.weights import model_of
from mergekit_sd.formats.reading import InputFile
from mergekit_sd.formats.sniff import ZIP
from mergekit_sd.formats.tensor import ModelFile
from mergekit_sd.text import listed

PICKLE = "data.pkl"
MAX_MARK = 16  # bytes of a member that holds a word


def read_torch_zip(file: InputFile) -> ModelFile:
    """The tensors of a checkpoint. Raises WrongFormat for any other zip file."""
    archive = Archive(file)
    folder = _folder(archive)
    _check_byte_order(archive, folder)
    stream = Stream(file.path, archive.read(archive.members[folder + PICKLE], MAX_PICKLE))
    reported: dict[str, None] = {}
    value = unpickle(stream, reported, _storage)
    if stream.left:
        stream.refuse(f"After the pickle follow {stream.left:,} bytes that are no part of it.")

    def find(storage: Storage, tensor: str) -> Place:
        return _place(archive, f"{folder}data/{storage.key}", storage, tensor)

    return model_of(file, value, reported, find)


def _folder(archive: Archive) -> str:
    """The folder in the archive that all lies in, with its slash; any name will do, and none."""
    pickles = [name for name in archive.members if name.rpartition("/")[2] == PICKLE]
    if not pickles:
        raise WrongFormat(f"This is {ZIP.words}; no model can be read from it.", file=archive.path, hint=ZIP.hint)
    if len(pickles) > 1:
        message = f"The zip archive holds {len(pickles)} pickles, of which it is to be one: {listed(pickles)}."
        raise MalformedFile(message, file=archive.path, hint=DAMAGED)
    folder = pickles[0].removesuffix(PICKLE)
    if folder + "constants.pkl" in archive.members:
        hint = "take the program's state_dict and save that, or get the model as .safetensors"
        raise WrongFormat("This is a TorchScript program, not a file of weights.", file=archive.path, hint=hint)
    return folder


def _check_byte_order(archive: Archive, folder: str) -> None:
    member = archive.members.get(folder + "byteorder")
    if member is not None and archive.read(member, MAX_MARK) != b"little":
        hint = "load it with torch on any PC, and save it again"
        raise WrongFormat("It was written with the bytes of its numbers reversed.", file=archive.path, hint=hint)


def _storage(identity: object) -> Storage:
    match identity:
        case ("storage", kind, str() as key, _, numel):
            return storage_of(kind, key, numel)
    raise BadArguments


def _place(archive: Archive, name: str, storage: Storage, tensor: str) -> Place:
    member = archive.members.get(name)
    # A storage of bytes that was viewed as larger elements may end within one.
    if member is None or not 0 <= member.nbytes - storage.nbytes < ITEMSIZES[storage.element]:
        has = "is not in it" if member is None else f"has {member.nbytes:,} bytes there"
        message = f"The tensor's storage of {storage.nbytes:,} bytes {has}."
        raise MalformedFile(message, file=archive.path, key=tensor, hint=DAMAGED)
    at = archive.locate(member)
    if member.method != DEFLATED:
        return Place(at, member.nbytes)
    return Place(at, member.nbytes, member.packed, member.crc)
