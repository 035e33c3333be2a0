"""Our merge methods beside sd-mecha's and mergekit's, run live; where they differ, who is wrong and why.

Peers get the same float32 numbers and work in float64. Not here: mergekit's command line, which needs
transformers, and sd-mecha's rebasin, which knows SDXL's layout alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import models
import numpy as np
import pytest
import sd_mecha
import torch
from peers import Peer, mecha, mecha_merge, mergekit
from sd_mecha.extensions import merge_methods

import mergekit_sd as mk
from mergekit_sd.errors import MalformedFile, NonFiniteResult, OutputIsInput, RecipeError
from mergekit_sd.operations import OPERATIONS

# How far ours may be off, beside the largest operand: float32's steps are 1.2e-7.
SLACK = 1e-6
SHAPES = ((24,), (7, 5), (4, 10), (6, 5, 3, 3), (8, 6, 1, 1))
# Without axes of length 1; without kernels; with parts of whole rows; as matrices (of kernels) no wider than tall.
FULL = SHAPES[:4]
FLAT = SHAPES[:3]
EVEN = ((24,), (4, 10), (8, 6, 3, 3), (8, 6, 1, 1))
TALL = ((7, 5), (6, 5, 3, 3), (8, 6, 1, 1))


def ours(name: str, *operands: torch.Tensor, **parameters: Any) -> torch.Tensor:
    return OPERATIONS[name].apply(operands, parameters, None)


def normal(shape: Sequence[int], count: int) -> list[torch.Tensor]:
    """Ordinary tensors: normal numbers."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def uniform(shape: Sequence[int], count: int) -> list[torch.Tensor]:
    """What random masks are made of: numbers from 0 to 1."""
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(shape, generator=generator) for _ in range(count)]


def of_one_length(shape: Sequence[int], count: int) -> list[torch.Tensor]:
    return [each / each.norm() for each in normal(shape, count)]


def with_rows_of_one_length(shape: Sequence[int], count: int) -> list[torch.Tensor]:
    """The last one is a base: the rows from it to the others have length 1."""
    *others, base = normal(shape, count)
    return [*(base + each / each.norm(dim=-1, keepdim=True) for each in others), base]


def alike(shape: Sequence[int], count: int) -> list[torch.Tensor]:
    """Fine-tunes of one model, as far from it as a third of its size."""
    first, *others = normal(shape, count)
    return [first, *(first + each / 3 for each in others)]


def tuned(shape: Sequence[int], count: int) -> list[torch.Tensor]:
    """A base and fine-tunes that changed it alike in part, and left part of it."""
    base, change, *others = normal(shape, count + 1)
    return [base, *(torch.where(each > -0.5, base + change + each, base) for each in others)]


@dataclass(frozen=True)
class Row:
    """One of our operations and a peer's method of the same formula, on so many operands."""

    name: str
    operands: int
    parameters: Mapping[str, Any]
    peer: Peer
    numbers: Callable[[Sequence[int], int], list[torch.Tensor]] = normal
    shapes: Sequence[tuple[int, ...]] = SHAPES


def deltas(base: Any, *others: Any) -> list[Any]:
    """sd-mecha's nodes for the differences from a base."""
    return [sd_mecha.subtract(each, base) for each in others]


def onto(base: Any, delta: Any, alpha: Any = 1.0) -> Any:
    return sd_mecha.add_difference(base, delta, alpha=alpha)


def mecha_stock(base: torch.Tensor, *tuned: torch.Tensor) -> torch.Tensor:
    return mecha(lambda base, *tuned: onto(base, sd_mecha.model_stock(*deltas(base, *tuned))))(base, *tuned)


def mask_rule(mask: Any) -> Peer:
    """sd-mecha's way to write a + mask·(b − c)."""
    return mecha(lambda a, b, c: onto(a, sd_mecha.subtract(b, c), mask(a, b, c, alpha=0.7)))


