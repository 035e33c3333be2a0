"""Looking for NaN and Inf in every value of a file, in bounded memory.

Owns that count. Must not know names' meanings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from mergekit_sd.formats.dtypes import F32, F64
from mergekit_sd.formats.hashing import OnBytes, default_threads
from mergekit_sd.formats.reading import InputFile
from mergekit_sd.formats.tensor import ModelFile
from mergekit_sd.inspection.streaming import CHUNK, Buffer, Piece, as_tensor, batches, in_parallel, pieces
from mergekit_sd.lazy import torch


def nonfinite_values(
    model: ModelFile, *, threads: int | None = None, on_bytes: OnBytes | None = None
) -> dict[str, int]:
    """How many values of each tensor are NaN or Inf; tensors with none are left out."""
    found: dict[str, int] = {}
    floats = sorted((t for t in model.tensors.values() if t.dtype.is_float), key=lambda tensor: tensor.offset)
    file = InputFile.of(model)

    def keep(batch: list[Piece], counts: Sequence[int]) -> None:
        for piece, count in zip(batch, counts, strict=True):
            if count:
                found[piece.tensor.name] = found.get(piece.tensor.name, 0) + count
        if on_bytes:
            on_bytes(sum(piece.nbytes for piece in batch))

    try:
        tasks = batches((piece for tensor in floats for piece in pieces(tensor)), lambda piece: piece.nbytes)
        in_parallel(tasks, lambda: _counter(file), keep, threads or default_threads())
        file.check_unchanged()
    finally:
        file.close()
    return found


def _counter(file: InputFile) -> Callable[[list[Piece]], list[int]]:
    torch.set_num_threads(1)  # of this thread only: there are as many as cores
    raw = Buffer(CHUNK * F64.itemsize)
    wide = torch.empty(CHUNK, dtype=torch.float32)

    def count(piece: Piece) -> int:
        values = as_tensor(raw.read(file, piece), piece.tensor.dtype)
        if piece.tensor.dtype not in (F32, F64):  # float8 has no arithmetic; float16 is faster so
            values = wide[: piece.count].copy_(values)
        low, high = torch.aminmax(values)  # NaN wins
        if math.isfinite(low.item()) and math.isfinite(high.item()):
            return 0
        return int((~torch.isfinite(values)).sum())

    return lambda batch: [count(piece) for piece in batch]
