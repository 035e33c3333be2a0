"""Three models: what b learned since c, weighed by how a and b differ, and what a and b both learned.

The changes are a − c and b − c. No float32 is squared before it is divided by one of its size, so
that tiny and huge weights have all these quotients, too.
Annotations are evaluated (no `from __future__ import annotations` here): they are the schema.
"""

import math

from mergekit_sd.lazy import torch
from mergekit_sd.operations.measures import norm
from mergekit_sd.operations.pairs import perpendicular
from mergekit_sd.operations.registry import operation
from mergekit_sd.operations.types import Out, PerBlock, Positive, Tensor, Weight

# Put in a divisor's place where it is 0: what it divides is 0, too, and stays so. The least float32 above 0.
SMALLEST = 2.0**-149
# Elements worked on at a time in float64, for a core's cache.
PIECE = 1 << 16


@operation(
    "carry a difference onto a model",
    "a + 1.8·alpha·|b − a|/(|b − a| + |b − c|)·(b − c)",
    fold=lambda alpha: "a" if alpha == 0 else None,
    mixes=(("b", "c"),),
    also=("trainDifference (supermerger)", "train_difference_mask (sd-mecha)", "train difference"),
)
def train_difference(a: Weight, b: Weight, c: Weight, *, alpha: PerBlock = 1.0, out: Out = None) -> Weight:
    """What b learned since c, added to a as if a had been trained on it: more where a is far from b.

    supermerger's trainDifference; sd-mecha has its factor of (b − c) as train_difference_mask. Where
    a is b already, and where b is c, nothing is added; where a is c, 0.9·alpha of the difference.
    """
    learned = torch.sub(b, c, out=out)
    apart = torch.sub(b, a).abs_()
    sizes = learned.abs().add_(apart).clamp_(min=SMALLEST)
    return torch.addcmul(a, learned.div_(sizes), apart, value=1.8 * alpha, out=learned)


@operation(
    "carry a difference onto a model",
    "a + 2·alpha·|a − b|/(|a − b| + |a + b − 2c|)·(b − c)",
    fold=lambda alpha: "a" if alpha == 0 else None,
    mixes=(("b", "c"),),
    also=("add_opposite_mask (sd-mecha)",),
)
def add_opposite(a: Weight, b: Weight, c: Weight, *, alpha: PerBlock = 1.0, out: Out = None) -> Weight:
    """What b learned since c, added to a: twice where a learned the opposite, not at all where it learned the same.

    sd-mecha's add_opposite_mask times (b − c). Where only b changed, it is added once (times alpha).
    """
    learned = torch.sub(b, c, out=out)
    # |x − y| + |x + y| is 2·max(|x|, |y|): of the changes here.
    greater = _greater(torch.sub(a, c), learned)
    apart = torch.sub(a, b).abs_()
    return torch.addcmul(a, learned.div_(greater), apart, value=alpha, out=learned)


@operation(
    "carry a difference onto a model",
    "a + 2·alpha·max(0, (c − a)·(b − c))/max(|a − c|, |b − c|)²·(b − c)",
    fold=lambda alpha: "a" if alpha == 0 else None,
    mixes=(("b", "c"),),
    also=("add_strict_opposite_mask (sd-mecha)",),
)
def add_strict_opposite(a: Weight, b: Weight, c: Weight, *, alpha: PerBlock = 1.0, out: Out = None) -> Weight:
    """What b learned since c, added to a only where a learned the opposite: twice where by as much.

    sd-mecha's add_strict_opposite_mask times (b − c). Where a and b changed in the same direction, or
    one of them did not, a stays.
    """
    learned = torch.sub(b, c, out=out)
    changed = torch.sub(a, c)
    greater = _greater(changed, learned)
    opposed = changed.div_(greater).mul_(learned).div_(greater).clamp_(max=0.0)
    return torch.addcmul(a, opposed, learned, value=-2.0 * alpha, out=learned)


