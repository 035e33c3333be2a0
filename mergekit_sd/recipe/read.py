"""A recipe's bytes into plain data and the places of its keys, or a refusal that says what to write.

Owns reading the file and every message about text that is not TOML; tomllib's own words reach
nobody. Must not know what the keys mean.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import re
import stat
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mergekit_sd.errors import RecipeError
from mergekit_sd.recipe.positions import KeyPath, Lost, Positions, Scanner, dotted, line_starts, scan
from mergekit_sd.text import did_you_mean, shown, size

LARGEST_RECIPE = 4 << 20
LONGEST_KEY = 64
"""Parts of one dotted key: tomllib's time grows with their square."""

_PART = r"""(?:(?<![\w-])[\w-]++|"[^"\n]*+"|'[^'\n]*+')"""
_LONG_KEY = re.compile(rf"(?:{_PART}[ \t]*\.[ \t]*){{{LONGEST_KEY}}}")
_PLACE = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)$")


class Document(NamedTuple):
    """A recipe as TOML sees it."""

    data: dict[str, Any]
    positions: Positions


@dataclass(frozen=True)
class Fault:
    """Where tomllib stopped and why, with the text around it."""

    reason: str
    text: str
    offset: int
    scanner: Scanner

    @property
    def line(self) -> str:
        """The line that the fault stands in."""
        start = self.text.rfind("\n", 0, self.offset) + 1
        end = self.text.find("\n", self.offset)
        return self.text[start : end if end >= 0 else None]

    @property
    def column(self) -> int:
        """Where in that line, from 0."""
        return self.offset - (self.text.rfind("\n", 0, self.offset) + 1)

    def from_here(self, pattern: str) -> str:
        """What the pattern matches at the fault, or nothing."""
        match = re.compile(pattern).match(self.text, self.offset)
        return match.group() if match else ""


class Verdict(NamedTuple):
    """What is said of a fault, and, if it names one, the key it is about."""

    message: str
    hint: str | None = None
    offset: int | None = None
    key: KeyPath | None = None


def read_document(path: Path) -> Document:
    """Read a recipe file."""
    return parse_text(read_recipe_text(path), str(path))


def read_recipe_text(path: str | Path) -> str:
    """A recipe file's text as it stands there. Raises RecipeError: no such file, too large, not UTF-8 and where."""
    path = Path(path)
    file = str(path)
    content = _read_bytes(path)
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise RecipeError("The recipe is not UTF-8 but UTF-16.", file=file, hint="save it as UTF-8")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        start = content.rfind(b"\n", 0, error.start) + 1
        column = len(content[start : error.start].decode("utf-8", "replace")) + 1
        line = content.count(b"\n", 0, error.start) + 1
        raise RecipeError(
            "The recipe is not UTF-8.", file=file, line=line, column=column, hint="save it as UTF-8"
        ) from None


def _read_bytes(path: Path) -> bytes:
    file = str(path)
    try:
        # Looked at before it is opened: opening a FIFO waits for its writer.
        mode = os.stat(path).st_mode  # noqa: PTH116  (also for paths that pathlib refuses to look at)
        if stat.S_ISDIR(mode):
            raise RecipeError("The recipe is a folder.", file=file, hint="name a .toml file in it")
        if not stat.S_ISREG(mode):
            raise RecipeError("The recipe is not a regular file.", file=file)
        with open(path, "rb") as stream:
            content = stream.read(LARGEST_RECIPE + 1)
    except FileNotFoundError:
        near = did_you_mean(path.name, (each.name for each in path.absolute().parent.glob("*.toml")))
        raise RecipeError("There is no such recipe.", file=file, hint=near or "check the path") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a path"
        raise RecipeError(f"The recipe cannot be read: {reason}.", file=file) from None
    if len(content) > LARGEST_RECIPE:
        raise RecipeError(
            f"The recipe is larger than {size(LARGEST_RECIPE)}.", file=file, hint="is this a recipe, or a model?"
        )
    return content


