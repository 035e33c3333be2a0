"""Git Re-Basin: a model's hidden units put into another's order before the two are mixed.

Owns which units those are: `data/permutations-*.toml`, expanded over a step's tensors. How an order
is found is `matching`'s.

Only what leaves a model's outputs as they are is permuted. The UNet's main stream is not: its skip
connections join two stretches of it under one GroupNorm, whose groups lie across the seam (1280 and
640 channels: groups of 60), so that hardly any order but the old one computes the same. The VAE's
could change places by whole groups of channels, one order for all blocks of a width; it is left
alone, too. Attention heads change places whole: within a head every rotation computes the same,
and permutations are a small part of those.

Annotations are evaluated (no `from __future__ import annotations` here): they are the schema.
"""

import re
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from mergekit_sd.errors import UsageError
from mergekit_sd.lazy import torch
from mergekit_sd.operations.matching import Group, Orders, Place, match, permuted
from mergekit_sd.operations.registry import operation
from mergekit_sd.operations.survey import Models
from mergekit_sd.operations.types import Key, Out, PerBlock, Surveyed, Weight, Which

FAMILIES = ("sd1", "sd2", "sdxl", "sdxl-refiner")
_DATA = Path(__file__).parent / "data"


def find_orders(models: Models) -> Orders:
    """The orders of b's units that match a's, by tensor and axis."""
    groups = groups_of(models.keys, models.shapes)
    return match(models, list(groups.values()))


@operation(
    "by structure",
    "(1 − alpha)·a + alpha·P(b), P the permutation of b's hidden units that makes ⟨a, P(b)⟩ largest",
    by="model",
    fold=lambda alpha, **_: "a" if alpha == 0 else None,
    survey=find_orders,
    also=("Git Re-Basin", "weight matching", "rebasin (meh)"),
)
def rebasin(a: Weight, b: Weight, *, alpha: PerBlock = 0.5, key: Which, survey: Surveyed, out: Out = None) -> Weight:
    """Reorder b's hidden units (channels, heads, neurons) to match a's, then mix in a straight line.

    Ainsworth, Hayase & Srinivasa, "Git Re-Basin: merging models modulo permutation symmetries" (2023),
    weight matching. The order changes nothing that b computes, so alpha 1 gives a model like b in
    all that it does, with a's order of units; where b is a fine-tune of a, it mostly is in order already.
    """
    return torch.lerp(a, permuted(b, survey.get(key, {})), alpha, out=out)


# --- groups of units, from the data -------------------------------------------------------------------


def groups_of(keys: Mapping[str, Key], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Group]:
    """The groups of units of a model with these tensors, by a name for each; of a part of a model, what is there.

    Left out are groups with fewer than two units, and those whose tensors' sizes do not fit each other.
    """
    families = {key.family for key in keys.values() if key.family is not None}
    if len(families) != 1 or not families <= set(FAMILIES):
        raise UsageError(
            "Which units of these models belong together is not known: they are of no family that we know.",
            hint=f"rebasin and balance_attention take checkpoints and UNets of {', '.join(FAMILIES)}",
        )
    specification = _specification(*families)
    found: dict[str, Group] = {}
    for title, table in specification["groups"].items():
        for name, places in _members(table["acts_on"], specification, keys).items():
            group = _group(table, places, shapes)
            if group is not None:
                found[f"{title} {name}".strip()] = group
    return found


@cache
def _specification(family: str) -> dict[str, Any]:
    """The groups of all families with what this one adds."""
    shared, own = (
        tomllib.loads((_DATA / f"permutations-{stem}.toml").read_text(encoding="utf-8")) for stem in ("layers", family)
    )
    groups: dict[str, dict[str, Any]] = dict(shared["groups"])
    for title, table in own["groups"].items():
        before = groups.get(title, {"acts_on": []})
        groups[title] = {**before, **table, "acts_on": [*before["acts_on"], *table.get("acts_on", [])]}
    stretches = {**shared["stretches"], **own.get("stretches", {})}
    return {"parts": own["parts"], "stretches": stretches, "groups": groups}


def _members(
    acts_on: list[list[Any]], specification: dict[str, Any], keys: Mapping[str, Key]
) -> dict[str, dict[str, tuple[int, dict[str, Any]]]]:
    """The tensors of each group that these lines stand for, each with its axis and the stretches on it."""
    found: dict[str, dict[str, tuple[int, dict[str, Any]]]] = {}
    for name, key in keys.items():
        known = f"{specification['parts'].get(key.component)}:{key.name}"
        for text, axis, *stretches in acts_on:
            matched = _pattern(text).fullmatch(known)
            if matched:
                members = found.setdefault(" ".join(matched.groupdict().values()), {})
                members[name] = (axis, specification["stretches"][stretches[0] if stretches else "all"])
    return found


@cache
def _pattern(text: str) -> re.Pattern[str]:
    """A name of the data as a regular expression; a file's names may have a prefix."""
    part, _, name = text.partition(":")
    name = re.sub(r"\{(\w+)\}", r"(?P<\1>.+)", name.replace(".", r"\.").replace("*", ".+"))
    return re.compile(rf"{part}:(?:.+\.)??{name}")


def _group(
    table: Mapping[str, Any],
    members: Mapping[str, tuple[int, dict[str, Any]]],
    shapes: Mapping[str, tuple[int, ...]],
) -> Group | None:
    """The group of these tensors, if their sizes fit each other and there is something to permute."""
    places: dict[str, Place] = {}
    lengths: set[int] = set()
    for name, (axis, stretches) in members.items():
        if axis >= len(shapes[name]) or shapes[name][axis] % stretches["of"]:
            return None
        piece = shapes[name][axis] // stretches["of"]
        places[name] = Place(axis, tuple(at * piece for at in stretches["at"]))
        lengths.add(stretches["wide"] * piece)
    length = lengths.pop()
    heads, blocks = table.get("heads"), table.get("norm_groups", 1)
    units, rest = (heads, length % heads) if heads else divmod(length, table.get("head_size", 1))
    if lengths or rest or units < 2 or units % blocks:
        return None
    return Group(units, length // units, blocks, places)