@operation(
    "carry a difference onto a model",
    "a + alpha·((b − c) − (x·(b − c) / x·x)·x), x = a − c",
    by="tensor",
    fold=lambda alpha: "a" if alpha == 0 else None,
    mixes=(("b", "c"),),
    also=("add_perpendicular (sd-mecha)",),
)
def add_perpendicular(a: Weight, b: Weight, c: Weight, *, alpha: PerBlock = 1.0, out: Out = None) -> Weight:
    """What b learned since c and a did not, added to a: the part across a's own change; per tensor.

    sd-mecha's add_perpendicular: of b − c only what is at a right angle to a − c: the
    operation `perpendicular`. Where a is c, that is all of b − c (sd-mecha adds nothing there).
    """
    across = perpendicular(torch.sub(a, c), torch.sub(b, c))
    return torch.add(a, across, alpha=alpha, out=out)


@operation(
    "carry a difference onto a model",
    "(1 − s)·(a + alpha·(b − c)) + s·((1 − alpha/2)·a + alpha/2·b), s = beta·(a·b/max(|a|, |b|)² + 1)/2",
    fold=lambda alpha, beta: "a" if alpha == 0 else None,
    also=("similarity_add_difference (meh)",),
)
def similarity_add_difference(
    a: Weight, b: Weight, c: Weight, *, alpha: PerBlock = 1.0, beta: PerBlock = 1.0, out: Out = None
) -> Weight:
    """Adds b − c where a and b are unlike, and mixes a with b where they are alike; beta is how much likeness counts.

    meh's similarity_add_difference: two weights are alike by the lesser over the greater, from −1 (opposite)
    to 1 (equal; also if both are 0). Beta 0 is `add_difference`; of equal weights, beta 1 keeps a.
    """
    greater = torch.maximum(a.abs(), b.abs())
    share = torch.div(a, greater).mul_(b).div_(greater).nan_to_num_(nan=1.0).add_(1.0).mul_(beta / 2.0)
    mixed = torch.sub(b, a, out=greater).mul_(0.5)
    learned = torch.sub(b, c, out=out)
    return torch.add(a, learned.lerp_(mixed, share), alpha=alpha, out=learned)


@operation(
    "carry a difference onto a model",
    "a·(b/c)^s, s = alpha·max(0, −la·lb)/max(|la|, |lb|)², la = ln|a/c|, lb = ln|b/c|",
    fold=lambda alpha: "a" if alpha == 0 else None,
    mixes=(("b", "c"),),
    also=("multiply_quotient (sd-mecha)",),
)
def multiply_quotient(a: Weight, b: Weight, c: Weight, *, alpha: PerBlock = 1.0, out: Out = None) -> Weight:
    """What b learned since c as a factor, where a learned the opposite: a grew and b shrank, or the other way round.

    sd-mecha's multiply_quotient. Of a's own change |b/c|^s takes back some, at most all of it. Where b/c is
    negative its power is complex, and its real part is taken: |b/c|^s·cos(pi·s). Where a, b or c is 0
    there is no ratio, and a stays.
    """
    # In float64: the quotient of two differences of logarithms is near 0/0 where a, b and c nearly agree.
    log_c = c.double().abs_().log_()
    grown, learned = (each.double().abs_().log_().sub_(log_c) for each in (a, b))
    greater = _greater(grown, learned)
    share = grown.div_(greater).mul_(learned).div_(greater).neg_().clamp_(min=0.0).mul_(alpha)
    result = learned.mul_(share).exp_().mul_(a)
    result.mul_(share.mul_(math.pi).cos_().masked_fill_((b < 0) == (c < 0), 1.0))
    no_ratio = (a == 0) | (b == 0) | (c == 0)
    return torch.where(no_ratio, a, result.float(), out=out)


