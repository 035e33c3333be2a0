"""All checks of a model but those of its pictures, from what was measured of it and its parents. Owns their order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np

from mergekit_sd.sampling.checks.association import check_association
from mergekit_sd.sampling.checks.drift import check_drift, check_stray
from mergekit_sd.sampling.checks.forgetting import check_forgetting, check_unasked
from mergekit_sd.sampling.checks.measuring import Measured
from mergekit_sd.sampling.checks.soundness import Seen, check_soundness
from mergekit_sd.sampling.values import Chart, Check

Findings: TypeAlias = tuple[tuple[Check, ...], tuple[Chart, ...]]


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
            check_drift(model, child, others),
            check_forgetting(model, child, others),
        ):
            checks += found
            charts += drawn
        if seen.only_models:
            checks += check_stray(model, child, others)
        checks += check_association(model, child, others)
        checks += check_unasked(model, child, others)
    return tuple(checks), tuple(charts)


def _beside(child: Measured, parent: Measured) -> bool:
    shapes = {each.predictions[""].shape for each in (child, parent)}
    sound = bool(np.isfinite(parent.predictions[""]).all()) and parent.finite["UNet"] and parent.finite["text encoder"]
    return parent.family == child.family and parent.probes == child.probes and len(shapes) == 1 and sound
