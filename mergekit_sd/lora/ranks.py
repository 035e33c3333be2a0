"""How many singular values a change keeps: rules for one matrix, and a size shared out over all.

Owns the arithmetic over singular values. Must not know of matrices, modules or files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from mergekit_sd.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Values: TypeAlias = "NDArray[np.float64]"
    Bounds: TypeAlias = tuple[int, int]

# Of an energy that float32 arithmetic summed up, this share is uncertain.
UNCERTAIN = 1e-6


@dataclass(frozen=True, slots=True)
class Spectrum:
    """The greatest singular values of a matrix, float64, descending.

    `energy` is the sum of the squares of all `size` of them, also of those not in `values`.
    """

    values: Values
    energy: float
    size: int

    @property
    def complete(self) -> bool:
        """Whether no value is missing."""
        return len(self.values) == self.size

    def tails(self) -> Values:
        """What each rank from 0 to the number of known values leaves out: the sum of the squares of the rest."""
        import numpy as np

        squares = np.square(self.values)
        rest = 0.0 if self.complete else max(0.0, self.energy - float(squares.sum()))
        # From the small end: energy − cumsum would leave rounding of the large ones.
        return rest + np.append(np.cumsum(squares[::-1])[::-1], 0.0)


# --- rules: bounds for the rank, equal where the known values decide ------------------------------------


def fixed(_: Spectrum, rank: float) -> Bounds:
    """The given rank."""
    return int(rank), int(rank)


def threshold(spectrum: Spectrum, least: float) -> Bounds:
    """#(S > least): the values above an absolute size."""
    count = int((spectrum.values > least).sum())
    undecided = count == len(spectrum.values) and not spectrum.complete
    return count, spectrum.size if undecided else count


def ratio(spectrum: Spectrum, share: float) -> Bounds:
    """#(S > share·S₀): the values above a share of the greatest."""
    return threshold(spectrum, share * _greatest(spectrum))


def sv_ratio(spectrum: Spectrum, divisor: float) -> Bounds:
    """#(S > S₀/divisor), as kohya's resize has it."""
    return threshold(spectrum, _greatest(spectrum) / divisor)


def quantile(spectrum: Spectrum, share: float) -> Bounds:
    """#(cumsum S < share·ΣS), as LyCORIS has it: one less than `sv_cumulative`."""
    return _below_sum(spectrum, share)


def sv_cumulative(spectrum: Spectrum, share: float) -> Bounds:
    """The least rank with cumsum S ≥ share·ΣS, as kohya's resize has it."""
    low, high = _below_sum(spectrum, share)
    return low + 1, high + 1


def norm_share(spectrum: Spectrum, share: float) -> Bounds:
    """The least rank with ‖kept‖ ≥ share·‖all‖ (Frobenius), that is cumsum S² ≥ share²·ΣS²; kohya's sv_fro."""
    return _leaving(spectrum, 1.0 - share * share)


def error(spectrum: Spectrum, most: float) -> Bounds:
    """The least rank with ‖all − kept‖ ≤ most·‖all‖ (Frobenius)."""
    return _leaving(spectrum, most * most)


def _greatest(spectrum: Spectrum) -> float:
    return float(spectrum.values[0]) if len(spectrum.values) else 0.0


def _leaving(spectrum: Spectrum, share: float) -> Bounds:
    """The least rank that leaves out no more than `share` of the energy."""
    import numpy as np

    if not spectrum.complete and share < UNCERTAIN:
        return 0, spectrum.size
    enough = np.flatnonzero(spectrum.tails() <= share * spectrum.energy)
    # Rounding of a complete spectrum's energy can make the last tail, 0, exceed a share of 0 of it.
    return (int(enough[0]), int(enough[0])) if len(enough) else (len(spectrum.values) + 1, spectrum.size)


def _below_sum(spectrum: Spectrum, share: float) -> Bounds:
    """#(cumsum S < share·ΣS), of a sum that is known within bounds where values are missing.

    Missing values are at most the last known one and have a known energy: their sum is least where
    they are as large as can be, and most where they are equal.
    """
    import numpy as np

    sums = np.cumsum(spectrum.values)
    missing = spectrum.size - len(sums)
    rest = max(0.0, spectrum.energy - float(np.square(spectrum.values).sum())) if missing else 0.0
    known = float(sums[-1]) if len(sums) else 0.0
    last = float(spectrum.values[-1]) if len(sums) else 0.0
    least = known + (rest / last if last else 0.0)
    most = known + (rest * missing) ** 0.5
    low, high = (int((sums < share * total).sum()) for total in (least, most))
    return low, spectrum.size if high == len(sums) and missing else high


