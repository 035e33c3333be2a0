"""The hashes of a model: its content hash, and the file hashes that other tools show.

Owns what is hashed in which order. Must not know what hashes are used for.

The content hash names the tensors whatever container, order or metadata they come with. It is
xxh3-128 twice over, so that it can be made while streaming, in any order, by several threads:

1. The bytes of a tensor (little-endian, row-major, as in a safetensors file) are cut into leaves
   of LEAF bytes, the last one shorter; a tensor of no bytes has no leaves. The digest of a leaf
   is its xxh3-128 with seed 0 in canonical (big-endian) form, 16 bytes.
2. The content hash is the xxh3-128 of these records, one per tensor, sorted by the UTF-8 bytes of
   the names, with nothing between or around them. All numbers are unsigned 64-bit little-endian:

       length of the name in bytes, the name in UTF-8,
       length of the dtype's name, the dtype's name as safetensors spells it ("F16"),
       number of dimensions, each dimension,
       number of leaves, their digests in order

   It is written as 32 lower-case hex digits.
"""

from __future__ import annotations

import hashlib
import os
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import xxhash

from mergekit_sd.errors import MissingTensors
from mergekit_sd.formats.header import LENGTH_BYTES
from mergekit_sd.formats.open import open_input, read_head
from mergekit_sd.formats.reading import InputFile
from mergekit_sd.formats.sniff import looks_like_safetensors
from mergekit_sd.formats.tensor import ModelFile, TensorInfo
from mergekit_sd.text import did_you_mean

LEAF = 4 << 20
BATCH = 16 << 20  # bytes per task: small tensors together, or handing them out costs more than hashing
MAX_THREADS = 8  # beyond, memory is the limit
PIECE = 4 << 20  # bytes per read for sha256

_V1_OFFSET, _V1_BYTES, _V1_DIGITS = 0x100000, 0x10000, 8
_V2_DIGITS, _V3_DIGITS = 10, 12

OnBytes = Callable[[int], None]


# --- the content hash ------------------------------------------------------------------------------


