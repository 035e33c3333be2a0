"""The template language of `data/*.toml`: groups of tensors with arguments, expanded to names and shapes.

Owns the language (described at the top of `data/layers.toml`). Must not know what any group means.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from math import prod
from typing import TypeAlias

from mergekit_sd.architectures.spec import Shape

Value: TypeAlias = int | str
Environment: TypeAlias = Mapping[str, Value]
Body: TypeAlias = Mapping[str, "str | list[int | str]"]
Named: TypeAlias = tuple[tuple[str, Shape], ...]

_CALL = re.compile(r"(\w+)\((.*)\)")
_RANGE = re.compile(r"\{(\w+)\.\.(\w+)\}")


class TemplateError(Exception):
    """The architecture data contradicts itself: our bug, not a user's."""


class Templates:
    """The groups of some TOML tables, expanded on demand; each (group, arguments) once."""

    def __init__(self, tables: Mapping[str, Body]) -> None:
        self._groups: dict[str, tuple[tuple[str, ...], Body]] = {}
        for header, body in tables.items():
            name, parameters = _parse_call(header)
            self._groups[name] = (parameters, body)
        self._expanded: dict[tuple[str, tuple[Value, ...]], Named] = {}

    def expand(self, call: str, environment: Environment) -> Named:
        """The tensors of a call such as "clip(width, 12)": names below it, and shapes."""
        name, arguments = _parse_call(call)
        # A parameter may hold a group's name: `project(width, width)`.
        group = str(environment.get(name, name))
        values = tuple(_evaluate(argument, environment) for argument in arguments)
        key = (group, values)
        if key not in self._expanded:
            self._expanded[key] = tuple(self._tensors(group, values))
        return self._expanded[key]

    def _tensors(self, group: str, values: tuple[Value, ...]) -> Iterator[tuple[str, Shape]]:
        if group not in self._groups:
            raise TemplateError(f"no group {group!r}")
        parameters, body = self._groups[group]
        if len(parameters) != len(values):
            raise TemplateError(f"{group} takes {len(parameters)} arguments, not {len(values)}")
        environment = dict(zip(parameters, values, strict=True))
        for template, content in body.items():
            inner = self._content(content, environment)
            for place in _places(template, environment):
                for name, shape in inner:
                    yield (f"{place}.{name}" if place and name else place or name), shape

    def _content(self, content: str | list[int | str], environment: Environment) -> Named:
        if isinstance(content, str):
            return self.expand(content, environment)
        return (("", tuple(_size(size, environment) for size in content)),)


def _parse_call(text: str) -> tuple[str, tuple[str, ...]]:
    match = _CALL.fullmatch(text)
    if match is None:
        raise TemplateError(f"not a group with arguments: {text!r}")
    return match[1], tuple(part.strip() for part in match[2].split(",") if part.strip())


def _places(template: str, environment: Environment) -> list[str]:
    """The names a line stands for: one, or one per number of its `{a..b}` (b excluded)."""
    match = _RANGE.search(template)
    if match is None:
        return [template]
    start, stop = (_size(bound, environment) for bound in match.groups())
    return [f"{template[: match.start()]}{i}{template[match.end() :]}" for i in range(start, stop)]


def _evaluate(text: str, environment: Environment) -> Value:
    """A number, an argument, a product of those; any other word is a group's name."""
    if text in environment:
        return environment[text]
    if "*" in text:
        return prod(_size(factor, environment) for factor in text.split("*"))
    return int(text) if text.isdigit() else text


def _size(value: int | str, environment: Environment) -> int:
    size = _evaluate(value, environment) if isinstance(value, str) else value
    if isinstance(size, str):
        raise TemplateError(f"not a size: {size!r}")
    return size
