"""Random numbers for one tensor: a function of (seed, tensor name, stream, element) and nothing else.

A counter-based generator (Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
2011) gives element n without the n before it, so that order, threads and chunks do not matter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import xxhash

from mergekit_sd.lazy import torch

if TYPE_CHECKING:
    from mergekit_sd.operations.types import Tensor

# Philox makes four 64-bit words at a time: eight numbers of 32 bits.
BLOCK = 8


@dataclass(frozen=True, slots=True)
class Draw:
    """The draws of tensor `name` under `seed`, from its element `start` (a multiple of 8) on.

    `stream` tells draws for the same elements apart: one for each model of a list.
    """

    seed: int
    name: str
    start: int = 0

    def uniform(self, like: Tensor, stream: int = 0) -> Tensor:
        """float32 in [0, 1), one of 2^24 values with equal chance, in `like`'s shape and on its device."""
        values = (self._words(like.numel(), stream) >> 8).astype("float32")
        return torch.from_numpy(values).mul_(2.0**-24).reshape(like.shape).to(like.device)

    def normal(self, like: Tensor, stream: int = 0) -> Tensor:
        """float32 of the standard normal distribution (Box and Muller 1958), in `like`'s shape and on its device."""
        words = self._words(like.numel() + like.numel() % 2, stream).reshape(-1, 2)
        pairs = torch.from_numpy(words.astype("float32"))
        radius = pairs[:, 0].add(0.5).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
        angle = pairs[:, 1].mul(2.0 * math.pi * 2.0**-32)
        pairs = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)
        return pairs.flatten()[: like.numel()].reshape(like.shape).to(like.device)

    def _words(self, count: int, stream: int) -> Any:
        """`count` numbers of 32 bits for the elements from `start` on."""
        import numpy as np

        key = xxhash.xxh3_128_intdigest(f"{self.seed}/{stream}/{self.name}".encode())
        generator = np.random.Philox(key=[key & (2**64 - 1), key >> 64], counter=self.start // BLOCK)
        return generator.random_raw(-(-count // 2)).view("uint32")[:count]
