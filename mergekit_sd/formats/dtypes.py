"""The element types that checkpoint files hold, as data; no torch, no numpy.

`name` is the spelling of the safetensors header. `overflow` is the smallest float32 magnitude
that no longer rounds to a finite value of the type (round to nearest, ties to even), `largest`
the largest finite value.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Dtype:
    """One element type: bytes per element, the torch attribute that stands for it, its range."""

    name: str
    itemsize: int
    torch_name: str
    is_float: bool
    overflow: float = float("inf")
    largest: float = float("inf")


F64 = Dtype("F64", 8, "float64", True)
F32 = Dtype("F32", 4, "float32", True, overflow=float("inf"), largest=3.4028234663852886e38)
F16 = Dtype("F16", 2, "float16", True, overflow=65520.0, largest=65504.0)
BF16 = Dtype("BF16", 2, "bfloat16", True, overflow=3.3961775292304957e38, largest=3.3895313892515355e38)
# 464 lies halfway between 448 (even) and the code of NaN: it still rounds down to 448.
F8_E4M3 = Dtype("F8_E4M3", 1, "float8_e4m3fn", True, overflow=464.0000305175781, largest=448.0)
F8_E5M2 = Dtype("F8_E5M2", 1, "float8_e5m2", True, overflow=61440.0, largest=57344.0)

DTYPES: dict[str, Dtype] = {
    dtype.name: dtype
    for dtype in (
        F64,
        F32,
        F16,
        BF16,
        F8_E4M3,
        F8_E5M2,
        Dtype("I64", 8, "int64", False),
        Dtype("I32", 4, "int32", False),
        Dtype("I16", 2, "int16", False),
        Dtype("I8", 1, "int8", False),
        Dtype("U64", 8, "uint64", False),
        Dtype("U32", 4, "uint32", False),
        Dtype("U16", 2, "uint16", False),
        Dtype("U8", 1, "uint8", False),
        Dtype("BOOL", 1, "bool", False),
    )
}

I64 = DTYPES["I64"]

# What a recipe or `--dtype` writes, and what it means.
OUTPUT_DTYPES: dict[str, Dtype] = {
    "fp16": F16,
    "fp32": F32,
    "bf16": BF16,
    "fp8_e4m3fn": F8_E4M3,
    "fp8_e5m2": F8_E5M2,
}
