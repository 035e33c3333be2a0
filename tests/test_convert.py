"""convert: the same tensors with another dtype, out of another container, under other names."""

from __future__ import annotations

import models
import pytest
import small_models
import torch

import mergekit_sd as mk
from mergekit_sd.cli.main import run
from mergekit_sd.errors import UsageError, WrongFormat

PREFIXES = [
    ("sd1", "vae", "first_stage_model.", "auto"),
    ("sd1", "unet", "model.diffusion_model.", "auto"),
    ("sdxl", "unet", "model.diffusion_model.", "auto"),
    ("sd2", "text_encoder", "cond_stage_model.model.", "auto"),
    ("sd1", "text_encoder", "cond_stage_model.transformer.", "sd1"),
    ("sdxl", "text_encoder", "conditioner.embedders.0.transformer.", "sdxl"),
    ("sdxl", "text_encoder_2", "conditioner.embedders.1.model.", "sdxl"),
]


@pytest.mark.parametrize(("family", "component", "prefix", "said"), PREFIXES)
def test_a_prefix_goes_on_and_comes_off(tmp_path, family, component, prefix, said):
    bare = small_models.bare(small_models.small(family, only=component), prefix)
    small_models.save(tmp_path / "bare.safetensors", bare)
    on = mk.ops.convert(mk.open(tmp_path / "bare.safetensors"), prefix="add", family=said)
    mk.save(on, tmp_path / "on.safetensors", dtype="keep")
    made = models.read(tmp_path / "on.safetensors")
    assert set(made) == {prefix + name for name in bare}
    assert all(torch.equal(made[prefix + name], tensor) for name, tensor in bare.items())
    off = mk.ops.convert(mk.open(tmp_path / "on.safetensors"), prefix="remove")
    mk.save(off, tmp_path / "off.safetensors", dtype="keep")
    again = models.read(tmp_path / "off.safetensors")
    assert set(again) == set(bare)
    assert all(torch.equal(again[name], tensor) for name, tensor in bare.items())


def test_clip_alone_may_be_two_families(tmp_path):
    bare = small_models.bare(small_models.small("sd1", only="text_encoder"), small_models.CLIP)
    small_models.save(tmp_path / "clip.safetensors", bare)
    with pytest.raises(UsageError, match="cannot be told"):
        mk.save(mk.ops.convert(mk.open(tmp_path / "clip.safetensors"), prefix="add"), tmp_path / "x.safetensors")


def test_a_whole_model_has_no_prefix_to_change(tmp_path):
    small_models.save(tmp_path / "a.safetensors", small_models.small("sd1"))
    with pytest.raises(WrongFormat, match="no component alone"):
        mk.save(mk.ops.convert(mk.open(tmp_path / "a.safetensors"), prefix="remove"), tmp_path / "x.safetensors")


def test_a_pickle_becomes_safetensors_and_nothing_is_lost(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tensors = small_models.small("sd1") | {"junk": torch.ones(3), "model_ema.decay": torch.ones(())}
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "a.ckpt")
    assert run(["convert", "a.ckpt", "-o", "a.safetensors"]) == 0
    made = models.read(tmp_path / "a.safetensors")
    assert set(made) == set(tensors)
    assert all(torch.equal(made[name], tensor) for name, tensor in tensors.items())


def test_another_dtype(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tensors = small_models.small("sd1")
    small_models.save(tmp_path / "a.safetensors", tensors)
    assert run(["convert", "a.safetensors", "--dtype", "bf16", "-o", "b.safetensors"]) == 0
    made = models.read(tmp_path / "b.safetensors")
    name = small_models.UNET + "out.2.weight"
    assert torch.equal(made[name], tensors[name].bfloat16())
