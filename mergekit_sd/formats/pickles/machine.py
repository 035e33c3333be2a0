"""A pickle machine that builds plain values, and never imports, looks up or calls what a pickle names.

Owns the stack, the memo and the limits: work is counted, lengths are held against what is there, and
nothing recurses. What may be "called" is `allowed`'s; where tensors lie, their container's.
"""

from __future__ import annotations

import re
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from typing import NoReturn

from mergekit_sd.errors import ForbiddenCall
from mergekit_sd.formats.pickles.allowed import find_call, is_reported
from mergekit_sd.formats.pickles.stream import Stream
from mergekit_sd.formats.pickles.values import Global, Inert, OtherTensor, StoredTensor
from mergekit_sd.text import shown

MAX_STEPS = 4_000_000  # opcodes and copied elements; a training checkpoint of SDXL takes 300,000
MAX_INTEGER = 256  # bytes of a whole number
HIGHEST_PROTOCOL = 5
LONGEST_NAME = 160  # characters of a name that a message shows

Persistent = Callable[[object], object]

# Keys of a dictionary that are hashed as what they are. Others stand for themselves alone: hashing a
# tuple of tuples of … would end Python, and long numbers can be made to collide.
_KEYS = (str, bytes, float, bool, type(None), Global)


# As Python 2's repr writes strings.
_ESCAPE = re.compile(rb"\\(?:x([0-9a-fA-F]{2})|(.?))", re.DOTALL)
_ESCAPED = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"\\": b"\\", b"'": b"'", b'"': b'"'}


class _Key:
    """A dictionary's key of another type; equal to nothing."""


