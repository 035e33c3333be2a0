"""Methods for many models on numbers that can be checked by hand, and where their formulas have corners."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import KINDS, SHAPES, numbers, strategy

from mergekit_sd.operations import OPERATIONS
from mergekit_sd.operations.draws import Draw

PURPOSES = ("mix many models", "merge fine-tunes of one base")
MANY = sorted(name for name, operation in OPERATIONS.items() if operation.purpose in PURPOSES)


def merge(name, *operands, **parameters):
    """Of plain numbers; a number for all models is repeated, as the engine does it."""
    operation = OPERATIONS[name]
    tensors = [torch.as_tensor(each, dtype=torch.float32) for each in operands]
    models = len(tensors) - len(operation.operands) + 1
    given = {parameter.name: parameter.default for parameter in operation.parameters} | parameters
    for parameter in operation.parameters:
        if getattr(parameter.kind, "each", False) and not isinstance(given[parameter.name], tuple):
            given[parameter.name] = (given[parameter.name],) * models
    if "draw" in operation.context:
        given.setdefault("draw", Draw(1, "some.weight"))
    return operation.apply(tensors, given, None)


def close(result, expected, atol=1e-6):
    torch.testing.assert_close(result, torch.as_tensor(expected, dtype=torch.float32), rtol=1e-6, atol=atol)


def folds(name, models, **parameters):
    each = [p.name for p in OPERATIONS[name].parameters if getattr(p.kind, "each", False)]
    given = {p.name: p.default for p in OPERATIONS[name].parameters} | parameters
    given |= {label: (given[label],) * models for label in each if not isinstance(given[label], tuple)}
    return OPERATIONS[name].folds_to(given)


# --- all of them -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MANY)
@settings(max_examples=60)
@given(data=st.data())
def test_any_numbers_give_finite_ones(name, data):
    """Weights that cancel or are next to nothing, parameters at their ends, every kind of tensor."""
    operation = OPERATIONS[name]
    models = data.draw(st.integers(1, 4))
    parameters = {p.name: data.draw(strategy(p.kind, models)) for p in operation.parameters}
    shape = data.draw(st.sampled_from(SHAPES))
    kinds = st.lists(st.sampled_from(KINDS), min_size=models + 1, max_size=models + 1)
    tensors = [numbers(shape, kind, seed) for seed, kind in enumerate(data.draw(kinds))]
    result = merge(name, *tensors[-models - len(operation.operands) + 1 :], **parameters)
    assert result.shape == shape
    assert torch.isfinite(result).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", MANY)
def test_what_is_not_finite_shows_whichever_model_has_it(name, bad):
    operation = OPERATIONS[name]
    for which in range(2 + len(operation.operands)):
        tensors = [numbers((8, 8), "normal", seed) for seed in range(2 + len(operation.operands))]
        tensors[which].view(-1)[5] = bad
        assert not torch.isfinite(merge(name, *tensors)).all()


@pytest.mark.parametrize("name", [name for name in MANY if OPERATIONS[name].whole])
def test_operands_may_be_views(name):
    """A transposed matrix lies otherwise in memory."""
    tensors = [numbers((6, 8), "normal", seed) for seed in range(4)]
    views = [each.T.contiguous().T for each in tensors]
    assert torch.equal(merge(name, *views), merge(name, *tensors))


# --- means -----------------------------------------------------------------------------------------------


def test_n_average_by_hand():
    close(merge("n_average", [1.0, 2.0], [3.0, -2.0], [5.0, 3.0]), [3.0, 1.0])


@pytest.mark.parametrize("weights", [(0.3, 0.3, 0.3), (1.0, -0.7, 0.1), (0.0, 0.9, 0.2), (0.5, -0.5, 0.0)])
def test_the_mean_of_equals_is_bit_for_bit(weights):
    x = numbers((1000,), "normal", 3)
    assert torch.equal(merge("linear", x, x, x, weights=weights), x)
    assert torch.equal(merge("n_average", x, x, x), x)


def test_linear_by_hand():
    close(merge("linear", [1.0, 0.0], [0.0, 1.0], weights=(3.0, 1.0)), [0.75, 0.25])
    close(merge("linear", [1.0, 5.0], [3.0, 6.0], weights=(2.0, -1.0)), [-1.0, 4.0])
    close(merge("linear", [1.0, 5.0], [3.0, 6.0], weights=(-1.0, 2.0)), [5.0, 7.0])
    close(merge("linear", [1.0, 5.0], [3.0, 6.0], weights=(-2.0, 1.0)), [-1.0, 4.0])


@pytest.mark.parametrize("weights", [(0.0, 0.0), (1.0, -1.0), (0.7, -0.7 - 1e-9)])
def test_linear_of_weights_that_cancel_is_the_mean(weights):
    close(merge("linear", [1.0, 5.0], [3.0, 6.0], weights=weights), [2.0, 5.5])


@pytest.mark.parametrize("name", ["linear", "multislerp", "karcher"])
def test_one_weight_alone_gives_its_model(name):
    assert folds(name, 1) == folds(name, 1, weights=0.0) == "models.0"
    assert folds(name, 3, weights=(0.0, 0.2, 0.0)) == "models.1"
    assert folds(name, 3, weights=(0.0, 0.2, 0.1)) is folds(name, 2, weights=0.0) is None


# --- the geometric median ----------------------------------------------------------------------------------


def distances(point, *models):
    return sum(float(torch.linalg.vector_norm(point.double() - torch.as_tensor(each).double())) for each in models)


def test_the_median_of_a_triangle_is_its_fermat_point():
    """The sides are seen under 120° from it."""
    corners = [torch.tensor(each) for each in ([0.0, 0.0], [4.0, 0.0], [1.0, 3.0])]
    found = merge("geometric_median", *corners)
    rays = [(corner - found) / torch.linalg.vector_norm(corner - found) for corner in corners]
    for one, other in ((0, 1), (1, 2), (2, 0)):
        assert float(rays[one] @ rays[other]) == pytest.approx(-0.5, abs=1e-5)


def test_the_median_is_a_corner_of_more_than_120_degrees():
    corners = [[0.0, 0.1], [3.0, 0.0], [-3.0, 0.0]]
    for turned in (corners, corners[1:] + corners[:1], corners[::-1]):
        assert merge("geometric_median", *turned).tolist() == torch.tensor(corners[0]).tolist()


def test_the_median_goes_with_the_majority():
    x, y = numbers((40,), "normal", 1), numbers((40,), "normal", 2)
    assert torch.equal(merge("geometric_median", x, y, x), x)
    close(merge("geometric_median", x, y), (x + y) / 2)
    close(merge("geometric_median", x, y, x, y), (x + y) / 2)


def test_one_odd_model_hardly_moves_the_median():
    """At a breakdown point of one half, a model a million away counts as one not far from the rest."""
    near = [numbers((400,), "normal", 0) + numbers((400,), "normal", seed) / 10 for seed in range(1, 5)]
    mean = sum(near) / 4
    found = merge("geometric_median", *near, mean + 1e6)
    assert float((found - mean).norm()) < max(float((each - mean).norm()) for each in near)


def test_a_median_that_starts_on_a_model_leaves_it():
    """The mean is a model here, where Weiszfeld's step divides by zero."""
    points = [[0.0, 0.0], [4.0, 0.0], [-1.0, 1.0], [-1.0, -1.0], [-2.0, 0.0]]
    found = merge("geometric_median", *points)
    least = min(distances(torch.tensor([-1 + x / 200, 0.0]), *points) for x in range(200))
    assert distances(found, *points) <= least + 1e-9
    assert abs(float(found[1])) < 1e-6


