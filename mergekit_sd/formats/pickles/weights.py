"""What of a checkpoint is its model: the state dict, found in what training programs save around it.

Owns which tensors count, under which names, and what people are told of the rest. Must not know where
anything lies in the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import NamedTuple, NoReturn

from mergekit_sd.errors import MalformedFile, WrongFormat
from mergekit_sd.formats.pickles.placing import FindStorage, Placing
from mergekit_sd.formats.pickles.stream import DAMAGED
from mergekit_sd.formats.pickles.values import Global, Inert, OtherTensor, StoredTensor
from mergekit_sd.formats.reading import InputFile
from mergekit_sd.formats.tensor import ModelFile
from mergekit_sd.text import count, listed, shown, size

STATE_DICT = "state_dict"
OTHER_WRAPPERS = ("model", "module")  # where there is neither a state dict nor a tensor beside it
MAX_WRAPPERS = 3
MAX_DEPTH = 8  # containers within each other whose tensors get names
LONGEST_PART = 200  # characters of each part of such a name
MOST_PATHS = 100_000  # tensors that get one
LONGEST_VALUE = 1000  # characters of a text that is taken for metadata
LONGEST_LIST = 32  # numbers of a list that is
OPTIMIZER = "optimizer"  # what the names of a training program's own tensors start with
LONGEST_LABEL = 160  # characters of a name that people are shown
MOST_NAMES = 20  # that a note lists

Items = Mapping[object, object]


def model_of(
    file: InputFile, value: object, reported: Iterable[str], find: FindStorage, notes: tuple[str, ...] = ()
) -> ModelFile:
    """The model in what a pickle holds."""
    top = _items(value)
    if top is None:
        _refuse(f"This checkpoint holds {_words(value)}, not a dictionary of tensors.", file)
    around, inner = _unwrapped(top)
    named = _named(inner, file)
    if not named:
        names = listed(map(_label, inner))
        _refuse(f"There are no tensors in this checkpoint; it holds {names or 'nothing'}.", file)
    placing = Placing(file.path, file.state.size, find)
    tensors = {name: placing.place(name, tensor) for name, tensor in named.items()}
    beside, plain = _beside(around, inner, named.values())
    notes = (*notes, *_packed_note(placing.packed), *_notes(beside, plain), *_reported_note(reported))
    return ModelFile(
        file.path,
        "pickle",
        tensors,
        _metadata(around if _has_tensors(inner) else [*around, inner]),
        file.state,
        tuple(placing.views),
        notes,
        unread_tensors=sum(each.tensors for each in beside),
        unread_bytes=sum(each.nbytes for each in beside),
    )


def _items(value: object) -> Items | None:
    """A dictionary, or an object that is filled like one."""
    if isinstance(value, Inert) and value.items:
        return value.items
    return value if isinstance(value, dict) else None


def _unwrapped(top: Items) -> tuple[list[Items], Items]:
    """What stands around the state dict, from the outside, each without it; and the state dict."""
    around: list[Items] = []
    inner = top
    for _ in range(MAX_WRAPPERS):
        names = (STATE_DICT,) if _has_tensors(inner) else (STATE_DICT, *OTHER_WRAPPERS)
        name = next((name for name in names if _items(inner.get(name))), None)
        if name is None:
            break
        around.append({key: value for key, value in inner.items() if key != name})
        inner = _items(inner[name]) or {}
    return around, inner


def _has_tensors(items: Items) -> bool:
    return any(isinstance(value, StoredTensor | OtherTensor) for value in items.values())


# --- names -----------------------------------------------------------------------------------------


def _named(items: Items, file: InputFile) -> dict[str, StoredTensor]:
    """The tensors by name.

    Without a tensor on this level, those within get names of their paths, as hypernetworks
    (`768.0.linear.0.weight`) and textual inversions (`string_to_param.*`) need; an optimizer's do not.
    """
    found: dict[str, StoredTensor] = {}
    pairs: Iterable[tuple[object, object]] = items.items()
    if not _has_tensors(items):
        weights = {name: value for name, value in pairs if not _is_optimizer(name)}
        pairs = islice(_paths(weights), MOST_PATHS)
    for name, value in pairs:
        if isinstance(value, OtherTensor):
            hint = "load it with torch, and save it as an ordinary tensor"
            raise WrongFormat(f"The tensor is {value.words}.", file=file.path, key=str(name), hint=hint)
        if isinstance(value, StoredTensor) and isinstance(name, str):
            if name in found:
                raise MalformedFile("Two tensors have this name.", file=file.path, key=name, hint=DAMAGED)
            found[name] = value
    return found


def _is_optimizer(name: object) -> bool:
    return isinstance(name, str) and name.startswith(OPTIMIZER)


def _paths(items: Items) -> Iterator[tuple[str, object]]:
    """All tensors within, by their paths; every container is gone through once."""
    seen: set[int] = set()
    waiting: list[tuple[tuple[str, ...], object]] = [((), items)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, StoredTensor | OtherTensor):
            yield ".".join(path), value
        elif len(path) < MAX_DEPTH and id(value) not in seen:
            seen.add(id(value))
            waiting += reversed([((*path, name), child) for name, child in _children(value)])


def _children(value: object) -> list[tuple[str, object]]:
    """What is in a container, by name or number; not under names that could be made to fill the memory."""
    if isinstance(value, list | tuple):
        return [(str(number), child) for number, child in enumerate(value)]
    items = _items(value)
    if items is None and isinstance(value, Inert) and isinstance(value.state, dict):
        items = _items(value.state.get("_parameters"))  # torch's ParameterDict, and every other module
    texts = [(str(name), child) for name, child in (items or {}).items() if type(name) in (str, int)]
    return [(name, child) for name, child in texts if len(name) <= LONGEST_PART]


# --- the rest --------------------------------------------------------------------------------------


class _Beside(NamedTuple):
    """An entry with tensors that are no part of the model."""

    label: str
    tensors: int
    nbytes: int


def _beside(around: Iterable[Items], inner: Items, named: Iterable[StoredTensor]) -> tuple[list[_Beside], list[str]]:
    """The tensors that are no part of the model, by where they are; and what is no tensor in its state dict."""
    named = list(named)
    seen = {id(tensor) for tensor in named}
    storages = {tensor.storage.key for tensor in named}
    direct = _has_tensors(inner)
    beside: list[_Beside] = []
    plain: list[str] = []
    for items in (*around, inner):
        for name, value in items.items():
            number, nbytes = _counted(value, seen, storages)
            if number:
                beside.append(_Beside(_label(name), number, nbytes))
            elif items is inner and direct and not isinstance(value, StoredTensor):
                plain.append(_label(name))
    return beside, plain


def _notes(beside: list[_Beside], plain: list[str]) -> Iterator[str]:
    for label, number, nbytes in beside[:MOST_NAMES]:
        yield f"{label}: {count(number, 'tensor')}, {size(nbytes)}, no part of the model"
    if len(beside) > MOST_NAMES:
        yield f"{len(beside) - MOST_NAMES:,} more entries with tensors that are no part of the model"
    if plain:
        yield f"no tensors, left out of the state dict: {listed(plain, MOST_NAMES)}"


def _label(name: object) -> str:
    """A dictionary's key, for people."""
    text = str(name) if isinstance(name, str | int | float | Global) else "(an entry without a name)"
    return shown(text if len(text) <= LONGEST_LABEL else text[: LONGEST_LABEL - 1] + "…")


