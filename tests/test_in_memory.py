"""Outputs in memory are what their files would hold, cast: to the bit, whatever the dtypes."""

from __future__ import annotations

import itertools

import models
import pytest
from models import DTYPES, same

import mergekit_sd as mk
from mergekit_sd.errors import InputChanged
from mergekit_sd.events import Progressed
from mergekit_sd.execute.in_memory import ALIGNED, compute_in_memory
from mergekit_sd.formats.dtypes import BF16, F16, F32, OUTPUT_DTYPES
from mergekit_sd.planning.samples import plan_sampled

LARGE = models.UNET + "time_embed.0.weight"
STEPS = {"mix": {"op": "weighted_sum", "a": "a", "b": "b", "alpha": 0.3}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("in-memory")
    for seed, dtype in ((0, "fp16"), (1, "fp32")):
        # One tensor that goes in several pieces, however it is made.
        large = models.filled({LARGE: (1500, 1700)}, seed, dtype)
        models.write(folder / f"{seed}.safetensors", models.checkpoint("sd1", seed, dtype, width=12) | large)
    return folder


def plan_of(folder, output, dtype, steps=STEPS, **files):
    files = {"a": "0.safetensors", "b": "1.safetensors"} | files
    outputs = {"out": {"model": output, "file": f"{output}-{dtype}.safetensors", "dtype": dtype}}
    path = models.recipe(folder, files, steps, outputs)
    return path, plan_sampled(mk.load(path), ["out"])["out"]


@pytest.mark.parametrize(
    ("output", "dtype", "wanted"),
    [
        *itertools.product(["a", "mix"], ["fp16", "fp32", "fp8_e5m2"], ["fp16", "bf16", "fp32"]),
        ("a", "keep", "fp16"),
    ],
)
def test_memory_holds_what_the_file_would(folder, output, dtype, wanted):
    path, plan = plan_of(folder, output, dtype)
    made = compute_in_memory(plan, plan.outputs[0], OUTPUT_DTYPES[wanted], threads=2)
    mk.run(path, force=True)
    written = models.read(folder / f"{output}-{dtype}.safetensors")
    assert made.tensors.keys() == written.keys()
    for name, tensor in written.items():
        cast = tensor.to(DTYPES[wanted]) if tensor.is_floating_point() else tensor
        assert same(made.tensors[name], cast), name
    assert not made.nonfinite


def test_tensors_are_aligned_views_of_one_buffer(folder):
    _, plan = plan_of(folder, "a", "keep")
    tensors = compute_in_memory(plan, plan.outputs[0], BF16).tensors.values()
    assert len({each.untyped_storage().data_ptr() for each in tensors}) == 1
    assert all(each.data_ptr() % ALIGNED == next(iter(tensors)).data_ptr() % ALIGNED for each in tensors)


def test_nan_and_inf_are_counted_once_for_each_element(folder):
    broken = models.read(folder / "0.safetensors")
    name, other = models.CONV_IN, models.VAE + "decoder.conv_in.bias"
    broken[name].view(-1)[:5] = float("nan")
    broken[other][2], broken[other][3] = float("inf"), -float("inf")
    models.write(folder / "nan.safetensors", broken)
    for output, dtype in (("a", "keep"), ("a", "fp32"), ("mix", "fp16")):
        _, plan = plan_of(folder, output, dtype, a="nan.safetensors")
        for wanted in (F16, F32):
            assert compute_in_memory(plan, plan.outputs[0], wanted).nonfinite == {name: 5, other: 2}


def test_what_a_cast_cannot_hold_counts_as_inf(folder):
    large = models.checkpoint("sd1", 0, "fp32", width=12)
    large[models.CONV_IN].view(-1)[0] = 1e6
    models.write(folder / "large.safetensors", large)
    _, plan = plan_of(folder, "a", "keep", a="large.safetensors")
    assert compute_in_memory(plan, plan.outputs[0], F32).nonfinite == {}
    assert compute_in_memory(plan, plan.outputs[0], F16).nonfinite == {models.CONV_IN: 1}


def test_large_finite_numbers_are_no_finding(folder):
    """Their sum is none that float32 holds."""
    large = models.checkpoint("sd1", 0, "fp32", width=12)
    large[models.CONV_IN].fill_(3e38)
    models.write(folder / "huge.safetensors", large)
    _, plan = plan_of(folder, "a", "keep", a="huge.safetensors")
    assert compute_in_memory(plan, plan.outputs[0], F32).nonfinite == {}


def test_progress_ends_at_all_bytes(folder):
    _, plan = plan_of(folder, "mix", "fp16")
    events = []
    compute_in_memory(plan, plan.outputs[0], F32, on_event=events.append)
    last = [event for event in events if isinstance(event, Progressed)][-1]
    assert last.done == last.bytes == sum(tensor.info.nbytes for tensor in plan.outputs[0].tensors)


def test_an_input_that_changes_is_refused(folder, tmp_path):
    source = models.write(tmp_path / "a.safetensors", models.checkpoint("sd1", width=4))
    _, plan = plan_of(tmp_path, "a", "keep", steps={}, b="a.safetensors", a="a.safetensors")
    models.write(source, models.checkpoint("sd1", 5, width=4))
    with pytest.raises(InputChanged):
        compute_in_memory(plan, plan.outputs[0], F32)