@operation(
    "mix three models",
    "c + |a − c|^(1 − alpha)·|b − c|^alpha, with the sign of (1 − beta)·(a − c) + beta·(b − c)",
    fold=lambda alpha, beta: {(0.0, 0.0): "a", (1.0, 1.0): "b"}.get((alpha, beta)),
    also=("multiply_difference (meh)",),
)
def multiply_difference(
    a: Weight, b: Weight, c: Weight, *, alpha: PerBlock = 0.5, beta: PerBlock = 0.5, out: Out = None
) -> Weight:
    """What a and b both learned since c: the geometric mean of their changes, nothing where one did not change.

    meh's multiply_difference. Alpha is b's share of the change's size, beta b's say in its direction;
    where that is 0 for changes that cancel, the size is added.
    """
    learned = torch.sub(b, c, out=out)
    changed = torch.sub(a, c)
    direction = torch.lerp(changed, learned, beta).add_(0.0)  # -0 becomes 0: no change has no sign
    size = changed.abs_().pow_(1.0 - alpha).mul_(learned.abs_().pow_(alpha))
    return torch.add(c, size.copysign_(direction), out=learned)


@operation(
    "mix three models",
    "c + d·‖s‖/‖d‖, d = √((1 − alpha)·(a − c)² + alpha·(b − c)²) with the sign of s, s = (1 − alpha)·a + alpha·b − c",
    by="tensor",
    fold=lambda alpha: {0.0: "a", 1.0: "b"}.get(alpha),
    also=("euclidean_add_difference (meh)",),
)
def euclidean_add_difference(a: Weight, b: Weight, c: Weight, *, alpha: PerBlock = 0.5, out: Out = None) -> Weight:
    """What a or b learned since c: the root of their mean square change, as long as their weighted sum; per tensor.

    meh's euclidean_add_difference, which first divides each change by its norm; here each
    counts by its size. Changes that cancel in the weighted sum s are kept in d. Outside of alpha 0 to 1
    a negative sum of squares is 0.
    """
    changed, learned = torch.sub(a, c), torch.sub(b, c)
    blend = torch.lerp(changed, learned, alpha)
    greater = _greater(changed, learned)
    size = changed.div_(greater).square_().mul_(1.0 - alpha).add_(learned.div_(greater).square_(), alpha=alpha)
    size = size.clamp_(min=0.0).sqrt_().mul_(greater).copysign_(blend)
    length = norm(size)
    return torch.add(c, size, alpha=norm(blend) / length if length else 0.0, out=out)


@operation(
    "mix three models",
    "a + ((1 − alpha)·(b − a) + alpha·(c − a))·((1 − beta)·d + beta·(1 − d)), d = ((cos(b − a, c − a) + 1)/2)^gamma",
    by="row",
    fold=lambda alpha, beta, gamma: (
        None if gamma else "a" if beta == 1 else {0.0: "b", 1.0: "c"}.get(alpha) if beta == 0 else None
    ),
    also=("extract (supermerger)",),
)
def similar_features(
    a: Weight,
    b: Weight,
    c: Weight,
    *,
    alpha: PerBlock = 0.5,
    beta: PerBlock = 0.0,
    gamma: Positive = 0.3,
    out: Out = None,
) -> Weight:
    """What b and c learned alike since a (beta 0), or unlike (beta 1), added to a; alpha goes from b to c.

    supermerger's extract. d is how alike b − a and c − a are along the last dim: from 0 (opposite) to
    1 (the same direction); the greater gamma, the more alike they must be. The cosine with a change of
    zero is 0.
    """
    result = torch.empty(a.shape, device=a.device)
    if not a.numel():
        return result
    length = a.shape[-1] if a.ndim else 1
    rows = (torch.split(each.reshape(-1, length), max(1, PIECE // length)) for each in (a, b, c, result))
    for origin, x, y, piece in zip(*rows, strict=True):
        start = origin.double()
        first, second = x.double() - start, y.double() - start
        squares = torch.linalg.vecdot(first, first) * torch.linalg.vecdot(second, second)
        cosine = torch.where(squares == 0, 0.0, torch.linalg.vecdot(first, second) / squares.sqrt())
        alike = ((cosine.clamp(-1.0, 1.0) + 1.0) / 2.0).pow(gamma).unsqueeze(1)
        piece.copy_(start + torch.lerp(first, second, alpha) * torch.lerp(alike, 1.0 - alike, beta))
    return result


def _greater(x: Tensor, y: Tensor) -> Tensor:
    """The greater of two magnitudes, as a divisor: never 0."""
    greater = x.abs()
    return torch.maximum(greater, y.abs(), out=greater).clamp_(min=SMALLEST)
