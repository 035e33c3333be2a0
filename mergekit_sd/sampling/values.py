"""What sampling is asked for and what comes of it: frozen values. Must not import torch or diffusers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mergekit_sd.recipe.samplers import DEFAULT_SAMPLER

Pixels: TypeAlias = NDArray[np.uint8]
Level = Literal["ok", "warning", "failed"]

# What makes a model good: the report's headings, in their order.
Heading = Literal["prompt", "unasked", "looks", "sound"]
HEADINGS: Mapping[Heading, str] = {
    "prompt": "It follows the prompt",
    "unasked": "It adds nothing unasked",
    "looks": "It looks well",
    "sound": "It is sound",
}


@dataclass(frozen=True, slots=True)
class Settings:
    """How pictures are made of any model. `size`: width and height in pixels, None for the model's own.

    `clip_skip` counts from the text encoder's end, 1 is its last layer; None for the model's own.
    `cfg_rescale`: 0..1, how far the guided prediction is brought back to the spread of the unguided one.
    """

    prompt: str
    negative: str = ""
    seeds: tuple[int, ...] = (0,)
    steps: int = 20
    cfg: float = 7.0
    sampler: str = DEFAULT_SAMPLER
    size: tuple[int, int] | None = None
    clip_skip: int | None = None
    cfg_rescale: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """One picture, (height, width, 3), of one model's `settings` with one of its seeds.

    `model` is its name in the recipe, `model_hash` the ten digits that the WebUI would show, where known.
    """

    model: str
    settings: Settings
    seed: int
    pixels: Pixels
    model_hash: str | None = None


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at. `message` is a sentence; `figures` are what it rests on."""

    name: str
    heading: Heading
    level: Level
    model: str
    message: str
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Chart:
    """Numbers for each of a model's blocks (or words): drift from a parent, weights of a step.

    `values` go by model or parent, then by block, in the order to show them.
    """

    title: str
    note: str
    values: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, slots=True, eq=False)
class SamplingReport:
    """All that a sampling run made and found. `parents` are those of `models` that others were made of."""

    title: str
    recipe: str | None
    models: tuple[str, ...]
    parents: tuple[str, ...]
    pictures: tuple[Picture, ...]
    checks: tuple[Check, ...] = ()
    charts: tuple[Chart, ...] = ()
    notes: tuple[str, ...] = ()
    made: Mapping[str, str] = field(default_factory=dict)
    """By model that is no file: the steps that make it, in words."""
    machine: Mapping[str, Any] = field(default_factory=dict)
    """Versions, threads, dtype, device, peak memory in bytes, seconds: what it takes to repeat it."""


def joined(reports: Sequence[SamplingReport]) -> SamplingReport:
    """Several reports as one, under the first one's title; what was measured of the machine is the most, or the sum."""
    machine = dict(reports[0].machine)
    machine["seconds"] = round(sum(each.machine.get("seconds", 0.0) for each in reports), 1)
    machine["peak_memory"] = max((each.machine.get("peak_memory") or 0 for each in reports), default=0) or None

    def every(part: str) -> Any:
        return tuple(dict.fromkeys(each for report in reports for each in getattr(report, part)))

    return SamplingReport(
        title=reports[0].title,
        recipe=reports[0].recipe,
        models=every("models"),
        parents=every("parents"),
        pictures=tuple(picture for report in reports for picture in report.pictures),
        checks=tuple(check for report in reports for check in report.checks),
        charts=tuple(chart for report in reports for chart in report.charts),
        notes=every("notes"),
        made={name: words for report in reports for name, words in report.made.items()},
        machine=machine,
    )