def parse_text(text: str, file: str | None = None) -> Document:
    """Parse a recipe's text; `file` is only named in refusals."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    long_key = _LONG_KEY.search(text)
    if long_key:
        line, column = Positions(line_starts=line_starts(text)).place(long_key.start())
        raise RecipeError(f"A key of more than {LONGEST_KEY} parts.", file=file, line=line, column=column)
    try:
        return Document(tomllib.loads(text), scan(text))
    except tomllib.TOMLDecodeError as error:
        raise _refusal(str(error), text, file) from None
    except RecursionError:
        raise RecipeError("The recipe is nested too deeply.", file=file) from None
    except ValueError:  # Python's limit on the digits of a whole number
        raise RecipeError("The recipe has a whole number of too many digits.", file=file) from None


def _refusal(words: str, text: str, file: str | None) -> RecipeError:
    starts = line_starts(text)
    place = _PLACE.search(words)
    reason = words[: place.start()] if place else words
    offset = len(text)
    if place and place[1]:
        offset = starts[int(place[1]) - 1] + int(place[2]) - 1
    scanner = Scanner(text[:offset])
    with contextlib.suppress(Lost, RecursionError):
        scanner.document()
    verdict = _verdict(Fault(reason, text, offset, scanner))
    line, column = Positions(line_starts=starts).place(offset if verdict.offset is None else verdict.offset)
    key = dotted(verdict.key) if verdict.key else None
    return RecipeError(verdict.message, file=file, key=key, line=line, column=column, hint=verdict.hint)


def _verdict(fault: Fault) -> Verdict:
    for start, judge in _JUDGES:
        if fault.reason.startswith(start):
            return judge(fault)
    return Verdict("This is not TOML.", "a line is [table], or key = value, or # a comment")


# --- one judge for each thing tomllib says --------------------------------------------------------


def _twice(fault: Fault) -> Verdict:
    path, offset = fault.scanner.last, fault.scanner.last_offset
    first = fault.scanner.offsets.get(path, offset)
    parent = next((path[:n] for n in range(len(path) - 1, 0, -1) if fault.scanner.offsets[path[:n]] < first), ())
    if first < offset:
        line = Positions(line_starts=line_starts(fault.text)).place(first)[0]
        return Verdict(f'"{_last(path)}" is written twice, first on line {line}.', "keep one of them", offset, path)
    if re.fullmatch(r"(?:IN\d\d|M00|OUT\d\d)(?:-(?:IN\d\d|M00|OUT\d\d))?", _last(path[:-1])):
        selector = f"{path[-2]}.{path[-1]}"
        message = f"Without quotes TOML reads {selector} as a table inside {path[-2]}."
        return Verdict(message, f'write "{selector}" in quotes', offset, path)
    message = f'"{_last(parent)}" was given its value already; nothing can be added to it here.'
    return Verdict(message, "write all its keys in one place", offset, path)


def _last(path: KeyPath) -> str:
    return shown(str(path[-1])) if path else ""


def _backslash(fault: Fault) -> Verdict:
    message = "In double quotes a backslash starts an escape."
    offset = fault.text.rfind("\\", 0, fault.offset)
    for string in re.finditer(r'"([^"\n]*)"?', fault.line):
        if string.start() < fault.column <= string.end() and "\\" in string[1]:
            return Verdict(message, f"write '{shown(string[1])}', in single quotes", offset)
    return Verdict(message, "write it in single quotes, or each backslash twice", offset)


def _open_string(fault: Fault) -> Verdict:
    return _point_at_key(fault, Verdict("A string is not closed.", "a string ends with the quote that it began with"))


def _open_array(fault: Fault) -> Verdict:
    return _point_at_key(fault, Verdict("An array is not closed.", "items stand between [ and ], a comma between two"))


def _open_table(fault: Fault) -> Verdict:
    if fault.from_here(r"\n"):
        return _line_break(fault)
    message = "A table in braces is not closed."
    return _point_at_key(fault, Verdict(message, "keys stand between { and }, a comma between two"))


def _point_at_key(fault: Fault, verdict: Verdict) -> Verdict:
    """Point at the key whose value runs on to the end of the text, rather than at the end."""
    if fault.offset < len(fault.text) or not fault.scanner.last:
        return verdict
    return verdict._replace(offset=fault.scanner.last_offset, key=fault.scanner.last)


def _line_break(fault: Fault) -> Verdict:
    path = tuple(part for part in fault.scanner.last[:-1] if isinstance(part, str))
    hint = f"keep it on one line, or write [{dotted(path)}] and one key per line" if path else "keep it on one line"
    return Verdict("A table in braces stands on one line.", hint)


def _value(fault: Fault) -> Verdict:
    word = fault.from_here(r"[^\s,\]}#]+")
    if word.lower() in ("true", "false"):
        return Verdict(f"TOML has no {word}.", f"write {word.lower()}")
    if word.lower() in ("none", "null", "nil"):
        return Verdict(f"TOML has no {word}.", "leave the key out")
    if word.startswith("="):
        return Verdict("There is one = between a key and its value.", "write key = value")
    if not word:
        before = fault.text[: fault.offset].rstrip()
        return (
            _open_array(fault) if before.endswith(("[", ",")) else Verdict("A value is missing.", "write key = value")
        )
    if re.fullmatch(r"[+-]?\.\d+", word):
        return Verdict("A number starts with a digit.", f"write {word.replace('.', '0.')}")
    if word[0] in "“”„‘’‚«»":
        return Verdict("Typographic quotes are not quotes of TOML.", 'write plain ones: "…"')
    return _bare_word(fault.from_here(r"[^,\]}#\n]+").rstrip())


def _bare_word(word: str) -> Verdict:
    if not word.isprintable() or "'" in word:
        return Verdict("This is no value of TOML.", 'text stands in quotes: "…"')
    quote = "'" if "\\" in word or '"' in word else '"'
    return Verdict("Text stands in quotes.", f"write {quote}{word}{quote}")


def _after_key(fault: Fault) -> Verdict:
    start = fault.line.strip()
    if re.match(r"""[\w."'-]+\s*:""", start):
        key, _, value = start.partition(":")
        return Verdict("A key and its value are joined by =, not by a colon.", f"write {key.strip()} = {value.strip()}")
    if start.startswith("- "):
        return Verdict("TOML has no lists with dashes.", "write key = [first, second]")
    return _key_start(fault) if fault.from_here(r"[^\s=]") else Verdict("A key has no value.", "write key = value")


