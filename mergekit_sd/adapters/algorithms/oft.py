"""OFT and BOFT: groups of output rows are rotated. W' = blockdiag(R)ᵀ·W with R = (I + Q)(I − Q)⁻¹, Q = B − Bᵀ.

Qiu et al., "Controlling Text-to-Image Diffusion by Orthogonal Finetuning" (2023); Liu et al.,
"Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization" (2024), in which stages mix rows
further and further apart, and R stands untransposed. At another strength than 1 each R becomes
strength·R + (1 − strength)·I, and `rescale`, a factor for each row, 1 + strength·(rescale − 1).
"""

from __future__ import annotations

from math import prod

from mergekit_sd.adapters.algorithms.algorithm import Algorithm, Parts, Shape, Shapes
from mergekit_sd.adapters.algorithms.parts import expect_matrix, mismatch, number, shape_of
from mergekit_sd.adapters.styles import ALPHA
from mergekit_sd.errors import MalformedFile
from mergekit_sd.lazy import torch
from mergekit_sd.operations.types import Tensor

BLOCKS, ROTATIONS, RESCALE = "oft_blocks", "oft_diag", "rescale"
# A rotation's RᵀR may be this far from the identity before its blocks are called broken.
_ORTHOGONAL = 1e-3


def _check(parts: Shapes, shape: Shape) -> None:
    """Blocks (n, b, b) with n·b rows; of BOFT (m, n, b, b), b even, and the last stage within the rows."""
    expect_matrix(shape, "OFT")
    out = shape[0]
    name = BLOCKS if BLOCKS in parts else ROTATIONS
    found = shape_of(parts, name)
    square = len(found) == 3 or (len(found) == 4 and name == BLOCKS)
    if not square or found[-1] != found[-2] or found[-1] * found[-3] != out:
        raise mismatch(parts, name, f"square blocks that are {out} rows together")
    if len(found) == 4 and (found[-1] % 2 or not found[0] or out % (found[-1] << (found[0] - 1))):
        raise mismatch(parts, name, f"blocks of an even size whose stages, each twice as wide, divide {out} rows")
    if RESCALE in parts and prod(shape_of(parts, RESCALE)) != out:
        raise mismatch(parts, RESCALE, f"{out} numbers, one for each row")


def _change(weight: Tensor, parts: Parts, strength: float) -> Tensor:
    turns = _rotations(parts, weight.shape[0]).to(weight.dtype)
    turns = strength * turns + (1.0 - strength) * torch.eye(turns.shape[-1], dtype=weight.dtype, device=weight.device)
    rows = weight.flatten(1)
    rows = _butterfly(rows, turns) if turns.ndim == 4 else _turned(rows, turns.mT)
    if RESCALE in parts:
        rows = rows * (1.0 + strength * (parts[RESCALE].reshape(-1, 1) - 1.0))
    return rows.reshape(weight.shape)


def _rotations(parts: Parts, out: int) -> Tensor:
    """R in float64. Raises MalformedFile for blocks that give no rotation."""
    if ROTATIONS in parts:
        return parts[ROTATIONS].double()
    blocks = parts[BLOCKS].double()
    q = _constrained(blocks - blocks.mT, number(parts, ALPHA) or 0.0, out)
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    # One by one: on two threads and more, torch's LU of a batch of large matrices fails in MKL.
    solved = [torch.linalg.solve_ex(eye - each, eye + each).result for each in q.flatten(0, -3)]
    turns = torch.stack(solved).reshape(q.shape)
    if not ((turns.mT @ turns - eye).abs().max() < _ORTHOGONAL):  # nor where it is NaN
        raise MalformedFile(f'The part "{BLOCKS}" gives no rotation: its numbers are too large, NaN or Inf.')
    return turns


def _constrained(q: Tensor, alpha: float, out: int) -> Tensor:
    """Q, all blocks together no longer than alpha·out; 0 constrains nothing."""
    if alpha < 0.0:
        raise MalformedFile(f'The part "{ALPHA}" is {alpha:g}; of OFT it is a length and not negative.')
    length = float(torch.linalg.vector_norm(q))
    return q * (alpha * out / length) if 0.0 < alpha * out < length else q


def _turned(rows: Tensor, turns: Tensor) -> Tensor:
    """Each group of rows by its matrix, which are (n, b, b)."""
    return torch.bmm(turns, rows.reshape(turns.shape[0], turns.shape[1], -1)).reshape(rows.shape)


def _butterfly(rows: Tensor, stages: Tensor) -> Tensor:
    """Stage i turns together rows that are 2^i·b/2 apart."""
    for i, turns in enumerate(stages):
        half = 2**i * turns.shape[-1] // 2
        near = rows.reshape(-1, 2, half, rows.shape[1]).transpose(1, 2)
        turned = _turned(near.reshape(rows.shape), turns)
        rows = turned.reshape(near.shape).transpose(1, 2).reshape(rows.shape)
    return rows


OFT = Algorithm("OFT", (frozenset({BLOCKS}),), frozenset({BLOCKS, RESCALE, ALPHA}), check=_check, change=_change)
OFT_OF_ROTATIONS = Algorithm(
    "OFT", (frozenset({ROTATIONS}),), frozenset({ROTATIONS, RESCALE, ALPHA}), check=_check, change=_change
)
