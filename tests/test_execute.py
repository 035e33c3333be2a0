"""The pass itself: bytes that depend on nothing but recipe and inputs, hashes made on the way, findings, locks."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading

import models
import numpy as np
import pytest
import torch
from models import error_in_steps, f64, recipe

import mergekit_sd as mk
from mergekit_sd.errors import InputChanged, NonFiniteResult, OutputExists, PinMismatch
from mergekit_sd.events import OutputFinished, OutputStarted, Progressed
from mergekit_sd.execute.run import RunOptions, execute, thread_count
from mergekit_sd.execute.tasks import CHUNK, cut
from mergekit_sd.execute.worker import Worker
from mergekit_sd.formats.hashing import LEAF, hash_file_tensors
from mergekit_sd.formats.open import open_model

ODD = CHUNK + 64 * 3 + 37  # more than a chunk, and no multiple of a vector


def large(seed, dtype="fp16", sizes=(ODD, 2 * CHUNK, 3, 1, 0)):
    wanted = {f"t{number}.weight": (size,) for number, size in enumerate(sizes)} | {"scalar.weight": ()}
    return models.filled(wanted, seed, dtype)


STEPS = {
    "mix": {"op": "weighted_sum", "a": "a", "b": "b", "alpha": 0.3},
    "far": {"op": "add_difference", "a": "mix", "b": "b", "c": "c", "alpha": 0.7},
    "whole": {"op": "slerp", "a": "mix", "b": "c", "alpha": 0.6},
}
OUTPUTS = {
    "far": {"model": "far", "file": "far.safetensors"},
    "whole": {"model": "whole", "file": "whole.safetensors", "dtype": "bf16"},
    "copy": {"model": "a", "file": "copy.safetensors", "dtype": "keep"},
    "cast": {"model": "b", "file": "cast.safetensors"},
}


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    for letter, seed, dtype in (("a", 1, "fp16"), ("b", 2, "fp32"), ("c", 3, "fp8_e5m2")):
        models.write(folder / f"{letter}.safetensors", large(seed, dtype))
    return folder


def three_recipe(three, folder, steps=STEPS, outputs=OUTPUTS):
    for letter in "abc":
        if not (folder / f"{letter}.safetensors").exists():
            os.link(three / f"{letter}.safetensors", folder / f"{letter}.safetensors")
    return recipe(folder, {letter: f"{letter}.safetensors" for letter in "abc"}, steps, outputs)


def outputs_of(folder):
    return {name: (folder / entry["file"]).read_bytes() for name, entry in OUTPUTS.items()}


def test_same_bytes_whatever_threads_memory_and_folder(three, tmp_path):
    where = three_recipe(three, tmp_path)
    plan = mk.plan(where)
    execute(plan, RunOptions(threads=1))
    first = outputs_of(tmp_path)
    for options in ({"threads": 2}, {"threads": 5}, {"memory": 1}, {"hashing": True, "scan": True}):
        execute(plan, RunOptions(force=True, **options))
        assert outputs_of(tmp_path) == first, options
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    renamed = {name: {**entry, "file": f"other-{name}.safetensors"} for name, entry in OUTPUTS.items()}
    mk.run(three_recipe(three, elsewhere, outputs=renamed), threads=3)
    for name, data in first.items():
        assert (elsewhere / f"other-{name}.safetensors").read_bytes() == data
    a, b, c = (models.read(three / f"{letter}.safetensors") for letter in "abc")
    made = models.read(tmp_path / "far.safetensors")
    for key, tensor in made.items():
        x, y, z = (f64(each[key]) for each in (a, b, c))
        assert error_in_steps(tensor, 0.7 * x + 0.3 * y + 0.7 * (y - z)) <= 0.6


def test_result_does_not_depend_on_the_place_in_the_tensor(tmp_path):
    """The same numbers at another place of the chunk grid, and as a tail, give the same bits."""
    rng = np.random.default_rng(0)
    piece = [torch.from_numpy(rng.standard_normal(777) * 0.05).float() for _ in "ab"]
    for letter, numbers in zip("ab", piece, strict=True):
        long = torch.zeros(CHUNK + 777)
        long[CHUNK:] = numbers
        shifted = torch.zeros(2000)
        shifted[13 : 13 + 777] = numbers
        models.write(tmp_path / f"{letter}.safetensors", {"alone": numbers, "tail": long, "shifted": shifted})
    names = {"a": "a.safetensors", "b": "b.safetensors"}
    outputs = {"out": {"model": "m", "file": "out.safetensors", "dtype": "fp32"}}
    for step in (
        {"op": "sum_twice", "a": "a", "b": "b", "c": "a", "alpha": 0.3, "beta": 0.7},
        {"op": "triple_sum", "a": "a", "b": "b", "c": "a", "alpha": 0.3, "beta": 0.1},
    ):
        mk.run(recipe(tmp_path, names, {"m": step}, outputs), force=True)
        made = models.read(tmp_path / "out.safetensors")
        assert torch.equal(made["alone"], made["tail"][CHUNK:])
        assert torch.equal(made["alone"], made["shifted"][13 : 13 + 777])


def test_tasks_lie_on_the_grid_of_leaves(three, tmp_path):
    plan = mk.plan(three_recipe(three, tmp_path))
    for output in plan.outputs:
        tasks = list(cut(output))
        assert [t.tensor.info.offset for t in tasks] == sorted(t.tensor.info.offset for t in tasks)
        assert not any(t.tensor.info.nbytes == 0 for t in tasks)
        for task in tasks:
            if task.tensor.how in ("merged", "cast"):
                sizes = {read.dtype.itemsize for read in task.tensor.program.reads} | {task.tensor.info.dtype.itemsize}
                assert all(task.start * size % LEAF == 0 for size in sizes)


def test_threads_fit_the_memory(three, tmp_path):
    output = mk.plan(three_recipe(three, tmp_path)).outputs[0]
    registers = max(tensor.program.registers for tensor in output.tensors)
    assert thread_count(output, RunOptions(threads=5)) == 5
    assert thread_count(output, RunOptions(threads=5, memory=1)) == 1
    budget = 64 * 1024 * 1024
    most = thread_count(output, RunOptions(threads=1000, memory=budget))
    assert most * CHUNK * (4 * registers + 2 * 8) <= budget


def test_long_chain_is_right_and_frugal(tmp_path):
    a, b = large(1, sizes=(999,)), large(2, sizes=(999,))
    models.write(tmp_path / "a.safetensors", a)
    models.write(tmp_path / "b.safetensors", b)
    names = {"a": "a.safetensors", "b": "b.safetensors"}
    for left in (True, False):
        steps, before = {}, "b"
        for number in range(40):
            operands = {"a": before, "b": "a"} if left else {"a": "a", "b": before}
            steps[f"s{number}"] = {"op": "weighted_sum", **operands, "alpha": 0.1 if left else 0.9}
            before = f"s{number}"
        where = recipe(tmp_path, names, steps)
        assert all(tensor.program.registers <= 3 for tensor in mk.plan(where).outputs[0].tensors)
        mk.run(where, force=True)
        made = models.read(tmp_path / "out.safetensors")
        for key, tensor in made.items():
            x, y = f64(a[key]), f64(b[key])
            assert error_in_steps(tensor, 0.9**40 * y + (1 - 0.9**40) * x) <= 0.6


# --- hashes and metadata -------------------------------------------------------------------------------


def test_hashes_are_those_of_the_files(three, tmp_path):
    """Made while streaming, and by reading the finished file again: the same."""
    report = mk.run(three_recipe(three, tmp_path), threads=3)
    plan = mk.plan(tmp_path / "r.toml")
    for output, planned in zip(report.outputs, plan.outputs, strict=True):
        assert output.content_hash == hash_file_tensors(open_model(output.path))
        assert output.bytes == output.path.stat().st_size == planned.size
        used = {plan.inputs[number].name: list(reads) for number, reads in planned.reads().items()}
        assert set(output.inputs) == set(used)
        for name, tensors in used.items():
            file = open_model(tmp_path / f"{name}.safetensors")
            assert output.inputs[name] == hash_file_tensors(file, tensors)
    lock = json.loads((tmp_path / "r.lock").read_text())
    assert lock["outputs"]["far"]["content"] == report.outputs[0].content_hash
    assert lock["inputs"]["b"]["content"] == hash_file_tensors(open_model(tmp_path / "b.safetensors"))


def test_metadata(room):
    steps = {"m": {"op": "weighted_sum", "a": "one", "b": "two", "alpha": {"preset": "GRAD_V", "vae": 0}}}
    names = {"one": "sd1-a.safetensors", "two": str(room / "sd1-b.safetensors"), "unused": "sd1-c.safetensors"}
    outputs = {"final": {"model": "m", "file": "secret-name.safetensors"}}
    mk.run(recipe(room, names, steps, outputs, title="Lantern", seed=7))
    found = models.metadata(room / "secret-name.safetensors")
    assert found["format"] == "pt"
    assert {key.removeprefix("modelspec.") for key in found if key.startswith("modelspec.")} == {
        *("sai_model_spec", "architecture", "implementation", "title", "resolution", "merged_from", "prediction_type")
    }
    assert found["modelspec.sai_model_spec"] == "1.0.1"
    assert found["modelspec.architecture"] == "stable-diffusion-v1"
    assert found["modelspec.title"] == "Lantern"
    assert found["modelspec.resolution"] == "512x512"
    assert found["modelspec.prediction_type"] == "epsilon"
    text = found["mergekit_sd.recipe"]
    data = json.loads(text)
    assert text == json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert set(data["models"]) == {"one", "two"}
    for entry, letter in ((data["models"]["one"], "a"), (data["models"]["two"], "b")):
        assert entry["file"] == f"sd1-{letter}.safetensors"
        assert len(entry["content"]) == 32
        assert int(entry["content"], 16)
    assert data["steps"] == {"m": {**steps["m"]}}
    assert data["outputs"] == {"final": {"model": "m"}}
    everything = "".join(found.values())
    assert "secret-name" not in everything
    assert str(room) not in everything
    mk.run(recipe(room, names, steps, outputs), force=True, metadata="none")
    assert models.metadata(room / "secret-name.safetensors") == {"format": "pt"}


def test_metadata_as_the_webui_reads_it(room):
    """Any value that starts with a brace is JSON; the parents are named by sha256, and their parents kept."""
    grand = {"f" * 64: {"name": "old", "legacy_hash": "0" * 8, "sd_merge_recipe": None}}
    record = {"type": "webui", "multiplier": 0.25}
    b = models.checkpoint("sd1", 2)
    models.write(
        room / "b.safetensors",
        b,
        {"sd_merge_models": json.dumps(grand), "sd_merge_recipe": json.dumps(record), "format": "pt"},
    )
    models.write(room / "vae.safetensors", models.vae_file())
    names = {"z": "sd1-a.safetensors", "b": "b.safetensors", "c": "sd1-c.safetensors", "v": "vae.safetensors"}

    def sha256(name):
        return hashlib.sha256((room / names[name]).read_bytes()).hexdigest()

    def webui(step, **output):
        outputs = {"out": {"model": "m", "file": "out.safetensors", **output}}
        mk.run(recipe(room, names, {"m": step}, outputs), force=True, metadata="webui")
        found = models.metadata(room / "out.safetensors")
        parsed = {key: json.loads(value) for key, value in found.items() if value[:1] == "{"}
        return parsed["sd_merge_recipe"], parsed["sd_merge_models"]

    made, parents = webui({"op": "weighted_sum", "a": "z", "b": "b", "alpha": 0.3}, vae="v")
    hashes = [made[f"{rank}_model_hash"] for rank in ("primary", "secondary", "tertiary")]
    assert hashes == [sha256("z"), sha256("b"), None]
    assert made["interp_method"] == "Weighted sum"
    assert made["multiplier"] == 0.3
    assert made["save_as_half"] is True
    assert made["bake_in_vae"] == "vae.safetensors"
    assert made["is_inpainting"] is made["is_instruct_pix2pix"] is False
    assert parents[sha256("b")]["sd_merge_recipe"] == record
    assert parents[sha256("b")]["name"] == "b.safetensors"
    assert parents["f" * 64] == grand["f" * 64]
    assert set(parents) == {*grand, sha256("z"), sha256("b"), sha256("v")}
    piece = (room / names["z"]).read_bytes()[0x100000:][:0x10000]
    assert parents[sha256("z")]["legacy_hash"] == hashlib.sha256(piece).hexdigest()[:8]
    made, _ = webui({"op": "add_difference", "a": "c", "b": "b", "c": "z"})
    hashes = [made[f"{rank}_model_hash"] for rank in ("primary", "secondary", "tertiary")]
    assert hashes == [sha256("c"), sha256("b"), sha256("z")]
    assert made["multiplier"] == 1.0, "the operation's own default"


# --- NaN, Inf, changed inputs ----------------------------------------------------------------------------


def test_nonfinite_lists_every_tensor_and_leaves_nothing(three, tmp_path):
    b = large(2, "fp32")
    b["t0.weight"][ODD - 1] = float("nan")
    b["t1.weight"][:5] = float("inf")
    b["scalar.weight"] = torch.tensor(float("-inf"))
    models.write(tmp_path / "b.safetensors", b)
    (tmp_path / "far.safetensors").write_bytes(b"old")
    where = three_recipe(three, tmp_path, outputs={"far": OUTPUTS["far"]})
    for threads in (1, 4):
        with pytest.raises(NonFiniteResult) as caught:
            mk.run(where, threads=threads, force=True)
        assert caught.value.exit_code == 3
        assert caught.value.details == ("scalar.weight: 1 element", "t0.weight: 1 element", "t1.weight: 5 elements")
        assert (tmp_path / "far.safetensors").read_bytes() == b"old"
        assert models.left_overs(tmp_path) == []
        assert not (tmp_path / "r.lock").exists()
    report = mk.run(where, force=True, allow_nonfinite=True)
    assert report.outputs[0].nonfinite == {"scalar.weight": 1, "t0.weight": 1, "t1.weight": 5}
    assert torch.isnan(models.read(tmp_path / "far.safetensors")["t0.weight"][ODD - 1])


def test_an_input_that_changes_meanwhile_is_refused(three, tmp_path):
    where = three_recipe(three, tmp_path)
    (tmp_path / "b.safetensors").unlink()
    shutil.copy(three / "b.safetensors", tmp_path / "b.safetensors")

    def touch(event):
        if isinstance(event, OutputStarted):
            os.utime(tmp_path / "b.safetensors", ns=(1, 1))

    with pytest.raises(InputChanged) as caught:
        mk.run(where, on_event=touch)
    assert caught.value.file == str(tmp_path / "b.safetensors")
    assert not (tmp_path / "far.safetensors").exists()
    assert models.left_overs(tmp_path) == []


def test_a_listener_that_fails_stops_the_run(three, tmp_path):
    def fail(event):
        if isinstance(event, Progressed):
            raise RuntimeError("listener")

    before = threading.active_count()
    with pytest.raises(RuntimeError, match="listener"):
        mk.run(three_recipe(three, tmp_path), on_event=fail)
    assert threading.active_count() == before
    assert models.left_overs(tmp_path) == []
    assert not (tmp_path / "far.safetensors").exists()


def test_a_worker_that_fails_stops_the_others(three, tmp_path, monkeypatch):
    def fail(self, task):
        raise ValueError("bug")

    monkeypatch.setattr(Worker, "do", fail)
    with pytest.raises(ValueError, match="bug"):
        mk.run(three_recipe(three, tmp_path), threads=4)
    assert models.left_overs(tmp_path) == []


def test_events(three, tmp_path):
    events = []
    mk.run(three_recipe(three, tmp_path), on_event=events.append)
    for name, entry in OUTPUTS.items():
        own = [event for event in events if getattr(event, "output", None) == name]
        assert isinstance(own[0], OutputStarted)
        assert isinstance(own[-1], OutputFinished)
        done = [event.done for event in own if isinstance(event, Progressed)]
        assert done == sorted(done)
        assert done[-1] <= own[0].bytes == (tmp_path / entry["file"]).stat().st_size
        assert all(json.dumps(event.as_json()) for event in own)


# --- pins and locks --------------------------------------------------------------------------------------------


def test_pin(three, tmp_path):
    three_recipe(three, tmp_path)
    right = hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()
    outputs = {"out": {"model": "a", "file": "out.safetensors"}}
    mk.run(recipe(tmp_path, {"a": {"file": "a.safetensors", "sha256": right.upper()}}, None, outputs))
    assert json.loads((tmp_path / "r.lock").read_text())["inputs"]["a"]["sha256"] == right
    (tmp_path / "out.safetensors").write_bytes(b"old")
    with pytest.raises(PinMismatch, match=right) as caught:
        mk.run(recipe(tmp_path, {"a": {"file": "a.safetensors", "sha256": "0" * 64}}, None, outputs), force=True)
    assert (caught.value.exit_code, caught.value.key) == (3, "models.a.sha256")
    assert caught.value.line
    assert (tmp_path / "out.safetensors").read_bytes() == b"old"


@pytest.fixture
def done(tmp_path):
    """A recipe of two outputs that has been run."""
    for seed, letter in enumerate("ab"):
        models.write(tmp_path / f"{letter}.safetensors", large(seed, sizes=(100, 7)))
    steps = {"m": {"op": "weighted_sum", "a": "a", "b": "b", "alpha": 0.3}}
    outputs = {
        "one": {"model": "m", "file": "one.safetensors"},
        "two": {"model": "b", "file": "two.safetensors", "dtype": "fp32"},
    }
    where = recipe(tmp_path, {"a": "a.safetensors", "b": "b.safetensors"}, steps, outputs)
    mk.run(where)
    return where


def test_locked_passes_and_keeps_the_lock(done):
    before = (done.parent / "one.safetensors").read_bytes(), done.with_suffix(".lock").read_bytes()
    mk.run(done, locked=True, force=True)
    assert ((done.parent / "one.safetensors").read_bytes(), done.with_suffix(".lock").read_bytes()) == before


def test_locked_refuses_what_differs(done):
    folder, lock = done.parent, done.with_suffix(".lock")
    before = {path: path.read_bytes() for path in folder.glob("*.safetensors")}

    def refused(match, **options):
        with pytest.raises(PinMismatch, match=match) as caught:
            mk.run(done, locked=True, force=True, **options)
        assert caught.value.exit_code == 3
        assert models.left_overs(folder) == []
        return caught.value

    refused("recipe differs", set={"steps.m.alpha": 0.4})
    changed = large(5, sizes=(100, 7))
    models.write(folder / "a.safetensors", changed)  # of the same size
    error = refused("lock")
    assert "run without --locked" in error.hint
    models.write(folder / "a.safetensors", changed | {"more": torch.ones(3)})
    assert '"a"' in refused("locked").message
    (folder / "a.safetensors").write_bytes(before[folder / "a.safetensors"])
    text = json.loads(lock.read_text())
    text["outputs"]["one"]["content"] = "0" * 32
    lock.write_text(json.dumps(text))
    refused('"one" differs from its lock')
    refused('"one" differs from its lock', hashing=False)
    lock.write_text("{")
    refused("cannot be read")
    lock.unlink()
    refused("no lock")
    assert {path: path.read_bytes() for path in folder.glob("*.safetensors")} == before


def test_skip_done(done):
    folder = done.parent

    def run(**options):
        report = mk.run(done, skip_done=True, **options)
        return report.skipped, tuple(each.name for each in report.outputs)

    assert run() == (("one", "two"), ())
    assert run(locked=True) == (("one", "two"), ())
    lock = done.with_suffix(".lock").read_bytes()
    (folder / "two.safetensors").unlink()
    assert run() == (("one",), ("two",))
    assert done.with_suffix(".lock").read_bytes() == lock
    (folder / "one.safetensors").unlink()
    assert run(locked=True) == (("two",), ("one",))
    assert run() == (("one", "two"), ())
    # An output that was touched is made again, with force.
    data = bytearray((folder / "one.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "one.safetensors").write_bytes(data)
    with pytest.raises(OutputExists):
        run()
    assert run(force=True) == (("two",), ("one",))
    (folder / "one.safetensors").write_bytes(b"\xff" * len(data))  # damaged, its size kept
    assert run(force=True) == (("two",), ("one",))
    # A changed input, its size kept.
    models.write(folder / "a.safetensors", large(5, sizes=(100, 7)))
    assert run(force=True) == ((), ("one", "two"))
    assert run(set={"steps.m.alpha": 0.4}, force=True) == ((), ("one", "two"))


def test_skip_done_with_a_model_of_which_nothing_is_read(done):
    options = {"set": {"steps.m.alpha": 0, "outputs.two.model": "a"}}
    mk.run(done, force=True, **options)
    assert mk.run(done, skip_done=True, **options).skipped == ("one", "two")


def test_existing_output_needs_force(done):
    before = (done.parent / "one.safetensors").read_bytes()
    with pytest.raises(OutputExists) as caught:
        mk.run(done)
    assert caught.value.exit_code == 2
    assert caught.value.file == str(done.parent / "one.safetensors")
    assert "--force" in caught.value.hint
    assert (done.parent / "one.safetensors").read_bytes() == before
