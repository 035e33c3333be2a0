"""LoRAs out of models: what is kept is what the truncated SVD keeps, under the names that tools know."""

from __future__ import annotations

import hashlib
import json

import models
import numpy as np
import pytest
import torch
from safetensors import safe_open
from test_lora_inject import checkpoint, inject, layers

import mergekit_sd as mk
from mergekit_sd.errors import (
    FamilyMismatch,
    MissingTensors,
    NonFiniteResult,
    RecipeError,
    ShapeMismatch,
    UsageError,
    WrongFormat,
)

every_family = pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])


def tuned(model, seed=9, size=0.01):
    random = torch.Generator().manual_seed(seed)
    return {
        name: tensor + torch.randn(tensor.shape, generator=random) * size if tensor.is_floating_point() else tensor
        for name, tensor in model.items()
    }


def extract(folder, base, after, **settings):
    """The file's tensors and its metadata."""
    models.write(folder / "base.safetensors", base)
    models.write(folder / "tuned.safetensors", after)
    step = {"op": "extract_lora", "tuned": "tuned", "base": "base", **settings}
    output = {"model": "m", "file": "lora.safetensors", "dtype": "fp32"}
    sources = {"tuned": "tuned.safetensors", "base": "base.safetensors"}
    report = mk.run(models.recipe(folder, sources, {"m": step}, {"out": output}), force=True)
    with safe_open(folder / "lora.safetensors", "pt") as file:
        return models.read(folder / "lora.safetensors"), file.metadata(), report.outputs[0].lora


def rows(model, target):
    whole = model[target.tensor]
    return whole.chunk(3)[target.rows[0]] if target.rows else whole


@every_family
def test_each_layer_has_the_best_factors_of_its_rank(tmp_path, family):
    base = checkpoint(family)
    after = tuned(base)
    file, _, report = extract(tmp_path, base, after, rank=4, conv_rank=2)
    found = layers(family, base)
    assert {name.partition(".")[0] for name in file} == set(found)
    kept = energy = 0.0
    for name, (_, target, shape) in found.items():
        parts = ("lora_up.weight", "lora_down.weight", "alpha")
        up, down, alpha = (file[f"{name}.{part}"].double().numpy() for part in parts)
        spatial = len(shape) == 4 and shape[2] > 1
        rank = min(2 if spatial else 4, shape[0], int(np.prod(shape[1:])))
        assert down.shape == (rank, *shape[1:])
        assert up.shape == (shape[0], rank, *(1,) * (len(shape) - 2))
        assert alpha == rank
        change = (rows(after, target).double() - rows(base, target).double()).numpy().reshape(shape[0], -1)
        values = np.linalg.svd(change, compute_uv=False)
        best = np.sqrt((values[rank:] ** 2).sum())
        error = np.linalg.norm(change - up.reshape(shape[0], rank) @ down.reshape(rank, -1))
        assert error <= 1.001 * best + 1e-6 * np.linalg.norm(change), name
        kept, energy = kept + (values[:rank] ** 2).sum(), energy + (values**2).sum()
    assert report["kept"] == pytest.approx(np.sqrt(kept / energy), rel=1e-3)


@every_family
def test_at_full_rank_injecting_gives_the_tuned_model_back(tmp_path, family):
    base = checkpoint(family)
    after = tuned(base)
    file, _, report = extract(tmp_path, base, after, rank=999, conv_rank=999)
    back = inject(tmp_path, base, {"lora": file}, ["lora"])
    for _, target, _ in layers(family, base).values():
        torch.testing.assert_close(back[target.tensor], after[target.tensor], rtol=0, atol=5e-8)
    assert report["kept"] == pytest.approx(1)


def test_only_linear_layers_without_a_conv_rank(tmp_path):
    base = checkpoint("sd1")
    file, metadata, _ = extract(tmp_path, base, tuned(base), rank=4)
    assert {name.partition(".")[0] for name in file} == set(layers("sd1", base, conv=False))
    assert json.loads(metadata["ss_network_args"]) == {}


