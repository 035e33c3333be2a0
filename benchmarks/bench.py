"""How fast a merge is, beside copying one file and beside what others do.

    python benchmarks/bench.py FOLDER [--rounds 5] [--family sd1] [--only NAME …]

Makes full-size fp16 checkpoints of a real layout in FOLDER (SD1.5: 2.13 GB each, kept for the next
time; 25 GB in all with the chain of eight), then runs each contender as a process of its own, in
turn: A B C A B C. Every output is synced to the disk. Prints wall time, the time less that of
`import torch`, peak memory (resident, whole process) and ratios to `cp` and `sync` of one file,
round by round. Other tools take part where they are installed: give their Python with
`--sd-mecha PYTHON` and `--mergekit PYTHON` (a virtual environment of their own each).
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mergekit_sd.architectures import get
from mergekit_sd.formats.dtypes import F16, F32, I64
from mergekit_sd.formats.header import build_header
from mergekit_sd.formats.writing import OutputFile

HERE = Path(__file__).parent
CHAIN = 8
POOL = 1 << 23


@dataclass(frozen=True)
class Run:
    """One measured process."""

    wall: float
    peak_mib: float


def make_checkpoint(path: Path, family: str, seed: int) -> None:
    """Write a full-size checkpoint of a layout with random weights, if it is not there."""
    if path.exists():
        return
    architecture = get(family)
    kinds = {
        key: I64 if key == architecture.position_ids else F32 if key in architecture.schedule else F16
        for key in architecture.tensors
    }
    header = build_header(
        [(key, kinds[key], spec.shape) for key, spec in architecture.tensors.items()], {"format": "pt"}
    )
    random = np.random.default_rng(seed)
    pool = memoryview(random.normal(0.0, 0.03, POOL).astype(np.float16).tobytes())
    with OutputFile(path, header.size) as target:
        target.write(memoryview(header.raw), 0)
        for tensor in header.tensors.values():
            if tensor.dtype == I64:
                target.write(memoryview(np.arange(tensor.numel, dtype=np.int64).tobytes()), tensor.offset)
                continue
            done = 0
            while done < tensor.nbytes:
                start = 2 * int(random.integers(0, POOL // 2))
                piece = pool[start : start + tensor.nbytes - done]
                target.write(piece, tensor.offset + done)
                done += len(piece)
        target.sync()
        target.commit()


def measure(command: list[str]) -> Run:
    """Run a command to its end; raises if it fails."""
    with tempfile.TemporaryFile() as log:
        begun = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{command}\n{log.read().decode(errors='replace')}")
    return Run(wall, usage.ru_maxrss / 1024)


def contenders(folder: Path, models: list[Path], arguments: argparse.Namespace) -> dict[str, list[str]]:
    """Each contender's command; the output is always OUT in the folder."""
    a, b, c = (str(model) for model in models[:3])
    out = str(folder / "out.safetensors")
    ours = [sys.executable, "-m", "mergekit_sd"]
    found = {
        "import torch": [sys.executable, "-c", "import torch"],
        "cp + sync": ["sh", "-c", f"cp '{a}' '{out}' && sync '{out}'"],
        "weighted_sum": [*ours, "merge", a, b, "--alpha", "0.3", "-o", out, "--force"],
        "weighted_sum MBW": [*ours, "merge", a, b, "--alpha", "SMOOTHSTEP", "-o", out, "--force"],
        "add_difference": [
            *ours,
            "merge",
            a,
            b,
            c,
            "--method",
            "add_difference",
            "--alpha",
            "0.7",
            "-o",
            out,
            "--force",
        ],
        f"chain of {CHAIN}": [*ours, "run", str(chain_recipe(folder, models)), "--force"],
        "load all, loop": [sys.executable, str(HERE / "load_all.py"), a, b, out],
    }
    if arguments.sd_mecha:
        for name, method in (("sd-mecha ws", "weighted_sum"), ("sd-mecha ad", "add_difference")):
            found[name] = [arguments.sd_mecha, str(HERE / "peer_sd_mecha.py"), method, a, b, c, out]
    if arguments.mergekit:
        found["mergekit linear"] = [arguments.mergekit, str(HERE / "peer_mergekit.py"), a, b, str(folder / "mergekit")]
    return {name: command for name, command in found.items() if not arguments.only or name in arguments.only}


def chain_recipe(folder: Path, models: list[Path]) -> Path:
    """A recipe of seven weighted sums over eight models."""
    lines = ["recipe = 1", "[models]", *(f"m{n} = '{model.name}'" for n, model in enumerate(models))]
    for n in range(1, len(models)):
        previous = "m0" if n == 1 else f"s{n - 1}"
        lines += [f"[steps.s{n}]", 'op = "weighted_sum"', f'a = "{previous}"', f'b = "m{n}"', f"alpha = 0.{n}"]
    lines += ["[outputs.out]", f'model = "s{len(models) - 1}"', "file = 'out.safetensors'"]
    path = folder / "chain.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def report(runs: dict[str, list[Run]]) -> None:
    """Print medians, and ratios as the median of the rounds' own ratios."""
    torch_time = [run.wall for run in runs["import torch"]]
    torch_peak = statistics.median(run.peak_mib for run in runs["import torch"])
    copy = [run.wall for run in runs["cp + sync"]]
    print(
        f"\n{'':18}{'wall s':>9}{'less torch':>12}{'× cp+sync':>11}"
        f"{'  (min … max)':16}{'peak MiB':>10}{'above torch':>13}"
    )
    for name, each in runs.items():
        wall = statistics.median(run.wall for run in each)
        with_torch = name not in ("cp + sync", "import torch")
        net = [run.wall - (base if with_torch else 0.0) for run, base in zip(each, torch_time, strict=True)]
        ratios = sorted(mine / base for mine, base in zip(net, copy, strict=True))
        peak = statistics.median(run.peak_mib for run in each)
        span = f"  ({ratios[0]:.2f} … {ratios[-1]:.2f})"
        above = f"{peak - torch_peak:.0f}" if with_torch else ""
        print(
            f"{name:18}{wall:9.2f}{statistics.median(net):12.2f}"
            f"{statistics.median(ratios):11.2f}{span:16}{peak:10.0f}{above:>13}"
        )


def main() -> None:
    """Parse, make, measure in turn, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--family", default="sd1", choices=["sd1", "sd2", "sdxl"])
    parser.add_argument("--sd-mecha", metavar="PYTHON")
    parser.add_argument("--mergekit", metavar="PYTHON")
    parser.add_argument("--only", nargs="*", metavar="NAME")
    arguments = parser.parse_args()
    if arguments.only:
        arguments.only += ["import torch", "cp + sync"]
    arguments.folder.mkdir(parents=True, exist_ok=True)
    models = [arguments.folder / f"{arguments.family}-{number}.safetensors" for number in range(CHAIN)]
    for number, model in enumerate(models):
        make_checkpoint(model, arguments.family, number)
    commands = contenders(arguments.folder, models, arguments)
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for number in range(arguments.rounds + 1):  # the first round warms the cache and is not counted
        for name, command in commands.items():
            run = measure(command)
            print(f"{'warm-up' if number == 0 else f'round {number}'}: {name} {run.wall:.2f} s", file=sys.stderr)
            if number:
                runs[name].append(run)
            for left in (arguments.folder / "out.safetensors", arguments.folder / "mergekit"):
                shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
    report(runs)


if __name__ == "__main__":
    main()
