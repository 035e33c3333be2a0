"""The layers of a checkpoint that a LoRA-family file changes.

Owns the matching of names, the telling of families, and the refusal of a file that is for another
model. Must not know formulas. No module is dropped in silence: what fits nothing is listed with why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

from mergekit_sd import architectures
from mergekit_sd.adapters.names import Adapter, Module
from mergekit_sd.adapters.styles import BIAS_PARTS, component_of, is_of_only_encoder
from mergekit_sd.adapters.targets import Kind, Layer, Layers, Target, layers_of
from mergekit_sd.architectures import Architecture, Layout
from mergekit_sd.errors import FamilyMismatch, MalformedFile
from mergekit_sd.text import count, listed

_FAMILIES = ("sd1", "sd2", "sdxl", "sdxl-refiner")
_SETTINGS = frozenset({"alpha", "scale"})
# Pieces of names that tell models we do not merge.
_OTHERS = {
    "Flux": ("double_blocks", "single_blocks", "single_transformer_blocks"),
    "Stable Diffusion 3": ("joint_blocks", "lora_te3_", "text_encoder_3."),
}
_COMPONENT_WORDS = {"unet": "UNet", "text_encoder": "text encoder", "text_encoder_2": "second text encoder"}

# By the part that tells the algorithm: the parts whose sizes along an axis give the layer's width out, and in.
# "|": the one that is there. Of LoKr, widths are products of two.
_Width: TypeAlias = tuple[tuple[str, int], ...]
_W1_OUT, _W1_IN = ("lokr_w1|lokr_w1_a", 0), ("lokr_w1|lokr_w1_b", 1)
_WIDTHS: Mapping[str, tuple[_Width, _Width]] = {
    "lora_down.weight": ((("lora_up.weight", 0),), (("lora_down.weight", 1),)),
    "hada_t1": ((("hada_w1_a", 1),), (("hada_w1_b", 1),)),
    "hada_w1_a": ((("hada_w1_a", 0),), (("hada_w1_b", 1),)),
    "lokr_t2": ((_W1_OUT, ("lokr_w2_a", 1)), (_W1_IN, ("lokr_w2_b", 1))),
    "lokr_w2": ((_W1_OUT, ("lokr_w2", 0)), (_W1_IN, ("lokr_w2", 1))),
    "lokr_w2_a": ((_W1_OUT, ("lokr_w2_a", 0)), (_W1_IN, ("lokr_w2_b", 1))),
    "diff": ((("diff", 0),), (("diff", 1),)),
}


@dataclass(frozen=True, slots=True)
class Match:
    """A module of the file and its layer; `targets`: the weight and the bias that it changes."""

    module: Module
    layer: Layer
    targets: tuple[Target, ...]


@dataclass(frozen=True, slots=True)
class Unmatched:
    """A module that nothing in the checkpoint fits, and why, as far as its name tells."""

    module: Module
    why: str


@dataclass(frozen=True, slots=True)
class Matched:
    """What a file changes in a checkpoint, in the file's order."""

    matches: tuple[Match, ...]
    unmatched: tuple[Unmatched, ...]


def match(adapter: Adapter, checkpoint: Layout | Architecture) -> Matched:
    """The layers that a file's modules are for.

    Raises FamilyMismatch if the file is for another family or fits nothing, MalformedFile where two of its
    modules change one tensor.
    """
    architecture = checkpoint if isinstance(checkpoint, Architecture) else checkpoint.architecture
    of_family = architecture is None or architecture.family in _likely_families(adapter)
    if not of_family or _other_model(adapter):
        raise _mismatch(adapter, architecture)
    layers = layers_of(checkpoint)
    matches: list[Match] = []
    unmatched: list[Unmatched] = []
    for module in adapter.modules:
        found = _layers_named(module, layers)
        targets = tuple(t for t in found[0].targets if t.kind in _kinds(module)) if len(found) == 1 else ()
        if len(targets) == len(_kinds(module)):
            matches.append(Match(module, found[0], targets))
        else:
            unmatched.append(Unmatched(module, _why_not(module, layers, found)))
    if not matches:
        raise _mismatch(adapter, architecture, [each.why for each in unmatched])
    _refuse_doubles(adapter, matches)
    return Matched(tuple(matches), tuple(unmatched))


def family_of(adapter: Adapter) -> str | None:
    """The family that a file is for, by its names and widths; None where it fits two alike.

    A file for the self-attention alone fits SD1 and SD2, one for CLIP-L alone fits SD1 and SDXL.
    """
    likely = _likely_families(adapter)
    return likely[0] if len(likely) == 1 else None


# --- one module --------------------------------------------------------------------------------------------


def _layers_named(module: Module, layers: Layers) -> list[Layer]:
    """The layers that a module's name may mean: at most one, if it says the component."""
    component, name = component_of(module.name)
    if is_of_only_encoder(module.name) and _has_two_encoders(layers):
        return []
    tables = [layers.named.get(component, {})] if component else layers.named.values()
    return [table[name] for table in tables if name in table]


def _has_two_encoders(layers: Layers) -> bool:
    return {"text_encoder", "text_encoder_2"} <= layers.named.keys()


