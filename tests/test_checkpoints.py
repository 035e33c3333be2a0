"""Checkpoints of PyTorch as people have them: what is their model, what lies around it, and every command on them."""

import collections
import pathlib
import subprocess
import sys
import types
from argparse import Namespace

import models
import numpy as np
import pickle_files as made
import pytest
import torch
from pickle_files import CONTAINERS, check, save
from witness import refuse

import mergekit_sd as mk
from mergekit_sd.errors import MalformedFile, WrongFormat
from mergekit_sd.formats.hashing import hash_file_tensors
from mergekit_sd.formats.open import open_model
from mergekit_sd.inspection import diff_files, inspect_file
from mergekit_sd.inspection.scan import nonfinite_values

# --- what lies around them ------------------------------------------------------------------------

W = {"a.weight": torch.randn(2, 3), "b.bias": torch.randn(3)}


@pytest.mark.parametrize(
    "value",
    [
        W,
        collections.OrderedDict(W),
        {"state_dict": W},
        {"state_dict": {"state_dict": W}},
        {"state_dict": collections.OrderedDict(W), "epoch": 1},
        {"model": W, "optimizer": {"state": {}}},
        {"module": W},
        {"model": {"state_dict": W}},
        collections.defaultdict(dict, {"state_dict": W}),
    ],
    ids=range(9),
)
@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_unwrapping(tmp_path, value, container):
    check(save(tmp_path / "m.ckpt", value, container), W)


def test_a_model_beside_tensors_is_no_wrapper(tmp_path):
    model = check(save(tmp_path / "m.ckpt", {"w": torch.ones(2), "model": W}), {"w": torch.ones(2)})
    assert "model: 2 tensors, 36 B, no part of the model" in model.notes


def lightning(tmp_path):
    """A training checkpoint; its classes are gone when it is read."""

    def of(name, base=object, **members):
        module, _, short = name.rpartition(".")
        for end in [at for at, sign in enumerate(module + ".") if sign == "."]:
            sys.modules[module[:end]] = types.ModuleType(module[:end])
        made_class = type(short, (base,), {"__module__": module, **members})
        setattr(sys.modules[module], short, made_class)
        return made_class

    before = set(sys.modules)
    callback = of("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")
    attributes = of("pytorch_lightning.utilities.parsing.AttributeDict", dict)
    config = of("omegaconf.listconfig.ListConfig", __reduce__=lambda self: (config, ("x",)), __init__=lambda s, x: None)
    value = {
        "epoch": 7,
        "global_step": 84_000,
        "pytorch-lightning_version": "1.4.2",
        "notes": "x" * 5000,
        "best": np.float32(0.25),
        "state_dict": W | {"steps": 5},
        "callbacks": {callback: {"best_model_score": torch.tensor(0.1), "best_model_path": pathlib.Path("a") / "b"}},
        "optimizer_states": [
            {
                "state": {
                    n: {"step": n, "exp_avg": w.clone(), "exp_avg_sq": w.clone()} for n, w in enumerate(W.values())
                },
                "param_groups": [{"lr": np.float64(1e-4), "betas": (0.9, 0.999), "params": [0, 1]}],
            }
        ],
        "lr_schedulers": [{"base_lrs": np.array([1e-4, 2e-4]), "last": np.int64(3), "kind": set("ab")}],
        "hyper_parameters": attributes(config=config(1), options=Namespace(size=512), dtype=torch.float16),
        "device": torch.device("cpu"),
    }
    path = save(tmp_path / "last.ckpt", value)
    for module in set(sys.modules) - before:
        del sys.modules[module]
    return path


@pytest.mark.parametrize("numpy", [b"numpy._core", b"numpy.core"])
def test_lightning(tmp_path, numpy):
    path = lightning(tmp_path)
    path.write_bytes(made.changed_pickle(path.read_bytes(), lambda data: data.replace(b"numpy._core", numpy)))
    model = check(path, W)
    assert model.metadata == {"epoch": "7", "global_step": "84000", "pytorch-lightning_version": "1.4.2"}
    assert "callbacks: 1 tensor, 4 B, no part of the model" in model.notes
    assert "optimizer_states: 4 tensors, 72 B, no part of the model" in model.notes
    assert "no tensors, left out of the state dict: steps" in model.notes
    reported = model.notes[-1]
    for name in (
        "ModelCheckpoint",
        "AttributeDict",
        "omegaconf.listconfig.ListConfig",
        "pathlib.",
        "argparse.Namespace",
    ):
        assert name in reported
    for name in ("numpy", " torch.", "builtins", "collections.OrderedDict"):
        assert name not in reported


def test_names_that_are_no_text(tmp_path):
    model = check(
        save(tmp_path / "m.pt", {5: torch.ones(2), ("x", 1): torch.ones(3), "w": torch.ones(1)}), {"w": torch.ones(1)}
    )
    assert "5: 1 tensor, 8 B, no part of the model" in model.notes
    assert "(an entry without a name): 1 tensor, 12 B, no part of the model" in model.notes
    odd = {"a\x1b[31m\n[/x]": torch.ones(1), "\ud800": torch.ones(2), "ü": torch.ones(3)}
    check(save(tmp_path / "m.pt", odd), odd)
    assert len(hash_file_tensors(open_model(tmp_path / "m.pt"))) == 32


