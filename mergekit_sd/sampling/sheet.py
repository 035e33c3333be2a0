"""The contact sheet: models down, seeds across, one group of rows for each prompt.

Owns how it is laid out. Must not know the checks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_sd.sampling.groups import Group, groups, in_words
from mergekit_sd.sampling.lettering import fitting, in_lines
from mergekit_sd.sampling.values import Picture, SamplingReport

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

LARGEST = 8000  # pixels of the sheet, either way
REDUCED = 384  # pixels of a large picture's longer side
ENLARGED = 256  # a small picture grows, by whole factors, up to this
SMALLEST = 64  # below it a cell shows nothing: the sheet grows instead
STEP = 8  # a cell shrinks by so many pixels until the sheet fits

MARGIN, GAP, BETWEEN = 32, 8, 40
LABELS = 220  # pixels of the models' names
TITLE, HEADING, NAME, SMALL = 30, 22, 19, 15  # sizes of letters, in pixels
PAPER, INK, MUTED, LINE = (250, 249, 247), (28, 28, 30), (92, 95, 102), (222, 219, 214)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things are, in pixels. `cell` is the width and height of the largest picture as shown."""

    most: int
    """Longest side that a picture may have as shown."""
    cell: tuple[int, int]
    width: int
    height: int
    tops: tuple[int, ...]
    """Where each group starts."""

    def corner(self, group: int, row: int, column: int) -> tuple[int, int]:
        """The left and upper edge of a cell."""
        left = MARGIN + LABELS + column * (self.cell[0] + GAP)
        return left, self.tops[group] + _head() + row * (self.cell[1] + GAP)


def _head() -> int:
    """Height of a group's heading: two lines of prompt, one of settings, one of seeds."""
    return 2 * (HEADING + 6) + 2 * (SMALL + 8)


def layout(found: tuple[Group, ...]) -> Layout:
    """The largest cells with which the sheet stays under LARGEST pixels; never under SMALLEST."""
    most = REDUCED
    while True:
        plan = _layout(found, most)
        if max(plan.width, plan.height) <= LARGEST or most <= SMALLEST:
            return plan
        most -= STEP


def _layout(found: tuple[Group, ...], most: int) -> Layout:
    sizes = [shown_size(picture, most) for group in found for picture in group.pictures.values()]
    cell = max((size[0] for size in sizes), default=most), max((size[1] for size in sizes), default=most)
    top, tops = MARGIN + TITLE + 12 + SMALL + BETWEEN, []
    for group in found:
        tops.append(top)
        top += _head() + len(group.models) * (cell[1] + GAP) + BETWEEN
    columns = max((len(group.settings.seeds) for group in found), default=1)
    width = MARGIN + LABELS + max(columns * (cell[0] + GAP), 420) + MARGIN
    return Layout(most, cell, width, top - BETWEEN + MARGIN, tuple(tops))


def shown_size(picture: Picture, most: int = REDUCED) -> tuple[int, int]:
    """Width and height of a picture on the sheet: small ones whole times larger, large ones to fit `most`."""
    height, width = picture.pixels.shape[:2]
    longer = max(width, height)
    if longer <= most:
        times = max(1, min(ENLARGED, most) // longer)
        return width * times, height * times
    return max(1, round(width * most / longer)), max(1, round(height * most / longer))


def sheet(report: SamplingReport) -> Image.Image:
    """The contact sheet of all pictures of a report, as an RGB image."""
    from PIL import Image, ImageDraw

    found = groups(report)
    plan = layout(found)
    image = Image.new("RGB", (plan.width, plan.height), PAPER)
    draw = ImageDraw.Draw(image)
    room = plan.width - 2 * MARGIN
    _write(draw, (MARGIN, MARGIN), report.title, TITLE, INK, room)
    parents = ", ".join(report.parents)
    under = f"made of {parents}" if parents else f"{len(report.pictures)} pictures"
    _write(draw, (MARGIN, MARGIN + TITLE + 12), under, SMALL, MUTED, room)
    for place, group in enumerate(found):
        _heading(draw, plan, place, group)
        for row, model in enumerate(group.models):
            _label(draw, plan, (place, row), model, model in report.parents)
            for column, seed in enumerate(group.settings.seeds):
                picture = group.pictures.get((model, seed))
                _cell(image, draw, plan, plan.corner(place, row, column), picture)
    return image


def _heading(draw: ImageDraw.ImageDraw, plan: Layout, place: int, group: Group) -> None:
    settings, top = group.settings, plan.tops[place]
    room = plan.width - 2 * MARGIN
    prompt = settings.prompt or "(no prompt)"
    if place:
        draw.line((MARGIN, top - BETWEEN // 2, plan.width - MARGIN, top - BETWEEN // 2), LINE)
    top += _write(draw, (MARGIN, top), prompt, HEADING, INK, room, lines=2)
    words = in_words(settings) + (f" · negative: {settings.negative}" if settings.negative else "")
    _write(draw, (MARGIN, top), words, SMALL, MUTED, room)
    for column, seed in enumerate(settings.seeds):
        left, under = plan.corner(place, 0, column)
        _write(draw, (left, under - SMALL - 8), f"seed {seed}", SMALL, MUTED, plan.cell[0])


def _label(draw: ImageDraw.ImageDraw, plan: Layout, at: tuple[int, int], model: str, parent: bool) -> None:
    """A model's name left of its row, as many lines of it as the row has room for; "parent" under it."""
    _, top = plan.corner(*at, 0)
    room = plan.cell[1] - (SMALL + 4 if parent else 0)
    used = _write(draw, (MARGIN, top), model, NAME, INK, LABELS - 20, lines=max(1, room // (NAME + 6)))
    if parent and room >= NAME:
        _write(draw, (MARGIN, top + used), "parent", SMALL, MUTED, LABELS - 20)


def _cell(
    image: Image.Image, draw: ImageDraw.ImageDraw, plan: Layout, at: tuple[int, int], picture: Picture | None
) -> None:
    from PIL import Image

    if picture is None:
        draw.rectangle((*at, at[0] + plan.cell[0] - 1, at[1] + plan.cell[1] - 1), outline=LINE)
        return
    size = shown_size(picture, plan.most)
    smaller = size[0] < picture.pixels.shape[1]
    way = Image.Resampling.LANCZOS if smaller else Image.Resampling.NEAREST
    image.paste(Image.fromarray(picture.pixels).resize(size, way), at)


def _write(
    draw: ImageDraw.ImageDraw,
    at: tuple[int, int],
    text: str,
    size: int,
    colour: tuple[int, int, int],
    room: int,
    lines: int = 1,
) -> int:
    """Write `text` within `room` pixels and `lines` lines; how many pixels of height that took."""
    text, font = fitting(text, size)
    written = in_lines(text, font, room, lines)
    for place, line in enumerate(written):
        draw.text((at[0], at[1] + place * (size + 6)), line, colour, font)
    return len(written) * (size + 6)