# What sd-mecha has wrappers around, which have other options or raise (see below).
MECHA = {name: merge_methods.resolve(name) for name in ("rotate", "tensor_sum", "dropout")}
T = 0.3
AGREE = [
    Row("weighted_sum", 2, {"alpha": T}, mecha(lambda a, b: sd_mecha.weighted_sum(a, b, alpha=T))),
    Row("weighted_sum", 2, {"alpha": T}, mergekit("linear", weight=[0.7, 0.3])),
    Row("add_difference", 3, {"alpha": T}, mecha(lambda a, b, c: sd_mecha.add_difference(a, b, c, alpha=T))),
    # c + (a − c) + alpha·(b − c)
    Row("add_difference", 3, {"alpha": T}, mergekit("task_arithmetic", base=2, weight=[1.0, T])),
    Row("triple_sum", 3, {"alpha": T, "beta": 0.5}, mergekit("linear", weight=[0.2, 0.3, 0.5])),
    Row("slerp", 2, {"alpha": T}, mecha(lambda a, b: sd_mecha.slerp(a, b, alpha=T))),
    Row("slerp", 2, {"alpha": T}, mergekit("slerp", base=0, t=T), of_one_length),
    Row("rotate", 2, {"alpha": 1.0}, mecha(lambda a, b: MECHA["rotate"](a, b, alignment=1.0)), shapes=TALL),
    # Part of the way they go alike where no direction is mirrored.
    Row(
        "rotate",
        2,
        {"alpha": T, "beta": 0.5},
        mecha(lambda a, b: MECHA["rotate"](a, b, alignment=T, alpha=0.5)),
        alike,
        shapes=TALL,
    ),
    Row(
        "truncate_rank",
        1,
        {"ratio": 0.4},
        mecha(lambda a: sd_mecha.truncate_rank(sd_mecha.subtract(a, 0.0), rank=2, use_approximate_basis=False)),
        shapes=((7, 5), (5, 8), (5, 6, 3, 3)),
    ),
    # mergekit's rows are the last axis; with the lengths of rows it does as with those of tensors, see below.
    Row(
        "nuslerp",
        3,
        {"alpha": T},
        mergekit("nuslerp", base=2, weight=[0.7, 0.3], nuslerp_flatten=False),
        with_rows_of_one_length,
        shapes=FLAT,
    ),
    Row("geometric_sum", 2, {"alpha": T}, mecha(lambda a, b: sd_mecha.geometric_sum(a, b, alpha=T))),
    Row("perpendicular", 2, {}, mecha(sd_mecha.perpendicular_component)),
    Row("nearswap", 2, {"t": T}, mergekit("nearswap", base=0, t=T)),
    Row("arcee_fusion", 2, {}, mergekit("arcee_fusion", base=0), shapes=FLAT),
    Row("clamp", 3, {}, mecha(sd_mecha.clamp)),
    Row("clamp", 6, {"stiffness": T}, mecha(lambda *a: sd_mecha.clamp(*a, stiffness=T))),
    *(
        Row(
            "crossover",
            2,
            {"alpha": T, "tilt": tilt},
            mecha(lambda a, b, tilt=tilt: sd_mecha.crossover(a, b, alpha=T, tilt=tilt)),
            shapes=FULL,
        )
        for tilt in (0.0, 0.4, 1.0)
    ),
    *(
        Row(
            "tensor_sum",
            2,
            {"alpha": width, "beta": offset},
            mecha(lambda a, b, width=width, offset=offset: MECHA["tensor_sum"](a, b, width=width, offset=offset)),
            shapes=EVEN,
        )
        for width, offset in ((0.5, 0.0), (0.5, 0.5), (0.5, 0.75), (1.0, 0.0))
    ),
    *(
        Row("top_k_tensor_sum", 2, {"alpha": w}, mecha(lambda a, b, w=w: sd_mecha.top_k_tensor_sum(a, b, width=w)))
        for w in (0.4, 1.0)
    ),
    Row("train_difference", 3, {"alpha": 0.7}, mask_rule(sd_mecha.train_difference_mask)),
    Row("add_opposite", 3, {"alpha": 0.7}, mask_rule(sd_mecha.add_opposite_mask)),
    Row("add_strict_opposite", 3, {"alpha": 0.7}, mask_rule(sd_mecha.add_strict_opposite_mask)),
    Row("add_perpendicular", 3, {"alpha": T}, mecha(lambda a, b, c: sd_mecha.add_perpendicular(a, b, c, alpha=T))),
    Row("multiply_quotient", 3, {"alpha": T}, mecha(lambda a, b, c: sd_mecha.multiply_quotient(a, b, c, alpha=T))),
    Row("n_average", 4, {}, mecha(sd_mecha.n_average)),
    Row("n_average", 4, {}, mergekit("linear", weight=1.0)),
    Row("linear", 3, {"weights": (0.5, 2.0, 1.0)}, mergekit("linear", weight=[0.5, 2.0, 1.0])),
    Row("geometric_median", 5, {}, mecha(sd_mecha.geometric_median)),
    # Of two by halves only: see below.
    Row("multislerp", 2, {"weights": (1.0, 1.0)}, mergekit("multislerp", weight=1.0)),
    Row("karcher", 3, {"weights": (1.0, 1.0, 1.0)}, mergekit("karcher", max_iter=100, tol=1e-9)),
    Row(
        "task_arithmetic",
        3,
        {"weights": (0.7, 0.4), "scale": 0.8},
        mergekit("task_arithmetic", base=0, weight=[0.7, 0.4], **{"lambda": 0.8}),
        tuned,
    ),
    Row(
        "ties",
        4,
        {"weights": (1.0,) * 3, "density": 0.5},
        mergekit("ties", base=0, weight=1.0, density=0.5),
        tuned,
        EVEN,
    ),
    Row(
        "ties",
        4,
        {"weights": (1.0, 0.7, 0.4), "density": 0.5, "scale": 0.8},
        mergekit("ties", base=0, weight=[1.0, 0.7, 0.4], density=0.5, **{"lambda": 0.8}),
        tuned,
        EVEN,
    ),
    *(
        Row(
            "ties",
            4,
            {"weights": (1.0,) * 3, "density": 1.0, "vote": vote},
            mecha(
                lambda base, *models, vote=vote: onto(
                    base, sd_mecha.ties_sum(*deltas(base, *models), k=1.0, vote_sgn=vote == "sum")
                )
            ),
            tuned,
        )
        for vote in ("sum", "count")
    ),
    Row(
        "breadcrumbs",
        3,
        {"weights": (0.7, 0.4), "density": 0.5, "gamma": 0.25},
        mergekit("breadcrumbs", base=0, weight=[0.7, 0.4], density=0.5, gamma=0.25),
        shapes=EVEN,
    ),
    Row("sce", 4, {"density": 0.5}, mergekit("sce", base=0, select_topk=0.5), shapes=EVEN),
    Row("sce", 4, {"density": 1.0}, mergekit("sce", base=0, select_topk=1.0), tuned),
    Row("model_stock", 4, {}, mergekit("model_stock", base=0), tuned),
    # Of two models' vectors only: see below.
    Row("model_stock", 3, {}, mecha_stock, tuned, shapes=((24,), (35,))),
    Row("ram", 4, {}, mergekit("ram", base=0), tuned),
    Row("ramplus_tl", 4, {}, mergekit("ramplus_tl", base=0), tuned),
    Row("ramplus_tl", 4, {"r": 0.5, "alpha": 3.0}, mergekit("ramplus_tl", base=0, r=0.5, alpha=3.0), tuned),
]


