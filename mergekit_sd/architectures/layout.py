"""What one file holds, told by its names: the frozen result of detection.

Owns the roles of names and the naming of EMA weights. Must not know how a file was recognised
(`detect`), nor dtypes and bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, TypeAlias

from mergekit_sd.architectures.spec import Architecture, Prediction

Kind: TypeAlias = Literal[
    "checkpoint",
    "unet",
    "vae",
    "text_encoder",
    "lora",
    "lycoris",
    "embedding",
    "hypernetwork",
    "controlnet",
    "unknown",
]

_EMA_PREFIX = "model_ema."


class Role(StrEnum):
    """What a tensor is for, by its name. Only `weight` is ever merged."""

    weight = "weight"
    schedule = "schedule"
    marker = "marker"
    ema = "ema"
    position_ids = "position_ids"
    junk = "junk"
    unknown = "unknown"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor belongs. `block` is the UNet's (IN00, M00, OUT11), None elsewhere."""

    component: str | None
    block: str | None
    role: Role


@dataclass(frozen=True, slots=True)
class Layout:
    """What a file is and what each of its names means.

    `canonical` gives the logical name of each stored name, `places` is by logical name.
    """

    kind: Kind
    architecture: Architecture | None
    canonical: Mapping[str, str]
    places: Mapping[str, Place]
    prediction: Prediction | None = None
    prefixes: Mapping[str, str] = field(default_factory=dict)

    def prefix_of(self, component: str) -> str | None:
        """What the names of a component start with in this file: "" if bare, None if it has none."""
        return self.prefixes.get(component)


def ema_name(unet_name: str) -> str:
    """The name of a UNet tensor's EMA copy: `model_ema.diffusion_modelinput_blocks00weight`."""
    return _EMA_PREFIX + unet_name.removeprefix("model.").replace(".", "")


def is_ema(name: str) -> bool:
    """Whether a name belongs to the EMA copy, its `decay` and `num_updates` included."""
    return name.startswith(_EMA_PREFIX)
