"""Every operation of the registry run from a recipe: the engine gives it what it asks for, whatever
the threads and the pieces; lists, settings and seeds as recipes say them.
"""

from __future__ import annotations

import models
import numpy as np
import pytest
import torch
from models import is_carried, recipe, same
from test_merge import load

import mergekit_sd as mk
from mergekit_sd import architectures
from mergekit_sd.errors import RecipeError
from mergekit_sd.execute import tasks, worker
from mergekit_sd.operations import OPERATIONS
from mergekit_sd.operations.draws import Draw
from mergekit_sd.operations.types import ChoiceKind, FormulaKind, Key, ListKind, NumberKind, SettingKind

FILES = {"a": "sd1-a.safetensors", "b": "sd1-b.safetensors", "c": "sd1-c.safetensors"}
SEED = 11
METHODS = sorted(name for name, operation in OPERATIONS.items() if not operation.planned)


def setting(parameter, models):
    """A value for a parameter that does something."""
    kind = parameter.kind
    if isinstance(kind, ChoiceKind):
        return kind.options[-1]
    if isinstance(kind, ListKind):
        return [float(number + 1) for number, _ in enumerate(kind.names)]
    assert isinstance(kind, NumberKind)
    if (kind.low, kind.high, kind.each) == (0.0, None, False) and parameter.default:
        return parameter.default
    low, high = kind.low or 0.0, 1.0 if kind.high is None else kind.high
    middle = low + 0.4 * (high - low)
    return [middle, 0.7][:models] if kind.each else middle


def step_of(operation):
    """A step of an operation: its operands by label, and the step as a recipe says it."""
    named, labels, step = iter("abc"), {}, {"op": operation.name}
    steps = {}
    for operand in operation.operands:
        if operand.many:
            step[operand.name] = list(named)[:2]
            labels |= {f"{operand.name}.{index}": name for index, name in enumerate(step[operand.name])}
        elif operand.space == "delta":
            steps["difference"] = {"op": "subtract", "a": "b", "b": "c"}
            step[operand.name] = labels[operand.name] = "difference"
        else:
            step[operand.name] = labels[operand.name] = next(named)
    many = sum("." in label for label in labels)
    step |= {parameter.name: setting(parameter, many) for parameter in operation.parameters}
    steps["m"] = step
    if operation.result == "delta":
        steps["sum"] = {"op": "add", "a": "c", "b": "m"}
    return steps, labels


class Held:
    """`operations.survey.Models` over tensors in memory."""

    def __init__(self, keys, operands):
        self.keys, self._operands = keys, operands
        self.shapes = {name: tuple(tensors[0].shape) for name, tensors in operands.items()}

    def tensors(self, name):
        return self._operands[name]

    def map(self, function, names):
        return [function(self.keys[name], self._operands[name]) for name in names]


def expected(operation, step, labels, files):
    """The result by one call for each third tensor, in memory; and the names of all that are merged."""
    architecture = architectures.get("sd1")
    wide = {letter: {name: t.float() for name, t in tensors.items()} for letter, tensors in files.items()}
    wide["difference"] = {
        name: wide["b"][name] - wide["c"][name] for name in wide["b"] if wide["b"][name].dtype == torch.float32
    }
    names = [name for name in files["a"] if not is_carried(name)]
    layout = architectures.detect({name: _info(t) for name, t in files["a"].items()})
    keys = {}
    for name in names:
        place = layout.places[name]
        inner = name.removeprefix(architecture.components[place.component])
        keys[name] = Key(inner, architecture.family, place.component, place.block)
    operands = {name: tuple(wide[letter][name] for letter in labels.values()) for name in names}
    parameters = {p.name: step[p.name] for p in operation.parameters}
    parameters = {name: tuple(v) if isinstance(v, list) else v for name, v in parameters.items()}
    survey = operation.survey(Held(keys, operands)) if operation.survey else None
    made = {}
    for name in names[::3]:  # weights and biases of every block
        context = {"key": keys[name], "draw": Draw(SEED, name), "survey": survey}
        given = {what: context[what] for what in operation.context}
        if operation.folds_to(parameters, keys[name]):
            made[name] = operands[name][0]
            continue
        made[name] = operation.apply(operands[name], {**parameters, **given}, None)
        if operation.result == "delta":
            made[name] = wide["c"][name] + made[name]
    return made, set(names)


def _info(tensor):
    from mergekit_sd.formats.dtypes import DTYPES
    from mergekit_sd.formats.tensor import TensorInfo

    names = {torch.float16: "F16", torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}
    return TensorInfo("", DTYPES[names[tensor.dtype]], tuple(tensor.shape), 0, 0)


