"""Extracting a LoRA: the change between two models, layer by layer, as low-rank factors.

Owns which layers are kept at which rank, and what is told of it. Must not know files or plans: it
gets the weights of each layer from a survey, on threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from mergekit_sd.adapters.styles import ALPHA, DOWN, UP, Style, key_of
from mergekit_sd.adapters.targets import Layer, Target
from mergekit_sd.errors import MissingTensors, UsageError
from mergekit_sd.lazy import torch
from mergekit_sd.lora.factors import Factors, clamp, concatenate, decompose, split
from mergekit_sd.lora.products import hadamard, kronecker
from mergekit_sd.lora.ranks import Candidate, Rule, share_out
from mergekit_sd.lora.report import ModuleKept
from mergekit_sd.lora.svd import Decomposition, svd_by_rule
from mergekit_sd.operations.draws import Draw
from mergekit_sd.operations.survey import Models
from mergekit_sd.operations.types import Key, Tensor

MIB = 1 << 20
# Bytes of a file's header: of what it says of a tensor besides its name, at most; of metadata, about.
ENTRY, LABELS = 88, 4096
WITH_ALPHA = ("kohya", "comfyui")
Algorithm: TypeAlias = Literal["lora", "loha", "lokr", "full"]
ENCODERS: TypeAlias = Literal["keep", "drop", "threshold"]


@dataclass(frozen=True, slots=True)
class Settings:
    """What a user says of an extraction.

    `rule`: for linear layers and 1×1 convolutions, `conv_rule` for the others (None: they stay out).
    `size`: bytes for the file of all factors, shared out by what each rank gains; the rules then limit
    ranks. `clamp`: the quantile of |values| at which factors are cut off, 1 for not at all.
    `text_encoder` "threshold" leaves an encoder out whose greatest change is at most `min_diff`.
    `itemsize`: bytes of a value in the file.
    """

    rule: Rule
    conv_rule: Rule | None = None
    size: int | None = None
    clamp: float = 1.0
    text_encoder: ENCODERS = "keep"
    min_diff: float = 0.01
    style: Style = "kohya"
    itemsize: int = 2
    algorithm: Algorithm = "lora"
    alone: bool = True
    """Whether the file is to hold nothing but these layers."""


@dataclass(frozen=True, slots=True)
class Source:
    """A layer whose change is extracted: what the file will call it, and its weight in the models."""

    module: str
    layer: Layer
    target: Target
    block: str
    shape: tuple[int, ...]
    """Of the layer's weight, (out, in, …)."""

    @property
    def is_spatial(self) -> bool:
        """Whether it is a convolution over more than one pixel."""
        return math.prod(self.shape[2:]) > 1

    @property
    def cost(self) -> int:
        """The values that one rank takes."""
        return self.shape[0] + math.prod(self.shape[1:])


@dataclass(frozen=True, slots=True)
class Extracted:
    """The tensors of a LoRA file, float32, by their names there; and what became of each layer's change."""

    tensors: Mapping[str, Tensor]
    layers: tuple[ModuleKept, ...]
    dropped: Mapping[str, float] = field(default_factory=dict)
    """The text encoders that were left out, with their greatest change."""


@dataclass(frozen=True, slots=True)
class Product:
    """A change as another algorithm's product: its tensors by their part, and the sums of squares of both."""

    tensors: Mapping[str, Tensor]
    rank: int
    energy: float
    lost: float


@dataclass(frozen=True, slots=True)
class _Found:
    """What was found of a layer's change; neither `parts` nor `product` where nothing has changed."""

    source: Source
    greatest: float
    parts: Decomposition | None = None
    product: Product | None = None
    tensors: Mapping[str, Tensor] | None = None
    """As the file has them, where that needs no look at the other layers; then `parts` has the values alone."""


