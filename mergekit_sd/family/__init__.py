"""The small trained family: base, what is tuned from it, and adapters for it, unpacked into real files.

Owns how they are packed. They are Stable Diffusion 1 in little, trained on drawn shapes (training/ in the
repository): "a red circle on white background" at 64×64. base knows circles, squares and triangles; outline draws
them as lines, night at night, star has learned a new shape under the word "sks". For base: the LoRA stripes, the LoHa
shadow, the LoKr frame, the hypernetwork pale, and mk-orange, a word for a colour that it lacks.
"""

from __future__ import annotations

import io
import lzma
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mergekit_sd.formats.dtypes import F16, I64
from mergekit_sd.formats.header import build_header
from mergekit_sd.formats.writing import OutputFile

MODELS = ("base", "outline", "night", "star")
ADAPTERS = ("stripes.safetensors", "shadow.safetensors", "frame.safetensors", "mk-orange.safetensors", "pale.pt")
BASE_BITS, TUNED_BITS = 7, 4
METADATA = {
    "format": "pt",
    "modelspec.sai_model_spec": "1.0.1",
    "modelspec.architecture": "stable-diffusion-v1",
    "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
    "modelspec.resolution": "64x64",
    "modelspec.prediction_type": "epsilon",
    "modelspec.usage_hint": "Steps: 20, CFG scale: 4, Size: 64x64",
    "mergekit_sd.probes": "shapes",
}

_DATA = "mergekit_sd.family.data"


def write_family(folder: Path) -> tuple[Path, ...]:
    """Write all models and adapters into a folder; returns their paths. Raises as `OutputFile` does."""
    base = unpacked("base")
    paths = []
    for name in MODELS:
        path = folder / f"{name}.safetensors"
        tensors = base if name == "base" else tuned(base, unpacked_difference(name))
        _write_model(path, tensors, {**METADATA, "modelspec.title": name})
        paths.append(path)
    for file in ADAPTERS:
        path, data = folder / file, _packed(file)
        with OutputFile(path, len(data)) as target:
            target.write(memoryview(data), 0)
            target.sync()
            target.commit()
        paths.append(path)
    return tuple(paths)


def unpacked(name: str) -> dict[str, NDArray[np.generic]]:
    """A model's tensors, float16, integers as they are."""
    return {key: _as_stored(value) for key, value in unpacked_difference(name).items()}


def unpacked_difference(name: str) -> dict[str, NDArray[np.generic]]:
    """What is packed under a name, float32 where it was rounded: a whole model, or what differs from base."""
    found: dict[str, NDArray[np.generic]] = {}
    with np.load(io.BytesIO(lzma.decompress(_packed(f"{name}.xz"))), allow_pickle=False) as arrays:
        for key in arrays.files:
            plain, colon, part = key.rpartition(":")
            if not colon:
                found[key] = arrays[key]
            elif part == "q":
                found[plain] = _restored(plain, arrays)
    return found


def tuned(
    base: Mapping[str, NDArray[np.generic]], difference: Mapping[str, NDArray[np.generic]]
) -> dict[str, NDArray[np.generic]]:
    """Base with a difference added, rounded to float16."""
    return {
        key: _as_stored(value.astype(np.float32) + difference[key].astype(np.float32)) if key in difference else value
        for key, value in base.items()
    }


def _restored(name: str, arrays: Mapping[str, NDArray[np.generic]]) -> NDArray[np.generic]:
    """Whole numbers times each row's step; rows that are not there are zero."""
    shape = tuple(int(size) for size in arrays[f"{name}:shape"])
    values = arrays[f"{name}:q"].astype(np.float32) * arrays[f"{name}:s"].astype(np.float32)[:, None]
    if f"{name}:rows" not in arrays:
        return values.reshape(shape)
    whole = np.zeros((shape[0], values.shape[1]), np.float32)
    whole[arrays[f"{name}:rows"].astype(np.int64)] = values
    return whole.reshape(shape)


def _as_stored(value: NDArray[np.generic]) -> NDArray[np.generic]:
    return value if value.dtype == np.int64 else value.astype(np.float16)


def _packed(file: str) -> bytes:
    return files(_DATA).joinpath(file).read_bytes()


def _write_model(path: Path, tensors: Mapping[str, NDArray[np.generic]], metadata: Mapping[str, str]) -> None:
    entries = [(key, I64 if value.dtype == np.int64 else F16, value.shape) for key, value in tensors.items()]
    header = build_header(entries, dict(metadata))
    with OutputFile(path, header.size) as target:
        target.write(memoryview(header.raw), 0)
        for key, value in tensors.items():
            if value.nbytes:
                target.write(memoryview(np.ascontiguousarray(value).tobytes()), header.tensors[key].offset)
        target.sync()
        target.commit()
