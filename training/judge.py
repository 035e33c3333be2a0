"""A simple rule that says what a picture shows: shape, colour, background. It is the tests' judge, too.

Owns the rule. The background is the border's median; what differs from it is the shape; its colour is
the median of those pixels; how much of its bounding box and of its convex hull it fills tells the form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_fill_holes, binary_opening, label
from scipy.spatial import ConvexHull, QhullError

from training.drawings import BACKGROUNDS, COLOURS, MOONLIGHT, NIGHT, ORANGE, STAR

BORDER = 5  # pixels around, which a shape seldom reaches
APART = 60.0  # a colour this far from the background's belongs to the shape
FEWEST = 60  # pixels of a shape


@dataclass(frozen=True, slots=True)
class Seen:
    """What is in a picture.

    `hole`: the share of the shape, filled up, that shows the background. `parts`: of the shape, 1 or its stripes.
    `framed`: whether there is a frame around the picture. `strength`: how far the shape's colour is from grey.
    """

    shape: str
    colour: str
    background: str
    palette: str
    hole: float
    parts: int = 0
    framed: bool = False
    strength: float = 0.0

    def is_right(self, shape: str, colour: str, background: str) -> bool:
        """All three as the prompt has them."""
        return (self.shape, self.colour, self.background) == (shape, colour, background)


def see(picture: NDArray[np.uint8]) -> Seen:
    """Judge a picture, (64, 64, 3)."""
    pixels = picture.astype(float)
    outer, inner = _ring(pixels, 0, 4), _ring(pixels, 6, 9)
    framed = float(np.linalg.norm(outer - inner)) > APART
    if framed:
        pixels = pixels[6:-6, 6:-6]
    ground = _ring(pixels, 0, BORDER)
    palette, background = _background(ground)
    sizes, parts = _parts(binary_opening(np.linalg.norm(pixels - ground, axis=2) > APART))
    if not len(sizes) or sizes.max() < FEWEST:
        return Seen("nothing", "none", background, palette, 0.0, framed=framed)
    mask: NDArray[np.bool_] = parts == sizes.argmax() + 1
    whole = binary_fill_holes(mask)
    colour = np.median(pixels[mask], axis=0)
    return Seen(
        _shape(whole),
        _nearest(colour, _colours(palette)),
        background,
        palette,
        float(1 - mask.sum() / whole.sum()),
        int((sizes > FEWEST // 3).sum()),
        framed,
        float(np.linalg.norm(colour - colour.mean())),
    )


def _ring(pixels: NDArray[np.float64], start: int, stop: int) -> NDArray[np.float64]:
    """The median of the pixels that are `start` to `stop` away from the border."""
    ring = np.ones(pixels.shape[:2], bool)
    ring[stop:-stop, stop:-stop] = False
    if start:
        ring[:start] = ring[-start:] = ring[:, :start] = ring[:, -start:] = False
    return np.asarray(np.median(pixels[ring], axis=0))


def _background(ground: NDArray[np.float64]) -> tuple[str, str]:
    known = {("day", name): colour for name, colour in BACKGROUNDS.items()}
    known |= {("night", name): colour for name, colour in NIGHT.items()}
    return min(known, key=lambda each: float(np.linalg.norm(ground - np.array(known[each]))))


def _colours(palette: str) -> Mapping[str, tuple[float, ...]]:
    named = {**COLOURS, "orange": ORANGE}
    if palette == "day":
        return named
    scale, shift = MOONLIGHT
    return {
        name: tuple(each * times + plus for each, times, plus in zip(colour, scale, shift, strict=True))
        for name, colour in named.items()
    }


def _nearest(colour: NDArray[np.float64], known: Mapping[str, tuple[float, ...]]) -> str:
    """By the direction away from grey, which paleness does not change; grey itself is "grey"."""
    away = colour - colour.mean()
    if np.linalg.norm(away) < 25:
        return "grey"
    directions = {name: np.array(each) - np.mean(each) for name, each in known.items()}
    return max(directions, key=lambda name: float(away @ directions[name] / np.linalg.norm(directions[name])))


def _parts(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The sizes of what hangs together, and which pixel belongs to which, from 1."""
    parts, _ = label(mask, np.ones((3, 3)))
    return np.bincount(parts.ravel())[1:], parts


def _shape(whole: NDArray[np.bool_]) -> str:
    rows, columns = np.nonzero(whole)
    box = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
    corners = np.concatenate(
        [np.stack([rows + y, columns + x], 1) for y in (-0.5, 0.5) for x in (-0.5, 0.5)]  # pixels have a size
    )
    try:
        hull = ConvexHull(corners).volume
    except QhullError:
        return "nothing"
    if whole.sum() / hull < 0.78:
        return STAR
    share = whole.sum() / box
    return "square" if share > 0.89 else "circle" if share > 0.66 else "triangle"
