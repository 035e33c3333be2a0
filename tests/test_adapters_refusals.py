"""Modules that are broken, unknown or for another weight: each refusal says which part, and what it should be."""

from __future__ import annotations

import contextlib

import adapter_formulas as oracle
import pytest
import torch
from adapter_formulas import ADDITIVE, CHANGING, KERNELS, Sizes
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_sd.adapters.algorithms import apply, apply_bias, check, check_bias, delta_of, identify, rank_of, to_full
from mergekit_sd.adapters.styles import PARTS
from mergekit_sd.errors import InputError, MalformedFile, ShapeMismatch, UsageError, WrongFormat

OUT, IN, RANK = 8, 6, 2  # of a weight of Sizes()
NAN, INF = float("nan"), float("inf")


def module(name, kernel=(), **changes):
    """A weight and a module with parts replaced; a shape stands for zeros of it, None for no part."""
    weight, parts = oracle.module(name, Sizes(kernel=kernel))
    made = {part: torch.as_tensor(each) for part, each in parts.items()}
    for part, value in changes.items():
        part = next((known for known in (*PARTS, "weight", "on_input") if known.replace(".", "_") == part), part)
        made.pop(part, None)
        if isinstance(value, tuple):
            made[part] = torch.zeros(value)
        elif value is not None:
            made[part] = torch.as_tensor(value)
    return torch.as_tensor(weight), made