class Machine:
    """The state of one pickle of a stream, and what its opcodes do with it.

    `persistent` makes a value of what the pickle says of its storages; `reported` collects the names
    that a pickle of weights has no need of.
    """

    def __init__(self, stream: Stream, reported: dict[str, None], persistent: Persistent | None = None) -> None:
        self.stream = stream
        self._reported = reported
        self._persistent = persistent
        self._stack: list[object] = []
        self._marked: list[list[object]] = []  # the stacks below the marks
        self._memo: dict[int, object] = {}
        self._steps = 0

    def refuse(self, what: str) -> NoReturn:
        """Raises MalformedFile."""
        self.stream.refuse(f"The pickle {what} (before its byte {self.stream.position:,}).")

    def spend(self, steps: int) -> None:
        """Count work against the limit."""
        self._steps += steps
        if self._steps > MAX_STEPS:
            self.refuse(f"takes more than {MAX_STEPS:,} steps")

    # --- the stack -----------------------------------------------------------------------------------

    def push(self, value: object) -> None:
        """Put a value on the stack."""
        self._stack.append(value)

    def pop(self) -> object:
        """Take the topmost value."""
        if not self._stack:
            self.refuse("takes a value that is not there")
        return self._stack.pop()

    def top(self) -> object:
        """Look at the topmost value."""
        if not self._stack:
            self.refuse("looks for a value that is not there")
        return self._stack[-1]

    def mark(self) -> None:
        """Remember this place of the stack."""
        self._marked.append(self._stack)
        self._stack = []

    def since_mark(self) -> list[object]:
        """Take all values above the last mark."""
        if not self._marked:
            self.refuse("looks for a mark that is not there")
        values, self._stack = self._stack, self._marked.pop()
        return values

    def drop(self) -> None:
        """Take the topmost value, or mark, and forget it."""
        if self._stack:
            self._stack.pop()
        else:
            self.since_mark()

    def collect(self, count: int) -> None:
        """The topmost values as a tuple."""
        values = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(values)))

    def put(self, index: int) -> None:
        """Note the topmost value under a number."""
        self._memo[index] = self.top()

    def memoize(self) -> None:
        """Note the topmost value under the next number."""
        self.put(len(self._memo))

    def get(self, index: int) -> None:
        """Push what was noted under a number."""
        if index not in self._memo:
            self.refuse(f"looks for the value {index}, which it never noted")
        self.push(self._memo[index])

    # --- containers ----------------------------------------------------------------------------------

    def store(self, items: dict[object, object], name: object, value: object) -> None:
        """Put an item into a dictionary, whatever its key."""
        simple = isinstance(name, _KEYS) or (type(name) is int and name.bit_length() < 64)
        items[name if simple else _Key()] = value

    def store_pairs(self, values: list[object]) -> None:
        """Put names and values by turns into the dictionary on top."""
        into = self.top()
        items = into.items if isinstance(into, Inert) else into
        if not isinstance(items, dict) or len(values) % 2:
            self.refuse("adds items to what is no dictionary, or a name without a value")
        for at in range(0, len(values), 2):
            self.store(items, values[at], values[at + 1])

    def extend(self, values: list[object]) -> None:
        """Append values to the list on top."""
        into = self.top()
        parts = into.parts if isinstance(into, Inert) else into
        if not isinstance(parts, list):
            self.refuse("appends to what is no list")
        parts.extend(values)

    def new_dictionary(self) -> None:
        """A dictionary of all since the mark."""
        values = self.since_mark()
        self.push({})
        self.store_pairs(values)

    def store_one(self) -> None:
        """One item into the dictionary below it."""
        value, name = self.pop(), self.pop()
        self.store_pairs([name, value])

    # --- names and calls -----------------------------------------------------------------------------

    def push_global(self, module: object, name: object) -> None:
        """Push a name; it stays one."""
        if not isinstance(module, str) or not isinstance(name, str):
            self.refuse("names a class or function with what is no text")
        # Python 3 itself reads the names of Python 2 so; refusals have to name what would be called.
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        found = Global(module, name)
        if is_reported(found):
            self._reported[_short(str(found))] = None
        self.push(found)

    def stack_global(self) -> None:
        """Push a name whose two texts lie on the stack."""
        name, module = self.pop(), self.pop()
        self.push_global(module, name)

    def call(self, function: object, arguments: object) -> object:
        """What stands for the result of a call. Raises ForbiddenCall unless it is on the list."""
        found = find_call(function) if isinstance(function, Global) else None
        if found is None:
            self.forbid(f"calls {_words(function)}")
        if not isinstance(arguments, tuple):
            self.refuse(f"calls {_words(function)} without a tuple of arguments")
        try:
            return found(self, arguments)
        except ValueError:
            self.refuse(f"calls {_words(function)} with arguments that it does not take")

    def forbid(self, what: str) -> NoReturn:
        """Raises ForbiddenCall."""
        raise ForbiddenCall(
            f"The pickle in this file {what}, which weights do not need. Nothing in it was run.",
            file=self.stream.path,
            hint="do not open it elsewhere unless you trust its source: get the model as .safetensors",
        )

    def reduce(self) -> None:
        """Call what lies below its arguments."""
        arguments, function = self.pop(), self.pop()
        self.push(self.call(function, arguments))

    def instantiate(self, of: object, arguments: list[object]) -> None:
        """Call a class with arguments, as protocol 0 and 1 do."""
        self.push(self.call(of, tuple(arguments)))

    def old_object(self) -> None:
        """Call the class that lies after the mark."""
        values = self.since_mark()
        if not values:
            self.refuse("builds an object of no class")
        self.instantiate(values[0], values[1:])

    def old_instance(self) -> None:
        """Call the class that is named here."""
        module, name = self.stream.line().decode(), self.stream.line().decode()
        arguments = self.since_mark()
        self.push_global(module, name)
        self.instantiate(self.pop(), arguments)

    def new_object(self, keywords: object = None) -> None:
        """An object of a class, without a call of it: it is described, not built."""
        arguments, of = self.pop(), self.pop()
        if not isinstance(of, Global) or not isinstance(arguments, tuple):
            self.refuse("builds an object of what is no class")
        self.push(Inert(of, (*arguments, keywords) if keywords else arguments))

    def build(self) -> None:
        """Give an object its state; what is described here keeps it, plain values and tensors do not."""
        state, onto = self.pop(), self.top()
        if isinstance(onto, Inert):
            onto.state = state
        elif isinstance(onto, Global):
            self.forbid(f"changes {_words(onto)}")
        elif not isinstance(onto, dict | StoredTensor | OtherTensor):
            self.refuse("gives a state to what has none")

    def extension(self, width: int) -> None:
        """A name of Python's registry of extensions, which stays unknown: it may be anything."""
        code = self.stream.unsigned(width)
        self.forbid(f"refers to whatever this computer has registered as copyreg's extension {code}")

    def persist(self, identity: object) -> None:
        """Push what the container makes of a persistent id."""
        if self._persistent is None:
            self.refuse("refers to data where it can have none")
        try:
            self.push(self._persistent(identity))
        except ValueError:
            self.refuse("refers to data otherwise than torch does")

    # --- plain values --------------------------------------------------------------------------------

    def check_protocol(self) -> None:
        """The pickle's protocol, at its beginning."""
        if (protocol := self.stream.unsigned(1)) > HIGHEST_PROTOCOL:
            self.refuse(f"has protocol {protocol}; {HIGHEST_PROTOCOL} is the highest known")

    def check_frame(self) -> None:
        """A frame's length, which is of no use here, but has to be true."""
        if self.stream.unsigned(8) > self.stream.left:
            self.refuse("announces a frame that is longer than the file")

    def push_number_line(self) -> None:
        """INT: a decimal number, or a truth value of the time before those had opcodes."""
        line = self.stream.line()
        self.push({b"00": False, b"01": True}[line] if line in (b"00", b"01") else int(line))

    def push_long(self, width: int) -> None:
        """A whole number as bytes."""
        length = self.stream.unsigned(width)
        if length > MAX_INTEGER:
            self.refuse(f"has a whole number of {length:,} bytes")
        self.push(int.from_bytes(self.stream.take(length), "little", signed=True))

    def push_old_string(self, data: bytes) -> None:
        """A string of Python 2: text, or bytes where they are none."""
        try:
            self.push(data.decode())
        except UnicodeDecodeError:
            self.push(data)

    def push_quoted(self) -> None:
        """STRING: a string of Python 2 as its source would have it."""
        line = self.stream.line().strip(b" \t\r")
        if len(line) < 2 or line[0] != line[-1] or line[:1] not in (b"'", b'"'):
            self.refuse("has a string without quotes")
        self.push_old_string(_ESCAPE.sub(_unescaped, line[1:-1]))

    def push_text(self, data: bytes) -> None:
        """A text in UTF-8."""
        self.push(data.decode("utf-8", "surrogatepass"))


def _unescaped(match: re.Match[bytes]) -> bytes:
    digits, letter = match.groups()
    if digits is not None:
        return bytes.fromhex(digits.decode())
    if letter not in _ESCAPED:
        raise ValueError("a backslash before what needs none")
    return _ESCAPED[letter]


def _words(function: object) -> str:
    """What is called, in words."""
    if isinstance(function, Global):
        return _short(str(function))
    return f"an object of {_short(str(function.of))}" if isinstance(function, Inert) else "a value of its own making"


def _short(name: str) -> str:
    text = shown(name)
    return text if len(text) <= LONGEST_NAME else text[: LONGEST_NAME - 1] + "…"
