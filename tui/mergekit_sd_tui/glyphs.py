"""The signs that the UI draws itself, and what stands for them where the terminal has ASCII only.

Owns the choice, which the locale decides. Boxes and scroll bars are Textual's.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass


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
