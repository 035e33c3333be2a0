"""Formulas of the LoRA family, element by element in float64, and modules with random numbers to try them on."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import prod

import numpy as np
from hypothesis import strategies as st

KERNELS = ((), (1, 1), (3, 3))
STRENGTHS = (0.0, 0.5, 1.0, -1.0)


# --- modules --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """A weight (a·c, b·d, *kernel), a rank, and how many stages a butterfly has."""

    a: int = 2
    b: int = 3
    c: int = 4
    d: int = 2
    rank: int = 2
    stages: int = 2
    kernel: tuple[int, ...] = ()
    seed: int = 0

    def shape(self, name: str) -> tuple[int, ...]:
        out = 2 * self.a * 2 ** (self.stages - 1) * self.c if name == "BOFT" else self.a * self.c
        return (out, self.b * self.d, *self.kernel)


SIZES = st.builds(
    Sizes,
    *(st.integers(1, 4) for _ in "abcdr"),
    st.integers(1, 3),
    st.sampled_from(KERNELS),
    st.integers(0, 99),
)


def part_shapes(name: str, z: Sizes) -> dict[str, tuple[int, ...]]:
    """The parts of a module as its trainer writes them."""
    out, inside, *kernel = z.shape(name)
    r, k = z.rank, tuple(kernel)
    ones = (1,) * len(k)
    columns = inside * prod(k)
    return {
        "LoRA": {"lora_down.weight": (r, inside, *k), "lora_up.weight": (out, r, *ones)},
        "LoRA Tucker": {
            "lora_down.weight": (r, inside, *ones),
            "lora_mid.weight": (r, r, *k),
            "lora_up.weight": (out, r, *ones),
        },
        "LoHa": {f"hada_w{i}_{s}": (out, r) if s == "a" else (r, columns) for i, s in product("12", "ab")},
        "LoHa Tucker": {
            **{f"hada_w{i}_{s}": (r, out if s == "a" else inside) for i, s in product("12", "ab")},
            **{f"hada_t{i}": (r, r, *k) for i in "12"},
        },
        "LoKr whole": {"lokr_w1": (z.a, z.b), "lokr_w2": (z.c, z.d, *k)},
        "LoKr": {"lokr_w1": (z.a, z.b), "lokr_w2_a": (z.c, r), "lokr_w2_b": (r, z.d, *k)},
        "LoKr w1": {"lokr_w1_a": (z.a, r), "lokr_w1_b": (r, z.b), "lokr_w2": (z.c, z.d, *k)},
        "LoKr both": {
            **{"lokr_w1_a": (z.a, r), "lokr_w1_b": (r, z.b)},
            **{"lokr_w2_a": (z.c, r), "lokr_w2_b": (r, z.d * prod(k))},
        },
        "LoKr Tucker": {
            **{"lokr_w1": (z.a, z.b), "lokr_t2": (r, r, *k)},
            **{"lokr_w2_a": (r, z.c), "lokr_w2_b": (r, z.d)},
        },
        "IA3": {"weight": (1, out, *ones) if k else (out,), "on_input": ()},
        "IA3 on input": {"weight": (1, inside, *ones) if k else (inside,), "on_input": ()},
        "GLoRA": {
            **{"a1.weight": (inside, r, *ones), "a2.weight": (r, inside, *ones)},
            **{"b1.weight": (out, r, *ones), "b2.weight": (r, inside, *k)},
        },
        "GLoRA Tucker": {
            **{"a1.weight": (inside, r), "a2.weight": (r, inside), "bm.weight": (r, r, *k)},
            **{"b1.weight": (out, r), "b2.weight": (r, inside)},
        },
        "GLoRA old": {
            **{"a1.weight": (r, columns), "a2.weight": (columns, r)},
            **{"b1.weight": (r, columns), "b2.weight": (out, r)},
        },
        "OFT": {"oft_blocks": (z.a, z.c, z.c)},
        "OFT rescaled": {"oft_blocks": (z.a, z.c, z.c), "rescale": (out, *(1 for _ in (inside, *k)))},
        "OFT of rotations": {"oft_diag": (z.a, z.c, z.c)},
        "BOFT": {"oft_blocks": (z.stages, out // (2 * z.a), 2 * z.a, 2 * z.a), "rescale": (out, 1, *ones)},
        "full": {"diff": (out, inside, *k)},
        "norm": {"w_norm": (out, inside, *k)},
    }[name]


ADDITIVE = ("LoRA", "LoRA Tucker", "LoHa", "LoHa Tucker")
ADDITIVE += ("LoKr whole", "LoKr", "LoKr w1", "LoKr both", "LoKr Tucker", "full", "norm")
CHANGING = ("IA3", "IA3 on input", "GLoRA", "GLoRA Tucker", "GLoRA old")
CHANGING += ("OFT", "OFT rescaled", "OFT of rotations", "BOFT")
MAGNITUDES = ("rows", "flat rows", "columns")


def module(
    name: str, sizes: Sizes, alpha: float | None = None, *, signed: bool = False
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """A weight and a module's parts in float32: positive, so that no sum loses digits, or of both signs."""
    rng = np.random.default_rng(sizes.seed)

    def some(shape):
        return (rng.normal(size=shape) if signed else rng.uniform(0.5, 1.5, shape)).astype(np.float32)

    weight = some(sizes.shape(name))
    parts = {part: some(shape) for part, shape in part_shapes(name, sizes).items()}
    if "on_input" in parts:
        parts["on_input"] = np.array(name == "IA3 on input")
    if alpha is not None:
        parts["alpha"] = np.array(alpha, np.float32)
    return weight, parts


