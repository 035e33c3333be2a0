"""LoRA files out of LoRA files: merged, resized, renamed; their changes held against float64."""

from __future__ import annotations

import models
import numpy as np
import pytest
import torch
from test_lora_inject import RANK, checkpoint, inject, layers, lora, real_names

import mergekit_sd as mk
from mergekit_sd.adapters import styles
from mergekit_sd.errors import (
    FamilyMismatch,
    MalformedFile,
    MissingTensors,
    NonFiniteResult,
    RecipeError,
    ShapeMismatch,
    UsageError,
    WrongFormat,
)
from mergekit_sd.lora.ranks import RULES
from mergekit_sd.operations import OPERATIONS
from mergekit_sd.operations.lora import RANK_RULES, RESIZE_RULES, STYLES

SCALE = 2.0 / RANK


def made(folder, op, files, dtype="fp32", **step):
    """The tensors and the report of a step over LoRA files."""
    sources = {}
    for name, file in files.items():
        models.write(folder / f"{name}.safetensors", file)
        sources[name] = f"{name}.safetensors"
    output = {"model": "m", "file": "out.safetensors", "dtype": dtype}
    report = mk.run(models.recipe(folder, sources, {"m": {"op": op, **step}}, {"out": output}), force=True)
    return models.read(folder / "out.safetensors"), report.outputs[0].lora


def change(file, name, scale=None):
    """A module's change in float64, flattened."""
    up, down = (file[f"{name}.lora_{part}.weight"].double().flatten(1).numpy() for part in ("up", "down"))
    alpha = file.get(f"{name}.alpha")
    return (float(alpha) / len(down) if alpha is not None else 1.0) * (up @ down)


def two():
    model = checkpoint("sd1")
    return model, {"one": lora("sd1", model, 1), "other": lora("sd1", model, 2, alpha=None)}


# --- merging ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["kohya", "peft", "diffusers", "comfyui"])
def test_side_by_side_it_does_what_they_do_together(tmp_path, style):
    model, files = two()
    entries = ["<lora:one:0.5>", {"lora": "other", "strength": -0.25, "text_encoder": 0.75}]
    file, report = made(tmp_path, "merge_loras", files, loras=entries, style=style)
    assert report["kept"] == pytest.approx(1)
    together = inject(tmp_path, model, files, entries)
    alone = inject(tmp_path, model, {"both": file}, ["both"])
    for name in model:
        torch.testing.assert_close(alone[name], together[name], rtol=0, atol=3e-7)


def test_it_is_linear_in_the_strengths(tmp_path):
    """kohya's svd_merge_lora multiplies both factors: there 0.5 gives a quarter."""
    model, files = two()
    for strength in (0.5, 2.0, -1.0):
        file, _ = made(tmp_path, "merge_loras", files, loras=[f"<lora:one:{strength}>"])
        for name in layers("sd1", model):
            np.testing.assert_allclose(change(file, name), strength * change(files["one"], name), atol=1e-6)


def test_a_rank_keeps_the_most_of_the_sum(tmp_path):
    model, files = two()
    file, report = made(tmp_path, "merge_loras", files, loras=["one", "other"], rank=2)
    kept = energy = 0.0
    for name in layers("sd1", model):
        whole = change(files["one"], name) + change(files["other"], name)
        values = np.linalg.svd(whole, compute_uv=False)
        assert len(file[f"{name}.lora_down.weight"]) == 2
        error = np.linalg.norm(whole - change(file, name))
        assert error <= 1.001 * np.sqrt((values[2:] ** 2).sum()) + 1e-6 * values[0]
        kept, energy = kept + (values[:2] ** 2).sum(), energy + (values**2).sum()
    assert report["kept"] == pytest.approx(np.sqrt(kept / energy), rel=1e-3)


def test_ties_and_dare_merge_the_changes_themselves(tmp_path):
    model, files = two()
    entries = ["<lora:one:0.5>", "<lora:other:0.8>"]
    ties, _ = made(tmp_path, "merge_loras", files, loras=entries, rank=999, method="ties", density=0.4)
    for name in list(layers("sd1", model))[::40]:
        dense = [torch.from_numpy(change(files[each], name)).float() for each in files]
        zeros = torch.zeros_like(dense[0])
        expected = OPERATIONS["ties"].function(zeros, tuple(dense), weights=(0.5, 0.8), density=0.4)
        np.testing.assert_allclose(change(ties, name), expected.double().numpy(), atol=1e-5)
    dare, _ = made(tmp_path, "merge_loras", files, loras=entries, rank=999, method="dare", density=1.0)
    for name in list(layers("sd1", model))[::40]:
        plain = 0.5 * change(files["one"], name) + 0.8 * change(files["other"], name)
        np.testing.assert_allclose(change(dare, name), plain, atol=1e-5)
    with pytest.raises(UsageError, match="needs a rank"):
        made(tmp_path, "merge_loras", files, loras=entries, method="ties")


