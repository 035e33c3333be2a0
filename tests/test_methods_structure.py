"""The cosine modes, rotation and rank, Adjust and noise: what their oracles do not say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import numbers
from oracle_cosine import WholeModels, columns, cosine, likeness_b, unit
from oracle_matrices import rotate as rotate_formula
from oracle_matrices import truncate_rank as truncate_formula
from scipy.linalg import expm, orthogonal_procrustes
from scipy.stats import ortho_group

from mergekit_sd.operations import OPERATIONS, matrices
from mergekit_sd.operations.draws import Draw
from mergekit_sd.operations.types import Key

UNET = Key("some.weight", "sd1", "unet", "IN04")
VAE = Key("decoder.weight", "sd1", "vae")


def call(name, *operands, **keywords):
    return OPERATIONS[name].function(*operands, **keywords)


def wide(tensor):
    return tensor.double().numpy()


def close(result, expected, atol=1e-6):
    np.testing.assert_allclose(wide(result), expected, rtol=0, atol=atol)


# --- cosine: the survey --------------------------------------------------------------------------------


def two_models(seed=0):
    """Pairs of tensors of many shapes, the VAE's among them."""
    shapes = {
        "conv": (16, 6, 3, 3),
        "linear": (30, 70),
        "bias": (30,),
        "scale": (),
        "empty": (4, 0),
        "decoder": (5, 40),
    }
    pairs = {}
    for at, (name, shape) in enumerate(shapes.items()):
        a = numbers(shape, "normal", seed + at)
        pairs[name] = (a, a + 0.3 * numbers(shape, "normal", seed + 50 + at))
    keys = {name: Key(name, "sd1", "vae" if name == "decoder" else "unet") for name in pairs}
    return WholeModels([(keys[name], pair) for name, pair in pairs.items()])


def usual_range(values, method):
    """supermerger's: trim below the 1st percentile, then what is left above its 99th."""
    values = values[~np.isnan(values)]
    values = values[values >= np.percentile(values, 1, method=method)]
    values = values[values <= np.percentile(values, 99, method=method)]
    return values.min(), values.max()


def measured(models, name):
    """What a cosine mode measures of models: A the columns' cosines, B the likenesses."""
    found = [np.empty(0)]
    for tensor, key in models.keys.items():
        a, b = (wide(each) for each in models.tensors(tensor))
        if key.component == "vae" or not a.size:
            continue
        each = np.array([cosine(x, y) for x, y in zip(columns(a), columns(b), strict=True)])
        found.append(each if name == "cosine_a" else likeness_b(a, b).ravel())
    return np.concatenate(found)


@pytest.mark.parametrize("method", ["linear", "midpoint"])
@pytest.mark.parametrize("name", ["cosine_a", "cosine_b"])
def test_the_survey_is_the_range_between_two_percentiles(name, method):
    models = two_models()
    found = OPERATIONS[name].survey(models)
    assert found == pytest.approx(usual_range(measured(models, name), method), rel=1e-12)
    assert found[0] > measured(models, name).min()
    assert found[1] < measured(models, name).max()


@given(st.lists(st.sampled_from([-1.0, -0.5, 0.25, 0.5, 1.0]), min_size=1, max_size=250))
@settings(max_examples=30)
def test_the_survey_of_values_that_repeat(values):
    # One column (c, √(1 − c²)) for each value: its cosine with (1, 0) is c.
    b = torch.tensor([[c, math.sqrt(1 - c * c)] for c in values]).T
    a = torch.tensor([[1.0], [0.0]]).expand(2, len(values))
    least, most = OPERATIONS["cosine_a"].survey(WholeModels([(UNET, (a, b))]))
    ranked = sorted(values)
    left = [each for each in ranked if each >= ranked[math.ceil((len(ranked) - 1) / 100)]]
    assert least == pytest.approx(left[0], abs=1e-7)
    assert most == pytest.approx(left[math.floor(99 * (len(left) - 1) / 100)], abs=1e-7)


