"""How long each merge method takes at full size, as a ratio to weighted_sum; and a chain of ten methods.

    python benchmarks/methods.py FOLDER [--family sd1] [--only NAME …] [--skip NAME …]

Makes full-size fp16 checkpoints of a real layout in FOLDER (see bench.py; five of them), then runs
the example recipe of every operation in a process of its own, the fast ones several times. Prints
seconds (less `import torch`), the ratio to weighted_sum in the same round, and peak memory above
that of `import torch`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tomllib
from pathlib import Path

from bench import make_checkpoint, measure

from mergekit_sd import recipe_text
from mergekit_sd.operations import OPERATIONS
from mergekit_sd.reference import example_recipe

MODELS = 5
QUICK = 15.0  # seconds; what takes longer runs once

# Ten methods over five models, one after the other: elementwise ones, norms, sorts, draws, a list.
TEN = """
recipe = 1
seed = 7
[models]
m0 = "m0"
m1 = "m1"
m2 = "m2"
m3 = "m3"
m4 = "m4"
[steps.s1]
op = "weighted_sum"
a = "m0"
b = "m1"
alpha = "GRAD_V"
[steps.s2]
op = "add_difference"
a = "s1"
b = "m2"
c = "m3"
alpha = 0.5
[steps.s3]
op = "slerp"
a = "s2"
b = "m4"
alpha = 0.3
[steps.s4]
op = "train_difference"
a = "s3"
b = "m1"
c = "m0"
alpha = 0.4
[steps.s5]
op = "ties"
base = "m0"
models = ["s4", "m2", "m3"]
density = 0.5
[steps.s6]
op = "similarity_add_difference"
a = "s5"
b = "m3"
c = "m0"
alpha = 0.3
beta = 0.5
[steps.s7]
op = "dare_linear"
base = "s6"
models = ["m4", "m1"]
weights = [0.3, 0.2]
density = 0.6
[steps.s8]
op = "geometric_median"
models = ["s7", "m2", "m4"]
[steps.s9]
op = "formula"
expr = "s8 + 0.2*(m3 - m0)"
[steps.s10]
op = "tensor_sum"
a = "s9"
b = "m1"
alpha = 0.2
beta = 0.1
[outputs.out]
model = "s10"
file = "out.safetensors"
"""


def write_recipe(folder: Path, name: str, text: str, files: list[Path]) -> Path:
    """The recipe with full-size files for its models."""
    data = tomllib.loads(text)
    data["models"] = {model: files[number].name for number, model in enumerate(data["models"])}
    data["outputs"]["out"]["file"] = "out.safetensors"
    path = folder / f"{name}.toml"
    path.write_text(recipe_text(data), encoding="utf-8")
    return path


def main() -> None:
    """Parse, make, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--family", default="sd1", choices=["sd1", "sd2", "sdxl"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", metavar="NAME", default=[])
    parser.add_argument("--skip", nargs="*", metavar="NAME", default=["exchange_ema"])
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    files = [arguments.folder / f"{arguments.family}-{number}.safetensors" for number in range(MODELS)]
    for number, file in enumerate(files):
        make_checkpoint(file, arguments.family, number)
    texts = {name: example_recipe(operation) for name, operation in OPERATIONS.items()} | {"ten methods": TEN}
    names = [name for name in arguments.only or texts if name not in arguments.skip]
    run = [sys.executable, "-m", "mergekit_sd", "run"]
    torch_alone = [sys.executable, "-c", "import torch"]
    print(f"{'':28}{'seconds':>9}{'× weighted_sum':>16}{'MiB above torch':>17}")
    for name in names:
        weighted_sum, mine_too = (
            [*run, str(write_recipe(arguments.folder, each.replace(" ", "-"), texts[each], files)), "--force"]
            for each in ("weighted_sum", name)
        )
        nets: list[float] = []
        ratios: list[float] = []
        peaks: list[float] = []
        for _ in range(arguments.rounds):
            base, one, mine = (measure(command) for command in (torch_alone, weighted_sum, mine_too))
            nets.append(mine.wall - base.wall)
            ratios.append((mine.wall - base.wall) / (one.wall - base.wall))
            peaks.append(mine.peak_mib - base.peak_mib)
            if mine.wall > QUICK:
                break
        median = statistics.median
        print(f"{name:28}{median(nets):9.2f}{median(ratios):16.2f}{median(peaks):17.0f}", flush=True)
    (arguments.folder / "out.safetensors").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
