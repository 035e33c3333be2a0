"""A recipe as TOML text, from plain data: for `--save-recipe` and `recover`."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

import tomlkit
from tomlkit.items import AoT, Table

from mergekit_sd.operations import OPERATIONS

TOP = ("recipe", "title", "seed", "date")
# Selectors from wide to narrow, as weights rank them; blocks as they lie in the UNet, other selectors last.
WIDE = ("default", "preset", "weights", "random", "seed", "unet", "base", "text_encoder", "vae", "clip_l", "clip_g")
BLOCKS = ("IN", "M0", "OU")


def recipe_text(data: Mapping[str, Any], comments: Sequence[str] = ()) -> str:
    """The recipe that `data` says, as a person would write it. `comments` stand above it."""
    document = tomlkit.document()
    for comment in comments:
        document.add(tomlkit.comment(comment))
    for key in TOP:
        if key in data:
            text_date = key == "date" and isinstance(data[key], str)
            document.add(key, datetime.date.fromisoformat(data[key]) if text_date else data[key])
    plain = {n: e["file"] if isinstance(e, Mapping) and set(e) == {"file"} else e for n, e in data["models"].items()}
    document.add("models", _table(plain))
    for section in ("steps", "outputs"):
        if section in data:
            tables = tomlkit.table(is_super_table=True)
            for name, entry in data[section].items():
                tables.add(name, _table(_in_reading_order(entry)))
            document.add(section, tables)
    if data.get("samples"):
        document.add("samples", _samples(data["samples"]))
    return tomlkit.dumps(document)


def _samples(entries: Sequence[Mapping[str, Any]]) -> AoT:
    tables = tomlkit.aot()
    for entry in entries:
        tables.append(_table(entry))
    return tables


def _in_reading_order(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A step or output as it is said: the operation, its operands, its parameters; other keys after."""
    operation = OPERATIONS.get(str(entry.get("op")))
    known = [o.name for o in operation.operands] + [p.name for p in operation.parameters] if operation else []
    first = [key for key in ("op", *known, "model", "file") if key in entry]
    return {key: entry[key] for key in [*first, *(key for key in entry if key not in first)]}


def _table(entries: Mapping[str, Any]) -> Table:
    table = tomlkit.table()
    for key, value in entries.items():
        table.add(key, _value(value))
    return table


def _value(value: Any) -> Any:
    if isinstance(value, Mapping):
        inline = tomlkit.inline_table()
        for name, each in sorted(value.items(), key=lambda item: _rank(item[0])):
            inline.append(name, _value(each))
        return inline
    return value


def _rank(selector: str) -> tuple[int, int, str]:
    """Where a key of a table stands: a table reads from the wide to the narrow."""
    if selector in WIDE:
        return 0, WIDE.index(selector), ""
    if selector[:2] in BLOCKS:
        return 1, BLOCKS.index(selector[:2]), selector
    return 2, selector != "elemental", selector
