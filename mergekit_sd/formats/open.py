"""Opening a model file, by what is in it and not by its suffix.

Owns the refusals of what is no readable file, and the choice of reader. Must not know the formats
themselves.

A reader of another container is one line in `READERS`; folders are those of diffusers.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

from mergekit_sd.errors import InputError, MissingInput, UnreadableInput, WrongFormat
from mergekit_sd.formats.diffusers.folder import folder_hint, is_diffusers_folder, open_folder, single_file
from mergekit_sd.formats.pickles.torch_legacy import read_torch_legacy
from mergekit_sd.formats.pickles.torch_zip import read_torch_zip
from mergekit_sd.formats.reading import InputFile, file_state
from mergekit_sd.formats.safetensors import read_safetensors
from mergekit_sd.formats.sniff import EMPTY, HEAD_BYTES, SAFETENSORS, TORCH_PICKLE, TORCH_ZIP, UNKNOWN, ZIP, sniff
from mergekit_sd.formats.tensor import ModelFile, TensorInfo
from mergekit_sd.text import did_you_mean, shown

MODEL_SUFFIXES = frozenset({".safetensors", ".ckpt", ".pt", ".pth", ".bin"})
MOST_NEIGHBOURS = 5_000  # files of a folder that are searched for a name like the missing one

_WINDOWS_LINK_LOOP = 1921
_PERMISSIONS = "check the permissions of the file and of the folders above it"

# What `sniff` says a file is, and what reads it.
READERS: Mapping[str, Callable[[InputFile], ModelFile]] = {
    SAFETENSORS.kind: read_safetensors,
    TORCH_ZIP.kind: read_torch_zip,
    ZIP.kind: read_torch_zip,  # packed again, its members may lie in any order
    TORCH_PICKLE.kind: read_torch_legacy,
}
# Too little to tell by content: the suffix decides whose words the refusal has.
_SHAPELESS = frozenset({EMPTY.kind, UNKNOWN.kind})


def open_model(path: str | os.PathLike[str]) -> ModelFile:
    """The header of a model file, or of diffusers' folder of them, read and checked; names are LDM's.

    Raises an InputError that says what is wrong.
    """
    path = Path(path)
    return open_folder(path, _read_file) if is_diffusers_folder(path) else single_file(_read_file(path))


def _read_file(path: Path) -> ModelFile:
    """The header of one file, under its own names."""
    file = open_input(path)
    try:
        content = sniff(read_head(file))
        reader = READERS.get(content.kind)
        if reader is None and content.kind in _SHAPELESS and file.path.suffix.lower() == ".safetensors":
            reader = read_safetensors
        if reader is None:
            message = f"This is {content.words}; no model can be read from it."
            raise WrongFormat(message, file=file.path, hint=content.hint)
        return reader(file)
    finally:
        file.close()


def open_input(path: str | os.PathLike[str]) -> InputFile:
    """A regular file, opened for reading; the caller closes it. Never waits for a pipe or a device."""
    path = Path(path)
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise _stat_error(path, error) from None
    if not stat.S_ISREG(status.st_mode):
        _refuse_special(path, status.st_mode)
    try:
        return InputFile(path, file_state(status))
    except UnreadableInput as error:
        raise UnreadableInput(error.message, file=path, hint=_PERMISSIONS) from error


def read_head(file: InputFile) -> bytes:
    """The first bytes of a file, as `sniff` wants them."""
    head = bytearray(min(HEAD_BYTES, file.state.size))
    file.read_into(memoryview(head), 0)
    return bytes(head)


def read_bytes(model: ModelFile, tensor: TensorInfo) -> bytes:
    """All bytes of one (small) tensor. Raises InputChanged if the file is not as it was opened."""
    file = InputFile.of(model)
    try:
        data = bytearray(tensor.nbytes)
        file.read_into(memoryview(data), tensor.offset)
        return bytes(data)
    finally:
        file.close()


def _refuse_special(path: Path, mode: int) -> NoReturn:
    if stat.S_ISDIR(mode):
        hint = folder_hint(path) or "name a file in it"
        raise UnreadableInput("This is a folder, not a model file.", file=path, hint=hint)
    kinds = ((stat.S_ISFIFO, "a FIFO (named pipe)"), (stat.S_ISSOCK, "a socket"))
    what = next((words for test, words in kinds if test(mode)), "a device")
    raise UnreadableInput(
        f"This is {what}; a model is read at many places at once.",
        file=path,
        hint="write its contents to a regular file first",
    )


def _stat_error(path: Path, error: OSError | ValueError) -> InputError:
    """Why the path leads nowhere, and what it may have meant."""
    if isinstance(error, ValueError) or error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
        return _missing(path)
    if error.errno == errno.ELOOP or getattr(error, "winerror", None) == _WINDOWS_LINK_LOOP:
        return UnreadableInput("This is a loop of links.", file=path, hint="remove the links, or name the file itself")
    return UnreadableInput(f"Cannot open it: {error.strerror}.", file=path, hint=_PERMISSIONS)


def _missing(path: Path) -> MissingInput:
    link = _link_target(path)
    if link is not None:
        message = f"This link leads to {shown(link)}, where there is no file."
        return MissingInput(message, file=path, hint="mend the link, or name the file itself")
    names = _neighbours(path)
    if names is None:
        return MissingInput("There is no such file, nor its folder.", file=path, hint="check the path")
    hint = did_you_mean(shown(path.name), names) or "there are no models in that folder: check the path"
    return MissingInput("There is no such file.", file=path, hint=hint)


def _link_target(path: Path) -> str | None:
    try:
        return str(path.readlink())
    except (OSError, ValueError):
        return None


def _neighbours(path: Path) -> list[str] | None:
    """Names of files beside `path` that may have been meant; None where there is no such folder."""
    suffixes = MODEL_SUFFIXES | {path.suffix.lower()}
    names: list[str] = []
    try:
        with os.scandir(path.parent) as entries:
            for entry in entries:
                if Path(entry.name).suffix.lower() in suffixes and not entry.name.startswith("."):
                    names.append(shown(entry.name))
                if len(names) >= MOST_NEIGHBOURS:
                    break
    except (OSError, ValueError):
        return None
    return sorted(names)