@pytest.mark.parametrize("name", METHODS)
def test_a_recipe_does_what_the_function_says(room, name):
    operation = OPERATIONS[name]
    steps, labels = step_of(operation)
    mk.run(recipe(room, FILES, steps, seed=SEED), allow_nonfinite=True, threads=2)
    files = dict(zip("abc", load(room, "sd1-a", "sd1-b", "sd1-c"), strict=True))
    first = files["c" if operation.result == "delta" else "a"]
    oracle, merged = expected(operation, steps["m"], labels, files)
    changed = 0
    for key, tensor in models.read(room / "out.safetensors").items():
        if key not in merged:
            assert same(tensor, first[key]), key
        if key not in oracle:
            continue
        changed += not same(tensor, first[key].to(tensor.dtype))
        near = torch.isclose(tensor.float(), oracle[key].half().float(), rtol=1e-3, atol=2e-7)
        assert near.all(), f"{key}: {int((~near).sum())} of {near.numel()} elements"
    assert changed or name == "balance_attention"  # these models are narrower than its heads


@pytest.mark.parametrize("name", METHODS)
def test_pieces_and_threads_do_not_matter(tmp_path, monkeypatch, name):
    """Tensors over several small pieces, on one thread and on two."""
    for letter, seed in (("a", 0), ("b", 1), ("c", 2)):
        rng = np.random.default_rng(seed)
        tensors = {
            f"{n}.weight": torch.from_numpy(np.asarray(rng.standard_normal(s) * 0.1)).half() for n, s in SHAPES.items()
        }
        models.write(tmp_path / f"{letter}.safetensors", tensors)
    steps, _ = step_of(OPERATIONS[name])
    files = {letter: f"{letter}.safetensors" for letter in "abc"}
    where = recipe(tmp_path, files, steps, seed=SEED)
    if name in ("rebasin", "balance_attention"):  # of no family
        with pytest.raises(mk.errors.MergekitError):
            mk.run(where)
        return
    made = []
    for chunk, threads in ((1 << 18, 1), (128, 2), (64, 1)):
        monkeypatch.setattr(tasks, "CHUNK", chunk)
        monkeypatch.setattr(worker, "CHUNK", chunk)
        mk.run(where, force=True, threads=threads)
        made.append((tmp_path / "out.safetensors").read_bytes())
    assert made[0] == made[1] == made[2]


SHAPES = {"one": (700,), "two": (33, 40), "four": (8, 6, 3, 3), "none": (0,), "scalar": ()}

# --- what recipes say ---------------------------------------------------------------------------------


def refused(folder, step, match):
    with pytest.raises(RecipeError, match=match) as caught:
        mk.load(recipe(folder, FILES, {"m": step}))
    assert caught.value.line
    return caught.value


def test_a_list_needs_models(tmp_path):
    refused(tmp_path, {"op": "n_average", "models": []}, "models takes at least 1")
    refused(tmp_path, {"op": "n_average", "models": "a"}, "models takes a list in brackets")
    refused(tmp_path, {"op": "n_average", "models": ["a", 3]}, "Item 2 of models takes text")
    error = refused(tmp_path, {"op": "n_average", "models": ["a", "bb"]}, 'no model or step "bb"')
    assert error.key == "steps.m.models.1"


def test_weights_of_a_list(tmp_path):
    step = {"op": "linear", "models": ["a", "b"]}

    def weights(value):
        loaded = mk.load(recipe(tmp_path, FILES, {"m": {**step, "weights": value}}))
        return {label: each.describe() for label, each in loaded.steps["m"].parameters.items()}

    assert weights(0.5) == {"weights.0": 0.5, "weights.1": 0.5}
    assert weights([0.5, 2]) == {"weights.0": 0.5, "weights.1": 2.0}
    assert weights("0.5, 2") == {"weights.0": 0.5, "weights.1": 2.0}
    assert weights("GRAD_V") == {"weights.0": "GRAD_V", "weights.1": "GRAD_V"}
    assert weights([0.5, {"default": 0.1, "OUT03": 0.4}])["weights.1"] == {"default": 0.1, "OUT03": 0.4}
    error = refused(tmp_path, {**step, "weights": [1, 2, 3]}, "weights is a list of 3 for 2 models")
    assert "one entry for each model" in error.hint
    error = refused(tmp_path, {**step, "weights": [1, "x"]}, 'no preset "x"')
    assert error.key == "steps.m.weights.1"