@pytest.mark.filterwarnings("ignore:Casting complex values to real:UserWarning")  # sd-mecha's matrix power
@pytest.mark.parametrize("row", AGREE, ids=lambda row: row.name)
def test_ours_is_the_peers(row):
    for shape in row.shapes:
        operands = row.numbers(shape, row.operands)
        found = ours(row.name, *operands, **row.parameters)
        wanted = row.peer(*operands)
        largest = max(float(each.abs().max()) for each in operands)
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=SLACK * largest)


# --- random ones, given the same mask ---------------------------------------------------------------------


class Draws:
    """The numbers that an operation is to draw, one tensor for each stream."""

    def __init__(self, *numbers: torch.Tensor) -> None:
        self.numbers = numbers

    def uniform(self, like: torch.Tensor, stream: int = 0) -> torch.Tensor:
        return self.numbers[stream].clone()


def keeping(mask: torch.Tensor) -> Draws:
    """Draws that keep what the mask keeps."""
    return Draws(0.99 * (1 - mask.float()))


RANDOM = {
    "dare_linear": (
        {"weights": (0.7, 0.4), "density": 0.6},
        mergekit("dare_linear", base=0, weight=[0.7, 0.4], density=0.6, rescale=False),
        SHAPES,
    ),
    "dare_ties": (
        {"weights": (0.7, 0.4), "density": 0.6},
        mergekit("dare_ties", base=0, weight=[0.7, 0.4], density=0.6, rescale=False, normalize=True),
        SHAPES,
    ),
    # mergekit's ranks are those along dim 1: of a convolution, not of its rows.
    "della": (
        {"weights": (0.7, 0.4), "density": 0.6, "epsilon": 0.2},
        mergekit("della", base=0, weight=[0.7, 0.4], density=0.6, epsilon=0.2, rescale=False),
        FLAT,
    ),
}


