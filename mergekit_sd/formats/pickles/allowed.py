"""What a pickle may ask to be called, and what stands for the result here.

Owns the list. Everything on it makes plain values or descriptions of tensors; every other call is
refused by `machine`. A name that is only referred to is harmless, as it is never looked up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, TypeAlias

from mergekit_sd.formats.header import MAX_NUMBER, MAX_RANK
from mergekit_sd.formats.pickles.values import ITEMSIZES, Global, Inert, OtherTensor, Storage, StoredTensor

# The storage classes of torch, and the element type that each holds.
STORAGES: dict[str, str] = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "UntypedStorage": "uint8",
    "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64",
    "QInt8Storage": "qint8",
    "QInt32Storage": "qint32",
    "QUInt8Storage": "quint8",
    "QUInt4x2Storage": "quint4x2",
    "QUInt2x4Storage": "quint2x4",
}


class Caller(Protocol):
    """What a call may use of the machine that makes it."""

    def call(self, function: object, arguments: object) -> object:
        """Call something on the list."""

    def spend(self, steps: int) -> None:
        """Count work against the limit: what copies may not do it for nothing."""

    def store(self, items: dict[object, object], name: object, value: object) -> None:
        """Put an item into a dictionary, whatever its key."""


Arguments: TypeAlias = tuple[object, ...]
Call: TypeAlias = Callable[[Caller, Arguments], object]


class BadArguments(ValueError):
    """A call on the list, with arguments that it does not take."""


# --- tensors ---------------------------------------------------------------------------------------


def storage_of(kind: object, key: object, numel: object, start: object = 0) -> Storage:
    """A storage as its persistent id names it."""
    element = STORAGES.get(kind.name) if isinstance(kind, Global) and kind.module in _STORAGE_MODULES else None
    if element is None or type(key) not in (str, int) or not _is_size(numel) or not _is_size(start):
        raise BadArguments
    return Storage(key, element, numel, start)  # type: ignore[arg-type]


_STORAGE_MODULES = ("torch", "torch.storage", "torch.cuda")


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < MAX_NUMBER


def _tensor(storage: object, element: str, offset: object, shape: object, strides: object) -> StoredTensor:
    sized = isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides) <= MAX_RANK
    if not (isinstance(storage, Storage) and sized and _is_size(offset)):
        raise BadArguments
    if not all(map(_is_size, (*shape, *strides))):  # type: ignore[misc]
        raise BadArguments
    return StoredTensor(storage, element, offset, shape, strides)  # type: ignore[arg-type]


def _rebuild_tensor(caller: Caller, arguments: Arguments) -> object:
    match arguments:
        case (Storage() as storage, offset, shape, strides):
            return _tensor(storage, storage.element, offset, shape, strides)
    raise BadArguments


def _rebuild_tensor_v2(caller: Caller, arguments: Arguments) -> object:
    match arguments:
        case (Storage() as storage, offset, shape, strides, _, _, *rest) if len(rest) < 2:
            return _as_marked(_tensor(storage, storage.element, offset, shape, strides), rest)
    raise BadArguments


def _rebuild_tensor_v3(caller: Caller, arguments: Arguments) -> object:
    match arguments:
        case (storage, offset, shape, strides, _, _, Global("torch", element), *rest) if len(rest) < 2:
            if element in ITEMSIZES:
                return _as_marked(_tensor(storage, element, offset, shape, strides), rest)
    raise BadArguments


def _as_marked(tensor: StoredTensor, rest: list[object]) -> object:
    """Torch's last argument marks tensors whose values are still to be negated or conjugated."""
    if rest and isinstance(rest[0], dict) and any(value is not False for value in rest[0].values()):
        return OtherTensor("a tensor that is still to be negated or conjugated")
    return tensor


def _rebuild_parameter(caller: Caller, arguments: Arguments) -> object:
    match arguments:
        case (StoredTensor() | OtherTensor() as tensor, _, _) | (StoredTensor() | OtherTensor() as tensor, _, _, _):
            return tensor
    raise BadArguments


def _rebuild_from_type(caller: Caller, arguments: Arguments) -> object:
    """A tensor with attributes, or of a class derived from torch's: the tensor itself."""
    inner: object = arguments
    while isinstance(inner, tuple) and len(inner) == 4:
        function, _, inner, _ = inner
        if function not in _FROM_TYPE:
            return caller.call(function, inner)
    raise BadArguments


_FROM_TYPE = (Global("torch._tensor", "_rebuild_from_type"), Global("torch._tensor", "_rebuild_from_type_v2"))


def _other(words: str) -> Call:
    return lambda caller, arguments: OtherTensor(words)


# --- plain values ----------------------------------------------------------------------------------


def _dictionary(caller: Caller, arguments: Arguments) -> object:
    items: dict[object, object] = {}
    match arguments:
        case ():
            return items
        case (dict() as given,):
            pairs: Iterable[object] = given.items()
        case (list() | tuple() as pairs,):
            pass
        case _:
            raise BadArguments
    for pair in pairs:
        caller.spend(1)
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadArguments
        caller.store(items, pair[0], pair[1])
    return items