def test_a_median_among_many_is_the_first_on_the_way_from_the_mean():
    """All from 1 to 1.5 are as good; the mean is 1."""
    close(merge("geometric_median", [0.0], [1.0], [1.5], [1.5]), [1.0])


@settings(max_examples=40)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 99))
def test_no_point_is_nearer_to_all_than_the_median(models, size, seed):
    points = [numbers((size,), "normal", seed + index) for index in range(models)]
    found = merge("geometric_median", *points)
    best = distances(found, *points)
    for step in (*(numbers((size,), "normal", 100 + n) / 50 for n in range(20)), *(each - found for each in points)):
        assert best <= distances(found + step, *points) + 1e-6


# --- on the sphere ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["multislerp", "karcher"])
@settings(max_examples=40)
@given(st.floats(0.01, 0.99), st.integers(2, 50), st.integers(0, 50))
def test_of_two_models_it_is_slerp(name, alpha, size, seed):
    a, b = numbers((size,), "normal", seed), numbers((size,), "normal", seed + 1) * 3
    expected = OPERATIONS["slerp"].function(a, b, alpha=alpha)
    close(merge(name, a, b, weights=(1 - alpha, alpha)), expected, atol=2e-4)


@pytest.mark.parametrize("name", ["multislerp", "karcher"])
def test_of_axes_it_is_the_diagonal(name):
    axes = [[2.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 4.0]]
    close(merge(name, *axes), [math.sqrt(3.0)] * 3)


