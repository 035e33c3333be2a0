"""From a recipe to a plan: headers are read, every output tensor's place and making is known.

Owns the order of the checks. Must not read weights (but for a glance at VAEs), compute, or write.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mergekit_sd.architectures import detect
from mergekit_sd.formats.dtypes import OUTPUT_DTYPES, Dtype
from mergekit_sd.formats.hashing import FileHashes
from mergekit_sd.formats.header import Header, build_header
from mergekit_sd.formats.open import open_model
from mergekit_sd.formats.tensor import TensorInfo
from mergekit_sd.formats.writing import check_folder, check_target
from mergekit_sd.planning.expression import Constant, Expression, Read, reads_of
from mergekit_sd.planning.forms import form_output
from mergekit_sd.planning.metadata import build_metadata
from mergekit_sd.planning.models import Model, StepReport, model_of_file, with_markers
from mergekit_sd.planning.outputs import Draft, draft_tensors
from mergekit_sd.planning.paths import Finder, Findings, check_apart, check_new, resolve_inputs, resolve_outputs
from mergekit_sd.planning.planned import follow_step
from mergekit_sd.planning.prediction import file_prediction, output_prediction
from mergekit_sd.planning.vae import mixed_vaes
from mergekit_sd.planning.values import How, Input, Making, MetadataStyle, Plan, PlannedOutput, PlannedTensor
from mergekit_sd.recipe.graph import reachable
from mergekit_sd.recipe.load import OutputSpec, Recipe


@dataclass(frozen=True)
class PlanOptions:
    """What is said beside the recipe.

    `anywhere`: outputs may lie outside the allowed folders. `search`: folders in which a model that
    is not where the recipe says is looked for by its file's name; `find` looks for it elsewhere.
    """

    output_root: Path | None = None
    anywhere: bool = False
    metadata: MetadataStyle = "full"
    search: tuple[Path, ...] = ()
    outputs: tuple[str, ...] = ()
    """The outputs to make; empty: all of them."""
    find: Finder = lambda _: Findings()


def build_plan(recipe: Recipe, options: PlanOptions = PlanOptions()) -> Plan:
    """Plan the outputs of a recipe. Raises every error that can be told from headers alone."""
    names = list(options.outputs or recipe.outputs)
    if not names and not recipe.samples:
        raise recipe.error("There is nothing to make: the recipe has no [outputs].", (), hint="add [outputs.NAME]")
    used = reachable(recipe, names)
    paths, moved = resolve_inputs(recipe, used.models, options.search, options.find)
    targets = resolve_outputs(recipe, names, options.output_root, options.anywhere)
    check_apart(recipe, paths, targets)
    inputs = _open_inputs(paths)
    for each in inputs.values():
        for part in each.file.parts:
            check_apart(recipe, {each.name: part.path}, targets)
    models, steps, mixed = _follow_steps(recipe, used.steps, inputs)
    outputs = tuple(_plan_output(recipe, name, targets[name], models, inputs) for name in names)
    unbaked = reachable(recipe, [name for name in names if not recipe.outputs[name].vae]).steps
    noted = [note for step in steps for note in step.notes]
    warnings = (*recipe.warnings, *moved, *noted, *(text for step, text in mixed.items() if step in unbaked))
    plan = Plan(recipe, tuple(inputs.values()), tuple(steps), outputs, warnings, options.metadata)
    return replace(plan, outputs=tuple(place_output(plan, output, {}) for output in plan.outputs))


def check_targets(plan: Plan, force: bool) -> None:
    """The disk's side of a plan: nothing is overwritten unasked, the folders are there, the room suffices."""
    check_new({output.name: output.path for output in plan.outputs}, force)
    needed: dict[int, int] = {}  # by disk
    for output in plan.outputs:
        check_target(output.path)
        folder = output.path.resolve().parent
        disk = folder.stat().st_dev if folder.is_dir() else -1
        needed[disk] = needed.get(disk, 0) + output.size
        check_folder(folder, needed[disk])


def layout_output(
    plan: Plan, output: PlannedOutput, content: Mapping[int, str], files: Mapping[int, FileHashes]
) -> Header:
    """The output's header with the hashes known so far; its length does not depend on them."""
    entries = [(t.info.name, t.info.dtype, t.info.shape) for t in output.tensors]
    return build_header(entries, build_metadata(plan, output, content, files))