def test_zero_tensors_count_for_cosine_a_and_not_for_b():
    zero = WholeModels([(UNET, (torch.zeros(3, 2), torch.ones(3, 2)))])
    assert OPERATIONS["cosine_a"].survey(zero) == (0.0, 0.0)
    both = WholeModels(
        [(UNET, (torch.zeros(3, 2), torch.ones(3, 2))), (Key("b", "sd1", "unet"), (-torch.ones(3),) * 2)]
    )
    assert OPERATIONS["cosine_a"].survey(both) == pytest.approx((0.0, 0.0))  # of 0, 0 and 1: 1 is trimmed
    assert OPERATIONS["cosine_b"].survey(both) == pytest.approx((1.0, 1.0))


@pytest.mark.parametrize("name", ["cosine_a", "cosine_b"])
def test_nan_is_not_surveyed_and_neither_is_the_vae(name):
    models = two_models()
    with_nan = two_models()
    more = torch.full((3,), math.nan)
    with_nan.keys["bad"], with_nan._tensors["bad"] = Key("bad", "sd1", "unet"), (more, more)
    with_nan._tensors["decoder"] = (-with_nan._tensors["decoder"][0], with_nan._tensors["decoder"][0])
    assert OPERATIONS[name].survey(with_nan) == OPERATIONS[name].survey(models)


@pytest.mark.parametrize("name", ["cosine_a", "cosine_b"])
def test_nothing_to_survey_is_no_spread(name):
    decoder = (torch.ones(3, 2), torch.ones(3, 2))
    for models in (WholeModels([]), WholeModels([(VAE, decoder)])):
        assert OPERATIONS[name].survey(models) == (0.0, 0.0)


# --- cosine: the mix -----------------------------------------------------------------------------------


def test_cosine_by_hand():
    # Columns: equal (cosine 1), at right angles (0). Long a, so that B's whole cosine is another.
    a = torch.tensor([[3.0, 1.0], [4.0, 0.0]])
    b = torch.tensor([[3.0, 0.0], [4.0, 1.0]])
    # A: whole cosine (1 + 0) / √(2·2) = 0.5; likenesses 0.75 and 0.25; B: whole cosine 25 / 26.
    first = call("cosine_a", a, b, alpha=0.1, key=UNET, survey=(0.0, 1.0))
    close(first, 0.65 * wide(a) * [1, 0] + 0.35 * wide(b) * [1, 0] + [[0, 0.15], [0, 0.85]])
    second = call("cosine_b", a, b, alpha=0.1, key=UNET, survey=(0.0, 1.0))
    share = 25 / 26 / 2 - 0.1
    close(second, [[3.0, share], [4.0, 1 - share]])


def test_the_sign_of_alpha_counts_in_b_only():
    a, b = numbers((6, 4), "normal", 1), numbers((6, 4), "normal", 2)
    extremes = {"key": UNET, "survey": (-1.0, 1.0)}
    assert torch.equal(call("cosine_a", a, b, alpha=-0.2, **extremes), call("cosine_a", a, b, alpha=0.2, **extremes))
    more, less = (call("cosine_b", a, b, alpha=alpha, **extremes) for alpha in (-0.2, 0.2))
    assert (more - a).norm() < (less - a).norm()


@pytest.mark.parametrize("name", ["cosine_a", "cosine_b"])
def test_the_vae_stays(name):
    a, b = numbers((6, 4), "normal", 1), numbers((6, 4), "normal", 2)
    result = call(name, a, b, alpha=0.3, key=VAE, survey=(0.0, 1.0))
    assert torch.equal(result, a)
    assert result is not a
    assert OPERATIONS[name].folds_to({"alpha": 0.3}, VAE) == "a"
    assert OPERATIONS[name].folds_to({"alpha": 0.0}, UNET) is None


@pytest.mark.parametrize("name", ["cosine_a", "cosine_b"])
@pytest.mark.parametrize("spread", [0.0, 1e-15])
def test_without_a_spread_it_is_the_straight_line(name, spread):
    a, b = numbers((6, 4), "normal", 1), numbers((6, 4), "normal", 2)
    result = call(name, a, b, alpha=0.3, key=UNET, survey=(0.5, 0.5 + spread))
    close(result, 0.7 * wide(a) + 0.3 * wide(b))


