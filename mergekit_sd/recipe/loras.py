"""How a recipe uses a LoRA file: strengths for UNet and text encoders, and weights per block.

Owns the forms: a name, a prompt's `<lora:name:te:unet>`, a table; and the block weights of the
lora-block-weight extension (LBW). Must not know what is in the file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mergekit_sd.recipe.elemental import NUMBER
from mergekit_sd.recipe.fields import LoraEntry
from mergekit_sd.recipe.matching import Layout
from mergekit_sd.recipe.positions import Where
from mergekit_sd.recipe.presets import PRESETS, SD_BLOCKS, find_preset
from mergekit_sd.recipe.weights import COUNTS, BlockWeights, parse_weights
from mergekit_sd.text import count, did_you_mean, shown

# The blocks that a LoRA changes, base first, and all that there are: SD1 and SD2, SDXL.
_SD = ["base", *(f"IN{n:02}" for n in (1, 2, 4, 5, 7, 8)), "M00", *(f"OUT{n:02}" for n in range(3, 12))]
_XL = ["base", *(f"IN{n:02}" for n in (4, 5, 7, 8)), "M00", *(f"OUT{n:02}" for n in range(6))]
_XL_BLOCKS = [block for block in SD_BLOCKS if block == "M00" or int(block[-2:]) < 9]
_LISTS = {len(_SD): (_SD, ["base", *SD_BLOCKS]), len(_XL): (_XL, ["base", *_XL_BLOCKS])}

# LBW's presets, of 17 numbers.
LORA_PRESETS: Mapping[str, tuple[float, ...]] = {
    "NONE": (0,) * 17,
    "ALL": (1,) * 17,
    "ALL0.5": (0.5,) * 17,
    "INS": (1,) * 4 + (0,) * 13,
    "IND": (1, 0, 0, 0, 1, 1, 1) + (0,) * 10,
    "INALL": (1,) * 7 + (0,) * 10,
    "MIDD": (1, 0, 0, 0) + (1,) * 8 + (0,) * 5,
    "OUTD": (1,) + (0,) * 7 + (1,) * 4 + (0,) * 5,
    "OUTS": (1,) + (0,) * 11 + (1,) * 5,
    "OUTALL": (1,) + (0,) * 7 + (1,) * 9,
}
_PROMPT = re.compile(r"<lora:(?P<name>[^:<>]+)(?P<rest>(?::[^:<>]*)*)>")
_HINT = 'write a name, "<lora:name:0.8>" or "<lora:name:0.5:0.8>" (text encoder, UNet), or a table'


@dataclass(frozen=True, slots=True)
class LoraUse:
    """A LoRA and its strengths: of the UNet's part (`strength`), of each text encoder's, times `blocks`."""

    lora: str
    strength: float = 1.0
    text_encoder: float = 1.0
    text_encoder_2: float = 1.0
    blocks: BlockWeights | None = None

    def strengths(self, layout: Layout, names: Iterable[str], seed: int = 0) -> dict[str, float]:
        """Each tensor's strength. Refuses block weights that do not fit the model."""
        names = list(names)
        own = {"text_encoder": self.text_encoder, "text_encoder_2": self.text_encoder_2}
        blocks = self.blocks.resolve(layout, names, seed) if self.blocks else dict.fromkeys(names, 1.0)
        return {name: own.get(layout.places[name].component or "", self.strength) * blocks[name] for name in names}

    def describe(self) -> dict[str, object]:
        """The strengths in plain data, for reports."""
        said: dict[str, object] = {"strength": self.strength}
        if (self.text_encoder, self.text_encoder_2) != (self.strength, self.strength):
            said["text_encoder"] = self.text_encoder
        if self.text_encoder_2 != self.text_encoder:
            said["text_encoder_2"] = self.text_encoder_2
        return said | ({"blocks": self.blocks.describe()} if self.blocks else {})


