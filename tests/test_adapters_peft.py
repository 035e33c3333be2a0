"""The formulas against PEFT, on adapters that it makes and merges; and where its methods are other ones."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from mergekit_sd.adapters.algorithms import apply

peft = pytest.importorskip("peft")

IN, OUT, RANK, ALPHA = 12, 8, 4, 3.0
_NAMES = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
_MAGNITUDE = "lora_magnitude_vector"


class Layers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(IN, OUT)
        self.small = torch.nn.Conv2d(IN, OUT, 1)
        self.conv = torch.nn.Conv2d(IN, OUT, 3)


def merged(config, *layers):
    """For each layer: its weight, its parts with random numbers in them, and what PEFT makes of the weight."""
    torch.manual_seed(0)
    base = Layers()
    before = {name: getattr(base, name).weight.detach().clone() for name in layers}
    config.target_modules = set(layers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, and its libraries'
        model = peft.get_peft_model(base, config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.uniform_(parameter, 0.2, 1.0)
        state = {name.partition(".model.")[2]: each for name, each in peft.get_peft_model_state_dict(model).items()}
        after = model.merge_and_unload()
    for name in layers:
        parts = {key.removeprefix(name + "."): part.clone() for key, part in state.items() if key.startswith(name)}
        yield before[name], parts, getattr(after, name).weight.detach()


def agrees(found, expected):
    assert float((found - expected).norm() / expected.norm()) <= 1e-5


def renamed(parts, scale):
    return {"scale": torch.tensor(scale), **{_NAMES.get(name, name): part for name, part in parts.items()}}


@pytest.mark.parametrize("stabilised", [False, True])
def test_lora_and_rank_stabilised_lora(stabilised):
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, use_rslora=stabilised)
    scale = ALPHA / (math.sqrt(RANK) if stabilised else RANK)
    for weight, parts, expected in merged(config, "linear", "small", "conv"):
        agrees(apply(weight, renamed(parts, scale), 1.0), expected)


def test_dora():
    for weight, parts, expected in merged(peft.LoraConfig(r=RANK, lora_alpha=ALPHA, use_dora=True), "linear"):
        parts["dora_scale"] = parts.pop(_MAGNITUDE)
        assert parts["dora_scale"].shape == (OUT,)
        agrees(apply(weight, renamed(parts, ALPHA / RANK), 1.0), expected)


def test_dora_of_convolutions_has_rows_where_lycoris_has_columns():
    """PEFT writes the rows' lengths as (1, out, 1, 1), which means columns with LyCORIS: who reads flattens them."""
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, use_dora=True)
    for weight, parts, expected in merged(config, "small", "conv"):
        magnitude = parts.pop(_MAGNITUDE)
        assert magnitude.shape == (1, OUT, 1, 1)
        parts["dora_scale"] = magnitude.flatten()
        agrees(apply(weight, renamed(parts, ALPHA / RANK), 1.0), expected)


@pytest.mark.parametrize("tucker", [False, True])
def test_loha(tucker):
    config = peft.LoHaConfig(r=RANK, alpha=ALPHA, use_effective_conv2d=tucker)
    for weight, parts, expected in merged(config, "linear", "small", "conv"):
        agrees(apply(weight, renamed(parts, ALPHA / RANK), 1.0), expected)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("tucker", [False, True])
def test_lokr(tucker, both):
    config = peft.LoKrConfig(r=1, alpha=ALPHA, use_effective_conv2d=tucker, decompose_both=both)
    for weight, parts, expected in merged(config, "linear", "small", "conv"):
        agrees(apply(weight, renamed(parts, ALPHA), 1.0), expected)


def test_lokr_of_whole_factors_is_scaled_by_peft_and_not_by_lycoris():
    """Both are right about their own files: PEFT's alpha is in its settings, LyCORIS' in the file means nothing.

    So alpha is ignored, and who knows PEFT's settings gives `scale`, which is not.
    """
    config = peft.LoKrConfig(r=64, alpha=ALPHA)
    for weight, parts, expected in merged(config, "linear"):
        assert parts.keys() == {"lokr_w1", "lokr_w2"}
        agrees(apply(weight, renamed(parts, ALPHA / 64), 1.0), expected)
        alpha = {**parts, "alpha": torch.tensor(ALPHA)}
        agrees(apply(weight, alpha, 1.0), weight + torch.kron(parts["lokr_w1"], parts["lokr_w2"]))


@pytest.mark.parametrize("on_input", [False, True])
def test_ia3_is_one_where_lycoris_is_zero(on_input):
    """PEFT multiplies by w, LyCORIS by 1 + w: the same, with other numbers (and other names) in the file."""
    layers = ("linear", "conv")
    config = peft.IA3Config(target_modules=set(layers), feedforward_modules=set(layers) if on_input else set())
    for weight, parts, expected in merged(config, *layers):
        ours = {"weight": parts["ia3_l"] - 1.0, "on_input": torch.tensor(on_input)}
        agrees(apply(weight, ours, 1.0), expected)


def test_oft_of_peft_rotates_inputs():
    """Another method under one name: PEFT rotates the inputs, kohya and LyCORIS the outputs; its files name it else."""
    config = peft.OFTConfig(oft_block_size=4, use_cayley_neumann=False)
    for weight, parts, expected in merged(config, "linear"):
        ((name, vectors),) = parts.items()
        assert name == "oft_R.weight"
        blocks = torch.zeros(len(vectors), 4, 4)
        blocks[:, *torch.triu_indices(4, 4, 1)] = vectors
        assert not torch.allclose(expected, weight, atol=1e-3)
        agrees(apply(weight.T, {"oft_blocks": blocks}, 1.0).T, expected)


def test_boft_of_peft_rotates_inputs_too():
    """With one factor it is OFT of the inputs, with half of Q."""
    config = peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=1)
    for weight, parts, expected in merged(config, "linear"):
        (blocks,) = parts["boft_R"] / 2.0
        agrees(apply(weight.T, {"oft_blocks": blocks}, 1.0).T * parts["boft_s"], expected)