@pytest.mark.parametrize("name", RANDOM)
def test_drops_are_mergekits_but_for_its_rescaling(name, monkeypatch):
    """Its masks are of our numbers, and what they keep is divided by the chance that it had to stay."""
    parameters, peer, shapes = RANDOM[name]
    for shape in shapes:
        operands, numbers = tuned(shape, 3), uniform(shape, 2)
        given = iter(numbers)

        def kept(chance: torch.Tensor, given=given) -> torch.Tensor:
            return (next(given).reshape(chance.shape) < chance) / chance

        monkeypatch.setattr(torch, "bernoulli", kept)
        found = ours(name, *operands, **parameters, draw=Draws(*numbers))
        torch.testing.assert_close(found.double(), peer(*operands), rtol=0, atol=5e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_dare_ties_is_sd_mechas(shape, monkeypatch):
    operands, numbers = tuned(shape, 3), uniform(shape, 2)
    given = iter(numbers)
    monkeypatch.setattr(torch, "bernoulli", lambda chance, generator: next(given) < chance)
    # `apply_stock` is the wrong way round, see below.
    options = {"probability": 0.4, "k": 1.0, "vote_sgn": True, "apply_stock": True}
    peer = mecha(lambda base, *models: onto(base, sd_mecha.ties_sum_with_dropout(*deltas(base, *models), **options)))
    found = ours("dare_ties", *operands, weights=(1.0, 1.0), density=0.6, draw=Draws(*numbers))
    torch.testing.assert_close(found.double(), peer(*operands), rtol=0, atol=5e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_dropout_is_sd_mechas(shape):
    (delta,) = normal(shape, 1)
    kept = torch.from_numpy(np.random.default_rng(3).binomial(n=1, p=0.75, size=shape))
    wanted = mecha(lambda a: MECHA["dropout"](sd_mecha.subtract(a, 0.0), probability=0.25, seed=3))(delta)
    found = ours("dropout", delta, density=0.75, draw=keeping(kept))
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=0)


# --- where a peer is wrong: numbers that can be checked by hand ----------------------------------------


def is_(found: torch.Tensor, wanted: object) -> None:
    torch.testing.assert_close(found.double(), torch.tensor(wanted).double(), rtol=0, atol=1e-6)


def test_mergekits_slerp_lets_norms_bulge():
    """Half way from a model of length 1 to one of length 2 at a right angle: length 1.5 at 45°."""
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    half = 1.5 * 0.5**0.5
    is_(ours("slerp", a, b, alpha=0.5), [half, half])
    is_(mecha(lambda a, b: sd_mecha.slerp(a, b, alpha=0.5))(a, b), [half, half])
    # Longer than 1.5, and 63° on the way.
    is_(mergekit("slerp", base=0, t=0.5)(a, b), [0.5**0.5, 2 * 0.5**0.5])


def test_sd_mechas_slerp_of_opposites_is_noise():
    """From a to −a there is no one arc; the straight line is at 0.7a − 0.3a."""
    a = torch.tensor([3.0, 4.0, 0.0])
    is_(ours("slerp", a, -a, alpha=0.3), [1.2, 1.6, 0.0])
    is_(mergekit("slerp", base=0, t=0.3)(a, -a), [1.2, 1.6, 0.0])
    # 0/0 to the machine: sin 180° is 1e-16, not 0, so that its guard against NaN does not help.
    noise = mecha(lambda a, b: sd_mecha.slerp(a, b, alpha=0.3))(a, -a)
    assert (noise - 0.4 * a).norm() > 0.5


def test_sd_mechas_rotation_of_wide_matrices_is_none():
    """Rows e1, e2 and their opposite turn to e5, e6 and its opposite: that is b itself."""
    e = torch.eye(6)
    a, b = (torch.stack([x, y, -x - y]) for x, y in ((e[0], e[1]), (e[4], e[5])))
    is_(ours("rotate", a, b, alpha=1.0), b.tolist())
    # It leaves in what of a is at right angles to b: the rows grow by √2.
    is_(mecha(lambda a, b: MECHA["rotate"](a, b, alignment=1.0))(a, b), (a + b).tolist())


def test_sd_mechas_perpendicular_part_to_nothing_is_nothing():
    """Every vector is at a right angle to 0: b stays."""
    a, b = torch.zeros(2), torch.tensor([3.0, 4.0])
    is_(ours("perpendicular", a, b), [3.0, 4.0])
    is_(ours("add_perpendicular", a, b, a), [3.0, 4.0])
    is_(mecha(sd_mecha.perpendicular_component)(a, b), [0.0, 0.0])
    is_(mecha(sd_mecha.add_perpendicular)(a, b, a), [0.0, 0.0])


def test_sd_mechas_top_window_begins_one_too_early():
    """Of 1, 2, 3, 4 the upper half goes where b, which descends, has its upper half."""
    a, b = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([4.0, 3.0, 2.0, 1.0])
    is_(ours("top_k_tensor_sum", a, b, alpha=0.5, beta=0.5), [4.0, 3.0, 3.0, 4.0])
    # The 2 is moved, too, over a 3.
    is_(mecha(lambda a, b: sd_mecha.top_k_tensor_sum(a, b, width=0.5, offset=0.5))(a, b), [4.0, 3.0, 2.0, 4.0])


def test_sd_mechas_crossover_knows_no_high_frequency_in_1x1_kernels():
    """The upper fifth of the frequencies from b; two more axes of length 1 have none and change nothing."""
    a, b = normal((8, 6), 2)
    kernels = [each.reshape(8, 6, 1, 1) for each in (a, b)]
    peer = mecha(lambda a, b: sd_mecha.crossover(a, b, alpha=0.2))
    is_(ours("crossover", *kernels, alpha=0.2).reshape(8, 6), peer(a, b).tolist())
    assert (peer(a, b) - a).abs().max() > 0.1
    # It divides by the number of axes: the highest of two out of four is at √½, below the cut at 0.8.
    is_(peer(*kernels), kernels[0].tolist())


def test_mergekits_fusion_takes_all_1x1_kernels():
    """A softmax over the one number of a 1×1 kernel is 1: no divergence, threshold 0, and 0 ≥ 0."""
    a, b = normal((8, 6), 2)
    kernels = [each.reshape(8, 6, 1, 1) for each in (a, b)]
    peer = mergekit("arcee_fusion", base=0)
    assert not torch.equal(peer(a, b), b.double())
    is_(ours("arcee_fusion", *kernels).reshape(8, 6), peer(a, b).tolist())
    is_(peer(*kernels), kernels[1].tolist())


def test_mergekits_multislerp_never_leaves_the_chord():
    """Three quarters of a right angle are 67.5°, as in slerp."""
    a, b, weights = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), (0.25, 0.75)
    angle = math.radians(67.5)
    is_(ours("multislerp", a, b, weights=weights), [math.cos(angle), math.sin(angle)])
    is_(mergekit("slerp", base=0, t=0.75)(a, b), [math.cos(angle), math.sin(angle)])
    # It projects the models onto the plane at their mean, where they add up to nothing: the mean's direction, 71.6°.
    is_(mergekit("multislerp", weight=list(weights))(a, b), [10**-0.5, 3 * 10**-0.5])


