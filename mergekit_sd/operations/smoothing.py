"""Smoothing a difference as if it were a picture: median, then Gaussian blur, along all dims.

The median of so many neighbours is the slow part. It is selected, not sorted: see `median_filter`.
Annotations are evaluated (no `from __future__ import annotations` here): they are the schema.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Any

from mergekit_sd.lazy import torch
from mergekit_sd.operations.registry import operation
from mergekit_sd.operations.types import Out, PerBlock, Weight


@operation(
    "carry a difference onto a model",
    "a + alpha·gaussian(median(b − c))",
    by="tensor",
    fold=lambda alpha: "a" if alpha == 0 else None,
    mixes=(("b", "c"),),
    also=("smoothAdd (supermerger)", "smoothAdd MT"),
)
def smooth_add(a: Weight, b: Weight, c: Weight, *, alpha: PerBlock = 1.0, out: Out = None) -> Weight:
    """What b learned since c, smoothed and added to a: single strong changes go, broad ones stay.

    supermerger's smoothAdd. The difference is treated as a picture of as many dimensions as it has:
    each element becomes the median of its 3 × 3 × … neighbours, then all is blurred by a Gaussian of
    σ 1, cut at 4. Edges are mirrored (SciPy's "reflect").
    """
    from scipy.ndimage import gaussian_filter  # type: ignore[import-untyped]

    smooth = gaussian_filter(median_filter((b - c).cpu().numpy()), sigma=1.0, mode="reflect", truncate=4.0)
    return torch.add(a, torch.from_numpy(smooth).to(a.device), alpha=alpha, out=out)


def median_filter(values: Any) -> Any:
    """The median of each element's neighbourhood of 3 along every axis of an array, edges mirrored.

    Of sorted lists for all elements at once: the three neighbours along one axis, merged with
    their neighbours along the next, and so on; two of the last axis's merges are one. An axis of size 1
    has every value three times and leaves the median what it is. NaN spreads to all neighbours;
    an infinity is the largest number and no more.
    """
    import numpy as np

    if not values.size:
        return values.copy()
    # Rows of the longest axis, which are worked fast, along the next longest.
    axes = np.argsort(values.shape, kind="stable").tolist()
    order = [*axes[-2:-1], *axes[:-2], *axes[-1:]]
    rows = np.atleast_2d(np.ascontiguousarray(values.transpose(order)))
    result = np.empty_like(rows)
    last = len(rows) - 1
    before = here = _row_lists(rows[0])
    for index in range(0, last + 1, 2):
        after = _row_lists(rows[min(index + 1, last)])
        both = _merge(here, after)
        result[index] = _middle(both, before)
        if index < last:
            before, here = after, _row_lists(rows[min(index + 2, last)])
            result[index + 1] = _middle(both, here)
    return result.reshape([values.shape[axis] for axis in order]).transpose(np.argsort(order))


def _row_lists(row: Any) -> list[Any]:
    """The values around each element of one row, in ascending order: a list of arrays of the row's shape."""
    import numpy as np

    lists = [row]
    for axis, size in enumerate(row.shape):
        if size > 1:
            first, last = ((slice(None),) * axis + (end,) for end in (slice(None, 1), slice(-1, None)))
            all_but_last, all_but_first = ((slice(None),) * axis + (end,) for end in (slice(-1), slice(1, None)))
            before = [np.concatenate([each[first], each[all_but_last]], axis) for each in lists]
            after = [np.concatenate([each[all_but_first], each[last]], axis) for each in lists]
            lists = _merge(_merge(before, lists), after)
    return lists


def _merge(x: Sequence[Any], y: Sequence[Any]) -> list[Any]:
    """Two ascending lists of arrays as one, by Batcher's odd-even merge (1968)."""
    import numpy as np

    if not x or not y:
        return [*x, *y]
    if len(x) == len(y) == 1:
        return [np.minimum(x[0], y[0]), np.maximum(x[0], y[0])]
    first, *more = _merge(x[::2], y[::2])
    others = _merge(x[1::2], y[1::2])
    merged = [first]
    for low, high in zip(others, more, strict=False):
        merged += [np.minimum(low, high), np.maximum(low, high)]
    return [*merged, *more[len(others) :], *others[len(more) :]]


def _middle(x: Sequence[Any], y: Sequence[Any]) -> Any:
    """The median of two ascending lists, of an odd number of values in all; x is the longer.

    The kth value is the least that some i of x and k − i of y do not exceed.
    """
    import numpy as np

    k = (len(x) + len(y) + 1) // 2
    return reduce(
        np.minimum, (np.maximum(x[i - 1], y[k - i - 1]) if i < k else x[i - 1] for i in range(k - len(y), k + 1))
    )
