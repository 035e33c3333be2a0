"""What a terminal or a pipe cannot encode becomes something that it can: no report dies of its "−".

Owns the plain spellings of our own signs. JSON does not come through here: it escapes by itself.
"""

from __future__ import annotations

import codecs
import io
import os
import sys

HANDLER = "mergekit_sd.plain"
PLAIN = {
    "−": "-",
    "–": "-",
    "·": "*",
    "×": "x",
    "…": "...",
    "‖": "|",
    "Ω": "Omega",
    "∞": "inf",
    "≥": ">=",
    **dict(zip("▁▂▃▄▅▆▇█", "12345678", strict=True)),
}


def plainly(error: UnicodeError) -> tuple[str, int]:
    """A codec's error handler: our signs in ASCII, `?` for all else."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(PLAIN.get(sign, "?") for sign in error.object[error.start : error.end]), error.end


def make_speakable() -> None:
    """Let stdout and stderr write whatever they are given, as near to it as their encoding goes."""
    codecs.register_error(HANDLER, plainly)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and codecs.lookup(stream.encoding).name != "utf-8":
            stream.reconfigure(errors=HANDLER)


def wanted_color() -> bool | None:
    """False where NO_COLOR is set (https://no-color.org); None leaves it to whether it is a terminal."""
    return False if os.environ.get("NO_COLOR") else None
