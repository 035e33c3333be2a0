"""Blending and joining textual inversions, against numpy in float64; and what does not fit."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from small_files import diffusers, loaded, plain, webui

import mergekit_sd as mk
from mergekit_sd.api import recipe_of
from mergekit_sd.cli.main import run
from mergekit_sd.errors import FamilyMismatch, RecipeError, ShapeMismatch, UsageError, WrongFormat
from mergekit_sd.inspection import inspect_file

NUMBERS = st.floats(-3, 3, width=32)


def merged(paths, target, weights, **options):
    node = mk.ops.merge_embeddings([mk.open(path) for path in paths], weights=weights, **options)
    mk.save(node, target, dtype="keep")
    return load_file(target) if target.suffix == ".safetensors" else loaded(target)


SMALLEST = 2 * float(np.finfo(np.float32).smallest_subnormal)  # a weight of 1e-42 has few digits in float32


def oracle(vectors, weights, mode):
    """Σ w·e with zeros for missing rows, or w·e one below the other; float64."""
    parts = [np.float64(weight) * each.double().numpy().reshape(-1, each.shape[-1])
             for each, weight in zip(vectors, weights, strict=True)]  # fmt: skip
    if mode == "concat":
        return np.concatenate(parts)
    rows = max(len(part) for part in parts)
    return sum(np.pad(part, ((0, rows - len(part)), (0, 0))) for part in parts)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), mode=st.sampled_from(["blend", "concat"]), both=st.booleans())
def test_against_float64(data, mode, both):
    widths = {"clip_l": 6, "clip_g": 10} if both else {"emb_params": data.draw(st.integers(1, 300))}
    rows = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    weights = [data.draw(NUMBERS) for _ in rows]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    files = [{name: torch.randn(n, width, generator=generator) for name, width in widths.items()} for n in rows]
    with tempfile.TemporaryDirectory() as folder:
        paths = [plain(Path(folder) / f"{number}.safetensors", each) for number, each in enumerate(files)]
        made = merged(paths, Path(folder) / "made.safetensors", weights, mode=mode)
    assert set(made) == set(widths)
    for name, tensor in made.items():
        expected = oracle([each[name] for each in files], weights, mode)
        assert tensor.shape == expected.shape
        scale = sum(abs(weight) for weight in weights) * 6
        assert np.abs(tensor.double().numpy() - expected).max() <= 1e-6 * scale + SMALLEST


@pytest.mark.parametrize("mode", ["blend", "concat"])
def test_one_file_of_weight_one_is_itself(tmp_path, mode):
    vectors = torch.randn(3, 768).half()
    webui(tmp_path / "a.pt", vectors)
    made = merged([tmp_path / "a.pt"], tmp_path / "b.pt", [1.0], mode=mode)["string_to_param"]["*"]
    assert made.dtype == torch.float16
    assert torch.equal(made, vectors)


def test_forms_meet_and_shorter_ones_are_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cat, dog = torch.randn(3, 768), torch.randn(768)
    webui(tmp_path / "cat.pt", cat)
    diffusers(tmp_path / "dog.bin", dog, "<dog>")
    assert run(["embedding", "merge", "cat.pt:0.5", "dog.bin:0.25", "-o", "mix.pt"]) == 0
    assert '"dog" has 1 vector of 3: zeros stand for the missing ones' in capsys.readouterr().err
    made = loaded("mix.pt")
    assert made["name"] == "cat + dog"
    assert "step" not in made
    expected = torch.cat([cat[:1] * 0.5 + dog * 0.25, cat[1:] * 0.5])
    assert torch.allclose(made["string_to_param"]["*"], expected, atol=1e-6)


def test_weights_of_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, two = torch.randn(2, 8), torch.randn(2, 8)
    for name, each in (("a", one), ("b", two), ("c:2", one)):
        plain(tmp_path / f"{name}.safetensors", each)
    Path("b.safetensors").rename("b:2")
    assert run(["embedding", "merge", "a.safetensors", "b:2", "-o", "mean.safetensors"]) == 0
    assert torch.allclose(load_file("mean.safetensors")["emb_params"], (one + two) / 2, atol=1e-6)
    assert run(["embedding", "merge", "a.safetensors", "b:2", "--mode", "concat", "-o", "both.safetensors"]) == 0
    assert torch.equal(load_file("both.safetensors")["emb_params"], torch.cat([one, two]))
    assert run(["verify", "both.safetensors"]) == 0
    assert run(["embedding", "merge", "a.safetensors:1", "b:2:-1", "-o", "less.bin", "--title", "less"]) == 0
    assert torch.allclose(loaded("less.bin")["less"], one - two, atol=1e-6)
    assert run(["embedding", "merge", "a.safetensors", "--style", "diffusers", "-o", "d.safetensors"]) == 0
    assert list(load_file("d.safetensors")) == ["a"]
    for name in ("mean.safetensors", "both.safetensors", "less.bin", "d.safetensors"):
        assert inspect_file(name).kind == "embedding"


def test_a_saved_recipe_makes_the_same_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        webui(tmp_path / f"{name}.pt", torch.randn(2, 768))
    assert run(["embedding", "merge", "a.pt", "b.pt", "-o", "mix.pt", "--save-recipe", "mix.toml"]) == 0
    before = (tmp_path / "mix.pt").read_bytes()
    assert run(["run", "mix.toml", "--locked", "--force"]) == 0
    assert (tmp_path / "mix.pt").read_bytes() == before


def test_a_merge_of_a_merge(tmp_path):
    for name in ("a", "b"):
        webui(tmp_path / f"{name}.pt", torch.full((1, 768), 2.0))
    inner = mk.ops.merge_embeddings(
        [mk.open(tmp_path / "a.pt"), mk.open(tmp_path / "b.pt")], weights=[1, 1], mode="concat"
    )
    outer = mk.ops.merge_embeddings([inner, mk.open(tmp_path / "a.pt")], weights=[1.0, 0.5])
    mk.save(outer, tmp_path / "c.pt", dtype="keep")
    assert torch.equal(loaded(tmp_path / "c.pt")["string_to_param"]["*"], torch.tensor([[3.0], [2.0]]).expand(2, 768))


def test_what_does_not_fit(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    webui(tmp_path / "sd1.pt", torch.randn(2, 768))
    webui(tmp_path / "sd2.pt", torch.randn(2, 1024))
    plain(tmp_path / "xl.safetensors", {"clip_l": torch.randn(2, 768), "clip_g": torch.randn(2, 1280)})
    plain(tmp_path / "odd.safetensors", {"clip_l": torch.randn(2, 768), "clip_g": torch.randn(2, 99)})
    plain(tmp_path / "m.safetensors", {"x.weight": torch.ones(2, 2), "y.weight": torch.ones(2)})
    out = tmp_path / "out.pt"
    with pytest.raises(ShapeMismatch, match='"sd1" have 768 numbers, those of "sd2" have 1,024') as shape:
        merged(["sd1.pt", "sd2.pt"], out, [1.0, 1.0])
    assert shape.value.file == str(tmp_path / "sd2.pt")
    for pair in (["sd1.pt", "xl.safetensors"], ["xl.safetensors", "sd1.pt"]):
        with pytest.raises(FamilyMismatch, match='"xl" is for the two text encoders of SDXL, "sd1" for one') as family:
            merged(pair, out, [1.0, 1.0])
        assert family.value.file == str(tmp_path / pair[1])
    with pytest.raises(ShapeMismatch) as shape:
        merged(["xl.safetensors", "odd.safetensors"], out, [1.0, 1.0])
    assert shape.value.key == "clip_g"
    with pytest.raises(WrongFormat, match='"m" is no textual inversion'):
        merged(["sd1.pt", "m.safetensors"], out, [1.0, 1.0])
    with pytest.raises(UsageError, match="one number for each file"):
        merged(["sd1.pt"], out, [{"default": 1.0, "IN04": 0.5}])
    with pytest.raises(RecipeError, match="list of 3 for 1 model"):
        merged(["sd1.pt"], out, [1.0, 2.0, 3.0])
    assert not out.exists()
    assert run(["embedding", "merge", "sd1.pt:1", "sd1.pt", "-o", "out.pt"]) == 2
    assert "a weight to each, or to none" in capsys.readouterr().err
    assert run(["embedding", "merge", ":1", "-o", "out.pt"]) == 2
    assert run(["embedding", "merge", "sd1.pt:nan", "-o", "out.pt"]) == 2
    assert run(["embedding", "merge", "sd1.pt:half", "-o", "out.pt"]) == 3
    assert "sd1.pt:half" in capsys.readouterr().err
    assert run(["embedding", "merge", "sd1.pt", "-o", "sd1.pt", "--force"]) == 2
    assert not out.exists()


def test_a_plan_says_that_a_pickle_is_one_and_its_size_about(tmp_path):
    """Of a .safetensors file it is the file's, to the byte."""
    paths = [webui(tmp_path / f"{name}.pt", torch.randn(2, 768)) for name in "ab"]
    node = mk.ops.merge_embeddings([mk.open(path) for path in paths], weights=[1, 1])
    told = {}
    for suffix in (".pt", ".bin", ".safetensors"):
        plan = mk.plan(recipe_of(node, tmp_path / f"out{suffix}"), anywhere=True)
        report = mk.plan_as_json(plan)
        told[suffix] = (
            report["outputs"][0]["container"],
            "a PyTorch file of about" in "\n".join(mk.plan_lines(report, 200)),
        )
    assert told == {".pt": ("torch", True), ".bin": ("torch", True), ".safetensors": ("safetensors", False)}
    made = mk.save(node, tmp_path / "out.safetensors")
    assert made.bytes == report["outputs"][0]["bytes"]
