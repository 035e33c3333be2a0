"""A recipe as TOML text, from plain data: for `--save-recipe` and `recover`."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

import tomlkit
from tomlkit.items import Table

TOP = ("recipe", "title", "seed", "date")


def recipe_text(data: Mapping[str, Any], comments: Sequence[str] = ()) -> str:
    """The recipe that `data` says, as a person would write it. `comments` stand above it."""
    document = tomlkit.document()
    for comment in comments:
        document.add(tomlkit.comment(comment))
    for key in TOP:
        if key in data:
            document.add(key, _value(data[key], key))
    document.add("models", _table(data["models"]))
    for section in ("steps", "outputs"):
        if section in data:
            tables = tomlkit.table(is_super_table=True)
            for name, entry in data[section].items():
                tables.add(name, _table(entry))
            document.add(section, tables)
    return tomlkit.dumps(document)


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
