"""The forms in which textual inversions and hypernetworks are stored, and which of them an output gets.

Owns the names of their tensors and their settings. Must not know how a file is put together (`formats`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from mergekit_sd.architectures import detect
from mergekit_sd.errors import UsageError, WrongFormat
from mergekit_sd.formats.torch_files import NETS, PARAMETER, SUFFIXES
from mergekit_sd.planning import surgery
from mergekit_sd.planning.expression import Expression
from mergekit_sd.planning.models import Model
from mergekit_sd.recipe.load import OutputSpec, Recipe
from mergekit_sd.text import count, listed

Style = Literal["auto", "a1111", "diffusers"]

SETTINGS = {
    "embedding": ("name", "step", "sd_checkpoint", "sd_checkpoint_name"),
    "hypernetwork": (
        *("step", "name", "layer_structure", "activation_func", "is_layer_norm", "weight_initialization"),
        *("use_dropout", "sd_checkpoint", "sd_checkpoint_name", "activate_output", "last_layer_dropout"),
        *("dropout_structure", "optional_info"),
    ),
}
"""What such files say of themselves beside their tensors, by kind."""
BOTH_ENCODERS = ("clip_l", "clip_g")
PLAIN = "emb_params"  # in safetensors, under the file's name
_PICKLES = (*SUFFIXES, ".ckpt", ".pth")
_TOKEN_IDS = "string_to_token"
_NAMELESS = ("*", PLAIN, *BOTH_ENCODERS)
_WORDS = {"embedding": "textual inversion", "hypernetwork": "hypernetwork"}


@dataclass(frozen=True, slots=True)
class Form:
    """How a step wants its result to be stored. `settings` None: those of the file that it is made of."""

    style: Style = "auto"
    settings: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Vectors:
    """A textual inversion: by text encoder ("" where there is one), and the word for it, if the file says one."""

    tensors: Mapping[str, Expression]
    token: str | None


def vectors_of(model: Model) -> Vectors:
    """The vectors of a textual inversion in any form. Raises WrongFormat for what is none."""
    check_kind(model, "embedding")
    found = {
        name.removeprefix(PARAMETER): tensor
        for name, tensor in model.tensors.items()
        if not name.startswith(_TOKEN_IDS)
        and tensor.dtype.is_float
        and len(tensor.shape) in (1, 2)
        and tensor.shape[-1]
    }
    if set(found) == set(BOTH_ENCODERS):
        return Vectors({encoder: found[encoder] for encoder in BOTH_ENCODERS}, None)
    if len(found) != 1:
        held = f"{count(len(found), 'tensor')}: {listed(found)}" if found else "no vectors"
        raise WrongFormat(
            f'"{model.name}" holds {held}; a textual inversion is one tensor, or clip_l and clip_g.',
            file=path_of(model),
            hint="`mergekit-sd inspect` tells what is in it",
        )
    ((name, tensor),) = found.items()
    return Vectors({"": tensor}, None if name in _NAMELESS else name)


def check_kind(model: Model, kind: Literal["embedding", "hypernetwork"]) -> None:
    """Raises WrongFormat for a model of another kind."""
    if model.layout.kind != kind:
        raise WrongFormat(
            f'"{model.name}" is no {_WORDS[kind]}.',
            file=path_of(model),
            hint="`mergekit-sd inspect` tells what a file is",
        )


def path_of(model: Model) -> Path | None:
    """Where a model lies, if it is a file as it is."""
    return model.file.path if model.file else None


def convert(model: Model, *, prefix: str, family: str, style: Style) -> Model:
    """The model under other names: a component's prefix, or a textual inversion's form."""
    made = surgery.convert(model, prefix=prefix, family=family)
    if style == "auto":
        return made
    check_kind(model, "embedding")
    return replace(made, form=Form(style))


# --- outputs -----------------------------------------------------------------------------------------------


def form_output(
    recipe: Recipe, spec: OutputSpec, path: Path, model: Model, metadata: Mapping[str, str]
) -> tuple[Model, dict[str, str]]:
    """A model under the names of its output's form, and the settings that stand beside its tensors.

    `metadata`: of the file that it comes from. Only textual inversions and hypernetworks have forms. Raises
    RecipeError for a suffix that promises a pickle of anything else, WrongFormat for tensors without a place.
    """
    kind, suffix = model.layout.kind, path.suffix.lower()
    writable = {"embedding": SUFFIXES, "hypernetwork": (".pt",)}.get("" if model.making else kind, ())
    if suffix in _PICKLES and suffix not in writable:
        also = f" or {' or '.join(writable)}" if writable else ""
        what = f"A {_WORDS[kind]}" if writable else "A model"
        raise recipe.error(
            f"{what} is not written as {suffix}.",
            ("outputs", spec.name, "file"),
            hint=f"name the file .safetensors{also}",
        )
    if model.making or kind not in SETTINGS:
        return model, {}
    form: Form = model.form or Form()
    said = metadata if form.settings is None else form.settings
    settings = {name: said[name] for name in SETTINGS[kind] if name in said}
    if suffix not in SUFFIXES and model.form is None and not any(name.startswith(PARAMETER) for name in model.tensors):
        return model, settings  # nothing asks for another form; a file of one tensor may be anything
    name = settings.get("name") or recipe.title or spec.name
    if kind == "hypernetwork":
        _check_nets(model)
        return model, {**settings, "name": name}
    vectors = vectors_of(model)
    name = vectors.token or name
    tensors = dict(vectors.tensors)
    if len(tensors) == 1:
        style = ("diffusers" if suffix == ".bin" else "a1111") if form.style == "auto" else form.style
        only = PARAMETER + "*" if suffix in SUFFIXES else PLAIN
        tensors = {only if style == "a1111" else _as_token(name): tensors[""]}
    return replace(model, tensors=tensors, layout=detect(tensors)), {**settings, "name": name}


def _as_token(name: str) -> str:
    """A name as the key of its vectors; dots are for the names of layers."""
    return name.replace(".", "_")


def _check_nets(model: Model) -> None:
    strangers = [name for name in model.tensors if not NETS.match(name)]
    if strangers:
        raise WrongFormat(
            f'"{model.name}" holds {count(len(strangers), "tensor")} that no hypernetwork has.',
            file=path_of(model),
            hint="`mergekit-sd inspect` tells what is in it",
            details=strangers,
        )


def settings_of(model: Model) -> Mapping[str, str]:
    """A hypernetwork's settings. Raises UsageError for a step's result, which may have lost them."""
    if model.form and model.form.settings is not None:
        settings: Mapping[str, str] = model.form.settings
        return settings
    if model.file is None:
        raise UsageError(f'The settings of "{model.name}" are not known.', hint="name a file, or merge_hypernetworks")
    return model.file.metadata
