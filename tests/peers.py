"""sd-mecha 1.1.8 and mergekit 0.1.5 as their users call them, on one tensor and in float64.

In float64 a peer's result is its formula: what is left of the distance to ours is our rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import tqdm

# pip's resolver cannot install it beside our versions (it asks for transformers and more, which
# its merge methods do not use): `make` installs it without its dependencies.
pytest.importorskip("mergekit", reason="pip install --no-deps -c constraints.txt mergekit")

import sd_mecha
from mergekit.merge_methods import merge_tensors

Peer = Callable[..., torch.Tensor]

mecha_merge = functools.partial(sd_mecha.merge, threads=0, tqdm=functools.partial(tqdm.tqdm, disable=True))


def mecha(recipe: Callable[..., Any]) -> Peer:
    """A function of tensors from a function that makes sd-mecha's recipe of their nodes."""

    def merged(*operands: torch.Tensor) -> torch.Tensor:
        # sd-mecha's methods write into what they are given.
        node = recipe(*(sd_mecha.literal(each.double().clone()) for each in operands))
        wide = {"merge_dtype": torch.float64, "output_dtype": torch.float64}
        return mecha_merge(node, strict_merge_space=None, **wide)["key"]

    return merged


def mergekit(method: str, base: int | None = None, **parameters: Any) -> Peer:
    """A function of tensors from the name of a method of mergekit; `base` counts among the tensors."""

    def merged(*operands: torch.Tensor) -> torch.Tensor:
        wide: Sequence[torch.Tensor] = [each.double() for each in operands]
        return merge_tensors(wide, method, parameters=parameters, base_index=base)

    return merged
