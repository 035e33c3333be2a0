"""Whole small files as torch tensors: ControlNets, hypernetworks, textual inversions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergekit_sd.formats.reading import InputFile
from mergekit_sd.formats.tensor import ModelFile
from mergekit_sd.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def read_tensors(model: ModelFile, prefix: str = "") -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it, each in its own dtype. Raises what reading raises."""
    found = {}
    file = InputFile.of(model)
    try:
        for name, info in model.tensors.items():
            if name.startswith(prefix):
                data = bytearray(info.nbytes)
                file.read_into(memoryview(data), info.offset)
                dtype = getattr(torch, info.dtype.torch_name)
                read = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
                found[name.removeprefix(prefix)] = read.reshape(info.shape)
    finally:
        file.close()
    return found
