"""PEFT's OFT: groups of inputs are rotated, W' = W·blockdiag(R)ᵀ; a convolution's inputs are its in·kh·kw columns.

`oft_R` has a row for each block of b inputs: the b(b−1)/2 numbers above Q's diagonal, row by row, Q = −Qᵀ. A
single row stands for all blocks (block_share). What R is of Q stands in PEFT's settings, of which two are
parts here: `cayley_terms` 0 for Cayley's (I − Q)(I + Q)⁻¹, else the number of terms that PEFT takes of its
Neumann series the other way round, I + 2Q + 2Q² + … with the last term once; and `coft_eps`, where Q may be
no longer than that over the root of the number of rows. At another strength than 1 each R becomes
strength·R + (1 − strength)·I, as of the OFT that rotates outputs, so that the weight is between the two.

Qiu et al., "Orthogonal Finetuning Made Scalable" (2025); checked against PEFT 0.21.
"""

from __future__ import annotations

from math import isqrt, prod, sqrt

from mergekit_sd.adapters.algorithms.algorithm import Algorithm, Parts, Shape, Shapes
from mergekit_sd.adapters.algorithms.parts import expect_matrix, expect_number, mismatch, number, shape_of
from mergekit_sd.adapters.styles import OFT_R
from mergekit_sd.errors import MalformedFile
from mergekit_sd.lazy import torch
from mergekit_sd.operations.types import Tensor

TERMS, EPS = "cayley_terms", "coft_eps"
# RᵀR of Cayley's R may be this far from the identity before its numbers are called broken.
_ORTHOGONAL = 1e-3
_SINGLE, _DOUBLE = 1, 2  # of the series: the terms up to which it is I, and I + 2Q


def _check(parts: Shapes, shape: Shape) -> None:
    """Rows of b(b−1)/2 numbers, one for each b columns of the weight or one for all; and what R is of them."""
    expect_matrix(shape, "OFT")
    columns = prod(shape[1:])
    found = shape_of(parts, OFT_R)
    block = _block_size(found[1]) if len(found) == 2 else None
    if block is None or columns % block or found[0] not in (1, columns // block):
        raise mismatch(parts, OFT_R, f"for each block of b columns b(b−1)/2 numbers, {columns} columns together")
    if TERMS not in parts:
        raise MalformedFile(
            "Which way PEFT's OFT turns stands in its settings, which are not there.",
            hint="put adapter_config.json beside the file, which must be called adapter_model.safetensors",
        )
    for name in {TERMS, EPS} & parts.keys():
        expect_number(parts, name)


def _change(weight: Tensor, parts: Parts, strength: float) -> Tensor:
    turns = _rotations(parts).to(weight.dtype)
    size = turns.shape[-1]
    turns = strength * turns + (1.0 - strength) * torch.eye(size, dtype=weight.dtype, device=weight.device)
    # A block that is shared is one matrix for all groups of all rows.
    groups = weight.reshape(len(weight), -1, size).transpose(0, 1) if len(turns) > 1 else weight.reshape(1, -1, size)
    turned = torch.bmm(groups, turns.mT)
    return (turned.transpose(0, 1) if len(turns) > 1 else turned).reshape(weight.shape)


def _rotations(parts: Parts) -> Tensor:
    """R (rows, b, b) in float64. Raises MalformedFile for numbers that give none."""
    rows = parts[OFT_R].double()
    size = _block_size(rows.shape[1])
    assert size is not None
    q = rows.new_zeros(len(rows), size, size)
    q[:, *torch.triu_indices(size, size, 1)] = rows
    q = _constrained(q - q.mT, number(parts, EPS))
    terms = int(number(parts, TERMS) or 0)
    turns = _series(q, terms) if terms else _cayley(q)
    # The series is a rotation nearly, and for large numbers none at all: it is taken as it is.
    lengths = turns if terms else turns.mT @ turns - torch.eye(size, dtype=turns.dtype, device=turns.device)
    if not (lengths.abs().max() < (torch.inf if terms else _ORTHOGONAL)):  # nor where it is NaN
        raise MalformedFile(f'The part "{OFT_R}" gives no rotation: its numbers are too large, NaN or Inf.')
    return turns


def _constrained(q: Tensor, eps: float | None) -> Tensor:
    """Each block's Q, no longer than eps over the root of their number; None constrains nothing."""
    if eps is None:
        return q
    most = eps / sqrt(len(q))
    lengths = torch.linalg.vector_norm(q, dim=(1, 2), keepdim=True)
    return torch.where(lengths <= most, q, q * (most / lengths))


def _cayley(q: Tensor) -> Tensor:
    """(I − Q)(I + Q)⁻¹, whose factors commute."""
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    # One by one: on two threads and more, torch's LU of a batch of large matrices fails in MKL.
    return torch.stack([torch.linalg.solve_ex(eye + each, eye - each).result for each in q])


def _series(q: Tensor, terms: int) -> Tensor:
    """I, I + 2Q, I + 2Q + 2Q² + Q³ (of three terms as of four), I + 2Q + 2Q² + 2Q³ + Q⁴, …"""
    total = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device).expand_as(q).clone()
    if terms == _SINGLE:
        return total
    total.add_(q, alpha=2.0)
    if terms == _DOUBLE:
        return total
    power = q
    for _ in range(2, max(terms, 4) - 1):
        power = power @ q
        total.add_(power, alpha=2.0)
    return total.add_(power @ q)


def _block_size(numbers: int) -> int | None:
    """The b of b(b−1)/2 numbers; None where there is no such b."""
    size = (1 + isqrt(1 + 8 * numbers)) // 2
    return size if size * (size - 1) // 2 == numbers else None


OFT_OF_INPUTS = Algorithm(
    "PEFT's OFT", (frozenset({OFT_R}),), frozenset({OFT_R, TERMS, EPS}), check=_check, change=_change
)
