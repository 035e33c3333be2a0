"""Merges of real layouts against float64: every tensor, every block, every operation, chains of them."""

from __future__ import annotations

import fnmatch

import models
import numpy as np
import pytest
import torch
from models import SD_BLOCKS, XL_BLOCKS, block_of, error_in_steps, f64, is_carried, recipe, same
from oracle_basics import METHODS

import mergekit_sd as mk
from mergekit_sd.errors import FamilyMismatch, RecipeError, ShapeMismatch

NEAR = 0.6  # float16 steps
BLOCKS = {"sd1": SD_BLOCKS, "sd2": SD_BLOCKS, "sdxl": XL_BLOCKS}
families = pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])


def load(folder, *names):
    return [models.read(folder / f"{name}.safetensors") for name in names]


def triple(name):
    return {letter: f"{name}-{letter}.safetensors" for letter in "abc"}


def check(made, first, oracle):
    """Every merged tensor is near the oracle, every other one is the first operand's to the bit."""
    assert set(made) == set(first)
    worst = 0.0
    for name, tensor in made.items():
        if is_carried(name):
            assert same(tensor, first[name]), name
            continue
        assert tensor.dtype == torch.float16
        error = error_in_steps(tensor, oracle(name))
        assert error <= NEAR, (name, error)
        worst = max(worst, error)
    return worst


def weights_by_block(name, base, numbers):
    table = dict(zip(BLOCKS[name], numbers, strict=True)) | {"BASE": base}
    return lambda key: table[block_of(key, xl=name == "sdxl")]


def numbers_of(name, seed=5):
    rng = np.random.default_rng(seed)
    return [round(float(x), 3) for x in rng.uniform(0.05, 0.95, len(BLOCKS[name]))]


# --- weights per block ------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("form", ["number", "with base", "without base", "text"])
def test_weighted_sum(room, name, form):
    numbers = numbers_of(name)
    alpha, base = {
        "number": (0.3, 0.3),
        "with base": ([0.45, *numbers], 0.45),
        "without base": (numbers, 0.0),
        "text": (", ".join(map(str, [0.45, *numbers])), 0.45),
    }[form]
    of = weights_by_block(name, base, [0.3] * len(numbers) if form == "number" else numbers)
    mk.run(recipe(room, triple(name), {"m": {"op": "weighted_sum", "a": "a", "b": "b", "alpha": alpha}}))
    a, b, made = load(room, f"{name}-a", f"{name}-b", "out")
    check(made, a, lambda key: (1 - of(key)) * f64(a[key]) + of(key) * f64(b[key]))


@families
def test_add_difference_by_block(room, name):
    numbers = numbers_of(name)
    of = weights_by_block(name, 0.25, numbers)
    step = {"op": "add_difference", "a": "a", "b": "b", "c": "c", "alpha": [0.25, *numbers]}
    mk.run(recipe(room, triple(name), {"m": step}))
    a, b, c, made = load(room, f"{name}-a", f"{name}-b", f"{name}-c", "out")
    check(made, a, lambda key: f64(a[key]) + of(key) * (f64(b[key]) - f64(c[key])))


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_preset(room, name):
    grad_v = [abs(1 - i / 12) for i in range(25)]
    by_name = dict(zip(SD_BLOCKS, grad_v, strict=True))
    of = weights_by_block(name, 0.0, [by_name[block] for block in BLOCKS[name]])
    mk.run(recipe(room, triple(name), {"m": {"op": "weighted_sum", "a": "a", "b": "b", "alpha": "GRAD_V"}}))
    a, b, made = load(room, f"{name}-a", f"{name}-b", "out")
    check(made, a, lambda key: (1 - of(key)) * f64(a[key]) + of(key) * f64(b[key]))
    for key, tensor in made.items():  # weight 0 and the same dtype: a copy
        assert of(key) != 0 or same(tensor, a[key]), key


