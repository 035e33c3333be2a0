"""What a textual inversion holds: how many vectors, how wide, and for which family.

Owns the three ways they are stored. Reads no values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mergekit_sd.formats.tensor import ModelFile, TensorInfo

_FAMILIES = {frozenset({768}): "sd1", frozenset({1024}): "sd2", frozenset({768, 1280}): "sdxl"}
_A1111 = "string_to_param."
_NOT_VECTORS = "string_to_token"
_MOST_DIGITS = 18
_NAMELESS = ("emb_params", "clip_l", "clip_g", "*")


@dataclass(frozen=True, slots=True)
class Embedding:
    """A textual inversion. `widths` is by the name of each tensor: SDXL's has one per text encoder.

    `token` is the word in the prompt, None where the file's name is (A1111's rule for a token "*").
    `trained_on` is a checkpoint's name, as the file says.
    """

    vectors: int
    widths: Mapping[str, int]
    family: str | None
    token: str | None
    name: str | None
    step: int | None
    trained_on: str | None

    def as_json(self) -> dict[str, object]:
        """One flat object."""
        return {
            "vectors": self.vectors,
            "widths": dict(self.widths),
            "family": self.family,
            "token": self.token,
            "name": self.name,
            "step": self.step,
            "trained_on": self.trained_on,
        }


def embedding_of(model: ModelFile) -> Embedding:
    """What the tensors and the few plain values beside them say."""
    found = {
        name.removeprefix(_A1111): tensor
        for name, tensor in model.tensors.items()
        if not name.startswith(_NOT_VECTORS) and tensor.shape
    }
    widths = {name: tensor.shape[-1] for name, tensor in found.items()}
    return Embedding(
        vectors=max(map(_vectors, found.values()), default=0),
        widths=widths,
        family=_FAMILIES.get(frozenset(widths.values())),
        token=next((name for name in found if name not in _NAMELESS), None),
        name=model.metadata.get("name"),
        step=whole(model.metadata.get("step", "")),
        trained_on=model.metadata.get("sd_checkpoint_name"),
    )


def whole(text: str) -> int | None:
    """The whole number that a text says; None for any other text."""
    return int(text) if text.isdecimal() and len(text) <= _MOST_DIGITS else None


def _vectors(tensor: TensorInfo) -> int:
    """How many tokens of a prompt it takes: (width,) is one."""
    return tensor.numel // tensor.shape[-1] if tensor.shape[-1] else 0
