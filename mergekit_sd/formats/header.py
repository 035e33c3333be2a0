"""The header of a safetensors file: bytes to checked values, and values to bytes.

Owns the layout rules of the format: names, dtypes, shapes, and ranges that tile the data without
overlap or hole. Must not know files or how their bytes are read and written.

The rules are those of https://github.com/huggingface/safetensors#format, and stricter where the
Rust library lets things pass: a name may not occur twice, at any level.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from mergekit_sd.errors import MalformedFile, UsageError
from mergekit_sd.formats.dtypes import DTYPES, Dtype
from mergekit_sd.formats.tensor import TensorInfo
from mergekit_sd.text import listed, shown, size

MAX_HEADER = 100_000_000  # bytes of JSON; the limit of the Rust library
MAX_NUMBER = 2**63  # sizes and offsets must stay below: a signed 64-bit file offset
MAX_DIGITS = 20  # more digits than any number below MAX_NUMBER has
MAX_RANK = 64  # dimensions; torch and numpy take no more
LENGTH_BYTES = 8  # the header's length, unsigned, little-endian, before the header
ALIGNMENT = 64  # where written data starts: a cache line, enough for every dtype
METADATA = "__metadata__"
FIELDS = {"dtype", "shape", "data_offsets"}

_DAMAGED = "the file is damaged or made by a faulty tool: download it or save it again"


@dataclass(frozen=True, slots=True)
class Header:
    """A header ready to be written: `raw` is the length and the JSON, the data follow at once.

    `size` is the size of the whole file; `tensors` has offsets from the file's first byte.
    """

    raw: bytes
    tensors: Mapping[str, TensorInfo]
    size: int


# --- reading ---------------------------------------------------------------------------------------


def parse_header(raw: bytes, data_size: int, path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors and the metadata that `raw` (the JSON without its length) describes.

    `data_size` is how many bytes follow the header in the file. Raises MalformedFile.
    """
    document = _document(raw, path)
    metadata = _metadata(document.pop(METADATA), path) if METADATA in document else {}
    start = LENGTH_BYTES + len(raw)
    tensors = {name: _tensor(name, entry, start, path) for name, entry in document.items()}
    _check_tiling(tensors.values(), start, data_size, path)
    return tensors, metadata


class _Twice(dict[str, object]):
    """A JSON object in which a name occurred twice; where it stands decides what the message says."""

    name = ""


@dataclass(frozen=True, slots=True)
class _LongNumber:
    """A number too long for any size. Python itself would refuse it without saying where it stands."""

    digits: int

    def __repr__(self) -> str:
        return f"a number of {self.digits:,} digits"


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    twice = _Twice(found)
    seen: set[str] = set()
    twice.name = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
    return twice


def _integer(digits: str) -> int | _LongNumber:
    return int(digits) if len(digits) <= MAX_DIGITS else _LongNumber(len(digits.lstrip("-")))


def _bad(message: str, path: Path, key: str | None = None, hint: str = _DAMAGED) -> NoReturn:
    raise MalformedFile(message, file=path, key=key, hint=hint) from None


def _document(raw: bytes, path: Path) -> dict[str, object]:
    """The header as JSON of the right outer form, every string of it valid Unicode."""
    try:
        text = str(raw, "utf-8")
    except UnicodeDecodeError as error:
        _bad(f"The header is not UTF-8 (byte {error.start:,} of it).", path)
    if not text.startswith("{"):
        _bad("The header does not begin with {.", path)
    document = _plain_document(text)
    if document is not None:
        return document
    try:
        # NaN and Infinity become floats here, and are refused as such where they stand.
        document = json.loads(text, object_pairs_hook=_object, parse_int=_integer)
    except RecursionError:
        _bad("The header's brackets are nested too deeply.", path)
    except json.JSONDecodeError as error:
        _bad(f"The header is not valid JSON: {error.msg} (character {error.pos:,} of it).", path)
    if type(document) is _Twice:
        if document.name == METADATA:
            _bad(f"The header has {METADATA} twice.", path)
        _bad("The header names this tensor twice.", path, document.name)
    if "\\u" in text:  # only an escape can bring in half a surrogate pair
        _check_unicode(document, path)
    return document  # type: ignore[no-any-return]


def _plain_document(text: str) -> dict[str, object] | None:
    """The header as JSON in a third of the time, where nothing in it needs a closer look; else None.

    Without escapes every string takes two quotes, so a name that occurs twice shows in their number:
    Python's own reading forgets the first.
    """
    if "\\" in text:
        return None
    try:
        document: dict[str, object] = json.loads(text)
    except (ValueError, RecursionError):
        return None
    metadata = document.get(METADATA, {})
    tensors = len(document) - (METADATA in document)
    strings = tensors * (len(FIELDS) + 2)  # the name and the dtype
    strings += (METADATA in document) + 2 * len(metadata) if isinstance(metadata, dict) else 0
    return document if text.count('"') == 2 * strings else None


