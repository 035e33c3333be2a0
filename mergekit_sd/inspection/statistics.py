"""The numbers of one tensor of a file, in bounded memory.

Owns these sums. Must not know names' meanings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from mergekit_sd.errors import MissingTensors
from mergekit_sd.formats.open import open_model
from mergekit_sd.formats.reading import InputFile
from mergekit_sd.inspection.streaming import CHUNK, Buffer, as_tensor, pieces
from mergekit_sd.lazy import torch
from mergekit_sd.text import did_you_mean, shown


@dataclass(frozen=True, slots=True)
class TensorStatistics:
    """Of a tensor's finite values: `min`, `max`, `mean`, `std` (of all of them, not of a sample); None where none is.

    `values` counts all elements; `nan` and `inf` those that are left out.
    """

    values: int
    min: float | None
    max: float | None
    mean: float | None
    std: float | None
    nan: int
    inf: int


def tensor_statistics(path: str | Path, name: str) -> TensorStatistics:
    """Read one tensor, by its stored name. Raises MissingTensors if there is none, InputError for a bad file."""
    model = open_model(path)
    tensor = model.tensors.get(name)
    if tensor is None:
        hint = did_you_mean(name, model.tensors)
        raise MissingTensors(f'There is no tensor "{shown(name)}".', file=path, key=name, hint=hint)
    raw = Buffer(CHUNK * tensor.dtype.itemsize)
    finite, nan, low, high, mean, squares = 0, 0, math.inf, -math.inf, 0.0, 0.0
    file = InputFile.of(model)
    try:
        for piece in pieces(tensor):
            values = as_tensor(raw.read(file, piece), tensor.dtype).to(torch.float64)
            nan += int(values.isnan().sum())
            values = values[values.isfinite()]
            if not values.numel():
                continue
            low, high = min(low, values.min().item()), max(high, values.max().item())
            # Chan et al. 1979: means and squared deviations of two parts make those of the whole.
            part, number = values.mean().item(), values.numel()
            shift, finite = part - mean, finite + number
            mean += shift * number / finite
            squares += ((values - part) ** 2).sum().item() + shift**2 * number * (finite - number) / finite
        file.check_unchanged()
    finally:
        file.close()
    lost = tensor.numel - finite
    if not finite:
        return TensorStatistics(tensor.numel, None, None, None, None, nan, lost - nan)
    return TensorStatistics(tensor.numel, low, high, mean, math.sqrt(squares / finite), nan, lost - nan)
