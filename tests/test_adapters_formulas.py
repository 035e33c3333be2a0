"""What LoRA-family modules make of a weight: against formulas in float64, and by the laws that they keep."""

from __future__ import annotations

import math

import adapter_formulas as oracle
import numpy as np
import pytest
import torch
from adapter_formulas import ADDITIVE, CHANGING, MAGNITUDES, SIZES, STRENGTHS, Sizes
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mergekit_sd.adapters.algorithms import apply, apply_bias, check, delta_of, identify, rank_of, to_full

DECOMPOSED = tuple(name for name in ADDITIVE if name not in ("full", "norm"))
ALPHAS = st.sampled_from((None, 0.0, 1.0, 3.0, 0.25))


def tensors(parts, dtype=torch.float32):
    return {name: torch.as_tensor(part).to(dtype) for name, part in parts.items()}


def distance(found, expected, *sizes):
    """How far apart they are, as a share of what is expected, or of the largest of `sizes`."""
    size = max(np.linalg.norm(each) for each in (expected, *sizes))
    return float(np.linalg.norm(found.double().numpy() - expected) / size)


def agrees(weight, parts, strength):
    expected = oracle.change(parts, weight, strength)
    for dtype, most in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        found = apply(torch.as_tensor(weight).to(dtype), tensors(parts, dtype), strength)
        assert found.dtype == dtype
        assert distance(found, expected, weight) <= most


# --- against the formulas -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ADDITIVE + CHANGING)
@given(SIZES, st.sampled_from(STRENGTHS), ALPHAS)
@settings(max_examples=25)
def test_formula(name, sizes, strength, alpha):
    if name == "GLoRA old":
        assume(sizes.shape(name)[:2] != (sizes.rank, sizes.rank))  # as good as new, by all shapes
    agrees(*oracle.module(name, sizes, alpha), strength)


@pytest.mark.parametrize("kind", MAGNITUDES)
@pytest.mark.parametrize("name", DECOMPOSED)
@given(SIZES, st.sampled_from(STRENGTHS), ALPHAS)
@settings(max_examples=10)
def test_dora(name, kind, sizes, strength, alpha):
    weight, parts = oracle.module(name, sizes, alpha)
    parts["dora_scale"] = oracle.magnitude(kind, weight.shape, sizes.seed)
    agrees(weight, parts, strength)


@pytest.mark.parametrize("name", ADDITIVE)
@given(SIZES, ALPHAS)
@settings(max_examples=10)
def test_delta(name, sizes, alpha):
    weight, parts = oracle.module(name, sizes, alpha)
    found = delta_of(tensors(parts), weight.shape)
    assert found.shape == weight.shape
    assert distance(found, oracle.change(parts, np.zeros_like(weight), 1.0)) <= 1e-5


# --- laws -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ADDITIVE + CHANGING)
def test_strength_zero_changes_no_bit_and_no_strength_changes_the_operands(name):
    weight, parts = oracle.module(name, Sizes(kernel=(3, 3)), alpha=1.0)
    weight, parts = torch.as_tensor(weight), tensors(parts)
    before = weight.clone(), {part: each.clone() for part, each in parts.items()}
    assert torch.equal(apply(weight, parts, 0.0), weight)
    assert apply(weight, parts, 0.0).data_ptr() != weight.data_ptr()
    apply(weight, parts, 0.5).zero_()
    if identify(parts).additive:
        delta_of(parts, tuple(weight.shape)).zero_()
        to_full(parts, tuple(weight.shape))["diff"].zero_()
    assert torch.equal(weight, before[0])
    assert all(torch.equal(each, before[1][part]) for part, each in parts.items())


@pytest.mark.parametrize("name", ADDITIVE + CHANGING)
def test_a_row_block_of_a_fused_tensor_is_a_weight_of_its_own(name):
    weight, parts = oracle.module(name, Sizes())
    rows = len(weight)
    fused = torch.as_tensor(np.concatenate([weight + 1, weight, weight + 2]))
    found = apply(fused[rows : 2 * rows], tensors(parts), 0.5)
    assert distance(found, oracle.change(parts, weight, 0.5)) <= 1e-5
    assert torch.equal(apply(torch.as_tensor(weight).T.contiguous().T, tensors(parts), 0.5), found)