def leaf_count(nbytes: int) -> int:
    """How many leaves a tensor of that many bytes has."""
    return -(-nbytes // LEAF)


def leaf_digest(buffer: bytes | bytearray | memoryview) -> bytes:
    """The 16 bytes that stand for one leaf. Releases the GIL."""
    return xxhash.xxh3_128_digest(buffer)


def content_hash(entries: Iterable[tuple[str, str, Sequence[int], Sequence[bytes]]]) -> str:
    """The hash over (name, dtype's name, shape, digests of the leaves), in any order."""
    # A name out of a pickle may hold half a surrogate pair; it still has one form in bytes.
    named = sorted(
        ((name.encode("utf-8", "surrogatepass"), dtype, shape, leaves) for name, dtype, shape, leaves in entries),
        key=lambda entry: entry[0],
    )
    whole = xxhash.xxh3_128()
    for name, dtype, shape, leaves in named:
        numbers = struct.pack(f"<{len(shape) + 2}Q", len(shape), *shape, len(leaves))
        sizes = struct.pack("<Q", len(name)), name, struct.pack("<Q", len(dtype))
        whole.update(b"".join((*sizes, dtype.encode("ascii"), numbers, *leaves)))
    return whole.hexdigest()


@dataclass(frozen=True, slots=True)
class _Leaf:
    """One leaf in a file, and the tensor it is of. Leaves of a tensor come in their order."""

    name: str
    offset: int
    nbytes: int


def hash_file_tensors(
    model: ModelFile,
    names: Iterable[str] | None = None,
    threads: int | None = None,
    on_bytes: OnBytes | None = None,
) -> str:
    """The content hash of an opened file, or of some of its tensors.

    `on_bytes` is called in this thread with the number of bytes done since the last call; what it
    raises (a cancel) ends the work. Raises InputChanged if the file changes meanwhile.
    """
    tensors = _chosen(model, names)
    file = InputFile.of(model)
    try:
        leaves = _digests(file, tensors, threads or default_threads(), on_bytes)
        file.check_unchanged()
    finally:
        file.close()
    return content_hash((each.name, each.dtype.name, each.shape, leaves[each.name]) for each in tensors)


def default_threads() -> int:
    """As many as this process may use at once, within MAX_THREADS."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, MAX_THREADS)


def _chosen(model: ModelFile, names: Iterable[str] | None) -> list[TensorInfo]:
    if names is None:
        return list(model.tensors.values())
    wanted = dict.fromkeys(names)
    for name in wanted:
        if name not in model.tensors:
            hint = did_you_mean(name, model.tensors)
            raise MissingTensors("The file has no such tensor.", file=model.path, key=name, hint=hint)
    return [model.tensors[name] for name in wanted]


def _batches(tensors: Iterable[TensorInfo]) -> Iterator[list[_Leaf]]:
    """All leaves, from the file's beginning to its end, in tasks of about BATCH bytes."""
    batch: list[_Leaf] = []
    filled = 0
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        for start in range(0, tensor.nbytes, LEAF):
            leaf = _Leaf(tensor.name, tensor.offset + start, min(LEAF, tensor.nbytes - start))
            batch.append(leaf)
            filled += leaf.nbytes
            if filled >= BATCH:
                yield batch
                batch, filled = [], 0
    if batch:
        yield batch


def _digests(
    file: InputFile, tensors: Sequence[TensorInfo], threads: int, on_bytes: OnBytes | None
) -> dict[str, list[bytes]]:
    own = threading.local()

    def work(batch: list[_Leaf]) -> list[bytes]:
        if not hasattr(own, "buffer"):
            own.buffer = memoryview(bytearray(LEAF))
        digests = []
        for leaf in batch:
            piece = own.buffer[: leaf.nbytes]
            file.read_into(piece, leaf.offset)
            digests.append(leaf_digest(piece))
        return digests

    found: dict[str, list[bytes]] = {tensor.name: [] for tensor in tensors}
    pool = ThreadPoolExecutor(threads, "hash")
    try:
        tasks = [(batch, pool.submit(work, batch)) for batch in _batches(tensors)]
        for batch, task in tasks:
            for leaf, digest in zip(batch, task.result(), strict=True):
                found[leaf.name].append(digest)
            if on_bytes:
                on_bytes(sum(leaf.nbytes for leaf in batch))
    finally:
        pool.shutdown(cancel_futures=True)  # before the caller closes the file
    return found


# --- file hashes -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FileHashes:
    """The hashes of a whole file as A1111 and Civitai show them, in lower-case hex.

    `sha256_data` is the sha256 of what follows a safetensors header; None for other formats.
    """

    sha256: str
    sha256_data: str | None
    auto_v1: str

    @property
    def auto_v2(self) -> str:
        """The first 10 digits of sha256: A1111's "model hash"."""
        return self.sha256[:_V2_DIGITS]

    @property
    def auto_v3(self) -> str | None:
        """The first 12 digits of sha256_data; does not change with the metadata."""
        return self.sha256_data and self.sha256_data[:_V3_DIGITS]


def file_hashes(path: str | os.PathLike[str], on_bytes: OnBytes | None = None) -> FileHashes:
    """All file hashes, the file read once. `on_bytes` as in `hash_file_tensors`."""
    file = open_input(path)
    try:
        start = _data_start(file)
        whole, data = hashlib.sha256(), hashlib.sha256()
        _feed(file, [(whole, 0)] if start is None else [(whole, 0), (data, start)], on_bytes)
        auto_v1 = _auto_v1(file)
        file.check_unchanged()
    finally:
        file.close()
    return FileHashes(whole.hexdigest(), None if start is None else data.hexdigest(), auto_v1)


def sha256_file(path: str | os.PathLike[str], on_bytes: OnBytes | None = None) -> str:
    """The sha256 of a whole file in hex. `on_bytes` as in `hash_file_tensors`."""
    file = open_input(path)
    try:
        whole = hashlib.sha256()
        _feed(file, [(whole, 0)], on_bytes)
        file.check_unchanged()
    finally:
        file.close()
    return whole.hexdigest()


def auto_v1(path: str | os.PathLike[str]) -> str:
    """A1111's oldest hash: 8 digits from 64 KiB at 1 MiB; of a smaller file, from what there is."""
    file = open_input(path)
    try:
        return _auto_v1(file)
    finally:
        file.close()


def _auto_v1(file: InputFile) -> str:
    piece = bytearray(max(0, min(_V1_BYTES, file.state.size - _V1_OFFSET)))
    file.read_into(memoryview(piece), _V1_OFFSET)
    return hashlib.sha256(piece).hexdigest()[:_V1_DIGITS]


def _data_start(file: InputFile) -> int | None:
    """Where the tensors begin in a safetensors file; None in any other."""
    head = read_head(file)
    start = LENGTH_BYTES + int.from_bytes(head[:LENGTH_BYTES], "little")
    return start if looks_like_safetensors(head) and start <= file.state.size else None


def _feed(file: InputFile, hashes: Sequence[tuple[hashlib._Hash, int]], on_bytes: OnBytes | None) -> None:
    """Every byte of the file from its start on into each (hash, start); one thread for each hash.

    Two buffers: one is read into while the other is hashed.
    """
    buffers = (memoryview(bytearray(PIECE)), memoryview(bytearray(PIECE)))
    running: list[Future[None]] = []
    pool = ThreadPoolExecutor(len(hashes), "sha256")
    try:
        for turn, offset in enumerate(range(0, file.state.size, PIECE)):
            piece = buffers[turn % 2][: min(PIECE, file.state.size - offset)]
            file.read_into(piece, offset)
            _settle(running)
            running = [pool.submit(each.update, piece[max(0, start - offset) :]) for each, start in hashes]
            if on_bytes:
                on_bytes(len(piece))
        _settle(running)
    finally:
        pool.shutdown(cancel_futures=True)


def _settle(running: Iterable[Future[None]]) -> None:
    for future in running:
        future.result()