def test_selectors_the_more_specific_wins(room):
    exact = "model.diffusion_model.output_blocks.3.0.in_layers.0.weight"
    table = {
        "default": 0.11,
        "preset": "FLAT_25",
        "unet": 0.22,
        "base": 0.33,
        "vae": 0.44,
        "text_encoder": 0.55,
        "IN03-IN05": 0.66,
        "IN04": 0.77,
        "IN04-M00.attn1": 0.88,
        "*.attn2.to_q.weight": 0.99,
        exact: 0.05,
    }

    def of(key):
        block = block_of(key)
        if key == exact:
            return table[exact]
        if fnmatch.fnmatchcase(key, "*.attn2.to_q.weight"):
            return 0.99
        if block != "BASE":
            index = SD_BLOCKS.index(block)
            if 4 <= index <= 12 and "attn1" in key:
                return 0.88
            return 0.77 if index == 4 else 0.66 if 3 <= index <= 5 else 0.22
        return 0.44 if key.startswith(models.VAE) else 0.55 if key.startswith("cond_stage_model.") else 0.33

    mk.run(recipe(room, triple("sd1"), {"m": {"op": "weighted_sum", "a": "a", "b": "b", "alpha": table}}))
    a, b, made = load(room, "sd1-a", "sd1-b", "out")
    check(made, a, lambda key: (1 - of(key)) * f64(a[key]) + of(key) * f64(b[key]))


def test_xl_encoders_and_label_emb(room):
    table = {"default": 0.1, "clip_l": 0.3, "clip_g": 0.6, "IN00": 0.8}

    def of(key):
        if key.startswith("conditioner.embedders.0."):
            return 0.3
        if key.startswith("conditioner.embedders.1."):
            return 0.6
        return 0.8 if block_of(key, xl=True) == "IN00" else 0.1

    mk.run(recipe(room, triple("sdxl"), {"m": {"op": "weighted_sum", "a": "a", "b": "b", "alpha": table}}))
    a, b, made = load(room, "sdxl-a", "sdxl-b", "out")
    assert any("label_emb" in key for key in made)
    check(made, a, lambda key: (1 - of(key)) * f64(a[key]) + of(key) * f64(b[key]))


@pytest.mark.parametrize(("name", "count"), [("sd1", 20), ("sd2", 19), ("sdxl", 26), ("sdxl", 25)])
def test_numbers_for_another_family_are_refused(room, name, count):
    where = recipe(room, triple(name), {"m": {"op": "weighted_sum", "a": "a", "b": "b", "alpha": [0.5] * count}})
    with pytest.raises(RecipeError, match=f"{name} has") as caught:
        mk.run(where)
    assert caught.value.exit_code == 2
    assert caught.value.line
    assert caught.value.key == "steps.m.alpha"
    assert not (room / "out.safetensors").exists()


def test_range_of_blocks_that_are_not_there(room):
    table = {"default": 0, "OUT09": 1}
    where = recipe(room, triple("sdxl"), {"m": {"op": "weighted_sum", "a": "a", "b": "b", "alpha": table}})
    with pytest.raises(RecipeError, match="OUT09"):
        mk.plan(where)


# --- every operation, and chains ----------------------------------------------------------------------

OPERATIONS = {
    "sum_twice": {"a": "a", "b": "b", "c": "c", "alpha": 0.35, "beta": 0.6},
    "triple_sum": {"a": "a", "b": "b", "c": "c", "alpha": 0.25, "beta": 0.4},
    "slerp": {"a": "a", "b": "b", "alpha": 0.4},
    "scale": {"a": "a", "alpha": 1.5},
}


@pytest.mark.parametrize("op", sorted(OPERATIONS))
def test_operation(room, op):
    step = OPERATIONS[op]
    mk.run(recipe(room, triple("sd1"), {"m": {"op": op, **step}}))
    operands = load(room, *(f"sd1-{step[name]}" for name in "abc" if name in step))
    parameters = {name: step[name] for name in ("alpha", "beta") if name in step}
    made = models.read(room / "out.safetensors")
    check(made, operands[0], lambda key: METHODS[op].formula(*(f64(each[key]) for each in operands), **parameters))


