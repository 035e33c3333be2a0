"""A recipe's plain data, and `--set` laid over it.

Owns how a dotted path is read and what it may change. Must not know what the data means as a recipe.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mergekit_sd.errors import RecipeError
from mergekit_sd.recipe.positions import KeyPath, Where, dotted
from mergekit_sd.text import did_you_mean, shown

DEEPEST = 64

_PART = re.compile(r"""\s*("(?:[^"\\]|\\.)*"|'[^']*'|[^."']*)\s*(\.|$)""")
_NAMED = {"models": "model", "steps": "step", "outputs": "output"}


def plain(value: Any, where: Where) -> Any:
    """A copy of nothing but dicts and lists, so that no caller can change it afterwards."""
    if len(where.path) > DEEPEST:
        raise replace(where, path=where.path[:8]).error("The recipe is nested too deeply.")
    if isinstance(value, Mapping):
        return {str(key): plain(each, where.at(str(key))) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each, where.at(index)) for index, each in enumerate(value)]
    return value


def apply_overrides(data: Mapping[str, Any], overrides: Mapping[str, object]) -> tuple[dict[str, Any], list[KeyPath]]:
    """The data with each dotted path set, and the paths; the data given is left alone."""
    changed: dict[str, Any] = plain(data, Where())
    paths: list[KeyPath] = []
    for key, value in overrides.items():
        path = _override_path(changed, key)
        paths.append(_put(changed, path, _override_value(value, key), key))
    return changed, paths


def _override_path(data: Mapping[str, Any], key: str) -> KeyPath:
    parts = _split(key)
    table = data.get(parts[0], {})
    if parts[0] in _NAMED:
        if len(parts) == 1 or not isinstance(table, Mapping) or parts[1] not in table:
            name = parts[1] if len(parts) > 1 else ""
            hint = did_you_mean(name, table) if isinstance(table, Mapping) else None
            raise _bad(key, f'There is no {_NAMED[parts[0]]} "{shown(name)}".', hint)
        if parts[0] == "steps" and len(parts) > 4:  # alpha.OUT05.attn2: one selector, whose quotes the shell took
            return (*parts[:3], ".".join(parts[3:]))
        return tuple(parts)
    if parts[0] == "samples" and len(parts) > 1:
        if not parts[1].isdecimal() or int(parts[1][:9]) >= len(table):
            raise _bad(key, f"There is no sample {shown(parts[1])}.", f"samples.0 to samples.{max(len(table) - 1, 0)}")
        return ("samples", int(parts[1]), *parts[2:])
    return tuple(parts)


def _split(key: str) -> list[str]:
    parts, here = [], 0
    while True:
        match = _PART.match(key, here)
        text = match[1].strip() if match else ""
        if not match or not text:
            raise _bad(key, "This is no dotted path.", "write --set steps.NAME.alpha=0.4")
        quoted = text[0] in "\"'"
        parts.append(text[1:-1] if quoted else text)
        here = match.end()
        if not match[2]:
            return parts


def _override_value(value: object, key: str) -> object:
    """Text as a TOML value; a bare word is text. What is not text is taken as it is."""
    if not isinstance(value, str):
        return plain(value, Where("--set", tuple(_split(key))))
    try:
        parsed = tomllib.loads(f"value = {value}")
    except (ValueError, RecursionError):
        if value[:1] in tuple("\"'{"):
            raise _bad(key, f"The value {shown(value[:60])} is not TOML.", "quote it as TOML does") from None
        return value
    return parsed["value"] if list(parsed) == ["value"] else value


def _put(data: dict[str, Any], path: KeyPath, value: object, key: str) -> KeyPath:
    """Set the value; the topmost path that the file itself has nothing of."""
    node: Any = data
    part: Any
    new: KeyPath = ()
    for number, part in enumerate(path[:-1], 1):
        if isinstance(node, dict) and part not in node:
            new = new or path[:number]
            node[part] = {}
        elif not isinstance(node[part], dict | (list if path[0] == "samples" else dict)):
            node[part] = _widened(node[part], path[:number], key)
        node = node[part]
    if not isinstance(node, dict):
        raise _bad(key, f"{dotted(path[:-1])} is a list; it has no keys.", "give the whole list")
    node[path[-1]] = value
    return new or path


def _widened(value: object, path: KeyPath, key: str) -> dict[str, object]:
    """The table that a short form stands for, so that one key of it can be set."""
    if path[0] == "models" and len(path) == 2:
        return {"file": value}
    if path[0] == "steps" and len(path) == 3 and path[2] != "op":
        return {_form_of(value): value}
    if path[0] == "outputs" and path[2:] == ("dtype",):
        return {"default": value}
    raise _bad(key, f"{dotted(path)} is no table; it has no keys.", None)


def _form_of(weights: object) -> str:
    """The key of a table of weights that a short form stands for."""
    if isinstance(weights, str):
        return "elemental" if ":" in weights else "weights" if "," in weights else "preset"
    return "weights" if isinstance(weights, list) else "default"


def _bad(key: str, message: str, hint: str | None) -> RecipeError:
    return RecipeError(message, file="--set", key=shown(key), hint=hint)
