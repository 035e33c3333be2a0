"""Where each key of a TOML text stands, which the standard library's reader does not say.

Owns key paths and their lines and columns, and `Where`: a place in a recipe that can be complained
about, with the words for what stands there. Must not know what a recipe means. The scanner is
right on texts that tomllib has accepted; on others it goes as far as it can (`read` uses that to
point at a duplicate).
"""

from __future__ import annotations

import re
import tomllib
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from mergekit_sd.errors import RecipeError
from mergekit_sd.text import shown

KeyPath = tuple[str | int, ...]

_BARE = re.compile(r"[A-Za-z0-9_-]+")
_BLANK = re.compile(r"[ \t]*+")
_SKIP = re.compile(r"(?:[ \t\r\n]++|#[^\n]*+)*+")
# A run of three to five quotes closes a multi-line string; one or two quotes belong to it.
_STRING = re.compile(
    r'"""(?:[^"\\]++|\\[\s\S]|"{1,2}(?!"))*+"{3,5}'
    r"|'''(?:[^']++|'{1,2}(?!'))*+'{3,5}"
    r'|"(?:[^"\\\n]++|\\.)*+"'
    r"|'[^'\n]*+'"
)
_SCALAR = re.compile(r"[^,\]}#\n]+")


class Lost(Exception):
    """The text is not TOML from here on."""


@dataclass(frozen=True)
class Positions:
    """Line and column of key paths: of the key's text, or of an array's element."""

    offsets: Mapping[KeyPath, int] = field(default_factory=dict)
    line_starts: Sequence[int] = (0,)
    replaced: frozenset[KeyPath] = frozenset()
    """Paths whose value no longer comes from the text (`--set`): they stand nowhere in it."""

    def at(self, path: KeyPath) -> tuple[int, int] | None:
        """Line and column (from 1) of the path or its nearest parent; None where nothing is known."""
        if self.is_replaced(path):
            return None
        for length in range(len(path), -1, -1):
            offset = self.offsets.get(path[:length])
            if offset is not None:
                return self.place(offset)
        return None

    def place(self, offset: int) -> tuple[int, int]:
        """Line and column (from 1) of an offset into the text."""
        line = bisect_right(self.line_starts, offset)
        return line, offset - self.line_starts[line - 1] + 1

    def is_replaced(self, path: KeyPath) -> bool:
        """Whether the path's value was given elsewhere."""
        return any(path[:length] in self.replaced for length in range(len(path) + 1))

    def replacing(self, paths: Iterable[KeyPath]) -> Positions:
        """The same, but what lies under these paths was given elsewhere."""
        return replace(self, replaced=self.replaced | frozenset(paths))


@dataclass(frozen=True)
class Where:
    """A place in a recipe: a file, a key path, and how to find its line."""

    file: str | None = None
    path: KeyPath = ()
    positions: Positions = field(default_factory=Positions, repr=False)

    def at(self, *more: str | int) -> Where:
        """A place below this one."""
        return replace(self, path=(*self.path, *more))

    def error(self, message: str, *, hint: str | None = None, details: Sequence[str] = ()) -> RecipeError:
        """A refusal that says where: file, dotted key, line and column."""
        place = self.positions.at(self.path) or (None, None)
        return RecipeError(
            message,
            file="--set" if self.positions.is_replaced(self.path) else self.file,
            key=dotted(self.path) or None,
            line=place[0],
            column=place[1],
            hint=hint,
            details=details,
        )


def dotted(path: KeyPath) -> str:
    """A key path as TOML and `--set` write it; parts that are not bare stand in quotes."""
    return ".".join(str(part) if _BARE.fullmatch(str(part)) else f'"{shown(str(part))}"' for part in path)


