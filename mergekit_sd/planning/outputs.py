"""From a model to the tensors of an output file: what is kept, in which dtype, from where.

Owns the surgery of `[outputs]`: dtype, junk, EMA, VAE, position_ids, markers. Must not know how
tensors are computed, nor the disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mergekit_sd.architectures import Layout, Place, Role
from mergekit_sd.errors import MissingTensors
from mergekit_sd.formats.dtypes import F32, OUTPUT_DTYPES, Dtype
from mergekit_sd.planning.expression import Constant, Expression, Read, position_ids
from mergekit_sd.planning.models import Model
from mergekit_sd.planning.surgery import taken_from
from mergekit_sd.recipe.load import OutputSpec, Recipe

V_MARKERS = ("v_pred", "ztsnr")
COPIED_ROLES = (Role.schedule, Role.marker, Role.position_ids)
# 0.9999 is 1.0 in float16: the EMA's own numbers keep their dtype.
EMA_COUNTERS = ("model_ema.decay", "model_ema.num_updates")


@dataclass(frozen=True)
class Draft:
    """An output tensor before it has an offset."""

    dtype: Dtype
    expression: Expression
    place: Place


def draft_tensors(
    recipe: Recipe, spec: OutputSpec, model: Model, vae: Model | None
) -> tuple[dict[str, Draft], dict[str, tuple[str, ...]]]:
    """The output's tensors in order, and the names left out by reason."""
    drafts: dict[str, Draft] = {}
    dropped: dict[str, list[str]] = {}
    for name, expression in model.tensors.items():
        place = model.layout.places[name]
        reason = _why_dropped(spec, model.layout, name, place)
        if reason:
            dropped.setdefault(reason, []).append(name)
            continue
        if place.role == Role.position_ids and spec.position_ids == "reset":
            expression = position_ids(expression.shape[-1] if expression.shape else 1)
        drafts[name] = Draft(_dtype(spec, name, place, expression), expression, place)
    if spec.ema == "keep":
        _check_ema_is_fresh(recipe, spec, drafts)
    if vae:
        _bake(spec, model, vae, drafts)
    if spec.prediction == "v" and _has_markers(model.layout) and "v_pred" not in drafts:
        place = Place(None, None, Role.marker)
        drafts["v_pred"] = Draft(F32, Constant(F32, (0,), b""), place)
    return drafts, {reason: tuple(names) for reason, names in dropped.items()}


def _has_markers(layout: Layout) -> bool:
    return layout.architecture is not None and layout.architecture.family == "sdxl"


def _why_dropped(spec: OutputSpec, layout: Layout, name: str, place: Place) -> str | None:
    if place.role == Role.ema and spec.ema == "drop":
        return "ema"
    if place.role == Role.junk and spec.junk == "drop":
        return "junk"
    if spec.prediction == "epsilon" and _has_markers(layout) and name in V_MARKERS:
        return "marker"
    return None


def _dtype(spec: OutputSpec, name: str, place: Place, expression: Expression) -> Dtype:
    stored = expression.dtype
    if not stored.is_float or place.role in COPIED_ROLES or name in EMA_COUNTERS or isinstance(expression, Constant):
        return stored
    wanted = spec.dtype_of(place.component)
    return stored if wanted == "keep" else OUTPUT_DTYPES[wanted]


def _check_ema_is_fresh(recipe: Recipe, spec: OutputSpec, drafts: Mapping[str, Draft]) -> None:
    """EMA weights belong to one UNet: after a merge they are stale, and no one could tell."""
    merged = [n for n, d in drafts.items() if d.place.component == "unet" and not isinstance(d.expression, Read)]
    sources = {
        d.expression.input
        for d in drafts.values()
        if isinstance(d.expression, Read) and (d.place.component == "unet" or d.place.role == Role.ema)
    }
    if merged or len(sources) > 1:
        raise recipe.error(
            'ema = "keep" needs an untouched UNet: after a merge the EMA weights are stale.',
            ("outputs", spec.name, "ema"),
            hint='write ema = "drop"',
        )


def _bake(spec: OutputSpec, model: Model, vae: Model, drafts: dict[str, Draft]) -> None:
    """Replace the VAE's tensors by those of another model; its own extras are left out."""
    if not any(draft.place.component == "vae" for draft in drafts.values()):
        raise MissingTensors(f'The output "{spec.name}" has no VAE to replace.', hint="leave out `vae` for this output")
    for name, expression in taken_from(vae, model, "vae").items():
        if name in drafts:
            place = drafts[name].place
            drafts[name] = Draft(_dtype(spec, name, place, expression), expression, place)
