"""Plans of what is sampled: any model, step or output of a recipe, as if it were written.

Owns what an output that no recipe names is like. Must not know networks or pictures.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergekit_sd.planning.build import PlanOptions, build_plan
from mergekit_sd.planning.values import Plan
from mergekit_sd.recipe.graph import IN_WORDS, spaces
from mergekit_sd.recipe.load import Recipe, recipe_from_data
from mergekit_sd.recipe.loras import LoraUse
from mergekit_sd.text import did_you_mean, shown


def plan_sampled(
    recipe: Recipe,
    names: Sequence[str],
    options: PlanOptions | None = None,
    *,
    vae: str | Path | None = None,
    loras: Sequence[tuple[LoraUse, Path | None]] = (),
    written: Mapping[str, Path] | None = None,
) -> dict[str, Plan]:
    """A plan with one output for each name; they share their inputs and what is found of whole models.

    An output is planned as its file would be made (an output before a step of its name); a step is not
    rounded, a model is taken as it is. `vae`: a file whose VAE all of them get instead of their own. `loras`: are
    injected into each, last of all; the path is None for one that is a model of the recipe. `written`: outputs that
    are read from their files, not computed again.

    Of `options`, `search` and `find` count. Raises RecipeError for a name that is not there or is no model,
    and all that planning raises.
    """
    space = spaces(recipe)
    for name in names:
        if name not in recipe.outputs and name not in space:
            known = [*recipe.models, *recipe.steps, *recipe.outputs]
            raise recipe.error(f'There is no model, step or output "{shown(name)}".', hint=did_you_mean(name, known))
        if name not in recipe.outputs and space[name] != "weight":
            path = ("steps", name)
            raise recipe.error(f'"{shown(name)}" is {IN_WORDS[space[name]]}, which makes no pictures.', path)
    asked = recipe_from_data(
        _as_outputs(recipe, names, vae, loras, written or {}),
        folder=recipe.folder,
        path=recipe.path,
        positions=recipe.positions,
    )
    wanted = tuple(dict.fromkeys(names))
    options = replace(options or PlanOptions(), anywhere=True, metadata="none", output_root=None, outputs=wanted)
    plan = build_plan(asked, options)
    return {output.name: replace(plan, outputs=(output,)) for output in plan.outputs}


def _as_outputs(
    recipe: Recipe,
    names: Sequence[str],
    vae: str | Path | None,
    loras: Sequence[tuple[LoraUse, Path | None]],
    written: Mapping[str, Path],
) -> dict[str, Any]:
    """The recipe's data with an output for every name, and nothing that nobody asked for."""
    data = {key: value for key, value in recipe.data.items() if key != "samples"}
    outputs = {name: _entry(recipe, name, number) for number, name in enumerate(dict.fromkeys(names))}
    for name in outputs.keys() & written.keys():
        file = _free(f"{name} as written", {*data["models"], *data.get("steps", {})})
        data = {**data, "models": {**data["models"], file: str(written[name].absolute())}}
        outputs[name] = {"model": file, "dtype": "keep", "file": outputs[name]["file"]}
    if vae is not None:
        data, outputs = _with_vae(data, outputs, Path(vae).absolute())
    if loras:
        data, outputs = _with_loras(data, outputs, loras)
    return {**data, "outputs": outputs}


def _entry(recipe: Recipe, name: str, number: int) -> dict[str, Any]:
    unwritten = {"file": f"{number}.not-written"}  # the recipe's own file may be one that is read: here it harms none
    if name in recipe.outputs:
        return {**recipe.data["outputs"][name], **unwritten}
    return {"model": name, "dtype": "keep" if name in recipe.models else "fp32", **unwritten}


def _with_vae(
    data: Mapping[str, Any], outputs: Mapping[str, Mapping[str, Any]], vae: Path
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The VAE as a step in front of each output: a step gives one to a model that has none, a baked one would not."""
    steps, made = dict(data.get("steps", {})), {}
    file = _free("vae", {*data["models"], *steps})
    for name, entry in outputs.items():
        step = _free(f"{name} with {vae.name}", {*data["models"], *steps})
        steps[step] = {"op": "replace", "a": entry["model"], "b": file, "component": "vae"}
        made[name] = {key: value for key, value in entry.items() if key != "vae"} | {"model": step}
    return {**data, "models": {**data["models"], file: str(vae)}, "steps": steps}, made


def _with_loras(
    data: Mapping[str, Any], outputs: Mapping[str, Mapping[str, Any]], loras: Sequence[tuple[LoraUse, Path | None]]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The LoRAs as one step in front of each output."""
    models, steps, entries = dict(data["models"]), dict(data.get("steps", {})), []
    for use, path in loras:
        name = use.lora
        if path is not None:
            name = _free(use.lora, {*models, *steps})
            models[name] = str(path.absolute())
        entries.append({"lora": name, **use.describe(), "text_encoder": use.text_encoder})
    made = {}
    for name, entry in outputs.items():
        step = _free(f"{name} with LoRA", {*models, *steps})
        steps[step] = {"op": "inject_lora", "model": entry["model"], "loras": entries}
        made[name] = {**entry, "model": step}
    return {**data, "models": models, "steps": steps}, made


def _free(wanted: str, taken: Collection[str]) -> str:
    plain = "".join(c if c.isprintable() else "_" for c in wanted)
    return next(name for n in range(len(taken) + 1) if (name := plain + "'" * n) not in taken)