def test_choices_and_lists_of_numbers(tmp_path):
    error = refused(tmp_path, {"op": "tensor_sum", "a": "a", "b": "b", "dim": 2}, "dim cannot be the number 2")
    assert error.hint == "write one of: 0, 1"
    refused(tmp_path, {"op": "cast", "a": "a", "dtype": "fp61"}, 'no dtype "fp61"')
    refused(tmp_path, {"op": "adjust", "a": "a", "values": [0] * 9}, "values takes up to 8 numbers")
    refused(tmp_path, {"op": "adjust", "a": "a", "values": "1,x"}, "OUT of values")
    loaded = mk.load(recipe(tmp_path, FILES, {"m": {"op": "adjust", "a": "a", "values": "1, 2"}}))
    assert loaded.steps["m"].settings["values"] == (1, 2, 0, 0, 0, 0, 0, 0)


def test_a_seed_only_where_there_is_chance(tmp_path):
    refused(tmp_path, {"op": "weighted_sum", "a": "a", "b": "b", "seed": 1}, '"seed" is no key')
    step = {"op": "random_noise", "a": "a", "alpha": 0.1, "seed": 5}
    assert mk.load(recipe(tmp_path, FILES, {"m": step})).steps["m"].seed == 5


def test_a_seed_makes_the_noise(room):
    step = {"op": "random_noise", "a": "a", "alpha": 0.1}
    made = []
    for top, own in ((1, {}), (1, {}), (2, {}), (2, {"seed": 1})):
        mk.run(recipe(room, FILES, {"m": step | own}, seed=top), force=True, metadata="none")
        made.append((room / "out.safetensors").read_bytes())
    assert made[0] == made[1] == made[3] != made[2]


def test_cast_is_the_dtype_that_keep_keeps(room):
    steps = {"m": {"op": "cast", "a": "b", "dtype": "bf16"}}
    outputs = {"out": {"model": "m", "file": "out.safetensors", "dtype": "keep"}}
    mk.run(recipe(room, FILES, steps, outputs))
    (b,) = load(room, "sd1-b")
    made = models.read(room / "out.safetensors")
    name = "model.diffusion_model.out.2.weight"
    assert made[name].dtype == torch.bfloat16
    assert same(made[name], b[name].bfloat16())


def test_ema_and_unet_change_places(tmp_path):
    tensors = models.with_ema(models.checkpoint("sd1", 0))
    models.write(tmp_path / "a.safetensors", tensors)
    where = recipe(tmp_path, {"a": "a.safetensors"}, {"m": {"op": "exchange_ema", "a": "a"}})
    mk.run(where)
    made = models.read(tmp_path / "out.safetensors")
    name = "model.diffusion_model.out.2.weight"
    assert same(made[name], tensors["model_ema.diffusion_modelout2weight"].to(made[name].dtype))
    models.write(tmp_path / "a.safetensors", models.checkpoint("sd1", 0))
    with pytest.raises(mk.errors.MissingTensors, match="no EMA weights"):
        mk.plan(where)


def test_the_plan_tells_lists(room):
    steps = {"m": {"op": "linear", "models": ["a", "b", "c"], "weights": [1, 2, 0.5]}}
    told = mk.plan_as_json(mk.plan(recipe(room, FILES, steps)))["steps"][0]
    assert told["operands"] == {"models": ["a", "b", "c"]}
    assert told["weights"]["weights.1"]["IN00"] == 2.0


def test_python_takes_lists(room):
    a, b, c = (mk.open(room / FILES[letter]) for letter in "abc")
    for node in (mk.ops.linear([a, b, c], weights=[1, 2, 1]), mk.ops.linear(a, b, c, weights=[1, 2, 1])):
        mk.save(node, room / "out.safetensors", force=True)
        made = models.read(room / "out.safetensors")
        name = "model.diffusion_model.out.2.weight"
        x, y, z = (models.f64(each[name]) for each in load(room, "sd1-a", "sd1-b", "sd1-c"))
        assert models.error_in_steps(made[name], (x + 2 * y + z) / 4) <= 0.6
    with pytest.raises(mk.errors.UsageError, match="no model but 3"):
        mk.ops.linear([a, 3])


def test_no_formula_kind_is_forgotten():
    kinds = (NumberKind, SettingKind, ChoiceKind, ListKind, FormulaKind)
    assert all(isinstance(p.kind, kinds) for operation in OPERATIONS.values() for p in operation.parameters)
