"""Small checkpoints of SD1's layout, made by code: noise, quick to make and to merge.

Every tensor has SD1's name and rank, with a sixteenth of its width: 9 MB instead of 2 GB. *base*
is noise; *anime* differs from it everywhere, most in the outer blocks; *dreambooth* is base with a
small change where prompts are heard (attn2). The VAE is one and the same. They cannot draw.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mergekit_sd.architectures import Architecture, TensorSpec, get
from mergekit_sd.formats.dtypes import F16, F32, I64, Dtype
from mergekit_sd.formats.header import build_header
from mergekit_sd.formats.writing import OutputFile

SHRINK = 16
NARROWEST = 64  # dimensions below are channels and kernels: they stay
POSITIONS = 77
SCHEDULE = 1000


def write_small_model(path: Path, name: str) -> None:
    """Write one small model: "base", "anime", "dreambooth", or any other name (a kind of its own)."""
    architecture = get("sd1")
    tensors = {
        key: (_dtype(architecture, key), tuple(_narrow(size) for size in spec.shape))
        for key, spec in architecture.tensors.items()
    }
    header = build_header([(key, dtype, shape) for key, (dtype, shape) in tensors.items()], {"format": "pt"})
    with OutputFile(path, header.size) as target:
        target.write(memoryview(header.raw), 0)
        for key, data in _values(architecture, tensors, name):
            target.write(memoryview(data), header.tensors[key].offset)
        target.sync()
        target.commit()


def _narrow(size: int) -> int:
    return size if size < NARROWEST or size in (POSITIONS, SCHEDULE) else size // SHRINK


def _dtype(architecture: Architecture, key: str) -> Dtype:
    if key == architecture.position_ids:
        return I64
    return F32 if key in architecture.schedule else F16


def _values(
    architecture: Architecture, tensors: dict[str, tuple[Dtype, tuple[int, ...]]], name: str
) -> Iterator[tuple[str, bytes]]:
    shared, own = np.random.default_rng(0), np.random.default_rng(sum(name.encode()))
    for key, (dtype, shape) in tensors.items():
        spec = architecture.tensors[key]
        if dtype == I64:
            yield key, np.arange(POSITIONS, dtype="<i8").tobytes()
        elif dtype == F32:
            yield key, np.linspace(0.9999, 0.0047, shape[0], dtype="<f4").tobytes()
        else:
            base = shared.normal(1.0 if "norm" in key and key.endswith("weight") else 0.0, 0.03, shape)
            change = own.normal(0.0, 0.03, shape) * _amount(name, key, spec)
            yield key, (base + change).astype("<f2").tobytes()


def _amount(name: str, key: str, spec: TensorSpec) -> float:
    """How far a model is from base at a tensor, as a share of the weights' own spread."""
    if name == "base" or spec.component == "vae":
        return 0.0
    if name == "dreambooth":
        return 0.25 if "attn2" in key else 0.0
    if spec.block is None:
        return 0.2
    middle = spec.block in ("IN10", "IN11", "M00", "OUT00", "OUT01")
    return 0.15 if middle else 0.6