def test_what_tools_read_of_it(tmp_path):
    base = checkpoint("sd1")
    _, metadata, _ = extract(tmp_path, base, tuned(base), rank=4, conv_rank=2)
    told = {
        "ss_v2": "False",
        "ss_base_model_version": "sd_v1",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "4.0",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
    }
    assert told.items() <= metadata.items()
    assert json.loads(metadata["ss_network_args"]) == {"conv_dim": "2", "conv_alpha": "2.0"}
    raw = (tmp_path / "lora.safetensors").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    assert metadata["sshs_model_hash"] == hashlib.sha256(raw[start:]).hexdigest()


@pytest.mark.parametrize(("family", "version", "v2"), [("sd2", "sd_v2", "True"), ("sdxl", "sdxl_base_v1-0", "False")])
def test_other_families_say_what_they_are(tmp_path, family, version, v2):
    base = checkpoint(family)
    _, metadata, _ = extract(tmp_path, base, tuned(base), rank=1)
    assert (metadata["ss_base_model_version"], metadata["ss_v2"]) == (version, v2)
    assert metadata["modelspec.architecture"].startswith("stable-diffusion-")
    assert metadata["modelspec.architecture"].endswith("/lora")


@pytest.mark.parametrize(
    ("rule", "amount", "rank_of"),
    [
        ("threshold", 0.08, lambda s: (s > 0.08).sum()),
        ("ratio", 0.5, lambda s: (s > 0.5 * s[0]).sum()),
        ("quantile", 0.6, lambda s: (np.cumsum(s) < 0.6 * s.sum()).sum()),
        ("norm", 0.8, lambda s: int(np.argmax(np.cumsum(s**2) >= 0.64 * (s**2).sum())) + 1),
        ("error", 0.5, lambda s: int(np.argmax((s**2).sum() - np.cumsum(s**2) <= 0.25 * (s**2).sum())) + 1),
    ],
)
def test_rules_find_each_layers_rank(tmp_path, rule, amount, rank_of):
    base = checkpoint("sd1")
    after = tuned(base)
    file, metadata, _ = extract(tmp_path, base, after, rank=16, rule=rule, amount=amount)
    ranks = set()
    for name, (_, target, shape) in layers("sd1", base, conv=False).items():
        change = (after[target.tensor].double() - base[target.tensor].double()).numpy().reshape(shape[0], -1)
        expected = min(max(int(rank_of(np.linalg.svd(change, compute_uv=False))), 1), 16)
        rank = len(file[f"{name}.lora_down.weight"])
        assert abs(rank - expected) <= 1
        assert float(file[f"{name}.alpha"]) == rank
        ranks.add(rank)
    assert len(ranks) > 1
    assert metadata["ss_network_dim"] == "Dynamic"


def test_a_size_is_shared_out_by_what_each_rank_gains(tmp_path):
    base = checkpoint("sd1")
    after = tuned(base)
    strong = next(iter(layers("sd1", base, conv=False).values()))[1].tensor
    after[strong] = base[strong] + (after[strong] - base[strong]) * 50
    file, _, report = extract(tmp_path, base, after, rank=24, size_mb=0.3)
    used = sum(tensor.numel() * 2 for name, tensor in file.items())
    assert 0.1 * 2**20 < used < 0.3 * 2**20  # the names of so many small layers take the rest
    name = next(name for name, (_, target, _) in layers("sd1", base).items() if target.tensor == strong)
    assert len(file[f"{name}.lora_down.weight"]) == max(len(t) for n, t in file.items() if "lora_down" in n)
    whole = extract(tmp_path, base, after, rank=2)[2]
    assert report["kept"] > whole["kept"]


@pytest.mark.parametrize("style", ["kohya", "peft", "diffusers", "comfyui"])
@pytest.mark.parametrize("size_mb", [0.06, 0.3, 0.5])
def test_a_size_is_that_of_the_file_with_its_header(tmp_path, style, size_mb):
    base = checkpoint("sd1")
    models.write(tmp_path / "base.safetensors", base)
    models.write(tmp_path / "tuned.safetensors", tuned(base))
    node = mk.ops.extract_lora(
        mk.open(tmp_path / "tuned.safetensors"),
        mk.open(tmp_path / "base.safetensors"),
        rank=24,
        size_mb=size_mb,
        style=style,
    )
    made = mk.save(node, tmp_path / "lora.safetensors", dtype="fp16").path.stat().st_size
    assert 0.8 * size_mb * 2**20 < made <= size_mb * 2**20