ONE_LINE = 110  # characters
BROKEN_SHAPES = {
    "a rank that differs": ("LoRA", (), {"lora_up_weight": (OUT, 3)}, '"lora_up.weight" is 8×3; expected: 8×2'),
    "transposed factors": ("LoRA", (), {"lora_down_weight": (IN, RANK)}, '"lora_down.weight" is 6×2; expected: 6×6'),
    "factors exchanged": ("LoRA", (), {"lora_down_weight": (OUT, 2), "lora_up_weight": (2, IN)}, "lora_down.weight"),
    "another width": ("LoRA", (), {"lora_down_weight": (RANK, 1024)}, "2×1024; expected: 2×6, for a weight of 8×6"),
    "another height": ("LoRA", (), {"lora_up_weight": (320, RANK)}, "320×2; expected: 8×2"),
    "a rank of ten thousand on one side": ("LoRA", (), {"lora_down_weight": (10000, IN)}, "8×2; expected: 8×10000"),
    "rank 0": ("LoRA", (), {"lora_down_weight": (0, IN), "lora_up_weight": (OUT, 0)}, "one row or more"),
    "a vector": ("LoRA", (), {"lora_down_weight": (IN,)}, "lora_down.weight"),
    "one number": ("LoRA", (), {"lora_down_weight": ()}, '"lora_down.weight" is a single number'),
    "a vector for up": ("LoRA", (), {"lora_up_weight": (OUT,)}, "lora_up.weight"),
    "another kernel": ("LoRA", (3, 3), {"lora_down_weight": (RANK, IN, 1, 1)}, "expected: 2×6×3×3"),
    "a kernel too many": ("LoRA", (), {"lora_down_weight": (RANK, IN, 3, 3)}, "2×6×3×3; expected: 2×6"),
    "a core of another rank": ("LoRA Tucker", (3, 3), {"lora_mid_weight": (3, 3, 3, 3)}, "expected: 2×2×3×3"),
    "a core of another kernel": ("LoRA Tucker", (3, 3), {"lora_mid_weight": (2, 2, 1, 1)}, "expected: 2×2×3×3"),
    "halves of other ranks": ("LoHa", (), {"hada_w2_a": (OUT, 3)}, '"hada_w2_a" is 8×3; expected: 8×2'),
    "a half transposed": ("LoHa", (), {"hada_w1_a": (RANK, OUT)}, '"hada_w1_a" is 2×8; expected: 8×2'),
    "LoHa of rank 0": ("LoHa", (), {"hada_w1_b": (0, IN)}, "one row or more"),
    "LoHa's core": ("LoHa Tucker", (3, 3), {"hada_t2": (2, 2, 9, 2)}, "hada_t2"),
    "w1 that does not divide": ("LoKr", (), {"lokr_w1": (3, 3)}, '"lokr_w1" is 3×3; expected: a matrix whose height'),
    "w1 too wide": ("LoKr", (), {"lokr_w1": (2, 4)}, "width divides 6"),
    "w1 of nothing": ("LoKr", (), {"lokr_w1": (0, 3)}, "height divides 8"),
    "w1 that is a vector": ("LoKr", (), {"lokr_w1": (2,)}, "lokr_w1"),
    "w1 with a kernel": ("LoKr", (), {"lokr_w1": (2, 3, 3, 3)}, '"lokr_w1" is 2×3×3×3; expected: 2×3'),
    "w2 of another size": ("LoKr whole", (), {"lokr_w2": (5, 2)}, '"lokr_w2" is 5×2; expected: 4×2'),
    "w2_a of another rank": ("LoKr", (), {"lokr_w2_a": (4, 3)}, '"lokr_w2_a" is 4×3; expected: 4×2'),
    "w1_a of another rank": ("LoKr w1", (), {"lokr_w1_a": (2, 3)}, '"lokr_w1_a" is 2×3; expected: 2×2'),
    "LoKr's core": ("LoKr Tucker", (3, 3), {"lokr_t2": (2, 2)}, "lokr_t2"),
    "IA3 of no side": ("IA3", (), {"weight": (7,)}, '"weight" is 7; expected: 8 or 6 numbers'),
    "IA3 of the other side": ("IA3", (), {"on_input": True}, '"weight" is 8; expected: 6 numbers'),
    "which side, twice": ("IA3", (), {"on_input": (2,)}, '"on_input" is 2; expected: one number'),
    "GLoRA's b1": ("GLoRA", (), {"b1_weight": (OUT, 3)}, '"b1.weight" is 8×3; expected: 8×2'),
    "GLoRA's a1": ("GLoRA", (), {"a1_weight": (5, RANK)}, '"a1.weight" is 5×2; expected: 6×2'),
    "old GLoRA's a2": ("GLoRA old", (), {"a2_weight": (IN, 3)}, '"a2.weight" is 6×3; expected: 6×2'),
    "GLoRA's core": ("GLoRA Tucker", (3, 3), {"bm_weight": (2, 2)}, "bm.weight"),
    "blocks that are not square": ("OFT", (), {"oft_blocks": (2, 4, 3)}, '"oft_blocks" is 2×4×3; expected: square'),
    "blocks for more rows": ("OFT", (), {"oft_blocks": (3, 4, 4)}, "square blocks that are 8 rows together"),
    "a flat block": ("OFT", (), {"oft_blocks": (8, 8)}, "oft_blocks"),
    "rotations in stages": ("OFT of rotations", (), {"oft_diag": (1, 2, 4, 4)}, "oft_diag"),
    "stages of odd blocks": ("BOFT", (), {"oft_blocks": (1, 32, 1, 1)}, "even size"),
    "no stages": ("BOFT", (), {"oft_blocks": (0, 8, 4, 4)}, "even size"),
    "a stage too many": ("BOFT", (), {"oft_blocks": (5, 8, 4, 4)}, "each twice as wide, divide 32 rows"),
    "rescale of another size": ("OFT rescaled", (), {"rescale": (7, 1)}, '"rescale" is 7×1; expected: 8 numbers'),
    "a difference of another weight": ("full", (), {"diff": (OUT, 5)}, '"diff" is 8×5; expected: 8×6, as what'),
    "a norm of another size": ("norm", (), {"w_norm": (OUT,)}, '"w_norm" is 8; expected: 8×6'),
    "lengths of nothing": ("LoRA", (), {"dora_scale": (7,)}, '"dora_scale" is 7; expected: 8 numbers for the rows'),
    "lengths of PEFT's convolutions": ("LoRA", (3, 3), {"dora_scale": (1, OUT, 1, 1)}, "or 1×6 for the columns"),
    "one length": ("LoRA", (), {"dora_scale": ()}, "dora_scale"),
    "two alphas": ("LoRA", (), {"alpha": (2,)}, '"alpha" is 2; expected: one number'),
    "two scales": ("LoHa", (), {"scale": (2,)}, '"scale" is 2; expected: one number'),
}


