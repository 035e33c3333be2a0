"""What the names of a recipe refer to: operands, cycles, spaces, and what is used by whom.

Owns every check that needs more than one table, and the order of steps. Must not know files on
disk, tensors or numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from mergekit_sd.recipe.formula import space_of
from mergekit_sd.text import did_you_mean, shown

if TYPE_CHECKING:
    from mergekit_sd.operations.types import Space
    from mergekit_sd.recipe.load import Recipe, Step
    from mergekit_sd.recipe.positions import KeyPath

IN_WORDS = {"weight": "a model", "delta": "a difference of models", "lora": "a LoRA's file"}


class Reachable(NamedTuple):
    """What some names need: models in the file's order, steps so that operands come first."""

    models: list[str]
    steps: list[str]


def check_names(recipe: Recipe) -> tuple[str, ...]:
    """Check all names and spaces; the warnings."""
    for name in recipe.steps:
        if name in recipe.models:
            raise recipe.error(
                f'"{shown(name)}" is both a model and a step.', ("steps", name), hint="give the step another name"
            )
    for path, name, known, noun in _references(recipe):
        if name not in known:
            raise recipe.error(f'There is no {noun} "{shown(name)}".', path, hint=_meant(recipe, name, known))
    ordered = order(recipe)
    _check_spaces(recipe, ordered)
    return tuple(_warnings(recipe))


def _references(recipe: Recipe) -> Iterator[tuple[KeyPath, str, list[str], str]]:
    """Every place that names something: where, the name, what it may name, and that in words."""
    sources = [*recipe.models, *recipe.steps]
    for step in recipe.steps.values():
        for label, name in step.operands.items():
            yield step.path_of(label), name, sources, "model or step"
    for output in recipe.outputs.values():
        yield ("outputs", output.name, "model"), output.model, sources, "model or step"
        if output.vae is not None:
            yield ("outputs", output.name, "vae"), output.vae, sources, "model or step"
    for number, sample in enumerate(recipe.samples):
        for index, name in enumerate(sample.of):
            path = ("samples", number, "of", index)
            yield path, name, [*sources, *recipe.outputs], "model, step or output"


def _meant(recipe: Recipe, name: str, known: list[str]) -> str | None:
    if name in recipe.outputs:
        return f'that is an output; write "{recipe.outputs[name].model}", which it is made of'
    return did_you_mean(name, known)


# --- order ------------------------------------------------------------------------------------------


def order(recipe: Recipe) -> list[Step]:
    """All steps, operands first, otherwise in the file's order; a cycle is an error."""
    return [recipe.steps[name] for name in _sorted_steps(recipe, recipe.steps)]


def reachable(recipe: Recipe, names: Iterable[str]) -> Reachable:
    """What these outputs, steps or models need (an output before a step of its name)."""
    wanted: list[str] = []
    for name in names:
        output = recipe.outputs.get(name)
        wanted += [each for each in (output.model, output.vae) if each is not None] if output else [name]
    steps = _sorted_steps(recipe, [name for name in wanted if name in recipe.steps])
    used = {*wanted, *(operand for name in steps for operand in recipe.steps[name].operands.values())}
    return Reachable([name for name in recipe.models if name in used], steps)


def _sorted_steps(recipe: Recipe, wanted: Iterable[str]) -> list[str]:
    """Depth first and without recursion: a chain may be thousands of steps long."""
    done: dict[str, None] = {}
    for root in wanted:
        if root in done:
            continue
        trail = {root: _operand_steps(recipe, root)}
        while trail:
            name = next(reversed(trail))
            following = next(trail[name], None)
            if following is None:
                done[name] = None
                del trail[name]
            elif following in trail:
                raise _cycle(recipe, [*trail, following])
            elif following not in done:
                trail[following] = _operand_steps(recipe, following)
    return list(done)


def _operand_steps(recipe: Recipe, name: str) -> Iterator[str]:
    return iter([each for each in recipe.steps[name].operands.values() if each in recipe.steps])


def _cycle(recipe: Recipe, trail: list[str]) -> Exception:
    cycle = trail[trail.index(trail[-1]) :]
    step = recipe.steps[cycle[0]]
    label = next(label for label, name in step.operands.items() if name == cycle[1])
    shape = " → ".join(shown(name) for name in cycle)
    return recipe.error(
        f"Steps need each other in a circle: {shape}.", step.path_of(label), hint="break it at one operand"
    )


# --- spaces -----------------------------------------------------------------------------------------


def spaces(recipe: Recipe) -> dict[str, Space]:
    """Whether each model and step is a weight or a delta."""
    return _check_spaces(recipe, order(recipe))


def _check_spaces(recipe: Recipe, ordered: list[Step]) -> dict[str, Space]:
    space: dict[str, Space] = dict.fromkeys(recipe.models, "weight")
    for step in ordered:
        space[step.name] = _space_of(recipe, step, space)
    for path, name, _, _ in _references(recipe):
        made = path[0] == "samples" and name in recipe.outputs
        if path[0] != "steps" and not made and space[name] == "delta":
            raise recipe.error(f'"{shown(name)}" is {IN_WORDS["delta"]}, which is no model.', path, hint=_ADD)
    return space


_ADD = 'op = "add" makes a model of a model and a difference'
_SUBTRACT = 'op = "subtract" makes a difference of two models'


def _space_of(recipe: Recipe, step: Step, space: dict[str, Space]) -> Space:
    if step.formula:
        return space_of(step.formula, space, recipe.where(*step.path_of("")))
    same: tuple[str, Space] | None = None
    for label, name in step.operands.items():
        operand, path, found = step.operation.operand(label), step.path_of(label), space[name]
        who = f'"{shown(name)}" is {IN_WORDS[found]}'
        if operand.space == "lora" and name in recipe.models:  # what a file is is known once it is opened
            continue
        if operand.space == found == "lora":
            hint = "give the step an output, and name that file in another recipe"
            raise recipe.error(f"{who}, but it is made here: {operand.name} takes one of [models].", path, hint=hint)
        takes = "weight" if found == "lora" and operand.space == "same" else operand.space
        if takes != "same" and found != takes:
            hint = "name one of [models]" if operand.space == "lora" else _ADD if found == "delta" else _SUBTRACT
            message = f"{who}, but {operand.name} of {step.operation.name} takes {IN_WORDS[takes]}."
            raise recipe.error(message, path, hint=hint)
        if operand.space == "same":
            same = same or (label, found)
            if same[1] != found:
                message = f"{who}, but {same[0]} is {IN_WORDS[same[1]]}: they must be of one kind."
                raise recipe.error(message, path, hint=_ADD)
    if step.operation.result != "same":
        return step.operation.result
    return same[1] if same else "weight"


# --- warnings ---------------------------------------------------------------------------------------


def _warnings(recipe: Recipe) -> Iterator[str]:
    if not recipe.outputs and not recipe.samples:
        yield "The recipe has no outputs and no samples: there is nothing to make."
        return
    goals = [*recipe.outputs, *(name for sample in recipe.samples for name in sample.of)]
    needed = set(reachable(recipe, goals).steps)
    for name in recipe.steps:
        if name not in needed:
            yield f'The step "{shown(name)}" is used by no output and no sample.'
    named = {name for _, name, _, _ in _references(recipe)}
    for name in recipe.models:
        if name not in named:
            yield f'The model "{shown(name)}" is used by nothing.'
