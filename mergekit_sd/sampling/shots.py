"""What a recipe's samples ask for, one model and one prompt at a time, with every file that they name found.

Owns what a model's own defaults replace. Everything that can be refused before a network is loaded is refused here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergekit_sd.errors import MissingInput, UnreadableInput
from mergekit_sd.recipe.load import Recipe, Sample
from mergekit_sd.recipe.loras import LoraUse
from mergekit_sd.recipe.positions import Where
from mergekit_sd.recipe.roots import input_path, load_roots
from mergekit_sd.recipe.samplers import SAMPLERS
from mergekit_sd.recipe.schema import sound_setting
from mergekit_sd.sampling.extras import Extras
from mergekit_sd.sampling.hypernetworks import Hypernetwork, load_hypernetwork
from mergekit_sd.sampling.parameters import read_settings
from mergekit_sd.sampling.prompts import take_tags
from mergekit_sd.sampling.values import Pixels, Settings


@dataclass(frozen=True, slots=True, eq=False)
class Steering:
    """A ControlNet's file, the picture that it is shown, how much it counts and when."""

    net: Path
    picture: Pixels
    weight: float
    start: float
    end: float


@dataclass(frozen=True, slots=True, eq=False)
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
    hypernets: tuple[tuple[Hypernetwork, float], ...]
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
        hypernets=tuple(
            (load_hypernetwork(extras.find(tag.name, "hypernetwork", where)), tag.multiplier)
            for tag in positive.hypernets
        ),
        embeddings=extras.embeddings(),
        control=tuple(
            Steering(
                _there(located(each.net)), picture_of(_there(located(each.picture))), each.weight, each.start, each.end
            )
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


def settled(shot: Shot, said: Mapping[str, Any], size: tuple[int, int]) -> Settings:
    """The shot's settings for a model: what the sample leaves open is as `said` of the model, else a sample's default.

    `size`: the model's own, where nobody says one.
    """
    settings = replace(shot.settings, **{name: value for name, value in said.items() if name in shot.own})
    return settings if settings.size else replace(settings, size=size)


def hinted(hint: str | None) -> dict[str, Any]:
    """The settings that a usage hint in the words of the WebUI's infotext says; nothing of any other text.

    What a recipe could not ask for is passed over: a file's words refuse nothing.
    """
    said = read_settings(hint) if hint else {}
    labels = {sampler.label: name for name, sampler in SAMPLERS.items()}
    found = {
        "steps": _number(said.get("Steps")),
        "cfg": _number(said.get("CFG scale")),
        "sampler": labels.get(said.get("Sampler", "")),
        "size": [_number(side) for side in said.get("Size", "").split("x")],
        "clip_skip": _number(said.get("Clip skip")),
    }
    sound = {name: value for name, value in found.items() if sound_setting(name, value)}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in sound.items()}


def _number(text: str | None) -> int | float | None:
    try:
        return int(text or "") if (text or "").isdecimal() else float(text or "")
    except ValueError:
        return None


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
