"""Surgery in a plan: pruning, mending, taking components out and putting others in.

Owns what these do to names and places. Tensors pass unchanged: no step here computes.
"""

from __future__ import annotations

from dataclasses import replace

from mergekit_sd import architectures
from mergekit_sd.architectures import Layout, Place, Role, detect
from mergekit_sd.errors import MissingTensors, ShapeMismatch, UsageError, WrongFormat
from mergekit_sd.planning.expression import Expression, position_ids
from mergekit_sd.planning.models import Model, ema_pairs, with_ema
from mergekit_sd.text import count, listed

FAMILIES = ("sd1", "sd2", "sdxl")
OF_A_COMPONENT = (Role.weight, Role.position_ids)
WORDS = {"unet": "UNet", "vae": "VAE", "text_encoder": "text encoder", "text_encoder_2": "second text encoder"}


def prune(model: Model, *, ema: str) -> Model:
    """Without junk; EMA weights dropped, kept, or used as the UNet. Raises WrongFormat for what is not recognised."""
    places = model.layout.places
    if model.layout.architecture is None:
        raise _not_recognised(model)
    if ema == "use":
        model = with_ema(model)
    gone = {Role.junk} | ({Role.ema} if ema != "keep" else set())
    return replace(model, tensors={n: e for n, e in model.tensors.items() if places[n].role not in gone})


def _not_recognised(model: Model) -> WrongFormat:
    kind = model.layout.kind
    if kind in WORDS:
        return WrongFormat(
            f'"{model.name}" is a {WORDS[kind]} alone; only whole models are pruned.',
            hint=f"extract --component {kind} writes the {WORDS[kind]} and nothing else",
        )
    return WrongFormat(
        f'What "{model.name}" is was not recognised, so nothing in it can be called junk.',
        hint="`mergekit-sd inspect` tells what is in it",
        details=list(model.tensors),
    )


def fix(model: Model) -> Model:
    """With the position ids 0 to 76 wherever its text encoder has a place for them."""
    architecture, prefix = model.layout.architecture, model.layout.prefix_of("text_encoder")
    if architecture is None or architecture.position_ids is None or prefix is None:
        return model
    name = prefix + architecture.position_ids.removeprefix(architecture.components["text_encoder"])
    places = {**model.layout.places, name: Place("text_encoder", None, Role.position_ids)}
    ids = position_ids(architecture.position_count)
    return replace(model, layout=replace(model.layout, places=places), tensors={**model.tensors, name: ids})


def extract(model: Model, *, component: str) -> Model:
    """One component alone, names without prefix. Raises MissingTensors where there is none."""
    if component == "ema":
        model, component = with_ema(model), "unet"
    names = component_names(model, component)
    tensors = {inner: model.tensors[name] for inner, name in names.items()}
    return Model(model.name, "weight", detect(tensors), tensors, model.origin)


def convert(model: Model, *, prefix: str, family: str) -> Model:
    """A component's names with or without the prefix that whole checkpoints give it."""
    if prefix == "keep":
        return model
    places = model.layout.places
    alone = {component for name in model.tensors if (component := places[name].component)}
    if len(alone) != 1:
        raise WrongFormat(
            f'"{model.name}" is no component alone, whose prefix could be changed.',
            hint="extract --component takes one out, without prefix",
        )
    (component,) = alone
    old = model.layout.prefix_of(component) or ""
    new = _family_prefix(model, component, family) if prefix == "add" else ""
    tensors = {new + name.removeprefix(old): expression for name, expression in model.tensors.items()}
    return Model(model.name, model.space, detect(tensors), tensors, model.origin)


