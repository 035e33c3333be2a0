"""Balanced attention: the model computes what it did, and each head's two sides are alike."""

from __future__ import annotations

import models
import numpy as np
import pytest
import torch
from oracle_balance import One
from test_methods_rebasin import layout

import mergekit_sd as mk
from mergekit_sd import architectures
from mergekit_sd.operations import OPERATIONS
from mergekit_sd.operations.balance import find_turns
from mergekit_sd.operations.types import Key

QUERY = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_q.weight"


def balanced(model, keys):
    survey = find_turns(One(keys, model))
    operation = OPERATIONS["balance_attention"]
    return {name: operation.function(model[name], key=keys[name], survey=survey) for name in keys}


def heads(matrix, count):
    return matrix.double().reshape(count, -1, matrix.shape[1])


def sides(model, start, fused, count):
    """Query, key, value and output of one attention, one matrix for each head."""
    if fused:
        q, k, v = torch.cat([model[f"{start}in_proj_weight"], model[f"{start}in_proj_bias"][:, None]], 1).chunk(3)
        out = model[f"{start}out_proj.weight"]
    else:
        q, k, v = (model[f"{start}to_{each}.weight"] for each in "qkv")
        out = model[f"{start}to_out.0.weight"]
    return [heads(each, count) for each in (q, k, v, out.T)]


@pytest.mark.parametrize(
    ("family", "start", "count"),
    [
        ("sd1", "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.", 8),
        ("sd2", "cond_stage_model.model.transformer.resblocks.0.attn.", 4),
        ("sdxl", "model.diffusion_model.output_blocks.3.1.transformer_blocks.0.attn1.", 5),
    ],
)
def test_heads_compute_the_same_and_share_alike(family, start, count):
    keys, shapes = layout(family, width=2, text=4, deep=1)
    random = torch.Generator().manual_seed(3)
    model = {name: torch.randn(shape, generator=random) * 0.1 for name, shape in shapes.items()}
    fused = "resblocks" in start
    before, after = (sides(each, start, fused, count) for each in (model, balanced(model, keys)))
    for one, other in ((0, 1), (2, 3)):
        if fused and one == 2:  # the bias is the value's alone: the output is not multiplied with it
            continue
        scores = [side[one].mT @ side[other] for side in (before, after)]
        torch.testing.assert_close(scores[1], scores[0], rtol=0, atol=3e-6 * float(scores[0].abs().max()))
        assert not torch.equal(before[one], after[one])
        first, second = (after[each] @ after[each].mT for each in (one, other))
        torch.testing.assert_close(first, second, rtol=0, atol=1e-4 * float(first.abs().max()))


def test_what_is_no_attention_stays_bit_for_bit():
    keys, shapes = layout("sd1", width=4, text=4, deep=1)
    model = {name: torch.randn(shape) for name, shape in shapes.items()}
    after = balanced(model, keys)
    for name in keys:
        touched = any(part in name for part in (".attn1.to_", ".attn2.to_", "self_attn.")) and not name.endswith(
            ("to_out.0.bias", "out_proj.bias")
        )
        assert torch.equal(after[name], model[name]) != touched, name


def test_a_head_of_zeros_stays_finite():
    keys, shapes = layout("sd1", width=4, text=4, deep=1)
    model = {name: torch.zeros(shape) for name, shape in shapes.items()}
    assert all(np.isfinite(tensor.numpy()).all() for tensor in balanced(model, keys).values())


def test_a_recipe_balances_a_whole_model(tmp_path):
    keys, shapes = layout("sd1", width=20, text=12, deep=1)
    random = torch.Generator().manual_seed(3)
    model = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    models.write(tmp_path / "a.safetensors", model)
    output = {"model": "m", "file": "out.safetensors", "dtype": "fp32"}
    step = {"op": "balance_attention", "a": "a"}
    where = models.recipe(tmp_path, {"a": "a.safetensors"}, {"m": step}, {"out": output})
    mk.run(where)
    made = models.read(tmp_path / "out.safetensors")
    architecture = architectures.get("sd1")
    bare = {
        name: Key(name.removeprefix(architecture.components[key.component]), "sd1", key.component, key.block)
        for name, key in keys.items()
    }
    for name, tensor in balanced(model, bare).items():
        assert torch.equal(made[name], tensor), name
    assert not torch.equal(made[QUERY], model[QUERY])
