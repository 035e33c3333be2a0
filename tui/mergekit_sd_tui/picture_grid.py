"""The pictures of a folder of samples as a grid: a column for each model, a row for each prompt and seed.

Owns which picture is where, the cursor, and how much fits. Must not read files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from rich.cells import set_cell_size
from rich.segment import Segment
from rich.style import Style
from textual.events import Click
from textual.message import Message
from textual.strip import Strip
from textual.widget import Widget

import mergekit_sd as mk
from mergekit_sd.text import shown
from mergekit_sd_tui.pictures import Shot, cells

LEAST = 16  # columns of a picture and its margin; where more pictures are than fit, the grid is scrolled

Row: TypeAlias = tuple[str, str, int, int]  # prompt, settings, seed, and which of several that are alike


@dataclass(frozen=True, slots=True)
class Places:
    """Which picture is at which row and model."""

    models: tuple[str, ...]
    rows: tuple[Row, ...]
    at: Mapping[tuple[Row, str], mk.SavedPicture]

    @classmethod
    def of(cls, pictures: Sequence[mk.SavedPicture]) -> Places:
        """In the order of the report."""
        again: Counter[tuple[object, ...]] = Counter()
        at: dict[tuple[Row, str], mk.SavedPicture] = {}
        for each in pictures:
            alike = (each.prompt, each.settings, each.seed, each.model)
            at[(each.prompt, each.settings, each.seed, again[alike]), each.model] = each
            again[alike] += 1
        rows, models = (tuple(dict.fromkeys(key[side] for key in at)) for side in (0, 1))
        return cls(models, rows, at)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Fit:
    """A picture's room in cells (its margin and its caption besides), and how many are seen at once."""

    columns: int
    lines: int
    across: int
    down: int


