"""What a recipe says of a sampled model, for its report: the steps in words, their weights by block as a chart.

Must not know networks or pictures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mergekit_sd.architectures.layout import Layout, Role
from mergekit_sd.planning.values import Plan
from mergekit_sd.recipe.graph import reachable
from mergekit_sd.recipe.load import Recipe, Step
from mergekit_sd.sampling.values import Chart
from mergekit_sd.text import shown

Ranges = Mapping[str, tuple[float, float]]


def made_of(recipe: Recipe, name: str, plan: Plan) -> str:
    """How a step or output is made, step by step: `taught = add_difference(a = night, …), alpha 1.2`."""
    return "; ".join(_step(recipe.steps[step], plan) for step in reachable(recipe, [name]).steps)


def weights_chart(recipe: Recipe, name: str, plan: Plan) -> Chart | None:
    """A row for each parameter, and each LoRA, that a step of the model weighs by block; None where there is none."""
    rows = {
        f"{shown(step)}: {shown(what)}": ranges
        for step in reachable(recipe, [name]).steps
        for what, ranges in _ranges(recipe.steps[step], plan, recipe.seed)
        if _one(ranges) is None
    }
    if not rows:
        return None
    values = {row: {block: (low + high) / 2 for block, (low, high) in ranges.items()} for row, ranges in rows.items()}
    note = "How much each block gets by the recipe"
    several = any(low != high for ranges in rows.values() for low, high in ranges.values())
    note += "; where its tensors get several numbers, their middle." if several else "."
    return Chart(f"Weights of {shown(name)}, by block", note, values)


def _step(step: Step, plan: Plan) -> str:
    operands = ", ".join(
        shown(source) if "." in label else f"{label} = {shown(source)}"  # of a list, or a name in it
        for label, source in step.operands.items()
        if label not in step.loras
    )
    inside = step.settings["expr"] if step.formula else operands
    told = [
        f"{what} {'by block' if (one := _one(ranges)) is None else format(one, 'g')}"
        for what, ranges in _ranges(step, plan, 0)
    ]
    return ", ".join([f"{shown(step.name)} = {step.operation.name}({inside})", *told])


def _ranges(step: Step, plan: Plan, seed: int) -> Iterator[tuple[str, Ranges]]:
    """Each parameter's, and each LoRA's, least and greatest number by block."""
    report = next((each for each in plan.steps if each.name == step.name), None)
    layout = plan.outputs[0].layout
    for what, blocks in (report.weights if report else {}).items():
        yield what, _in_order(blocks, layout)
    names = [name for name, place in layout.places.items() if place.role is Role.weight]
    for label, use in step.loras.items():
        strengths = use.strengths(layout, names, seed if step.seed is None else step.seed)
        found: dict[str, tuple[float, float]] = {}
        for name, value in strengths.items():
            place = layout.places[name]
            block = place.block or place.component or "other"
            low, high = found.get(block, (value, value))
            found[block] = min(low, value), max(high, value)
        yield step.operands[label], _in_order({block: found[block] for block in found if block != "vae"}, layout)


def _in_order(ranges: Ranges, layout: Layout) -> Ranges:
    """Text encoders, the UNet's blocks as they run, the rest."""
    blocks = layout.architecture.blocks if layout.architecture else ()

    def place(block: str) -> tuple[int, int]:
        if block in blocks:
            return 1, blocks.index(block)
        return (0 if block.startswith("text_encoder") else 2), 0

    return {block: ranges[block] for block in sorted(ranges, key=place)}


def _one(ranges: Ranges) -> float | None:
    """The number that all blocks have; None where they differ."""
    numbers = {number for both in ranges.values() for number in both}
    return numbers.pop() if len(numbers) == 1 else None
