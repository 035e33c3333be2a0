"""The signs that the UI draws itself, and what stands for all others where the terminal has ASCII only.

Owns the choice, which the locale decides.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.segment import Segment
from textual.color import Color
from textual.filter import LineFilter


@dataclass(frozen=True, slots=True)
class Glyphs:
    """`levels`: how full a cell is, from empty to full. The others are one cell wide each."""

    levels: str
    cursor: str
    anchor: str
    arrow: str
    here: str
    ellipsis: str


UNICODE = Glyphs(" ▁▂▃▄▅▆▇█", "▲", "◆", "→", "▸", "…")
ASCII = Glyphs(" .,-~=+*#", "^", "*", ">", ">", "~")
# Python sets LC_CTYPE to this where the locale is C (PEP 538): it says nothing of the terminal.
_COERCED = "C.UTF-8"


def takes_unicode() -> bool:
    """Whether the locale is one of UTF-8; where none is set, whether the output is."""
    names = [os.environ.get("LC_ALL"), os.environ.get("LC_CTYPE"), os.environ.get("LANG")]
    if names[1] == _COERCED and names[2] in ("C", "POSIX"):
        names[1] = None
    name = next((each for each in names if each), None)
    encoding = name if name and sys.platform != "win32" else sys.stdout.encoding or ""
    return encoding.lower().replace("-", "").endswith("utf8")


def glyphs() -> Glyphs:
    """The signs for this terminal."""
    return UNICODE if takes_unicode() else ASCII


# One cell for one cell: boxes, scroll bars, the tree's signs, our own.
_PLAIN = {
    **dict.fromkeys("─━═▔▁", "-"),
    **dict.fromkeys("│┃║▏▕", "|"),
    **dict.fromkeys("╭╮╰╯┌┐└┘├┤┬┴┼╔╗╚╝┏┓┗┛", "+"),
    **dict.fromkeys("▂▃▄▅▆▇█▉▊▋▌▍▎▐▀", "#"),
    **dict(zip("▶▼▸▾→·−–×…’", ">v>v>*--x~'", strict=True)),
}

# Keys whose signs are not ASCII, as short as the footer needs them.
LETTERS = {"enter": "ret", "backspace": "bs", "delete": "del", "escape": "esc", "plus": "+", "underscore": "_"}


class AsciiFilter(LineFilter):
    """Whatever a widget draws, in ASCII; a sign that has no likeness there is a question mark as wide as it is."""

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:
        """The same segments, of the same widths."""
        return [
            segment if segment.control or segment.text.isascii() else Segment(_plain(segment.text), segment.style)
            for segment in segments
        ]


def _plain(text: str) -> str:
    return "".join(sign if sign.isascii() else _PLAIN.get(sign, "?" * cell_len(sign)) for sign in text)


def filters() -> Sequence[LineFilter]:
    """What all that is drawn goes through."""
    return () if takes_unicode() else (AsciiFilter(),)
