"""Network tags of a prompt: `<lora:name:te:unet>` and `<hypernet:name:multiplier>`, taken out of the text.

Owns which tags there are. Must not know the files that they name.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from mergekit_sd.recipe.elemental import NUMBER
from mergekit_sd.recipe.loras import LoraUse, parse_lora
from mergekit_sd.recipe.positions import Where
from mergekit_sd.text import did_you_mean, shown

_TAG = re.compile(r"<(?P<kind>[A-Za-z]\w*):(?P<rest>[^<>]*)(?P<end>>?)")
_HYPERNET = re.compile(r"(?P<name>[^:]+)(?::(?P<multiplier>[^:]*))?")
_LORAS = ("lora", "lyco")  # lyco: the WebUI's other word for the same
_KINDS = (*_LORAS, "hypernet")
_NOWHERE = Where()


@dataclass(frozen=True, slots=True)
class HypernetTag:
    """A hypernetwork that a prompt asks for, by name, at a strength."""

    name: str
    multiplier: float = 1.0


@dataclass(frozen=True, slots=True)
class Tags:
    """A prompt without its tags, and what they ask for, in their order."""

    text: str
    loras: tuple[LoraUse, ...] = ()
    hypernets: tuple[HypernetTag, ...] = ()


def take_tags(text: str, where: Where = _NOWHERE) -> Tags:
    """Take the network tags out of a prompt; `where` it stands, for refusals.

    A LoRA's text encoder strength is 1 unless given, its UNet's is the text encoder's; `te=`, `unet=` and `lbw=` may
    name them. Raises RecipeError for a tag that is not closed, of an unknown kind, or with anything but numbers.
    """
    loras: list[LoraUse] = []
    hypernets: list[HypernetTag] = []
    kept: list[str] = []
    last = 0
    for tag in _TAG.finditer(text):
        if not tag["end"] and tag["kind"] not in _KINDS:
            continue
        kept.append(text[last : tag.start()])
        last = tag.end()
        if not tag["end"]:
            raise where.error(f'"{shown(tag[0][:60])}" is not closed.', hint="write > after a tag")
        if tag["kind"] in _LORAS:
            loras.append(parse_lora(f"<lora:{tag['rest']}>", where))
        elif tag["kind"] == "hypernet":
            hypernets.append(_hypernet(tag["rest"], tag[0], where))
        else:
            hint = did_you_mean(tag["kind"], _KINDS)
            raise where.error(f'"{shown(tag[0])}" is a tag of an unknown kind.', hint=hint)
    return Tags("".join((*kept, text[last:])), tuple(loras), tuple(hypernets))


def _hypernet(rest: str, tag: str, where: Where) -> HypernetTag:
    found = _HYPERNET.fullmatch(rest)
    number = "1" if found and found["multiplier"] is None else found["multiplier"].strip() if found else ""
    multiplier = float(number) if NUMBER.fullmatch(number) else math.nan
    if not found or not math.isfinite(multiplier):
        message = f'"{shown(tag)}" is no hypernetwork as a prompt has it.'
        raise where.error(message, hint="write <hypernet:name> or <hypernet:name:0.8>")
    return HypernetTag(found["name"], multiplier)