@pytest.mark.parametrize("name", ["cosine_a", "cosine_b"])
def test_zeros_are_like_nothing(name):
    a = numbers((6, 4), "normal", 1)
    zero = torch.zeros_like(a)
    assert torch.equal(call(name, a, zero, alpha=0.0, key=UNET, survey=(0.0, 1.0)), zero)
    assert torch.equal(call(name, zero, a, alpha=0.0, key=UNET, survey=(0.0, 1.0)), a)


def test_cosine_of_a_tensor_of_many_pieces():
    a, b = numbers((700, 130), "normal", 1), numbers((700, 130), "normal", 2)
    a[:, 3] = 0.0
    x, y = wide(a), wide(b)
    each = np.array([cosine(p, q) for p, q in zip(x.T, y.T, strict=True)])
    for name, whole in (
        ("cosine_a", cosine(unit(x).ravel(), unit(y).ravel())),
        ("cosine_b", cosine(x.ravel(), y.ravel())),
    ):
        k = np.clip((each + whole) / 2 * 2 + 0.5, 0, 1)
        close(call(name, a, b, alpha=0.0, key=UNET, survey=(-0.25, 0.25)), k * x + (1 - k) * y)


# --- rotation ------------------------------------------------------------------------------------------


def centred(a):
    return a - a.mean(axis=0)


def turned_by(degrees):
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[c, s], [-s, c]])


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
def test_a_quarter_turn(alpha):
    a = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.5], [0.0, -0.5]])
    b = torch.from_numpy(wide(a) @ turned_by(90)).float() + torch.tensor([2.0, 1.0])
    close(call("rotate", a, b, alpha=alpha), wide(a) @ turned_by(90 * alpha) + alpha * np.array([2.0, 1.0]))


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
def test_a_mirrored_direction_goes_by_the_cosine(alpha):
    a = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.5], [0.0, -0.5], [1.0, 1.0], [-1.0, -1.0]])
    b = a * torch.tensor([-1.0, 1.0])
    close(call("rotate", a, b, alpha=alpha), wide(a) * [math.cos(math.pi * alpha), 1.0])


@pytest.mark.parametrize("shape", [(12, 5), (5, 5), (4, 12), (6, 4, 3, 3), (5, 7, 1, 1)])
@pytest.mark.parametrize("kind", ["normal", "sparse"])
def test_no_orthogonal_matrix_brings_a_nearer_and_all_keep_its_shape(shape, kind):
    a, b = numbers(shape, kind, 1), numbers(shape, kind, 2)
    result = wide(call("rotate", a, b))
    flat = [wide(each).reshape(-1, shape[1] if len(shape) == 2 or shape[-1] == 1 else 9) for each in (a, b)]
    moved, (x, y) = centred(result.reshape(flat[0].shape)), map(centred, flat)
    best, _ = orthogonal_procrustes(x, y)
    assert np.linalg.norm(moved - y) == pytest.approx(np.linalg.norm(x @ best - y), rel=1e-6)
    np.testing.assert_allclose(moved @ moved.T, x @ x.T, atol=1e-7)  # lengths and angles between rows
    np.testing.assert_allclose(result.reshape(flat[1].shape).mean(axis=0), flat[1].mean(axis=0), atol=1e-7)


@given(st.integers(2, 9), st.floats(0.1, 3.1), st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=20)
def test_a_known_rotation_is_found_and_shared_out(size, angle, alpha, seed):
    steps = np.random.default_rng(seed).standard_normal((size, size))
    steps = (steps - steps.T) * angle / np.linalg.norm(steps - steps.T, 2)  # no plane turns by more than this angle
    a = numbers((40, size), "normal", seed)
    b = torch.from_numpy(wide(a) @ expm(steps)).float()
    means = (1 - alpha) * wide(a).mean(axis=0) + alpha * wide(b).mean(axis=0)
    close(call("rotate", a, b, alpha=alpha), centred(wide(a)) @ expm(alpha * steps) + means, atol=1e-5)


@pytest.mark.parametrize("shape", [(12, 5), (5, 5), (4, 12), (6, 4, 3, 3)])
@given(st.floats(0, 1), st.integers(0, 20), st.sampled_from(["normal", "sparse", "zero", "constant"]))
@settings(max_examples=15)
def test_the_ends_of_both_shares(shape, alpha, seed, kind):
    a, b = numbers(shape, kind, seed), numbers(shape, "sparse", seed + 1)
    close(call("rotate", a, b, alpha=0.0, beta=0.0), wide(a))
    close(call("rotate", a, b, alpha=1.0, beta=1.0), wide(b))
    result = call("rotate", a, b, alpha=alpha, beta=0.0)
    assert torch.isfinite(result).all()
    assert centred_norm(result) <= centred_norm(a) * (1 + 1e-6) + 1e-6  # shorter by half turns only


