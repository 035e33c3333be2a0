"""A folder as diffusers saves models, opened as one model with LDM's names.

Owns what the folder must hold, and which of its files are read: weights in several variants, in pieces
with an index. Must not know the formats of those files.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from mergekit_sd.errors import MalformedFile, MissingInput, WrongFormat
from mergekit_sd.formats.diffusers.names import Part
from mergekit_sd.formats.diffusers.renaming import in_ldm_names, knows, part_of, text_part
from mergekit_sd.formats.dtypes import F32
from mergekit_sd.formats.tensor import FilePart, FileState, ModelFile, TensorInfo, View
from mergekit_sd.formats.views import Shift, Shifted
from mergekit_sd.text import did_you_mean, listed, shown

MODEL_INDEX = "model_index.json"
MAX_JSON = 32 << 20  # bytes: the index of a model in pieces names every tensor
COMPONENTS: Mapping[str, tuple[str, str]] = {  # what people call them, and their class
    "unet": ("UNet", "UNet2DConditionModel"),
    "vae": ("VAE", "AutoencoderKL"),
    "text_encoder": ("text encoder", "CLIPTextModel"),
    "text_encoder_2": ("second text encoder", "CLIPTextModelWithProjection"),
}

_BESIDE = ("scheduler", "tokenizer", "safety_checker", "feature_extractor", "image_encoder")
_AGAIN = "download or copy the folder again, whole"
_WEIGHTS = re.compile(r"(?:diffusion_pytorch_model|model|pytorch_model)(?:\.([\w-]+))?\.(safetensors|bin)")
_INDEX = re.compile(
    r"(?:diffusion_pytorch_model|model|pytorch_model)(?:\.([\w-]+))?\.(safetensors|bin)\.index(?:\.([\w-]+))?\.json"
)

Reader: TypeAlias = Callable[[Path], ModelFile]


def is_diffusers_folder(path: Path) -> bool:
    """Whether diffusers would take a folder for a model."""
    return os.path.isfile(path / MODEL_INDEX)  # noqa: PTH113  unlike Path.is_file, it never raises


def open_folder(folder: Path, read: Reader) -> ModelFile:
    """The model in a folder; `read` reads one file of weights.

    Raises WrongFormat for pipelines other than Stable Diffusion 1, 2 and XL, MissingInput and
    MalformedFile for what is missing or damaged.
    """
    index = _json(folder / MODEL_INDEX)
    wanted = _components(folder, index)
    components = {name: _component(folder, name, read) for name in wanted}
    activations = {name: activation(folder / name) for name in wanted if name.startswith("text")}
    parts: dict[str, Part] = {"unet": "unet", "vae": "vae"}
    parts |= {name: text_part(components[name].tensors, activations[name]) for name in activations}
    for name, model in components.items():
        if not knows(parts[name], model.tensors):
            message = (
                f"Its {COMPONENTS[name][0]} is not that of a Stable Diffusion model: its tensors have other names."
            )
            raise WrongFormat(message, file=model.path, hint="take a folder of SD1, SD2 or SDXL")
    prefixes = _prefixes(parts)
    renamed = [in_ldm_names(model, parts[name], prefixes[name]) for name, model in components.items()]
    left_out = [name for name, entry in index.items() if _class(entry) and not name.startswith((*_BESIDE, *wanted))]
    notes = [note for model in renamed for note in model.notes]
    notes += [f"left out, as no part of a checkpoint: {listed(left_out)}"] if left_out else []
    found = combined(folder, renamed, renamed[0].metadata, tuple(notes))
    return _with_prediction(found, _scheduler(folder), is_xl="text_encoder_2" in components)


def activation(folder: Path) -> str | None:
    """The `hidden_act` that the configuration of a text encoder names, if there is one."""
    try:
        found = json.loads((folder / "config.json").read_bytes()[:MAX_JSON])
    except (OSError, ValueError, RecursionError):
        return None
    return found.get("hidden_act") if isinstance(found, dict) and isinstance(found.get("hidden_act"), str) else None


def single_file(model: ModelFile) -> ModelFile:
    """A file that is one of diffusers' components, under LDM's names without prefix; any other as it is."""
    beside = activation(model.path.parent) if _WEIGHTS.fullmatch(model.path.name) else None
    part = part_of(model.tensors, beside)
    if part is None:
        return model
    found = in_ldm_names(model, part)
    return found if found is model else replace(found, notes=(*found.notes, "diffusers' names are told as LDM's"))


def folder_hint(folder: Path) -> str | None:
    """What to do with a folder where a file is wanted, if it looks like one of diffusers'; None for any other."""
    if is_diffusers_folder(folder):
        return "hashes are those of single files: name one of the files in it"
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError:
        return None
    weights = [name for name in names if _WEIGHTS.fullmatch(name)]
    if weights and "config.json" in names:
        return f"name the file in it: {shown(weights[0])}"
    if any((folder / name / "config.json").is_file() for name in COMPONENTS):
        return f"it looks like a folder of diffusers without its {MODEL_INDEX}: {_AGAIN}"
    return None