def test_files_of_different_trainers_meet(tmp_path):
    model, files = two()
    peft, _ = made(tmp_path, "rename_lora", {"other": files["other"]}, lora="other", style="peft")
    assert not set(peft) & set(files["other"])
    file, _ = made(tmp_path, "merge_loras", {"one": files["one"], "peft": peft}, loras=["one", "peft"])
    for name in layers("sd1", model):
        assert len(file[f"{name}.lora_down.weight"]) == 2 * RANK
        np.testing.assert_allclose(
            change(file, name), change(files["one"], name) + change(files["other"], name), atol=1e-6
        )


def test_block_weights_of_a_merge(tmp_path):
    _, files = two()
    file, _ = made(tmp_path, "merge_loras", files, loras=[{"lora": "one", "blocks": "OUTALL"}])
    assert not any(name.startswith("lora_unet_down_blocks") for name in file)
    inside = "lora_unet_up_blocks_1_attentions_0_proj_in"
    np.testing.assert_allclose(change(file, inside), change(files["one"], inside), atol=1e-6)


def test_a_loha_can_be_merged_at_a_rank(tmp_path):
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    random = torch.Generator().manual_seed(4)
    shapes = {"hada_w1_a": (320, 2), "hada_w1_b": (2, 320), "hada_w2_a": (320, 2), "hada_w2_b": (2, 320)}
    parts = {part: torch.randn(shape, generator=random) for part, shape in shapes.items()}
    dense = (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
    file, _ = made(tmp_path, "merge_loras", {"ha": {f"{name}.{p}": t for p, t in parts.items()}}, loras=["ha"], rank=4)
    np.testing.assert_allclose(change(file, name), dense.double().numpy(), atol=1e-3)


def test_what_needs_its_base_is_refused(tmp_path):
    model, files = two()
    name = next(iter(layers("sd1", model)))
    dora = files["one"] | {f"{name}.dora_scale": torch.ones(len(files["one"][f"{name}.lora_up.weight"]), 1)}
    with pytest.raises(WrongFormat, match="cannot be merged alone") as caught:
        made(tmp_path, "merge_loras", {"dora": dora}, loras=["dora"])
    assert caught.value.key == name


def test_two_families_are_refused(tmp_path):
    with pytest.raises(FamilyMismatch, match="not for models of one family"):
        made(tmp_path, "merge_loras", {"a": real_names("sd2"), "b": real_names("sdxl")}, loras=["a", "b"])


def test_a_checkpoint_is_refused(tmp_path):
    for op, step in (("merge_loras", {"loras": ["a"]}), ("resize_lora", {"lora": "a"}), ("rename_lora", {"lora": "a"})):
        with pytest.raises(WrongFormat, match='"a" is no LoRA'):
            made(tmp_path, op, {"a": checkpoint("sd1")}, **step)


# --- resizing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "amount", "rank_of"),
    [
        ("fixed", 0.9, lambda s: 2),
        ("sv_ratio", 3.0, lambda s: int((s > s[0] / 3).sum())),
        ("sv_cumulative", 0.8, lambda s: int(np.argmax(np.cumsum(s) >= 0.8 * s.sum())) + 1),
        ("sv_fro", 0.8, lambda s: int(np.argmax(np.cumsum(s**2) >= 0.64 * (s**2).sum())) + 1),
    ],
)
def test_resizing_keeps_the_greatest_values(tmp_path, rule, amount, rank_of):
    model, files = two()
    most = 2 if rule == "fixed" else 99
    file, _ = made(tmp_path, "resize_lora", {"one": files["one"]}, lora="one", rank=most, rule=rule, amount=amount)
    for name in layers("sd1", model):
        whole = change(files["one"], name)
        u, values, vh = np.linalg.svd(whole, full_matrices=False)
        rank = rank_of(values[:RANK])
        assert len(file[f"{name}.lora_down.weight"]) == rank
        assert float(file[f"{name}.alpha"]) == rank
        np.testing.assert_allclose(change(file, name), u[:, :rank] * values[:rank] @ vh[:rank], atol=1e-6)


def test_what_is_no_plain_lora_stays(tmp_path):
    _, files = two()
    name = "lora_unet_down_blocks_0_attentions_0_proj_in"
    loha = {f"{name}_x.hada_{part}": torch.randn(4, 4) for part in ("w1_a", "w1_b", "w2_a", "w2_b")}
    file, _ = made(tmp_path, "resize_lora", {"one": files["one"] | loha}, lora="one", rank=1)
    assert all(torch.equal(file[key], tensor) for key, tensor in loha.items())
    assert len(file[f"{name}.lora_down.weight"]) == 1