@families
def test_chain_of_all(room, name):
    """add_difference on a sum, a scaled difference added, a slerp at the end: rounded once."""
    steps = {
        "mix": {"op": "weighted_sum", "a": "a", "b": "b", "alpha": 0.3},
        "carried": {"op": "add_difference", "a": "mix", "b": "b", "c": "c", "alpha": 0.7},
        "task": {"op": "subtract", "a": "c", "b": "a"},
        "part": {"op": "scale", "a": "task", "alpha": 0.4},
        "more": {"op": "subtract", "a": "b", "b": "a"},
        "tasks": {"op": "weighted_sum", "a": "part", "b": "more", "alpha": 0.25},
        "moved": {"op": "add", "a": "carried", "b": "tasks"},
        "last": {"op": "slerp", "a": "moved", "b": "mix", "alpha": 0.2},
    }
    report = mk.run(recipe(room, triple(name), steps)).outputs[0]
    a, b, c, made = load(room, f"{name}-a", f"{name}-b", f"{name}-c", "out")

    def oracle(key):
        x, y, z = (f64(each[key]) for each in (a, b, c))
        mix = 0.7 * x + 0.3 * y
        moved = mix + 0.7 * (y - z) + 0.75 * 0.4 * (z - x) + 0.25 * (y - x)
        return METHODS["slerp"].formula(moved, mix, alpha=0.2)

    check(made, a, oracle)
    assert report.counts["merged"] == sum(not is_carried(key) for key in made)


def test_diamond_and_a_step_used_twice(room):
    steps = {
        "x": {"op": "weighted_sum", "a": "a", "b": "b", "alpha": 0.5},
        "left": {"op": "weighted_sum", "a": "x", "b": "c", "alpha": 0.25},
        "right": {"op": "add_difference", "a": "x", "b": "left", "c": "x", "alpha": 0.5},
        "out": {"op": "sum_twice", "a": "left", "b": "right", "c": "left", "alpha": 0.5, "beta": 0.5},
    }
    mk.run(recipe(room, triple("sd1"), steps))
    a, b, c, made = load(room, "sd1-a", "sd1-b", "sd1-c", "out")

    def oracle(key):
        x = (f64(a[key]) + f64(b[key])) / 2
        left = 0.75 * x + 0.25 * f64(c[key])
        right = x + 0.5 * (left - x)
        return 0.5 * (left + right) / 2 + 0.5 * left

    check(made, a, oracle)


def test_one_file_under_two_names(room):
    names = {"a": "sd1-a.safetensors", "twin": "./sd1-a.safetensors", "b": "sd1-b.safetensors"}
    steps = {"m": {"op": "add_difference", "a": "a", "b": "b", "c": "twin", "alpha": 1.0}}
    mk.run(recipe(room, names, steps))
    a, b, made = load(room, "sd1-a", "sd1-b", "out")
    check(made, a, lambda key: f64(a[key]) + (f64(b[key]) - f64(a[key])))


def test_same_model_as_both_operands(room):
    mk.run(recipe(room, triple("sd1"), {"m": {"op": "weighted_sum", "a": "a", "b": "a", "alpha": 0.37}}))
    a, made = load(room, "sd1-a", "out")
    assert all(same(made[key], a[key]) for key in a)