def _family_prefix(model: Model, component: str, family: str) -> str:
    """The prefix of a component in checkpoints of a family. Raises UsageError where the file does not tell which."""
    if family == "auto" and model.layout.architecture is not None:
        family = model.layout.architecture.family
    known = FAMILIES if family == "auto" else (family,)
    openclip = any("resblocks" in name for name in model.tensors)
    if openclip and family == "sdxl":  # a short one is taken for SD2's
        component = "text_encoder_2"
    components = [architectures.get(each).components for each in known]
    prefixes = {each[component] for each in components if component in each}
    if component == "text_encoder" and family == "auto":
        prefixes = {each for each in prefixes if (".model." in each) == openclip}
    if len(prefixes) != 1:
        raise UsageError(
            f'Which family\'s {WORDS[component]} "{model.name}" is cannot be told from its names.',
            hint='say it: family = "sd1", "sd2" or "sdxl" (--family)',
        )
    return prefixes.pop()


def exchange_ema(model: Model) -> Model:
    """The EMA weights as the UNet, the UNet's as EMA."""
    pairs = ema_pairs(model)
    back = {copy: model.tensors[name] for name, copy in pairs.items()}
    return replace(with_ema(model), tensors={**with_ema(model).tensors, **back})


def exchange(model: Model, other: Model, *, component: str) -> Model:
    """The first model with a component of the second."""
    swapped = taken_from(other, model, component)
    added = [name for name in swapped if name not in model.tensors]
    places = {**model.layout.places, **{name: Place(component, None, Role.weight) for name in added}}
    layout = replace(model.layout, places=places)
    return replace(model, layout=layout, tensors={**model.tensors, **swapped})


# --- components -----------------------------------------------------------------------------------------


def component_names(model: Model, component: str) -> dict[str, str]:
    """The tensors of a component: their names within it, and in the model. Raises MissingTensors."""
    prefix = model.layout.prefix_of(component)
    places = model.layout.places
    names = [n for n in model.tensors if places[n].component == component and places[n].role in OF_A_COMPONENT]
    if prefix is None or not names:
        there = sorted({p.component for n, p in places.items() if p.component and n in model.tensors})
        raise MissingTensors(
            f'"{model.name}" has no {WORDS[component]}.',
            hint=f"it has: {listed(there)}" if there else "`mergekit-sd inspect` tells what a file is",
        )
    return {name.removeprefix(prefix): name for name in names}


def taken_from(other: Model, model: Model, component: str) -> dict[str, Expression]:
    """A component's tensors under `model`'s names, from another model.

    As in A1111 only where `model` has the tensor; all of them where it has no such component.
    Raises MissingTensors or ShapeMismatch where the other's does not fit.
    """
    theirs = component_names(other, component)
    prefix = model.layout.prefix_of(component)
    mine = [n for n, p in model.layout.places.items() if p.component == component and n in model.tensors]
    if prefix is None or not mine:
        return {_prefix(model.layout, component) + inner: other.tensors[name] for inner, name in theirs.items()}
    wanted = {name.removeprefix(prefix): name for name in mine}
    missing = [name for inner, name in wanted.items() if inner not in theirs and model.tensors[name].dtype.is_float]
    if missing:
        raise MissingTensors(
            f'The {WORDS[component]} of "{other.name}" lacks {count(len(missing), "tensor")}.',
            hint=f"take another {WORDS[component]}",
            details=missing,
        )
    found = {name: other.tensors[theirs[inner]] for inner, name in wanted.items() if inner in theirs}
    for name, expression in found.items():
        if expression.shape != model.tensors[name].shape and expression.dtype.is_float:
            raise ShapeMismatch(
                f'The {WORDS[component]} of "{other.name}" has shape {list(expression.shape)} where '
                f'"{model.name}" has {list(model.tensors[name].shape)}.',
                key=name,
                hint=f"take a {WORDS[component]} of this family",
            )
    return found


def _prefix(layout: Layout, component: str) -> str:
    architecture = layout.architecture
    if architecture is None or component not in architecture.components:
        raise MissingTensors(
            f"There is no place for a {WORDS[component]} in it.", hint="`mergekit-sd inspect` tells what a file is"
        )
    return architecture.components[component]
