"""The noise that pictures begin as, and that some samplers add: of one generator for each picture.

Owns the promise that a seed's picture does not depend on the pictures beside it, nor on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergekit_sd.errors import UsageError
from mergekit_sd.lazy import torch

if TYPE_CHECKING:
    from torch import Generator, Tensor

CELL = 8  # pixels across which one latent stands for, in all families


def generators(seeds: Sequence[int]) -> list[Generator]:
    """One generator for each seed, on the CPU: it draws the first noise, then that of each step, as the WebUI does.

    Raises UsageError for a seed that torch does not take.
    """
    for seed in seeds:
        if not 0 <= seed < 2**64:
            raise UsageError(f"{seed} is no seed.", key="seeds", hint="Give whole numbers from 0 to 2^64 - 1.")
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def first_noise(sources: Sequence[Generator], size: tuple[int, int], channels: int) -> Tensor:
    """Noise (pictures, channels, height / 8, width / 8), float32 on the CPU, each picture's of its own generator.

    `size` is width and height in pixels. Raises UsageError where they are not multiples of 8.
    """
    width, height = size
    if min(size) < CELL or width % CELL or height % CELL:
        raise UsageError(
            f"A picture cannot be {width} by {height} pixels.", key="size", hint="Give positive multiples of 8."
        )
    shape = (channels, height // CELL, width // CELL)
    return torch.stack([torch.randn(shape, generator=source) for source in sources])
