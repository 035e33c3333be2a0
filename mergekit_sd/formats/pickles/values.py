"""What a pickle is made of here, besides plain Python values: names, and tensors not yet read.

Owns those values and the element types that PyTorch knows. Nothing here is what it is named after:
a `Global` is two texts, an `Inert` is what a pickle says of an object that nobody builds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from mergekit_sd.formats.dtypes import DTYPES, Dtype

# The element types that files of torch may name, with their sizes; those without a `Dtype` are not read.
ITEMSIZES: dict[str, int] = {
    **{dtype.torch_name: dtype.itemsize for dtype in DTYPES.values()},
    **{"complex32": 4, "complex64": 8, "complex128": 16},
    **{"qint8": 1, "quint8": 1, "qint32": 4, "quint4x2": 1, "quint2x4": 1},
    **{"float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1, "float4_e2m1fn_x2": 1},
}
_DTYPES: dict[str, Dtype] = {dtype.torch_name: dtype for dtype in DTYPES.values()}


@dataclass(frozen=True, slots=True)
class Global:
    """The name of a class or function. Only the name: it is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False)
class Inert:
    """An object that a pickle describes and that is not built: its class, and all that was said of it."""

    of: Global
    args: tuple[object, ...] = ()
    state: object = None
    items: dict[object, object] = field(default_factory=dict)
    parts: list[object] = field(default_factory=list)


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """Memory that tensors share: `numel` elements from element `start` on of the stored `key`."""

    key: str | int
    element: str
    numel: int
    start: int = 0

    @property
    def nbytes(self) -> int:
        """How many bytes it takes."""
        return self.numel * ITEMSIZES[self.element]


@dataclass(frozen=True, slots=True, eq=False)
class StoredTensor:
    """A tensor as a pickle has it; `offset` and `strides` count elements. Its numbers are whole and in range."""

    storage: Storage
    element: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> Dtype | None:
        """Its element type; None if it is not one that is read here."""
        return _DTYPES.get(self.element)

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return ITEMSIZES[self.element]

    @property
    def numel(self) -> int:
        """How many elements it has by its shape."""
        return math.prod(self.shape)

    @property
    def extent(self) -> int:
        """How many elements of the storage lie between its first and behind its last; 0 if it is empty."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))

    @property
    def contiguous(self) -> bool:
        """Whether its elements lie in order, without gaps."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True


@dataclass(frozen=True, slots=True, eq=False)
class OtherTensor:
    """A tensor of a kind that is not read here; `words` say which ("a sparse tensor")."""

    words: str
