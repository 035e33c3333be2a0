"""prune, fix, extract, bake-vae: what they take out and put in, and that all else stays bit for bit."""

from __future__ import annotations

import json

import models
import pytest
import story
import torch
from models import POSITION_IDS, read, same

import mergekit_sd as mk
from mergekit_sd.errors import MissingTensors, ShapeMismatch, WrongFormat

PIDS = POSITION_IDS["sd1"]
# What a careless merge of the ids at alpha 0.04 leaves: 21 of them are wrong.
BROKEN = ((1 - 0.04) * torch.arange(77) + 0.04 * torch.arange(77)).to(torch.int64).reshape(1, 77)


@pytest.fixture
def shell(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return story.Shell(capsys)


def trained(dtype="fp32", **changes):
    """A checkpoint as a trainer leaves it: EMA weights, an optimizer's state, something of CLIP's."""
    tensors = models.with_ema(models.checkpoint("sd1", 0, dtype))
    tensors["optimizer_states.0.exp_avg"] = torch.zeros(1000)
    tensors["cond_stage_model.transformer.text_model.logit_scale"] = torch.tensor(1.0)
    return tensors | changes


def unchanged(made, before, but=()):
    assert all(same(made[name], before[name]) for name in made if name not in but)


def test_prune_takes_out_junk_and_ema_and_nothing_else(tmp_path, shell):
    before = trained()
    models.write(tmp_path / "a.safetensors", before)
    out, _ = shell("prune", "a.safetensors", "-o", "out.safetensors")
    made = read(tmp_path / "out.safetensors")
    assert set(made) == set(models.checkpoint("sd1", 0))
    unchanged(made, before, but=[PIDS])
    assert "less than" in out


@pytest.mark.parametrize("ema", ["keep", "use"])
def test_prune_keeps_or_uses_ema(tmp_path, shell, ema):
    before = trained()
    models.write(tmp_path / "a.safetensors", before)
    shell("prune", "a.safetensors", "-o", "out.safetensors", "--ema", ema)
    made = read(tmp_path / "out.safetensors")
    name, copy = "model.diffusion_model.out.2.weight", "model_ema.diffusion_modelout2weight"
    assert same(made[name], before[copy if ema == "use" else name])
    assert (copy in made) == (ema == "keep")
    if ema == "keep":
        unchanged(made, before, but=[PIDS])


def test_prune_to_fp16(tmp_path, shell):
    before = trained()
    models.write(tmp_path / "a.safetensors", before)
    shell("prune", "a.safetensors", "-o", "out.safetensors", "--dtype", "fp16")
    for name, tensor in read(tmp_path / "out.safetensors").items():
        carried = name == PIDS or "." not in name
        assert same(tensor, before[name] if carried else before[name].half()), name


def test_prune_tells_what_it_would_take_out(tmp_path, shell):
    models.write(tmp_path / "a.safetensors", trained())
    report = shell.json("prune", "a.safetensors", "-o", "out.safetensors", "--dry-run")
    removed = report["steps"][0]["removed"]
    assert len(removed["ema"]) == 688
    assert len(removed["junk"]) == 2
    assert not (tmp_path / "out.safetensors").exists()
    out, _ = shell("prune", "a.safetensors", "-o", "out.safetensors", "--dry-run")
    assert "2 tensors taken out as junk" in " ".join(out.split())


def test_prune_refuses_what_it_does_not_recognise(tmp_path, shell):
    models.write(tmp_path / "odd.safetensors", {"one.weight": torch.zeros(4), "two.weight": torch.zeros(4)})
    error = shell.refused("WrongFormat", 3, "prune", "odd.safetensors", "-o", "out.safetensors")
    assert error["details"] == ["one.weight", "two.weight"]
    models.write(tmp_path / "vae.safetensors", models.vae_file())
    error = shell.refused("WrongFormat", 3, "prune", "vae.safetensors", "-o", "out.safetensors")
    assert "extract --component vae" in error["hint"]
    assert not (tmp_path / "out.safetensors").exists()


def test_fix_mends_the_ids_of_a_careless_merge(tmp_path, shell):
    before = trained(**{PIDS: BROKEN})
    models.write(tmp_path / "a.safetensors", before)
    wrong = int((torch.arange(77) != BROKEN).sum())
    assert wrong == 21
    out, _ = shell("fix", "a.safetensors", "-o", "out.safetensors")
    made = read(tmp_path / "out.safetensors")
    assert same(made[PIDS], torch.arange(77).reshape(1, 77))
    assert set(made) == set(before)
    unchanged(made, before, but=[PIDS])
    assert f"position_ids before: corrupt, {wrong} of them wrong" in out
    assert "position_ids after: ok" in out


@pytest.mark.parametrize("ids", [None, torch.arange(77).float().reshape(1, 77)], ids=["missing", "float"])
def test_fix_mends_missing_and_float_ids(tmp_path, shell, ids):
    before = trained()
    del before[PIDS]
    models.write(tmp_path / "a.safetensors", before if ids is None else before | {PIDS: ids})
    shell("fix", "a.safetensors", "-o", "out.safetensors")
    made = read(tmp_path / "out.safetensors")
    assert same(made[PIDS], torch.arange(77).reshape(1, 77))
    unchanged(made, before, but=[PIDS])


def test_fix_gives_novelai_names_the_usual_ones(tmp_path, shell):
    before = models.checkpoint("sd1", 0)
    models.write(tmp_path / "nai.safetensors", models.novelai(before))
    shell("fix", "nai.safetensors", "-o", "out.safetensors")
    made = read(tmp_path / "out.safetensors")
    assert set(made) == set(before)
    unchanged(made, before)


def test_fix_tells_of_nan_and_leaves_it(tmp_path, shell):
    name = "model.diffusion_model.out.2.weight"
    before = models.checkpoint("sd1", 0)
    before[name].view(-1)[0] = float("nan")
    models.write(tmp_path / "a.safetensors", before)
    _, err = shell("fix", "a.safetensors", "-o", "out.safetensors")
    assert "NaN or Inf: 1 element in 1 tensor" in err
    assert same(read(tmp_path / "out.safetensors")[name], before[name])


def test_fix_of_sd2_has_no_ids_to_mend(tmp_path, shell):
    before = models.checkpoint("sd2", 0)
    models.write(tmp_path / "a.safetensors", before)
    out, _ = shell("fix", "a.safetensors", "-o", "out.safetensors")
    unchanged(read(tmp_path / "out.safetensors"), before)
    assert "this model has none" in out


@pytest.mark.parametrize(
    ("component", "prefix"),
    [
        ("vae", "first_stage_model."),
        ("unet", "model.diffusion_model."),
        ("text_encoder", "cond_stage_model.transformer."),
    ],
)
def test_extract_writes_a_component_alone(tmp_path, shell, component, prefix):
    before = trained()
    models.write(tmp_path / "a.safetensors", before)
    shell("extract", "a.safetensors", "--component", component, "-o", "out.safetensors")
    made = read(tmp_path / "out.safetensors")
    known = {name for name in models.checkpoint("sd1", 0) if name.startswith(prefix)}
    assert {prefix + name for name in made} == known
    assert all(same(tensor, before[prefix + name]) for name, tensor in made.items() if "position_ids" not in name)
    assert mk.inspect_file(tmp_path / "out.safetensors").kind == component


def test_ema_comes_out_as_a_unet(tmp_path, shell):
    before = trained()
    models.write(tmp_path / "a.safetensors", before)
    shell("extract", "a.safetensors", "--component", "ema", "-o", "out.safetensors")
    made = read(tmp_path / "out.safetensors")
    assert same(made["out.2.weight"], before["model_ema.diffusion_modelout2weight"])
    assert mk.inspect_file(tmp_path / "out.safetensors").kind == "unet"


def test_what_is_not_there_cannot_come_out(tmp_path, shell):
    models.write(tmp_path / "vae.safetensors", models.vae_file())
    error = shell.refused(
        "MissingTensors", 3, "extract", "vae.safetensors", "--component", "unet", "-o", "x.safetensors"
    )
    assert error["hint"] == "it has: vae"
    models.write(tmp_path / "a.safetensors", models.checkpoint("sd1", 0))
    shell.refused("MissingTensors", 3, "extract", "a.safetensors", "--component", "ema", "-o", "x.safetensors")


@pytest.mark.parametrize("form", ["file", "prefixed file", "checkpoint"])
def test_bake_vae_from_whatever_holds_one(tmp_path, shell, form):
    before = trained()
    models.write(tmp_path / "a.safetensors", before)
    vae = models.vae_file(seed=7, dtype="fp16")
    prefixed = {f"first_stage_model.{name}": tensor for name, tensor in vae.items()}
    whole = models.checkpoint("sd1", 3) | prefixed
    models.write(tmp_path / "v.safetensors", {"file": vae, "prefixed file": prefixed, "checkpoint": whole}[form])
    shell("bake-vae", "a.safetensors", "v.safetensors", "-o", "out.safetensors")
    made = read(tmp_path / "out.safetensors")
    assert set(made) == set(before)
    for name, tensor in prefixed.items():
        assert same(made[name], tensor)
    unchanged(made, before, but=[PIDS, *prefixed])


def test_a_component_goes_where_none_was(tmp_path):
    whole = models.checkpoint("sd1", 0)
    without = {name: tensor for name, tensor in whole.items() if not name.startswith("first_stage_model.")}
    models.write(tmp_path / "a.safetensors", without)
    models.write(tmp_path / "v.safetensors", models.vae_file(seed=7))
    node = mk.ops.replace(mk.open(tmp_path / "a.safetensors"), mk.open(tmp_path / "v.safetensors"))
    mk.save(node, tmp_path / "out.safetensors", dtype="keep")
    assert set(read(tmp_path / "out.safetensors")) == set(whole)
    assert mk.inspect_file(tmp_path / "out.safetensors").kind == "checkpoint"


def test_text_encoders_and_unets_change_places(tmp_path):
    a, b = models.checkpoint("sdxl", 0), models.checkpoint("sdxl", 1)
    models.write(tmp_path / "a.safetensors", a)
    models.write(tmp_path / "b.safetensors", b)
    first, second = mk.open(tmp_path / "a.safetensors"), mk.open(tmp_path / "b.safetensors")
    starts = {
        "unet": "model.diffusion_model.",
        "text_encoder": "conditioner.embedders.0.",
        "text_encoder_2": "conditioner.embedders.1.",
    }
    for component, start in starts.items():
        mk.save(
            mk.ops.replace(first, second, component=component), tmp_path / "out.safetensors", dtype="keep", force=True
        )
        for name, tensor in read(tmp_path / "out.safetensors").items():
            if "position_ids" not in name:
                assert same(tensor, (b if name.startswith(start) else a)[name]), name


def test_a_component_that_does_not_fit_is_refused(tmp_path):
    models.write(tmp_path / "a.safetensors", models.checkpoint("sd1", 0))
    vae = models.vae_file()
    lost = dict(vae)
    lost.pop("encoder.conv_in.weight")
    models.write(tmp_path / "lost.safetensors", lost)
    models.write(tmp_path / "odd.safetensors", vae | {"encoder.conv_in.weight": torch.zeros(2, 3, 3, 3)})
    a = mk.open(tmp_path / "a.safetensors")
    with pytest.raises(MissingTensors, match='VAE of "lost" lacks 1 tensor'):
        mk.save(mk.ops.replace(a, mk.open(tmp_path / "lost.safetensors")), tmp_path / "out.safetensors")
    with pytest.raises(ShapeMismatch, match='VAE of "odd" has shape'):
        mk.save(mk.ops.replace(a, mk.open(tmp_path / "odd.safetensors")), tmp_path / "out.safetensors")
    models.write(tmp_path / "unknown.safetensors", {"x": torch.zeros(3)})
    unknown = mk.open(tmp_path / "unknown.safetensors")
    with pytest.raises(MissingTensors, match="no place for a VAE"):
        mk.save(mk.ops.replace(unknown, mk.open(tmp_path / "odd.safetensors")), tmp_path / "out.safetensors")
    with pytest.raises(WrongFormat):
        mk.save(mk.ops.prune(unknown), tmp_path / "out.safetensors")


def test_surgery_stands_in_recipes_and_is_saved_as_one(tmp_path, shell):
    models.write(tmp_path / "a.safetensors", trained())
    models.write(tmp_path / "b.safetensors", models.checkpoint("sd1", 4))
    shell("prune", "a.safetensors", "-o", "one.safetensors", "--save-recipe", "r.toml")
    shell("run", "r.toml", "--force")
    text = (tmp_path / "r.toml").read_text()
    assert 'op = "prune"' in text
    steps = {
        "used": {"op": "prune", "a": "a", "ema": "use"},
        "mended": {"op": "fix", "a": "used"},
        "m": {"op": "weighted_sum", "a": "mended", "b": "b", "alpha": 0.5},
    }
    where = models.recipe(tmp_path, {"a": "a.safetensors", "b": "b.safetensors"}, steps, name="s.toml")
    report = mk.run(where)
    assert report.outputs[0].counts["merged"] > 900
    assert json.loads(shell("plan", "s.toml", "--json", "--force")[0])["steps"][0]["removed"]["junk"]
