"""The formulas against LyCORIS, which trains most of these files; and where it is not followed, why."""

from __future__ import annotations

import adapter_formulas as oracle
import numpy as np
import pytest
import torch
from adapter_formulas import ADDITIVE, KERNELS, STRENGTHS, Sizes

from mergekit_sd.adapters.algorithms import apply, delta_of

functional = pytest.importorskip("lycoris.functional")

SIZES = Sizes(a=4, b=5, c=8, d=6, rank=3, stages=3)
ALPHA = 1.5


def module(name, kernel, alpha=ALPHA):
    sizes = Sizes(SIZES.a, SIZES.b, SIZES.c, SIZES.d, SIZES.rank, SIZES.stages, kernel, seed=7)
    weight, parts = oracle.module(name, sizes, alpha, signed=True)
    return torch.as_tensor(weight), {part: torch.as_tensor(each) for part, each in parts.items()}


def agrees(found, expected):
    assert found.shape == expected.shape
    assert float((found - expected).norm() / expected.norm()) <= 1e-5


def of_lycoris(parts, weight, strength=1.0):
    """What LyCORIS adds to a weight: its functional form, with its orders of arguments."""
    get = parts.get
    alpha = float(parts["alpha"])
    if "lora_up.weight" in parts:
        down, up = parts["lora_down.weight"], parts["lora_up.weight"]
        return functional.locon.diff_weight(down, up, get("lora_mid.weight"), gamma=alpha / len(down))
    if "hada_w1_a" in parts:
        factors = (parts[f"hada_w{i}_{side}"] for i in (1, 2) for side in "ba")
        gamma = torch.tensor(alpha / len(parts["hada_w1_b"]))
        return functional.loha.diff_weight(*factors, get("hada_t1"), get("hada_t2"), gamma=gamma)
    if any(name.startswith("lokr") for name in parts):
        factors = (get(f"lokr_{each}") for each in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"))
        rank = SIZES.rank
        width = SIZES.c if "lokr_t2" in parts else rank  # by which it divides: see below
        return functional.lokr.diff_weight(*factors, gamma=alpha * width / rank)
    if parts["oft_blocks"].ndim == 3:
        added = functional.diag_oft.diff_weight(
            weight, parts["oft_blocks"], get("rescale"), constraint=alpha * len(weight)
        )
        return strength * added
    blocks, rescale = parts["oft_blocks"], get("rescale")
    return functional.boft.diff_weight(weight, blocks, rescale, constraint=alpha * len(weight), scale=strength)


LORAS = tuple(name for name in ADDITIVE if name not in ("full", "norm"))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", LORAS)
def test_deltas(name, kernel):
    weight, parts = module(name, kernel)
    expected = of_lycoris(parts, weight).reshape(weight.shape)
    agrees(delta_of(parts, tuple(weight.shape)), expected)
    for strength in STRENGTHS:
        agrees(apply(weight, parts, strength), weight + strength * expected)


@pytest.mark.parametrize("alpha", [0.0, 0.01, 100.0])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["OFT", "BOFT"])
def test_rotations(name, kernel, alpha):
    weight, parts = module(name, kernel, alpha)
    parts.pop("rescale", None)
    for strength in STRENGTHS:
        agrees(apply(weight, parts, strength), weight + of_lycoris(parts, weight, strength))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["OFT rescaled", "BOFT"])
def test_rotations_rescaled(name, kernel):
    weight, parts = module(name, kernel)
    agrees(apply(weight, parts, 1.0), weight + of_lycoris(parts, weight))


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["LoRA", "LoHa", "LoKr"])
def test_dora(name, kernel, by_rows):
    weight, parts = module(name, kernel)
    lengths = torch.as_tensor(oracle.magnitude("rows" if by_rows else "columns", weight.shape, 0))
    moved = weight + of_lycoris(parts, weight).reshape(weight.shape)
    expected = functional.weight_decompose(moved, lengths, 1, by_rows)
    agrees(apply(weight, {**parts, "dora_scale": lengths}, 1.0), expected)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["IA3", "IA3 on input", "GLoRA", "GLoRA Tucker"])  # it reads no old GLoRA