def described(value: object) -> str:
    """What a value is, in words for a refusal."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        text = value if len(value) <= 60 else value[:57] + "…"
        return f'the text "{shown(text)}"'
    if isinstance(value, int | float):
        return f"the number {value:g}" if isinstance(value, float) or abs(value) < 10**15 else "a large number"
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, list | tuple):
        return "a list"
    return "nothing" if value is None else f"a {type(value).__name__}"


def line_starts(text: str) -> list[int]:
    """The offset at which each line begins."""
    return [0, *(match.end() for match in re.finditer("\n", text))]


def scan(text: str) -> Positions:
    """The places of all keys of a valid TOML text."""
    scanner = Scanner(text)
    scanner.document()
    return Positions(scanner.offsets, line_starts(text))


class Scanner:
    """Walks over a TOML text once and notes where each key path is first written."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.here = 0
        self.offsets: dict[KeyPath, int] = {(): 0}
        self.last: KeyPath = ()
        """The key whose value was read most recently, or is being read,"""
        self.last_offset = 0
        """and where it stands, written before or not."""
        self._arrays: dict[KeyPath, int] = {}
        """Arrays of tables (`[[a]]`) and the index of their last table."""

    def document(self) -> None:
        """Read everything; raises `Lost` where the text stops being TOML."""
        table: KeyPath = ()
        while self._skip():
            if self._peek() == "[":
                table = self._header()
            else:
                self._pair(table)

    def _header(self) -> KeyPath:
        array = self.text.startswith("[[", self.here)
        self.here += 2 if array else 1
        parts = self._key()
        self.last, self.last_offset = tuple(name for name, _ in parts), parts[-1][1]
        path: KeyPath = ()
        for number, (name, offset) in enumerate(parts, 1):
            path = self._note((*path, name), offset)
            if path in self._arrays and not (array and number == len(parts)):
                path = (*path, self._arrays[path])
        if array:
            self._arrays[path] = self._arrays.get(path, -1) + 1
            path = self._note((*path, self._arrays[path]), parts[-1][1])
        self._take(_BLANK)
        self._expect("]]" if array else "]")
        return path

    def _pair(self, table: KeyPath) -> None:
        path = table
        offset = self.here
        for name, offset in self._key():
            path = self._note((*path, name), offset)
        self.last, self.last_offset = path, offset
        self._take(_BLANK)
        self._expect("=")
        self._take(_BLANK)
        self._value(path)
        self.last, self.last_offset = path, offset

    def _key(self) -> list[tuple[str, int]]:
        parts = []
        while True:
            self._take(_BLANK)
            offset = self.here
            quoted = self._peek() in ('"', "'")
            text = self._take(_STRING if quoted else _BARE)
            parts.append((_unquoted(text) if quoted else text, offset))
            self._take(_BLANK)
            if self._peek() != ".":
                return parts
            self.here += 1

    def _value(self, path: KeyPath) -> None:
        first = self._peek()
        if first == "[":
            self._array(path)
        elif first == "{":
            self._inline_table(path)
        else:
            self._take(_STRING if first in ('"', "'") else _SCALAR)

    def _array(self, path: KeyPath) -> None:
        self.here += 1
        index = 0
        while self._skip() and self._peek() != "]":
            self._note((*path, index), self.here)
            self._value((*path, index))
            index += 1
            self._comma()
        self._expect("]")

    def _inline_table(self, path: KeyPath) -> None:
        self.here += 1
        while self._skip() and self._peek() != "}":
            self._pair(path)
            self._comma()
        self._expect("}")

    def _comma(self) -> None:
        self._skip()
        if self._peek() == ",":
            self.here += 1

    def _note(self, path: KeyPath, offset: int) -> KeyPath:
        self.offsets.setdefault(path, offset)
        return path

    def _peek(self) -> str:
        return self.text[self.here : self.here + 1]

    def _skip(self) -> bool:
        """Pass over blanks, line ends and comments; False at the end of the text."""
        self._take(_SKIP)
        return self.here < len(self.text)

    def _take(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self.text, self.here)
        if match is None:
            raise Lost
        self.here = match.end()
        return match.group()

    def _expect(self, token: str) -> None:
        if not self.text.startswith(token, self.here):
            raise Lost
        self.here += len(token)


def _unquoted(text: str) -> str:
    if text[0] == "'" or "\\" not in text:
        return text[1:-1]
    try:
        value = tomllib.loads(f"key = {text}")["key"]
    except tomllib.TOMLDecodeError:
        raise Lost from None
    return str(value)
