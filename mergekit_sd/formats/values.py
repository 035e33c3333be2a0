"""The numbers in a small tensor, without torch or numpy.

Owns the decoding of every dtype into Python numbers. Must not know what the numbers mean.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from mergekit_sd.formats.dtypes import BF16, F8_E4M3, F8_E5M2, Dtype

_CODES = {
    **{"F64": "d", "F32": "f", "F16": "e", "BOOL": "?"},
    **{"I64": "q", "I32": "i", "I16": "h", "I8": "b", "U64": "Q", "U32": "I", "U16": "H", "U8": "B"},
}


def decode(data: bytes, dtype: Dtype) -> Sequence[float]:
    """All values of a tensor, of its bytes in the file's order; integers exact."""
    if dtype == BF16:  # the upper half of a float32
        data = b"".join(b"\0\0" + data[i : i + 2] for i in range(0, len(data), 2))
        return struct.unpack(f"<{len(data) // 4}f", data)
    if dtype == F8_E5M2:  # the upper half of a float16
        return struct.unpack(f"<{len(data)}e", b"".join(bytes((0, byte)) for byte in data))
    if dtype == F8_E4M3:
        return [_e4m3(byte) for byte in data]
    return struct.unpack(f"<{len(data) // dtype.itemsize}{_CODES[dtype.name]}", data)


def _e4m3(byte: int) -> float:
    """OCP FP8 E4M3 (the "fn" kind): exponent bias 7, no infinities, NaN where all seven bits are set."""
    sign = -1.0 if byte & 0x80 else 1.0
    exponent, mantissa = byte >> 3 & 0xF, byte & 0x7
    if byte & 0x7F == 0x7F:
        return float("nan")
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return float(sign * (8 + mantissa) * 2.0 ** (exponent - 10))
