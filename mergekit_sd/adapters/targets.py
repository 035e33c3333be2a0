"""The layers of a checkpoint that LoRA-family files may change, under all names that files know them by.

Owns the tables, built from the checkpoint's own names: an underscored name is looked up, never taken
apart. Must not know files of LoRAs (`matching`), shapes or values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Literal, TypeAlias

from mergekit_sd.adapters.styles import Style, comfyui_prefix, kohya_prefix
from mergekit_sd.architectures import Architecture, Layout
from mergekit_sd.formats.diffusers.names import Part, to_diffusers

Kind: TypeAlias = Literal["weight", "bias"]
_KINDS: Mapping[str, Kind] = {"weight": "weight", "bias": "bias"}

_COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
_OPENCLIP_MARKS = ("transformer.resblocks.", "token_embedding.")
_TEXT_LEVEL = "text_model."  # transformers leaves it out from 5.6 on
_SD2_TRAINED_LAYERS = 23  # of 24: SD2 looks at the last but one
_TEXT_LAYER = "text_model.encoder.layers."
_CONV_PARENTS = (".resnets.", ".downsamplers.", ".upsamplers.")


@dataclass(frozen=True, slots=True)
class Target:
    """What a layer's weight or bias is in the checkpoint: a tensor, by its logical name.

    `rows` = (index, of): only that equal share of its rows, for query, key and value in one. `transposed`: it is
    stored as (in, out).
    """

    tensor: str
    kind: Kind
    rows: tuple[int, int] | None = None
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer of a checkpoint: its names below the component, and its weight and bias as far as it has them.

    `ldm` is None for a third of fused rows, which is no layer there.
    """

    component: str
    part: Part
    diffusers: str
    ldm: str | None
    targets: tuple[Target, ...]

    def target(self, kind: Kind) -> Target | None:
        """Its weight, or its bias; None if it has none."""
        return next((target for target in self.targets if target.kind == kind), None)


@dataclass(frozen=True, slots=True)
class Layers:
    """All layers of a checkpoint, and by component the layer of every name without prefix."""

    every: tuple[Layer, ...]
    named: Mapping[str, Mapping[str, Layer]] = field(repr=False)


def layers_of(source: Layout | Architecture) -> Layers:
    """The layers of a checkpoint, or of a whole model of an architecture."""
    if isinstance(source, Architecture):
        return _layers_of_architecture(source)
    return _layers(
        (place.component, name, source.prefix_of(place.component) or "")
        for name, place in source.places.items()
        if place.component in _COMPONENTS
    )


def targets_of(source: Layout | Architecture, *, conv: bool = False) -> tuple[Layer, ...]:
    """The layers that kohya's sd-scripts trains, in the checkpoint's order.

    All linear and convolution layers of the UNet's transformers; attention and MLP of the text encoders, without
    the last of SD2's 24 layers. `conv` adds the residual blocks and samplers.
    """
    return tuple(layer for layer in layers_of(source).every if _is_trained(layer, conv))


def lora_name(layer: Layer, style: Style, family: str) -> str:
    """What files of a style call a layer of a model of this family.

    kohya writes diffusers' names, but LDM's for SDXL's UNet; ComfyUI writes LDM's for every UNet.
    """
    two_encoders = family.startswith("sdxl")
    if style == "kohya":
        name = layer.ldm if two_encoders and layer.part == "unet" else layer.diffusers
        return kohya_prefix(layer.component, two_encoders=two_encoders) + (name or layer.diffusers).replace(".", "_")
    if style == "comfyui":
        name = layer.ldm if layer.part == "unet" else layer.diffusers
        return comfyui_prefix(layer.component, layer.part) + (name or layer.diffusers)
    return f"{layer.component}.{layer.diffusers}"


@cache
def _layers_of_architecture(architecture: Architecture) -> Layers:
    return _layers(
        (spec.component, name, architecture.components[spec.component])
        for name, spec in architecture.tensors.items()
        if spec.component in _COMPONENTS
    )


def _layers(tensors: Iterable[tuple[str, str, str]]) -> Layers:
    """The layers that these tensors make up: each with its component, its name, and the prefix in it."""
    bare: dict[str, dict[str, str]] = {}
    for component, tensor, prefix in tensors:
        bare.setdefault(component, {})[tensor.removeprefix(prefix)] = tensor
    every: list[Layer] = []
    named: dict[str, dict[str, Layer]] = {}
    for component, names in bare.items():
        found = list(_of_component(component, names))
        every += found
        named[component] = {name: layer for layer in found for name in _spellings(layer)}
    return Layers(tuple(every), named)


def _of_component(component: str, tensors: Mapping[str, str]) -> Iterator[Layer]:
    part = _part(component, tensors)
    targets: dict[str, list[Target]] = {}
    ldm: dict[str, str | None] = {}
    for name, tensor in tensors.items():
        for twin in to_diffusers(part, name):
            layer, _, kind = twin.name.rpartition(".")
            if kind in _KINDS:
                targets.setdefault(layer, []).append(Target(tensor, _KINDS[kind], twin.rows, twin.transposed))
                ldm[layer] = None if twin.rows else name.removesuffix(f".{kind}")
    for layer, found in targets.items():
        yield Layer(component, part, layer, ldm[layer], tuple(found))


def _part(component: str, names: Iterable[str]) -> Part:
    if component == "unet":
        return "unet"
    return "openclip" if any(name.startswith(_OPENCLIP_MARKS) for name in names) else "clip"


def _spellings(layer: Layer) -> Iterator[str]:
    """Every name that a file may have for a layer, with dots and with underscores."""
    names = [layer.diffusers]
    if layer.part != "unet":
        names.append(layer.diffusers.removeprefix(_TEXT_LEVEL))
    elif layer.ldm is not None:
        names.append(layer.ldm)
    for name in names:
        yield name
        yield name.replace(".", "_")


def _is_trained(layer: Layer, conv: bool) -> bool:
    name = layer.diffusers
    if "norm" in name.rpartition(".")[2]:
        return False
    if layer.part == "unet":
        return ".attentions." in name or (conv and any(parent in name for parent in _CONV_PARENTS))
    if not name.startswith(_TEXT_LAYER):
        return False
    is_sd2 = layer.part == "openclip" and layer.component == "text_encoder"
    return not is_sd2 or int(name.removeprefix(_TEXT_LAYER).partition(".")[0]) < _SD2_TRAINED_LAYERS