def extraction(settings: Settings, sources: Mapping[str, Source], seed: int) -> Callable[[Models], Extracted]:
    """A survey that extracts: of each key of `sources` it asks for the tuned model's tensor less the base's."""

    def survey(models: Models) -> Extracted:
        order = sorted(sources, key=lambda name: -math.prod(sources[name].shape))  # threads end together
        by_key = {models.keys[name]: sources[name] for name in order}

        def work(key: Key, operands: tuple[Tensor, ...]) -> _Found:
            (change,) = operands
            found = _decomposed(by_key[key], change, settings, seed)
            return found if settings.size is not None or settings.clamp < 1 else _finished(found, models, settings)

        found = dict(zip(order, models.map(work, order), strict=True))
        return _chosen([found.pop(name) for name in sources], settings)

    return survey


def _decomposed(source: Source, whole: Tensor, settings: Settings, seed: int) -> _Found:
    change = rows_of(whole, source.target)
    low, high = torch.aminmax(change)
    greatest = max(-float(low), float(high))
    if not greatest:
        return _Found(source, 0.0)
    rule = settings.conv_rule if source.is_spatial else settings.rule
    assert rule is not None
    draw = Draw(seed, source.module)
    if settings.algorithm != "lora":
        return _Found(source, greatest, product=_product(change, int(rule.amount), settings.algorithm, draw))
    return _Found(source, greatest, svd_by_rule(change.flatten(1), rule, draw=draw))


def _finished(found: _Found, models: Models, settings: Settings) -> _Found:
    """With what is written of it, and no more than that."""
    if not (found.parts or found.product):
        return found
    tensors = {name: models.held(tensor) for name, tensor in _written(found.source, found, settings).items()}
    if found.parts:
        nothing = torch.empty(0)
        return replace(found, tensors=tensors, parts=replace(found.parts, u=nothing, vh=nothing))
    return replace(found, tensors=tensors)


def _product(change: Tensor, rank: int, algorithm: Algorithm, draw: Draw) -> Product:
    """A LoHa of that rank, or a LoKr with that factor."""
    flat = change.flatten(1)
    tensors: dict[str, Tensor]
    if algorithm == "loha":
        found = hadamard(flat, rank, draw=draw)
        tensors = {f"hada_{part}": getattr(found, part) for part in ("w1_a", "w1_b", "w2_a", "w2_b")}
        tensors[ALPHA] = torch.tensor(float(len(found.w1_b)))
        near = found.change()
    else:
        product = kronecker(change, rank, draw=draw)
        assert not isinstance(product.w2, Factors)
        near = product.change().reshape(flat.shape)
        tensors = {"lokr_w1": product.w1, "lokr_w2": product.w2.reshape(len(product.w2), -1, *change.shape[2:])}
    energy, lost = (float(torch.linalg.vector_norm(each)) ** 2 for each in (flat, flat - near))
    return Product(tensors, rank, energy, lost)


def rows_of(whole: Tensor, target: Target) -> Tensor:
    """The rows of a checkpoint's tensor that a layer's weight is, as (out, in, …)."""
    if target.rows:
        index, of = target.rows
        whole = whole.tensor_split(of)[index]
    return whole.T if target.transposed else whole


def _chosen(found: list[_Found], settings: Settings) -> Extracted:
    """The factors that the settings let in, in the order of the layers. Takes `found` apart: it is half of them."""
    dropped = _dropped_encoders(found, settings)
    changed = [each for each in found if each.parts or each.product]
    held = [each for each in changed if each.source.layer.component not in dropped]
    if settings.size is not None:
        within = _within(held, settings.size - LABELS, settings)
        if held and not within:
            raise UsageError("No layer's factors fit into a file of that size.", hint="give a greater size_mb")
        held = within
    if found and settings.alone and not held:
        raise MissingTensors(
            "There is nothing to write: no layer that a LoRA is made of has changed.",
            hint="are these the right two models? `mergekit-sd diff` shows where they differ",
            details=[
                f"left out: {component}, which changed by at most {most:.2g}" for component, most in dropped.items()
            ],
        )
    written = {each.source.module: each for each in held}
    del changed, held  # else factors would be held that are done with
    tensors: dict[str, Tensor] = {}
    layers = []
    found.reverse()
    while found:
        each = found.pop()
        layers.append(_kept(each, one := written.pop(each.source.module, None), settings))
        tensors |= _written(each.source, one, settings) if one else {}
    return Extracted(tensors, tuple(layers), dropped)