@pytest.mark.parametrize("name", ADDITIVE + CHANGING)
def test_strides_mean_nothing(name):
    weight, parts = oracle.module(name, Sizes(kernel=(3, 3)))
    turned = {part: each.mT.contiguous().mT if each.ndim > 1 else each for part, each in tensors(parts).items()}
    strided = torch.as_tensor(weight).transpose(0, 1).contiguous().transpose(0, 1)
    assert distance(apply(strided, turned, 0.5), oracle.change(parts, weight, 0.5)) <= 1e-5


def test_at_strength_zero_even_infinity_changes_nothing():
    parts = {"diff": torch.full((2, 2), math.inf)}
    assert torch.equal(apply(torch.ones(2, 2), parts, 0.0), torch.ones(2, 2))


@pytest.mark.parametrize("name", ADDITIVE)
def test_additive_algorithms_are_undone_by_the_negative_strength(name):
    weight, parts = oracle.module(name, Sizes(), alpha=1.0)
    assert identify(parts).additive
    there = apply(torch.as_tensor(weight), tensors(parts), 0.7)
    assert distance(there, weight) > 1e-3
    assert distance(apply(there, tensors(parts), -0.7), weight) <= 1e-6


@pytest.mark.parametrize("name", [*CHANGING, "DoRA"])
def test_others_are_not_undone_by_the_negative_strength(name):
    weight, parts = oracle.module("LoRA" if name == "DoRA" else name, Sizes())
    if name == "DoRA":
        parts["dora_scale"] = oracle.magnitude("rows", weight.shape, 0)
    assert not identify(parts).additive
    there = apply(torch.as_tensor(weight), tensors(parts), 0.7)
    assert distance(apply(there, tensors(parts), -0.7), weight) > 1e-3


@pytest.mark.parametrize(("of_lora", "of_weight"), [((1, 1), ()), ((), (1, 1))])
@pytest.mark.parametrize("name", ADDITIVE + CHANGING)
def test_parts_for_a_convolution_fit_a_linear_layer_and_the_reverse(name, of_lora, of_weight):
    _, parts = oracle.module(name, Sizes(kernel=of_lora))
    weight, _ = oracle.module(name, Sizes(kernel=of_weight))
    found = apply(torch.as_tensor(weight), tensors(parts), 1.0)
    assert found.shape == weight.shape
    assert distance(found, oracle.change(parts, weight, 1.0)) <= 1e-5


def test_a_flattened_kernel_is_a_kernel():
    weight, parts = oracle.module("LoRA", Sizes(kernel=(3, 3)))
    flat = {name: part.reshape(len(part), -1) for name, part in parts.items()}
    assert torch.equal(
        apply(torch.as_tensor(weight), tensors(flat), 1.0), apply(torch.as_tensor(weight), tensors(parts), 1.0)
    )


# --- alpha ----------------------------------------------------------------------------------------------


def lora(**more):
    weight, parts = oracle.module("LoRA", Sizes(rank=4))
    parts.pop("alpha", None)
    plain = delta_of(tensors(parts), weight.shape)
    return delta_of({**tensors(parts), **more}, weight.shape), plain


@pytest.mark.parametrize("alpha", [torch.tensor(2), torch.tensor([2]), torch.tensor(2.0), torch.tensor([[2.0]])])
def test_alpha_is_one_number_of_any_form(alpha):
    found, plain = lora(alpha=alpha)
    torch.testing.assert_close(found, plain * 0.5)


def test_no_alpha_and_alpha_zero_both_stand_for_the_rank():
    found, plain = lora(alpha=torch.tensor(0.0))
    assert torch.equal(found, plain)
    assert torch.equal(lora(alpha=torch.tensor(4.0))[0], plain)


def test_a_scale_of_its_own_overrides_alpha_over_rank():
    found, plain = lora(alpha=torch.tensor(1.0), scale=torch.tensor(3.0))
    torch.testing.assert_close(found, plain * 3.0)
    assert torch.equal(lora(scale=torch.tensor(0.0))[0], plain * 0.0)


def test_a_rank_stabilised_lora_comes_with_its_scale():
    found, plain = lora(scale=torch.tensor(8.0 / math.sqrt(4)))
    torch.testing.assert_close(found, plain * 4.0)


