"""The tensors of a model as a tree: components, blocks, tensors.

Owns which branch a tensor hangs on. Must not know widgets.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mergekit_sd as mk

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
    "weight": "weights",
}
# What block weights call the UNet's blocks.
_BLOCKS = {"input_blocks": "IN", "middle_block": "M", "output_blocks": "OUT"}
_NUMBER = re.compile(r"(?:^|[._])\d+(?=[._]|$)")
_UNET_BLOCK = re.compile(r"^(input_blocks|middle_block|output_blocks)\.(\d+)")


@dataclass(frozen=True, slots=True)
class Leaf:
    """One tensor: its stored name, the part and block that it is shown under, dtype, shape, size in bytes."""

    name: str
    part: str
    block: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def dimensions(self) -> str:
        """The shape in words."""
        return "×".join(map(str, self.shape)) or "scalar"


def read_leaves(path: Path, found: mk.Inspection) -> tuple[Leaf, ...]:
    """The tensors of a model, by parts in the order of the report, within them by name, 2 before 10."""
    tensors = mk.open(path).file.tensors
    parts = _parts(found)
    prefixes = {part: common_start(names) for part, names in _members(tensors, parts).items()}
    leaves = [
        Leaf(name, part, _block(name, prefixes[part]), info.dtype.name, info.shape, info.nbytes)
        for name, info in tensors.items()
        for part in (parts.get(name, "unknown"),)
    ]
    order = {part: number for number, part in enumerate(dict.fromkeys(parts.values()))}
    return tuple(sorted(leaves, key=lambda leaf: (order.get(leaf.part, len(order)), _natural(leaf.name))))


def _natural(name: str) -> list[tuple[int, str]]:
    """An order of names in which 2 comes before 10."""
    return [(int(word), "") if word.isdecimal() else (-1, word) for word in re.split(r"([0-9]+)", name)]


def _parts(found: mk.Inspection) -> dict[str, str]:
    """The part of each tensor: its component, else what it is for."""
    parts = {name: part for part, share in found.components.items() for name in share.sizes}
    for role, share in found.roles.items():
        for name in share.sizes:
            parts.setdefault(name, str(role))
    return parts


def _members(names: Iterable[str], parts: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(parts.get(name, "unknown"), []).append(name)
    return found


def common_start(names: Sequence[str]) -> str:
    """What all names begin with, in whole dotted words."""
    first, last = min(names), max(names)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[: first.rfind(".", 0, same) + 1]


def _block(name: str, prefix: str) -> str:
    """The block: the name's beginning up to its first number, with the block weights' word where it has one."""
    rest = name.removeprefix(prefix)
    unet = _UNET_BLOCK.match(rest)
    if unet:
        return f"{_BLOCKS[unet[1]]}{int(unet[2]):02}  {unet[0]}" if unet[1] != "middle_block" else "M00  middle_block"
    number = _NUMBER.search(rest)
    return rest[: number.end()] if number else rest.split(".")[0]
