"""How far two tensors lie apart: sums over pieces of them, and the measures made of the sums.

Owns the arithmetic. Must not know files, names or blocks.

Each piece is computed in float32 (float64 where one side is), its sums are gathered in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_sd.formats.dtypes import F64, Dtype
from mergekit_sd.inspection.streaming import CHUNK, as_tensor
from mergekit_sd.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_GLANCE = 64  # bytes


@dataclass(slots=True)
class Distance:
    """Sums over pairs of values a, b. Elements where one is NaN or Inf are counted, and left out."""

    squares_a: float = 0.0
    squares_b: float = 0.0
    squares_of_difference: float = 0.0
    largest: float = 0.0
    nonfinite: int = 0
    equal: bool = True

    def add(self, other: Distance) -> None:
        """Take in the sums of another piece."""
        self.squares_a += other.squares_a
        self.squares_b += other.squares_b
        self.squares_of_difference += other.squares_of_difference
        self.largest = max(self.largest, other.largest)
        self.nonfinite += other.nonfinite
        self.equal = self.equal and other.equal

    @property
    def relative_l2(self) -> float | None:
        """‖b − a‖ / ‖a‖; None where a is zero and b is not."""
        if self.squares_of_difference == 0:
            return 0.0
        return math.sqrt(self.squares_of_difference / self.squares_a) if self.squares_a else None

    @property
    def cosine(self) -> float | None:
        """The cosine of the angle between a and b; None where one is zero."""
        norm_a, norm_b = math.sqrt(self.squares_a), math.sqrt(self.squares_b)
        if not norm_a or not norm_b:
            return None
        # The law of cosines, turned so that nothing is lost where a and b are nearly the same.
        apart = self.squares_of_difference - (norm_a - norm_b) ** 2
        return max(-1.0, min(1.0, 1.0 - apart / norm_a / norm_b / 2))


class Measurer:
    """Measures pieces of up to CHUNK elements, with memory of its own. Not shared between threads."""

    def __init__(self) -> None:
        torch.set_num_threads(1)  # of this thread only: there are as many as cores
        self._a, self._b, self._difference = (torch.empty(CHUNK, dtype=torch.float32) for _ in range(3))

    def __call__(self, a: memoryview, dtype_a: Dtype, b: memoryview, dtype_b: Dtype) -> Distance:
        """The distance of two pieces of equally many elements."""
        # A bytearray is compared as a block, all else with a memoryview by elements: ten times the time.
        same = dtype_a == dtype_b and a[:_GLANCE] == b[:_GLANCE] and bytearray(a) == b
        if dtype_a.is_float and dtype_b.is_float:
            wide = F64 in (dtype_a, dtype_b)
            return self._floats(as_tensor(a, dtype_a), as_tensor(b, dtype_b), same, wide)
        equal = same or torch.equal(as_tensor(a, dtype_a).double(), as_tensor(b, dtype_b).double())
        return Distance(equal=equal)

    def _floats(self, a: Tensor, b: Tensor, same: bool, wide: bool) -> Distance:
        if wide:
            a, b, difference = a.double(), b.double(), torch.empty(a.numel(), dtype=torch.float64)
        else:
            count = a.numel()
            a, b, difference = self._a[:count].copy_(a), self._b[:count].copy_(b), self._difference[:count]
        found = _sums(a, b, same, difference)
        if not math.isfinite(found.squares_a + found.squares_b + found.squares_of_difference):
            return _sums_of_finite(a, b, same)
        return found


def _sums(a: Tensor, b: Tensor, same: bool, spare: Tensor) -> Distance:
    # `sum` adds in a cascade: about 1e-7 of float64, where `dot` is off by 5e-6.
    squares_a = torch.mul(a, a, out=spare).sum().item()
    if same:
        return Distance(squares_a, squares_a)
    squares_b = torch.mul(b, b, out=spare).sum().item()
    torch.sub(b, a, out=spare)
    low, high = torch.aminmax(spare)
    largest = max(-low.item(), high.item())
    squares_of_difference = torch.mul(spare, spare, out=spare).sum().item()
    return Distance(squares_a, squares_b, squares_of_difference, largest, equal=largest == 0)


def _sums_of_finite(a: Tensor, b: Tensor, same: bool) -> Distance:
    """The same in float64 where squares overflow, and without the elements that are NaN or Inf."""
    finite = torch.isfinite(a) & torch.isfinite(b)
    equal = same or torch.equal(a, b)
    a, b = a[finite].double(), b[finite].double()
    if not a.numel():
        return Distance(nonfinite=finite.numel(), equal=equal)
    found = _sums(a, b, same, torch.empty_like(a))
    found.nonfinite, found.equal = finite.numel() - a.numel(), equal
    return found
