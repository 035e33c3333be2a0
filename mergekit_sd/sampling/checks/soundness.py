"""Whether a model is whole: NaN and where it comes from, position ids, its VAE, what its UNet predicts.

Owns these verdicts. Must not load or ask a model: what was measured, and what others saw, is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mergekit_sd.sampling.checks import thresholds as t
from mergekit_sd.sampling.checks.measuring import Measured
from mergekit_sd.sampling.values import Check, Level
from mergekit_sd.text import count, listed, shown

READ_AS = {"epsilon": "noise (epsilon)", "v": "velocity (v)"}


@dataclass(frozen=True, slots=True)
class Seen:
    """What others saw of a model, as far as they looked.

    Of its pictures: `nan_latents`, NaN came out of the UNet; `nan_decode`, the VAE made it, in fp32 too;
    `in_fp32`, the VAE made it in its own dtype and fp32 did not. `position_ids` as `inspect` states them, None
    where there are none to look at. `mixed_vae`: whether the recipe mixed VAEs. `only_models`: whether it was made
    of models alone, all of which are among the parents; a LoRA takes a model further than they show.
    """

    nan_latents: bool = False
    nan_decode: bool = False
    in_fp32: bool = False
    position_ids: Literal["ok", "missing", "corrupt"] | None = None
    mixed_vae: bool = False
    only_models: bool = False


def check_soundness(
    model: str, child: Measured, parents: Mapping[str, Measured], seen: Seen | None = None
) -> tuple[Check, ...]:
    """All of them; what cannot be told is not there."""
    seen = seen or Seen()
    checks = [*check_file(model, child.nonfinite, seen, child.finite), check_empty(model, child)]
    if child.finite["UNet"]:
        checks.append(check_prediction(model, child, parents))
    if child.finite["VAE"]:
        checks.append(check_vae(model, child, parents, mixed=seen.mixed_vae))
    return tuple(checks)


def check_file(
    model: str, nonfinite: Mapping[str, int], seen: Seen, finite: Mapping[str, bool] | None = None
) -> tuple[Check, ...]:
    """What can be told of a model that was not asked: its numbers, its position ids."""
    checks = [check_finite(model, nonfinite, seen, finite or {})]
    if seen.position_ids is not None:
        checks.append(check_position_ids(model, seen.position_ids))
    return tuple(checks)


def check_finite(model: str, nonfinite: Mapping[str, int], seen: Seen, finite: Mapping[str, bool]) -> Check:
    """NaN and Inf. In the weights or before the VAE it is a bad merge; after the VAE alone, its precision or itself.

    `nonfinite`: of the weights, by tensor. `finite`: whether the networks' answers are, of those asked.
    """
    name = shown(model)
    figures = {"tensors": float(len(nonfinite)), "values": float(sum(nonfinite.values()))}
    where = [part for part in ("text encoder", "UNet") if not finite.get(part, True)]
    level: Level = "failed"
    if nonfinite:
        tensors = count(len(nonfinite), "tensor")
        message = f"{name} holds NaN or Inf in {tensors}: {listed(nonfinite)}. Get it or make it anew."
    elif where:
        message = (
            f"The {' and the '.join(where)} of {name} {'gives' if len(where) == 1 else 'give'} NaN or Inf though no "
            "tensor holds any: weights are too large for this dtype, as when a merge adds up too much."
        )
    elif seen.nan_latents:
        message = (
            f"Making pictures of {name} ends in NaN before the VAE: its UNet is broken, as when a merge adds up too "
            "much, or the guidance is far too strong."
        )
    elif seen.nan_decode or not finite.get("VAE", True):
        message = (
            f"The VAE of {name} makes NaN, and not for want of precision: it is broken. "
            "The UNet is sound; give the model another VAE."
        )
    elif seen.in_fp32:
        level = "warning"
        message = (
            f"The VAE of {name} overflows in the precision it is stored in; here it was run in fp32. "
            "Tools that do not do so show black pictures: use a VAE mended for fp16."
        )
    else:
        asked = ", and no answer of its networks" if finite else ""
        level, message = "ok", f"Nothing in {name} is NaN or Inf{asked}."
    return Check("finite", "sound", level, model, message, figures)


def check_empty(model: str, child: Measured) -> Check:
    """Blocks and networks that are gone: a weight of 0 where there is nothing else, or a part left out."""
    name, figures = shown(model), {"parts": float(len(child.empty))}
    if not child.empty:
        return Check("empty parts", "sound", "ok", model, f"No part of {name} is empty.", figures)
    message = f"Every weight is 0 in these parts of {name}: {listed(child.empty, 12)}. Take them from a parent."
    return Check("empty parts", "sound", "failed", model, message, figures)


def check_position_ids(model: str, state: str) -> Check:
    """The text encoder's position ids, which merging as floats corrupts."""
    name = shown(model)
    if state == "corrupt":
        message = (
            f"The position ids of {name} are corrupt: tools that read them from the file mix up the prompt's words. "
            'Write it with position_ids = "reset".'
        )
        return Check("position ids", "sound", "failed", model, message)
    said = "are missing, which every tool makes good" if state == "missing" else "count from 0 to 76"
    return Check("position ids", "sound", "ok", model, f"The position ids of {name} {said}.")


