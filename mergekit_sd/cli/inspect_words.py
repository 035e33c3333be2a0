"""Words and lines that the reports about files share.

Owns the names of kinds, parts and families for people, and how a list is cut. Must not know what is reported.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from mergekit_sd.cli.layout import entry
from mergekit_sd.cli.show import console
from mergekit_sd.text import shown

if TYPE_CHECKING:
    from rich.table import Table

MOST = 20  # names that a list shows; all of them are in the JSON
LONGEST = 240  # characters of one value; a recipe may be pages long

PARTS = {
    "unet": "UNet",
    "vae": "VAE",
    "text_encoder": "text encoder",
    "text_encoder_2": "text encoder 2",
    "depth": "depth model",
    "schedule": "schedule buffers",
    "marker": "markers",
    "ema": "EMA copies of the UNet",
    "junk": "junk",
    "position_ids": "position_ids",
    "unknown": "not recognised",
    "weights": "all weights",
}
KINDS = {
    "checkpoint": "checkpoint",
    "unet": "UNet alone",
    "vae": "VAE",
    "text_encoder": "text encoder",
    "lora": "LoRA",
    "lycoris": "LyCORIS",
    "embedding": "embedding (textual inversion)",
    "hypernetwork": "hypernetwork",
    "controlnet": "ControlNet",
    "unknown": "not recognised: no Stable Diffusion model that we know",
}
FAMILIES = {
    "sd1": "Stable Diffusion 1",
    "sd2": "Stable Diffusion 2",
    "sdxl": "Stable Diffusion XL",
    "sdxl-refiner": "Stable Diffusion XL's refiner",
}


def say(text: str, style: str = "") -> None:
    """A line of text that is escaped already; long ones wrap in the terminal, not here."""
    from rich.text import Text

    console().print(Text(text, style=style), soft_wrap=True)


def fact(label: str, text: str) -> None:
    """A label and foreign text beside it, escaped, cut and wrapped under itself."""
    say(entry(label, cut(text), 18))


def cut(text: str) -> str:
    """A foreign value, escaped, with how long it is where it is cut."""
    more = f" … ({len(text):,} characters)" if len(text) > LONGEST else ""
    return shown(text[:LONGEST]) + more


def tight(made: Table) -> Table:
    """Less space between columns: names are long, and terminals 80 wide."""
    made.padding = (0, 1, 0, 0)
    return made


def items(title: str, lines: Iterable[str]) -> None:
    """A title and the first lines under it."""
    every = list(lines)
    say(title)
    for line in every[:MOST]:
        say(f"  {line}")
    if len(every) > MOST:
        say(f"  … and {len(every) - MOST:,} more (all of them with --json)")