@pytest.mark.parametrize("case", BROKEN_SHAPES)
def test_shapes_that_do_not_fit(case):
    name, kernel, changes, said = BROKEN_SHAPES[case]
    weight, parts = module(name, kernel, **changes)
    for strength in (1.0, 0.5):
        with pytest.raises(ShapeMismatch) as refusal:
            apply(weight, parts, strength)
        assert said in refusal.value.message
    if case != "IA3 of the other side":  # that takes a value, not only the header
        with pytest.raises(ShapeMismatch):
            check(parts, tuple(weight.shape))


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("LoRA", {"alpha": NAN}, '"alpha" is nan'),
        ("LoRA", {"alpha": INF}, '"alpha" is inf'),
        ("LoKr", {"alpha": -INF}, '"alpha" is -inf'),
        ("LoHa", {"scale": NAN}, '"scale" is nan'),
        ("LoKr whole", {"scale": NAN}, '"scale" is nan'),
        ("GLoRA", {"alpha": NAN}, '"alpha" is nan'),
        ("IA3", {"on_input": NAN}, '"on_input" is nan'),
        ("OFT", {"alpha": -1.0}, '"alpha" is -1'),
        ("OFT", {"alpha": NAN}, '"alpha" is nan'),
        ("OFT", {"oft_blocks": torch.full((2, 4, 4), NAN)}, "gives no rotation"),
        ("OFT", {"oft_blocks": torch.full((2, 4, 4), INF)}, "gives no rotation"),
        ("BOFT", {"oft_blocks": torch.full((2, 8, 4, 4), NAN)}, "gives no rotation"),
    ],
)
def test_numbers_that_cannot_be_meant(name, changes, said):
    with pytest.raises(MalformedFile) as refusal:
        apply(*module(name, **changes), 1.0)
    assert said in refusal.value.message


def test_odd_blocks_so_large_that_the_identity_vanishes_beside_them():
    """I − Q is then a skew matrix of odd size, which is singular."""
    blocks = torch.full((1, 3, 3), 1e30).triu(1)
    with pytest.raises(MalformedFile, match="gives no rotation"):
        apply(torch.ones(3, 3), {"oft_blocks": blocks}, 1.0)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (
            {"lora_down.weight", "alpha"},
            "Parts of LoRA are missing: lora_up.weight. there are: alpha, lora_down.weight",
        ),
        ({"lora_up.weight"}, "missing: lora_down.weight"),
        ({"lora_down.weight", "dora_scale"}, "missing: lora_up.weight"),
        ({"hada_w1_a", "hada_w1_b", "hada_w2_a"}, "Parts of LoHa are missing: hada_w2_b"),
        ({"lokr_w1"}, "Parts of LoKr are missing: lokr_w2"),
        ({"lokr_w1_a", "lokr_w2"}, "missing: lokr_w1"),
        ({"a1.weight", "a2.weight", "b1.weight"}, "Parts of GLoRA are missing: b2.weight"),
        ({"weight"}, "Parts of IA3 are missing: on_input"),
        ({"rescale"}, "missing: oft_blocks"),
        (
            {"lora_down.weight", "lora_up.weight", "hada_w1_a"},
            "No algorithm has these parts together. there are: hada_w1_a, lora_",
        ),
        ({"lora_down.weight", "lora_up.weight", "diff"}, "No algorithm has these parts together"),
        ({"oft_blocks", "oft_diag"}, "No algorithm"),
        ({"diff", "dora_scale"}, "No algorithm"),
        ({"lokr_w1", "lokr_w2", "lokr_t1"}, "No algorithm"),
        ({"lora_down.weight", "x\x1b[31m"}, "x\\x1b[31m"),
        ({"alpha"}, "Nothing here is for a weight. there are: alpha"),
        ({"diff_b"}, "Nothing here is for a weight. there are no parts"),
        (set(), "Nothing here is for a weight. there are no parts"),
    ],
)
def test_parts_that_make_no_algorithm(parts, said):
    with pytest.raises(MalformedFile) as refusal:
        identify(parts)
    assert said in " ".join([refusal.value.message, *refusal.value.details])
    assert len(refusal.value.message) <= ONE_LINE
    with pytest.raises(MalformedFile):
        apply(torch.ones(2, 2), dict.fromkeys(parts, torch.ones(2, 2)), 1.0)


