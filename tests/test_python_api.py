"""`import mergekit_sd as mk`: lazy graphs, one call to save them, and what stays unimported."""

from __future__ import annotations

import json
import subprocess
import sys
import threading

import models
import pytest
import torch
from models import error_in_steps, f64, recipe

import mergekit_sd as mk
from mergekit_sd.errors import Cancelled, MissingInput, OutputExists, OutputIsInput, RecipeError, UsageError


@pytest.fixture
def opened(room):
    return [mk.open(room / f"sd1-{letter}.safetensors") for letter in "abc"]


def test_the_example_of_the_readme(room, opened):
    a, b, c = opened
    mix = mk.ops.add_difference(mk.ops.weighted_sum(a, b, alpha=0.3), b, c, alpha=0.5)
    report = mk.save(mix, room / "out.safetensors", dtype="fp16")
    x, y, z = (models.read(room / f"sd1-{letter}.safetensors") for letter in "abc")
    for key, tensor in models.read(report.path).items():
        if not models.is_carried(key):
            oracle = 0.7 * f64(x[key]) + 0.3 * f64(y[key]) + 0.5 * (f64(y[key]) - f64(z[key]))
            assert error_in_steps(tensor, oracle) <= 0.6
    assert json.dumps(report.as_json())


def test_save_gives_the_same_tensors_as_run(room, opened):
    a, b, _ = opened
    saved = mk.save(mk.ops.weighted_sum(a, b=b, alpha="GRAD_V"), room / "saved.safetensors", dtype={"vae": "fp32"})
    step = {"op": "weighted_sum", "a": "a", "b": "b", "alpha": "GRAD_V"}
    outputs = {"out": {"model": "m", "file": "out.safetensors", "dtype": {"vae": "fp32"}}}
    names = {"a": "sd1-a.safetensors", "b": "sd1-b.safetensors"}
    ran = mk.run(recipe(room, names, {"m": step}, outputs)).outputs[0]
    assert saved.content_hash == ran.content_hash


def test_save_takes_every_key_of_an_output(room, opened):
    a, b, _ = opened
    options = {"overflow": "clamp", "junk": "keep", "position_ids": "keep", "prediction": "v", "title": "T"}
    mk.save(mk.ops.weighted_sum(a, b), room / "out.safetensors", vae=b, metadata="full", **options)
    made, b = (models.read(room / f"{name}.safetensors") for name in ("out", "sd1-b"))
    assert models.metadata(room / "out.safetensors")["modelspec.title"] == "T"
    for key, tensor in made.items():
        assert not key.startswith(models.VAE) or torch.equal(tensor, b[key].half())
    with pytest.raises(RecipeError, match="overfow"):
        mk.save(a, room / "no.safetensors", overfow="clamp")


def test_vae_may_be_a_graph(room, opened):
    a, b, c = opened
    mk.save(a, room / "out.safetensors", vae=mk.ops.weighted_sum(b, c, alpha=0.5))
    made, x, y = (models.read(room / f"{name}.safetensors") for name in ("out", "sd1-b", "sd1-c"))
    key = models.VAE + "decoder.conv_in.weight"
    assert error_in_steps(made[key], (f64(x[key]) + f64(y[key])) / 2) <= 0.6


def test_models_of_one_name_in_two_folders(room, tmp_path):
    (tmp_path / "other").mkdir()
    models.write(tmp_path / "other" / "sd1-a.safetensors", models.checkpoint("sd1", 8))
    a, twin = mk.open(room / "sd1-a.safetensors"), mk.open(tmp_path / "other" / "sd1-a.safetensors")
    mk.save(mk.ops.weighted_sum(a, twin, alpha=1.0), room / "out.safetensors")
    made, wanted = models.read(room / "out.safetensors"), models.read(tmp_path / "other" / "sd1-a.safetensors")
    assert torch.equal(made[models.CONV_IN], wanted[models.CONV_IN])


def test_long_graph(opened, room):
    a, b, _ = opened
    node = a
    for _ in range(300):
        node = mk.ops.weighted_sum(b, node, alpha=0.99)
    recipe = mk.recipe_of(node, room / "out.safetensors")
    assert len(recipe.steps) == 300
    assert len(recipe.models) == 2


def test_ema_by_open(tmp_path):
    models.write(tmp_path / "a.safetensors", models.with_ema(models.checkpoint("sd1", 1)))
    mk.save(mk.open(tmp_path / "a.safetensors", weights="ema"), tmp_path / "out.safetensors")
    full, made = models.read(tmp_path / "a.safetensors"), models.read(tmp_path / "out.safetensors")
    assert torch.equal(made[models.CONV_IN], full["model_ema.diffusion_modelinput_blocks00weight"].half())


