"""All checks of a model, from what was measured of it and of its parents; and the measuring, one model at a time.

Owns the order: a model's networks are let go before the next are loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from mergekit_sd.sampling.checks.association import check_association
from mergekit_sd.sampling.checks.drift import check_drift
from mergekit_sd.sampling.checks.forgetting import check_forgetting, check_unasked
from mergekit_sd.sampling.checks.measuring import Encode, Measured, measure
from mergekit_sd.sampling.checks.pictures import check_pictures
from mergekit_sd.sampling.checks.probes import Probes
from mergekit_sd.sampling.checks.soundness import Seen, check_soundness
from mergekit_sd.sampling.values import Chart, Check, Picture

if TYPE_CHECKING:
    from mergekit_sd.sampling.networks import Networks

Findings: TypeAlias = tuple[tuple[Check, ...], tuple[Chart, ...]]
Load: TypeAlias = "Callable[[], tuple[Networks, Encode]]"


def compare(
    model: str, child: Measured, parents: Mapping[str, Measured] | None = None, seen: Seen | None = None
) -> Findings:
    """Every check that needs no pictures. Parents of another family, other probes or with NaN are left out."""
    seen = seen or Seen()
    others = {name: each for name, each in (parents or {}).items() if _beside(child, each)}
    checks = list(check_soundness(model, child, others, seen))
    charts: list[Chart] = []
    if others and child.finite["UNet"] and child.finite["text encoder"]:
        for found, drawn in (
            check_drift(model, child, others, seen.changed),
            check_forgetting(model, child, others),
        ):
            checks += found
            charts += drawn
        checks += check_association(model, child, others)
        checks += check_unasked(model, child, others)
    return tuple(checks), tuple(charts)


def _beside(child: Measured, parent: Measured) -> bool:
    shapes = {each.predictions[""].shape for each in (child, parent)}
    sound = bool(np.isfinite(parent.predictions[""]).all()) and parent.finite["UNet"] and parent.finite["text encoder"]
    return parent.family == child.family and parent.probes == child.probes and len(shapes) == 1 and sound


def run_checks(
    model: str,
    load: Load,
    parents: Mapping[str, Load],
    probes: Probes,
    *,
    pictures: Sequence[Picture] = (),
    parents_pictures: Sequence[Picture] = (),
    seen: Seen | None = None,
) -> Findings:
    """Measure the parents, then the model, one in memory at a time, and compare."""
    measured: dict[str, Measured] = {}
    for name, parent in parents.items():
        measured[name] = measure(*parent(), probes)
    child = measure(*load(), probes, against=measured)
    checks, charts = compare(model, child, measured, seen)
    looks = check_pictures(model, pictures, parents_pictures, mixed_vae=bool(seen and seen.mixed_vae))
    return (*checks, *looks), charts