@pytest.mark.parametrize(("name", "part"), [("LoHa Tucker", "hada_t1"), ("LoHa Tucker", "hada_t2")])
def test_one_core_of_two(name, part):
    with pytest.raises(MalformedFile, match=f'The part "{part}" is missing'):
        apply(*module(name, (3, 3), **{part: None}), 1.0)


def test_tlora_cannot_be_merged_by_anyone():
    with pytest.raises(WrongFormat) as refusal:
        identify({"q_layer.weight", "p_layer.weight", "lambda_layer", "alpha"})
    assert "T-LoRA" in refusal.value.message
    assert "lambda_layer, p_layer.weight" in refusal.value.details[-1]
    assert len(refusal.value.message) <= ONE_LINE
    assert refusal.value.hint


@pytest.mark.parametrize("name", [name for name in ADDITIVE + CHANGING if name not in ("full", "norm")])
def test_a_vector_is_no_weight_for_them(name):
    with pytest.raises(ShapeMismatch, match="rows and columns; this tensor is 8"):
        check(module(name)[1], (8,))


@pytest.mark.parametrize("name", [*CHANGING, "DoRA"])
def test_what_depends_on_the_weight_has_no_delta(name):
    weight, parts = module(name) if name != "DoRA" else module("LoRA", dora_scale=(OUT,))
    for asked in (delta_of, to_full):
        with pytest.raises(UsageError, match="depends on the weight"):
            asked(parts, tuple(weight.shape))


def test_biases():
    with pytest.raises(ShapeMismatch, match='"diff_b" is 3; expected: 2'):
        apply_bias(torch.ones(2), {"diff_b": torch.ones(3)}, 1.0)
    with pytest.raises(ShapeMismatch, match='"b_norm" is 2×2; expected: 2'):
        check_bias({"b_norm": torch.ones(2, 2)}, (2,))
    with pytest.raises(MalformedFile, match="Nothing here is for a bias") as refusal:
        apply_bias(torch.ones(2), {"diff": torch.ones(2)}, 1.0)
    assert refusal.value.details == ("there are: diff",)


@pytest.mark.parametrize("name", ["LoRA", "LoKr", "GLoRA"])
def test_the_rank_of_a_broken_module(name):
    part = {"LoRA": "lora_down_weight", "LoKr": "lokr_w2_b", "GLoRA": "a2_weight"}[name]
    with pytest.raises(ShapeMismatch):
        rank_of(module(name, **{part: (4,)})[1])


@pytest.mark.parametrize("name", ADDITIVE + CHANGING)
@given(st.data())
@settings(max_examples=40)
def test_whatever_the_shapes_a_module_fits_or_is_refused(name, data):
    """One part of any shape: either the result has the weight's shape, or the error is ours."""
    kernel = data.draw(st.sampled_from(KERNELS))
    weight, parts = module(name, kernel)
    part = data.draw(st.sampled_from(sorted(parts)))
    shape = data.draw(st.lists(st.integers(0, 9), max_size=5))
    parts[part] = torch.zeros(shape)
    if data.draw(st.booleans()):
        parts["dora_scale"] = torch.ones(data.draw(st.sampled_from(((OUT,), (OUT, 1), (1, IN), (1, OUT), (3, 3, 3)))))
    with contextlib.suppress(InputError):
        assert apply(weight, parts, 1.0).shape == weight.shape