@pytest.mark.parametrize("dtypes", [("fp8_e4m3fn", "bf16"), ("fp64", "fp8_e5m2"), ("bf16", "fp64")])
def test_inputs_of_every_dtype(tmp_path, dtypes):
    for letter, seed, dtype in zip("ab", (1, 2), dtypes, strict=True):
        models.write(tmp_path / f"sd1-{letter}.safetensors", models.checkpoint("sd1", seed, dtype))
    names = {letter: f"sd1-{letter}.safetensors" for letter in "ab"}
    mk.run(recipe(tmp_path, names, {"m": {"op": "weighted_sum", "a": "a", "b": "b", "alpha": 0.3}}))
    a, b, made = load(tmp_path, "sd1-a", "sd1-b", "out")
    check(made, a, lambda key: 0.7 * f64(a[key]) + 0.3 * f64(b[key]))


def test_weight_is_used_as_given(tmp_path):
    """alpha is not rounded to float16 first, as some tools do: 0.3 would be 0.300048828125."""
    one = models.checkpoint("sd1", 1, "fp32")
    ones = {key: each if is_carried(key) else torch.ones_like(each) * 1000 for key, each in one.items()}
    models.write(tmp_path / "a.safetensors", {k: v if is_carried(k) else v * 0 for k, v in ones.items()})
    models.write(tmp_path / "b.safetensors", ones)
    outputs = {"out": {"model": "m", "file": "out.safetensors", "dtype": "fp32"}}
    step = {"op": "weighted_sum", "a": "a", "b": "b", "alpha": 0.3}
    mk.run(recipe(tmp_path, {"a": "a.safetensors", "b": "b.safetensors"}, {"m": step}, outputs))
    assert models.read(tmp_path / "out.safetensors")[models.CONV_IN].unique().item() == pytest.approx(300, rel=1e-7)


# --- names: kept, dropped, carried ---------------------------------------------------------------------


def test_missing_and_added_tensors(tmp_path):
    a, b = models.checkpoint("sd1", 1), models.checkpoint("sd1", 2)
    unet = [key for key in a if key.startswith(models.UNET)]
    vae = [key for key in a if key.startswith(models.VAE)]
    only_a, only_b = unet[3], vae[5]
    del b[only_a], a[only_b]
    models.write(tmp_path / "a.safetensors", a)
    models.write(tmp_path / "b.safetensors", b)
    where = recipe(
        tmp_path,
        {"a": "a.safetensors", "b": "b.safetensors"},
        {"m": {"op": "weighted_sum", "a": "a", "b": "b", "alpha": 0.5}},
    )
    step = mk.plan(where).steps[0]
    assert step.kept == (only_a,)
    assert step.dropped == (only_b,)
    mk.run(where)
    made = models.read(tmp_path / "out.safetensors")
    assert only_b not in made
    assert same(made.pop(only_a), a.pop(only_a))
    check(made, a, lambda key: 0.5 * f64(a[key]) + 0.5 * f64(b[key]))


@pytest.mark.parametrize("lacking", ["b", "c"])
def test_add_difference_where_b_or_c_lacks_a_tensor(tmp_path, lacking):
    each = {letter: models.checkpoint("sd1", seed) for seed, letter in enumerate("abc")}
    gone = models.UNET + "time_embed.0.weight"
    del each[lacking][gone]
    for letter, tensors in each.items():
        models.write(tmp_path / f"{letter}.safetensors", tensors)
    names = {letter: f"{letter}.safetensors" for letter in "abc"}
    where = recipe(tmp_path, names, {"m": {"op": "add_difference", "a": "a", "b": "b", "c": "c", "alpha": 0.5}})
    assert mk.plan(where).steps[0].kept == (gone,)
    mk.run(where)
    made, a = models.read(tmp_path / "out.safetensors"), each["a"]
    assert same(made.pop(gone), a.pop(gone))
    check(made, a, lambda key: f64(a[key]) + 0.5 * (f64(each["b"][key]) - f64(each["c"][key])))


