"""Hypernetworks averaged and scaled: the numbers against numpy, the effects on a net written in numpy."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from small_files import hypernetwork, loaded, same, saved

import mergekit_sd as mk
from mergekit_sd.cli.main import run
from mergekit_sd.errors import FamilyMismatch, MissingTensors, ShapeMismatch, UsageError, WrongFormat

STRENGTHS = st.floats(-2, 2, width=32).filter(lambda s: abs(s) > 0.01)


def merged(paths, target, weights):
    node = mk.ops.merge_hypernetworks([mk.open(path) for path in paths], weights=weights)
    mk.save(node, target, dtype="keep")
    return loaded(target)


def effect(value, width, which, x):
    """net(x) as the WebUI computes it: linear layers, each with its activation, then its norm; float64."""
    net = {name: tensor.double().numpy() for name, tensor in value[width][which].items()}
    places = sorted({int(name.split(".")[1]) for name in net})
    last = max(place for place in places if net[f"linear.{place}.weight"].ndim == 2)
    functions = {"relu": lambda x: np.maximum(x, 0), "tanh": np.tanh, "linear": lambda x: x}
    for place in places:
        weight, bias = net[f"linear.{place}.weight"], net[f"linear.{place}.bias"]
        if weight.ndim == 2:
            x = x @ weight.T + bias
            if place != last or value["activate_output"]:
                x = functions[value["activation_func"]](x)
        else:
            middle = x - x.mean(-1, keepdims=True)
            x = middle / np.sqrt(middle.var(-1, keepdims=True) + 1e-5) * weight + bias
    return x


@settings(max_examples=30, deadline=None)
@given(
    strength=STRENGTHS,
    activation=st.sampled_from(["linear", "relu", "tanh"]),
    norm=st.booleans(),
    activated=st.booleans(),
    structure=st.sampled_from([(1, 2, 1), (1, 1), (1, 2, 2, 1)]),
)
def test_a_strength_within_is_a_strength_without(strength, activation, norm, activated, structure):
    if activated and activation != "linear" and not norm:
        activated = False
    value = hypernetwork((8, 16), structure, norm=norm, activation_func=activation, activate_output=activated)
    with tempfile.TemporaryDirectory() as folder:
        source = saved(Path(folder) / "a.pt", value)
        made = merged([source], Path(folder) / "b.pt", [strength])
    assert {key: each for key, each in made.items() if isinstance(key, str)} == {
        key: each for key, each in value.items() if isinstance(key, str)
    }
    for width in (8, 16):
        x = np.random.default_rng(0).normal(size=(5, width))
        for which in (0, 1):
            expected = effect(value, width, which, x) * strength
            assert np.abs(effect(made, width, which, x) - expected).max() <= 1e-5 * max(np.abs(expected).max(), 1)


@settings(max_examples=25, deadline=None)
@given(
    weights=st.lists(st.floats(0.0625, 2, width=32), min_size=2, max_size=4), shape=st.sampled_from([(1, 2, 1), (1, 1)])
)
def test_the_mean_against_float64(weights, shape):
    values = [hypernetwork((8,), shape, seed=number) for number in range(len(weights))]
    with tempfile.TemporaryDirectory() as folder:
        paths = [saved(Path(folder) / f"{number}.pt", value) for number, value in enumerate(values)]
        made = merged(paths, Path(folder) / "made.pt", weights)
    total = np.sum(np.float64(weights))
    last = f"linear.{2 * (len(shape) - 2)}"
    for which in (0, 1):
        for name, tensor in made[8][which].items():
            parts = [value[8][which][name].double().numpy() for value in values]
            mean = sum(np.float64(w) * part for w, part in zip(weights, parts, strict=True)) / total
            expected = mean * total if name.startswith(last) else mean
            assert np.abs(tensor.double().numpy() - expected).max() <= 1e-5 * max(total, 1)


def test_weights_that_add_up_to_one_scale_nothing(tmp_path):
    """Also where an activation comes last."""
    values = [hypernetwork(activate_output=True, seed=seed) for seed in (0, 0)]
    paths = [saved(tmp_path / f"{number}.pt", value) for number, value in enumerate(values)]
    made = merged(paths, tmp_path / "made.pt", [0.25, 0.75])
    for width in (8, 16):
        for net, other in zip(made[width], values[0][width], strict=True):
            assert all(same(tensor, other[name]) for name, tensor in net.items())
    assert made["name"] == "0 + 1"
    assert "step" not in made
    assert made["activation_func"] == "relu"


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("a", "b", "c")):
        saved(tmp_path / f"{name}.pt", hypernetwork((8,), seed=seed))
    assert run(["hypernetwork", "merge", "a.pt", "b.pt", "c.pt", "-o", "mean.safetensors"]) == 0
    assert run(["verify", "mean.safetensors"]) == 0
    assert run(["convert", "mean.safetensors", "-o", "mean.pt"]) == 0
    parts = [loaded(f"{name}.pt")[8][1]["linear.2.weight"] for name in ("a", "b", "c")]
    assert torch.allclose(loaded("mean.pt")[8][1]["linear.2.weight"], sum(parts) / 3, atol=1e-6)
    assert run(["hypernetwork", "merge", "a.pt:0.5", "-o", "half.pt"]) == 0
    half, whole = loaded("half.pt"), loaded("a.pt")
    assert torch.equal(half[8][0]["linear.2.weight"], whole[8][0]["linear.2.weight"] / 2)
    assert same(half[8][0]["linear.0.weight"], whole[8][0]["linear.0.weight"])
    capsys.readouterr()
    assert run(["hypernetwork", "merge", "--help"]) == 0
    assert "NOT the sum of their effects" in " ".join(capsys.readouterr().out.split())


def test_a_merge_of_a_merge_keeps_the_settings(tmp_path):
    paths = [saved(tmp_path / f"{seed}.pt", hypernetwork((8,), seed=seed)) for seed in (0, 1)]
    first, second = map(mk.open, paths)
    inner = mk.ops.merge_hypernetworks([first, second], weights=[0.5, 0.5])
    mk.save(mk.ops.merge_hypernetworks([inner, second], weights=[0.5, 0.5]), tmp_path / "made.pt", dtype="fp32")
    assert loaded(tmp_path / "made.pt")["layer_structure"] == [1, 2, 1]


# --- refusals ----------------------------------------------------------------------------------------------


def refused(tmp_path, error, values, weights, match):
    paths = [saved(tmp_path / f"{number}.pt", value) for number, value in enumerate(values)]
    with pytest.raises(error, match=match) as caught:
        merged(paths, tmp_path / "made.pt", weights)
    assert not (tmp_path / "made.pt").exists()
    return caught.value


def test_an_activation_at_the_end_takes_no_strength(tmp_path):
    value = hypernetwork(activate_output=True)
    error = refused(tmp_path, UsageError, [value], [0.5], r"activation \(relu\) after its last layer")
    assert error.file == str(tmp_path / "0.pt")
    assert "<hypernet:name:0.5>" in error.hint
    del value["activate_output"]  # the WebUI takes it for so
    refused(tmp_path, UsageError, [value], [0.5], "activation")
    del value["activation_func"]  # none at all then
    saved(tmp_path / "0.pt", value)
    merged([tmp_path / "0.pt"], tmp_path / "made.pt", [0.5])


@pytest.mark.parametrize(("weights", "number"), [([0.0], 1), ([1.0, -1.0], 2), ([0.3, 0.3, -0.6], 3)])
def test_weights_that_cancel(tmp_path, weights, number):
    values = [hypernetwork(seed=seed) for seed in range(number)]
    refused(tmp_path, UsageError, values, weights, "add up to 0")


def test_other_structures(tmp_path):
    values = [hypernetwork((8, 16)), hypernetwork((8,))]
    error = refused(tmp_path, MissingTensors, values, [0.5, 0.5], '"1" lacks 8 layer tensors that "0" has')
    assert error.key == "16.0.linear.0.weight"
    assert error.file == str(tmp_path / "1.pt")
    refused(tmp_path, MissingTensors, values[::-1], [0.5, 0.5], '"0" lacks')
    values = [hypernetwork((8,)), hypernetwork((8,), (1, 4, 1))]
    error = refused(tmp_path, ShapeMismatch, values, [0.5, 0.5], "has shape")
    assert error.key == "8.0.linear.0.weight"


@pytest.mark.parametrize(
    ("one", "other", "match"),
    [
        ({"activation_func": "relu"}, {"activation_func": "tanh"}, 'has relu between its layers, "1" has tanh'),
        ({"activation_func": "linear"}, {"activation_func": "tanh"}, "has nothing between"),
        ({"activate_output": True}, {"activate_output": False}, "after the last one as well"),
    ],
)
def test_networks_that_compute_otherwise(tmp_path, one, other, match):
    refused(tmp_path, FamilyMismatch, [hypernetwork(**one), hypernetwork(**other)], [0.5, 0.5], match)


def test_a_linear_one_activates_nothing(tmp_path):
    values = [hypernetwork(activation_func="linear", activate_output=flag) for flag in (True, False)]
    paths = [saved(tmp_path / f"{number}.pt", value) for number, value in enumerate(values)]
    merged(paths, tmp_path / "made.pt", [0.5, 0.7])


def test_other_kinds_and_unknown_settings(tmp_path):
    saved(tmp_path / "a.pt", hypernetwork((8,)))
    save_file({"emb_params": torch.ones(2, 8)}, tmp_path / "e.safetensors")
    with pytest.raises(WrongFormat, match='"e" is no hypernetwork'):
        merged([tmp_path / "a.pt", tmp_path / "e.safetensors"], tmp_path / "made.pt", [0.5, 0.5])
    one = mk.open(tmp_path / "a.pt")
    mixed = mk.ops.weighted_sum(one, one, alpha=0.5)
    with pytest.raises(UsageError, match=r"settings of .* are not known"):
        mk.save(mk.ops.merge_hypernetworks([mixed, one], weights=[0.5, 0.5]), tmp_path / "made.pt")
    with pytest.raises(UsageError, match="one number for each file"):
        merged([tmp_path / "a.pt"], tmp_path / "made.pt", [{"default": 0.5, "IN01": 1.0}])