def test_lokr_of_two_whole_factors_has_no_rank_and_ignores_alpha():
    weight, parts = oracle.module("LoKr whole", Sizes(), alpha=100000.0)
    assert rank_of(parts) is None
    del parts["alpha"]
    plain = delta_of(tensors(parts), weight.shape)
    assert torch.equal(delta_of({**tensors(parts), "alpha": torch.tensor(1e5)}, weight.shape), plain)
    torch.testing.assert_close(delta_of({**tensors(parts), "scale": torch.tensor(2.0)}, weight.shape), plain * 2)


def test_the_rank_of_lokr_is_that_of_its_large_factor():
    _, parts = oracle.module("LoKr both", Sizes(rank=2), alpha=1.0)
    parts["lokr_w1_a"], parts["lokr_w1_b"] = parts["lokr_w1_a"][:, :1], parts["lokr_w1_b"][:1]
    assert rank_of(parts) == 2
    alone = {name: part for name, part in tensors(parts).items() if name != "alpha"}
    torch.testing.assert_close(delta_of(tensors(parts), (8, 6)), delta_of(alone, (8, 6)) / 2)


@pytest.mark.parametrize("name", ["full", "norm"])
def test_whole_differences_have_no_alpha(name):
    weight, parts = oracle.module(name, Sizes(), alpha=0.5)
    assert torch.equal(apply(torch.zeros(weight.shape), tensors(parts), 1.0), delta_of(tensors(parts), weight.shape))
    assert distance(delta_of(tensors(parts), weight.shape), next(iter(parts.values()))) == 0.0


@pytest.mark.parametrize(
    ("name", "rank"),
    [
        *((name, 3) for name in (*DECOMPOSED, "GLoRA", "GLoRA old", "GLoRA Tucker") if name != "LoKr whole"),
        *((name, None) for name in ("LoKr whole", "IA3", "OFT", "BOFT", "full", "norm")),
    ],
)
def test_rank(name, rank):
    assert rank_of(oracle.module(name, Sizes(rank=3))[1]) == rank


# --- OFT ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["OFT", "BOFT"])
def test_zero_blocks_leave_the_weight(name):
    weight, parts = oracle.module(name, Sizes(kernel=(3, 3)))
    parts = {"oft_blocks": torch.zeros(parts["oft_blocks"].shape)}
    assert torch.equal(apply(torch.as_tensor(weight), parts, 1.0), torch.as_tensor(weight))


