"""`--device`: a GPU's path through pinned buffers makes what the CPU's makes; without a GPU it is refused."""

from __future__ import annotations

import models
import numpy as np
import pytest
import torch
from models import recipe
from test_merge import triple

import mergekit_sd as mk
from mergekit_sd.errors import EnvironmentFault
from mergekit_sd.execute import run as engine
from mergekit_sd.execute.memory import DeviceMemory
from mergekit_sd.execute.tasks import CHUNK

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
STEPS = {
    "mix": {"op": "weighted_sum", "a": "a", "b": "b", "alpha": "GRAD_V"},
    "turned": {"op": "slerp", "a": "mix", "b": "c", "alpha": 0.3},
    "m": {"op": "add_difference", "a": "turned", "b": "b", "c": "c", "alpha": 0.7},
}


def on_both_paths(where, monkeypatch, **options):
    """The bytes that the host's path makes, which the accelerator's makes, too."""
    out = where.parent / "out.safetensors"
    mk.run(where, **options)
    direct = out.read_bytes()
    monkeypatch.setattr(engine, "memory_of", lambda device: DeviceMemory(torch.device("cpu")))
    report = mk.run(where, force=True, **options)
    assert out.read_bytes() == direct
    return report


def test_the_staged_path_makes_the_same_bytes(room, monkeypatch):
    on_both_paths(recipe(room, triple("sd1"), STEPS), monkeypatch, scan=True)


def test_the_staged_path_with_large_tensors_and_every_dtype(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for letter, dtype in (("a", "fp16"), ("b", "fp32"), ("c", "fp64")):
        numbers = torch.from_numpy(rng.standard_normal(2 * CHUNK + 777) * 0.1).to(models.DTYPES[dtype])
        models.write(tmp_path / f"{letter}.safetensors", {"x": numbers, "y": numbers[: CHUNK - 1].clone()})
    files = {letter: f"{letter}.safetensors" for letter in "abc"}
    report = on_both_paths(recipe(tmp_path, files, STEPS | {"mix": {**STEPS["mix"], "alpha": 0.3}}), monkeypatch)
    assert report.outputs[0].content_hash


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_refused_before_anything_is_written(room):
    with pytest.raises(EnvironmentFault, match="no GPU") as caught:
        mk.run(recipe(room, triple("sd1"), STEPS), device="cuda")
    assert caught.value.exit_code == 4
    assert "doctor" in caught.value.hint
    assert not (room / "out.safetensors").exists()
    assert models.left_overs(room) == []


@needs_gpu
def test_a_gpu_makes_what_the_cpu_makes(room):
    where = recipe(room, triple("sd1"), STEPS)
    mk.run(where)
    expected = models.read(room / "out.safetensors")
    mk.run(where, force=True, device="cuda")
    for name, tensor in models.read(room / "out.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=2e-3, atol=1e-6)
