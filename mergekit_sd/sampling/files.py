"""Names of pictures' files, good on every system."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from mergekit_sd.sampling.groups import prompt_of
from mergekit_sd.sampling.values import Picture

LONGEST_MODEL = 160  # bytes: the number, the seed and the temporary file's ending follow, 255 are the most
SAFE = "-_.+() "


def file_names(pictures: Sequence[Picture]) -> tuple[str, ...]:
    """A name for each picture: `night-seed-7.png`, with the prompt's number where there are several.

    Names are good on every system, and differ by more than upper and lower case.
    """
    prompts = list(dict.fromkeys(prompt_of(picture) for picture in pictures))
    names: dict[str, str] = {}
    for picture in pictures:
        number = f"-prompt-{prompts.index(prompt_of(picture)) + 1}" if len(prompts) > 1 else ""
        stem = f"{_safe(picture.model)}{number}-seed-{picture.seed}"
        name, again = f"{stem}.png", 1
        while name.casefold() in names:
            again += 1
            name = f"{stem}-{again}.png"
        names[name.casefold()] = name
    return tuple(names.values())


def _safe(model: str) -> str:
    plain = unicodedata.normalize("NFC", model).encode("utf-8", "replace").decode()
    kept = "".join(c if c.isalnum() or c in SAFE else "_" for c in plain).strip(". ")
    return kept.encode()[:LONGEST_MODEL].decode("utf-8", "ignore") or "model"
