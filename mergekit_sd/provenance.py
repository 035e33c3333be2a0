"""Where a merged file came from: its recipe out of its metadata, and whether that makes it again.

Owns `recover` (our own recipe, A1111's and supermerger's records) and `verify`. Must not know
how a recipe is planned or run beyond the public steps.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_sd.errors import InputError
from mergekit_sd.events import CancelToken, Listener, ignore
from mergekit_sd.execute.run import RunOptions, compare
from mergekit_sd.formats.open import open_model
from mergekit_sd.formats.tensor import ModelFile
from mergekit_sd.plan.build import PlanOptions, build_plan
from mergekit_sd.plan.metadata import RECIPE_KEY
from mergekit_sd.plan.values import MetadataStyle
from mergekit_sd.recipe.load import recipe_from_data
from mergekit_sd.text import shown

A1111_METHODS = {"Weighted sum": "weighted_sum", "Add difference": "add_difference"}
SUPERMERGER_MODES = {"Weight": "weighted_sum", "Add": "add_difference", "Triple": "triple_sum", "Twice": "sum_twice"}
SLOTS = ("a", "b", "c")
UNET_BLOCKS = [f"IN{i:02}" for i in range(12)] + ["M00"] + [f"OUT{i:02}" for i in range(12)]
SDXL_BLOCKS = [f"IN{i:02}" for i in range(9)] + ["M00"] + [f"OUT{i:02}" for i in range(9)]


class NoRecipe(InputError):
    """The file's metadata holds no recipe that can be understood."""


@dataclass(frozen=True)
class Recovered:
    """A recipe found in a file: as plain data, and what a reader should know.

    `source`: "mergekit-sd", "a1111" or "supermerger". `content`: each model's content hash, where
    the record has it.
    """

    source: str
    data: dict[str, Any]
    content: Mapping[str, str]
    notes: tuple[str, ...]


def recover(path: str | Path) -> Recovered:
    """The recipe in a file's metadata. Raises NoRecipe where there is none."""
    file = open_model(Path(path))
    if RECIPE_KEY in file.metadata:
        return _ours(file)
    if "sd_merge_recipe" in file.metadata:
        record = _object(file, "sd_merge_recipe")
        models = _object(file, "sd_merge_models") if "sd_merge_models" in file.metadata else {}
        return _supermerger(file, record) if "supermerger" in str(record.get("type")) else _a1111(file, record, models)
    raise NoRecipe(
        "Its metadata holds no recipe.", file=file.path, hint="only files that a merge tool labelled can be recovered"
    )


@dataclass(frozen=True)
class Verification:
    """Whether a file is what its recipe makes. `different`: the names of the tensors that differ."""

    path: str
    same: bool
    different: tuple[str, ...]
    inputs: Mapping[str, str]


def verify(
    path: str | Path,
    *,
    models: str | Path | None = None,
    threads: int | None = None,
    on_event: Listener = ignore,
    cancel: CancelToken | None = None,
) -> Verification:
    """Make a file again from the recipe in it, and compare byte by byte; nothing is written.

    Its inputs are looked for in the folder `models`, beside the file and under the roots. Raises
    PinMismatch where an input is not the one that was used, MissingInput where it is not found.
    """
    found = recover(path)
    if found.source != "mergekit-sd":
        raise NoRecipe("Only files that mergekit-sd made can be verified.", file=path)
    file = open_model(Path(path))
    folder = Path(path).parent
    search = (Path(models), folder) if models else (folder,)
    style: MetadataStyle = "webui" if "sd_merge_recipe" in file.metadata else "full"
    plan = build_plan(
        recipe_from_data(found.data, folder=folder), PlanOptions(anywhere=True, metadata=style, search=search)
    )
    options = RunOptions(threads=threads, allow_nonfinite=True, expected_inputs=found.content)
    different = compare(plan, Path(path), options, on_event, cancel)
    inputs = {source.name: str(source.file.path) for source in plan.inputs}
    return Verification(str(path), not different, different, inputs)


def _object(file: ModelFile, key: str) -> dict[str, Any]:
    try:
        value = json.loads(file.metadata[key])
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise NoRecipe("The recipe in its metadata is damaged.", file=file.path, key=key)
    return value


def _ours(file: ModelFile) -> Recovered:
    data = _object(file, RECIPE_KEY)
    try:
        models = {name: dict(entry) for name, entry in data["models"].items()}
        outputs = {name: {**entry, "file": file.path.name} for name, entry in data["outputs"].items()}
    except (KeyError, AttributeError, TypeError, ValueError):
        raise NoRecipe("The recipe in its metadata is damaged.", file=file.path, key=RECIPE_KEY) from None
    content = {name: str(entry.pop("content", "")) for name, entry in models.items()}
    if "date" in data:
        data["date"] = datetime.date.fromisoformat(str(data["date"]))
    return Recovered("mergekit-sd", {**data, "models": models, "outputs": outputs}, content, ())


