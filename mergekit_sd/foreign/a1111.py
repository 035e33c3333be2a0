"""A1111's record of a merge, which its own merger and other tools write."""

from __future__ import annotations

from typing import Any

from mergekit_sd.foreign.records import NO_COUNTERPART, SLOTS, Recovered, models_said, portable, recipe_of, refused
from mergekit_sd.formats.tensor import ModelFile
from mergekit_sd.text import shown

A1111_METHODS = {
    "No interpolation": (None, 1),
    "Weighted sum": ("weighted_sum", 2),
    "Add difference": ("add_difference", 3),
}


def read_a1111(file: ModelFile, record: dict[str, Any], known: dict[str, Any]) -> Recovered:
    """The recipe that A1111's record tells of. Raises NoRecipe."""
    method = str(record.get("interp_method"))
    if method not in A1111_METHODS:
        raise refused(file, f'{NO_COUNTERPART}"{shown(method)}".')
    operation, number = A1111_METHODS[method]
    places = ("primary_model_hash", "secondary_model_hash", "tertiary_model_hash")
    models = models_said(file, known, [record.get(place) for place in places[:number]])
    output: dict[str, Any] = {"model": "merge" if operation else "a"}
    if not record.get("save_as_half"):
        output["dtype"] = "keep"
    if record.get("bake_in_vae") not in (None, "None", ""):
        models["vae"] = {"file": portable(str(record["bake_in_vae"]))}
        output["vae"] = "vae"
    alpha = record.get("multiplier")
    step: dict[str, Any] = {"op": operation, **{slot: slot for slot in SLOTS[:number]}, "alpha": alpha}
    if isinstance(alpha, int | float) and not 0 <= alpha <= 1:
        step["extrapolate"] = True
    left_out = record.get("discard_weights")
    notes = (f"the WebUI left out weights that match {shown(repr(left_out))}; the recipe does not",) if left_out else ()
    data = recipe_of(file, record, models, {"merge": step} if operation else {}, output)
    return Recovered("a1111", data, {}, notes)
