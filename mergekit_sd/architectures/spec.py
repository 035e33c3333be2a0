"""What an architecture is: its tensors with their shapes, components and blocks, as frozen values.

Owns the types only. Must not know where the data comes from (`catalog`) nor files (`detect`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

Shape: TypeAlias = tuple[int, ...]
Prediction: TypeAlias = Literal["epsilon", "v"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of an architecture. `optional`: a file is whole without it."""

    shape: Shape
    component: str | None
    block: str | None
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Architecture:
    """One variant of a family. Two are equal when their names are: there is one of each.

    `components` maps a component to the prefix of its names. `tensors` holds every name that a
    published file of this architecture has; `known_besides` those that it may have as well.
    Everything under the prefix of an `open_components` member belongs to it, whatever its name.
    """

    name: str
    family: str
    title: str = field(compare=False)
    modelspec: str = field(compare=False)
    resolution: int = field(compare=False)
    prediction: Prediction | None = field(compare=False)
    components: Mapping[str, str] = field(compare=False)
    open_components: frozenset[str] = field(compare=False)
    blocks: tuple[str, ...] = field(compare=False)
    tensors: Mapping[str, TensorSpec] = field(compare=False)
    known_besides: Mapping[str, TensorSpec] = field(compare=False)
    schedule: frozenset[str] = field(compare=False)
    conv_in: str = field(compare=False)
    channels: int = field(compare=False)
    position_ids: str | None = field(compare=False)
    position_count: int = field(default=77, compare=False)
    epsilon_form: tuple[str, int] | None = field(default=None, compare=False)

    def published_as(self, prediction: Prediction | None) -> tuple[str, int]:
        """The `modelspec.architecture` and the resolution of a model of this prediction type.

        SD2 has two names for one layout: 768-v, and 512 where it predicts epsilon.
        """
        if prediction == "epsilon" and self.epsilon_form is not None:
            return self.epsilon_form
        return self.modelspec, self.resolution