def centred_norm(a):
    rows = wide(a).reshape(-1, 9) if a.ndim == 4 else wide(a)
    return np.linalg.norm(centred(rows))


def test_directions_that_b_does_not_know_stay():
    rng = np.random.default_rng(1)
    a = centred(rng.standard_normal((40, 6)))
    b = np.concatenate([a[:, :2] @ turned_by(60), np.zeros((40, 4))], axis=1)
    a[:, 2:] -= a[:, :2] @ np.linalg.lstsq(a[:, :2], a[:, 2:], rcond=None)[0]
    result = call("rotate", torch.from_numpy(a).float(), torch.from_numpy(b).float(), alpha=0.5)
    close(result, np.concatenate([a[:, :2] @ turned_by(30), a[:, 2:]], axis=1), atol=1e-5)


@pytest.mark.parametrize("shape", [(), (7,), (1,), (0,), (4, 0, 2)])
def test_vectors_go_straight(shape):
    a, b = numbers(shape, "normal", 1), numbers(shape, "normal", 2)
    close(call("rotate", a, b, alpha=0.3), 0.7 * wide(a) + 0.3 * wide(b))


@pytest.mark.parametrize("shape", [(40, 9), (9, 40), (6, 7, 3, 3)])
def test_large_matrices_come_in_pieces(shape, monkeypatch):
    monkeypatch.setattr(matrices, "PIECE", 64)
    a, b = numbers(shape, "normal", 1), numbers(shape, "normal", 2)
    close(call("rotate", a, b, alpha=0.4, beta=0.2), rotate_formula(wide(a), wide(b), alpha=0.4, beta=0.2))
    close(call("truncate_rank", a, ratio=0.3), truncate_formula(wide(a), ratio=0.3))


def test_the_least_turns_are_shared_out_too():
    a = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    b = a + 3e-7 * torch.tensor([[0.0, 1.0], [0.0, -1.0], [-1.0, 0.0], [1.0, 0.0]])
    result = call("rotate", a, b, alpha=0.5)
    close(result[:2, 1], [1.5e-7, -1.5e-7], atol=1e-9)


def test_nearly_half_turns_are_turned():
    a = torch.from_numpy(centred(np.random.default_rng(3).standard_normal((9, 2)))).float()
    b = torch.from_numpy(wide(a) @ turned_by(179.9)).float()
    close(call("rotate", a, b, alpha=0.5), wide(a) @ turned_by(89.95), atol=1e-4)


def test_reflections_too_are_nearest_at_the_end():
    q = ortho_group.rvs(6, random_state=4)
    q = q if np.linalg.det(q) < 0 else q * [-1, 1, 1, 1, 1, 1]
    a = numbers((30, 6), "normal", 1)
    close(call("rotate", a, torch.from_numpy(wide(a) @ q).float()), wide(a) @ q)


# --- rank ----------------------------------------------------------------------------------------------


def test_truncation_by_hand():
    a = torch.diag(torch.tensor([1.0, -3.0, 2.0]))
    close(call("truncate_rank", a, ratio=2 / 3), np.diag([0.0, -3.0, 2.0]))
    close(call("truncate_rank", a, ratio=1 / 3), np.diag([0.0, -3.0, 0.0]))
    close(call("truncate_rank", a, ratio=0.0), np.zeros((3, 3)))


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (8, 4, 3, 3)])
def test_what_is_cut_off_are_the_smallest_singular_values(shape):
    a = numbers(shape, "normal", 1)
    sizes = np.linalg.svd(wide(a).reshape(shape[0], -1), compute_uv=False)
    kept = round(0.25 * len(sizes))
    result = wide(call("truncate_rank", a, ratio=0.25)).reshape(shape[0], -1)
    assert np.linalg.matrix_rank(result, tol=1e-5) == kept
    assert np.linalg.norm(result - wide(a).reshape(shape[0], -1)) == pytest.approx(np.linalg.norm(sizes[kept:]))


