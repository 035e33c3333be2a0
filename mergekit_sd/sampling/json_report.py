"""A report as plain data, for other programs: pictures by the names of their files, never their pixels."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from mergekit_sd.sampling.files import file_names
from mergekit_sd.sampling.groups import prompt_of
from mergekit_sd.sampling.values import Picture, SamplingReport


def sampling_as_json(report: SamplingReport) -> dict[str, Any]:
    """The report as strict JSON allows it: numbers that JSON lacks (NaN, infinity) are null."""
    names = file_names(report.pictures)
    return {
        "title": report.title,
        "recipe": report.recipe,
        "models": list(report.models),
        "parents": list(report.parents),
        "made": dict(report.made),
        "pictures": [_picture(picture, name) for picture, name in zip(report.pictures, names, strict=True)],
        "checks": [_plain(asdict(check)) for check in report.checks],
        "charts": [_plain(asdict(chart)) for chart in report.charts],
        "notes": list(report.notes),
        "machine": _plain(report.machine),
    }


def pixels_hash(picture: Picture) -> str:
    """SHA-256 of the pixels, row by row, red, green, blue: the same whatever the file around them."""
    return hashlib.sha256(picture.pixels.tobytes()).hexdigest()


def _picture(picture: Picture, name: str) -> dict[str, Any]:
    settings = _plain(asdict(prompt_of(picture)))
    del settings["seeds"]
    height, width = picture.pixels.shape[:2]
    return {
        "file": name,
        "model": picture.model,
        "model_hash": picture.model_hash,
        "seed": picture.seed,
        "width": width,
        "height": height,
        "pixels_sha256": pixels_hash(picture),
        "settings": settings,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)
