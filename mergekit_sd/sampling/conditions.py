"""What a UNet is told: the values between the prompts and the denoising loop.

Must not know how a prompt is read or how a picture is denoised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_sd.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Condition:
    """One prompt as a UNet takes it.

    `context` is (1, tokens, width), what cross-attention reads; `pooled` is (1, width), SDXL's added
    text embedding, and None for the other families. Inside the loop, where several rows go through
    the UNet at once, the first dimension counts them.
    """

    context: Tensor
    pooled: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Guidance:
    """The conditions of one picture at each step, counted from 0.

    `positive(step)` gives one (condition, weight) for each part joined by AND, at least one;
    `negative(step)` gives what is steered away from.
    """

    positive: Callable[[int], Sequence[tuple[Condition, float]]]
    negative: Callable[[int], Condition]


def added(condition: Condition, size: tuple[int, int]) -> dict[str, Tensor] | None:
    """What SDXL's networks take beside the context, None for the other families.

    The size that the picture was before it was cropped, where the crop began, and the size that it has
    (Podell et al. 2023, arXiv:2307.01952, section 2.2): nothing was cropped. `size` is width and height in pixels.
    """
    if condition.pooled is None:
        return None
    width, height = size
    pooled = condition.pooled
    sizes = torch.tensor((height, width, 0, 0, height, width), dtype=pooled.dtype, device=pooled.device)
    return {"text_embeds": pooled, "time_ids": sizes.expand(len(pooled), -1)}
