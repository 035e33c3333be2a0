"""Whether models' VAEs differ, told from a glance at their smallest tensors.

Merged VAEs of different training turn pictures grey, so plan and run warn of it. At most 64 KiB
of each file are read. Owns that comparison; must not know outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mergekit_sd.formats.dtypes import BF16, F16, F32, F64
from mergekit_sd.formats.open import read_bytes
from mergekit_sd.formats.tensor import ModelFile, TensorInfo
from mergekit_sd.planning.expression import Read
from mergekit_sd.planning.models import Model
from mergekit_sd.planning.values import Input

GLANCE = 64 * 1024


def mixed_vaes(
    result: Model, pairs: Sequence[tuple[str, str]], operands: Mapping[str, Model], inputs: Sequence[Input]
) -> tuple[str, str] | None:
    """The names of two operands whose VAEs differ and are blended in `result`, or None."""
    names = [n for n, e in result.tensors.items() if result.layout.places[n].component == "vae"]
    if all(isinstance(result.tensors[name], Read) for name in names):
        return None
    for one, other in pairs:
        first, second = (_vae_source(operands[operand], names, inputs) for operand in (one, other))
        shared = [name for name in names if name in first.tensors and name in second.tensors]
        if vaes_differ(first, second, {name: (first.tensors[name], second.tensors[name]) for name in shared}):
            return operands[one].name, operands[other].name
    return None


def _vae_source(model: Model, names: Sequence[str], inputs: Sequence[Input]) -> ModelFile:
    """The file that a model's VAE comes from; a step that mixed one has warned already: its first operand's."""
    expression = next((model.tensors[name] for name in names if name in model.tensors), None)
    return inputs[expression.input if isinstance(expression, Read) else model.origin].file


def vaes_differ(one: ModelFile, other: ModelFile, pairs: Mapping[str, tuple[TensorInfo, TensorInfo]]) -> bool:
    """Whether the VAE tensors of two files differ once rounded to float16.

    `pairs`: each VAE tensor's name with its entry in both files.
    """
    budget = GLANCE
    for mine, its in sorted(pairs.values(), key=lambda pair: (pair[0].nbytes, pair[0].name)):
        budget -= max(mine.nbytes, its.nbytes)
        if budget < 0:
            return False
        first, second = read_bytes(one, mine), read_bytes(other, its)
        if mine.dtype == its.dtype:
            if first != second:
                return True
        elif _as_float16(first, mine) != _as_float16(second, its):
            return True
    return False


def _as_float16(data: bytes, tensor: TensorInfo) -> bytes:
    """The values rounded to float16; other dtypes than the four common floats are left as they are."""
    import numpy as np

    with np.errstate(over="ignore"):
        if tensor.dtype == BF16:
            return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").astype("<f2").tobytes()
        kinds = {F64: "<f8", F32: "<f4", F16: "<f2"}
        return np.frombuffer(data, kinds[tensor.dtype]).astype("<f2").tobytes() if tensor.dtype in kinds else data