def _why_not(module: Module, layers: Layers, found: Sequence[Layer]) -> str:
    """Why a module has no layer, or not the one that it is for."""
    component, name = component_of(module.name)
    if len(found) > 1:
        return "both text encoders have such a layer, and the name does not say which is meant"
    if found:
        return f"this layer has no {' and no '.join(sorted(k for k in _kinds(module) if not found[0].target(k)))}"
    if component and component not in layers.named:
        return f"the checkpoint holds no {_COMPONENT_WORDS[component]}"
    if is_of_only_encoder(module.name) and _has_two_encoders(layers):
        return "a name of models with one text encoder; this one has two"
    for family in _FAMILIES:
        known = _of_family(family).named
        if any(name in known.get(each, ()) for each in ([component] if component else known)):
            return f"no such layer in this model; {architectures.get(family).title} has one"
    return "no Stable Diffusion model has a layer of this name"


def _kinds(module: Module) -> set[Kind]:
    return {"bias" if part in BIAS_PARTS else "weight" for part in module.parts if part not in _SETTINGS} or {"weight"}


def _refuse_doubles(adapter: Adapter, matches: list[Match]) -> None:
    """Two names of one layer: which of them is meant, or whether both, only its maker knows."""
    first: dict[Target, str] = {}
    doubles = [
        f"{first[target]}, {each.module.name}: {target.tensor}"
        for each in matches
        for target in each.targets
        if first.setdefault(target, each.module.name) != each.module.name
    ]
    if doubles:
        raise MalformedFile(
            f"{count(len(doubles), 'tensor')} would be changed twice: the file has two names for one layer.",
            file=adapter.path,
            hint="it was put together from two files: take those",
            details=doubles,
        )


# --- families ----------------------------------------------------------------------------------------------


def _of_family(family: str) -> Layers:
    return layers_of(architectures.get(family))


def _likely_families(adapter: Adapter) -> list[str]:
    """The families with the most layers that fit: all where nothing tells, several where they fit alike."""
    scores = {family: _score(adapter, family) for family in _FAMILIES}
    best = max(scores.values())
    return [family for family, score in scores.items() if score == best]


def _score(adapter: Adapter, family: str) -> tuple[int, int]:
    """How many modules have the widths of that family's layers, and how many have their names."""
    layers, fitting, named = _of_family(family), 0, 0
    tensors = architectures.get(family).tensors
    for module in adapter.modules:
        found = [layer.target("weight") for layer in _layers_named(module, layers)]
        targets = [target for target in found if target is not None]
        named += bool(targets)
        fitting += any(_has_widths(module, target, tensors[target.tensor].shape) for target in targets)
    return fitting, named


def _has_widths(module: Module, target: Target, shape: tuple[int, ...]) -> bool:
    parts = target.rows[1] if target.rows else 1
    expected = (shape[0] // parts, shape[1] if len(shape) > 1 else None)
    widths = next((each for mark, each in _WIDTHS.items() if mark in module.parts), None)
    if widths is None:
        return False
    known = [(_width(module, width), wanted) for width, wanted in zip(widths, expected, strict=True)]
    return all(width is None or width == wanted for width, wanted in known)


def _width(module: Module, factors: _Width) -> int | None:
    """The product of the sizes that these parts have along their axes; None where one is not there."""
    sizes = list(_sizes(module, factors))
    return prod(sizes) if sizes and len(sizes) == len(factors) else None


def _sizes(module: Module, factors: _Width) -> Iterator[int]:
    for names, axis in factors:
        part = next((module.parts[name] for name in names.split("|") if name in module.parts), None)
        if part is not None and len(part.shape) > axis:
            yield part.shape[axis]


# --- refusals ----------------------------------------------------------------------------------------------


def _mismatch(adapter: Adapter, architecture: Architecture | None, why: Sequence[str] = ()) -> FamilyMismatch:
    this = "this checkpoint" + (f" is {architecture.title}" if architecture else " is of no family that we know")
    looks = _looks_like(adapter)
    if looks is None or (architecture and looks == architecture.title):
        message, hint = (
            f"Nothing in this LoRA fits; {this}.",
            "the details say what it changes: is it in the checkpoint?",
        )
    else:
        message, hint = f"This LoRA is for {looks}; {this}.", f"take a checkpoint of {looks}"
    reasons = Counter(why)
    return FamilyMismatch(
        message,
        file=adapter.path,
        hint=hint,
        details=[
            f"its names: {listed(module.name for module in adapter.modules)}",
            *(f"{count(number, 'module')}: {each}" for each, number in reasons.items()),
        ],
    )


def _looks_like(adapter: Adapter) -> str | None:
    """The model that a file's names are of, in words."""
    family = family_of(adapter)
    return _other_model(adapter) or (architectures.get(family).title if family else None)


def _other_model(adapter: Adapter) -> str | None:
    """A model that is none of Stable Diffusion's UNets; such files may have a text encoder in common with them."""
    names = [module.name for module in adapter.modules]
    return next(
        (title for title, marks in _OTHERS.items() if any(mark in name for mark in marks for name in names)), None
    )
