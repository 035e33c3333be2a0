"""A recipe as TOML text, from plain data: for `--save-recipe` and `recover`."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

import tomlkit
from tomlkit.items import Table

from mergekit_sd.operations import OPERATIONS

TOP = ("recipe", "title", "seed", "date")


def recipe_text(data: Mapping[str, Any], comments: Sequence[str] = ()) -> str:
    """The recipe that `data` says, as a person would write it. `comments` stand above it."""
    document = tomlkit.document()
    for comment in comments:
        document.add(tomlkit.comment(comment))
    for key in TOP:
        if key in data:
            document.add(key, _value(data[key], key))
    plain = {n: e["file"] if isinstance(e, Mapping) and set(e) == {"file"} else e for n, e in data["models"].items()}
    document.add("models", _table(plain))
    for section in ("steps", "outputs"):
        if section in data:
            tables = tomlkit.table(is_super_table=True)
            for name, entry in data[section].items():
                tables.add(name, _table(_in_reading_order(entry)))
            document.add(section, tables)
    return tomlkit.dumps(document)


def _in_reading_order(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A step as it is said: the operation, its operands, its parameters; other keys after."""
    operation = OPERATIONS.get(str(entry.get("op")))
    known = [o.name for o in operation.operands] + [p.name for p in operation.parameters] if operation else []
    first = [key for key in ("op", *known) if key in entry]
    return {key: entry[key] for key in [*first, *(key for key in entry if key not in first)]}


def _table(entries: Mapping[str, Any]) -> Table:
    table = tomlkit.table()
    for key, value in entries.items():
        table.add(key, _value(value, key))
    return table


def _value(value: Any, key: str) -> Any:
    if key == "date" and isinstance(value, str):
        return datetime.date.fromisoformat(value)
    if isinstance(value, Mapping):
        inline = tomlkit.inline_table()
        for name, each in value.items():
            inline.append(name, _value(each, name))
        return inline
    return value
