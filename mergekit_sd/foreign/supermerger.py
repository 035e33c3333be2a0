"""supermerger's record of a merge: which operation each of its modes and calculations is here.

Its fields are those that supermerger's `mergers.py` writes. What stays as in A in spite of a mode's
weights is said in the weights where the operation has a number for it, else in a second step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mergekit_sd.foreign.records import NO_COUNTERPART, SLOTS, Recovered, models_said, recipe_of, refused
from mergekit_sd.foreign.supermerger_weights import (
    BlockNumbers,
    Merge,
    as_table,
    block_weights,
    elemental,
    included,
    left_alone,
    number_in,
    two_elements,
)
from mergekit_sd.formats.tensor import ModelFile
from mergekit_sd.text import shown


@dataclass(frozen=True)
class _Mode:
    """What one of supermerger's modes is here.

    `weights`: the parameters that have block weights there. `alone`: the number with which a tensor
    stays as it is in A; None where no number does that. `skips`: whether it leaves out the tensors
    in SKIPPED. `merges`: the merge modes it goes with.
    """

    operation: str
    models: int
    weights: tuple[str, ...] = ("alpha",)
    settings: Mapping[str, Any] = field(default_factory=dict)
    alone: float | None = 0.0
    skips: bool = False
    merges: tuple[str, ...] = ("Add", "Triple", "Twice", "Weight")
    note: str = ""


# "Weight sum", "Add difference", "Triple sum", "sum Twice", with or without a formula: told by one word, in this order.
MERGES = {
    "Add": _Mode("add_difference", 3),
    "Triple": _Mode("triple_sum", 3, ("alpha", "beta")),
    "Twice": _Mode("sum_twice", 3, ("alpha", "beta")),
    "Weight": _Mode("weighted_sum", 2),
}
_NOT_ADD = ("Triple", "Twice", "Weight")  # with "Add" these would take B − C for B
_TENSOR = _Mode("tensor_sum", 2, ("alpha", "beta"), merges=_NOT_ADD)
CALCULATIONS = {
    "cosineA": _Mode("cosine_a", 2, alone=None, merges=_NOT_ADD),
    "cosineB": _Mode("cosine_b", 2, alone=None, merges=_NOT_ADD),
    "trainDifference": _Mode("train_difference", 3),
    "smoothAdd": _Mode("smooth_add", 3, merges=("Add",)),
    "smoothAdd MT": _Mode("smooth_add", 3, merges=("Add",)),
    "extract": _Mode(
        "similar_features",
        3,
        settings={"gamma": 0.3},
        alone=None,
        note="supermerger does not record extract's option (gamma); the recipe has 0.3, its default",
    ),
    "tensor": replace(_TENSOR, settings={"dim": 0}),
    "tensor2": replace(_TENSOR, settings={"dim": 1}),
    "self": _Mode("scale", 1, alone=1.0, skips=True),
    "plus random": _Mode(
        "random_noise",
        1,
        skips=True,
        note="supermerger does not record the seed of plus random; the recipe draws other numbers",
    ),
}
NOTES = (
    "supermerger also adds tensors found only in B; the recipe does not",
    "supermerger records neither Adjust nor a baked VAE; if there was one, add it",
)


def read_supermerger(file: ModelFile, record: dict[str, Any], known: dict[str, Any]) -> Recovered:
    """The recipe that supermerger's record tells of. Raises NoRecipe."""
    mode = _mode(file, record)
    merge = Merge.of(file, record)
    models = models_said(file, known, [record.get(f"model_{slot}") for slot in SLOTS[: mode.models]])
    rules = elemental(merge)
    weights = {which: block_weights(merge, which) for which in mode.weights}
    weights["alpha"] = replace(weights["alpha"], rules=rules)
    if mode.operation == "scale":  # self leaves alone what has 0
        weights["alpha"] = weights["alpha"].without_zeros()
    step: dict[str, Any] = {"op": mode.operation, **{slot: slot for slot in models}}
    step |= {which: each.written(merge) for which, each in weights.items()} | dict(mode.settings)
    if mode.operation == "similar_features":
        step["beta"] = number_in(merge, "base_beta")
    if any(each.is_beyond() for each in weights.values()):
        step["extrapolate"] = True
    steps = {"merge": step}
    left, kept = left_alone(merge, skips=mode.skips), included(merge)
    if kept or (left and mode.alone is None):
        table = as_table((kept or BlockNumbers(1.0)).written(merge)) | dict.fromkeys(left, 0.0)
        steps["kept"] = {"op": "weighted_sum", "a": "a", "b": "merge", "alpha": table}
    elif left:
        for which in weights:
            step[which] = as_table(step[which]) | dict.fromkeys(left, mode.alone)
    notes = [*NOTES, mode.note, *_notes(merge, weights)]
    data = recipe_of(file, record, models, steps, {"model": list(steps)[-1]})
    return Recovered("supermerger", data, {}, tuple(filter(None, notes)))


def _notes(merge: Merge, weights: Mapping[str, BlockNumbers]) -> Iterator[str]:
    """What is to be said of this record's weights."""
    if merge.xl and any(rule.names_shifted for rule in weights["alpha"].rules):
        yield "supermerger's elemental rules call SDXL's blocks by SD1's names; the recipe has their own"
    if not merge.recent and any(each.blocks and each.blocks[0] != each.blocks[-1] for each in weights.values()):
        yield "some versions of supermerger weigh time_embed as OUT11; the recipe weighs it as IN00"
    if two_elements(merge):
        yield "supermerger undoes Include or Exclude for a tensor that two of its elements name; the recipe does not"


def _mode(file: ModelFile, record: dict[str, Any]) -> _Mode:
    said, calculation = str(record.get("mode", "")), str(record.get("calcmode", "normal"))
    word = next((word for word in MERGES if word in said), None)
    mode = CALCULATIONS.get(calculation) if calculation != "normal" else MERGES.get(word or "")
    wrong = [f"mode {said}"] if word is None else []
    if calculation not in ("normal", *CALCULATIONS):
        wrong.append(f"calculation {calculation}")
    elif mode and word and word not in mode.merges:
        wrong.append(f"mode {said} with calculation {calculation}")
    if wrong or mode is None:
        raise refused(file, f"{NO_COUNTERPART}supermerger, {shown(', '.join(wrong))}.")
    return mode
