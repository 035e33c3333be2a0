"""The architectures we know, read from `data/*.toml` and expanded when first asked for.

Owns the reading of the data. Must not know files: telling which architecture a file has is
`detect`'s. One data file holds one family: `sdxl-inpainting` is a variant in `sdxl.toml`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from mergekit_sd.architectures.spec import Architecture, Shape, TensorSpec
from mergekit_sd.architectures.templates import Templates
from mergekit_sd.errors import UsageError
from mergekit_sd.text import did_you_mean

_DATA = Path(__file__).parent / "data"
FAMILIES = ("sd1", "sd2", "sdxl", "sdxl-refiner")
_SCHEDULE_STEPS = 1000


@cache
def names() -> tuple[str, ...]:
    """The names of all architectures, plain variants first within each family."""
    return tuple(name for family in FAMILIES for name in family_data(family)["variants"])


@cache
def get(name: str) -> Architecture:
    """The architecture of that name, expanded once per process."""
    # The longest family first: `sdxl-refiner` is not a variant of `sdxl`.
    for family in sorted(FAMILIES, key=len, reverse=True):
        if name == family or name.startswith(family + "-"):
            variants = family_data(family)["variants"]
            if name in variants:
                return _build(name, family, variants[name])
            break
    raise UsageError(f'There is no architecture "{name}".', hint=did_you_mean(name, names()))


@cache
def read_data(stem: str) -> dict[str, Any]:
    """The parsed `data/{stem}.toml`."""
    return tomllib.loads((_DATA / f"{stem}.toml").read_text(encoding="utf-8"))


def family_data(family: str) -> dict[str, Any]:
    """The parsed data of one family."""
    return read_data(family)


@cache
def component_tensors(family: str, component: str, channels: int = 4) -> Mapping[str, Shape]:
    """The names (below the component's prefix) and shapes of one component of a family."""
    call = family_data(family)["components"][component]["tensors"]
    return dict(_templates(family).expand(call, {"channels": channels}))


@cache
def block_of(family: str) -> Mapping[str, str]:
    """The UNet's blocks by the start of a name below the UNet's prefix: {"input_blocks.0.": "IN00"}."""
    found: dict[str, str] = {}
    for entry in family_data(family)["blocks"]:
        for i in range(entry.get("range", 1)):
            for start in entry["tensors"]:
                found[start.format(i=i)] = entry["name"].format(i=i)
    return found


@cache
def _templates(family: str) -> Templates:
    return Templates({**read_data("layers"), **family_data(family).get("groups", {})})


def _build(name: str, family: str, variant: dict[str, Any]) -> Architecture:
    data = family_data(family)
    said = {**data, **variant}
    components: dict[str, dict[str, Any]] = {**data["components"], **variant.get("components", {})}
    epsilon = None if "modelspec" in variant else data.get("epsilon")
    tensors = dict(_component_specs(family, data["components"], variant["channels"]))
    stored, besides = _schedule_specs(bool(data.get("stores_schedule")))
    return Architecture(
        name=name,
        family=data["family"],
        title=said["title"],
        modelspec=said["modelspec"],
        resolution=said["resolution"],
        prediction=said.get("prediction"),
        components={component: entry["prefix"] for component, entry in components.items()},
        open_components=frozenset(component for component, entry in components.items() if "tensors" not in entry),
        blocks=tuple(dict.fromkeys(block_of(family).values())),
        tensors=tensors | stored,
        known_besides=besides,
        schedule=frozenset((*stored, *besides)),
        conv_in=components["unet"]["prefix"] + components["unet"]["conv_in"],
        channels=variant["channels"],
        position_ids=_position_ids(components),
        epsilon_form=None if epsilon is None else (epsilon["modelspec"], epsilon["resolution"]),
    )


def _component_specs(
    family: str, components: dict[str, dict[str, Any]], channels: int
) -> Iterator[tuple[str, TensorSpec]]:
    blocks = block_of(family)
    for component, entry in components.items():
        prefix = entry["prefix"]
        position_ids = entry.get("position_ids")
        in_unet = component == "unet"
        for name, shape in component_tensors(family, component, channels).items():
            block = unet_block(name, blocks) if in_unet else None
            yield prefix + name, TensorSpec(shape, component, block, optional=name == position_ids)


def unet_block(name: str, blocks: Mapping[str, str]) -> str | None:
    """The block of a UNet's tensor, by the first two parts of its name, else by the first."""
    first, _, rest = name.partition(".")
    return blocks.get(f"{first}.{rest.partition('.')[0]}.") or blocks.get(f"{first}.")


def _schedule_specs(stored: bool) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
    """The schedule buffers: those that the family's files store, and those that may be there."""
    data = read_data("names")
    spec = TensorSpec((_SCHEDULE_STEPS,), None, None, optional=True)
    usual = dict.fromkeys(data["schedule"], spec)
    rare = dict.fromkeys(data["optional_schedule"], spec)
    return (usual, rare) if stored else ({}, usual | rare)


def _position_ids(components: dict[str, dict[str, Any]]) -> str | None:
    for entry in components.values():
        if "position_ids" in entry:
            return str(entry["prefix"] + entry["position_ids"])
    return None