# --- what the folder says of itself -------------------------------------------------------------------


def _json(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(MAX_JSON))
    except OSError as error:
        raise MissingInput(f"It cannot be read: {error.strerror}.", file=path, hint=_AGAIN) from error
    except (ValueError, RecursionError) as error:
        raise MalformedFile("This is not valid JSON.", file=path, hint=_AGAIN) from error
    if not isinstance(found, dict):
        raise MalformedFile("This is not a JSON object.", file=path, hint=_AGAIN)
    return found


def _class(entry: object) -> str | None:
    """The class that an entry of the index names; [null, null] stands for a component that is left out."""
    match entry:
        case [_, str() as name]:
            return name
    return None


def _components(folder: Path, index: Mapping[str, object]) -> list[str]:
    """The components that are there, the UNet first."""
    pipeline = index.get("_class_name")
    named = f"a {shown(pipeline)}" if isinstance(pipeline, str) else "of an unknown pipeline"
    found = [name for name in COMPONENTS if _class(index.get(name))]
    if "unet" not in found:
        message = f"This folder is {named}, which has no UNet: it is no Stable Diffusion 1, 2 or XL."
        raise WrongFormat(message, file=folder, hint="take a folder of SD1, SD2 or SDXL")
    for name in found:
        words, kind = COMPONENTS[name]
        theirs = str(_class(index[name]))
        if theirs != kind and not (theirs.startswith("CLIPTextModel") and kind.startswith("CLIPTextModel")):
            message = f"This folder is {named}: its {words} is a {shown(theirs)}, not Stable Diffusion's {kind}."
            raise WrongFormat(message, file=folder, hint="take a folder of SD1, SD2 or SDXL")
    return found


def _prefixes(parts: Mapping[str, Part]) -> dict[str, str]:
    """What LDM's names of each component start with."""
    inner = {"clip": "transformer.", "openclip": "model."}
    encoders = [name for name in parts if name.startswith("text")]
    if "text_encoder_2" in parts:  # SDXL; its refiner has the second one only
        starts = [f"conditioner.embedders.{number}." for number in range(len(encoders))]
    else:
        starts = ["cond_stage_model."] * len(encoders)
    prefixes = {name: start + inner[parts[name]] for name, start in zip(encoders, starts, strict=True)}
    return {"unet": "model.diffusion_model.", "vae": "first_stage_model.", **prefixes}


def _scheduler(folder: Path) -> dict[str, Any]:
    path = folder / "scheduler" / "scheduler_config.json"
    return _json(path) if path.exists() else {}


def _with_prediction(model: ModelFile, scheduler: Mapping[str, Any], *, is_xl: bool) -> ModelFile:
    """What the scheduler says of the prediction, told as single files tell it: by metadata, and SDXL's by markers."""
    said = {"v_prediction": "v", "epsilon": "epsilon"}.get(str(scheduler.get("prediction_type", "epsilon")))
    if said is None or not scheduler:
        return model
    markers = []
    if is_xl and said == "v":
        markers = ["v_pred", *(["ztsnr"] if scheduler.get("rescale_betas_zero_snr") is True else [])]
    tensors = {**model.tensors, **{name: TensorInfo(name, F32, (0,), 0, 0) for name in markers}}
    return replace(model, tensors=tensors, metadata={"modelspec.prediction_type": said, **model.metadata})


# --- files of weights ---------------------------------------------------------------------------------


