"""Where a merged file came from: its recipe out of its metadata, and whether that makes it again.

Owns `recover` (our own recipe, A1111's and supermerger's records) and `verify`. Must not know
how a recipe is planned or run beyond the public steps.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergekit_sd.errors import InputError, MissingInput, PinMismatch, RecipeError, UsageError
from mergekit_sd.events import CancelToken, Listener, ignore
from mergekit_sd.execute.run import RunOptions, compare
from mergekit_sd.formats.hashing import hash_file_tensors
from mergekit_sd.formats.open import open_model
from mergekit_sd.formats.tensor import ModelFile
from mergekit_sd.planning.build import PlanOptions, build_plan
from mergekit_sd.planning.metadata import RECIPE_KEY
from mergekit_sd.planning.values import MetadataStyle, Plan
from mergekit_sd.recipe.graph import order
from mergekit_sd.recipe.load import recipe_from_data
from mergekit_sd.text import shown

A1111_METHODS = {
    "No interpolation": (None, 1),
    "Weighted sum": ("weighted_sum", 2),
    "Add difference": ("add_difference", 3),
}
# supermerger's modes: "Weight sum", "Add difference", "Triple sum", "sum Twice", told by one word of each.
SUPERMERGER_MODES = {
    "Weight": ("weighted_sum", 2),
    "Add": ("add_difference", 3),
    "Triple": ("triple_sum", 3),
    "Twice": ("sum_twice", 3),
}
SLOTS = ("a", "b", "c")
UNET_BLOCKS = [f"IN{i:02}" for i in range(12)] + ["M00"] + [f"OUT{i:02}" for i in range(12)]
SDXL_BLOCKS = [f"IN{i:02}" for i in range(9)] + ["M00"] + [f"OUT{i:02}" for i in range(9)]
A1111_KEY, MODELS_KEY = "sd_merge_recipe", "sd_merge_models"
SUPERMERGER_NOTES = ("supermerger also adds tensors found only in B; the recipe does not",)
DAMAGED = "The recipe in its metadata is damaged."
NO_COUNTERPART = "Its record is of a merge that has no counterpart here: "
LOOK = "`mergekit-sd inspect` shows the record"
_SHA256 = re.compile("[0-9a-fA-F]{64}")


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
        return _checked(file, RECIPE_KEY, _ours(file))
    if A1111_KEY not in file.metadata:
        raise NoRecipe(
            "Its metadata holds no recipe.",
            file=file.path,
            hint="only files that a merge tool labelled can be recovered",
        )
    record = _object(file, A1111_KEY)
    known = _object(file, MODELS_KEY) if MODELS_KEY in file.metadata else {}
    read = _supermerger if "supermerger" in str(record.get("type")) else _a1111
    return _checked(file, A1111_KEY, read(file, record, known))


def _checked(file: ModelFile, key: str, found: Recovered) -> Recovered:
    """What was found as a recipe that is sound, said in the order in which it is done."""
    try:
        recipe = recipe_from_data(found.data, folder=file.path.parent)
        steps = order(recipe)
    except RecipeError as error:
        message = f"The recipe in its metadata cannot be used: {error.message}"
        raise NoRecipe(message, file=file.path, key=f"{key}: {error.key}" if error.key else key, hint=LOOK) from error
    if len(recipe.outputs) != 1:
        raise NoRecipe(DAMAGED, file=file.path, key=key, hint=LOOK)
    first_used = [name for step in steps for name in step.operands.values()]
    models = dict.fromkeys([*(name for name in first_used if name in recipe.models), *recipe.models])
    data = {**found.data, "models": {name: found.data["models"][name] for name in models}}
    if steps:
        data["steps"] = {step.name: found.data["steps"][step.name] for step in steps}
    return replace(found, data=data)


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
    plan = _plan_again(found, Path(path), Path(models) if models else None)
    options = RunOptions(threads=threads, allow_nonfinite=True)
    try:
        different = compare(plan, Path(path), options, on_event, cancel)
    except PinMismatch:
        _check_inputs(plan, found.content)
        raise
    if different:
        _check_inputs(plan, found.content)
    inputs = {source.name: str(source.file.path) for source in plan.inputs}
    return Verification(str(path), not different, different, inputs)


def _plan_again(found: Recovered, path: Path, models: Path | None) -> Plan:
    """The plan that a file's recipe makes; its metadata are of the style that the file has."""
    if models and not models.is_dir():
        raise UsageError("This is not a folder.", file=models, hint="name the folder that the models are in")
    style: MetadataStyle = "webui" if A1111_KEY in open_model(path).metadata else "full"
    search = (*([models] if models else []), path.parent)
    try:
        recipe = recipe_from_data(found.data, folder=path.parent)
        return build_plan(recipe, PlanOptions(anywhere=True, metadata=style, search=search))
    except MissingInput as error:
        hint = "name the folder that the models are in: --models DIR"
        raise MissingInput(error.message, file=error.file, key=error.key, hint=hint) from error


