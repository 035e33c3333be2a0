"""Pictures in the order to show them: one group for each prompt and its settings, models down, seeds across."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from mergekit_sd.recipe.samplers import SAMPLERS
from mergekit_sd.sampling.values import Picture, SamplingReport, Settings


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """What was made with the same settings: `pictures` by model and seed. `settings` have the seeds of all."""

    settings: Settings
    models: tuple[str, ...]
    pictures: Mapping[tuple[str, int], Picture]


def prompt_of(picture: Picture) -> Settings:
    """The picture's settings without the seeds: the same for every picture of a group."""
    return replace(picture.settings, seeds=())


def groups(report: SamplingReport) -> tuple[Group, ...]:
    """The report's pictures by settings, in the order in which these first come; models in the report's order."""
    by_prompt: dict[Settings, dict[tuple[str, int], Picture]] = {}
    for picture in report.pictures:
        by_prompt.setdefault(prompt_of(picture), {})[picture.model, picture.seed] = picture
    found = []
    for settings, pictures in by_prompt.items():
        seeds = tuple(dict.fromkeys(seed for _, seed in pictures))
        there = dict.fromkeys(model for model, _ in pictures)
        models = [model for model in dict.fromkeys(report.models) if model in there]
        models += [model for model in there if model not in report.models]
        found.append(Group(replace(settings, seeds=seeds), tuple(models), pictures))
    return tuple(found)


def sampler_label(name: str) -> str:
    """A sampler's name in the WebUI; an unknown one's own."""
    return SAMPLERS[name].label if name in SAMPLERS else name


def number(value: float) -> str:
    """A number in full, without a needless `.0`: `7`, `7.5`."""
    return repr(value).removesuffix(".0")


def in_words(settings: Settings) -> str:
    """Settings but the prompts and seeds, in one line: `20 steps · DPM++ 2M Karras · CFG 7`."""
    words = [f"{settings.steps} steps", sampler_label(settings.sampler), f"CFG {number(settings.cfg)}"]
    if settings.size:
        words.append(f"{settings.size[0]}x{settings.size[1]}")
    if settings.clip_skip is not None:
        words.append(f"clip skip {settings.clip_skip}")
    if settings.cfg_rescale:
        words.append(f"CFG rescale {number(settings.cfg_rescale)}")
    return " · ".join(words)