def parse_lora(entry: str | LoraEntry, where: Where) -> LoraUse:
    """Read an entry of a list of LoRAs, in any of its forms."""
    if isinstance(entry, LoraEntry):
        first = entry.strength if entry.text_encoder is None else entry.text_encoder
        second = first if entry.text_encoder_2 is None else entry.text_encoder_2
        blocks = None if entry.blocks is None else parse_blocks(entry.blocks, where.at("blocks"))
        return LoraUse(entry.lora, entry.strength, first, second, blocks)
    return _parse_prompt(entry, where) if entry.lstrip().startswith("<") else LoraUse(entry)


def _parse_prompt(text: str, where: Where) -> LoraUse:
    """`<lora:name:te:unet>` as the WebUI reads it: te is 1 unless given, unet as te; also te=…, unet=…, lbw=…."""
    found = _PROMPT.fullmatch(text.strip())
    if found is None:
        raise where.error(f'"{shown(text)}" is no LoRA as a prompt has it.', hint=_HINT)
    parts = found["rest"].split(":")[1:]
    plain = [part for part in parts if "=" not in part]
    named = dict(part.split("=", 1) for part in parts if "=" in part)
    unknown = [name for name in named if name not in ("te", "unet", "lbw")]
    if unknown or len(plain) > 2:
        raise where.error(f'"{shown(text)}" says more than a LoRA takes.', hint=_HINT)
    numbers = [_number(part, text, where) for part in plain]
    encoder = _number(named["te"], text, where) if "te" in named else numbers[0] if numbers else 1.0
    unet = _number(named["unet"], text, where) if "unet" in named else numbers[1] if len(numbers) > 1 else encoder
    blocks = parse_blocks(named["lbw"], where) if "lbw" in named else None
    return LoraUse(found["name"], unet, encoder, encoder, blocks)


def _number(part: str, text: str, where: Where) -> float:
    number = float(part) if NUMBER.fullmatch(part.strip()) else math.nan
    if not math.isfinite(number):
        raise where.error(f'"{shown(part)}" in "{shown(text)}" is no number.', hint=_HINT)
    return number


def parse_blocks(value: object, where: Where) -> BlockWeights:
    """Block weights of a LoRA: LBW's lists and presets, or any form that a weight takes, unbounded."""
    if isinstance(value, str) and value.strip().upper() in LORA_PRESETS:
        return _expanded(LORA_PRESETS[value.strip().upper()], where)
    items = re.split("[,;]", value.strip().rstrip(",;")) if isinstance(value, str) and "," in value else value
    if isinstance(items, Sequence) and not isinstance(items, str) and len(items) in _LISTS:
        numbers = [_listed(item, where) for item in items]
        return _expanded(numbers, where)
    if isinstance(value, str) and not set(value) & set(",;:"):
        return _preset(value, where)
    if isinstance(items, Sequence) and not isinstance(items, str) and len(items) not in COUNTS:
        hint = "write 17 (base first), 26 or 25 for SD1 and SD2, 12, 20 or 19 for SDXL"
        raise where.error(f"These are {count(len(items), 'number')}.", hint=hint)
    return parse_weights(value, where=where, extrapolate=True)


def _listed(item: object, where: Where) -> float:
    if isinstance(item, bool) or not isinstance(item, int | float | str):
        raise where.error(f"A block's weight is {shown(repr(item))}, which is no number.")
    return _number(str(item), str(item), where)


def _preset(name: str, where: Where) -> BlockWeights:
    if find_preset(name.strip()) is None:
        raise where.error(f'There is no preset "{shown(name)}".', hint=did_you_mean(name, [*LORA_PRESETS, *PRESETS]))
    return parse_weights(name, where=where, extrapolate=True)


def _expanded(numbers: Sequence[float], where: Where) -> BlockWeights:
    """A list of the blocks that a LoRA changes; all others have 0."""
    changed, every = _LISTS[len(numbers)]
    given = dict(zip(changed, map(float, numbers), strict=True))
    return BlockWeights(numbers=tuple(given.get(block, 0.0) for block in every), where=where)