@pytest.mark.parametrize("name", ["OFT", "BOFT"])
@given(SIZES)
@settings(max_examples=15)
def test_without_a_limit_rotations_keep_all_inner_products_of_columns(name, sizes):
    weight, parts = oracle.module(name, sizes, alpha=0.0)
    parts.pop("rescale", None)
    before = torch.as_tensor(weight, dtype=torch.float64).flatten(1)
    after = apply(torch.as_tensor(weight, dtype=torch.float64), tensors(parts, torch.float64), 1.0).flatten(1)
    torch.testing.assert_close(after.T @ after, before.T @ before, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("threads", [1, 2])
def test_large_blocks_on_several_threads(threads):
    """The LU of a batch of such blocks fails in MKL on two threads (torch 2.13)."""
    blocks = torch.randn(4, 160, 160, generator=torch.Generator().manual_seed(0)) * 1e-3
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        turned = apply(torch.eye(640), {"oft_blocks": blocks}, 1.0)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(turned @ turned.T, torch.eye(640))


def test_alpha_limits_how_far_oft_turns():
    weight, parts = oracle.module("OFT", Sizes(), alpha=1e-4)
    moved = apply(torch.as_tensor(weight), tensors(parts), 1.0)
    assert 0.0 < distance(moved, weight) <= 3e-4 * len(weight)


def test_alpha_zero_lets_nothing_turn_in_kohyas_oft():
    weight, parts = oracle.module("OFT", Sizes(), alpha=0.0)
    weight, parts = torch.as_tensor(weight), tensors(parts)
    assert torch.equal(apply(weight, parts, 1.0, kohya_oft=True), weight)
    assert not torch.equal(apply(weight, parts, 1.0), weight)
    parts["alpha"] = torch.tensor(1e-3)
    assert torch.equal(apply(weight, parts, 1.0, kohya_oft=True), apply(weight, parts, 1.0))
    assert not torch.equal(apply(weight, parts, 1.0), weight)


def test_a_butterfly_reaches_every_row():
    """Two stages of blocks of two turn four rows by one another: W = I shows who comes from where."""
    parts = {"oft_blocks": torch.tensor([[0.0, 1.0], [0.0, 0.0]]).expand(2, 2, 2, 2)}
    assert (apply(torch.eye(4), parts, 1.0).abs() > 0.0).sum() == 4  # turns of 90° only permute
    parts = {"oft_blocks": 0.5 * torch.tensor([[0.0, 1.0], [0.0, 0.0]]).expand(2, 2, 2, 2)}
    assert (apply(torch.eye(4), parts, 1.0).abs() > 0.1).all()


# --- DoRA -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", oracle.KERNELS)
def test_dora_gives_rows_or_columns_their_lengths(kernel):
    weight, parts = oracle.module("LoRA", Sizes(kernel=kernel))
    weight = torch.as_tensor(weight)
    for kind, others in (("rows", (1, *range(2, weight.ndim))), ("columns", (0, *range(2, weight.ndim)))):
        lengths = torch.as_tensor(oracle.magnitude(kind, weight.shape, 0))
        moved = apply(weight, {**tensors(parts), "dora_scale": lengths}, 1.0)
        torch.testing.assert_close(torch.linalg.vector_norm(moved, dim=others), lengths.flatten())


def test_dora_on_a_square_weight_is_by_rows_unless_the_shape_says_columns():
    weight, lengths = torch.eye(2), torch.tensor([2.0, 3.0])
    parts = {"lora_down.weight": torch.zeros(1, 2), "lora_up.weight": torch.zeros(2, 1)}
    weight[0, 1] = 1.0
    by_rows = torch.tensor([[2 / math.sqrt(2), 2 / math.sqrt(2)], [0.0, 3.0]])
    by_columns = torch.tensor([[2.0, 3 / math.sqrt(2)], [0.0, 3 / math.sqrt(2)]])
    for shape, expected in (((2,), by_rows), ((2, 1), by_rows), ((1, 2), by_columns)):
        torch.testing.assert_close(apply(weight, {**parts, "dora_scale": lengths.reshape(shape)}, 1.0), expected)


def test_dora_leaves_a_row_of_zeros():
    weight = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    parts = {"lora_down.weight": torch.zeros(1, 2), "lora_up.weight": torch.zeros(2, 1)}
    found = apply(weight, {**parts, "dora_scale": torch.tensor([1.0, 1.0])}, 1.0)
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.0], [0.6, 0.8]]))


# --- biases, whole differences --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["diff_b", "b_norm"])
def test_a_bias_has_a_difference_of_its_own(name):
    bias, parts = torch.tensor([1.0, 2.0]), {name: torch.tensor([0.5, -1.0]), "alpha": torch.tensor(7.0)}
    torch.testing.assert_close(apply_bias(bias, parts, -2.0), torch.tensor([0.0, 4.0]))
    assert torch.equal(bias, torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("name", ADDITIVE + CHANGING)
def test_parts_of_a_bias_may_stand_beside_any_others(name):
    weight, parts = oracle.module(name, Sizes())
    weight, parts = torch.as_tensor(weight), tensors(parts)
    beside = {**parts, "diff_b": torch.ones(len(weight))}
    assert torch.equal(apply(weight, beside, 0.5), apply(weight, parts, 0.5))
    torch.testing.assert_close(apply_bias(torch.zeros(len(weight)), beside, 0.5), torch.full((len(weight),), 0.5))


def test_a_module_as_a_whole_difference_does_the_same():
    weight, parts = oracle.module("LoHa", Sizes(kernel=(3, 3)), alpha=1.0)
    weight, parts = torch.as_tensor(weight), {**tensors(parts), "diff_b": torch.ones(len(weight))}
    full = to_full(parts, tuple(weight.shape))
    assert full.keys() == {"diff", "diff_b"}
    assert torch.equal(apply(weight, full, 0.5), apply(weight, parts, 0.5))
    assert torch.equal(full["diff_b"], parts["diff_b"])


def test_a_norms_weight_is_a_vector():
    found = apply(torch.ones(3), {"w_norm": torch.tensor([1.0, 0.0, -1.0])}, 0.5)
    torch.testing.assert_close(found, torch.tensor([1.5, 1.0, 0.5]))


def test_shapes_are_checked_by_headers_alone():
    weight, parts = oracle.module("GLoRA", Sizes(kernel=(3, 3)))
    check(parts, weight.shape)  # numpy arrays: no tensor is looked into