def test_the_karcher_mean_is_where_angles_balance():
    models = [numbers((5,), "normal", seed) + 0.1 for seed in range(4)]
    weights = (0.5, 1.0, 0.25, 0.7)
    mean = merge("karcher", *models, weights=weights).double()
    u = mean / mean.norm()
    pull = torch.zeros(5, dtype=torch.float64)
    for model, weight in zip(models, weights, strict=True):
        unit = model.double() / model.double().norm()
        away = unit - (unit @ u) * u
        pull += weight * math.acos(float(unit @ u)) * away / away.norm()
    assert float(pull.norm()) < 1e-6
    norms = [float(each.double().norm()) for each in models]
    assert float(mean.norm()) == pytest.approx(np.dot(weights, norms) / sum(weights), rel=1e-6)


def test_multislerp_is_not_yet_there():
    """One step from the mean direction, of which there are many where the models are far apart."""
    models = [numbers((5,), "normal", seed) for seed in range(3)]
    one, all_of_them = merge("multislerp", *models), merge("karcher", *models)
    mean = sum(each / each.norm() for each in models)
    mean *= all_of_them.norm() / mean.norm()
    assert float((one - all_of_them).norm()) < 0.5 * float((mean - all_of_them).norm())


@pytest.mark.parametrize("name", ["multislerp", "karcher"])
def test_where_there_is_no_arc_it_is_the_straight_line(name):
    x = numbers((30,), "normal", 1)
    close(merge(name, x, -x, weights=(0.75, 0.25)), x / 2)
    close(merge(name, x, -x), torch.zeros(30))
    close(merge(name, x, 3 * x), 2 * x)
    close(merge(name, x, torch.zeros(30)), x / 2)
    close(merge(name, torch.zeros(30), torch.zeros(30)), torch.zeros(30))
    close(merge(name, [1.0, 0.0], [-0.5, 0.75**0.5], [-0.5, -(0.75**0.5)]), [0.0, 0.0])


# --- task vectors -------------------------------------------------------------------------------------------


def test_task_arithmetic_by_hand():
    base, models = [1.0, 1.0], ([2.0, 1.0], [1.0, 4.0])
    close(merge("task_arithmetic", base, *models), [2.0, 4.0])
    close(merge("task_arithmetic", base, *models, weights=(0.5, -1.0)), [1.5, -2.0])
    close(merge("task_arithmetic", base, *models, weights=(0.5, -1.0), scale=2.0), [2.0, -5.0])


def test_what_no_model_changed_stays_bit_for_bit():
    base = numbers((1000,), "normal", 1)
    for name in MANY:
        if OPERATIONS[name].operands[0].name == "base":
            assert torch.equal(merge(name, base, base, base, base), base), name