def _defaultdict(caller: Caller, arguments: Arguments) -> object:
    return _dictionary(caller, arguments[1:])


def _sequence(caller: Caller, arguments: Arguments) -> list[object]:
    match arguments:
        case ():
            return []
        case (list() | tuple() as values, *_):
            caller.spend(len(values))
            return list(values)
    raise BadArguments


def _size(caller: Caller, arguments: Arguments) -> object:
    return tuple(_sequence(caller, arguments))


def _encode(caller: Caller, arguments: Arguments) -> object:
    """How the old protocols write bytes: as text, one character for each."""
    match arguments:
        case (str() as text,) | (str() as text, "latin1" | "latin-1" | "utf-8" | "utf8" | "ascii"):
            caller.spend(len(text) >> 4)
            encoding = str(arguments[1]) if len(arguments) > 1 else "utf-8"
            return text.encode(encoding)
    raise BadArguments


def _bytes(caller: Caller, arguments: Arguments) -> object:
    match arguments:
        case ():
            return b""
        case (str() as text, "latin-1" | "latin1"):
            caller.spend(len(text) >> 4)
            return text.encode("latin-1")
        case (bytes() as data,):
            return data
    raise BadArguments


def _inert(*names: str) -> dict[tuple[str, str], Call]:
    """Calls whose result nobody needs: what was said is kept."""

    def make(name: Global) -> Call:
        return lambda caller, arguments: Inert(name, arguments)

    pairs = [tuple(each.rsplit(".", 1)) for each in names]
    return {(module, name): make(Global(module, name)) for module, name in pairs}


def _reconstructor(caller: Caller, arguments: Arguments) -> object:
    """How the oldest protocols build any object: without calling its class."""
    match arguments:
        case (Global() as of, _, _):
            return Inert(of)
    raise BadArguments


# --- the list --------------------------------------------------------------------------------------

CALLS: dict[tuple[str, str], Call] = {
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch._tensor", "_rebuild_from_type"): _rebuild_from_type,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
    ("torch._utils", "_rebuild_sparse_tensor"): _other("a sparse tensor"),
    ("torch._utils", "_rebuild_sparse_csr_tensor"): _other("a sparse tensor"),
    ("torch._utils", "_rebuild_nested_tensor"): _other("a nested tensor"),
    ("torch._utils", "_rebuild_qtensor"): _other("a quantised tensor"),
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): _other("a meta tensor, which has no values"),
    ("torch._utils", "_rebuild_wrapper_subclass"): _other("a tensor that wraps others"),
    ("torch._utils", "_rebuild_device_tensor_from_numpy"): _other("a tensor of a device that torch does not know"),
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): _other("a tensor of a device of its own kind"),
    ("torch", "Size"): _size,
    ("collections", "OrderedDict"): _dictionary,
    ("collections", "Counter"): _dictionary,
    ("collections", "deque"): _sequence,
    ("builtins", "set"): _sequence,
    ("builtins", "frozenset"): _sequence,
    ("builtins", "bytearray"): _bytes,
    ("builtins", "bytes"): _bytes,
    ("_codecs", "encode"): _encode,
    ("copyreg", "_reconstructor"): _reconstructor,
    **_inert("torch.device", "torch.serialization._get_layout", "builtins.complex", "numpy.dtype"),
    **_inert(
        *(
            f"numpy.{core}.{name}"
            for core in ("core", "_core")
            for name in ("multiarray.scalar", "multiarray._reconstruct", "numeric._frombuffer")
        )
    ),
}

# Calls that are allowed, and reported: nothing of a model needs them, but training programs leave them behind.
REPORTED_CALLS: dict[tuple[str, str], Call] = {
    ("collections", "defaultdict"): _defaultdict,
    **_inert("argparse.Namespace"),
    **_inert(
        *(
            f"{module}.{pure}{flavour}Path"
            for module in ("pathlib", "pathlib._local")
            for pure in ("", "Pure")
            for flavour in ("", "Posix", "Windows")
        )
    ),
}
REPORTED_MODULES = ("omegaconf",)

_REFERENCES = {
    *((module, name) for module in _STORAGE_MODULES for name in STORAGES),
    *(("torch", name) for name in ITEMSIZES),
    *(("builtins", name) for name in ("object", "dict", "list", "tuple", "int", "float", "str", "bool")),
    ("numpy", "ndarray"),
    ("torch", "Tensor"),
    ("torch.nn.parameter", "Parameter"),
    ("torch.nn.modules.container", "ParameterDict"),
    ("torch._C", "_TensorBase"),
}


def find_call(name: Global) -> Call | None:
    """What stands for a call of this name; None if it is not on the list."""
    pair = (name.module, name.name)
    if name.module.partition(".")[0] in REPORTED_MODULES:
        return lambda caller, arguments: Inert(name, arguments)
    return CALLS.get(pair) or REPORTED_CALLS.get(pair)


def is_reported(name: Global) -> bool:
    """Whether people are told that a file refers to this name: it is nothing that weights need."""
    pair = (name.module, name.name)
    return pair not in CALLS and pair not in _REFERENCES
