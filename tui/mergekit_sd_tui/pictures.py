"""Pictures in a terminal: half cells of colour, shades of characters where there is none, graphics where they work.

Owns how a picture becomes cells, and what the terminal can show. Must not know where pictures come from.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.color import Color
from rich.segment import Segment
from rich.style import Style
from textual.strip import Strip
from textual.widget import Widget

from mergekit_sd.text import shown
from mergekit_sd_tui.glyphs import takes_unicode

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_PIXELS = 64_000_000  # of a file: a small one can claim to be of any size
SIDE = 320  # pixels of what is kept: more than any terminal has cells
KEPT = 2  # pictures as they were drawn last
SHADES = " .:-=+*#%@"  # from dark to bright, on a dark ground
UPPER = "\u2580"  # the upper half of a cell
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


@dataclass(frozen=True, slots=True, eq=False)
class Shot:
    """A picture as it was read, small; or why it could not be."""

    picture: Image | None
    problem: str = ""


def read_shot(path: Path) -> Shot:
    """Read a picture's file. Never raises: strangers' files have every fault."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path, formats=FORMATS) as file:
            if file.width * file.height > MOST_PIXELS:
                return Shot(None, f"too large: {file.width} x {file.height}")
            picture = file.convert("RGB")
        picture.thumbnail((SIDE, SIDE))
        return Shot(picture)
    except FileNotFoundError:
        return Shot(None, "the file is gone")
    except UnidentifiedImageError:
        return Shot(None, "no picture")
    except Exception as error:  # Pillow raises what its decoders do
        return Shot(None, f"cannot be read: {shown(str(error))}")


def fitted(shape: tuple[int, int], columns: int, lines: int) -> tuple[int, int]:
    """The cells (columns, lines) of a picture of this width and height in a room; a cell is twice as high as wide."""
    width, height = max(shape[0], 1), max(shape[1], 1)
    scale = min(columns / width, 2 * lines / height)
    return max(1, min(columns, round(width * scale))), max(1, min(lines, round(height * scale / 2)))


def half_cells(picture: Image, columns: int, lines: int) -> list[list[Segment]]:
    """A picture as lines of cells, each of two pixels: the upper in the letter's colour, the lower in the ground's."""
    data = picture.resize((columns, 2 * lines)).tobytes()

    def colour(x: int, y: int) -> Color:
        at = 3 * (y * columns + x)
        return Color.from_rgb(*data[at : at + 3])

    return [
        [Segment(UPPER, Style.from_color(colour(x, 2 * y), colour(x, 2 * y + 1))) for x in range(columns)]
        for y in range(lines)
    ]


def shades(picture: Image, columns: int, lines: int, *, dark: bool = True) -> list[list[Segment]]:
    """A picture in characters of ASCII, by brightness; `dark`: the terminal's ground is."""
    letters = SHADES if dark else SHADES[::-1]
    data = picture.convert("L").resize((columns, lines)).tobytes()
    rows = (data[start : start + columns] for start in range(0, len(data), columns))
    return [[Segment("".join(letters[value * len(letters) // 256] for value in row))] for row in rows]


def without_colour(widget: Widget) -> bool:
    """Whether pictures are to be shades: no colours are wanted, or the terminal lacks half cells."""
    return widget.app.no_color or not takes_unicode() or os.environ.get("TERM") == "dumb"


def cells(widget: Widget, shot: Shot, columns: int, lines: int) -> list[list[Segment]]:
    """A picture, or the words why there is none, as lines of that many cells; the picture is in the middle."""
    if shot.picture is None:
        return [[Segment(line)] for line in words_in(shot.problem, columns, lines)]
    wide, high = fitted(shot.picture.size, columns, lines)
    if without_colour(widget):
        made = shades(shot.picture, wide, high, dark=widget.app.current_theme.dark)
    else:
        made = half_cells(shot.picture, wide, high)
    left = (columns - wide) // 2
    blank, margins = [Segment(" " * columns)], (Segment(" " * left), Segment(" " * (columns - wide - left)))
    top = (lines - high) // 2
    rows = [[margins[0], *row, margins[1]] for row in made]
    return [blank] * top + rows + [blank] * (lines - high - top)


def words_in(words: str, columns: int, lines: int) -> list[str]:
    """Words as exactly so many lines of so many cells."""
    import textwrap

    rows = textwrap.wrap(words, max(columns, 1))[:lines]
    rows = [""] * ((lines - len(rows)) // 2) + rows
    return [row[:columns].center(columns) for row in rows + [""] * (lines - len(rows))]


class PictureView(Widget):
    """One picture as large as there is room, in cells."""

    DEFAULT_CSS = "PictureView { width: 1fr; height: 1fr; }"

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self._shot: Shot | None = None
        self._drawn: dict[object, list[Strip]] = {}

    def show(self, shot: Shot | None) -> None:
        """Show a picture, or nothing."""
        self._shot = shot
        self.refresh()

    def render_line(self, y: int) -> Strip:
        """A line of the picture. The last pictures are kept: two may be shown in turn."""
        state, (width, height) = (self._shot, self.size, self.app.theme), self.size
        if state not in self._drawn:
            made = cells(self, self._shot, width, height) if self._shot and width and height else []
            self._drawn = dict(list(self._drawn.items())[1 - KEPT :])
            self._drawn[state] = [Strip(row, width) for row in made]
        rows = self._drawn[state]
        return rows[y].apply_style(self.rich_style) if y < len(rows) else Strip.blank(width, self.rich_style)


# --- graphics of the terminal ---------------------------------------------------------------------------

_GRAPHICS: list[Any] = []


def ask_terminal() -> None:
    """Find out whether the terminal draws pixels (Sixel, kitty). Before the app runs: it would get the answer.

    Nothing is asked where the UI is served to a browser, where colours are not wanted, or of a dumb terminal.
    """
    quiet = os.environ.get("TEXTUAL_DRIVER") or "NO_COLOR" in os.environ or os.environ.get("TERM", "dumb") == "dumb"
    if quiet or not (sys.__stdin__ and sys.__stdin__.isatty() and sys.__stdout__ and sys.__stdout__.isatty()):
        return
    try:
        # Imported, the package asks the terminal itself.
        from textual_image import renderable, widget
    except Exception:  # not installed, or a terminal that answers nonsense: cells will do
        return
    kinds = {renderable.SixelImage: widget.SixelImage, renderable.TGPImage: widget.TGPImage}
    if renderable.Image in kinds:
        _GRAPHICS.append(kinds[renderable.Image])


def graphics() -> Any:
    """The class of the widget that draws a file's pixels, where the terminal can; else None."""
    return _GRAPHICS[-1] if _GRAPHICS else None