def test_what_training_said_stays_but_for_ranks(tmp_path):
    _, files = two()
    told = {"ss_network_dim": "3", "ss_output_name": "mine", "ss_tag_frequency": "{}", "sshs_model_hash": "x"}
    models.write(tmp_path / "one.safetensors", files["one"], told)
    output = {"model": "m", "file": "out.safetensors", "dtype": "keep"}
    step = {"op": "resize_lora", "lora": "one", "rank": 1}
    mk.run(models.recipe(tmp_path, {"one": "one.safetensors"}, {"m": step}, {"out": output}))
    metadata = mk.inspect_file(tmp_path / "out.safetensors").metadata
    assert metadata["ss_output_name"] == "mine"
    assert "ss_network_dim" not in metadata
    assert len(metadata["sshs_model_hash"]) == 64


# --- renaming --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["peft", "diffusers", "comfyui", "kohya"])
def test_there_and_back(tmp_path, style):
    model, files = two()
    there, _ = made(tmp_path, "rename_lora", {"one": files["one"]}, lora="one", style=style)
    back, _ = made(tmp_path, "rename_lora", {"there": there}, lora="there")
    for name in layers("sd1", model):
        np.testing.assert_allclose(change(back, name), change(files["one"], name), atol=1e-7)
    once = inject(tmp_path, model, files, ["one"])
    again = inject(tmp_path, model, {"there": there}, ["there"])
    assert all(torch.allclose(once[name], again[name], atol=1e-6) for name in model)


def test_a_single_operand_is_a_name(tmp_path):
    with pytest.raises(RecipeError, match="takes text in quotes"):
        made(tmp_path, "resize_lora", two()[1], lora=["one"], rank=1)


def test_every_rank_rule_is_offered():
    assert set(RESIZE_RULES) == set(RULES)
    assert set(RANK_RULES) < set(RULES)
    assert STYLES == styles.STYLES


def test_the_commands(tmp_path, monkeypatch, capsys):
    from mergekit_sd.cli.main import run

    monkeypatch.chdir(tmp_path)
    _, files = two()
    for name, file in files.items():
        models.write(tmp_path / f"{name}.safetensors", {n: t.half() for n, t in file.items()})
    assert run(["lora", "merge", "one.safetensors:0.5", "other.safetensors", "--rank", "2", "-o", "m.safetensors"]) == 0
    assert run(["lora", "resize", "m.safetensors", "--rank", "1", "-o", "r.safetensors"]) == 0
    assert run(["lora", "convert", "r.safetensors", "--style", "peft", "-o", "p.safetensors"]) == 0
    out = capsys.readouterr().out
    assert out.count("of their change kept") == 2
    assert {tensor.dtype for tensor in models.read(tmp_path / "p.safetensors").values()} == {torch.float16}


# --- broken files ----------------------------------------------------------------------------------------


BREAKS = {
    "no up": lambda file, name: file.pop(f"{name}.lora_up.weight"),
    "ranks differ": lambda file, name: file.update({f"{name}.lora_up.weight": torch.ones(24, 9)}),
    "two alphas": lambda file, name: file.update({f"{name}.alpha": torch.ones(2)}),
}


@pytest.mark.parametrize("op", ["merge_loras", "resize_lora", "rename_lora"])
@pytest.mark.parametrize("case", BREAKS)
def test_a_broken_module_is_refused_with_its_file(tmp_path, op, case):
    model, files = two()
    name = next(name for name, (_, _, shape) in layers("sd1", model).items() if len(shape) == 2 and shape[0] == 24)
    BREAKS[case](files["one"], name)
    step = {"loras": ["one"]} if op == "merge_loras" else {"lora": "one"}
    with pytest.raises((MalformedFile, ShapeMismatch)) as caught:
        made(tmp_path, op, {"one": files["one"]}, **step)
    assert caught.value.file == str(tmp_path / "one.safetensors")
    assert caught.value.key == name


@pytest.mark.parametrize("op", ["merge_loras", "resize_lora"])
def test_nan_is_refused_with_its_file(tmp_path, op):
    model, files = two()
    name = next(iter(layers("sd1", model)))
    files["one"][f"{name}.lora_up.weight"].view(-1)[0] = float("nan")
    step = {"loras": ["other", "one"]} if op == "merge_loras" else {"lora": "one"}
    with pytest.raises(NonFiniteResult, match="lora_up") as caught:
        made(tmp_path, op, files if op == "merge_loras" else {"one": files["one"]}, **step)
    assert caught.value.file == str(tmp_path / "one.safetensors")
    assert caught.value.key == name


def test_a_lora_and_its_negative_are_nothing(tmp_path):
    _, files = two()
    with pytest.raises(MissingTensors, match="nothing"):
        made(tmp_path, "merge_loras", {"one": files["one"]}, loras=["one", "<lora:one:-1>"], rank=2)


def test_a_lora_in_the_making_is_refused_at_once(tmp_path):
    steps = {
        "x": {"op": "merge_loras", "loras": ["a"]},
        "m": {"op": "resize_lora", "lora": "x", "rank": 2},
    }
    with pytest.raises(RecipeError, match="is made here") as caught:
        mk.load(models.recipe(tmp_path, {"a": "a.safetensors"}, steps))
    assert caught.value.line