def test_vectors_have_no_rank_to_lose():
    a = numbers((7,), "normal", 1)
    result = call("truncate_rank", a, ratio=0.1)
    assert torch.equal(result, a)
    assert result.data_ptr() != a.data_ptr()


# --- adjust --------------------------------------------------------------------------------------------

VALUES = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)
FACTORS = {
    "input_blocks.0.0.weight": 0.99,
    "input_blocks.0.0.bias": 1.02,
    "out.0.weight": 0.98,
    "out.0.bias": 1.04,
    "out.2.weight": 0.97,
}
# 0.02 · (4, −5 + 6 + 8, 5/3 + 6 − 7, 10/3 − 7 + 8) and 0.02 · (4, 6 − 7 − 8, −7 + 8, 5)
SHIFTS = {
    "sd1": (0.08, 0.18, 0.04 / 3, 0.26 / 3),
    "sd2": (0.08, 0.18, 0.04 / 3, 0.26 / 3),
    "sdxl": (0.08, -0.18, 0.02, 0.1),
    "sdxl-refiner": (0.08, -0.18, 0.02, 0.1),
}


@pytest.mark.parametrize("family", SHIFTS)
def test_adjust_by_hand(family):
    a = torch.tensor([1.0, -2.0, 0.5, 4.0])
    for name, factor in FACTORS.items():
        close(call("adjust", a, values=VALUES, key=Key(name, family, "unet")), wide(a) * factor)
    bias = call("adjust", a, values=VALUES, key=Key("out.2.bias", family, "unet"))
    close(bias, wide(a) + SHIFTS[family])


def test_adjust_leaves_all_else():
    folds = OPERATIONS["adjust"].folds_to
    none = (0.0,) * 8
    for key in (UNET, VAE, Key("out.0.weight", "sd1", "vae"), Key("out.2.bias"), Key("out.2.weight", None, None)):
        assert folds({"values": VALUES}, key) == "a"
        assert torch.equal(call("adjust", torch.ones(4), values=VALUES, key=key), torch.ones(4))
    for name in (*FACTORS, "out.2.bias"):
        assert folds({"values": VALUES}, Key(name, "sd1", "unet")) is None
        assert folds({"values": none}, Key(name, "sd1", "unet")) == "a"
    assert folds({"values": (*none[:4], 1.0, *none[5:])}, Key("out.2.weight", "sd1", "unet")) == "a"
    assert folds({"values": (*none[:4], 1.0, *none[5:])}, Key("out.2.bias", "sd1", "unet")) is None


def test_channels_beyond_the_fourth_are_not_shifted():
    result = call("adjust", torch.zeros(8), values=VALUES, key=Key("out.2.bias", "sd1", "unet"))
    close(result, (*SHIFTS["sd1"], 0, 0, 0, 0))


# --- noise ---------------------------------------------------------------------------------------------


def test_noise_is_normal_and_as_large_as_alpha():
    a = torch.full((400, 500), 3.0)
    noise = call("random_noise", a, alpha=0.25, draw=Draw(1, "x")) - a
    assert float(noise.mean()) == pytest.approx(0.0, abs=0.003)
    assert float(noise.std()) == pytest.approx(0.25, rel=0.01)
    assert not torch.equal(noise, call("random_noise", a, alpha=0.25, draw=Draw(2, "x")) - a)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_share_and_the_mean(density):
    a = torch.full((400, 500), 3.0)
    result = call("dropout", a, density=density, draw=Draw(1, "x"))
    kept = result != 0
    assert float(kept.float().mean()) == pytest.approx(density, abs=0.005)
    assert float(result.mean()) == pytest.approx(3.0, rel=0.02)
    close(result[kept], 3.0 / density, atol=1e-5)


@pytest.mark.parametrize("density", [0.0, 1e-300, 1e-9])
def test_a_density_of_nothing_keeps_nothing(density):
    a = torch.full((4000,), 1e31)
    assert not call("dropout", a, density=density, draw=Draw(1, "x")).any()


def test_full_density_is_the_same():
    a = numbers((64,), "normal", 1)
    assert torch.equal(call("dropout", a, density=1.0, draw=Draw(1, "x")), a)