def test_a_size_that_nothing_fits_into_is_refused(tmp_path):
    base = checkpoint("sd1")
    with pytest.raises(UsageError, match="fit into a file of that size") as error:
        extract(tmp_path, base, tuned(base), rank=4, size_mb=0.002)
    assert "size_mb" in error.value.hint


@pytest.mark.parametrize(("choice", "is_there"), [("keep", True), ("drop", False), ("threshold", False)])
def test_text_encoders_kept_dropped_or_by_threshold(tmp_path, choice, is_there):
    base = checkpoint("sdxl")
    after = tuned(base, size=0.001)
    file, _, report = extract(tmp_path, base, after, rank=1, text_encoder=choice)
    assert any(name.startswith("lora_te") for name in file) == is_there
    assert set(report["dropped"]) == (set() if is_there else {"text_encoder", "text_encoder_2"})
    if choice == "threshold":
        assert all(0 < greatest <= 0.01 for greatest in report["dropped"].values())
        assert any(
            name.startswith("lora_te2") for name in extract(tmp_path, base, tuned(base), rank=1, text_encoder=choice)[0]
        )


def test_layers_that_did_not_change_are_left_out_and_counted(tmp_path):
    base = checkpoint("sd1")
    after = tuned(base)
    same = [target.tensor for _, target, _ in list(layers("sd1", base, conv=False).values())[:7]]
    after |= {name: base[name] for name in same}
    file, _, report = extract(tmp_path, base, after, rank=1)
    assert report["unchanged"] == 7
    assert report["layers"] == len(file) // 3 == len(layers("sd1", base, conv=False)) - 7


def test_clamping_loses_what_kohya_loses(tmp_path):
    base = checkpoint("sd1")
    after = tuned(base)
    name, (_, target, shape) = next(iter(layers("sd1", base, conv=False).items()))
    first = (after[target.tensor] - base[target.tensor]).reshape(shape[0], -1)
    at = name

    def error(file):
        up, down = file[f"{at}.lora_up.weight"], file[f"{at}.lora_down.weight"]
        return float((first - up.flatten(1) @ down.flatten(1)).norm())

    plain, clamped = (extract(tmp_path, base, after, rank=4, clamp=clamp) for clamp in (1.0, 0.9))
    assert error(clamped[0]) > error(plain[0])
    lost = energy = 0.0
    for name, (_, target, shape) in layers("sd1", base, conv=False).items():
        change = (after[target.tensor] - base[target.tensor]).reshape(shape[0], -1)
        up, down = clamped[0][f"{name}.lora_up.weight"], clamped[0][f"{name}.lora_down.weight"]
        lost += float((change - up.flatten(1) @ down.flatten(1)).square().sum())
        energy += float(change.square().sum())
    assert clamped[2]["kept"] == pytest.approx((1 - lost / energy) ** 0.5, abs=0.03)
    assert clamped[2]["kept"] < plain[2]["kept"]


def test_models_that_are_the_same_are_refused(tmp_path):
    base = checkpoint("sd1")
    with pytest.raises(MissingTensors, match="nothing to write"):
        extract(tmp_path, base, base)
    only_text = {n: t + 0.001 * ("cond_stage" in n) if t.is_floating_point() else t for n, t in base.items()}
    with pytest.raises(MissingTensors, match="nothing to write") as error:
        extract(tmp_path, base, only_text, text_encoder="threshold")
    assert error.value.details == ("left out: text_encoder, which changed by at most 0.001",)


def test_comfyui_names_inject_too(tmp_path):
    base = checkpoint("sd1")
    after = tuned(base)
    file, _, _ = extract(tmp_path, base, after, rank=999, style="comfyui")
    assert all(name.startswith(("diffusion_model.", "text_encoders.clip_l.")) for name in file)
    back = inject(tmp_path, base, {"lora": file}, ["lora"])
    for _, target, _ in layers("sd1", base, conv=False).values():
        torch.testing.assert_close(back[target.tensor], after[target.tensor], rtol=0, atol=5e-8)


