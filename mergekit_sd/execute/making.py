"""Tensors that are made before their file is laid out: from memory into a plan.

Owns the rounding to the output's dtype. Must not know what they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from mergekit_sd.errors import DtypeOverflow, NonFiniteResult
from mergekit_sd.formats.dtypes import F32, OUTPUT_DTYPES, Dtype
from mergekit_sd.formats.reading import InputFile
from mergekit_sd.formats.tensor import TensorInfo
from mergekit_sd.lazy import torch
from mergekit_sd.operations.types import Tensor
from mergekit_sd.planning.expression import Deferred
from mergekit_sd.planning.values import PlannedOutput, PlannedTensor
from mergekit_sd.text import count


class Nowhere:
    """A sink for a pass that writes nothing."""

    def write(self, buffer: memoryview, offset: int) -> None:
        """Nothing comes."""
        raise AssertionError

    def copy(self, source: InputFile, source_offset: int, offset: int, length: int) -> None:
        """Nothing comes."""
        raise AssertionError


def constants_of(output: PlannedOutput, made: Mapping[str, Tensor]) -> tuple[PlannedTensor, ...]:
    """What was made as tensors of the output, in its dtype. Raises NonFiniteResult or DtypeOverflow."""
    dtype = made_dtype(output)
    bad = [key for key, tensor in made.items() if not torch.isfinite(tensor).all()]
    if bad:
        message = f'NaN or Inf in {count(len(bad), "tensor")} of "{output.name}"; nothing was written.'
        raise NonFiniteResult(message, hint="look at the parents (inspect --scan)", details=bad)
    large = [key for key, tensor in made.items() if tensor.numel() and float(tensor.abs().max()) >= dtype.overflow]
    if large:
        message = f'{count(len(large), "tensor")} of "{output.name}" hold values that the output\'s dtype cannot.'
        raise DtypeOverflow(message, hint="write another dtype (bf16, fp32)", details=large)
    return tuple(_constants(made, dtype))


def made_dtype(output: PlannedOutput) -> Dtype:
    """What the tensors of an output that are made before it are rounded to."""
    name = output.spec.dtype_of(None)
    return _own_dtype(output) if name == "keep" else OUTPUT_DTYPES[name]


def _own_dtype(output: PlannedOutput) -> Dtype:
    """The dtype of what it is made of, as far as an output can have it."""
    assert output.making
    own = (read.dtype for read in output.making.reads())
    return next((dtype for dtype in own if dtype in OUTPUT_DTYPES.values()), F32)


def data_hash(tensors: Sequence[PlannedTensor]) -> str:
    """The sha256 of the bytes after the header, which tools know a LoRA by (`sshs_model_hash`)."""
    whole = hashlib.sha256()
    for tensor in tensors:
        assert isinstance(tensor.expression, Deferred)
        whole.update(tensor.expression.data)
    return whole.hexdigest()


def _constants(made: Mapping[str, Tensor], dtype: Dtype) -> Iterator[PlannedTensor]:
    for name, tensor in made.items():
        info = TensorInfo(name, dtype, tuple(tensor.shape), 0, tensor.numel() * dtype.itemsize)
        yield PlannedTensor(info, "constant", Deferred(dtype, info.shape, partial(_bytes_of, tensor, dtype)), None)


def _bytes_of(tensor: Tensor, dtype: Dtype) -> memoryview:
    rounded = tensor.cpu().contiguous().to(getattr(torch, dtype.torch_name))
    return rounded.reshape(-1).view(torch.uint8).numpy().data
