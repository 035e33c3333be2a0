"""Whether two files are the same: the hashes of a file, and of the weights of its components.

Owns the *weights hash*. Must not know how hashes are shown; file hashes are made in `formats.hashing`.

The weights hash of a component is the content hash (`formats.hashing`) over its LDM names without
prefix, dtype "F16", shapes, and values rounded to float16: leaves are 4 MiB of the float16 bytes.
Integers and position_ids are left out. So fp32 and fp16 files of one VAE, bare or baked into a
checkpoint, have the same one. (A bfloat16 copy has lost bits: it has another.)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from mergekit_sd.architectures import Layout, Role
from mergekit_sd.errors import ForbiddenCall, MalformedFile, MissingTensors, WrongFormat
from mergekit_sd.formats.dtypes import F16
from mergekit_sd.formats.hashing import (
    LEAF,
    FileHashes,
    OnBytes,
    content_hash,
    default_threads,
    file_hashes,
    hash_file_tensors,
    leaf_digest,
)
from mergekit_sd.formats.open import open_model
from mergekit_sd.formats.reading import InputFile
from mergekit_sd.formats.tensor import ModelFile, TensorInfo
from mergekit_sd.inspection.naming import bare_name
from mergekit_sd.inspection.streaming import Buffer, Piece, as_tensor, batches, in_parallel, pieces
from mergekit_sd.lazy import torch
from mergekit_sd.text import did_you_mean

_LEAF_ELEMENTS = LEAF // F16.itemsize


# --- hashes of a file ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Identity:
    """Every hash that a file is known by, in lower-case hex.

    `content` is None where no tensors can be read: `no_content` says why. `claimed_v3` is what
    the metadata says (`sshs_model_hash`, which A1111 shows for a LoRA instead of its own AutoV3).
    """

    file: FileHashes
    content: str | None
    no_content: str | None = None
    claimed_v3: str | None = None

    def as_json(self) -> dict[str, object]:
        """The hashes by the names that tools give them."""
        return {
            "sha256": self.file.sha256,
            "autov1": self.file.auto_v1,
            "autov2": self.file.auto_v2,
            "autov3": self.file.auto_v3,
            "content": self.content,
        }


def identify(
    path: str | os.PathLike[str],
    on_bytes: OnBytes | None = None,
    *,
    file: FileHashes | None = None,
    content: str | None = None,
) -> Identity:
    """All hashes of a file: one of models for the content hash, of anything for the others.

    `file`, `content`: those that are known already.
    """
    hashes = file or file_hashes(path, on_bytes)
    try:
        model = open_model(path)
    except (WrongFormat, MalformedFile, ForbiddenCall) as error:
        return Identity(hashes, None, no_content=error.message)
    claimed = model.metadata.get("sshs_model_hash")
    return Identity(hashes, content or hash_file_tensors(model, on_bytes=on_bytes), claimed_v3=claimed)


# --- the weights hash ------------------------------------------------------------------------------


def weights_hash(
    model: ModelFile, layout: Layout, component: str, *, threads: int | None = None, on_bytes: OnBytes | None = None
) -> str:
    """The weights hash of one component. Raises MissingTensors if the file has none of it."""
    found = weights_hashes(model, layout, [component], threads=threads, on_bytes=on_bytes)
    if component not in found:
        present = {place.component for place in layout.places.values() if place.component}
        hint = did_you_mean(component, sorted(present)) if present else None
        raise MissingTensors(f'The file has no component "{component}".', file=model.path, hint=hint)
    return found[component]


def weights_hashes(
    model: ModelFile,
    layout: Layout,
    components: Collection[str] | None = None,
    *,
    threads: int | None = None,
    on_bytes: OnBytes | None = None,
) -> dict[str, str]:
    """The weights hash of each component of a file (or of some), in one pass.

    `on_bytes` is called in this thread with the number of bytes read since the last call.
    """
    chosen = _weights(model, layout, components)
    tensors = sorted((tensor for _, _, tensor in chosen), key=lambda tensor: tensor.offset)
    file = InputFile.of(model)
    try:
        leaves = _digests(file, tensors, threads or default_threads(), on_bytes)
        file.check_unchanged()
    finally:
        file.close()
    found = dict.fromkeys(component for component, _, _ in chosen)
    return {
        component: content_hash((name, F16.name, t.shape, leaves[t.name]) for c, name, t in chosen if c == component)
        for component in found
    }


def _weights(model: ModelFile, layout: Layout, components: Collection[str] | None) -> list[tuple[str, str, TensorInfo]]:
    """What is hashed: component, name without prefix, tensor."""
    chosen: list[tuple[str, str, TensorInfo]] = []
    for stored, tensor in model.tensors.items():
        component, name = bare_name(layout, stored)
        is_weight = layout.places[layout.canonical[stored]].role == Role.weight and tensor.dtype.is_float
        if component is not None and is_weight and (components is None or component in components):
            chosen.append((component, name, tensor))
    return chosen


def _digests(
    file: InputFile, tensors: Collection[TensorInfo], threads: int, on_bytes: OnBytes | None
) -> dict[str, list[bytes]]:
    """The digests of each tensor's leaves, by its stored name."""
    found: dict[str, list[bytes]] = {tensor.name: [] for tensor in tensors}
    widest = max((tensor.dtype.itemsize for tensor in tensors), default=0)
    size = min(_LEAF_ELEMENTS, max((tensor.numel for tensor in tensors), default=0))

    def keep(batch: list[Piece], digests: Iterable[bytes]) -> None:
        for piece, digest in zip(batch, digests, strict=True):
            found[piece.tensor.name].append(digest)
        if on_bytes:
            on_bytes(sum(piece.nbytes for piece in batch))

    leaves = (piece for tensor in tensors for piece in pieces(tensor, _LEAF_ELEMENTS))
    tasks = batches(leaves, lambda piece: piece.nbytes)
    in_parallel(tasks, lambda: _leaf_worker(file, size, widest), keep, threads)
    return found


def _leaf_worker(file: InputFile, size: int, widest: int) -> Callable[[list[Piece]], list[bytes]]:
    """Digests leaves of up to `size` elements, rounded to float16; torch only where rounding is needed."""
    raw, rounded = Buffer(size * widest), memoryview(bytearray(size * F16.itemsize))

    def digest(piece: Piece) -> bytes:
        data = raw.read(file, piece)
        if piece.tensor.dtype != F16:
            torch.set_num_threads(1)  # of this thread only: there are as many as cores
            half = rounded[: piece.count * F16.itemsize]
            as_tensor(half, F16).copy_(as_tensor(data, piece.tensor.dtype))
            data = half
        return leaf_digest(data)

    return lambda batch: [digest(piece) for piece in batch]