def test_mergekits_ties_overshoots_with_a_negative_weight():
    """One model went up by 2, one down by 2; taken away by half, it says up by 2 as well: up by 2."""
    base, up, down = torch.zeros(1), torch.tensor([2.0]), torch.tensor([-2.0])
    is_(ours("ties", base, up, down, weights=(1.0, -0.5), density=1.0), [2.0])
    # (2 + 1)/(1 − 0.5).
    is_(mergekit("ties", base=0, weight=[1.0, -0.5])(base, up, down), [6.0])


def test_sd_mechas_della_is_biased(monkeypatch):
    """A difference (1, 3) whose smaller part stays with the chance 3/8 and whose larger with 5/8."""
    base, delta, chance = torch.zeros(2), torch.tensor([1.0, 3.0]), torch.tensor([0.375, 0.625])
    options = {"probability": 0.5, "della_eps": 0.5, "k": 1.0, "apply_stock": True}
    peer = mecha(lambda base, x: onto(base, sd_mecha.ties_sum_with_dropout(*deltas(base, x), **options)))
    mine = theirs = torch.zeros(2)
    for mask in (torch.tensor(mask) for mask in ((0, 0), (0, 1), (1, 0), (1, 1))):
        share = torch.where(mask == 1, chance, 1 - chance).prod()
        keep = {"draw": keeping(mask), "weights": (1.0,), "density": 0.5, "epsilon": 0.125}
        mine = mine + share * ours("della", base, delta, **keep)

        def bernoulli(found: torch.Tensor, generator: object, mask=mask) -> torch.Tensor:
            is_(found, chance.tolist())
            return mask

        monkeypatch.setattr(torch, "bernoulli", bernoulli)
        theirs = theirs + share * peer(base, delta)
    # DELLA divides each by its own chance; it divides all by the mean of the chances.
    is_(mine, [1.0, 3.0])
    is_(theirs, [0.75, 3.75])