def _check_inputs(plan: Plan, content: Mapping[str, str]) -> None:
    """Once the bytes differ: is it because a model is not the one that was used? Raises PinMismatch."""
    used = plan.outputs[0].reads()
    for number, source in enumerate(plan.inputs):
        digest = hash_file_tensors(source.file, used.get(number, ()))
        if digest != content[source.name]:
            raise PinMismatch(
                f'"{source.name}" is not the model that was used: its content hash is {digest}, '
                f"not {content[source.name]}.",
                file=source.file.path,
                key=f"models.{source.name}",
                hint="name the folder that the right one is in: --models DIR",
            )


def _object(file: ModelFile, key: str) -> dict[str, Any]:
    try:
        value = json.loads(file.metadata[key])
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise NoRecipe(DAMAGED, file=file.path, key=key, hint=LOOK)
    return value


def _ours(file: ModelFile) -> Recovered:
    data = _object(file, RECIPE_KEY)
    try:
        models = {name: dict(entry) for name, entry in data["models"].items()}
        outputs = {name: {**entry, "file": file.path.name} for name, entry in data["outputs"].items()}
        if "date" in data:
            data["date"] = datetime.date.fromisoformat(str(data["date"]))
    except (KeyError, AttributeError, TypeError, ValueError):
        raise NoRecipe(DAMAGED, file=file.path, key=RECIPE_KEY, hint=LOOK) from None
    content = {name: str(entry.pop("content", "")) for name, entry in models.items()}
    return Recovered("mergekit-sd", {**data, "models": models, "outputs": outputs}, content, ())


def _a1111(file: ModelFile, record: dict[str, Any], known: dict[str, Any]) -> Recovered:
    method = str(record.get("interp_method"))
    if method not in A1111_METHODS:
        raise NoRecipe(f'{NO_COUNTERPART}"{shown(method)}".', file=file.path, key=A1111_KEY, hint=LOOK)
    operation, number = A1111_METHODS[method]
    places = ("primary_model_hash", "secondary_model_hash", "tertiary_model_hash")
    models = _models(file, known, [record.get(place) for place in places[:number]])
    output: dict[str, Any] = {"model": "merge" if operation else "a", "file": file.path.name}
    if not record.get("save_as_half"):
        output["dtype"] = "keep"
    if record.get("bake_in_vae") not in (None, "None", ""):
        models["vae"] = {"file": _portable(str(record["bake_in_vae"]))}
        output["vae"] = "vae"
    step = {"op": operation, **{slot: slot for slot in SLOTS[:number]}, "alpha": record.get("multiplier")}
    left_out = record.get("discard_weights")
    notes = (f"the WebUI left out weights that match {shown(repr(left_out))}; the recipe does not",) if left_out else ()
    return Recovered("a1111", _recipe(file, record, models, step if operation else None, output), {}, notes)