def test_ia3_and_glora(name, kernel):
    from lycoris.modules.glora import _glora_weight
    from lycoris.modules.ia3 import _ia3_weight

    weight, parts = module(name, kernel)
    for strength in STRENGTHS:
        if "on_input" in parts:
            expected = _ia3_weight(weight, parts["weight"], bool(parts["on_input"]), strength, False)
        else:
            factors = (parts[f"{each}.weight"] for each in ("a1", "a2", "b1", "b2"))
            added = _glora_weight(weight, *factors, parts.get("bm.weight"), ALPHA / SIZES.rank)
            expected = weight + strength * added.reshape(weight.shape)
        agrees(apply(weight, parts, strength), expected)


# --- where LyCORIS is not followed ----------------------------------------------------------------------


def test_lycoris_rescales_all_the_way_at_any_strength_and_we_do_not():
    """At strength 0 its BOFT still multiplies the rows by `rescale`. No change at strength 0 is right."""
    weight, parts = module("BOFT", ())
    agrees(weight + of_lycoris(parts, weight, 0.0), weight * parts["rescale"])
    assert torch.equal(apply(weight, parts, 0.0), weight)


def test_lycoris_multiplies_its_loha_by_the_scale_twice_when_it_merges_and_we_do_not():
    """Its training's forward pass and its functional form scale once: these are right, its `get_diff_weight` not."""
    from lycoris.modules.loha import LohaModule

    layer = LohaModule("x", torch.nn.Linear(30, 32, bias=False), lora_dim=4, alpha=1)
    torch.nn.init.normal_(layer.hada_w2_a)
    torch.nn.init.normal_(layer.hada_w1_a)
    parts = {name: value.detach() for name, value in layer.state_dict().items() if name.startswith(("hada", "alpha"))}
    once = delta_of(parts, (32, 30))
    x = torch.eye(30)
    with torch.no_grad():
        agrees(layer.bypass_forward_diff(x).T, once)
        assert float((layer.get_diff_weight()[0] - once).norm() / once.norm()) > 0.1


def test_lycoris_divides_alpha_by_a_width_in_its_tucker_lokr_and_we_do_not():
    """Its functional form takes w2_a's columns for the rank; here these are outputs. Its training takes the rank."""
    from lycoris.modules.lokr import LokrModule

    conv = torch.nn.Conv2d(16, 32, 3, bias=False)
    layer = LokrModule("x", conv, lora_dim=2, alpha=1, factor=4, use_tucker=True)
    torch.nn.init.normal_(layer.lokr_w2_b)
    parts = {name: value.detach() for name, value in layer.state_dict().items() if name.startswith(("lokr", "alpha"))}
    assert parts["lokr_w2_a"].shape == (2, 8)
    ours = delta_of(parts, (32, 16, 3, 3))
    pair = (None, None, None, parts["lokr_w2_a"], parts["lokr_w2_b"], parts["lokr_t2"])
    with torch.no_grad():
        agrees(layer.scale * functional.lokr.diff_weight(parts["lokr_w1"], *pair, gamma=8.0), ours)
        agrees(functional.lokr.diff_weight(parts["lokr_w1"], *pair, gamma=1.0), ours / 4)


def test_lycoris_takes_dora_at_half_strength_from_the_whole_sum():
    """Its V is W + ΔW at any strength, and V·(1 + k·(m/‖V‖ − 1)) of it is V itself at strength 0: not W.

    AUTOMATIC1111 and ComfyUI give W + k·(W₁ − W), which is W at strength 0; so do we. At strength 1 all agree.
    """
    weight, parts = module("LoRA", ())
    lengths = torch.as_tensor(oracle.magnitude("rows", weight.shape, 0))
    moved = weight + of_lycoris(parts, weight)
    agrees(functional.weight_decompose(moved, lengths, 0.0, True), moved)
    whole = functional.weight_decompose(moved, lengths, 1, True)
    agrees(apply(weight, {**parts, "dora_scale": lengths}, 0.5), weight + 0.5 * (whole - weight))


def test_lycoris_too_ignores_alpha_of_lokr_with_whole_factors():
    weight, parts = module("LoKr whole", (), alpha=100000.0)
    expected = np.kron(parts["lokr_w1"].numpy(), parts["lokr_w2"].numpy())
    agrees(apply(torch.zeros_like(weight), parts, 1.0), torch.as_tensor(expected))
