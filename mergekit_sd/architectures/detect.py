"""Telling what a file is by the names and ranks of its tensors.

Owns the recognition of kinds, families and variants. Must not know bytes or dtypes. Widths decide
nothing, so a small model of a layout is of its family; some names may be missing or added, since a
merge goes on and counts them. What is not recognised stays `unknown`: taking SDXL for a broken VAE
and cutting it to 159 MB is a known fault elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import cache, lru_cache
from typing import Any, NamedTuple, Protocol, cast

from mergekit_sd.architectures import catalog, places
from mergekit_sd.architectures.layout import Kind, Layout, is_ema
from mergekit_sd.architectures.spec import Architecture, Prediction, Shape


class Shaped(Protocol):
    """All that is looked at of a tensor."""

    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102


Shapes = Mapping[str, Shape]

# A component is recognised by this share of its names, present and of the right rank …
NEEDED = 0.9
# … of which hardly any may have another rank: SD1 and SD2 differ in 32 ranks of 686 (4.7 %) …
MISRANKED = 0.01
# … and with not many more names than its own: SVD's UNet has all of SD2's and as many again.
ADDED = 0.25
# A file is one component alone if at most this share of its names are not that component's.
STRAY = 0.1
LAYOUTS_KEPT = 8


def detect(tensors: Mapping[str, Shaped]) -> Layout:
    """What a file with these tensors is. Files with the same names and shapes, as merges have, are looked at once."""
    return _detected(tuple((name, info.shape) for name, info in tensors.items()))


@lru_cache(maxsize=LAYOUTS_KEPT)
def _detected(tensors: tuple[tuple[str, Shape], ...]) -> Layout:
    canonical = _canonical([name for name, _ in tensors])
    shapes = {canonical[name]: shape for name, shape in tensors}
    kind = _kind_by_pattern(shapes, first=True)
    if kind is not None:
        return Layout(kind, None, canonical, places.unknown(shapes))
    found = _unet(shapes, bare=False)
    if found is None:
        kind = _kind_by_pattern(shapes, first=False)
        if kind is not None:
            return Layout(kind, None, canonical, places.unknown(shapes))
        found = _unet(shapes, bare=True)
    if found is not None:
        return _with_architecture(found, canonical, shapes)
    return _alone(canonical, shapes)


def prediction_hint(tensors: Mapping[str, Shaped]) -> Prediction | None:
    """What the model predicts, where the names tell: `detect(tensors).prediction`."""
    return detect(tensors).prediction


def _canonical(names: Collection[str]) -> dict[str, str]:
    """The logical name of each stored one. A rename that would hit another name is left undone."""
    renames: dict[str, str] = catalog.read_data("names")["renames"]
    starts = tuple(renames)
    result = {name: name for name in names}
    for name in names:
        if name.startswith(starts):
            start = next(start for start in starts if name.startswith(start))
            renamed = renames[start] + name[len(start) :]
            result[name] = name if renamed in result else renamed
    return result


# --- kinds that names alone tell -----------------------------------------------------------------


class _Pattern(NamedTuple):
    """One entry of the data."""

    kind: Kind
    match: re.Pattern[str]
    share: float
    first: bool
    alone: bool


@cache
def _patterns() -> tuple[_Pattern, ...]:
    return tuple(
        _Pattern(
            cast(Kind, entry["name"]),
            re.compile(entry["match"]),
            entry["share"],
            entry.get("first", False),
            entry.get("alone", False),
        )
        for entry in catalog.read_data("names")["kinds"]
    )


def _kind_by_pattern(shapes: Shapes, *, first: bool) -> Kind | None:
    alone = len(shapes) == 1 and all(len(shape) in (1, 2) for shape in shapes.values())
    for kind, pattern, share, is_first, for_one in _patterns():
        if is_first == first and shapes and (alone or not for_one):
            matching = sum(1 for name in shapes if pattern.search(name))
            if matching and matching >= share * len(shapes):
                return kind
    return None


# --- the UNet, which decides the architecture ------------------------------------------------------


class _Unet(NamedTuple):
    architecture: Architecture
    prefix: str


def _unet(shapes: Shapes, *, bare: bool) -> _Unet | None:
    """The architecture of the UNet in a file, and its prefix there; None if there is none we know."""
    for family in _likeliest_first(shapes, bare):
        prefix = _unet_prefix(family, bare)
        if _is_unet_of(family, shapes, prefix):
            name = _variant(family, shapes, prefix)
            return None if name is None else _Unet(catalog.get(name), prefix)
    return None


def _unet_prefix(family: str, bare: bool) -> str:
    return "" if bare else str(catalog.family_data(family)["components"]["unet"]["prefix"])


def _likeliest_first(shapes: Shapes, bare: bool) -> list[str]:
    """The families worth looking at closely, which costs an expansion each."""
    scores: dict[str, int] = {}
    for family in catalog.FAMILIES:
        prefix = _unet_prefix(family, bare)
        marks = catalog.family_data(family)["recognised"]
        if len(shapes) >= NEEDED * marks["tensors"] and not any(prefix + name in shapes for name in marks["absent"]):
            telltales = marks["telltales"].items()
            scores[family] = sum(len(shapes.get(prefix + name, ())) == rank for name, rank in telltales)
    return sorted(scores, key=lambda family: -scores[family])


def _is_unet_of(family: str, shapes: Shapes, prefix: str) -> bool:
    expected = catalog.component_tensors(family, "unet")
    fit = _fit(expected, shapes, prefix)
    own = sum(1 for name in shapes if name.startswith(prefix) and not is_ema(name))
    return (
        fit.right >= NEEDED * len(expected)
        and fit.wrong <= MISRANKED * len(expected)
        and own - fit.right - fit.wrong <= ADDED * len(expected)
    )


def _variant(family: str, shapes: Shapes, prefix: str) -> str | None:
    """The variant by the first convolution's input channels; a number we do not know is no variant."""
    data = catalog.family_data(family)
    conv_in = shapes.get(prefix + data["components"]["unet"]["conv_in"], ())
    by_channels = {variant["channels"]: name for name, variant in data["variants"].items()}
    return by_channels.get(conv_in[1]) if len(conv_in) == 4 else family