@pytest.mark.parametrize("name", ["task_arithmetic", "ties", "dare_linear", "dare_ties", "della", "breadcrumbs"])
def test_without_weight_or_density_it_is_the_base(name):
    assert folds(name, 3, weights=0.0) == "base"
    if name == "task_arithmetic":
        assert folds(name, 2, scale=0.0) == "base"
        assert folds(name, 2, weights=(2.0, 0.0), scale=0.5) == "models.0"
        return
    assert folds(name, 3, density=0.0) == "base"
    assert folds(name, 3, weights=(0.0, 1.0, 0.0), density=1.0) == "models.1"
    assert folds(name, 3, weights=(0.0, 1.0, 0.0), density=0.9) is None
    assert folds(name, 3, weights=(0.0, 1.0, 1.0), density=1.0) is None
    assert folds(name, 1, weights=-1.0, density=1.0) is None
    # Where signs are elected the mean is taken: one weight counts as any other.
    assert folds(name, 1, weights=0.4, density=1.0) == (None if name in ("dare_linear", "breadcrumbs") else "models.0")


def test_breadcrumbs_by_hand():
    change = [5.0, -1.0, 9.0, -8.0, 0.0, 3.0, 4.0, -7.0, 2.0, 6.0]
    base = torch.ones(10)
    middle = torch.tensor([5.0, 0.0, 0.0, -8.0, 0.0, 0.0, 4.0, -7.0, 0.0, 6.0])
    made = merge("breadcrumbs", base, base + torch.tensor(change), density=0.5, gamma=0.1, weights=(2.0,))
    close(made, base + 2 * middle)
    # Nine tenths stay: of the three tenths that were to go from the top there is room for one.
    made = merge("breadcrumbs", base, base + torch.tensor(change), density=0.9, gamma=0.3)
    close(made, base + torch.tensor([0.0 if each == 9 else each for each in change]))
    close(merge("breadcrumbs", base, base + torch.tensor(change), density=1.0, gamma=0.3), base + torch.tensor(change))


def test_model_stock_by_hand():
    base, x, y = [0.0, 0.0], [1.0, 0.0], [0.0, 1.0]
    # Two of three are one: the mean cosine is 1/3, t = 0.6, the mean is (2/3, 1/3).
    for order in ((x, y, x), (x, x, y), (y, x, x)):
        close(merge("model_stock", base, *order), [0.4, 0.2])
    close(merge("model_stock", base, x, y), base)
    close(merge("model_stock", base, [2.0, 0.0], [1.0, 0.0]), [1.5, 0.0])
    # At 60° t = 2·½ / 1½.
    close(merge("model_stock", [1.0, 1.0], [2.0, 1.0], [1.5, 1.0 + 0.75**0.5]), [1.5, 1.0 + 0.75**0.5 / 3])


def test_model_stock_at_its_pole_is_the_base():
    base, x = numbers((20,), "normal", 1), numbers((20,), "normal", 2)
    close(merge("model_stock", base, x, 2 * base - x), base)
    close(merge("model_stock", [0.0, 0.0], [1.0, 0.0], [-0.5, 0.75**0.5], [-0.5, -(0.75**0.5)]), [0.0, 0.0])


def test_model_stock_of_one_is_the_model():
    base, x = numbers((20,), "normal", 1), numbers((20,), "normal", 2)
    assert torch.equal(merge("model_stock", base, x), x)


def test_model_stock_of_small_changes():
    """The angles of changes of 1e-7 are those of changes of 1."""
    base, x, y = torch.zeros(30), numbers((30,), "normal", 1) + 0.1, numbers((30,), "normal", 2) + 0.1
    close(merge("model_stock", base, x * 1e-7, y * 1e-7) * 1e7, merge("model_stock", base, x, y))


def test_ram_by_hand():
    base = torch.ones(4)
    models = [base + torch.tensor(each) for each in ([0.5, 0.5, 0.0, 0.125], [0.0, -0.25, 0.0, 0.0])]
    close(merge("ram", base, *models, epsilon=0.2), [1.5, 1.125, 1.0, 1.0])
    close(merge("ram", base, *models), [1.5, 1.125, 1.0, 1.125])
    # One model's own are two values, one is shared: half, of which alpha leaves 0.4, and r takes half.
    close(merge("ramplus_tl", base, *models, r=0.5, alpha=0.4), [1.6, 1.125, 1.0, 1.15])
    close(merge("ramplus_tl", base, *models, r=0.5, alpha=9.0), [1.625, 1.125, 1.0, 1.15625])


