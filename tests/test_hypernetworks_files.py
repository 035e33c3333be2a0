"""Hypernetworks between .pt and .safetensors: every bit and every setting."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_files import hypernetwork, loaded, same, saved

import mergekit_sd as mk
from mergekit_sd.cli.main import run
from mergekit_sd.errors import RecipeError, WrongFormat
from mergekit_sd.inspection import inspect_file


def converted(source, target, **options):
    mk.save(mk.ops.convert(mk.open(source)), target, dtype="keep", **options)
    return target


def agree(one, other):
    """Both dictionaries, the nets bit for bit."""
    assert set(one) == set(other)
    for key, value in one.items():
        if not isinstance(key, int):
            assert (type(other[key]), other[key]) == (type(value), value)
            continue
        assert isinstance(other[key], tuple)
        for net, another in zip(value, other[key], strict=True):
            assert set(net) == set(another)
            assert all(same(tensor, another[name]) for name, tensor in net.items())


@settings(max_examples=25, deadline=None)
@given(
    widths=st.lists(st.sampled_from([2, 4, 6, 320]), min_size=1, max_size=3, unique=True),
    middle=st.lists(st.sampled_from([1, 1.5, 2, 4]), max_size=3),
    norm=st.booleans(),
    half=st.booleans(),
    activation=st.sampled_from(["linear", "relu", "leakyrelu", "tanh"]),
    dropout=st.booleans(),
    metadata=st.sampled_from(["full", "none"]),
)
def test_there_and_back(widths, middle, norm, half, activation, dropout, metadata):
    value = hypernetwork(widths, (1, *middle, 1), norm=norm, activation_func=activation, use_dropout=dropout)
    if half:
        value = {
            key: tuple({name: each.half() for name, each in net.items()} for net in nets) if key in widths else nets
            for key, nets in value.items()
        }
    with tempfile.TemporaryDirectory() as folder:
        source = saved(Path(folder) / "a.pt", value)
        there = converted(source, Path(folder) / "a.safetensors", metadata=metadata)
        agree(value, loaded(converted(there, Path(folder) / "b.pt")))
        told = inspect_file(source).as_json()["hypernetwork"]
        assert inspect_file(there).as_json()["hypernetwork"] == told
        assert inspect_file(Path(folder) / "b.pt").as_json()["hypernetwork"] == told


def test_the_names_in_safetensors(tmp_path):
    value = hypernetwork((768,))
    made = load_file(converted(saved(tmp_path / "a.pt", value), tmp_path / "a.safetensors"))
    assert set(made) == {
        f"768.{net}.linear.{layer}.{part}" for net in (0, 1) for layer in (0, 2) for part in ("weight", "bias")
    }
    assert same(made["768.1.linear.2.weight"], value[768][1]["linear.2.weight"])


def test_what_says_nothing_is_left_out_and_odd_texts_stay_texts(tmp_path):
    value = hypernetwork(optional_info=None, dropout_structure=None, step=7)
    back = loaded(converted(saved(tmp_path / "a.pt", value), tmp_path / "b.pt"))
    assert set(value) - set(back) == {"optional_info", "dropout_structure"}
    save_file(
        {"8.0.linear.0.weight": torch.ones(8, 8)},
        tmp_path / "odd.safetensors",
        {
            "step": "many",
            "is_layer_norm": "perhaps",
            "layer_structure": "[1, {}]",
            "dropout_structure": "[",
            "name": "5",
        },
    )
    back = loaded(converted(tmp_path / "odd.safetensors", tmp_path / "odd.pt"))
    assert {key: each for key, each in back.items() if isinstance(key, str)} == {"name": "5"}


def test_equal_content_gives_equal_bytes(tmp_path):
    saved(tmp_path / "a.pt", hypernetwork())
    one = converted(tmp_path / "a.pt", tmp_path / "one.pt").read_bytes()
    assert converted(tmp_path / "a.pt", tmp_path / "two.pt").read_bytes() == one
    there = converted(tmp_path / "a.pt", tmp_path / "a.safetensors")
    assert converted(there, tmp_path / "three.pt").read_bytes() == one


def test_nets_of_before_the_layers_had_a_list(tmp_path):
    old = {8: ({"linear1.weight": torch.ones(16, 8)}, {"linear1.weight": torch.zeros(16, 8)}), "step": 3, "name": "old"}
    agree(old, loaded(converted(saved(tmp_path / "a.pt", old), tmp_path / "b.pt")))


def test_an_empty_layer(tmp_path):
    value = {0: ({"linear.0.weight": torch.ones(0, 0)}, {"linear.0.weight": torch.ones(0, 0)}), "name": "x"}
    agree(value, loaded(converted(saved(tmp_path / "a.pt", value), tmp_path / "b.pt")))


def test_what_is_refused(tmp_path, monkeypatch, capsys):
    saved(tmp_path / "a.pt", hypernetwork())
    with pytest.raises(RecipeError, match=r"A hypernetwork is not written as \.bin") as caught:
        converted(tmp_path / "a.pt", tmp_path / "a.bin")
    assert caught.value.hint == "name the file .safetensors or .pt"
    odd = {"8.0.linear.0.weight": torch.ones(8, 8), "8.0.linear.0.bias": torch.ones(8), "more": torch.ones(1)}
    save_file(odd, tmp_path / "odd.safetensors")
    with pytest.raises(WrongFormat, match="1 tensor that no hypernetwork has") as wrong:
        converted(tmp_path / "odd.safetensors", tmp_path / "odd.pt")
    assert list(wrong.value.details) == ["more"]
    monkeypatch.chdir(tmp_path)
    assert run(["convert", "a.pt", "--style", "a1111", "-o", "b.pt"]) == 3
    assert "is no textual inversion" in capsys.readouterr().err