def _with_architecture(found: _Unet, canonical: dict[str, str], shapes: Shapes) -> Layout:
    architecture, prefix = found
    where = places.of_architecture(architecture, shapes, bare_unet=not prefix)
    present = {place.component for place in where.values() if place.component is not None}
    prefixes = {name: start for name, start in architecture.components.items() if name in present}
    return Layout(
        kind="checkpoint" if len(present) > 1 else "unet",
        architecture=architecture,
        canonical=canonical,
        places=where,
        prediction=_prediction(architecture, shapes),
        prefixes=prefixes | {"unet": prefix},
    )


def _prediction(architecture: Architecture, names: Collection[str]) -> Prediction | None:
    said: dict[str, str] = catalog.read_data("names")["predictions"]
    for marker, prediction in said.items():
        if marker in names or (marker.endswith(".") and any(name.startswith(marker) for name in names)):
            return "v" if prediction == "v" else None
    return architecture.prediction


# --- components without a UNet --------------------------------------------------------------------


class _Fit(NamedTuple):
    right: int
    wrong: int
    exact: int


def _fit(expected: Shapes, shapes: Shapes, prefix: str) -> _Fit:
    """How many of the expected names are there with the right rank, with a wrong one, with the very shape."""
    right = wrong = exact = 0
    for name, shape in expected.items():
        found = shapes.get(prefix + name)
        if found is None:
            continue
        if len(found) == len(shape):
            right += 1
            exact += found == shape
        else:
            wrong += 1
    return _Fit(right, wrong, exact)


def _alone(canonical: dict[str, str], shapes: Shapes) -> Layout:
    """The layout of a file of one component (or SDXL's two text encoders), else an unknown one."""
    data = catalog.read_data("names")["alone"]
    own = [name for name in shapes if not name.startswith(tuple(data["companions"]))]
    unknown = Layout("unknown", None, canonical, places.unknown(shapes))
    family, prefixes, right = _best_components(data["components"], shapes)
    kinds = {data["kinds"][component] for component in prefixes}
    leftover_unet = any(name.startswith(_unet_prefix("sd1", bare=False)) for name in own)
    if len(kinds) != 1 or leftover_unet or len(own) - right > STRAY * len(own):
        return unknown
    where = places.of_components(family, prefixes, shapes)
    return Layout(kinds.pop(), None, canonical, where, prefixes=prefixes)


def _best_components(candidates: list[list[str]], shapes: Shapes) -> tuple[str, dict[str, str], int]:
    """The family whose components fit most of the names, their prefixes, and how many names they fit."""
    totals: dict[tuple[str, bool], tuple[int, int]] = {}
    prefixes: dict[tuple[str, bool], dict[str, str]] = {}
    for family, component in candidates:
        entry = catalog.family_data(family)["components"][component]
        for bare in (False, True):
            prefix = "" if bare else entry["prefix"]
            fit = _component_fit(family, component, entry, shapes, prefix)
            if fit is not None:
                right, exact = totals.get((family, bare), (0, 0))
                totals[family, bare] = (right + fit.right, exact + fit.exact)
                prefixes.setdefault((family, bare), {})[component] = prefix
    if not totals:
        return "", {}, 0
    best = max(totals, key=lambda key: totals[key])
    return best[0], prefixes[best], totals[best][0]


def _component_fit(family: str, component: str, entry: dict[str, Any], shapes: Shapes, prefix: str) -> _Fit | None:
    expected = _within_layers(catalog.component_tensors(family, component), entry.get("layers"), shapes, prefix)
    latents = entry.get("latents")
    if latents is not None:
        # The VAEs of Flux and SD3 have nearly these names, and 16 latent channels.
        found = shapes.get(prefix + latents, ())
        if len(found) == 4 and found[1] != expected[latents][1]:
            return None
    fit = _fit(expected, shapes, prefix)
    return fit if expected and fit.right >= NEEDED * len(expected) else None


def _within_layers(expected: Shapes, layers: str | None, shapes: Shapes, prefix: str) -> Shapes:
    """What to expect of a text encoder with as many layers as the file has: a small one has fewer."""
    if layers is None:
        return expected
    start = prefix + layers
    numbers = {name[len(start) :].partition(".")[0] for name in shapes if name.startswith(start)}
    last = max((int(number) for number in numbers if number.isdecimal()), default=-1)
    return {
        name: shape
        for name, shape in expected.items()
        if not name.startswith(layers) or int(name[len(layers) :].partition(".")[0]) <= last
    }
