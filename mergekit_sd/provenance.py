"""Where a merged file came from: its recipe out of its metadata, and whether that makes it again.

Owns `recover` (our own recipe; other tools' records are read by `foreign`) and `verify`. Must not
know how a recipe is planned or run beyond the public steps.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mergekit_sd.errors import MissingInput, PinMismatch, RecipeError, UsageError
from mergekit_sd.events import CancelToken, Listener, ignore
from mergekit_sd.execute.run import RunOptions, compare
from mergekit_sd.foreign import A1111_KEY, DAMAGED, LOOK, NoRecipe, Recovered, metadata_object, read_record
from mergekit_sd.formats.hashing import hash_file_tensors
from mergekit_sd.formats.open import open_model
from mergekit_sd.formats.tensor import ModelFile
from mergekit_sd.library.finding import find_input
from mergekit_sd.planning.build import PlanOptions, build_plan
from mergekit_sd.planning.metadata import RECIPE_KEY
from mergekit_sd.planning.paths import Findings, Sought
from mergekit_sd.planning.values import MetadataStyle, Plan
from mergekit_sd.recipe.graph import order
from mergekit_sd.recipe.load import recipe_from_data


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
    return _checked(file, A1111_KEY, read_record(file))


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
        options = PlanOptions(anywhere=True, metadata=style, search=search, find=_called_so)
        return build_plan(recipe, options)
    except MissingInput as error:
        hint = "name the folder that the models are in: --models DIR"
        raise MissingInput(error.message, file=error.file, key=error.key, hint=hint, details=error.details) from error


def _called_so(sought: Sought) -> Findings:
    """Any file of that name in the library will do: its tensors are compared in the end."""
    found = find_input(sought)
    return Findings(found.same or found.named)


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


def _ours(file: ModelFile) -> Recovered:
    data = metadata_object(file, RECIPE_KEY)
    try:
        models = {name: dict(entry) for name, entry in data["models"].items()}
        outputs = {name: {**entry, "file": file.path.name} for name, entry in data["outputs"].items()}
        if "date" in data:
            data["date"] = datetime.date.fromisoformat(str(data["date"]))
    except (KeyError, AttributeError, TypeError, ValueError):
        raise NoRecipe(DAMAGED, file=file.path, key=RECIPE_KEY, hint=LOOK) from None
    content = {name: str(entry.pop("content", "")) for name, entry in models.items()}
    return Recovered("mergekit-sd", {**data, "models": models, "outputs": outputs}, content, ())