def _supermerger(file: ModelFile, record: dict[str, Any], known: dict[str, Any]) -> Recovered:
    mode = str(record.get("mode", ""))
    word = next((word for word in SUPERMERGER_MODES if word in mode), None)
    unknown = [f"mode {mode}"] if word is None else []
    if record.get("calcmode", "normal") != "normal":
        unknown.append(f"calculation {record['calcmode']}")
    if record.get("elemental_merge"):
        unknown.append("elemental merge")
    unknown += [f"{how} blocks" for how in ("Include", "Exclude") if any(record.get(how) or ())]
    if word is None or unknown:
        raise NoRecipe(
            f"{NO_COUNTERPART}supermerger, {shown(', '.join(unknown))}.", file=file.path, key=A1111_KEY, hint=LOOK
        )
    operation, number = SUPERMERGER_MODES[word]
    models = _models(file, known, [record.get(f"model_{slot}") for slot in SLOTS[:number]])
    step: dict[str, Any] = {"op": operation, **{slot: slot for slot in models}}
    for parameter in ("alpha", "beta") if word in ("Triple", "Twice") else ("alpha",):
        step[parameter] = _supermerger_weights(file, record, parameter)
    data = _recipe(file, record, models, step, {"model": "merge", "file": file.path.name})
    return Recovered("supermerger", data, {}, SUPERMERGER_NOTES)


def _recipe(
    file: ModelFile,
    record: dict[str, Any],
    models: dict[str, Any],
    step: dict[str, Any] | None,
    output: dict[str, Any],
) -> dict[str, Any]:
    title = str(record.get("custom_name") or file.path.stem)
    data: dict[str, Any] = {"recipe": 1, "title": title, "models": models}
    if step:
        if any(_beyond(step.get(parameter)) for parameter in ("alpha", "beta")):
            step["extrapolate"] = True
        data["steps"] = {"merge": step}
    return {**data, "outputs": {"output": output}}


def _models(file: ModelFile, known: dict[str, Any], said: list[Any]) -> dict[str, Any]:
    """What a record says of its models, by slot: a sha256 whose file the other record names, or a name."""
    models: dict[str, Any] = {}
    for slot, what in zip(SLOTS, said, strict=False):
        if not isinstance(what, str) or not what:
            raise NoRecipe(f"Its record does not say which file model {slot} was.", file=file.path, hint=LOOK)
        if not _SHA256.fullmatch(what):
            models[slot] = {"file": _portable(what.split(" [")[0])}
            continue
        entry = known.get(what)
        name = entry.get("name") if isinstance(entry, dict) else None
        models[slot] = {"file": _portable(str(name or f"{what[:10]}.safetensors")), "sha256": what.lower()}
    return models


def _portable(name: str) -> str:
    """A path as the WebUI on Windows writes it, with slashes."""
    return name.replace("\\", "/")


def _supermerger_weights(file: ModelFile, record: dict[str, Any], which: str) -> Any:
    """A number, or a table of blocks: 25 for SD1; for SDXL 19, and a slot for the VAE."""
    key = f"weights_{which}" if record.get("mbw") else f"base_{which}"
    said = record.get(key)
    try:
        base = float(record[f"base_{which}"])
        if not record.get("mbw"):
            return base
        numbers = [float(part) for part in (said if isinstance(said, list) else str(said).split(","))]
    except (KeyError, TypeError, ValueError):
        raise NoRecipe(f"Its record has no weights in {key}.", file=file.path, key=A1111_KEY, hint=LOOK) from None
    if len(numbers) == len(UNET_BLOCKS):
        return {"base": base, **dict(zip(UNET_BLOCKS, numbers, strict=True))}
    if len(numbers) in (len(SDXL_BLOCKS), len(SDXL_BLOCKS) + 1):
        blocks = dict(zip(SDXL_BLOCKS, numbers, strict=False))
        return {"base": base, **blocks, **({"vae": numbers[-1]} if len(numbers) > len(SDXL_BLOCKS) else {})}
    message = f"Its record has {len(numbers)} block weights in {key}; 25 were expected, for SDXL 19 or 20."
    raise NoRecipe(message, file=file.path, key=A1111_KEY, hint=LOOK)


def _beyond(weights: Any) -> bool:
    numbers = weights.values() if isinstance(weights, dict) else [weights]
    return any(isinstance(number, int | float) and not 0 <= number <= 1 for number in numbers)