def _check_unicode(document: dict[str, object], path: Path) -> None:
    metadata = document.get(METADATA)
    inner = [*metadata, *metadata.values()] if isinstance(metadata, dict) else []
    for text in (*document, *inner):
        if isinstance(text, str) and _is_broken(text):
            _bad(f"The header holds a name or text that is not valid Unicode: {_seen(text)}.", path)


def _is_broken(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _seen(value: object) -> str:
    """A value of the header for a message: short, escaped, in JSON's words."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, dict):
        return "an object"
    text = repr(value) if not isinstance(value, list) else f"[{', '.join(_seen(item) for item in value[:8])}]"
    if isinstance(value, list) and len(value) > 8:
        text = f"{text[:-1]}, … {len(value):,} in all]"
    return shown(text if len(text) <= 80 else text[:79] + "…")


def _metadata(entry: object, path: Path) -> dict[str, str]:
    if type(entry) is _Twice:
        _bad(f"The header's {METADATA} has {_seen(entry.name)} twice.", path)
    if type(entry) is not dict:
        _bad(f"The header's {METADATA} is not an object but {_seen(entry)}.", path)
    for name, value in entry.items():
        if type(value) is not str:
            _bad(f"The header's {METADATA} holds {_seen(value)} under {_seen(name)}, not a string.", path)
    return entry


def _tensor(name: str, entry: object, start: int, path: Path) -> TensorInfo:
    if type(entry) is not dict or entry.keys() != FIELDS:
        _refuse_entry(name, entry, path)
    dtype = DTYPES.get(entry["dtype"]) if type(entry["dtype"]) is str else None
    if dtype is None:
        hint = f"known: {', '.join(DTYPES)}; convert it with the program that wrote it"
        _bad(f"The tensor's dtype {_seen(entry['dtype'])} is unknown.", path, name, hint)
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or len(shape) > MAX_RANK:
        _refuse_numbers(name, shape, offsets, path)
    begin, end = offsets
    nbytes = byte_count(shape, dtype.itemsize)
    if nbytes is None:
        _bad(f"The tensor's shape {_seen(shape)} is larger than any file can be.", path, name)
    if end - begin != nbytes:
        _bad(
            f"The tensor's shape {_seen(shape)} of {dtype.name} takes {nbytes:,} bytes, "
            f"but its range {begin:,} to {end:,} has {end - begin:,}.",
            path,
            name,
        )
    return TensorInfo(name, dtype, tuple(shape), start + begin, nbytes)


def _are_sizes(values: object) -> bool:
    """A list of whole numbers in range; `type() is` because JSON's true is an int to Python."""
    if type(values) is not list:
        return False
    for value in values:  # noqa: SIM110 - a generator costs twice as much, thousands of times per file
        if type(value) is not int or not 0 <= value < MAX_NUMBER:
            return False
    return True


def byte_count(shape: Iterable[int], itemsize: int) -> int | None:
    """The bytes that a tensor takes; None where some product of its dimensions overflows.

    Dimensions beside a zero count too: torch computes strides from them.
    """
    product, empty = itemsize, False
    for dimension in shape:
        product *= dimension or 1
        empty = empty or dimension == 0
        if product >= MAX_NUMBER:
            return None
    return 0 if empty else product


def _refuse_entry(name: str, entry: object, path: Path) -> NoReturn:
    if type(entry) is _Twice:
        _bad(f"The tensor's entry in the header has {_seen(entry.name)} twice.", path, name)
    if not isinstance(entry, dict):
        _bad(f"The tensor's entry in the header is not an object but {_seen(entry)}.", path, name)
    missing, extra = sorted(FIELDS - entry.keys()), sorted(entry.keys() - FIELDS)
    parts = [f"lacks {', '.join(missing)}"] if missing else []
    parts += [f"has the unknown {listed(extra)}"] if extra else []
    _bad(f"The tensor's entry in the header {' and '.join(parts)}.", path, name)


def _refuse_numbers(name: str, shape: object, offsets: object, path: Path) -> NoReturn:
    rule = f"whole numbers from 0 to below 2**{MAX_NUMBER.bit_length() - 1}"
    if not _are_sizes(shape):
        _bad(f"The tensor's shape {_seen(shape)} is not a list of {rule}.", path, name)
    if isinstance(shape, list) and len(shape) > MAX_RANK:
        _bad(f"The tensor's shape has {len(shape):,} dimensions; {MAX_RANK} is the most.", path, name)
    _bad(f"The tensor's data_offsets {_seen(offsets)} are not two {rule}.", path, name)


def _check_tiling(tensors: Iterable[TensorInfo], start: int, data_size: int, path: Path) -> None:
    """Ranges must follow each other from the first byte of the data to the last."""
    end, before = start, None
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset < end:
            assert before is not None  # only a tensor moves `end`
            other = shown(before.name)
            same = (tensor.offset, tensor.nbytes) == (before.offset, before.nbytes)
            _bad(f"The tensor's bytes are also {'all' if same else 'partly'} those of {other}.", path, tensor.name)
        if tensor.offset > end and tensor.offset <= start + data_size:
            _bad(f"Before the tensor's bytes lie {tensor.offset - end:,} that no tensor owns.", path, tensor.name)
        if tensor.offset + tensor.nbytes > start + data_size:
            _refuse_truncated(tensors, tensor.name, start + data_size, path)
        if tensor.nbytes:
            end, before = tensor.offset + tensor.nbytes, tensor
    extra = start + data_size - end
    if extra:
        _bad(f"After the last tensor follow {extra:,} bytes ({size(extra)}) that no tensor owns.", path)


def _refuse_truncated(tensors: Iterable[TensorInfo], first: str, actual: int, path: Path) -> NoReturn:
    expected = max(tensor.offset + tensor.nbytes for tensor in tensors)
    _bad(
        f"The file is cut short: its header asks for {expected:,} bytes ({size(expected)}), "
        f"it has {actual:,} ({size(actual)}). This is the first tensor that is not whole.",
        path,
        first,
        hint="download or copy it again",
    )


# --- writing ---------------------------------------------------------------------------------------


def build_header(entries: Sequence[tuple[str, Dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> Header:
    """The header of a file with these tensors, in this order; the same arguments give the same bytes.

    The data lie in order of falling itemsize, so every tensor is aligned to its dtype and no hole
    is needed. Metadata whose values have the same length in JSON give a header of the same length.
    """
    ranges, data_size = _ranges(entries)
    document: dict[str, object] = {METADATA: dict(sorted(metadata.items()))} if metadata else {}
    for name, dtype, shape in entries:
        begin, nbytes = ranges[name]
        document[name] = {"dtype": dtype.name, "shape": list(shape), "data_offsets": [begin, begin + nbytes]}
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    try:
        encoded = text.encode()
    except UnicodeEncodeError:
        _refuse_surrogate(ranges, metadata)
    encoded += b" " * (-(LENGTH_BYTES + len(encoded)) % ALIGNMENT)
    if len(encoded) > MAX_HEADER:
        hint = "write less metadata (--metadata none)"
        raise UsageError(f"The output's header takes {len(encoded):,} bytes; {MAX_HEADER:,} is the most.", hint=hint)
    start = LENGTH_BYTES + len(encoded)
    tensors = {n: TensorInfo(n, dtype, shape, start + ranges[n][0], ranges[n][1]) for n, dtype, shape in entries}
    return Header(len(encoded).to_bytes(LENGTH_BYTES, "little") + encoded, tensors, start + data_size)


def _ranges(entries: Sequence[tuple[str, Dtype, tuple[int, ...]]]) -> tuple[dict[str, tuple[int, int]], int]:
    """Where each tensor's bytes begin in the data, how many they are, and how many there are in all."""
    ranges: dict[str, tuple[int, int]] = {}
    end = 0
    for name, dtype, shape in sorted(entries, key=lambda entry: -entry[1].itemsize):
        if name == METADATA or name in ranges:
            reason = "is the format's own" if name == METADATA else "occurs twice"
            raise UsageError(f"A tensor cannot be written under this name: it {reason}.", key=name, hint="rename it")
        nbytes = byte_count(shape, dtype.itemsize)
        if nbytes is None or min(shape, default=0) < 0 or end + nbytes >= MAX_NUMBER or len(shape) > MAX_RANK:
            raise UsageError(f"A tensor of shape {_seen(list(shape))} cannot be written.", key=name)
        ranges[name] = (end, nbytes)
        end += nbytes
    return ranges, end


def _refuse_surrogate(names: Iterable[str], metadata: Mapping[str, str]) -> NoReturn:
    hint = "it came in through bytes that are not UTF-8: write it anew"
    for name in names:
        if _is_broken(name):
            raise UsageError("A tensor's name is not valid Unicode.", key=name, hint=hint) from None
    broken = next(name for name, value in metadata.items() if _is_broken(name) or _is_broken(value))
    raise UsageError(f"The metadata {_seen(broken)} is not valid Unicode.", hint=hint) from None