def test_sd_mechas_model_stock_takes_neighbours_only():
    """Of three models two are one: the mean cosine of the pairs is 1/3, t = 3c/(1 + 2c) = 0.6, times the mean."""
    base, x, y = torch.zeros(2), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    is_(ours("model_stock", base, x, y, x), [0.4, 0.2])
    is_(mergekit("model_stock", base=0)(base, x, y, x), [0.4, 0.2])
    # x·y and y·x are 0, x·x is never looked at: the base. In another order it is another model.
    is_(mecha_stock(base, x, y, x), [0.0, 0.0])
    is_(mecha_stock(base, x, x, y), [0.5, 0.25])


def test_mergekits_model_stock_turns_back_from_models_that_pull_apart():
    """A cosine of −0.6 is no angle around a common middle: nothing is known beyond the base."""
    base, x, y = torch.zeros(2), torch.tensor([1.0, 0.0]), torch.tensor([-0.6, 0.8])
    is_(ours("model_stock", base, x, y), [0.0, 0.0])
    # t = 2c/(1 + c) = −3, times the mean (0.2, 0.4): three times as far as the mean, to the other side.
    is_(mergekit("model_stock", base=0)(base, x, y), [-0.6, -1.2])


def test_sd_mechas_model_stock_goes_by_the_last_axis():
    """Model Stock has one angle per layer. At a right angle t is 0: the base."""
    x, y = (torch.tensor([[[[1.0, 0.0], [0.0, last]]]]) for last in (1.0, -1.0))
    base = torch.zeros(1, 1, 2, 2)
    is_(ours("model_stock", base, x, y), base.tolist())
    is_(mergekit("model_stock", base=0)(base, x, y), base.tolist())
    # It has one for each row of a convolution's kernel: the first rows are one, so t is 1 there.
    is_(mecha_stock(base, x, y), [[[[1.0, 0.0], [0.0, 0.0]]]])


