"""LoHa: two low-rank products, multiplied element by element. ΔW = s·(w1_a·w1_b)⊙(w2_a·w2_b).

Hyeon-Woo et al., "FedPara: Low-Rank Hadamard Product" (2022); with t1 and t2 each half is a Tucker product.
"""

from __future__ import annotations

from mergekit_sd.adapters.algorithms.algorithm import Algorithm, Parts, Shape, Shapes
from mergekit_sd.adapters.algorithms.parts import SETTINGS, expect, expect_matrix, flat, rank_from, scale, tucker
from mergekit_sd.operations.types import Tensor

# Of each half: the side of the outputs, the side of the inputs, Tucker's core.
_HALVES = (("hada_w1_a", "hada_w1_b", "hada_t1"), ("hada_w2_a", "hada_w2_b", "hada_t2"))
_FACTORS = frozenset(name for half in _HALVES for name in half[:2])
_CORES = frozenset(core for _, _, core in _HALVES)


def _rank(parts: Shapes) -> int:
    return rank_from(parts, "hada_w1_b")


def _check(parts: Shapes, shape: Shape) -> None:
    """a (out, r), b (r, in·kernel); or a (r, out), t (r, r, …), b (r, in)."""
    expect_matrix(shape, "LoHa")
    rank = _rank(parts)
    for a, b, core in _HALVES:
        if not parts.keys() & _CORES:
            expect(parts, a, shape, shape[0], (rank,))
            expect(parts, b, shape, rank, shape[1:])
        else:
            expect(parts, core, shape, rank, (rank, *shape[2:]))
            expect(parts, a, shape, rank, shape[:1])
            expect(parts, b, shape, rank, shape[1:2])


def _delta(parts: Parts, shape: Shape) -> Tensor:
    first, second = (_half(parts, *half).reshape(shape) for half in _HALVES)
    return first * scale(parts, _rank(parts)) * second


def _half(parts: Parts, a: str, b: str, core: str) -> Tensor:
    if core in parts:
        return tucker(parts[core], flat(parts, a), flat(parts, b))
    return flat(parts, a) @ flat(parts, b)


LOHA = Algorithm("LoHa", (_FACTORS,), _FACTORS | _CORES | SETTINGS, check=_check, rank=_rank, delta=_delta)
