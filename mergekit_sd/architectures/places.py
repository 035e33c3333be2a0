"""The place of each name: component, block and role, once it is known what the file is.

Owns the rule of what is junk. Must not know how a file was recognised (`detect`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache

from mergekit_sd.architectures import catalog
from mergekit_sd.architectures.layout import Place, Role, is_ema
from mergekit_sd.architectures.spec import Architecture

_UNKNOWN = Place(None, None, Role.unknown)
_JUNK = Place(None, None, Role.junk)
_EMA = Place(None, None, Role.ema)
_MARKER = Place(None, None, Role.marker)
_SCHEDULE = Place(None, None, Role.schedule)
_POSITION_IDS = Place(None, None, Role.position_ids)


def unknown(names: Iterable[str]) -> dict[str, Place]:
    """Names of no known architecture: nothing is junk, but what a name says by itself holds here, too.

    Schedule buffers, markers, EMA weights and position_ids are never merged, whatever the layout.
    """
    return {name: _by_name_alone(name) or _UNKNOWN for name in names}


def _by_name_alone(name: str) -> Place | None:
    data = catalog.read_data("names")
    if name in data["schedule"] or name in data["optional_schedule"]:
        return _SCHEDULE
    if name.endswith(".position_ids"):
        return _POSITION_IDS
    return _EMA if is_ema(name) else _MARKER if _is_marker(name) else None


def of_architecture(architecture: Architecture, names: Iterable[str], *, bare_unet: bool) -> dict[str, Place]:
    """The places in a file of this architecture; what is no name of it is junk."""
    known = _known_places(architecture)
    unet = architecture.components["unet"] if bare_unet else ""
    result: dict[str, Place] = {}
    for name in names:
        place = known.get(name)
        if place is None and bare_unet:
            place = known.get(unet + name)
        result[name] = place or _place_by_start(architecture, name)
    return result


@cache
def _known_places(architecture: Architecture) -> Mapping[str, Place]:
    """The place of every name of an architecture. One Place for all that share it: there are thousands."""
    shared: dict[tuple[str | None, str | None], Place] = {}
    result: dict[str, Place] = {}
    for name, spec in (*architecture.tensors.items(), *architecture.known_besides.items()):
        key = (spec.component, spec.block)
        if key not in shared:
            shared[key] = Place(*key, Role.weight)
        result[name] = shared[key]
    result.update(dict.fromkeys(architecture.schedule, Place(None, None, Role.schedule)))
    if architecture.position_ids is not None:
        component = architecture.tensors[architecture.position_ids].component
        result[architecture.position_ids] = Place(component, None, Role.position_ids)
    return result


def _place_by_start(architecture: Architecture, name: str) -> Place:
    if is_ema(name):
        return _EMA
    if _is_marker(name):
        return _MARKER
    for component in architecture.open_components:
        if name.startswith(architecture.components[component]):
            return Place(component, None, Role.weight)
    return _JUNK


def _is_marker(name: str) -> bool:
    markers: list[str] = catalog.read_data("names")["markers"]
    return any(name == marker or (marker.endswith(".") and name.startswith(marker)) for marker in markers)


def of_components(family: str, prefixes: Mapping[str, str], names: Iterable[str]) -> dict[str, Place]:
    """The places in a file of components alone. There is no architecture, so nothing is junk."""
    known: dict[str, Place] = {}
    for component, prefix in prefixes.items():
        entry = catalog.family_data(family)["components"][component]
        weight = Place(component, None, Role.weight)
        for name in catalog.component_tensors(family, component):
            known[prefix + name] = weight
        if "position_ids" in entry:
            known[prefix + entry["position_ids"]] = Place(component, None, Role.position_ids)
    return {name: known.get(name) or (_EMA if is_ema(name) else _UNKNOWN) for name in names}