RULES: Mapping[str, Callable[[Spectrum, float], Bounds]] = {
    "fixed": fixed,
    "threshold": threshold,
    "ratio": ratio,
    "quantile": quantile,
    "norm": norm_share,
    "error": error,
    "sv_ratio": sv_ratio,
    "sv_cumulative": sv_cumulative,
    "sv_fro": norm_share,
}
# The rules whose number is not a share.
_AT_LEAST_ONE = ("fixed", "sv_ratio")
_ANY_SIZE = (*_AT_LEAST_ONE, "threshold")


@dataclass(frozen=True, slots=True)
class Rule:
    """One of `RULES` with its number, and the greatest rank allowed (None: any). At least rank 1 is kept.

    Raises `UsageError` for an unknown rule and for a number that the rule cannot mean.
    """

    kind: str
    amount: float
    most: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in RULES:
            raise UsageError(f"There is no rank rule {self.kind!r}.", hint=f"The rules are {', '.join(RULES)}.")
        least = 1.0 if self.kind in _AT_LEAST_ONE else 0.0
        greatest = float("inf") if self.kind in _ANY_SIZE else 1.0
        whole = self.kind != "fixed" or float(self.amount).is_integer()
        if not (least <= self.amount <= greatest and self.amount < float("inf") and whole):
            wanted = "a whole number from 1" if self.kind == "fixed" else f"from {least:g} to {greatest:g}"
            raise UsageError(f"The rank rule {self.kind} cannot be {self.amount:g}: it is {wanted}.")
        if self.most is not None and self.most < 1:
            raise UsageError(f"The greatest rank cannot be {self.most}: it is a whole number from 1.")

    def limit(self, size: int) -> int:
        """The greatest rank that the rule can give a matrix with `size` singular values."""
        most = min(size, self.most or size)
        return min(most, int(self.amount)) if self.kind == "fixed" else most

    def rank(self, spectrum: Spectrum) -> int | None:
        """The rank, 1 to `limit`; None where the answer depends on values that the spectrum does not have."""
        most = self.limit(spectrum.size)
        low, high = (min(max(bound, 1), most) for bound in RULES[self.kind](spectrum, self.amount))
        return low if low == high else None


# --- a size for all ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Candidate:
    """A module that may get a share of the size: its singular values, descending, and the bytes of one rank.

    `cost` is (rows + columns) · itemsize; `once`: what it takes besides if it has any rank.
    """

    values: Values
    cost: int
    once: int = 0


def share_out(size: int, modules: Sequence[Candidate]) -> list[int]:
    """The rank of each module, so that all together cost no more than `size` bytes; 0 leaves a module out.

    The rank r of a module gains S_r² of energy for `cost` bytes; the ranks go in the order of gain
    per byte, and a module whose next rank no longer fits gets no more. As singular values fall, this
    is the best of all ways to spend what is spent up to the first rank that does not fit; in all, the
    gain is short of the best by less than that rank's (Dantzig, "Discrete-variable extremum problems",
    1957). What a module takes once is paid with its first rank, and is too little to change the order. Of equal gains
    per byte the module named first has precedence. Values of 0 are not bought.
    """
    import numpy as np

    ranks = [0] * len(modules)
    if not modules:
        return ranks
    owner = np.repeat(np.arange(len(modules)), [len(each.values) for each in modules])
    # Singular values per root of a byte: their squares might not fit a float64.
    gain = np.concatenate([each.values / each.cost**0.5 for each in modules])
    closed = set()
    # Stable: a module's ranks stay in their order where their values are equal.
    for index in np.argsort(-gain, kind="stable"):
        which = int(owner[index])
        if gain[index] <= 0 or which in closed:
            continue
        cost = modules[which].cost + (0 if ranks[which] else modules[which].once)
        if cost > size:
            closed.add(which)
            continue
        size -= cost
        ranks[which] += 1
    return ranks
