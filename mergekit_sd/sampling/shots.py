"""What a recipe's samples ask for, one model and one prompt at a time, with every file that they name found.

Owns what a model's own defaults replace. Everything that can be refused before a network is loaded is refused here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_sd.errors import MissingInput, UnreadableInput
from mergekit_sd.recipe.load import Recipe, Sample
from mergekit_sd.recipe.loras import LoraUse
from mergekit_sd.recipe.positions import Where
from mergekit_sd.recipe.roots import input_path, load_roots
from mergekit_sd.recipe.samplers import SAMPLERS
from mergekit_sd.sampling.extras import Extras
from mergekit_sd.sampling.parameters import read_parameters
from mergekit_sd.sampling.prompts import HypernetTag, take_tags
from mergekit_sd.sampling.values import Pixels, Settings

if TYPE_CHECKING:
    from mergekit_sd.sampling.networks import Networks


@dataclass(frozen=True, slots=True)
class Steering:
    """A ControlNet's file, the picture it is shown, how much it counts and when."""

    net: Path
    picture: Path
    weight: float
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Shot:
    """One sample of a recipe: what is made of each of its models.

    `settings` hold the prompts as written; `positive` and `negative` are without tags. `own`: what the sample
    leaves to the model. `loras` with their files, None where the name is a model of the recipe.
    """

    of: tuple[str, ...]
    settings: Settings
    positive: str
    negative: str
    loras: tuple[tuple[LoraUse, Path | None], ...]
    hypernets: tuple[tuple[HypernetTag, Path], ...]
    embeddings: Mapping[str, Path]
    control: tuple[Steering, ...]
    own: frozenset[str]


_SETTINGS = ("steps", "cfg", "sampler", "size", "clip_skip")


def shots_of(recipe: Recipe) -> tuple[Shot, ...]:
    """The recipe's samples. Raises RecipeError, MissingInput and UnreadableInput for what cannot be."""
    roots = load_roots()

    def located(file: str) -> Path:
        return input_path(file, recipe.folder, roots)

    models = [path for each in recipe.models.values() if (path := located(each.file)).exists()]
    return tuple(
        _shot(recipe, sample, Extras([located(each) for each in sample.extras], models), located, number)
        for number, sample in enumerate(recipe.samples)
    )


def _shot(recipe: Recipe, sample: Sample, extras: Extras, located: Any, number: int) -> Shot:
    entry = recipe.where("samples", number)
    where = entry.at("prompt")
    positive, negative = take_tags(sample.prompt, where), take_tags(sample.negative, entry.at("negative"))
    if negative.loras or negative.hypernets:
        raise entry.at("negative").error(
            "A negative prompt takes no LoRA and no hypernetwork.", hint="they work on the whole picture: <…> in prompt"
        )
    return Shot(
        of=sample.of,
        settings=Settings(
            prompt=sample.prompt,
            negative=sample.negative,
            seeds=sample.seeds,
            steps=sample.steps,
            cfg=sample.cfg,
            sampler=sample.sampler,
            size=sample.size,
            clip_skip=sample.clip_skip,
            cfg_rescale=sample.cfg_rescale,
        ),
        positive=positive.text,
        negative=negative.text,
        loras=tuple((use, _lora(recipe, use, extras, where)) for use in positive.loras),
        hypernets=tuple((tag, extras.find(tag.name, "hypernetwork", where)) for tag in positive.hypernets),
        embeddings=extras.embeddings(),
        control=tuple(
            Steering(_there(located(each.net)), _there(located(each.picture)), each.weight, each.start, each.end)
            for each in sample.control
        ),
        own=frozenset(name for name in _SETTINGS if name not in sample.given),
    )


def _lora(recipe: Recipe, use: LoraUse, extras: Extras, where: Where) -> Path | None:
    return None if use.lora in recipe.models else extras.find(use.lora, "LoRA", where)


def _there(path: Path) -> Path:
    if not path.exists():
        raise MissingInput("There is no such file.", file=path, hint="it was named for a sample's ControlNet")
    return path


def settled(shot: Shot, networks: Networks, declared: Mapping[str, Any] | None = None) -> Settings:
    """The shot's settings for a model: what the sample leaves open is as the output declares, or the file's hint says.

    A size that nobody says is the model's own.
    """
    said = declared if declared is not None else hinted(networks.hint)
    taken = {name: value for name, value in said.items() if name in shot.own}
    settings = replace(shot.settings, **taken)
    return settings if settings.size else replace(settings, size=networks.size)


def hinted(hint: str | None) -> dict[str, Any]:
    """The settings that a usage hint in the words of the WebUI's infotext says; nothing of any other text."""
    said = read_parameters(hint) if hint else {}
    labels = {sampler.label: name for name, sampler in SAMPLERS.items()}
    width, _, height = said.get("Size", "").partition("x")
    found = {
        "steps": _whole(said.get("Steps")),
        "cfg": _number(said.get("CFG scale")),
        "sampler": labels.get(said.get("Sampler", "")),
        "size": (int(width), int(height)) if _whole(width) and _whole(height) else None,
        "clip_skip": _whole(said.get("Clip skip")),
    }
    return {name: value for name, value in found.items() if value is not None}


def _whole(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() and 0 < int(text[:6]) <= 4096 else None


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if 0 <= value <= 100 else None


def picture_of(path: Path) -> Pixels:
    """A picture file's pixels, (height, width, 3). Raises UnreadableInput."""
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableInput("This is no picture that can be read.", file=path, hint="give a PNG or JPEG") from error


def groups_of(shots: Sequence[Shot], name: str) -> list[tuple[tuple[tuple[LoraUse, Path | None], ...], list[Shot]]]:
    """A model's shots by the LoRAs that they bake in, none first: each group needs networks of its own."""
    groups: list[tuple[tuple[tuple[LoraUse, Path | None], ...], list[Shot]]] = [((), [])]
    for shot in shots:
        if name in shot.of:
            group = next((each for loras, each in groups if loras == shot.loras), None)
            if group is None:
                groups.append((shot.loras, group := []))
            group.append(shot)
    return groups
