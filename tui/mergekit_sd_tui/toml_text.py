"""Changing a TOML text and keeping what people wrote around it: comments, order, the spelling of numbers.

Owns what tomlkit does not do by itself: comments at the end of a table speak of the next one, and stay before it.
Must not know recipes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import tomlkit
from tomlkit.container import Container
from tomlkit.items import Comment, InlineTable, Item, Table, Whitespace

from mergekit_sd_tui.weights import tidy

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def key_text(name: str) -> str:
    """A key as TOML writes it: bare where it can be."""
    return name if _BARE.fullmatch(name) else text_of(name)


def text_of(value: Any) -> str:
    """A plain value as a person writes it on one line."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key_text(key)} = {text_of(each)}" for key, each in value.items()) + " }"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(text_of, value))}]"
    if isinstance(value, float) and not isinstance(value, bool):
        return repr(tidy(value))
    return str(tomlkit.item(value).as_string())


def item_of(value: Any) -> Item:
    """A plain value for tomlkit."""
    return cast("Item", tomlkit.parse(f"value = {text_of(value)}\n")["value"])


def write(table: Any, key: str, value: Any) -> None:
    """Set a key with as little change to the text as there can be."""
    old = table.get(key)
    if old is None:
        tail = cut_tail(table) if isinstance(table, Table) else []
        table[key] = item_of(value)
        if isinstance(table, Table):
            append_tail(table, tail)
    elif isinstance(old, Table):
        _write_into(table, old, key, value)
    elif _same(old, value):
        return
    elif isinstance(old, InlineTable) and isinstance(value, dict):
        table[key] = tomlkit.parse(f"value = {_rewritten(old, value)}\n")["value"]
    elif isinstance(old, list) and isinstance(value, list) and len(old) == len(value):
        for index, inner in enumerate(value):
            if not _same(old[index], inner):
                old[index] = item_of(inner)
    else:
        table[key] = item_of(value)


def _same(old: Any, value: Any) -> bool:
    plain = old.unwrap()
    return bool(plain == value) and type(plain) is type(value)


def _rewritten(old: InlineTable, value: Mapping[str, Any]) -> str:
    """An inline table on its one line; what stays is spelled as it was."""
    spelled = (
        old[key].as_string() if key in old and _same(old[key], each) else text_of(each) for key, each in value.items()
    )
    return "{ " + ", ".join(f"{key_text(key)} = {each}" for key, each in zip(value, spelled, strict=True)) + " }"


def _write_into(table: Any, old: Table, key: str, value: Any) -> None:
    """Into `[steps.mix.alpha]`, key by key."""
    if not isinstance(value, dict):
        _replace_table(table, key, value)
        return
    for each in [each for each in old if each not in value]:
        old.remove(each)
    for each, inner in value.items():
        write(old, each, inner)


def _replace_table(table: Any, key: str, value: Any) -> None:
    """A plain value instead of `[steps.mix.alpha]`, above the other tables; its comments stay behind it."""
    tail = [each for each in table[key].value.body if isinstance(each[1], Comment | Whitespace)]
    table.remove(key)
    own = cut_tail(table)
    table[key] = item_of(value)
    append_tail(table, [*own, *tail])


def step_tables(document: tomlkit.TOMLDocument) -> list[tuple[Any, str, Table]]:
    """The tables `[steps.NAME]` in their order, each with the container that it is in."""
    found = []
    for key, item in document.body:
        if key is not None and key.key == "steps" and isinstance(item, Table):
            for name, table in item.value.body:
                if name is not None and isinstance(table, Table) and not isinstance(table, InlineTable):
                    found.append((item, name.key, table))
    return found


def _deepest(table: Table) -> Table:
    """The table whose body ends where this one ends."""
    last = next((item for key, item in reversed(table.value.body) if key is not None), None)
    return _deepest(last) if isinstance(last, Table) and not isinstance(last, InlineTable) else table


def cut_tail(table: Table) -> list[tuple[Any, Item]]:
    """Take off the blank lines and comments at a table's end: they speak of what follows."""
    body = _deepest(table).value.body
    tail: list[tuple[Any, Item]] = []
    while body and body[-1][0] is None and isinstance(body[-1][1], Comment | Whitespace):
        tail.insert(0, body.pop())
    return tail


def put_in_order(table: Table, keys: Sequence[str]) -> None:
    """Keys and their values in this order; each takes the comments above it along, tables stay at the end."""
    pieces: dict[str, list[tuple[Any, Item]]] = {}
    above: list[tuple[Any, Item]] = []
    for entry in table.value.body:
        if entry[0] is not None or isinstance(entry[1], Comment | Whitespace):  # what was removed is neither
            above.append(entry)
        if entry[0] is not None:
            pieces[entry[0].key], above = above, []
    ordered = sorted(pieces, key=lambda key: (isinstance(pieces[key][-1][1], Table), keys.index(key)))
    if ordered != list(pieces):
        for key in pieces:
            table.remove(key)
        table.value.body.clear()
        for key in ordered:
            for name, item in pieces[key]:
                table.append(name, item)


def append_tail(table: Table | Container, tail: Iterable[tuple[Any, Item]]) -> None:
    """Put blank lines and comments at a table's end."""
    body = _deepest(table).value.body if isinstance(table, Table) else table.body
    body.extend(tail)


def end_with_blank(table: Table) -> None:
    """A blank line at a table's end."""
    _deepest(table).value.body.append((None, Whitespace("\n")))


def before(document: tomlkit.TOMLDocument, tables: list[tuple[Any, str, Table]], index: int) -> Any:
    """The table that stands before a step's, which takes over its comments."""
    if index and tables[index - 1][0] is tables[index][0]:
        return tables[index - 1][2]
    items = [item for _, item in document.body]
    place = next(number for number, item in enumerate(items) if item is tables[index][0])
    return next((item for item in reversed(items[:place]) if isinstance(item, Table)), document)


def insert_before(document: tomlkit.TOMLDocument, follower: str, key: str, table: Table) -> None:
    """Append a table; what is behind `follower` moves after it, so that the order is the usual one."""
    moved = [(name, document[name]) for name in (follower, "samples") if name in document]
    for name, _ in moved:
        document.remove(name)
    document.append(key, table)
    for name, item in moved:
        document.append(name, item)
