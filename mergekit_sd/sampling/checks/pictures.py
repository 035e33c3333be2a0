"""Pictures that are black, flat, grey, burnt or noise, by their pixels alone.

Owns what is counted in a picture. Without parents only what is certain is said: a grey or glaring picture
may be meant. Must not know models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mergekit_sd.sampling.checks import thresholds as t
from mergekit_sd.sampling.values import Check, Level, Picture, Pixels
from mergekit_sd.text import shown


@dataclass(frozen=True, slots=True)
class Look:
    """What is counted in a picture.

    `brightest`: its highest channel. `spread`: the largest standard deviation of a channel; `contrast`: that of
    its brightness. `saturation`: mean of the highest channel less the lowest. `clipped`: share of channels at
    either limit. `fine`: variance of a pixel's brightness against the mean of its four neighbours.
    """

    brightest: float
    spread: float
    contrast: float
    saturation: float
    clipped: float
    fine: float

    @property
    def noise(self) -> float:
        """`fine` as a share of the variance: 1.25 for white noise, 0 for one colour."""
        return self.fine / self.contrast**2 if self.contrast > 0 else 0.0


def look(pixels: Pixels) -> Look:
    """Count a picture, (height, width, 3), of 3 pixels a side at least."""
    values = pixels.astype(np.float64)
    bright = values.mean(axis=2)
    around = (bright[:-2, 1:-1] + bright[2:, 1:-1] + bright[1:-1, :-2] + bright[1:-1, 2:]) / 4
    limits = (pixels <= t.CLIPPED_MARGIN) | (pixels >= 255 - t.CLIPPED_MARGIN)
    return Look(
        brightest=float(values.max()),
        spread=float(values.std(axis=(0, 1)).max()),
        contrast=float(bright.std()),
        saturation=float((values.max(axis=2) - values.min(axis=2)).mean()),
        clipped=float(limits.mean()),
        fine=float((bright[1:-1, 1:-1] - around).var()),
    )


def check_pictures(
    model: str, pictures: Sequence[Picture], parents: Sequence[Picture] = (), *, mixed_vae: bool = False
) -> tuple[Check, ...]:
    """Look at a model's pictures, beside its parents' of the same prompt, settings and seed.

    `mixed_vae`: the recipe mixed the VAEs, the likeliest cause of grey. No pictures, no checks.
    """
    looks = [look(each.pixels) for each in pictures]
    if not looks:
        return ()
    beside = [
        (mine, [look(other.pixels) for other in parents if (other.settings, other.seed) == (each.settings, each.seed)])
        for mine, each in zip(looks, pictures, strict=True)
    ]
    beside = [(mine, others) for mine, others in beside if others and not _black(mine) and not _flat(mine)]
    return (
        _every(model, "black", looks, _black),
        _every(model, "flat", looks, lambda each: _flat(each) and not _black(each)),
        _noise(model, looks, beside),
        *(_compared(model, name, beside, mixed_vae) for name in ("grey", "burnt") if beside),
    )


Beside = tuple[Look, list[Look]]


def _black(each: Look) -> bool:
    return each.brightest <= t.BLACK


def _flat(each: Look) -> bool:
    return each.spread <= t.FLAT


def _all_noise(each: Look) -> bool:
    return each.noise > t.NOISE_SHARE and each.contrast > t.NOISE_LEAST


def _noisier(mine: Look, others: Sequence[Look]) -> bool:
    usual = max(t.NOISE_TEXTURE, t.NOISE_RATIO * max(each.noise for each in others))
    return mine.fine > t.NOISE_VISIBLE and mine.noise > usual


def _grey(mine: Look, others: Sequence[Look]) -> bool:
    least = min(each.saturation for each in others)
    contrast = min(each.contrast for each in others)
    return (
        least > t.COLOURED
        and mine.saturation < t.GREY_SATURATION * least
        and mine.contrast < t.GREY_CONTRAST * contrast
    )


def _burnt(mine: Look, others: Sequence[Look]) -> bool:
    return mine.clipped > t.BURNT_CLIPPED + max(each.clipped for each in others) and (
        mine.saturation > t.BURNT_SATURATION * max(each.saturation for each in others)
    )


_WORDS = {
    "black": ("black", "NaN in the model or in its VAE's precision does this"),
    "flat": ("of one colour", "a UNet or a VAE that does not belong to the rest does this"),
    "noise": ("noise", "a wrong prediction type, or weights added up too far, does this"),
    "grain": ("far grainier than the parents'", "differences added too strongly do this"),
    "grey": ("far greyer than the parents'", "the VAE is the first to look at"),
    "burnt": ("burnt: colours at their limits, far beyond the parents'", "differences added too strongly do this"),
}
_MIXED = "the recipe mixes VAEs, which is the likely cause: take one parent's VAE whole"


def _said(
    model: str, name: str, hits: int, of: int, level: Level, *, words: str | None = None, why: str | None = None
) -> Check:
    what, usual = _WORDS[words or name]
    share = {"pictures": float(of), "found": float(hits)}
    if level == "ok":
        what = what.partition(":")[0]
        message = f"No picture of {shown(model)} is {what}."
        if hits:
            looks = "looks" if hits == 1 else "look"
            message = f"Only {hits} of {of} pictures of {shown(model)} {looks} {what}, which may be chance."
        return Check(name, "looks", "ok", model, message, share)
    message = f"{_counted(hits, of)} of {shown(model)} {'is' if hits == 1 else 'are'} {what}; {why or usual}."
    return Check(name, "looks", level, model, message, share)


def _counted(hits: int, of: int) -> str:
    if hits < of:
        return f"{hits} of {of} pictures"
    return "The picture" if of == 1 else f"All {of} pictures"


def _every(model: str, name: str, looks: Sequence[Look], rule: Callable[[Look], bool]) -> Check:
    hits = sum(map(rule, looks))
    return _said(model, name, hits, len(looks), "failed" if hits else "ok")


def _noise(model: str, looks: Sequence[Look], beside: Sequence[Beside]) -> Check:
    certain = sum(map(_all_noise, looks))
    if certain:
        return _said(model, "noise", certain, len(looks), "failed")
    hits = sum(_noisier(mine, others) for mine, others in beside)
    of = len(beside) or len(looks)
    if hits and hits >= t.PART * of:
        return _said(model, "noise", hits, of, "warning", words="grain")
    return _said(model, "noise", hits, of, "ok", words="grain" if hits else None)


def _compared(model: str, name: str, beside: Sequence[Beside], mixed_vae: bool) -> Check:
    rule = {"grey": _grey, "burnt": _burnt}[name]
    hits = sum(rule(mine, others) for mine, others in beside)
    level: Level = "warning" if hits and hits >= t.PART * len(beside) else "ok"
    return _said(model, name, hits, len(beside), level, why=_MIXED if name == "grey" and mixed_vae else None)
