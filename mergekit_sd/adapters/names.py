"""A LoRA-family file as modules: each with its parts under their canonical names.

Owns the grouping of keys. Must not know checkpoints (`matching`) nor formulas: no tensor is read here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mergekit_sd.adapters.settings import Settings, read_settings
from mergekit_sd.adapters.styles import ALPHA, OFT_R, Style, component_of, parse
from mergekit_sd.errors import MalformedFile, WrongFormat
from mergekit_sd.formats.tensor import ModelFile, TensorInfo
from mergekit_sd.text import listed

_RANKED = ("lora_down.weight", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")  # as many rows as the rank
_WHOLE = "lokr_w2"  # beside `lokr_w1`: factors that have no rank


@dataclass(frozen=True, slots=True)
class Module:
    """What a file holds for one layer. `parts` is by canonical name ("lora_down.weight", "hada_w1_a", …).

    `said`: numbers of PEFT's settings, to stand beside the parts by their names there. `scale` stands in for
    alpha/rank where the file has no alpha.
    """

    name: str
    parts: Mapping[str, TensorInfo]
    said: Mapping[str, float] = field(default_factory=dict)

    @property
    def scale(self) -> float | None:
        """What settings say for alpha/rank; None: nothing."""
        return self.said.get("scale")


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA-family file. `style`: how most of its keys are spelt; `unused`: the keys that belong to no module."""

    path: Path
    style: Style
    modules: tuple[Module, ...]
    metadata: Mapping[str, str]
    unused: tuple[str, ...]


def read_adapter(model: ModelFile) -> Adapter:
    """The modules of a file, in the order of its keys.

    Raises WrongFormat if it has none, MalformedFile where two keys are one part, or PEFT's settings are broken.
    """
    grouped: dict[str, dict[str, TensorInfo]] = {}
    styles: Counter[Style] = Counter()
    unused: list[str] = []
    for name, tensor in model.tensors.items():
        key = parse(name)
        if key is None:
            unused.append(name)
            continue
        parts = grouped.setdefault(key.module, {})
        if key.part in parts:
            raise MalformedFile(
                "Two keys are the same part of one module.", file=model.path, details=[parts[key.part].name, name]
            )
        parts[key.part] = tensor
        styles.update([key.style] if key.style else [])
    if not grouped:
        raise _no_adapter(model)
    settings = read_settings(model)
    modules = tuple(Module(name, parts, _said(settings, name, parts)) for name, parts in grouped.items())
    style = styles.most_common(1)[0][0] if styles else "comfyui"
    return Adapter(model.path, style, modules, model.metadata, tuple(unused))


def _said(settings: Settings, name: str, parts: Mapping[str, TensorInfo]) -> Mapping[str, float]:
    component, rest = component_of(name)
    if OFT_R in parts:
        return settings.turning(component)
    shape = next((parts[part].shape for part in _RANKED if part in parts), ())
    if ALPHA in parts or not (shape or _WHOLE in parts):
        return {}
    scale = settings.scale(component, rest, shape[0] if shape else None)
    return {} if scale is None else {"scale": scale}


def _no_adapter(model: ModelFile) -> WrongFormat:
    held = "none of its tensors has a name that such files have" if model.tensors else "it holds no tensors"
    return WrongFormat(
        f"This is no LoRA or LyCORIS file: {held}.",
        file=model.path,
        hint="`mergekit-sd inspect` tells what a file is",
        details=[listed(model.tensors)] if model.tensors else (),
    )
