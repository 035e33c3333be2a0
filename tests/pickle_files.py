"""PyTorch files put together by hand, of pickles that may be anything, and the opcodes to write such pickles."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping

import models
import torch

from mergekit_sd.formats.open import open_model, read_bytes

MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
PROTOCOL = pickle.dumps(1001, 2)
SYSTEM = pickle.dumps({"protocol_version": 1001, "little_endian": True, "type_sizes": {}}, 2)
HEAD = (MAGIC, PROTOCOL, SYSTEM)
KEYS = pickle.dumps([], 2)


def zipped(
    data: bytes,
    storages: Mapping[str, bytes] | None = None,
    *,
    folder: str = "archive/",
    method: int = zipfile.ZIP_STORED,
    more: Mapping[str, bytes] | None = None,
) -> bytes:
    """A file as torch.save makes it, with this as its data.pkl."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        archive.writestr(f"{folder}data.pkl", data)
        archive.writestr(f"{folder}byteorder", b"little")
        for key, content in (storages or {}).items():
            archive.writestr(f"{folder}data/{key}", content)
        archive.writestr(f"{folder}version", b"3\n")
        for name, content in (more or {}).items():
            archive.writestr(name, content)
    return stream.getvalue()


def packed_again(content: bytes, method: int = zipfile.ZIP_DEFLATED, *, reverse: bool = False) -> bytes:
    """The same archive as another program would pack it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w", method) as new:
        for name in sorted(old.namelist(), reverse=reverse):
            new.writestr(name, old.read(name))
    return stream.getvalue()


def changed_pickle(content: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """The same archive with another pickle in it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(old.read(name)) if name.endswith("data.pkl") else old.read(name))
    return stream.getvalue()


def legacy(*parts: bytes) -> bytes:
    """A file as torch.save made it before 1.6: parts that are not given are harmless."""
    harmless = (MAGIC, PROTOCOL, SYSTEM, pickle.dumps({}, 2), KEYS)
    return b"".join((*parts, *harmless[len(parts) :]))


# --- files of torch's own ------------------------------------------------------------------------

CONTAINERS = ("zip", "legacy", "deflated")


def save(path, value, container="zip"):
    torch.save(value, path, _use_new_zipfile_serialization=container != "legacy")
    if container == "deflated":
        path.write_bytes(packed_again(path.read_bytes()))
    return path


def check(path, expected):
    """A file's tensors against torch's."""
    model = open_model(path)
    assert list(model.tensors) == list(expected)
    for name, tensor in expected.items():
        info = model.tensors[name]
        assert (info.name, info.shape, info.nbytes) == (name, tuple(tensor.shape), tensor.numel() * tensor.itemsize)
        assert info.dtype.torch_name == str(tensor.dtype).removeprefix("torch.")
        plain = tensor.detach().clone(memory_format=torch.contiguous_format)
        assert read_bytes(model, info) == models.bits(plain), name
    return model


# --- opcodes ---------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    """BINUNICODE."""
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def name(module: str, of: str) -> bytes:
    """GLOBAL."""
    return f"c{module}\n{of}\n".encode()


def stack_name(module: str, of: str) -> bytes:
    """STACK_GLOBAL."""
    return text(module) + text(of) + b"\x93"


def call(function: bytes, *arguments: bytes) -> bytes:
    """REDUCE."""
    return function + b"(" + b"".join(arguments) + b"tR"


def number(value: int) -> bytes:
    """LONG1."""
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def storage(key: str, numel: int, kind: str = "FloatStorage", module: str = "torch") -> bytes:
    """A storage's persistent id."""
    return b"(" + text("storage") + name(module, kind) + text(key) + text("cpu") + number(numel) + b"tQ"


def tensor(of: bytes, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> bytes:
    """A tensor on a storage."""
    sizes = [b"(" + b"".join(map(number, each)) + b"t" for each in (shape, strides)]
    return call(name("torch._utils", "_rebuild_tensor_v2"), of, number(offset), *sizes, b"\x89", b"N")


def dictionary(**items: bytes) -> bytes:
    """A dictionary of pickled values, as a whole pickle."""
    return b"\x80\x02}(" + b"".join(text(key) + value for key, value in items.items()) + b"u."


ONE = tensor(storage("0", 1), 0, (1,), (1,))  # a tensor, so that a file would load but for the rest