def test_a_difference_lacks_what_one_model_lacks(tmp_path):
    a, b, c = (models.checkpoint("sd1", seed) for seed in range(3))
    gone = models.UNET + "time_embed.0.weight"
    del c[gone]
    for letter, tensors in zip("abc", (a, b, c), strict=True):
        models.write(tmp_path / f"{letter}.safetensors", tensors)
    steps = {
        "d": {"op": "subtract", "a": "b", "b": "c"},
        "m": {"op": "add", "a": "a", "b": "d"},
    }
    mk.run(recipe(tmp_path, {letter: f"{letter}.safetensors" for letter in "abc"}, steps))
    made = models.read(tmp_path / "out.safetensors")
    assert same(made.pop(gone), a.pop(gone))
    check(made, a, lambda key: f64(a[key]) + f64(b[key]) - f64(c[key]))


def test_what_is_never_merged(tmp_path):
    """Integers, schedule buffers, markers, position_ids (stored as float, too), EMA: as in a, to the bit."""
    a, b = models.checkpoint("sdxl", 1), models.checkpoint("sdxl", 2)
    ids = models.POSITION_IDS["sdxl"]
    for number, each in enumerate((a, b)):
        each["v_pred"] = torch.zeros(0)
        each["edm_mean"] = torch.full((4,), float(number))
        each["betas"] = torch.full((1000,), number + 0.123, dtype=torch.float32)
        each[ids] = torch.arange(77).reshape(1, 77).float() + 0.25 * number
    whole = models.UNET + "time_embed.0.bias"
    a[whole], b[whole] = torch.arange(4, dtype=torch.int32), torch.arange(4, dtype=torch.int32) + 100
    models.write(tmp_path / "a.safetensors", a)
    models.write(tmp_path / "b.safetensors", b)
    outputs = {"out": {"model": "m", "file": "out.safetensors", "position_ids": "keep", "prediction": "v"}}
    step = {"op": "weighted_sum", "a": "a", "b": "b", "alpha": 0.5}
    mk.run(recipe(tmp_path, {"a": "a.safetensors", "b": "b.safetensors"}, {"m": step}, outputs))
    made = models.read(tmp_path / "out.safetensors")
    for key in ("v_pred", "edm_mean", "betas", ids, whole):
        assert same(made[key], a[key]), key


def test_novelai_names_meet_the_others(tmp_path):
    a, b = models.checkpoint("sd1", 1), models.checkpoint("sd1", 2)
    models.write(tmp_path / "a.safetensors", models.novelai(a))
    models.write(tmp_path / "b.safetensors", b)
    mk.run(
        recipe(
            tmp_path,
            {"a": "a.safetensors", "b": "b.safetensors"},
            {"m": {"op": "weighted_sum", "a": "a", "b": "b", "alpha": 0.5}},
        )
    )
    made = models.read(tmp_path / "out.safetensors")
    check(made, a, lambda key: 0.5 * f64(a[key]) + 0.5 * f64(b[key]))


@pytest.mark.parametrize(("one", "other"), [("sd1", "sdxl"), ("sd2", "sd1"), ("sdxl", "sd2")])
def test_families_differ(room, one, other):
    names = {"first": f"{one}-a.safetensors", "second": f"{other}-b.safetensors"}
    where = recipe(room, names, {"m": {"op": "weighted_sum", "a": "first", "b": "second", "alpha": 0.5}})
    with pytest.raises(FamilyMismatch) as caught:
        mk.run(where)
    titles = {"sd1": "Stable Diffusion 1", "sd2": "Stable Diffusion 2", "sdxl": "Stable Diffusion XL"}
    assert caught.value.exit_code == 3
    for word in ("first", "second", titles[one], titles[other]):
        assert word in caught.value.message
    assert not (room / "out.safetensors").exists()
    assert models.left_overs(room) == []


# --- the inpainting rule -------------------------------------------------------------------------------


def variants(folder, **kinds):
    found = {}
    for seed, (name, kind) in enumerate(kinds.items()):
        found[name] = models.checkpoint(kind, seed)
        models.write(folder / f"{name}.safetensors", found[name])
    return found


