"""What sampling takes of memory: estimates from headers alone, and what a process really took."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import models
import pytest
import torch

import mergekit_sd as mk
from mergekit_sd.planning.samples import plan_sampled
from mergekit_sd.sampling.memory import MemoryNeed, memory_need, peak_memory
from mergekit_sd.sampling.tensors import plan_networks

MIB = 1 << 20


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    models.write(folder / "m.safetensors", models.checkpoint("sd1", width=8))
    return plan_networks(plan_sampled(mk.load(models.recipe(folder, {"m": "m.safetensors"}, {}, {})), ["m"])["m"])


def test_weights_are_counted_in_the_dtype_that_they_will_have(planned):
    elements = {name: sum(t.info.numel for t in each.tensors) for name, each in planned.outputs.items()}
    whole, vae = sum(elements.values()), elements["vae"]
    assert memory_need(planned, "fp32", (64, 64)).weights == 4 * whole
    assert memory_need(planned, "bf16", (64, 64)).weights == 2 * whole
    assert memory_need(planned, "fp16", (64, 64)).weights == 2 * whole + 2 * vae


def test_computing_takes_more_for_larger_pictures_and_more_of_them(planned):
    one = memory_need(planned, "fp32", (64, 64))
    for more in (memory_need(planned, "fp32", (128, 64)), memory_need(planned, "fp32", (64, 64), batch=2)):
        assert more.weights == one.weights
        assert more.unet > one.unet
        assert more.vae > one.vae
    assert memory_need(planned, "bf16", (64, 64)).unet < one.unet


def test_the_peak_is_that_of_one_network_at_a_time():
    assert MemoryNeed(weights=10, unet=3, vae=5, besides=1).peak == 16


# MiB above a process's own after its imports, of a model with SD1.5's shapes (2033 MiB of weights in bf16).
MEASURED = {
    ("bf16", 256): {"unet": 2612 - 438, "vae": 2796 - 438},
    ("bf16", 512): {"unet": 2726 - 438, "vae": 3340 - 438},
    ("fp32", 256): {"unet": 4718 - 438},
}


@pytest.mark.parametrize(("dtype", "side"), MEASURED)
def test_estimates_are_near_what_was_measured(dtype, side):
    widths = {"unet": (320, 640), "vae": (128, 256)}
    empty = SimpleNamespace(tensors=())
    shapes = SimpleNamespace(
        outputs=dict.fromkeys(widths, empty),
        files={f"{name}/config.json": {"block_out_channels": list(each)} for name, each in widths.items()},
    )
    need = memory_need(shapes, dtype, (side, side))
    weights = {"bf16": 2033, "fp32": 4067}[dtype]
    for part, whole in MEASURED[dtype, side].items():
        assert getattr(need, part) / MIB == pytest.approx(whole - weights, rel=0.4)


def test_a_process_tells_its_peak():
    assert peak_memory() > 50 * MIB
    assert peak_memory("mps") is None


LOAD = """
import json, sys
import mergekit_sd as mk
from mergekit_sd.execute.in_memory import compute_in_memory
from mergekit_sd.formats.dtypes import DTYPES
from mergekit_sd.lazy import torch
from mergekit_sd.planning.samples import plan_sampled
plan = plan_sampled(mk.load("r.toml"), ["m"])["m"]
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
torch.ones(1)
before = peak()
made = compute_in_memory(plan, plan.outputs[0], DTYPES[sys.argv[1]], threads=2)
print(json.dumps([sum(t.numel() * t.element_size() for t in made.tensors.values()), peak() - before]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux tells the peak in /proc")
@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_loading_takes_one_copy_of_the_weights(tmp_path, dtype):
    """Copied or cast: what comes beside it are the threads' buffers."""
    tensors = models.checkpoint("sd1")
    matrices = [name for name, each in tensors.items() if name.startswith(models.UNET) and each.ndim == 2][:96]
    models.write(tmp_path / "m.safetensors", tensors | {name: torch.ones(1024, 1024).half() for name in matrices})
    models.recipe(tmp_path, {"m": "m.safetensors"}, {}, {})
    command = [sys.executable, "-c", LOAD, dtype]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    weights, taken = json.loads(done.stdout)
    assert weights > 190 * MIB
    assert taken < weights + 64 * MIB
