"""How a survey's tensors share the memory: only as many at once as fit, and every one in its turn."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_lora_extract import tuned
from test_lora_inject import checkpoint

import mergekit_sd as mk
from mergekit_sd.api import recipe_of
from mergekit_sd.errors import DtypeOverflow, NonFiniteResult
from mergekit_sd.execute import surveys
from mergekit_sd.execute.surveys import _Room


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 100), max_size=30), st.integers(1, 120), st.integers(1, 4))
def test_what_is_at_work_together_fits_or_is_alone(sizes, memory, threads):
    named = {str(number): size for number, size in enumerate(sizes)}
    room, lock = _Room(named, memory), threading.Lock()
    inside: list[int] = []
    seen: list[str] = []
    crowded: list[list[int]] = []

    def work():
        while entered := room.enter():
            name, size = entered
            with lock:
                inside.append(size)
                seen.append(name)
                if sum(inside) > memory and len(inside) > 1:
                    crowded.append(list(inside))
            time.sleep(0)
            with lock:
                inside.remove(size)
            room.leave(size)

    with ThreadPoolExecutor(threads) as pool:
        for each in [pool.submit(work) for _ in range(threads)]:
            each.result(timeout=20)
    assert sorted(seen, key=int) == list(named)
    assert not crowded


def test_a_small_one_goes_before_a_large_one_that_does_not_fit():
    room = _Room({"large": 60, "larger": 70, "small": 5, "smaller": 1}, 64)
    assert [room.enter(), room.enter()] == [("large", 60), ("smaller", 1)]
    room.leave(60)
    assert room.enter() == ("small", 5)
    room.leave(1)
    room.leave(5)
    assert room.enter() == ("larger", 70)
    room.leave(70)
    assert room.enter() is None


def test_a_failure_wakes_who_waits():
    room, ended = _Room({"first": 2, "second": 2}, 3), []
    room.enter()
    waiting = threading.Thread(target=lambda: ended.append(room.enter()))
    waiting.start()
    room.close()
    waiting.join(timeout=20)
    assert ended == [None]


def node(folder):
    return mk.ops.extract_lora(mk.open(folder / "tuned.safetensors"), mk.open(folder / "base.safetensors"), rank=2)


def test_memory_and_threads_change_no_byte(tmp_path, monkeypatch):
    base = checkpoint("sd1")
    models.write(tmp_path / "base.safetensors", base)
    models.write(tmp_path / "tuned.safetensors", tuned(base))
    made = []
    for threads, size in ((1, 1), (3, 1), (3, 1 << 40)):  # of one at a time in the end
        monkeypatch.setattr(surveys._Models, "_size", lambda *_, size=size: size)
        mk.save(node(tmp_path), tmp_path / "out.safetensors", threads=threads, force=True)
        made.append((tmp_path / "out.safetensors").read_bytes())
    assert made[0] == made[1] == made[2]


def test_an_extraction_holds_the_difference_alone(tmp_path):
    """Not both models' tensors: what is at work counts as that."""
    base = checkpoint("sd1")
    models.write(tmp_path / "base.safetensors", base)
    models.write(tmp_path / "tuned.safetensors", tuned(base))
    (output,) = mk.plan(recipe_of(node(tmp_path), tmp_path / "out.safetensors"), anywhere=True).outputs
    assert {len(operands) for operands in output.making.survey.operands.values()} == {1}


def test_the_error_of_a_thread_is_told_and_ends_those_that_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(surveys._Models, "_size", lambda *_: 1 << 40)
    base = checkpoint("sd1")
    models.write(tmp_path / "base.safetensors", base)
    broken = tuned(base)
    name = next(name for name in broken if name.endswith("attn1.to_q.weight"))
    broken[name] = torch.full_like(broken[name], torch.nan)
    models.write(tmp_path / "tuned.safetensors", broken)
    with pytest.raises(NonFiniteResult):
        mk.save(node(tmp_path), tmp_path / "out.safetensors", threads=2)
    assert not (tmp_path / "out.safetensors").exists()


TWO_FILES = """\
recipe = 1
[models]
base = "base.safetensors"
tuned = "tuned.safetensors"
[steps.change]
op = "extract_lora"
tuned = "tuned"
base = "base"
rank = 2
"""
HALF, WHOLE = (
    f'[outputs.{name}]\nmodel = "change"\nfile = "{name}.safetensors"\ndtype = "{name}"\n' for name in ("fp16", "fp32")
)


def test_factors_that_wait_rounded_are_those_that_would_be_written(tmp_path):
    base = checkpoint("sd1")
    models.write(tmp_path / "base.safetensors", base)
    models.write(tmp_path / "tuned.safetensors", tuned(base))
    files = {}
    for name, outputs in (("both", HALF + WHOLE), ("half", HALF), ("whole", WHOLE)):
        (tmp_path / "r.toml").write_text(TWO_FILES + outputs, encoding="utf-8")
        mk.run(tmp_path / "r.toml", force=True)
        for kind in ("fp16", "fp32"):
            if (path := tmp_path / f"{kind}.safetensors").exists():
                files[name, kind] = models.read(path)
                path.unlink()
    for kind, alone in (("fp16", "half"), ("fp32", "whole")):
        expected = files["both", kind]
        assert expected.keys() == files[alone, kind].keys()
        assert all(torch.equal(expected[key], tensor) for key, tensor in files[alone, kind].items())
    whole = files["whole", "fp32"]
    assert any(not torch.equal(tensor, tensor.half().float()) for tensor in whole.values())
    assert all(torch.equal(files["half", "fp16"][key], tensor.half()) for key, tensor in whole.items())


def test_a_number_that_the_output_cannot_hold_waits_as_it_is(tmp_path):
    base = checkpoint("sd1")
    models.write(tmp_path / "base.safetensors", base)
    large = {key: t.float() * 3e6 if t.dim() == 2 and "attn1" in key else t for key, t in tuned(base).items()}
    models.write(tmp_path / "tuned.safetensors", large)
    with pytest.raises(DtypeOverflow) as caught:
        mk.save(node(tmp_path), tmp_path / "out.safetensors", dtype="fp16")
    assert any("attn1" in name for name in caught.value.details)
    assert not (tmp_path / "out.safetensors").exists()
