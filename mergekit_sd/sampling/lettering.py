"""Letters on pictures: a font that has a text's letters, and lines that fit. Must not know what is written."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from mergekit_sd.text import shown

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

# Pillow's own font has Latin letters without accents; the systems' fonts for the rest, widest first.
FONTS = (
    "NotoSans-Regular.ttf",
    "DejaVuSans.ttf",
    "segoeui.ttf",
    "Arial Unicode.ttf",
    "Arial.ttf",
    "LiberationSans-Regular.ttf",
    "NotoSansCJK-Regular.ttc",
    "msyh.ttc",
    "malgun.ttf",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "AppleSDGothicNeo.ttc",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
)
NOWHERE = "\U0010ffff"  # no font has it: what is drawn is the box for missing letters
DOTS = "..."


def fitting(text: str, size: int) -> tuple[str, FreeTypeFont]:
    """`text` in one line, and the first font that has all its letters; else those missing are escaped (`\\u6c34`)."""
    text = shown(" ".join(text.split()))
    letters = "".join(sorted(set(text) - {" "}))
    lacking = {name: _lacking(name, letters) for name in ("", *FONTS) if _font(name, size)}
    best = min(lacking, key=lambda name: len(lacking[name]))
    font = _font(best, size)
    assert font  # Pillow's own is always there
    return "".join(_escaped(c) if c in lacking[best] else c for c in text), font


def in_lines(text: str, font: FreeTypeFont, room: int, lines: int) -> list[str]:
    """`text` in at most `lines` lines of `room` pixels, broken at spaces where it can; dots for what is left."""
    written: list[str] = []
    while text:
        if len(written) == lines - 1 and font.getlength(text) > room:
            keep = _longest(text, font, room - font.getlength(DOTS))
            return [*written, text[:keep].rstrip() + DOTS]
        keep = _longest(text, font, room)
        if keep < len(text):
            at = max(text.rfind(" ", 0, keep + 1), max(text.rfind(c, 0, keep) for c in "-_") + 1)
            keep = at if at > 0 else keep
        written.append(text[:keep].rstrip())
        text = text[keep:].lstrip()
    return written


def _longest(text: str, font: FreeTypeFont, room: float) -> int:
    """How many letters fit into `room` pixels, at least one."""
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle]) <= room else (low, middle - 1)
    return low


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode()


@cache
def _font(name: str, size: int) -> FreeTypeFont | None:
    """The font of that file name in the system's folders, None where it is not; "" is Pillow's own."""
    from PIL import ImageFont

    try:
        font = ImageFont.truetype(name, size) if name else ImageFont.load_default(size)
    except OSError:
        return None
    return font if isinstance(font, ImageFont.FreeTypeFont) else None


@cache
def _lacking(name: str, letters: str) -> str:
    """Which of the letters the font would draw as its box."""
    font = _font(name, 16)
    if font is None:
        return letters
    box = _drawn(font, NOWHERE)
    return "".join(letter for letter in letters if _drawn(font, letter) == box)


def _drawn(font: FreeTypeFont, letter: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(letter)
    return mask.size, bytes(mask)