def test_the_same_bytes_whatever_the_threads(tmp_path):
    base = checkpoint("sd1")
    made = []
    for threads in (1, 2):
        extract(tmp_path, base, tuned(base), rank=4)
        mk.run(tmp_path / "r.toml", force=True, threads=threads)
        made.append((tmp_path / "lora.safetensors").read_bytes())
    assert made[0] == made[1]
    assert mk.verify(tmp_path / "lora.safetensors").same
    lock = json.loads((tmp_path / "r.lock").read_text())
    assert set(lock["inputs"]) == {"tuned", "base"}
    mk.run(tmp_path / "r.toml", force=True, locked=True)


def test_of_an_expression(tmp_path):
    """What a merge has changed, though the merge is never written."""
    base = checkpoint("sd1")
    after = tuned(base)
    models.write(tmp_path / "base.safetensors", base)
    models.write(tmp_path / "tuned.safetensors", after)
    steps = {
        "half": {"op": "weighted_sum", "a": "base", "b": "tuned", "alpha": 0.5},
        "m": {"op": "extract_lora", "tuned": "half", "base": "base", "rank": 999},
    }
    output = {"model": "m", "file": "lora.safetensors", "dtype": "fp32"}
    sources = {"base": "base.safetensors", "tuned": "tuned.safetensors"}
    mk.run(models.recipe(tmp_path, sources, steps, {"out": output}))
    back = inject(tmp_path, base, {"lora": models.read(tmp_path / "lora.safetensors")}, ["lora"])
    for _, target, _ in layers("sd1", base, conv=False).values():
        expected = (base[target.tensor] + after[target.tensor]) / 2
        torch.testing.assert_close(back[target.tensor], expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_the_whole_difference_gives_the_tuned_model_back(tmp_path, family):
    """Weights, biases and norms of all trained layers; the third of fused rows and transposes, too."""
    base = checkpoint(family)
    after = tuned(base)
    file, metadata, report = extract(tmp_path, base, after, algorithm="full", rest="keep", conv_rank=1)
    assert {name.rpartition(".")[2] for name in file} == {"diff", "diff_b", "w_norm", "b_norm"}
    assert metadata["ss_network_module"] == "networks.lora"
    assert mk.verify(tmp_path / "lora.safetensors").same
    back = inject(tmp_path, base, {"lora": file}, ["lora"])
    changed = [name for name in base if not torch.equal(back[name], base[name])]
    assert len(changed) > 600
    for name in changed:
        torch.testing.assert_close(back[name], after[name], rtol=0, atol=5e-8)
    assert {target.tensor for _, target, _ in layers(family, base).values()} <= set(changed)
    assert report["kept"] is None


def test_biases_and_norms_beside_factors(tmp_path):
    base = checkpoint("sd1")
    after = tuned(base)
    file, _, _ = extract(tmp_path, base, after, rank=999, rest="keep")
    back = inject(tmp_path, base, {"lora": file}, ["lora"])
    start = "model.diffusion_model.input_blocks.1.1."
    for name in (start + "norm.weight", start + "norm.bias", start + "proj_in.bias", start + "proj_in.weight"):
        torch.testing.assert_close(back[name], after[name], rtol=0, atol=5e-8)


@pytest.mark.parametrize("algorithm", ["loha", "lokr"])
def test_other_algorithms_are_as_near_as_they_say(tmp_path, algorithm):
    base = checkpoint("sd1")
    after = tuned(base)
    file, _, report = extract(tmp_path, base, after, rank=4, conv_rank=2, algorithm=algorithm)
    assert all((".hada_" if algorithm == "loha" else ".lokr_") in name or name.endswith("alpha") for name in file)
    back = inject(tmp_path, base, {"lora": file}, ["lora"])
    lost = energy = 0.0
    for _, target, _ in layers("sd1", base).values():
        change = after[target.tensor].double() - base[target.tensor].double()
        lost += float((after[target.tensor].double() - back[target.tensor].double()).square().sum())
        energy += float(change.square().sum())
    assert report["kept"] == pytest.approx((1 - lost / energy) ** 0.5, abs=1e-3)
    if algorithm == "loha":
        assert report["kept"] >= extract(tmp_path, base, after, rank=4, conv_rank=2)[2]["kept"] - 1e-6


# --- refusals ----------------------------------------------------------------------------------------------


def test_models_of_two_families_are_refused(tmp_path):
    with pytest.raises(FamilyMismatch):
        extract(tmp_path, checkpoint("sd1"), checkpoint("sd2"))


def test_shapes_that_differ_are_refused(tmp_path):
    base = checkpoint("sd1")
    target = next(iter(layers("sd1", base, conv=False).values()))[1].tensor
    after = tuned(base) | {target: base[target][:, :-1].contiguous()}
    with pytest.raises(ShapeMismatch) as caught:
        extract(tmp_path, base, after)
    assert caught.value.key == target


def test_what_is_not_recognised_is_refused(tmp_path):
    with pytest.raises(WrongFormat, match="not recognised"):
        extract(tmp_path, {"a": torch.ones(3)}, {"a": torch.ones(3)})


def test_a_vae_alone_has_no_such_layers(tmp_path):
    vae = {n.removeprefix("first_stage_model."): t for n, t in checkpoint("sd1").items() if "first_stage" in n}
    with pytest.raises((MissingTensors, WrongFormat)):
        extract(tmp_path, vae, vae)


def test_nan_is_named(tmp_path):
    base = checkpoint("sd1")
    name, (_, target, _) = next(iter(layers("sd1", base, conv=False).items()))
    after = tuned(base)
    after[target.tensor] = after[target.tensor].clone()
    after[target.tensor].view(-1)[3] = float("nan")
    with pytest.raises(NonFiniteResult) as caught:
        extract(tmp_path, base, after)
    assert caught.value.key == name
    assert not (tmp_path / "lora.safetensors").exists()


def test_a_lora_in_the_making_is_no_operand(tmp_path):
    steps = {
        "x": {"op": "extract_lora", "tuned": "a", "base": "b"},
        "m": {"op": "weighted_sum", "a": "x", "b": "b", "alpha": 0.5},
    }
    with pytest.raises(RecipeError, match="is a LoRA's file, but a of weighted_sum takes a model"):
        mk.load(models.recipe(tmp_path, {"a": "a.safetensors", "b": "b.safetensors"}, steps))


@pytest.mark.parametrize(
    "settings",
    [
        {"algorithm": "loha", "rule": "norm"},
        {"algorithm": "lokr", "size_mb": 3.0},
        {"algorithm": "full", "style": "peft"},
        {"rest": "keep", "style": "diffusers"},
    ],
)
def test_settings_that_do_not_go_together(tmp_path, settings):
    with pytest.raises(UsageError):
        extract(tmp_path, checkpoint("sd1"), checkpoint("sd1"), **settings)


@pytest.mark.parametrize(
    ("setting", "words"), [({"rank": 0}, "at least 1"), ({"rank": 1.5}, "whole number"), ({"clamp": 2}, "at most 1")]
)
def test_settings_out_of_bounds(tmp_path, setting, words):
    with pytest.raises(RecipeError, match=words):
        extract(tmp_path, checkpoint("sd1"), checkpoint("sd1"), **setting)


def test_the_command(tmp_path, monkeypatch, capsys):
    from mergekit_sd.cli.main import run

    monkeypatch.chdir(tmp_path)
    base = checkpoint("sd1")
    models.write(tmp_path / "base.safetensors", base)
    models.write(tmp_path / "tuned.safetensors", tuned(base))
    assert run(["lora", "extract", "tuned.safetensors", "base.safetensors", "--rank", "4", "-o", "l.safetensors"]) == 0
    out = capsys.readouterr().out
    assert "of their change kept" in out
    assert "IN01" in out
    assert all(len(line) <= 80 for line in out.splitlines() if "/" not in line)
    made = models.read(tmp_path / "l.safetensors")
    assert {tensor.dtype for tensor in made.values()} == {torch.float16}
    assert run(["lora", "extract", "tuned.safetensors", "base.safetensors", "-o", "l.safetensors"]) == 2
    assert run(["lora", "extract", "tuned.safetensors", "base.safetensors", "-o", "x.safetensors", "--dry-run"]) == 0
    assert not (tmp_path / "x.safetensors").exists()