def test_sd_mechas_top_half_of_four_is_three():
    base, delta = torch.zeros(4), torch.tensor([1.0, 2.0, 3.0, 4.0])
    is_(ours("ties", base, delta, weights=(1.0,), density=0.5), [0.0, 0.0, 3.0, 4.0])
    is_(mergekit("ties", base=0, weight=1.0, density=0.5)(base, delta), [0.0, 0.0, 3.0, 4.0])
    is_(mecha(lambda base, x: onto(base, sd_mecha.ties_sum(x, k=0.5)))(base, delta), [0.0, 2.0, 3.0, 4.0])


@pytest.mark.parametrize(("apply_stock", "found"), [(False, [1.5, 1.5]), (True, [2.0, 2.0])])
def test_sd_mechas_apply_stock_does_the_opposite(apply_stock, found):
    """The mean is (2, 2); the cosine is 0.6, so that Model Stock's t is 1.2/1.6."""
    x, y = torch.tensor([3.0, 1.0]), torch.tensor([1.0, 3.0])
    is_(ours("ties", torch.zeros(2), x, y, weights=(1.0, 1.0), density=1.0), [2.0, 2.0])
    is_(mergekit("ties", base=0, weight=1.0)(torch.zeros(2), x, y), [2.0, 2.0])
    mecha_mean = mecha(
        lambda base, *tuned: onto(
            base, sd_mecha.ties_sum_extended(*deltas(base, *tuned), k=1.0, apply_stock=apply_stock)
        )
    )
    is_(mecha_mean(torch.zeros(2), x, y), found)


def test_sd_mechas_dropout_of_two_is_half_too_much():
    """Two differences of 1, half of each dropped: DARE's rescaling is there to keep the mean at 1."""
    ones = torch.ones(10_000)
    mean = mecha(lambda *a: MECHA["dropout"](*(sd_mecha.subtract(x, 0.0) for x in a), probability=0.5, seed=0))
    halves = {"weights": (0.5, 0.5), "density": 0.5, "draw": Draws(*uniform((10_000,), 2))}
    assert ours("dare_linear", 0 * ones, ones, ones, **halves).mean().item() == pytest.approx(1.0, abs=0.05)
    assert mean(ones).mean().item() == pytest.approx(1.0, abs=0.05)
    # Three of four have one of the two or both, and their mean is doubled: 0.75·2.
    assert mean(ones, ones).mean().item() == pytest.approx(1.5, abs=0.05)


def test_mergekits_rescaling_is_biased(monkeypatch):
    """A difference (1, 3), half of it dropped: over the four masks, all of one chance, the mean is to be (1, 3)."""
    base, delta = torch.zeros(2), torch.tensor([1.0, 3.0])
    masks = [torch.tensor(mask) for mask in ((0, 0), (0, 1), (1, 0), (1, 1))]
    each = [ours("dare_linear", base, delta, weights=(1.0,), density=0.5, draw=keeping(mask)) for mask in masks]
    is_(torch.stack(each), [[0.0, 0.0], [0.0, 6.0], [2.0, 0.0], [2.0, 6.0]])
    is_(sum(each) / 4, [1.0, 3.0])
    found = []
    for mask in masks:
        monkeypatch.setattr(torch, "bernoulli", lambda _, mask=mask: mask)
        found.append(mergekit("dare_linear", base=0, weight=1.0, density=0.5)(base, delta))
    # It divides not by the density but by the share of Σ|δ| that was kept: what is small grows the most.
    is_(torch.stack(found), [[0.0, 0.0], [0.0, 4.0], [4.0, 0.0], [1.0, 3.0]])
    is_(sum(found) / 4, [1.25, 1.75])


@pytest.mark.parametrize("wrapper", ["rotate", "add_difference_ties", "add_difference_ties_extended"])
def test_sd_mecha_raises_on_models_from_files(wrapper):
    one, other = (sd_mecha.model(f"{name}.safetensors", config="sd1-ldm") for name in "ab")
    with pytest.raises(AttributeError):
        getattr(sd_mecha, wrapper)(one, other)


# --- where sd-mecha is wrong about files ----------------------------------------------------------------

IDS = models.POSITION_IDS["sd1"]
IN01, OUT11 = (models.UNET + name for name in ("input_blocks.1.0.in_layers.2.weight", "out.2.weight"))
BIAS = models.VAE + "decoder.conv_out.bias"


