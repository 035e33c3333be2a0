"""Headers of LoRA-family files, made by code: names and shapes, no numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from mergekit_sd import architectures
from mergekit_sd.adapters.names import Adapter, read_adapter
from mergekit_sd.adapters.styles import key_of
from mergekit_sd.adapters.targets import Layer, lora_name, targets_of
from mergekit_sd.formats.dtypes import F16
from mergekit_sd.formats.tensor import FileState, ModelFile, TensorInfo

RANK = 4
FAMILIES = ("sd1", "sd2", "sdxl")


def header(
    shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str] | None = None, path: str = "x.safetensors"
) -> ModelFile:
    """A file of these tensors, read."""
    tensors = {name: TensorInfo(name, F16, shape, 0, 0) for name, shape in shapes.items()}
    return ModelFile(Path(path), "safetensors", tensors, dict(metadata or {}), FileState(0, 0, 0, 0))


def of_keys(*keys: str, metadata: Mapping[str, str] | None = None) -> Adapter:
    """The adapter of a file with these keys, 4 by 4 each."""
    return read_adapter(header(dict.fromkeys(keys, (RANK, RANK)), metadata))


def width(family: str, layer: Layer) -> tuple[int, int]:
    """A layer's width out and in, in the whole model."""
    target = layer.target("weight")
    out, inside, *_ = architectures.get(family).tensors[target.tensor].shape
    return out // (target.rows[1] if target.rows else 1), inside


def lora_shapes(family: str, layers: Iterable[Layer], style: str = "kohya") -> dict[str, tuple[int, ...]]:
    """A LoRA of these layers: its keys and shapes, with alpha where the style has one."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in layers:
        name = lora_name(layer, style, family)
        out, inside = width(family, layer)
        shapes[key_of(name, "lora_down.weight", style)] = (RANK, inside)
        shapes[key_of(name, "lora_up.weight", style)] = (out, RANK)
        if style in ("kohya", "comfyui"):
            shapes[key_of(name, "alpha", style)] = ()
    return shapes


def lora(family: str, style: str = "kohya", *, conv: bool = False, part: str = "") -> Adapter:
    """A LoRA as kohya trains it, for a whole model of a family; `part`: only layers with this in their name."""
    layers = targets_of(architectures.get(family), conv=conv)
    return read_adapter(header(lora_shapes(family, [each for each in layers if part in each.diffusers], style)))
