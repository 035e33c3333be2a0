"""PEFT's OFT, which rotates inputs: its own files and settings, against its own merge."""

from __future__ import annotations

import json
import warnings
from types import SimpleNamespace

import models
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_lora_inject import checkpoint

import mergekit_sd as mk
from mergekit_sd.adapters.algorithms import apply, check
from mergekit_sd.adapters.names import read_adapter
from mergekit_sd.errors import MalformedFile, ShapeMismatch, WrongFormat
from mergekit_sd.formats.open import open_model

IN, OUT = 12, 8
NEUMANN = {"cayley_terms": torch.tensor(5.0)}


class Layers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(IN, OUT)
        self.small = torch.nn.Conv2d(IN, OUT, 1)
        self.conv = torch.nn.Conv2d(IN, OUT, 3, padding=1)


LAYERS = ("linear", "small", "conv")


def saved(folder, **said):
    """For each layer: its weight, and what PEFT makes of it with a file of random numbers that it saves."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = Layers()
    before = {name: getattr(base, name).weight.detach().clone() for name in LAYERS}
    config = peft.OFTConfig(target_modules=set(LAYERS), **{"oft_block_size": 4, **said})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(base, config)
        for parameter in made.parameters():
            if parameter.requires_grad:
                torch.nn.init.uniform_(parameter, -0.3, 0.5)
        made.save_pretrained(folder)
        after = made.merge_and_unload()
    return {name: (before[name], getattr(after, name).weight.detach()) for name in LAYERS}


def opened(folder):
    """Its modules by layer: their parts with the numbers that settings say."""
    path = folder / "adapter_model.safetensors"
    tensors = models.read(path)
    return {
        module.name.rpartition(".")[2]: {part: tensors[info.name] for part, info in module.parts.items()}
        | {name: torch.tensor(number) for name, number in module.said.items()}
        for module in read_adapter(open_model(path)).modules
    }


def agrees(found, expected):
    assert float((found - expected).norm() / expected.norm()) <= 1e-5


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"use_cayley_neumann": False},
        *({"num_cayley_neumann_terms": terms} for terms in (1, 2, 3, 4, 6, 9)),
        {"coft": True},
        {"coft": True, "eps": 0.5},
        {"coft": True, "eps": 0.5, "use_cayley_neumann": False},
        {"coft": True, "eps": 100.0},
        {"block_share": True},
        {"block_share": True, "coft": True, "eps": 0.5},
        {"oft_block_size": 0, "r": 3},
        {"oft_block_size": 12},
    ],
    ids=str,
)
def test_what_peft_saves_and_merges(tmp_path, said):
    expected = saved(tmp_path, **said)
    found = opened(tmp_path)
    assert found.keys() == expected.keys()
    for name, (before, after) in expected.items():
        agrees(apply(before, found[name], 1.0), after)
        assert torch.equal(after, before) == (said.get("num_cayley_neumann_terms") == 1)


@pytest.mark.parametrize("exact", [True, False])
def test_a_strength_is_a_place_on_the_line_between_both_weights(tmp_path, exact):
    """As of the OFT of outputs, each rotation at strength k is k·R + (1 − k)·I."""
    expected = saved(tmp_path, use_cayley_neumann=not exact)
    for name, (before, after) in expected.items():
        parts = opened(tmp_path)[name]
        assert torch.equal(apply(before, parts, 0.0), before)
        for strength in (0.5, -1.0, 1.5):
            agrees(apply(before, parts, strength), before + strength * (after - before))


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 6), st.booleans(), st.integers(0, 9))
def test_cayleys_rotations_keep_lengths(size, blocks, rows, share, seed):
    """WWᵀ stays, and so does every row's length within a block."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, size * blocks, generator=generator, dtype=torch.float64)
    numbers = 3 * torch.randn(1 if share else blocks, size * (size - 1) // 2, generator=generator, dtype=torch.float64)
    turned = apply(weight, {"oft_R": numbers, "cayley_terms": torch.tensor(0.0)}, 1.0)
    assert torch.allclose(turned @ turned.T, weight @ weight.T)
    lengths = [each.reshape(rows, blocks, size).norm(dim=2) for each in (turned, weight)]
    assert torch.allclose(*lengths)
    back = apply(turned, {"oft_R": -numbers, "cayley_terms": torch.tensor(0.0)}, 1.0)
    assert torch.allclose(back, weight)


def test_the_series_turns_the_other_way():
    """So it is in PEFT; of one angle t the series is near the rotation by 2·atan(t), Cayley's by as much backwards."""
    t = 0.01
    parts = {"oft_R": torch.tensor([[t]], dtype=torch.float64)}
    cosine, sine = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
    rotation = np.array([[cosine, sine], [-sine, cosine]])
    eye = torch.eye(2, dtype=torch.float64)
    # W' = W·Rᵀ: of I, the transposed.
    assert np.allclose(apply(eye, parts | {"cayley_terms": torch.tensor(0.0)}, 1.0), rotation, atol=1e-12)
    assert np.allclose(apply(eye, parts | NEUMANN, 1.0), rotation.T, atol=t**4)


@pytest.mark.parametrize("shape", [(5, 6), (6,), (), (2, 3, 1), (3, 7), (4, 6)])
def test_numbers_that_do_not_fit(shape):
    parts = {"oft_R": SimpleNamespace(shape=shape), "cayley_terms": SimpleNamespace(shape=())}
    with pytest.raises(ShapeMismatch, match="12 columns together"):
        check(parts, (8, 12))


@pytest.mark.parametrize(("number", "terms"), [(torch.nan, 0.0), (torch.nan, 5.0), (torch.inf, 5.0), (1e30, 0.0)])
def test_numbers_that_give_no_rotation(number, terms):
    numbers = torch.full((4, 3), number)
    with pytest.raises(MalformedFile, match="no rotation"):
        apply(torch.ones(8, 12), {"oft_R": numbers, "cayley_terms": torch.tensor(terms)}, 1.0)


# --- files and their settings ------------------------------------------------------------------------------


def module_of(tmp_path, config):
    models.write(tmp_path / "adapter_model.safetensors", {"base_model.model.a.b.oft_R.weight": torch.zeros(3, 6)})
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    return read_adapter(open_model(tmp_path / "adapter_model.safetensors")).modules[0]


def test_what_settings_say(tmp_path):
    said = {"peft_type": "OFT"}
    assert module_of(tmp_path, said).said == {"cayley_terms": 5}
    assert module_of(tmp_path, said | {"use_cayley_neumann": False, "eps": 1.0}).said == {"cayley_terms": 0}
    assert module_of(tmp_path, said | {"coft": True}).said == {"cayley_terms": 5, "coft_eps": 6e-5}
    assert module_of(tmp_path, said | {"peft_type": "LORA"}).said == {}


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"num_cayley_neumann_terms": 0}, "from 1 to 64"),
        ({"num_cayley_neumann_terms": 10**9}, "from 1 to 64"),
        ({"num_cayley_neumann_terms": 2.5}, "from 1 to 64"),
        ({"num_cayley_neumann_terms": "5"}, "must be a number"),
        ({"coft": True, "eps": -1.0}, "not negative"),
        ({"coft": True, "eps": None}, "must be a number"),
    ],
)
def test_settings_that_cannot_be_meant(tmp_path, said, told):
    with pytest.raises(MalformedFile, match=told):
        module_of(tmp_path, {"peft_type": "OFT"} | said)


QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
TENSOR = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"


@pytest.fixture
def folder(tmp_path):
    """A small model, and a file of PEFT's that turns one layer of it."""
    model = checkpoint("sd1")
    models.write(tmp_path / "model.safetensors", model)
    torch.manual_seed(0)
    columns = model[TENSOR].shape[1]
    numbers = torch.randn(columns // 4, 6) / 4
    models.write(tmp_path / "adapter_model.safetensors", {f"base_model.model.unet.{QUERY}.oft_R.weight": numbers})
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "OFT", "use_cayley_neumann": False}))
    return tmp_path


def test_a_file_in_a_model(folder):
    out = folder / "out.safetensors"
    lora = mk.open(folder / "adapter_model.safetensors")
    mk.save(
        mk.ops.inject_lora(mk.open(folder / "model.safetensors"), [{"lora": lora, "strength": 0.5}]), out, dtype="keep"
    )
    before, after = models.read(folder / "model.safetensors"), models.read(out)
    assert [name for name in before if not torch.equal(before[name], after[name])] == [TENSOR]
    numbers = models.read(folder / "adapter_model.safetensors")[f"base_model.model.unet.{QUERY}.oft_R.weight"]
    parts = {"oft_R": numbers, "cayley_terms": torch.tensor(0.0)}
    assert torch.equal(after[TENSOR], apply(before[TENSOR].float(), parts, 0.5).to(after[TENSOR].dtype))


def test_without_settings_it_is_refused_before_anything_is_written(folder):
    (folder / "adapter_config.json").unlink()
    node = mk.ops.inject_lora(
        mk.open(folder / "model.safetensors"), [{"lora": mk.open(folder / "adapter_model.safetensors")}]
    )
    with pytest.raises(MalformedFile, match="Which way PEFT's OFT turns") as error:
        mk.save(node, folder / "out.safetensors")
    assert "adapter_config.json" in error.value.hint
    assert QUERY in error.value.key


@pytest.mark.parametrize("operation", ["rename_lora", "resize_lora"])
def test_it_has_no_names_elsewhere(folder, operation):
    node = getattr(mk.ops, operation)(mk.open(folder / "adapter_model.safetensors"))
    with pytest.raises(WrongFormat, match="no other trainer has names for it"):
        mk.save(node, folder / "out.safetensors")
