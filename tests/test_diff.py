"""`diff`: how far two models lie apart, against numpy in float64."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from small_models import CLIP, UNET, VAE, bare, save, small

from mergekit_sd.architectures import detect, ema_name
from mergekit_sd.cli.inspect import diff_command
from mergekit_sd.errors import Cancelled
from mergekit_sd.events import CancelToken
from mergekit_sd.formats.open import open_model
from mergekit_sd.inspection import diff_files
from mergekit_sd.inspection.distance import Distance
from mergekit_sd.inspection.streaming import CHUNK

CONV_IN = UNET + "input_blocks.0.0.weight"
OUT = UNET + "out.2.bias"


def compared(tmp_path, a, b, **options):
    return diff_files(save(tmp_path / "a.safetensors", a), save(tmp_path / "b.safetensors", b), **options)


def groups(found):
    return {group.name: group for group in found.groups}


def words(*arguments):
    result = CliRunner().invoke(diff_command, [str(each) for each in arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def oracle(a, b):
    """Relative L2, cosine and largest change over all elements of two lists of tensors."""
    x = np.concatenate([each.double().numpy().ravel() for each in a])
    y = np.concatenate([each.double().numpy().ravel() for each in b])
    cosine = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
    return np.linalg.norm(y - x) / np.linalg.norm(x), cosine, np.abs(y - x).max()


def assert_measures(distance, expected):
    assert distance.relative_l2 == pytest.approx(expected[0], rel=1e-6)
    assert distance.cosine == pytest.approx(expected[1], rel=1e-6, abs=1e-7)
    assert distance.largest == pytest.approx(expected[2], rel=1e-6)


def test_blocks_and_components_against_float64(tmp_path):
    a, b = small("sd1"), small("sd1", seed=1)
    found = compared(tmp_path, a, b)
    places = detect(open_model(tmp_path / "a.safetensors").tensors).places
    blocks = [f"IN{i:02}" for i in range(12)] + ["M00"] + [f"OUT{i:02}" for i in range(12)]
    assert list(groups(found)) == [*blocks, "vae", "text_encoder", "schedule"]
    for name, group in groups(found).items():
        if name != "schedule":
            members = [k for k in a if name in (places[k].block, places[k].component) and a[k].is_floating_point()]
            assert_measures(group.distance, oracle([a[k] for k in members], [b[k] for k in members]))
            largest = max(members, key=lambda key: (a[key].double() - b[key].double()).abs().max())
            assert (a[group.largest_in].float() - b[group.largest_in].float()).abs().max() == group.distance.largest
            assert places[largest].block == places[group.largest_in].block
    assert sum(group.compared for group in found.groups) == len(a)
    assert found.total.equal == 1  # position_ids


@pytest.mark.parametrize(
    ("dtype_a", "dtype_b"),
    [("float16", "float16"), ("float32", "bfloat16"), ("float64", "float16"), ("float8_e4m3fn", "float32")],
)
@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_large_tensors_of_any_dtype(tmp_path, dtype_a, dtype_b, scale):
    random = torch.Generator().manual_seed(3)
    values = torch.randn(2 * CHUNK + 5, generator=random)
    a = values.to(getattr(torch, dtype_a))
    b = (values + scale * torch.randn(values.shape, generator=random)).to(getattr(torch, dtype_b))
    found = compared(tmp_path, {"x": a}, {"x": b})
    expected = oracle([a.float() if "8" in dtype_a else a], [b])
    assert_measures(found.total.distance, expected)
    # What matters of a cosine near one is its distance from one.
    assert 1 - found.total.distance.cosine == pytest.approx(1 - expected[1], rel=1e-4)


def test_equal_in_value_is_equal(tmp_path):
    a = small("sd1")
    found = compared(
        tmp_path, a, {key: value.float() if value.dtype == torch.float16 else value for key, value in a.items()}
    )
    assert found.same
    assert found.total.distance.relative_l2 == found.total.distance.largest == 0.0
    assert found.total.distance.cosine == 1.0
    assert "The same" in words(tmp_path / "a.safetensors", tmp_path / "b.safetensors")


def test_integers_are_compared_for_equality(tmp_path):
    one = {"same": torch.arange(5), "cast": torch.arange(5), "moved": torch.arange(5), "mixed": torch.arange(5)}
    other = one | {"cast": torch.arange(5).int(), "moved": torch.arange(5) + 1, "mixed": torch.arange(5) + 0.5}
    found = compared(tmp_path, one, other)
    assert {each.name: each.state for each in found.tensors} == {
        "same": "equal",
        "cast": "equal",
        "moved": "different",
        "mixed": "different",
    }
    assert found.total.distance.squares_a == 0
    assert "moved: whole numbers" in words(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--tensors")


def test_the_inpainting_convolution_is_a_difference_of_shape(tmp_path):
    found = compared(tmp_path, small("sd1-inpainting"), small("sd1"))
    assert (found.a.architecture, found.b.architecture) == ("sd1-inpainting", "sd1")
    assert [(each.name, each.shape_a[1], each.shape_b[1]) for each in found.of_state("shape")] == [(CONV_IN, 9, 4)]
    assert groups(found)["IN00"].shape == 1
    assert f"{CONV_IN}: 8×9×3×3 in A, 8×4×3×3 in B" in words(tmp_path / "a.safetensors", tmp_path / "b.safetensors")


def test_what_is_in_one_file_only(tmp_path):
    a = small("sd1")
    b = {key: value for key, value in a.items() if key != OUT} | {"loss.x": torch.zeros(2)}
    a[ema_name(OUT)] = torch.zeros(4)
    found = compared(tmp_path, a, b)
    assert {each.name for each in found.of_state("only_a")} == {OUT, ema_name(OUT)}
    assert [each.name for each in found.of_state("only_b")] == ["loss.x"]
    assert (groups(found)["OUT11"].only_a, groups(found)["ema"].only_a, groups(found)["junk"].only_b) == (1, 1, 1)
    told = words(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert f"Only in A, 2 tensors\n  {ema_name(OUT)}\n  {OUT}\n" in told
    assert "Only in B, 1 tensor\n  loss.x\n" in told


def test_names_meet_without_prefix(tmp_path):
    model = small("sd1")
    found = compared(tmp_path, bare(model, VAE), model)
    vae = groups(found)["vae"]
    assert (vae.compared, vae.equal, vae.only_a) == (248, 248, 0)
    assert not found.same


def test_novelai_names_meet(tmp_path):
    model = small("sd1")
    old = {key.replace(CLIP + "text_model.", CLIP): value for key, value in model.items()}
    assert compared(tmp_path, model, old).same


def test_nan_and_inf_are_counted_and_left_out(tmp_path):
    a, b = torch.tensor([3.0, float("nan"), 4.0, 1.0]), torch.tensor([3.0, 1.0, 5.0, float("inf")])
    found = compared(tmp_path, {"x": a, "same": a}, {"x": b, "same": a})
    each = {each.name: each for each in found.tensors}
    assert (each["x"].distance.nonfinite, each["same"].distance.nonfinite) == (2, 1)
    assert (each["x"].state, each["same"].state) == ("different", "equal")
    assert each["x"].distance.relative_l2 == pytest.approx(1 / 5)
    assert "3 values left out" in words(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    nothing = compared(tmp_path, {"x": torch.full((3,), float("nan"))}, {"x": torch.zeros(3)})
    assert nothing.total.distance.nonfinite == 3
    assert not nothing.same
    json.loads(json.dumps(nothing.as_json(tensors=True), allow_nan=False))


def test_squares_beyond_float32(tmp_path):
    found = compared(tmp_path, {"x": torch.tensor([3e30, 4e30])}, {"x": torch.tensor([3e30, 5e30])})
    assert found.total.distance.relative_l2 == pytest.approx(0.2)
    assert found.total.distance.nonfinite == 0


def test_from_zero(tmp_path):
    found = compared(
        tmp_path, {"x": torch.zeros(4), "none": torch.zeros(0)}, {"x": torch.ones(4), "none": torch.zeros(0)}
    )
    assert (found.total.distance.relative_l2, found.total.distance.cosine) == (None, None)
    assert (found.total.compared, found.total.equal) == (2, 1)
    assert "from zero" in words(tmp_path / "a.safetensors", tmp_path / "b.safetensors")


def test_the_cosine_stays_in_its_range():
    assert Distance(1.0, 1.0, 4.0).cosine == -1.0
    assert Distance(1.0, 1.0, 4.1).cosine == -1.0
    assert Distance(4.0, 1.0, 1.0).cosine == 1.0
    assert Distance(1.0, 1.0, 2.0).cosine == pytest.approx(0)
    assert math.isclose(1 - Distance(1.0, 1.0, 2e-14).cosine, 1e-14, rel_tol=0.02)


def test_json(tmp_path):
    a, b = small("sd1"), small("sd1", seed=1)
    b |= {key: a[key] for key in a if key.startswith(VAE)}
    b[OUT] = a[OUT] + 100
    paths = save(tmp_path / "a.safetensors", a), save(tmp_path / "b.safetensors", b)
    report = json.loads(words(*paths, "--json"))
    assert set(report) == {"a", "b", "same", "total", "groups", "shape", "only_a", "only_b"}
    assert report["a"] == {"path": str(paths[0]), "kind": "checkpoint", "architecture": "sd1"}
    fields = ["name", "relative_l2", "cosine", "largest", "nonfinite", "largest_in"]
    assert list(report["total"]) == [*fields, "compared", "equal", "shape", "only_a", "only_b"]
    assert report["total"]["largest_in"] == OUT
    tensors = json.loads(words(*paths, "--json", "--tensors"))["tensors"]
    assert tensors[0]["name"] == OUT
    assert tensors[0]["group"] == "OUT11"
    assert [each["relative_l2"] for each in tensors] == sorted((each["relative_l2"] for each in tensors), reverse=True)


def test_the_table(tmp_path):
    name = "a\x1b[31m\n[/x]"
    a, b = small("sd1") | {name: torch.zeros(2)}, small("sd1", seed=1) | {name: torch.ones(2)}
    b |= {key: a[key] for key in a if key.startswith(VAE)}
    told = words(save(tmp_path / "a.safetensors", a), save(tmp_path / "[b].safetensors", b), "--tensors")
    assert "\x1b" not in told
    rows = {line.split("  ")[0].strip(): line for line in told.splitlines() if line.startswith(" ")}
    assert "none" in rows["VAE"]
    assert "248/248" in rows["VAE"]
    assert "%" in rows["OUT05"]
    assert "a\\x1b[31m\\n[/x]" in rows["junk"]
    assert "from zero  a\\x1b[31m\\n[/x]\n" in told
    assert "B  " + str(tmp_path / "[b].safetensors: checkpoint (sd1)\n") in told


def test_progress_and_cancel(tmp_path):
    a = {f"{i}": torch.randn(CHUNK) for i in range(30)}
    told = []
    compared(tmp_path, a, a, on_progress=lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert told[-1] == (2 * 30 * 4 * CHUNK, 2 * 30 * 4 * CHUNK)
    token = CancelToken()
    told.clear()

    def cancel_at_once(done, total):
        told.append(done)
        token.cancel()

    with pytest.raises(Cancelled):
        compared(tmp_path, a, a, on_progress=cancel_at_once, cancel=token)
    assert len(told) == 1
