"""How strong PEFT means each module to be, and which way its OFT turns: that is in its settings, not in tensors.

Owns the reading of these settings: a file's metadata (diffusers writes `lora_adapter_metadata`), or
`adapter_config.json` beside `adapter_model.safetensors`. Both come from strangers and are only data:
a pattern that is more than a name is refused, never run as the regular expression that PEFT takes it for.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit_sd.errors import MalformedFile, UnreadableInput
from mergekit_sd.formats.tensor import ModelFile

METADATA_KEY = "lora_adapter_metadata"
_WEIGHTS, _CONFIG = "adapter_model", "adapter_config.json"
_MOST_BYTES = 1 << 20
_PLAIN = re.compile(r"\^?[\w.]+")
_MOST_TERMS = 64  # PEFT's own are 5
_COFT_EPS = 6e-5  # where its settings do not say
_ANY_COMPONENT = ("",)
_COMPONENTS = ("unet.", "text_encoder.", "text_encoder_2.")


@dataclass(frozen=True, slots=True)
class _Numbers:
    usual: float | None
    of: Mapping[str, float]

    def of_module(self, name: str) -> float | None:
        """The number of a module: of the first pattern that is its name, or its end if without `^`; else the usual."""
        whole = (f"^{name}", name)
        found = (number for pattern, number in self.of.items() if pattern in whole or name.endswith(f".{pattern}"))
        return next(found, self.usual)


@dataclass(frozen=True, slots=True)
class _Said:
    alphas: _Numbers
    ranks: _Numbers
    rank_stabilised: bool
    turning: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Settings:
    """What PEFT's settings say of a file's modules, by component ("" for all)."""

    said: Mapping[str, _Said] = field(default_factory=dict)

    def scale(self, component: str | None, name: str, rank: int | None) -> float | None:
        """What the product of a module's factors is multiplied by: α/r, or α/√r; None where nothing is said.

        `name`: without the component's prefix. `rank`: as the factors have it; None where they are whole, as LoKr's
        may be: PEFT divides by the r of its settings all the same.
        """
        said = self.said.get(f"{component}.", self.said.get(""))
        if said is None:
            return None
        alpha = said.alphas.of_module(name)
        r = said.ranks.of_module(name) if rank is None else rank
        if alpha is None or r is None or r < 1:
            return None
        return alpha / (math.sqrt(r) if said.rank_stabilised else r)

    def turning(self, component: str | None) -> Mapping[str, float]:
        """How OFT makes rotations of its numbers, as `algorithms.oft_of_inputs` takes it; nothing where it is not said.

        What settings do not say is as PEFT 0.21 has it by itself.
        """
        said = self.said.get(f"{component}.", self.said.get(""))
        return said.turning if said else {}


def read_settings(model: ModelFile) -> Settings:
    """The settings in a file's metadata, else beside it, else none.

    Raises MalformedFile for settings that cannot be understood: without them the strength would be a guess.
    """
    said = model.metadata.get(METADATA_KEY)
    if said is not None:
        return Settings(_said(_parsed(said, model.path, METADATA_KEY), model.path, _COMPONENTS))
    config = model.path.with_name(_CONFIG)
    if model.path.stem != _WEIGHTS or not config.is_file():
        return Settings()
    return Settings(_said(_parsed(_text(config), config, None), config, _ANY_COMPONENT))


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise UnreadableInput(f"Cannot read it: {error.strerror}.", file=path, hint="check its permissions") from None
    if len(data) > _MOST_BYTES:
        raise MalformedFile("PEFT's settings are a few KiB; this is more than 1 MiB.", file=path)
    return data.decode("utf-8", "replace")


def _parsed(text: str, path: Path, key: str | None) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise MalformedFile("PEFT's settings are no JSON object.", file=path, key=key)
    return data


def _said(data: Mapping[str, Any], path: Path, prefixes: tuple[str, ...]) -> dict[str, _Said]:
    whole = data.get("peft_type") == "LOKR"  # else factors tell their rank
    found: dict[str, _Said] = {}
    for prefix in prefixes:
        alpha = "lora_alpha" if prefix + "lora_alpha" in data else "alpha"  # LoHa and LoKr say `alpha`
        found[prefix] = _Said(
            _numbers(data, path, prefix + alpha, prefix + "alpha_pattern"),
            _numbers(data, path, prefix + "r", prefix + "rank_pattern") if whole else _Numbers(None, {}),
            bool(data.get(prefix + "use_rslora")),
            _turning(data, path, prefix) if data.get("peft_type") == "OFT" else {},
        )
    return found


def _turning(data: Mapping[str, Any], path: Path, prefix: str) -> dict[str, float]:
    key = prefix + "num_cayley_neumann_terms"
    terms = _number(data.get(key, 5), path, key)
    if not 1 <= terms <= _MOST_TERMS or terms % 1:
        raise MalformedFile(f"The terms of a series: a whole number from 1 to {_MOST_TERMS}.", file=path, key=key)
    found = {"cayley_terms": terms if data.get(prefix + "use_cayley_neumann", True) else 0.0}
    if data.get(prefix + "coft"):
        key = prefix + "eps"
        eps = _number(data.get(key, _COFT_EPS), path, key)
        if eps < 0:
            raise MalformedFile("A length is not negative.", file=path, key=key)
        found["coft_eps"] = eps
    return found


def _numbers(data: Mapping[str, Any], path: Path, usual: str, by_module: str) -> _Numbers:
    patterns = data.get(by_module) or {}
    if not isinstance(patterns, dict):
        raise MalformedFile("Numbers by module must be an object.", file=path, key=by_module)
    return _Numbers(
        None if data.get(usual) is None else _number(data[usual], path, usual),
        {_plain(name, path): _number(number, path, name) for name, number in patterns.items()},
    )


def _number(value: Any, path: Path, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 2**127:
        raise MalformedFile("This must be a number.", file=path, key=key)
    return float(value)


def _plain(pattern: str, path: Path) -> str:
    """A pattern that is a name, or one behind `^`, which stays; `$` and escaped dots say nothing more."""
    name = pattern.removesuffix("$").replace(r"\.", ".")
    if not _PLAIN.fullmatch(name):
        raise MalformedFile(
            "Alphas or ranks are given by regular expressions, and only names of modules are read.",
            file=path,
            key=pattern,
            hint="save the adapter with alpha_pattern and rank_pattern written out module by module",
        )
    return name
