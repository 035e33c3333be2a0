"""The trained family as the package keeps it: `python -m training.pack FOLDER`, after `python -m training FOLDER`.

Base is stored in 8 bits a number with a scale for each row, what is tuned from it as its difference in 4 bits;
compressed with xz. `mergekit_sd.family` unpacks them. Adapters lie there as the files that they are.
"""

from __future__ import annotations

import io
import lzma
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from mergekit_sd.family import BASE_BITS, TUNED_BITS, unpacked
from training.__main__ import ADAPTERS, HYPERNETWORK, INVERSION, TUNES, Training
from training.export import write_checkpoint

PLACE = Path(__file__).parents[1] / "mergekit_sd" / "family" / "data"


def main(folder: Path) -> None:
    """Pack everything into the package."""
    PLACE.mkdir(parents=True, exist_ok=True)
    training = Training(folder)
    with tempfile.TemporaryDirectory() as place:
        models = {}
        for name in ("base", *TUNES):
            path = Path(place) / f"{name}.safetensors"
            write_checkpoint(training.model(name), training.vae, path)
            models[name] = load_file(path)
    _write(PLACE / "base.xz", _quantised(models["base"], BASE_BITS))
    base = unpacked("base")  # as users get it: differences are from this one
    for name in TUNES:
        changed = {
            key: value.astype(np.float32) - base[key].astype(np.float32)
            for key, value in models[name].items()
            if not np.array_equal(value, models["base"][key])
        }
        _write(PLACE / f"{name}.xz", _quantised(changed, TUNED_BITS))
    files = [*(f"{name}.safetensors" for name in (*ADAPTERS, INVERSION.name)), f"{HYPERNETWORK.name}.pt"]
    for name in files:
        shutil.copyfile(folder / name, PLACE / name)
    print(f"{sum(path.stat().st_size for path in PLACE.iterdir()):,} bytes")


def _quantised(tensors: dict[str, NDArray[np.generic]], bits: int) -> dict[str, NDArray[np.generic]]:
    """For a tensor `name`: `name:q`, its whole numbers, and `name:s`, each row's step; or `name` as it is."""
    made: dict[str, NDArray[np.generic]] = {}
    most = 2 ** (bits - 1) - 1
    for name, tensor in tensors.items():
        if tensor.ndim < 2 or not np.issubdtype(tensor.dtype, np.floating):
            made[name] = tensor if tensor.dtype == np.int64 else tensor.astype(np.float16)
            continue
        rows = tensor.reshape(len(tensor), -1).astype(np.float32)
        used = np.flatnonzero(rows.any(axis=1))  # of the token table, a handful
        step = _steps(rows[used], most)
        made[f"{name}:q"] = np.clip(np.round(rows[used] / step[:, None]), -most, most).astype(np.int8)
        made[f"{name}:s"] = step.astype(np.float16)
        made[f"{name}:shape"] = np.array(tensor.shape, np.int32)
        if len(used) < len(rows):
            made[f"{name}:rows"] = used.astype(np.int32)
    return made


def _steps(rows: NDArray[np.float32], most: int) -> NDArray[np.float32]:
    """Each row's step, of a few tried the one with the least squared error, as float16 can say it."""
    best = np.full(len(rows), np.inf)
    found = np.ones(len(rows), np.float32)
    largest = np.abs(rows).max(axis=1) / most if rows.size else np.ones(len(rows))
    for share in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5):
        step = np.maximum((largest * share).astype(np.float16).astype(np.float32), np.float32(6e-8))
        error = (np.clip(np.round(rows / step[:, None]), -most, most) * step[:, None] - rows) ** 2
        better = error.sum(axis=1) < best
        best[better], found[better] = error.sum(axis=1)[better], step[better]
    return found


def _write(path: Path, arrays: dict[str, NDArray[np.generic]]) -> None:
    raw = io.BytesIO()
    np.savez(raw, **arrays)
    path.write_bytes(lzma.compress(raw.getvalue(), preset=9 | lzma.PRESET_EXTREME))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
