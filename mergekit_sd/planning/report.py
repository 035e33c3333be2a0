"""A plan as plain data: what `plan` prints and `--json` gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergekit_sd.planning.models import StepReport
from mergekit_sd.planning.values import Input, Plan, PlannedOutput


def plan_as_json(plan: Plan) -> dict[str, Any]:
    """The whole plan: inputs, steps with their weights, outputs, bytes, warnings."""
    return {
        "recipe": str(plan.recipe.path) if plan.recipe.path else None,
        "inputs": [_input(each) for each in plan.inputs],
        "steps": [_step(each) for each in plan.steps],
        "outputs": [_output(each) for each in plan.outputs],
        "samples": [
            {"of": list(sample.of), "prompt": sample.prompt, "pictures": len(sample.of) * len(sample.seeds)}
            for sample in plan.recipe.samples
        ],
        "read_bytes": sum(output.read_bytes for output in plan.outputs),
        "write_bytes": sum(output.size for output in plan.outputs),
        "warnings": list(plan.warnings),
    }


def _input(source: Input) -> dict[str, Any]:
    return {
        "name": source.name,
        "path": str(source.file.path),
        "bytes": source.file.state.size,
        "tensors": len(source.file.tensors),
        "kind": source.layout.kind,
        "architecture": source.layout.architecture.name if source.layout.architecture else None,
        "prediction": source.prediction,
    }


def _step(step: StepReport) -> dict[str, Any]:
    return {
        "name": step.name,
        "op": step.operation,
        "operands": _operands(step.operands),
        "settings": dict(step.settings),
        "merged": step.merged,
        "folded": step.folded,
        "carried": step.carried,
        "kept": list(step.kept),
        "dropped": list(step.dropped),
        "removed": {what: list(names) for what, names in step.removed.items()},
        "weights": {
            name: {block: low if low == high else [low, high] for block, (low, high) in blocks.items()}
            for name, blocks in step.weights.items()
        },
    }


def _operands(names: Mapping[str, str]) -> dict[str, str | list[str]]:
    """The names by operand; those of a list together."""
    found: dict[str, Any] = {}
    for label, name in names.items():
        operand, of_list, _ = label.partition(".")
        if of_list:
            found.setdefault(operand, []).append(name)
        else:
            found[operand] = name
    return found


def _output(output: PlannedOutput) -> dict[str, Any]:
    return {
        "name": output.name,
        "path": str(output.path),
        "bytes": output.size,
        "container": "torch" if output.is_pickle else "safetensors",
        "architecture": output.layout.architecture.name if output.layout.architecture else None,
        "prediction": output.prediction,
        "dtypes": output.dtypes(),
        "tensors": {"total": len(output.tensors), **output.counted()},
        "dropped": {reason: list(names) for reason, names in output.dropped.items()},
        "read_bytes": output.read_bytes,
        **({"layers": len(output.making.survey.operands)} if output.making else {}),
    }