def few(seed: int) -> models.Tensors:
    """Some tensors of SD1: enough for both tools, and quick."""
    tensors = models.checkpoint("sd1", seed)
    return {name: tensors[name].clone() for name in (models.CONV_IN, IN01, OUT11, BIAS, IDS)}


@pytest.fixture
def pair(tmp_path):
    """Two files of few tensors."""
    return [models.write(tmp_path / f"{name}.safetensors", few(seed)) for seed, name in enumerate("ab")]


def mecha_file(pair, out, alpha=0.25) -> models.Tensors:
    """What sd-mecha makes of two files."""
    one, other = (sd_mecha.model(path, config="sd1-ldm") for path in pair)
    mecha_merge(sd_mecha.weighted_sum(one, other, alpha=alpha), output=out)
    return models.read(out)


def our_file(pair, out, alpha=0.25) -> models.Tensors:
    """What we make of them."""
    mk.save(mk.ops.weighted_sum(*map(mk.open, pair), alpha=alpha), out, force=True)
    return models.read(out)


def different(one: models.Tensors, other: models.Tensors) -> list[str]:
    """The names of tensors that are not the same but for half a step of float16."""
    return [n for n in one if not torch.allclose(one[n].float(), other[n].float(), rtol=2**-10, atol=2**-24)]


def test_files_agree_but_for_position_ids(pair, tmp_path):
    mixed, theirs = our_file(pair, tmp_path / "ours.safetensors"), mecha_file(pair, tmp_path / "theirs.safetensors")
    assert set(mixed) == set(theirs)
    assert not different(mixed, theirs)
    # Whole numbers that index a table; float16 has them all up to 2048, but loaders ask for int64.
    assert torch.equal(mixed[IDS], torch.arange(77)[None])
    assert theirs[IDS].dtype == torch.float16


def test_sd_mecha_drops_what_one_model_lacks_or_has_as_nan(pair, tmp_path):
    lacking = few(1)
    del lacking[models.CONV_IN]
    models.write(pair[1], lacking)
    assert torch.equal(our_file(pair, tmp_path / "ours.safetensors")[models.CONV_IN], few(0)[models.CONV_IN])
    lacking[IN01][0] = float("nan")
    models.write(pair[1], lacking)
    with pytest.raises(NonFiniteResult):
        our_file(pair, tmp_path / "ours.safetensors")
    # Two tensors less, no word about it.
    assert set(mecha_file(pair, tmp_path / "theirs.safetensors")) == {OUT11, BIAS, IDS}


def test_sd_mecha_takes_a_file_that_is_cut_short(pair, tmp_path):
    right = our_file(pair, tmp_path / "right.safetensors")
    pair[1].write_bytes(pair[1].read_bytes()[:-20])
    with pytest.raises(MalformedFile):
        our_file(pair, tmp_path / "ours.safetensors")
    wrong = mecha_file(pair, tmp_path / "wrong.safetensors")
    assert different(wrong, right) == [OUT11]


def test_sd_mecha_writes_into_its_input(pair, tmp_path):
    right = our_file(pair, tmp_path / "right.safetensors")
    before = pair[0].read_bytes()
    with pytest.raises(OutputIsInput):
        our_file(pair, pair[0])
    assert pair[0].read_bytes() == before
    wrong = mecha_file(pair, pair[0])
    assert {models.CONV_IN, IN01, OUT11} <= set(different(wrong, right))


def test_sd_mecha_drops_the_blocks_that_a_table_leaves_out(tmp_path):
    full = [models.write(tmp_path / f"{name}.safetensors", models.checkpoint("sd1", i)) for i, name in enumerate("ab")]
    with pytest.raises(RecipeError, match=r"No weight for \d+ tensors"):
        our_file(full, tmp_path / "ours.safetensors", alpha={"IN01": 0.25})
    table = sd_mecha.literal({"IN01": 0.25}, config="sd1-supermerger_blocks")
    theirs = mecha_file(full, tmp_path / "theirs.safetensors", alpha=sd_mecha.convert(table, "sd1-ldm"))
    assert theirs
    assert all(models.block_of(name) == "IN01" for name in theirs)