def _open_inputs(paths: Mapping[str, Path]) -> dict[str, Input]:
    opened: dict[Path, Input] = {}
    inputs = {}
    for name, path in paths.items():
        if path not in opened:
            file = open_model(path)
            layout = detect(file.tensors)
            opened[path] = Input(name, file, layout, file_prediction(file, layout))
        inputs[name] = replace(opened[path], name=name)
    return inputs


def _follow_steps(
    recipe: Recipe, steps: Sequence[str], inputs: Mapping[str, Input]
) -> tuple[dict[str, Model], list[StepReport], dict[str, str]]:
    """Every model and step by name; the steps' reports; a warning for each step that mixes VAEs."""
    models = {
        name: model_of_file(number, recipe.models[name], each.file, each.layout)
        for number, (name, each) in enumerate(inputs.items())
    }
    reports = []
    mixed: dict[str, str] = {}
    for name in steps:
        step = recipe.steps[name]
        operands = {label: models[source] for label, source in step.operands.items()}
        models[name], report = follow_step(step, operands, recipe.seed)
        reports.append(report)
        whole = [label for label, model in operands.items() if model.space == "weight"]
        if models[name].making:  # a LoRA has no VAE
            continue
        pair = mixed_vaes(models[name], step.operation.mixed_operands(whole), operands, list(inputs.values()))
        if pair:
            mixed[name] = (
                f'step "{name}" mixes the different VAEs of "{pair[0]}" and "{pair[1]}", which can turn pictures '
                'grey: keep one with vae = 0 in its weights, or bake one with vae = "…" in the output'
            )
    return models, reports, mixed


def _plan_output(
    recipe: Recipe, name: str, path: Path, models: Mapping[str, Model], inputs: Mapping[str, Input]
) -> PlannedOutput:
    """An output with all but offsets: those need the header's length, which needs every output's reads."""
    spec = recipe.outputs[name]
    metadata = list(inputs.values())[models[spec.model].origin].file.metadata
    model, settings = form_output(recipe, spec, path, models[spec.model], metadata)
    if model.making:
        return _plan_making(spec, path, model, list(inputs.values()))
    places = model.layout.places
    unets = {read.input for key, e in model.tensors.items() if places[key].component == "unet" for read in reads_of(e)}
    if unets and model.origin not in unets:
        model = with_markers(model, models[list(inputs)[min(unets)]])
    drafts, dropped = draft_tensors(recipe, spec, model, models[spec.vae] if spec.vae else None)
    tensors = tuple(
        _planned(draft, TensorInfo(name, draft.dtype, draft.expression.shape, 0, 0)) for name, draft in drafts.items()
    )
    prediction = output_prediction(recipe, spec, [each for n, each in enumerate(inputs.values()) if n in unets])
    return PlannedOutput(spec, path, 0, model.layout, prediction, tensors, dropped, settings=settings)


def _plan_making(spec: OutputSpec, path: Path, model: Model, inputs: Sequence[Input]) -> PlannedOutput:
    """An output whose tensors are made before the file is laid out."""
    making: Making = model.making
    wanted = OUTPUT_DTYPES.get(spec.dtype_of(None))
    tensors = []
    for name, expression in model.tensors.items():
        info = TensorInfo(name, wanted or expression.dtype, expression.shape, 0, 0)
        tensors.append(PlannedTensor(info, _how(expression, info.dtype), expression, None))
    prediction = inputs[model.origin].prediction
    return PlannedOutput(spec, path, making.size, model.layout, prediction, tuple(tensors), {}, making)


def _planned(draft: Draft, info: TensorInfo) -> PlannedTensor:
    return PlannedTensor(info, _how(draft.expression, draft.dtype), draft.expression, draft.place.component)


def _how(expression: Expression, dtype: Dtype) -> How:
    if isinstance(expression, Constant):
        return "constant"
    if isinstance(expression, Read):
        return "copied" if expression.dtype == dtype else "cast"
    return "merged"


def place_output(plan: Plan, output: PlannedOutput, files: Mapping[int, FileHashes]) -> PlannedOutput:
    """The output with every tensor at its offset. `files`: the file hashes that its metadata will hold."""
    if output.making and not output.is_made:
        return output
    header = layout_output(plan, output, {}, files)
    tensors = tuple(replace(tensor, info=header.tensors[tensor.info.name]) for tensor in output.tensors)
    return replace(output, tensors=tensors, size=header.size)