def _dropped_encoders(found: list[_Found], settings: Settings) -> dict[str, float]:
    greatest: dict[str, float] = {}
    for each in found:
        component = each.source.layer.component
        if component != "unet":
            greatest[component] = max(greatest.get(component, 0.0), each.greatest)
    if settings.text_encoder == "keep":
        return {}
    least = math.inf if settings.text_encoder == "drop" else settings.min_diff
    return {component: change for component, change in greatest.items() if change <= least}


def _within(held: list[_Found], size: int, settings: Settings) -> list[_Found]:
    """The same with as much of each as is worth most within a size."""
    candidates = [
        Candidate(each.parts.spectrum.values, each.source.cost * settings.itemsize, _once(each.source, settings))
        for each in held
        if each.parts
    ]
    ranks = share_out(size, candidates)
    return [
        replace(each, parts=each.parts.first(rank))
        for each, rank in zip(held, ranks, strict=True)
        if rank and each.parts
    ]


def _once(source: Source, settings: Settings) -> int:
    """The bytes that a module takes in a file at any rank: alpha, and what the header says of its tensors."""
    has_alpha = settings.style in WITH_ALPHA
    keys = [key_of(source.module, part, settings.style) for part in (DOWN, UP, *([ALPHA] if has_alpha else []))]
    return sum(len(key) + ENTRY for key in keys) + settings.itemsize * has_alpha


def _written(source: Source, found: _Found, settings: Settings) -> dict[str, Tensor]:
    """A layer's factors under their names; alpha is the rank."""
    if found.tensors is not None:
        return dict(found.tensors)
    if found.product:
        return {key_of(source.module, part, settings.style): each for part, each in found.product.tensors.items()}
    assert found.parts is not None
    # As `split` has them, but in place: in another thread's memory, what is freed is not found again.
    factors = Factors(found.parts.u.mul_(found.parts.s.to(found.parts.u.dtype)), found.parts.vh)
    if settings.clamp < 1:
        factors = clamp(factors, settings.clamp)
    return named(source.module, factors, source.shape, settings.style)


def named(module: str, factors: Factors, shape: tuple[int, ...], style: Style) -> dict[str, Tensor]:
    """Factors as a file has them, for a weight of that shape. PEFT and diffusers have no alpha: up takes the scale."""
    up, down = factors.in_shape(shape)
    if style not in WITH_ALPHA:
        up = up * factors.scale
    made = {DOWN: down, UP: up} | ({ALPHA: torch.tensor(factors.alpha)} if style in WITH_ALPHA else {})
    return {key_of(module, part, style): tensor for part, tensor in made.items()}


def _kept(found: _Found, written: _Found | None, settings: Settings) -> ModuleKept:
    """What the file has of a layer's change; `written` may have less of it than was found."""
    source = found.source
    if found.product:
        energy, lost, rank = found.product.energy, found.product.lost, found.product.rank
        share, values = 1 - lost / energy, sum(each.numel() for each in found.product.tensors.values())
    else:
        energy = found.parts.energy if found.parts else 0.0
        parts = written.parts if written else None
        rank = len(parts.s) if parts else 0
        share, values = ((energy - _lost(parts, energy, settings)) / energy if parts else 0.0), rank * source.cost
    if written is None:
        rank, share, values = 0, 0.0, 0
    kept = math.sqrt(min(1.0, max(0.0, share))) if energy else 1.0
    return ModuleKept(source.module, source.block, rank, values * settings.itemsize, math.sqrt(energy), kept)


def _lost(parts: Decomposition, energy: float, settings: Settings) -> float:
    """The sum of the squares that factors leave out; what clamping loses besides is as good as at right angles."""
    left = max(0.0, energy - float(parts.s.square().sum()))
    if settings.clamp == 1:
        return left
    whole = split(parts)
    off = concatenate([(whole, 1.0), (clamp(whole, settings.clamp), -1.0)])
    return left + decompose(off).energy