@pytest.mark.parametrize("value", [{}, {"a": 1}, {"state_dict": {}}, [1], torch.ones(2), None, {"a": {"b": [1]}}])
def test_no_state_dict(tmp_path, value):
    assert "tensor" in refuse(save(tmp_path / "m.pt", value), WrongFormat).message


def test_hypernetworks_and_textual_inversions_have_names(tmp_path):
    def net(width):
        return {"linear.0.weight": torch.randn(width, width), "linear.0.bias": torch.randn(width)}

    path = save(
        tmp_path / "h.pt",
        {"step": 100, "name": "h", "layer_structure": [1, 2, 1], 4: (net(4), net(4)), 8: (net(8), net(8))},
    )
    model = open_model(path)
    assert len(model.tensors) == 8
    assert model.tensors["4.1.linear.0.weight"].shape == (4, 4)
    assert model.metadata == {"step": "100", "name": "h", "layer_structure": "[1, 2, 1]"}
    assert inspect_file(path).kind == "hypernetwork"
    vector = torch.randn(2, 8)
    for parameters in ({"*": vector}, torch.nn.ParameterDict({"*": torch.nn.Parameter(vector)})):
        value = {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": parameters, "name": "e", "step": 5}
        path = save(tmp_path / "e.pt", value)
        check(path, {"string_to_token.*": torch.tensor(265), "string_to_param.*": vector})
        assert inspect_file(path).kind == "embedding"
    clash = {"a.b": [torch.ones(1)], "a": {"b": [torch.ones(1)]}}
    assert refuse(save(tmp_path / "c.pt", clash), MalformedFile).key == "a.b.0"


# --- every command takes every format -------------------------------------------------------------


def test_the_reader_does_without_torch_and_numpy(tmp_path):
    path = save(tmp_path / "m.ckpt", {"state_dict": W, "numpy": np.float64(1)})
    code = "import sys; from mergekit_sd.formats.open import open_model; m = open_model(sys.argv[1]); "
    code += "assert len(m.tensors) == 2; assert not {'torch', 'numpy', 'pickle'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code, path], check=True, timeout=60)


@pytest.mark.parametrize("container", [*CONTAINERS, "transposed"])
def test_looking_at_a_checkpoint(tmp_path, container):
    tensors = models.checkpoint("sd1", 3)
    plain = models.write(tmp_path / "m.safetensors", tensors)
    stored = (
        {n: t.t().contiguous().t() if t.ndim == 2 else t for n, t in tensors.items()}
        if container == "transposed"
        else tensors
    )
    path = save(tmp_path / "m.ckpt", {"state_dict": stored}, container)
    assert hash_file_tensors(open_model(path)) == hash_file_tensors(open_model(plain))
    one, other = (
        inspect_file(path, hashes=True, scan=True).as_json(),
        inspect_file(plain, hashes=True, scan=True).as_json(),
    )
    assert (one["format"], other["format"]) == ("pickle", "safetensors")
    for key in ("kind", "architecture", "prediction", "tensors", "bytes", "components", "position_ids", "nonfinite"):
        assert one[key] == other[key], key
    assert diff_files(plain, path).same


def test_a_scan_finds_what_is_compressed_and_transposed(tmp_path):
    bad = torch.zeros(700, 900)
    bad[5, 7] = torch.nan
    path = save(tmp_path / "m.ckpt", {"a": bad.t(), "b": torch.zeros(2)}, "deflated")
    assert nonfinite_values(open_model(path), threads=4) == {"a": 1}


@pytest.mark.parametrize("container", [*CONTAINERS, "transposed"])
@pytest.mark.parametrize("hashing", [True, False])
def test_a_merge_with_a_checkpoint_is_the_merge_of_safetensors(room, container, hashing):
    tensors = models.read(room / "sd1-b.safetensors")
    stored = (
        {n: t.t().contiguous().t() if t.ndim == 2 else t for n, t in tensors.items()}
        if container == "transposed"
        else tensors
    )
    save(room / "b.ckpt", {"state_dict": stored, "epoch": 1}, container)
    outputs = {}
    for b in ("sd1-b.safetensors", "b.ckpt"):
        recipe = models.recipe(
            room,
            {"a": "sd1-a.safetensors", "b": b},
            {"mix": {"op": "weighted_sum", "a": "b", "b": "a", "alpha": [0.3, *[0.0, 0.5] * 12, 0.2]}},
            {"out": {"model": "mix", "file": f"{b}.out.safetensors", "dtype": "keep"}},
        )
        mk.run(recipe, metadata="none", force=True, hashing=hashing)
        outputs[b] = (room / f"{b}.out.safetensors").read_bytes()
    assert outputs["b.ckpt"] == outputs["sd1-b.safetensors"]