def _counted(value: object, seen: set[int], storages: set[str | int]) -> tuple[int, int]:
    """How many tensors are within, and how many bytes they take; each is counted once.

    What shares one of these storages with the model takes none.
    """
    number = nbytes = 0
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        if isinstance(each, StoredTensor | OtherTensor):
            number += 1
            if isinstance(each, StoredTensor) and each.storage.key not in storages:
                nbytes += min(each.numel * each.itemsize, each.storage.nbytes)
        elif isinstance(each, dict):
            waiting += each.values()
        elif isinstance(each, list | tuple):
            waiting += each
        elif isinstance(each, Inert):
            waiting += (*each.args, each.state, *each.items.values(), *each.parts)
        else:
            continue
        seen.add(id(each))
    return number, nbytes


def _packed_note(number: int) -> Iterator[str]:
    if number:
        yield f"{count(number, 'tensor')} compressed: reading takes longer, and more memory"


def _reported_note(reported: Iterable[str]) -> Iterator[str]:
    names = list(reported)
    if names:
        yield f"refers to what weights do not need, none of it loaded: {listed(names, MOST_NAMES)}"


def _metadata(levels: Iterable[Items]) -> dict[str, str]:
    """Small plain values around the state dict, such as a training checkpoint's epoch."""
    found: dict[str, str] = {}
    for name, value in (pair for items in levels for pair in items.items()):
        if isinstance(name, str) and (text := _text(value)) is not None and _text(name) is not None:
            found.setdefault(name, text)
    return found


def _text(value: object) -> str | None:
    if isinstance(value, str):
        try:
            return value if len(value.encode()) <= LONGEST_VALUE else None
        except UnicodeEncodeError:
            return None
    if isinstance(value, list | tuple) and 0 < len(value) <= LONGEST_LIST:
        return str(list(value)) if all(_is_number(each) for each in value) else None
    return str(value) if _is_number(value) else None


def _is_number(value: object) -> bool:
    return isinstance(value, bool | int | float) and (type(value) is not int or value.bit_length() < 64)


def _words(value: object) -> str:
    if isinstance(value, Inert):
        return f"an object of {_label(value.of)}"
    return "a single tensor" if isinstance(value, StoredTensor | OtherTensor) else "something else"


def _refuse(message: str, file: InputFile) -> NoReturn:
    hint = "take the model's state_dict in the program that wrote it, and save that"
    raise WrongFormat(message, file=file.path, hint=hint)