@pytest.mark.parametrize("kind", ["sd1-inpainting", "sd1-pix2pix", "sdxl-inpainting", "sd2-inpainting"])
@pytest.mark.parametrize("alpha", [0.4, 1.0])
def test_first_channels_of_an_inpainting_model(tmp_path, kind, alpha):
    each = variants(tmp_path, a=kind, b=kind.split("-")[0])
    names = {letter: f"{letter}.safetensors" for letter in "ab"}
    mk.run(recipe(tmp_path, names, {"m": {"op": "weighted_sum", "a": "a", "b": "b", "alpha": alpha}}))
    made = models.read(tmp_path / "out.safetensors")
    a, b, conv = each["a"], each["b"], models.CONV_IN
    assert same(made[conv][:, 4:], a[conv][:, 4:])
    assert a[conv].shape[1] in (8, 9)
    merged = made.pop(conv)[:, :4]
    assert error_in_steps(merged, (1 - alpha) * f64(a[conv][:, :4]) + alpha * f64(b[conv])) <= NEAR
    if alpha == 1:
        assert same(merged, b[conv])
    a.pop(conv)
    check(made, a, lambda key: (1 - alpha) * f64(a[key]) + alpha * f64(b[key]))


@pytest.mark.parametrize("c_kind", ["sd1", "sd1-inpainting"])
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_difference_onto_an_inpainting_model(tmp_path, c_kind, alpha):
    """The usual recipe: A = inpainting, B = custom, C = base."""
    each = variants(tmp_path, a="sd1-inpainting", b="sd1", c=c_kind)
    names = {letter: f"{letter}.safetensors" for letter in "abc"}
    step = {"op": "add_difference", "a": "a", "b": "b", "c": "c", "alpha": alpha}
    mk.run(recipe(tmp_path, names, {"m": step}))
    made = models.read(tmp_path / "out.safetensors")[models.CONV_IN]
    a, b, c = (f64(each[letter][models.CONV_IN]) for letter in "abc")
    assert error_in_steps(made[:, :4], a[:, :4] + alpha * (b - c[:, :4])) <= NEAR
    assert same(made[:, 4:], each["a"][models.CONV_IN][:, 4:])


@pytest.mark.parametrize("kind", ["sd1-inpainting", "sd1-pix2pix"])
def test_inpainting_model_second_is_refused(tmp_path, kind):
    variants(tmp_path, a="sd1", b=kind)
    names = {letter: f"{letter}.safetensors" for letter in "ab"}
    where = recipe(tmp_path, names, {"m": {"op": "weighted_sum", "a": "a", "b": "b", "alpha": 0.5}})
    with pytest.raises(ShapeMismatch, match="shape") as caught:
        mk.run(where)
    assert caught.value.exit_code == 3
    assert caught.value.key == models.CONV_IN
    assert "swap" in caught.value.hint
    assert '"b"' in caught.value.hint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors", "r.toml"]


@pytest.mark.parametrize("kinds", [("sd1-inpainting", "sd1-pix2pix"), ("sd2-depth", "sd2")])
def test_other_channels_are_refused(tmp_path, kinds):
    variants(tmp_path, a=kinds[0], b=kinds[1])
    names = {letter: f"{letter}.safetensors" for letter in "ab"}
    where = recipe(tmp_path, names, {"m": {"op": "weighted_sum", "a": "a", "b": "b", "alpha": 0.5}})
    with pytest.raises(ShapeMismatch) as caught:
        mk.run(where)
    assert caught.value.key == models.CONV_IN