def check_prediction(model: str, child: Measured, parents: Mapping[str, Measured]) -> Check:
    """Whether the UNet predicts what the model says; one that predicts neither is accused only beside its parents."""
    said, errors = child.prediction, child.type_errors
    name, other = shown(model), "v" if said == "epsilon" else "epsilon"
    if not errors:
        message = f"What {name} predicts was not looked at: no probe has a middle timestep."
        return Check("prediction type", "sound", "ok", model, message)
    mine, theirs = errors[said], errors[other]
    figures = {f"error as {kind}": error for kind, error in errors.items()}
    if theirs < t.RIGHT_TYPE and mine > t.WRONG_TYPE * theirs:
        message = (
            f"{name} is taken to predict {READ_AS[said]}, but the pictures come out wrong because it predicts "
            f'{READ_AS[other]}. Write prediction = "{other}" for it.'
        )
        return Check("prediction type", "sound", "failed", model, message, figures)
    if mine < t.RIGHT_TYPE:
        message = f"{name} predicts {READ_AS[said]}, as it says."
        return Check("prediction type", "sound", "ok", model, message, figures)
    best = min((min(each.type_errors.values()) for each in parents.values() if each.type_errors), default=mine)
    if best < t.RIGHT_TYPE and min(mine, theirs) >= 1:
        message = (
            f"The UNet of {name} predicts worse than nothing would, unlike its parents': weights were added up too "
            "far, or parts of it do not belong together."
        )
        return Check("prediction type", "sound", "failed", model, message, figures | {"least error of a parent": best})
    message = f"Whether {name} predicts noise or velocity cannot be told: it predicts neither well."
    return Check("prediction type", "sound", "warning", model, message, figures)


def check_vae(model: str, child: Measured, parents: Mapping[str, Measured], *, mixed: bool = False) -> Check:
    """Whether the VAE brings a picture back, and speaks the parents' language of latents."""
    name = shown(model)
    others = {who: each for who, each in parents.items() if each.finite["VAE"]}
    figures = {"round trip": child.round_trip}
    alike = {who: _cosine(child, each) for who, each in others.items() if each.latents.shape == child.latents.shape}
    if alike:
        figures["latents like the nearest parent's"] = max(alike.values())
    best = min((each.round_trip for each in others.values()), default=None)
    cause = "Give it the VAE of one of its parents." if parents else "Give it another VAE."
    if mixed:
        cause = "The recipe mixes VAEs: take one parent's whole."
    level: Level = "failed"
    if alike and max(alike.values()) < t.SAME_LATENTS:
        message = (
            f"The VAE of {name} is of another family than its parents', such as SDXL's in an SD1 model: "
            f"its latents are not theirs. {cause}"
        )
    elif best is not None and child.round_trip > max(t.ROUND_TRIP_RATIO * best, t.ROUND_TRIP_LEAST):
        times = child.round_trip / best if best else float("inf")
        level = "failed" if child.round_trip > t.ROUND_TRIP else "warning"
        message = f"The VAE of {name} brings a picture back {times:.0f} times worse than its parents'. {cause}"
    elif child.round_trip > t.ROUND_TRIP and not others:
        message = f"The VAE of {name} does not bring a picture back: it is broken, or no VAE of this family. {cause}"
    else:
        level, message = "ok", f"The VAE of {name} brings a picture back{' as its parents do' if others else ''}."
    return Check("VAE", "sound", level, model, message, figures)


def _cosine(mine: Measured, theirs: Measured) -> float:
    a, b = (each.latents.astype(np.float64).ravel() for each in (mine, theirs))
    sizes = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / sizes if sizes else 0.0