def _key_start(fault: Fault) -> Verdict:
    if fault.from_here(r"\n"):
        return _line_break(fault)
    if re.match(r"\s*\{", fault.line):
        return Verdict("This looks like JSON; a recipe is TOML.", "write [table] and key = value lines")
    before = re.split(r"[{,]", fault.line[: fault.column])[-1]
    key = (before + fault.from_here(r"[^=\n,{}]*")).strip()
    if "=" in fault.line[fault.column :] and key and '"' not in key and key.isprintable():
        return Verdict("A key of other characters than letters, digits, - and _ stands in quotes.", f'write "{key}" =')
    return Verdict("This is not TOML.", "a line is [table], or key = value, or # a comment")


def _after_value(fault: Fault) -> Verdict:
    value = fault.line.partition("=")[2].partition("#")[0].strip()
    if re.fullmatch(r"[+-]?\d+,\d+", value):
        return Verdict("A number has a point, not a comma.", f"write {value.replace(',', '.')}")
    if re.fullmatch(r"[+-]?\d+\.", value):
        return Verdict("A number has digits after its point.", f"write {value}0")
    if re.fullmatch(r"[\w.][^\"'\[{=]*", value):
        return _bare_word(value)
    return Verdict("Something stands behind the end of this line's value.", "one key = value per line")


def _header(_: Fault) -> Verdict:
    return Verdict("A table's header is not closed.", "write [name], or [[samples]] for one of several")


def _character(fault: Fault) -> Verdict:
    if fault.reason.endswith(r"'\n'"):
        return _open_string(fault)
    return Verdict("A control character stands in the text.", "delete it, or write it as an escape in double quotes")


_JUDGES: tuple[tuple[str, Callable[[Fault], Verdict]], ...] = (
    ("Cannot ", _twice),
    ("Duplicate ", _twice),
    ("Unescaped ", _backslash),
    ("Invalid hex", _backslash),
    ("Escaped character", _backslash),
    ("Unterminated string", _open_string),
    ("Expected \"'", _open_string),
    ("Expected '\"", _open_string),
    ("Unclosed array", _open_array),
    ("Unclosed inline table", _open_table),
    ("Invalid value", _value),
    ("Invalid date", _value),
    ("Expected '=' after", _after_key),
    ("Invalid initial character", _key_start),
    ("Invalid statement", _key_start),
    ("Expected newline", _after_value),
    ("Expected ']", _header),
    ("Illegal character", _character),
    ("Found invalid character", _character),
)
