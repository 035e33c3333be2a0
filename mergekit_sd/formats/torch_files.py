"""Textual inversions and hypernetworks as PyTorch files: the only pickles that are written.

Owns how their flat names nest, and which of their settings are numbers. Must not know where the bytes come
from. What is written holds dictionaries, tuples, tensors, numbers and texts: `torch.load(weights_only=True)`
reads it, and equal content gives equal bytes.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from typing import Any

from mergekit_sd.formats.tensor import TensorInfo
from mergekit_sd.lazy import torch

SUFFIXES = (".pt", ".bin")
PARAMETER = "string_to_param."
TOKEN_ID = 265  # of "*" in CLIP's vocabulary, which the WebUI writes and nothing reads
NETS = re.compile(r"^(\d{1,9})\.([01])\.(.+)$")
_NUMBERS = ("step",)
_FLAGS = ("is_layer_norm", "use_dropout", "activate_output", "last_layer_dropout")
_LISTS = ("layer_structure", "dropout_structure")


def torch_file(tensors: Mapping[TensorInfo, memoryview], settings: Mapping[str, str]) -> bytes:
    """A file of these tensors, nested as their names say; the settings beside them, where its form has a place.

    `settings` are texts, as a file's metadata are.
    """
    made = {info.name: _tensor(info, data) for info, data in tensors.items()}
    nested: dict[Any, Any] = made
    if all(name.startswith(PARAMETER) for name in made):
        nested = _of_the_webui(made) | _plain(settings)
    elif all(map(NETS.match, made)):
        nested = _nets(made) | _plain(settings)
    file = io.BytesIO()  # the archive's folder would have the name of a file
    torch.save(nested, file)
    return file.getvalue()


def _tensor(info: TensorInfo, data: memoryview) -> Any:
    dtype = getattr(torch, info.dtype.torch_name)
    return (
        torch.frombuffer(bytearray(data), dtype=dtype).reshape(info.shape)
        if data
        else torch.empty(info.shape, dtype=dtype)
    )


def _of_the_webui(made: Mapping[str, Any]) -> dict[str, Any]:
    """`string_to_param`, which has one vector a row: (width,) would be read as so many vectors."""
    vectors = {name.removeprefix(PARAMETER): each.reshape(-1, each.shape[-1]) for name, each in made.items()}
    return {"string_to_token": dict.fromkeys(vectors, TOKEN_ID), "string_to_param": vectors}


def _nets(made: Mapping[str, Any]) -> dict[Any, Any]:
    """By the width of what they change, the nets for keys and for values."""
    nets: dict[Any, tuple[dict[str, Any], dict[str, Any]]] = {}
    for name, tensor in made.items():
        found = NETS.match(name)
        assert found
        nets.setdefault(int(found[1]), ({}, {}))[int(found[2])][found[3]] = tensor
    return dict(nets)


def _plain(settings: Mapping[str, str]) -> dict[str, Any]:
    return {name: value for name, text in settings.items() if (value := _value(name, text)) is not None}


def _value(name: str, text: str) -> Any:
    """A setting's value; None, as if it were not there, for a text that says none."""
    if name in _NUMBERS:
        return int(text) if text.isdecimal() and len(text) <= 18 else None
    if name in _FLAGS:
        return {"True": True, "False": False}.get(text)
    if name not in _LISTS:
        return text
    try:
        listed = json.loads(text)
    except ValueError:
        return None
    return listed if isinstance(listed, list) and all(type(each) in (int, float) for each in listed) else None