# --- elections ----------------------------------------------------------------------------------------------


def test_ties_by_hand():
    """Of each the half that changed most stays: 4 and 2 outvote −1, −3 stands alone, −6 outvotes 5."""
    base = torch.full((4,), 10.0)
    changes = ([4.0, 0.5, -3.0, 0.0], [2.0, 0.1, 1.0, 5.0], [-1.0, 0.0, 0.5, -6.0])
    models = [base + torch.tensor(each) for each in changes]
    close(merge("ties", base, *models, density=0.5), [13.0, 10.0, 7.0, 4.0])
    close(merge("ties", base, *models, density=0.5, scale=0.5), [11.5, 10.0, 8.5, 7.0])
    close(merge("ties", base, *models, density=0.5, weights=(1.0, 3.0, 1.0)), [12.5, 10.0, 7.0, 15.0])
    close(merge("ties", base, *models, density=1.0), [13.0, 10.3, 7.0, 4.0])


def test_the_two_votes():
    """One model pulls up by 5, two down by 1."""
    models = [[5.0], [-1.0], [-1.0]]
    close(merge("ties", [0.0], *models, density=1.0), [5.0])
    close(merge("ties", [0.0], *models, density=1.0, vote="count"), [-1.0])
    close(merge("ties", [0.0], *models, density=1.0, weights=(0.1, 1.0, 1.0)), [-1.0])


def test_a_draw_elects_none():
    close(merge("ties", [2.0], [3.0], [1.0], density=1.0), [2.0])
    close(merge("ties", [2.0], [5.0], [1.0], density=1.0, vote="count"), [2.0])


def test_a_weight_below_zero_turns_changes_round():
    close(merge("ties", [2.0], [3.0], density=1.0, weights=(-0.5,)), [1.0])
    # 1 and 1 agree; by Σ weight they would be divided by zero.
    close(merge("ties", [2.0], [3.0], [1.0], density=1.0, weights=(1.0, -1.0)), [3.0])


def test_a_draw_is_one_whatever_the_weight():
    """0.1·3 + 0.1·4 − 0.1·7 is no zero in float32."""
    close(merge("ties", [2.0], [5.0], [6.0], [-5.0], density=1.0, weights=0.1), [2.0])


@pytest.mark.parametrize("size", [1e-12, 1e-3, 1e6])
def test_only_the_weights_proportions_count_in_an_election(size):
    base, *models = (numbers((50,), "normal", seed) for seed in range(4))
    for name in ("ties", "dare_ties", "della"):
        made = merge(name, base, *models, weights=(size, 0.5 * size, 2 * size))
        close(made, merge(name, base, *models, weights=(1.0, 0.5, 2.0)))


def test_dare_keeps_the_mean():
    base, change = torch.zeros(40_000), torch.ones(40_000)
    for density in (0.1, 0.5, 0.9):
        made = merge("dare_linear", base, change, density=density)
        assert set(made.tolist()) == {0.0, float(torch.tensor(1.0 / density))}
        assert made.mean().item() == pytest.approx(1.0, abs=4 / math.sqrt(40_000 * density))
    # Drawn for each model by itself: a quarter is kept of both.
    made = merge("dare_linear", base, change, change)
    assert float((made == 4).float().mean()) == pytest.approx(0.25, abs=0.02)
    assert made.mean().item() == pytest.approx(2.0, abs=0.05)


def test_dropped_changes_do_not_count_in_the_mean():
    """Each of two changes of 1 is 2 when kept: the mean of those that are is 2, and 0 where none is."""
    made = merge("dare_ties", torch.zeros(4000), torch.ones(4000), torch.ones(4000), density=0.5)
    assert set(made.tolist()) == {0.0, 2.0}
    assert float((made == 2).float().mean()) == pytest.approx(0.75, abs=0.03)
    # Nor vote: −1 outvotes 3 where 3 was dropped.
    made = merge("dare_ties", torch.zeros(4000), torch.full((4000,), 3.0), -torch.ones(4000), density=0.5)
    assert set(made.tolist()) == {0.0, 6.0, -2.0}
    assert float((made == -2).float().mean()) == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della"])
