"""The text that a picture carries, as the WebUI writes and reads it, and the PNG that carries it.

Owns the `parameters` text and the picture's file. Must not know how the picture was made.
"""

from __future__ import annotations

import io
import json
import re
from typing import TYPE_CHECKING

from mergekit_sd.sampling.groups import number, sampler_label
from mergekit_sd.sampling.values import Picture
from mergekit_sd.version import VERSION

if TYPE_CHECKING:
    from PIL import Image, PngImagePlugin

NEGATIVE = "Negative prompt:"
KEYWORD = "parameters"
FEWEST = 3  # a last line with fewer parameters is a line of the prompt

# As the WebUI finds them: a name, then a quoted text or all up to the next comma.
_PARAMETER = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def parameters(picture: Picture) -> str:
    """The picture's `parameters` text: the prompts, then one line of settings."""
    settings = picture.settings
    height, width = picture.pixels.shape[:2]
    values = {
        "Steps": str(settings.steps),
        "Sampler": sampler_label(settings.sampler),
        "CFG scale": number(settings.cfg),
        "Seed": str(picture.seed),
        "Size": f"{width}x{height}",
        "Model hash": picture.model_hash,
        "Model": picture.model,
        "CFG Rescale phi": number(settings.cfg_rescale) if settings.cfg_rescale else None,
        "Clip skip": None if settings.clip_skip is None else str(settings.clip_skip),
        "Version": f"mergekit-sd {VERSION}",
    }
    lines = [settings.prompt] if settings.prompt else []
    if settings.negative:
        lines.append(f"{NEGATIVE} {settings.negative}")
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in values.items() if value))
    # Half of a surrogate pair, from a name that is no text, has no bytes in any PNG.
    return "\n".join(lines).encode("utf-8", "backslashreplace").decode()


def read_parameters(text: str) -> dict[str, str]:
    """What a `parameters` text says: "Prompt", "Negative prompt", and each setting under its own name.

    A prompt with a line that starts with "Negative prompt:" is cut there, as by the WebUI: the text has no
    other mark. A text without settings is all prompt.
    """
    before, newline, last = text.rstrip("\n").rpartition("\n")
    found = _PARAMETER.findall(last)
    if len(found) < FEWEST:
        before, newline, found = text, "\n", []
    prompt, negative = before, ""
    start = re.search(rf"^[ \t]*{NEGATIVE} ?", before, re.MULTILINE) if newline else None
    if start:
        prompt, negative = before[: start.start()].removesuffix("\n"), before[start.end() :]
    return {"Prompt": prompt, "Negative prompt": negative} | {name: _unquoted(value) for name, value in found}


def read_settings(line: str) -> dict[str, str]:
    """A line of settings, however few, each under its own name: a usage hint in the words of such a text."""
    return {name: _unquoted(value) for name, value in _PARAMETER.findall(line)}


def _quoted(value: str) -> str:
    """The WebUI quotes a value with a comma, a newline or a colon; other values that it would misread, too."""
    if value == value.strip() and not value.startswith('"') and not any(c in value for c in ",\n:"):
        return value
    return json.dumps(value, ensure_ascii=False)


def _unquoted(value: str) -> str:
    if not value.startswith('"'):
        return value
    try:
        return str(json.loads(value))
    except ValueError:
        return value


def png(picture: Picture) -> bytes:
    """The picture as a PNG with its `parameters`: tEXt, or iTXt for letters that Latin-1 lacks."""
    from PIL import Image, PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_text(KEYWORD, parameters(picture))
    return image_bytes(Image.fromarray(picture.pixels), info)


def image_bytes(image: Image.Image, info: PngImagePlugin.PngInfo | None = None) -> bytes:
    """An image's PNG. The same image gives the same bytes, under one version of Pillow."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()