@pytest.mark.parametrize("shape", [(4, 1, 3, 3), (1, 4, 3, 3), (4, 4, 1, 1), (4,), (), (4, 4, 3, 3, 1)])
def test_broadcasting_is_refused(tmp_path, shape):
    a, b = models.checkpoint("sd1", 1), models.checkpoint("sd1", 2)
    name = models.UNET + "input_blocks.1.0.in_layers.2.weight"
    assert a[name].shape == (4, 4, 3, 3)
    b[name] = torch.zeros(shape, dtype=torch.float16)
    models.write(tmp_path / "a.safetensors", a)
    models.write(tmp_path / "b.safetensors", b)
    for one, other in ("ab", "ba"):
        step = {"op": "weighted_sum", "a": one, "b": other, "alpha": 0.5}
        where = recipe(tmp_path, {"a": "a.safetensors", "b": "b.safetensors"}, {"m": step})
        with pytest.raises(ShapeMismatch) as caught:
            mk.run(where)
        assert caught.value.key == name
        assert str(list(shape)) in caught.value.message
        assert not (tmp_path / "out.safetensors").exists()


# --- layouts that are not known ----------------------------------------------------------------------------


def test_unknown_layout_takes_numbers_and_globs(tmp_path):
    wanted = {"x.weight": (3, 5), "x.bias": (3,), "y.weight": (2, 2), "betas": (7,)}
    a = models.filled({k: v for k, v in wanted.items() if k != "betas"}, 1) | {"note": torch.arange(3)}
    b = models.filled({k: v for k, v in wanted.items() if k != "betas"}, 2) | {"note": torch.arange(3) * 9}
    models.write(tmp_path / "a.safetensors", a)
    models.write(tmp_path / "b.safetensors", b)
    names = {"a": "a.safetensors", "b": "b.safetensors"}
    table = {"default": 0.25, "x.*": 0.5, "x.bias": 1.0}
    report = mk.run(recipe(tmp_path, names, {"m": {"op": "weighted_sum", "a": "a", "b": "b", "alpha": table}}))
    made = models.read(tmp_path / "out.safetensors")
    of = {"x.weight": 0.5, "x.bias": 1.0, "y.weight": 0.25}
    assert set(made) == set(a)
    assert report.outputs[0].dropped == {}
    assert same(made["note"], a["note"])
    for key, alpha in of.items():
        assert error_in_steps(made[key], (1 - alpha) * f64(a[key]) + alpha * f64(b[key])) <= NEAR
    for alpha in ("GRAD_V", [0.5] * 26, {"default": 0.5, "IN00": 1}, {"default": 0.5, "base": 1}):
        where = recipe(tmp_path, names, {"m": {"op": "weighted_sum", "a": "a", "b": "b", "alpha": alpha}})
        with pytest.raises(RecipeError, match="needs a known architecture"):
            mk.plan(where)


def test_nothing_in_common_is_refused(tmp_path):
    models.write(tmp_path / "a.safetensors", {"x": torch.ones(3)})
    models.write(tmp_path / "b.safetensors", {"y": torch.ones(3)})
    names = {"a": "a.safetensors", "b": "b.safetensors"}
    where = recipe(tmp_path, names, {"m": {"op": "weighted_sum", "a": "a", "b": "b", "alpha": 0.5}})
    with pytest.raises(FamilyMismatch, match="no tensor in common") as caught:
        mk.run(where)
    assert caught.value.details


def test_names_that_speak_for_themselves_are_carried_in_an_unknown_layout(tmp_path):
    ids = torch.arange(4, dtype=torch.float32)[None]
    for name, seed in (("a", 1.0), ("b", 5.0)):
        tensors = {"text.embeddings.position_ids": ids + seed, "betas": ids[0] * seed, "x.weight": ids * seed}
        models.write(tmp_path / f"{name}.safetensors", tensors)
    merged = mk.ops.weighted_sum(mk.open(tmp_path / "a.safetensors"), mk.open(tmp_path / "b.safetensors"), alpha=0.5)
    mk.save(merged, tmp_path / "out.safetensors", dtype="fp32", position_ids="keep")
    made = models.read(tmp_path / "out.safetensors")
    assert torch.equal(made["text.embeddings.position_ids"], ids + 1)
    assert torch.equal(made["betas"], ids[0])
    assert torch.equal(made["x.weight"], ids * 3)
