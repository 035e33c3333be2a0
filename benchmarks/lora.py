"""Extracting a LoRA from full-size checkpoints, against the way that loads both and decomposes every layer in full.

    python benchmarks/lora.py FOLDER [--family sd1] [--rank 32]

Makes a full-size fp16 checkpoint of a real layout in FOLDER (see bench.py) and one that differs from it by
a low-rank change and noise in every layer. Prints the seconds of `lora extract` as a whole command and
its peak memory; of the other way, loading, and one full SVD of each shape times how often it occurs
(`torch.linalg.svd`, whose full matrices kohya's script does not decline).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from bench import make_checkpoint, measure
from safetensors.torch import load_file, save_file

from mergekit_sd import architectures
from mergekit_sd.adapters.targets import targets_of


def make_tuned(base: Path, tuned: Path) -> None:
    """A checkpoint with a change of falling singular values and noise in every matrix, if it is not there."""
    if tuned.exists():
        return
    torch.manual_seed(1)
    tensors = load_file(base)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.ndim in (2, 4):
            flat, rank = tensor.flatten(1).float(), 40
            left = torch.randn(len(flat), rank) * torch.logspace(0, -2, rank)
            change = left @ torch.randn(rank, flat.shape[1]) / rank**0.5 * 0.002
            noise = torch.randn(flat.shape) * 0.0005
            tensors[name] = (flat + change + noise).reshape(tensor.shape).to(tensor.dtype)
    save_file(tensors, tuned)


def decompose_all(base: Path, tuned: Path, family: str) -> tuple[float, float]:
    """Seconds of loading both models in float32, and of the full SVD of every layer."""
    begun = time.perf_counter()
    one, other = ({n: t.float() for n, t in load_file(path).items()} for path in (tuned, base))
    loading = time.perf_counter() - begun
    names = [layer.target("weight").tensor for layer in targets_of(architectures.get(family))]
    shapes = Counter(tuple(one[name].flatten(1).shape) for name in names)
    first = {tuple(one[name].flatten(1).shape): name for name in reversed(names)}
    seconds = 0.0
    for shape, times in shapes.items():
        change = (one[first[shape]] - other[first[shape]]).flatten(1)
        begun = time.perf_counter()
        torch.linalg.svd(change)
        seconds += times * (time.perf_counter() - begun)
    return loading, seconds


def main() -> None:
    """Parse, make, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--family", default="sd1", choices=["sd1", "sd2"])
    parser.add_argument("--rank", type=int, default=32)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    base, tuned = (arguments.folder / f"{arguments.family}-{name}.safetensors" for name in ("0", "tuned"))
    make_checkpoint(base, arguments.family, 0)
    make_tuned(base, tuned)
    out = arguments.folder / "lora.safetensors"
    command = [sys.executable, "-m", "mergekit_sd", "lora", "extract", str(tuned), str(base)]
    alone = measure([sys.executable, "-c", "import torch"])
    ours = measure([*command, "--rank", str(arguments.rank), "-o", str(out), "--force"])
    print(f"lora extract: {ours.wall:.1f} s, {ours.peak_mib - alone.peak_mib:.0f} MiB above import torch", flush=True)
    loading, seconds = decompose_all(base, tuned, arguments.family)
    print(
        f"the other way: {loading:.1f} s loading, {seconds:.1f} s decomposing; {(loading + seconds) / ours.wall:.0f} ×"
    )
    out.unlink()


if __name__ == "__main__":
    main()
