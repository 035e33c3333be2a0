"""Mixing by likeness: supermerger's cosine modes, which measure the whole models before they mix them.

Annotations are evaluated (no `from __future__ import annotations` here): they are the schema.
"""

from collections.abc import Callable

from mergekit_sd.lazy import torch
from mergekit_sd.operations.registry import operation
from mergekit_sd.operations.survey import Models
from mergekit_sd.operations.types import Key, Out, PerBlock, Same, Surveyed, Tensor, Which

# Elements worked on at a time: in float64 they and their product stay in a core's cache.
PIECE = 1 << 16
# Likenesses no further apart than this differ by rounding only.
NO_SPREAD = 1e-12


def _survey_a(models: Models) -> tuple[float, float]:
    return _usual_range(models, lambda columns, _: columns, unit=True)


def _survey_b(models: Models) -> tuple[float, float]:
    return _usual_range(models, lambda columns, whole: (columns + whole) / 2, unit=False)


@operation(
    "mix two models",
    "k·a + (1 − k)·b, k = clip((likeness − min) / (max − min) − |alpha|, 0, 1), of unit columns",
    by="model",
    fold=lambda key, **_: "a" if key.component == "vae" else None,
    survey=_survey_a,
    also=("cosineA (supermerger)", "losslessmix"),
)
def cosine_a(a: Same, b: Same, *, alpha: PerBlock = 0.5, key: Which, survey: Surveyed, out: Out = None) -> Same:
    """Keeps a where the two models agree and takes b where they do not; favours a's structure.

    supermerger's cosineA. Columns are what feeds one input: dim 0 runs along them; they are brought
    to length 1. A column's likeness is the mean of its cosine and of the whole tensor's; min and max
    are those of all column cosines of both models, without the VAE, after the lowest and the
    highest hundredth. More alpha means more of b, but alpha 0 is not a. The VAE stays a's.
    A zero column or tensor has the cosine 0 (supermerger: NaN for a tensor). Where the models'
    cosines are all one number, k is 1 − |alpha|.
    """
    return _mix(a, b, _likeness(a, b, unit=True), abs(alpha), key, survey, out)


@operation(
    "mix two models",
    "k·a + (1 − k)·b, k = clip((likeness − min) / (max − min) − alpha, 0, 1)",
    by="model",
    fold=lambda key, **_: "a" if key.component == "vae" else None,
    survey=_survey_b,
    also=("cosineB (supermerger)",),
)
def cosine_b(a: Same, b: Same, *, alpha: PerBlock = 0.5, key: Which, survey: Surveyed, out: Out = None) -> Same:
    """Keeps a where the two models agree and takes b where they do not; favours b's structure.

    supermerger's cosineB. As `cosine_a`, with the columns as long as they are: the whole tensor's
    cosine then counts long columns for more. Min and max are those of the likenesses, a zero
    tensor's left out. The VAE stays a's.
    """
    return _mix(a, b, _likeness(a, b, unit=False), alpha, key, survey, out)


def _mix(
    a: Tensor,
    b: Tensor,
    likeness: tuple[Tensor, Tensor],
    alpha: float,
    key: Key,
    usual_range: tuple[float, float],
    out: Out,
) -> Tensor:
    if key.component == "vae":
        return a.clone()
    columns, whole = likeness
    lowest, highest = usual_range
    if highest - lowest > NO_SPREAD:
        share = ((columns + whole.nan_to_num(0.0)) / 2 - lowest) / (highest - lowest)
    else:
        share = torch.ones_like(columns)
    share = (share - alpha).clamp(0.0, 1.0).float()
    return torch.lerp(b, a, share.reshape(a.shape[1:]), out=out)


def _likeness(a: Tensor, b: Tensor, *, unit: bool) -> tuple[Tensor, Tensor]:
    """The cosine of each of dim 0's columns, and of the whole tensors (NaN if one is zero), in float64.

    `unit`: the whole tensors' after every column was divided by its length: then their product is
    the sum of the columns' cosines, and their squared lengths are the numbers of non-zero columns.
    """
    product, square_a, square_b = _column_sums(a, b)
    lengths = square_a.sqrt() * square_b.sqrt()
    columns = torch.where(lengths == 0, 0.0, product / lengths)
    if unit:
        product, square_a, square_b = columns, (square_a != 0).double(), (square_b != 0).double()
    return columns, product.sum() / (square_a.sum().sqrt() * square_b.sum().sqrt())


def _column_sums(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Σ ab, Σ a² and Σ b² along dim 0 in float64, without a float64 copy of a whole tensor."""
    columns = (a.flatten(1), b.flatten(1)) if a.ndim > 1 else (a.reshape(-1, 1), b.reshape(-1, 1))
    rows = max(1, PIECE // max(1, columns[0].shape[1]))
    sums = torch.zeros(3, columns[0].shape[1], dtype=torch.float64, device=a.device)
    for x, y in zip(*(torch.split(each, rows) for each in columns), strict=True):
        x, y = x.double(), y.double()
        sums[0] += (x * y).sum(0)
        sums[1] += x.square_().sum(0)
        sums[2] += y.square_().sum(0)
    product, square_a, square_b = sums
    return product, square_a, square_b


def _usual_range(models: Models, measure: Callable[[Tensor, Tensor], Tensor], *, unit: bool) -> tuple[float, float]:
    """The least and the greatest `measure` of the likenesses of all tensors but the VAE's, without outliers.

    What is below the 1st percentile goes, then what is above the 99th of the rest. However a
    percentile between two values is interpolated, the same ones stay: they are found by their rank.
    """
    names = [name for name, key in models.keys.items() if key.component != "vae"]
    found = models.map(lambda _, tensors: measure(*_likeness(*tensors, unit=unit)).cpu(), names)
    values = torch.cat([torch.empty(0, dtype=torch.float64), *found])
    values = values[~values.isnan()].sort().values
    if not len(values):
        return 0.0, 0.0
    kept = values[values >= values[-(-(len(values) - 1) // 100)]]
    return float(kept[0]), float(kept[(len(kept) - 1) * 99 // 100])