def fit(width: int, height: int, across: int, down: int) -> Fit:
    """The largest room in which all pictures are seen, else the least one; a line is for the models' names."""
    room = max(height - 1, 2)
    for columns in range(max(width // max(across, 1), 1), LEAST - 1, -1):
        if down * (_lines(columns) + 1) <= room:
            return Fit(columns - 1, _lines(columns), across, down)
    columns = max(min(LEAST, width, 2 * room - 1), 2)
    seen = max(room // (_lines(columns) + 1), 1)
    while (columns + 1) * max(across, 1) <= width and room // (_lines(columns + 1) + 1) >= seen:
        columns += 1
    return Fit(columns - 1, _lines(columns), max(width // columns, 1), seen)


def _lines(columns: int) -> int:
    """As high as wide, with a margin of one column: a cell is twice as high as wide."""
    return max((columns - 1) // 2, 1)


class PictureGrid(Widget):
    """The grid, with one of its pictures under the cursor."""

    DEFAULT_CSS = "PictureGrid { width: 1fr; height: 1fr; }"

    @dataclass
    class Moved(Message):
        """Another picture is under the cursor."""

    @dataclass
    class Opened(Message):
        """The picture under the cursor was clicked on again."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self._places = Places((), (), {})
        self._shots: dict[Path, Shot] = {}
        self._marks: dict[Path, str] = {}
        self._cursor = (0, 0)  # column, row
        self._first = (0, 0)
        self._made: dict[Path, tuple[object, list[list[Segment]]]] = {}

    def show_pictures(self, pictures: Sequence[mk.SavedPicture]) -> None:
        """Other pictures; the cursor is on the first."""
        self._places = Places.of(pictures)
        self._shots.clear()
        self._made.clear()
        self._cursor = self._first = (0, 0)
        self.refresh()

    def show_shot(self, path: Path, shot: Shot) -> None:
        """A picture was read."""
        self._shots[path] = shot
        self.refresh()

    def show_marks(self, marks: Mapping[Path, str]) -> None:
        """What stands in the captions."""
        self._marks = dict(marks)
        self.refresh()

    def shot_of(self, path: Path) -> Shot | None:
        """What was read of a file so far."""
        return self._shots.get(path)

    @property
    def under_cursor(self) -> mk.SavedPicture | None:
        """The picture under the cursor; None in a place without one."""
        return self._picture(*self._cursor)

    @property
    def model(self) -> str | None:
        """The model of the cursor's column."""
        return self._places.models[self._cursor[0]] if self._places.models else None

    def _picture(self, column: int, row: int) -> mk.SavedPicture | None:
        if column >= len(self._places.models) or row >= len(self._places.rows):
            return None
        return self._places.at.get((self._places.rows[row], self._places.models[column]))

    @property
    def _fit(self) -> Fit:
        return fit(self.size.width, self.size.height, len(self._places.models), len(self._places.rows))

    def move(self, across: int, down: int) -> None:
        """Move the cursor; it stays in the grid."""
        ends = (len(self._places.models) - 1, len(self._places.rows) - 1)
        steps = (across, down)
        to = tuple(max(0, min(at + step, end)) for at, step, end in zip(self._cursor, steps, ends, strict=True))
        if to != self._cursor:
            self._go(to[0], to[1])

    def _go(self, column: int, row: int) -> None:
        self._cursor = (column, row)
        self.refresh()
        self.post_message(self.Moved())

    def on_click(self, event: Click) -> None:
        """Go to the picture; a second click opens it."""
        room, first = self._fit, self._begin()
        at = (event.x // (room.columns + 1) + first[0], max(event.y - 1, 0) // (room.lines + 1) + first[1])
        if self._picture(*at) is None:
            return
        if at == self._cursor:
            self.post_message(self.Opened())
        else:
            self._go(*at)

    def _begin(self) -> tuple[int, int]:
        """The column and row that are seen first: the cursor is always seen."""
        room = self._fit
        seen = (room.across, room.down)
        ends = (len(self._places.models), len(self._places.rows))
        first = [
            max(0, min(max(begin, at - number + 1), at, max(end - number, 0)))
            for begin, at, number, end in zip(self._first, self._cursor, seen, ends, strict=True)
        ]
        self._first = (first[0], first[1])
        return self._first

    def render_line(self, y: int) -> Strip:
        """A line: names of models, then lines of pictures with a caption under each."""
        room, (left, top) = self._fit, self._begin()
        columns = range(left, min(left + room.across, len(self._places.models)))
        if y == 0:
            made = [self._heading(column, room.columns) for column in columns]
        else:
            row, line = divmod(y - 1, room.lines + 1)
            row += top
            if row >= len(self._places.rows) or row >= top + room.down:
                return Strip.blank(self.size.width, self.rich_style)
            made = [part for column in columns for part in self._line(column, row, line, room)]
        strip = Strip(made).apply_style(self.rich_style)
        return strip.adjust_cell_length(self.size.width, self.rich_style)

    def _heading(self, column: int, width: int) -> Segment:
        words = shown(self._places.models[column])
        if len(words) > width:
            words = words[: max(width - 2, 1)] + ".."
        return Segment(set_cell_size(words.center(width), width) + " ", Style(bold=True))

    def _line(self, column: int, row: int, line: int, room: Fit) -> list[Segment]:
        picture = self._picture(column, row)
        here = (column, row) == self._cursor
        if line == room.lines:
            return [self._caption(picture, here, room.columns)]
        if picture is None:
            return [Segment(" " * (room.columns + 1))]
        return [*self._drawn(picture.path, room)[line], Segment(" ")]

    def _caption(self, picture: mk.SavedPicture | None, here: bool, width: int) -> Segment:
        mark = self._marks.get(picture.path, "") if picture else ""
        words = f"{picture.seed}{mark and ' ' + mark}" if picture else "none"
        words = f"[{words}]" if here else words
        style = Style(bold=True, reverse=True) if here else Style(dim=True)
        return Segment(set_cell_size(words.center(width), width) + " ", style)

    def _drawn(self, path: Path, room: Fit) -> list[list[Segment]]:
        shot = self._shots.get(path) or Shot(None, "…")
        state = (shot, room.columns, room.lines, self.app.theme)
        made = self._made.get(path)
        if made is None or made[0] != state:
            made = self._made[path] = (state, cells(self, shot, room.columns, room.lines))
        return made[1]