@pytest.mark.parametrize("density", [0.0, 1e-30, 1e-8])
def test_next_to_no_density_is_the_base(name, density):
    """Even of what is kept first: no number is scaled up by 1e30."""

    class Lowest(Draw):
        def uniform(self, like, stream=0):
            return torch.zeros(like.shape)

    base, model = numbers((40,), "normal", 1), numbers((40,), "normal", 2)
    close(merge(name, base, model, density=density, draw=Lowest(1, "x")), base)


def test_dellas_chance_goes_by_the_rank_in_a_row():
    """The same rows in another order of columns; each change stays by its rank, and keeps its mean."""
    change = torch.tensor([[3.0, -1.0, 5.0, 2.0, -4.0], [10.0, 20.0, 50.0, -40.0, 30.0]]).repeat(20_000, 1)
    made = merge("della", torch.zeros_like(change), change, density=0.5, epsilon=0.2)
    for row, ranks in enumerate(((2, 0, 4, 1, 3), (0, 1, 4, 3, 2))):
        chances = [0.3 + 0.1 * rank for rank in ranks]
        stayed = (made[row::2] != 0).float().mean(dim=0)
        close(stayed, chances, atol=0.02)
        mean = made[row::2].double().mean(dim=0).float()
        close(mean / change[row], torch.ones(5), atol=0.05)
        close(made[row::2].abs().amax(dim=0), change[row].abs() / torch.tensor(chances), atol=1e-5)


def test_della_keeps_its_density_where_epsilon_has_no_room():
    base, model = torch.zeros(40, 500), numbers((40, 500), "normal", 2)
    for density in (0.05, 0.9):
        made = merge("della", base, model, density=density, epsilon=0.5)
        assert float((made != 0).float().mean()) == pytest.approx(density, abs=0.02)
    assert torch.equal(merge("della", base, model, density=1.0), model)
    column = merge("della", torch.zeros(20_000, 1), torch.ones(20_000, 1), density=0.5, epsilon=0.4)
    assert column.unique().tolist() == [0.0, 2.0]


def test_sce_by_hand():
    """Half of four is chosen: where the models differ by 3 and by 2, not where both changed by 4.

    Their mean squares there are as (4 + 1) to (1 + 1).
    """
    base = torch.full((4,), 10.0)
    models = [base + torch.tensor(each) for each in ([2.0, 4.0, 1.0, 0.5], [-1.0, 4.0, -1.0, 0.0])]
    # 2 outvotes −1; 1 and −1 are a draw.
    close(merge("sce", base, *models, density=0.5), [12.0, 10.0, 10.0, 10.0])
    models[1] = base + torch.tensor([-1.0, 4.0, 3.0, 0.0])
    close(merge("sce", base, *models, density=0.5), [12.0, 10.0, 10 + (5 * 1 + 10 * 3) / 15, 10.0])
    # All of it: mean squares 21.25 and 26.
    close(
        merge("sce", base, *models, density=1.0),
        [12.0, 14.0, 10 + (21.25 * 1 + 26 * 3) / 47.25, 10.5],
    )


def test_sce_of_small_changes_weighs_them_as_of_large_ones():
    """mergekit takes the models for equal where the squares are small, as those of a fine-tune are."""
    base, *models = (numbers((60,), "normal", seed) for seed in range(4))
    large = merge("sce", torch.zeros(60), *models, density=0.5)
    close(merge("sce", torch.zeros(60), *(each * 1e-6 for each in models), density=0.5) * 1e6, large)
    assert not torch.equal(large, base)


def test_sce_of_what_agrees():
    base, x = numbers((60,), "normal", 1), numbers((60,), "normal", 2)
    assert torch.equal(merge("sce", base, x, x, x, density=0.9), base)
    close(merge("sce", base, x, x, x, density=1.0), x)
    assert folds("sce", 2, density=0.0) == "base"