def magnitude(kind: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """DoRA's lengths: (out, 1, …), (out,) or (1, in, …)."""
    out, inside, *kernel = shape
    ones = (1,) * len(kernel)
    wanted = {"rows": (out, 1, *ones), "flat rows": (out,), "columns": (1, inside, *ones)}[kind]
    return np.random.default_rng(seed + 1).uniform(0.5, 2.0, wanted).astype(np.float32)


# --- formulas -------------------------------------------------------------------------------------------


def scale(parts, rank):
    if "scale" in parts:
        return float(parts["scale"].item())
    alpha = float(parts["alpha"].item()) if "alpha" in parts else 0.0
    return alpha / rank if alpha else 1.0


def rotations(parts, rows):
    """R, in groups as the blocks are."""
    if "oft_diag" in parts:
        return parts["oft_diag"].astype(np.float64)
    blocks = parts["oft_blocks"].astype(np.float64)
    q = blocks - np.swapaxes(blocks, -1, -2)
    limit = (float(parts["alpha"].item()) if "alpha" in parts else 0.0) * rows
    length = np.sqrt(sum(each * each for each in q.ravel()))
    q *= limit / length if 0 < limit < length else 1.0
    eye = np.eye(q.shape[-1])
    return (eye + q) @ np.linalg.inv(eye - q)


def change(parts, weight, k):
    """The new weight at strength k."""
    parts = {name: np.asarray(part, np.float64) for name, part in parts.items()}
    weight = weight.astype(np.float64)
    if "dora_scale" in parts:
        return dora(parts, weight, k)
    if "oft_blocks" in parts or "oft_diag" in parts:
        return oft(parts, weight, k)
    return weight + k * difference(parts, weight)


def difference(parts, weight):
    out, inside, *kernel = weight.shape
    element = elements(parts, weight.reshape(out, inside, -1))
    result = np.empty((out, inside, prod(kernel)))
    for place in np.ndindex(result.shape):
        result[place] = element(*place)
    return result.reshape(weight.shape)


def elements(p, weight):
    """ΔW[o, i, t] as a function of its place."""
    shape = weight.shape
    if "lora_up.weight" in p:
        return lora(p["lora_up.weight"], p.get("lora_mid.weight"), p["lora_down.weight"], scale, p, shape)
    if "hada_w1_a" in p:
        return loha(p, shape)
    if "on_input" in p:
        numbers = p["weight"].ravel()
        return lambda o, i, t: weight[o, i, t] * numbers[i if p["on_input"] else o]
    if "a1.weight" in p:
        return glora(p, weight)
    if any(name.startswith("lokr") for name in p):
        return lokr(p, shape)
    whole = next(p[name] for name in ("diff", "w_norm") if name in p).reshape(shape)
    return lambda o, i, t: whole[o, i, t]


def lora(up, mid, down, scale, p, shape):
    r, inside = down.shape[0], shape[1]
    up, s = up.reshape(shape[0], r), scale(p, r)
    if mid is None:
        down = down.reshape(r, inside, -1)
        return lambda o, i, t: s * sum(up[o, q] * down[q, i, t] for q in range(r))
    down, mid = down.reshape(r, inside), mid.reshape(r, r, -1)
    return lambda o, i, t: s * sum(mid[a, b, t] * up[o, a] * down[b, i] for a in range(r) for b in range(r))


def loha(p, shape):
    r = p["hada_w1_b"].shape[0]
    s = scale(p, r)

    def half(w, o, i, t):
        a, b = p[f"hada_w{w}_a"], p[f"hada_w{w}_b"]
        if f"hada_t{w}" in p:
            core = p[f"hada_t{w}"].reshape(r, r, -1)
            return sum(core[x, y, t] * a[x, o] * b[y, i] for x in range(r) for y in range(r))
        return sum(a[o, q] * b.reshape(r, shape[1], -1)[q, i, t] for q in range(r))

    return lambda o, i, t: s * half(1, o, i, t) * half(2, o, i, t)


def lokr(p, shape):
    if "lokr_w1" in p:
        w1 = p["lokr_w1"]
    else:
        a, b = p["lokr_w1_a"], p["lokr_w1_b"]
        w1 = np.array(
            [[sum(a[x, q] * b[q, y] for q in range(len(b))) for y in range(b.shape[1])] for x in range(len(a))]
        )
    c, d = shape[0] // w1.shape[0], shape[1] // w1.shape[1]
    ranked = next((p[name] for name in ("lokr_w2_b", "lokr_w1_b") if name in p), None)
    s = 1.0 if ranked is None else scale(p, len(ranked))
    if "lokr_w2" in p:
        w2 = p["lokr_w2"].reshape(c, d, -1)
        second = lambda x, y, t: w2[x, y, t]  # noqa: E731
    elif "lokr_t2" in p:
        second = lora(p["lokr_w2_a"].T, p["lokr_t2"], p["lokr_w2_b"], lambda p, r: 1.0, p, (c, d))
    else:
        second = lora(p["lokr_w2_a"], None, p["lokr_w2_b"], lambda p, r: 1.0, p, (c, d))
    return lambda o, i, t: s * w1[o // c, i // d] * second(o % c, i % d, t)


def glora(p, weight):
    a1, a2, b1, b2 = (p[f"{name}.weight"] for name in ("a1", "a2", "b1", "b2"))
    out, inside, kernel = weight.shape
    old = (len(a1), len(b1)) != (inside, out)
    r = len(a1) if old else len(a2)
    s = scale(p, r)
    if old:
        flat, a1, b1 = weight.reshape(out, -1), a1.reshape(r, -1), b1.reshape(r, -1)

        def element(o, i, t):
            column = i * kernel + t
            turned = sum(flat[o, j] * a2[j, q] * a1[q, column] for j in range(flat.shape[1]) for q in range(r))
            return s * (turned + sum(b2[o, q] * b1[q, column] for q in range(r)))

        return element
    a1, a2 = a1.reshape(inside, r), a2.reshape(r, inside)
    added = lora(b1, p.get("bm.weight"), b2, lambda p, r: 1.0, p, weight.shape)
    turned = lambda o, i, t: sum(weight[o, j, t] * a1[j, q] * a2[q, i] for j in range(inside) for q in range(r))  # noqa: E731
    return lambda o, i, t: s * (turned(o, i, t) + added(o, i, t))


def oft(p, weight, k):
    rows = weight.reshape(len(weight), -1)
    turns = rotations(p, len(rows))
    turns = k * turns + (1 - k) * np.eye(turns.shape[-1])
    if turns.ndim == 3:
        rows = turned(rows, list(range(len(rows))), np.swapaxes(turns, 1, 2))
    else:
        for i, stage in enumerate(turns):
            half = 2**i * turns.shape[-1] // 2
            order = [
                c * 2 * half + g * half + x for c in range(len(rows) // (2 * half)) for x in range(half) for g in (0, 1)
            ]
            rows = turned(rows, order, stage)
    factors = p["rescale"].ravel() if "rescale" in p else np.ones(len(rows))
    return np.stack([row * (1 + k * (factor - 1)) for row, factor in zip(rows, factors, strict=True)]).reshape(
        weight.shape
    )


def turned(rows, order, matrices):
    """Row order[n·b + x] becomes Σ matrices[n][x, y]·row order[n·b + y]."""
    result, b = np.empty_like(rows), matrices.shape[-1]
    for n, matrix in enumerate(matrices):
        for x in range(b):
            result[order[n * b + x]] = sum(matrix[x, y] * rows[order[n * b + y]] for y in range(b))
    return result


def dora(p, weight, k):
    inner = {name: part for name, part in p.items() if name != "dora_scale"}
    moved = weight + difference(inner, weight)
    lengths = p["dora_scale"]
    columns = lengths.size != len(weight) or (lengths.ndim > 1 and lengths.shape[1] > 1)
    result = np.empty_like(moved)
    for n, length in enumerate(lengths.ravel()):
        place = (slice(None), n) if columns else n
        result[place] = moved[place] * length / np.sqrt((moved[place] ** 2).sum())
    return weight + k * (result - weight)