def test_refusals(room, opened, tmp_path):
    a, b, _ = opened
    with pytest.raises(UsageError, match="2 models: a, b"):
        mk.ops.weighted_sum(a)
    with pytest.raises(UsageError, match="2 models"):
        mk.ops.weighted_sum(a, b, a)
    with pytest.raises(UsageError, match='no parameter "alpah"') as caught:
        mk.ops.weighted_sum(a, b, alpah=0.5)
    assert "alpha" in caught.value.hint
    with pytest.raises(UsageError, match="b of weighted_sum"):
        mk.ops.weighted_sum(a, "sd1-b.safetensors")
    with pytest.raises(AttributeError, match="weighted_sum"):
        _ = mk.ops.weighted_sun
    with pytest.raises(MissingInput):
        mk.open(tmp_path / "none.safetensors")
    with pytest.raises(RecipeError, match="difference"):
        mk.save(mk.ops.subtract(a, b), room / "out.safetensors")
    with pytest.raises(RecipeError, match="between 0 and 1"):
        mk.save(mk.ops.weighted_sum(a, b, alpha=1.5), room / "out.safetensors")
    with pytest.raises(OutputIsInput):
        mk.save(mk.ops.weighted_sum(a, b), room / "sd1-b.safetensors", force=True)
    assert not (room / "out.safetensors").exists()
    mk.save(mk.ops.weighted_sum(a, b, alpha=1.5, extrapolate=True), room / "out.safetensors")
    with pytest.raises(OutputExists):
        mk.save(a, room / "out.safetensors")


def test_cancelled_before_it_begins(room, opened):
    cancel = mk.CancelToken()
    cancel.cancel()
    with pytest.raises(Cancelled) as caught:
        mk.save(opened[0], room / "out.safetensors", cancel=cancel)
    assert caught.value.exit_code == 130
    assert not (room / "out.safetensors").exists()
    assert models.left_overs(room) == []


def test_overrides(room):
    step = {"op": "weighted_sum", "a": "a", "b": "b", "alpha": 0.3}
    where = recipe(room, {"a": "sd1-a.safetensors", "b": "sd1-b.safetensors"}, {"m": step})
    mk.run(where, set={"steps.m.alpha": 1.0, "outputs.out.dtype": "keep"})
    made, b = models.read(room / "out.safetensors"), models.read(room / "sd1-b.safetensors")
    assert torch.equal(made[models.CONV_IN], b[models.CONV_IN])


# --- what is imported, what is left as it was --------------------------------------------------------------


def test_names_are_what_they_say():
    for name in mk.__all__:
        assert getattr(mk, name) is not None, name
    assert set(mk.__all__) <= set(dir(mk))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = mk.nonsense


def python(*lines):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join(lines)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_plan_is_the_function_after_every_import():
    assert python(
        "import mergekit_sd as mk",
        "import mergekit_sd.planning.build",
        "from mergekit_sd.planning import paths",
        "print(type(mk.plan).__name__, type(mk.run).__name__)",
        "mk.recipe_of",
        "print(type(mk.plan).__name__, type(paths).__name__)",
    ) == ["function", "function", "function", "module"]


def test_import_plan_and_load_do_without_torch(room):
    step = {"op": "weighted_sum", "a": "a", "b": "b", "alpha": "GRAD_V"}
    where = recipe(room, {"a": "sd1-a.safetensors", "b": "sd1-b.safetensors"}, {"m": step})
    printed = python(
        "import sys, mergekit_sd as mk",
        "print(len([name for name in sys.modules if name.startswith('mergekit_sd.')]))",
        f"mk.load({str(where)!r})",
        f"plan = mk.plan({str(where)!r})",
        "mk.check_run(plan)",
        "mk.plan_as_json(plan)",
        f"mk.open({str(room / 'sd1-a.safetensors')!r})",
        "print('torch' in sys.modules, plan.outputs[0].size > 0)",
    )
    assert printed == ["0", "False", "True"]


def test_torch_threads_of_the_caller_stay(room, opened):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        mk.save(mk.ops.weighted_sum(*opened[:2]), room / "out.safetensors", threads=3)
        later = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert (torch.get_num_threads(), later) == (2, [2])
    finally:
        torch.set_num_threads(before)
