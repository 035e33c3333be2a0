"""Textual inversions and hypernetworks for tests, as the WebUI and diffusers save them."""

from __future__ import annotations

import itertools

import torch
from safetensors.torch import save_file

SETTINGS = {"name": "lantern", "step": 1999, "sd_checkpoint": "a9263745", "sd_checkpoint_name": "v1-5-pruned"}


def webui(path, vectors, **settings):
    """A1111's .pt."""
    value = {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, **SETTINGS, **settings}
    torch.save(value, path)
    return path


def diffusers(path, vectors, token="<cat-toy>"):
    """diffusers' .bin."""
    torch.save({token: vectors}, path)
    return path


def plain(path, vectors, name="emb_params"):
    """A .safetensors; SDXL's where the vectors are a dictionary."""
    save_file(vectors if isinstance(vectors, dict) else {name: vectors}, path)
    return path


def net(width, structure=(1, 2, 1), *, norm=False, seed=0):
    """One net as the WebUI numbers its layers: each linear one, the activation after it, a norm."""
    generator = torch.Generator().manual_seed(seed)
    tensors, place = {}, 0
    for one, two in itertools.pairwise(structure):
        shape = (int(width * two), int(width * one))
        tensors[f"linear.{place}.weight"] = torch.randn(shape, generator=generator)
        tensors[f"linear.{place}.bias"] = torch.randn(shape[:1], generator=generator)
        place += 2  # an activation lies between
        if norm:
            tensors[f"linear.{place}.weight"] = torch.randn(shape[:1], generator=generator)
            tensors[f"linear.{place}.bias"] = torch.randn(shape[:1], generator=generator)
            place += 1
    return tensors


def hypernetwork(widths=(8, 16), structure=(1, 2, 1), *, norm=False, seed=0, **settings):
    """A hypernetwork's dictionary, with the settings that the WebUI writes."""
    nets = {
        width: tuple(net(width, structure, norm=norm, seed=seed * 100 + 2 * number + which) for which in range(2))
        for number, width in enumerate(widths)
    }
    return nets | {
        "step": 5000,
        "name": "fog",
        "layer_structure": list(structure),
        "activation_func": "relu",
        "is_layer_norm": norm,
        "weight_initialization": "Normal",
        "use_dropout": True,
        "sd_checkpoint": "925997e9",
        "sd_checkpoint_name": "animefull",
        "activate_output": False,
        "last_layer_dropout": False,
        "dropout_structure": [0, 0.3, 0],
        "optional_info": "",
        **settings,
    }


def saved(path, value):
    """Any value, by torch.save."""
    torch.save(value, path)
    return path


def loaded(path):
    """A file as a careful program reads it."""
    return torch.load(path, weights_only=True)


def same(one, other):
    """Bit for bit, dtype and shape included."""
    as_bytes = [each.contiguous().reshape(-1).view(torch.uint8) for each in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*as_bytes)
