"""Opening a safetensors file: its header read under limits, and checked.

Owns how the header is found in the file. Must not know what the tensors are for.
"""

from __future__ import annotations

from mergekit_sd.errors import MalformedFile
from mergekit_sd.formats.header import LENGTH_BYTES, MAX_HEADER, parse_header
from mergekit_sd.formats.reading import InputFile
from mergekit_sd.formats.tensor import ModelFile
from mergekit_sd.text import size

_AGAIN = "download or copy it again"


def read_safetensors(file: InputFile) -> ModelFile:
    """The file's tensors and metadata; nothing is allocated before the sizes are known to be sane."""
    length = _header_length(file)
    raw = bytearray(length)
    file.read_into(memoryview(raw), LENGTH_BYTES)
    data_size = file.state.size - LENGTH_BYTES - length
    tensors, metadata = parse_header(bytes(raw), data_size, file.path)
    return ModelFile(file.path, "safetensors", tensors, metadata, file.state)


def _header_length(file: InputFile) -> int:
    total = file.state.size
    if total < LENGTH_BYTES:
        what = "The file is empty" if total == 0 else f"The file has only {total} bytes"
        raise MalformedFile(
            f"{what}; a safetensors file begins with the {LENGTH_BYTES} bytes of its header's length.",
            file=file.path,
            hint=_AGAIN,
        )
    first = bytearray(LENGTH_BYTES)
    file.read_into(memoryview(first), 0)
    length = int.from_bytes(first, "little")
    if length > MAX_HEADER:
        raise MalformedFile(
            f"The header is said to take {length:,} bytes; {MAX_HEADER:,} is the most.",
            file=file.path,
            hint=f"it is damaged or no safetensors file: {_AGAIN}",
        )
    if length > total - LENGTH_BYTES:
        raise MalformedFile(
            f"The file is cut short: its header alone takes {length:,} bytes ({size(length)}), "
            f"after the length {total - LENGTH_BYTES:,} are left.",
            file=file.path,
            hint=_AGAIN,
        )
    return length