def _a1111(file: ModelFile, record: dict[str, Any], models: dict[str, Any]) -> Recovered:
    method = record.get("interp_method")
    hashes = [record.get(f"{place}_model_hash") for place in ("primary", "secondary", "tertiary")]
    count = {"No interpolation": 1, "Weighted sum": 2, "Add difference": 3}.get(str(method))
    if count is None or not all(hashes[:count]):
        raise NoRecipe(
            f'Its record is of a merge that has no counterpart here: "{shown(str(method))}".',
            file=file.path,
            hint="`mergekit-sd inspect` shows the record",
        )
    notes = []
    used: dict[str, Any] = {}
    for slot, digest in zip(SLOTS[:count], map(str, hashes), strict=False):
        known = models.get(digest)
        name = known.get("name") if isinstance(known, dict) else None
        used[slot] = {"file": str(name or f"{digest[:10]}.safetensors"), "sha256": digest}
    output: dict[str, Any] = {"model": "a" if count == 1 else "merge", "file": file.path.name}
    if not record.get("save_as_half"):
        output["dtype"] = "keep"
    if record.get("bake_in_vae") not in (None, "None", ""):
        used["vae"] = {"file": str(record["bake_in_vae"])}
        output["vae"] = "vae"
    if record.get("discard_weights"):
        notes.append(f"A1111 discarded weights by {shown(repr(record['discard_weights']))}; the recipe does not")
    data: dict[str, Any] = {"recipe": 1, "title": str(record.get("custom_name") or file.path.stem), "models": used}
    if count > 1:
        operands = {slot: slot for slot in SLOTS[:count]}
        step = {"op": A1111_METHODS[str(method)], **operands, "alpha": record.get("multiplier", 0.5)}
        data["steps"] = {"merge": step | _extrapolation(step["alpha"])}
    return Recovered("a1111", data | {"outputs": {"output": output}}, {}, tuple(notes))


def _supermerger(file: ModelFile, record: dict[str, Any]) -> Recovered:
    mode = str(record.get("mode", "")).split("(")[0].strip()
    calculation = str(record.get("calcmode", "normal"))
    if mode not in SUPERMERGER_MODES or calculation != "normal" or record.get("elemental_merge"):
        what = f"mode {mode}, calculation {calculation}" + (", elemental" if record.get("elemental_merge") else "")
        raise NoRecipe(
            f"Its record is of a supermerger merge that has no counterpart here yet: {shown(what)}.",
            file=file.path,
            hint="`mergekit-sd inspect` shows the record",
        )
    count = 2 if mode == "Weight" else 3
    names = {slot: str(record.get(f"model_{slot}", "")) for slot in SLOTS[:count]}
    step: dict[str, Any] = {"op": SUPERMERGER_MODES[mode], **{slot: slot for slot in names}}
    step["alpha"] = _supermerger_weights(file, record, "alpha")
    if mode in ("Triple", "Twice"):
        step["beta"] = _supermerger_weights(file, record, "beta")
    models = {slot: {"file": name.split(" [")[0]} for slot, name in names.items()}
    data = {
        "recipe": 1,
        "title": str(record.get("custom_name") or file.path.stem),
        "models": models,
        "steps": {"merge": step},
        "outputs": {"output": {"model": "merge", "file": file.path.name}},
    }
    return Recovered("supermerger", data, {}, ("supermerger also adds tensors found only in B; the recipe does not",))


def _supermerger_weights(file: ModelFile, record: dict[str, Any], which: str) -> Any:
    """A number, or a table of blocks: 25 for SD1; for SDXL 19 and a slot for the VAE."""
    base = float(record.get(f"base_{which}", 0.5))
    if not record.get("mbw"):
        return base
    try:
        numbers = [float(part) for part in str(record.get(f"weights_{which}")).split(",")]
    except ValueError:
        numbers = []
    if len(numbers) == len(UNET_BLOCKS):
        return {"base": base, **dict(zip(UNET_BLOCKS, numbers, strict=True))}
    if len(numbers) == len(SDXL_BLOCKS) + 1:
        return {"base": base, **dict(zip(SDXL_BLOCKS, numbers[:-1], strict=True)), "vae": numbers[-1]}
    raise NoRecipe(f"Its record has {len(numbers)} block weights for {which}.", file=file.path)


def _extrapolation(alpha: Any) -> dict[str, bool]:
    return {} if isinstance(alpha, int | float) and 0 <= alpha <= 1 else {"extrapolate": True}
