"""Sweeps: a recipe in which values say `{ try = [0.2, 0.4] }`, as one recipe for each choice.

Owns the variants' names, which their outputs have. Must not know pictures.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_sd.recipe.load import Recipe, recipe_from_data
from mergekit_sd.recipe.overrides import apply_overrides
from mergekit_sd.recipe.positions import KeyPath, Where
from mergekit_sd.recipe.read import read_document
from mergekit_sd.text import count

MOST = 100  # variants
TRY = "try"


@dataclass(frozen=True)
class Variant:
    """A choice of every value that is tried, by dotted key as `--set` takes it; and the recipe with these values.

    The recipe's outputs, and an output for each sampled step, are called as the variant is.
    """

    name: str
    values: Mapping[str, Any]
    recipe: Recipe


def read_sweep(path: str | Path, overrides: Mapping[str, object] | None = None) -> tuple[Variant, ...]:
    """The variants of a recipe file. Only the first samples what no choice changes: the models.

    Raises RecipeError where nothing is tried, or too much, or a variant is no good recipe.
    """
    path = Path(path)
    data, positions = read_document(path)
    data, replaced = apply_overrides(data, overrides or {})
    where = Where(str(path), (), positions.replacing(replaced))
    tried = dict(_tries(data.get("steps", {}), ("steps",)))
    _check_number(tried, where)
    short = _short_names(list(tried))
    variants: list[Variant] = []
    for choice in itertools.product(*tried.values()):
        name = ", ".join(f"{key} {_spelled(value)}" for key, value in zip(short, choice, strict=True))
        chosen = dict(zip(tried, choice, strict=True))
        made = _variant(data, chosen, name, first=not variants, where=where)
        recipe = recipe_from_data(made, folder=path.parent, path=path, positions=where.positions)
        variants.append(Variant(name, {".".join(map(str, key)): value for key, value in chosen.items()}, recipe))
    return tuple(variants)


def _tries(node: Any, path: KeyPath) -> Iterator[tuple[KeyPath, list[Any]]]:
    """Where a list of values stands for one."""
    if isinstance(node, Mapping):
        if set(node) == {TRY} and isinstance(node[TRY], list):
            yield path, node[TRY]
        else:
            for key, value in node.items():
                yield from _tries(value, (*path, key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _tries(value, (*path, index))


def _check_number(tried: Mapping[KeyPath, Sequence[Any]], where: Where) -> None:
    if not tried:
        raise where.error("Nothing is tried in this recipe.", hint="write alpha = { try = [0.2, 0.4, 0.6] } in a step")
    empty = next((path for path, values in tried.items() if not values), None)
    if empty:
        raise where.at(*empty).error("There is nothing to try.", hint="write at least one value")
    number = math.prod(len(values) for values in tried.values())
    if number > MOST:
        raise where.error(f"These are {count(number, 'variant')}; {MOST} are the most.", hint="try fewer values")


def _short_names(paths: Sequence[KeyPath]) -> list[str]:
    """The end of each path, as short as tells them apart."""
    for length in range(1, max(map(len, paths)) + 1):
        names = [".".join(str(part) for part in path[-length:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _spelled(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _variant(
    data: Mapping[str, Any], chosen: Mapping[KeyPath, Any], name: str, *, first: bool, where: Where
) -> dict[str, Any]:
    """The recipe's plain data with the values, its outputs and sampled steps called as the variant is."""
    outputs, steps = data.get("outputs", {}), data.get("steps", {})
    samples = data.get("samples", [])
    wanted = dict.fromkeys(each for sample in samples for each in sample.get("of", []))
    ends = dict.fromkeys([*outputs, *(each for each in wanted if each in steps)])
    if not ends:
        raise where.error("The recipe has no output and no sample of a step.", hint="add [outputs.NAME]")
    names = {end: name if len(ends) == 1 else f"{end}, {name}" for end in ends}
    made = {
        names[end]: {**outputs.get(end, {"model": end, "dtype": "fp32"}), "file": f"{number}.safetensors"}
        for number, end in enumerate(ends)
    }
    kept = []
    for sample in samples:
        of = [names.get(each, each) for each in sample.get("of", []) if first or each in names]
        if of:
            kept.append({**sample, "of": of})
    return {**data, "steps": _with(steps, chosen, ("steps",)), "outputs": made, "samples": kept}


def _with(node: Any, values: Mapping[KeyPath, Any], path: KeyPath) -> Any:
    """A copy with the values in their places."""
    if path in values:
        return values[path]
    if isinstance(node, Mapping):
        return {key: _with(value, values, (*path, key)) for key, value in node.items()}
    if isinstance(node, list):
        return [_with(value, values, (*path, index)) for index, value in enumerate(node)]
    return node