def _component(folder: Path, name: str, read: Reader) -> ModelFile:
    words, place = COMPONENTS[name][0], folder / name
    try:
        names = sorted(path.name for path in place.iterdir())
    except OSError:
        message = f"The folder's {MODEL_INDEX} names a {words}, but this folder of it is not there."
        raise MissingInput(message, file=place, hint=_AGAIN) from None
    chosen, variant = _chosen(place, words, names)
    found = _in_pieces(chosen, read) if chosen.suffix == ".json" else read(chosen)
    return replace(found, notes=(*found.notes, f"{words}: the {variant} variant")) if variant else found


def _chosen(place: Path, words: str, names: Sequence[str]) -> tuple[Path, str]:
    """The file of weights, or the index of its pieces, and its variant: "" for the plain one, which comes first."""
    ranked = []
    for name in names:
        if match := _WEIGHTS.fullmatch(name):
            variant, suffix, in_pieces = match[1] or "", match[2], False
        elif match := _INDEX.fullmatch(name):
            variant, suffix, in_pieces = match[1] or match[3] or "", match[2], True
        else:
            continue
        ranked.append((variant, suffix == "bin", in_pieces, name))
    if not ranked:
        message = f"The folder's {MODEL_INDEX} names a {words}, but there is no file of its weights."
        raise MissingInput(message, file=place, hint=_AGAIN)
    variant, _, _, name = min(ranked)
    variants = sorted({each[0] for each in ranked})
    if variant and len(variants) > 1:
        message = f"The {words} is there in several variants, and not in the plain one: {listed(variants)}."
        raise WrongFormat(message, file=place, hint="take all but one of them out of the folder")
    return place / name, variant


def _in_pieces(index: Path, read: Reader) -> ModelFile:
    """The tensors of an index's files."""
    said = _json(index).get("weight_map")
    if not isinstance(said, dict) or not said:
        raise MalformedFile("The index has no weight_map.", file=index, hint=_AGAIN)
    names = dict.fromkeys(said.values())
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            _bad_piece(index, f"The index names what is no file beside it: {shown(repr(name))}.")
    pieces = [_piece(index, name, {key for key, where in said.items() if where == name}, read) for name in names]
    return combined(index, pieces, pieces[0].metadata, tuple(note for each in pieces for note in each.notes))


def _piece(index: Path, name: str, wanted: set[str], read: Reader) -> ModelFile:
    path = index.with_name(name)
    if not path.is_file():
        there = (each.name for each in index.parent.iterdir() if each.suffix == path.suffix)
        message = f"{shown(index.name)} names this file, which is not there."
        raise MissingInput(message, file=path, hint=did_you_mean(name, there) or _AGAIN)
    model = read(path)
    missing = sorted(wanted - model.tensors.keys())
    if missing:
        message = f"{shown(index.name)} says that this file holds tensors that it does not."
        raise MalformedFile(message, file=path, key=missing[0], hint=_AGAIN, details=missing)
    return replace(model, tensors={key: tensor for key, tensor in model.tensors.items() if key in wanted})


def _bad_piece(index: Path, message: str) -> NoReturn:
    raise MalformedFile(message, file=index, hint=_AGAIN)


def combined(path: Path, models: Sequence[ModelFile], metadata: Mapping[str, str], notes: tuple[str, ...]) -> ModelFile:
    """Several files as one model: one behind the other, and behind them all their views."""
    size = sum(model.state.size for model in models)
    tensors: dict[str, TensorInfo] = {}
    views: list[View] = []
    parts: list[FilePart] = []
    start, views_start = 0, size
    for model in models:
        shift = Shift(model.state.size, start, views_start)
        for name, tensor in model.tensors.items():
            if name in tensors:
                message = "Two files of the folder have this tensor."
                raise MalformedFile(message, file=model.path, key=name, hint=_AGAIN)
            tensors[name] = replace(tensor, offset=shift(tensor.offset))
        views += [Shifted(view, shift) for view in model.views]
        own = model.parts or (FilePart(model.path, model.state, 0),)
        parts += [replace(part, start=part.start + start) for part in own]
        start += model.state.size
        views_start = max((views_start, *(each.start + each.nbytes for each in views)))
    state = FileState(0, 0, size, max(model.state.mtime_ns for model in models))
    return ModelFile(path, "diffusers", tensors, metadata, state, tuple(views), notes, parts=tuple(parts))
