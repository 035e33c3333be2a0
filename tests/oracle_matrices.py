"""Formulas of the rotation between two matrices and of the approximation of lower rank."""

from __future__ import annotations

import numpy as np
from oracle import KINDS, Case


def null_space(m, rank):
    """What a matrix' rows do not reach: an orthonormal basis, in rows."""
    return np.linalg.svd(m)[2][rank:]


def procrustes(a, b):
    """The orthogonal Q with the least ‖aQ − b‖, in all of the rows' space."""
    product = a.T @ b
    u, sizes, v = np.linalg.svd(product)
    rank = int(np.sum(sizes > 1e-12 * sizes[0])) if sizes[0] else 0
    q = sum((np.outer(u[:, i], v[i]) for i in range(rank)), np.zeros_like(product))
    if rank < len(product):
        left, right = null_space(product.T, rank), null_space(product, rank)
        x, _, y = np.linalg.svd(left @ right.T)
        q = q + left.T @ x @ y @ right
    return q


def power(q, t):
    """By the complex Schur form, which of an orthogonal matrix is diagonal."""
    from scipy.linalg import schur

    form, z = schur(q, output="complex")
    angles = np.angle(np.diag(form))
    half = np.abs(angles) > np.pi - 1e-6
    turned = np.where(half, np.cos(np.pi * t), np.exp(1j * t * angles))
    return (z @ np.diag(turned) @ z.conj().T).real


def rotate(a, b, *, alpha, beta):
    if a.ndim < 2 or not a.size:
        return (1 - alpha) * a + alpha * b
    kernel = int(np.prod(a.shape[2:]))
    columns = kernel if kernel > 1 else a.shape[1]
    x, y = a.reshape(-1, columns), b.reshape(-1, columns)
    mean_x, mean_y = x.mean(axis=0), y.mean(axis=0)
    q = procrustes(x - mean_x, y - mean_y)
    shape = (1 - beta) * (x - mean_x) + beta * (y - mean_y) @ q.T
    return (shape @ power(q, alpha) + (1 - alpha) * mean_x + alpha * mean_y).reshape(a.shape)


def truncate_rank(a, *, ratio):
    if a.ndim < 2 or not a.size:
        return a
    matrix = a.reshape(len(a), -1)
    u, sizes, v = np.linalg.svd(matrix, full_matrices=False)
    kept = np.zeros_like(matrix)
    for i in range(round(ratio * len(sizes))):
        kept += sizes[i] * np.outer(u[:, i], v[i])
    return kept.reshape(a.shape)


SHAPES = ((), (0,), (7,), (3, 5), (16, 12), (8, 8), (3, 20), (1, 6), (5, 2, 1, 1), (2, 3, 3, 3), (4, 0, 2))

METHODS = {
    "rotate": Case(
        rotate,
        {"equal", "scales"},
        shapes=SHAPES,
        # Matrices with many zeros have rotations that are equally near: test_methods_structure has their laws.
        kinds=[kind for kind in KINDS if kind != "sparse"],
    ),
    "truncate_rank": Case(truncate_rank, {"scales"}, shapes=SHAPES),
}
