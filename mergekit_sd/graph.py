"""The Python face of merging: `mk.ops` builds a lazy graph, which is a recipe in the making.

Owns nodes and their names. Nothing is computed here: a graph becomes a recipe, a recipe a plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from mergekit_sd.errors import UsageError
from mergekit_sd.formats.open import open_model
from mergekit_sd.formats.tensor import ModelFile
from mergekit_sd.operations import OPERATIONS, Operation
from mergekit_sd.text import did_you_mean


@dataclass(frozen=True, eq=False)
class ModelNode:
    """A model file, its header read. `weights = "ema"` takes its EMA weights as the UNet."""

    file: ModelFile
    weights: str = "file"


@dataclass(frozen=True, eq=False)
class StepNode:
    """An operation on nodes; parameters in every form that a recipe takes."""

    operation: Operation
    operands: tuple[Node, ...]
    parameters: Mapping[str, Any]


Node: TypeAlias = ModelNode | StepNode


def open(path: str | Path, *, weights: str = "file") -> ModelNode:
    """Open a model: its header only. Raises InputError for what is not a sound model file."""
    return ModelNode(open_model(Path(path)), weights)


class Ops:
    """The operations as functions of nodes: `mk.ops.weighted_sum(a, b, alpha=0.3)`."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name not in OPERATIONS:
            raise AttributeError(f"no operation {name!r}; {did_you_mean(name, OPERATIONS)}")
        operation = OPERATIONS[name]

        def build(*operands: Node, **parameters: Any) -> StepNode:
            return _step(operation, operands, parameters)

        build.__name__ = name
        build.__doc__ = f"{operation.summary}\n\n{operation.formula}"
        return build

    def __dir__(self) -> list[str]:
        return sorted(OPERATIONS)


ops = Ops()


def _step(operation: Operation, given: tuple[Node, ...], keywords: dict[str, Any]) -> StepNode:
    names = [operand.name for operand in operation.operands]
    operands = dict(zip(names, given, strict=False))
    operands |= {name: keywords.pop(name) for name in names if name in keywords and name not in operands}
    if len(given) > len(names) or set(operands) != set(names):
        raise UsageError(f"{operation.name} takes {len(names)} models: {', '.join(names)}.", hint="see ops NAME")
    for name, operand in operands.items():
        if not isinstance(operand, ModelNode | StepNode):
            raise UsageError(f"{name} of {operation.name} is no model but {operand!r}.", hint="open it: mk.open(path)")
    known = {parameter.name for parameter in operation.parameters} | {"extrapolate"}
    for name in keywords:
        if name not in known:
            raise UsageError(f'{operation.name} has no parameter "{name}".', hint=did_you_mean(name, known))
    return StepNode(operation, tuple(operands[name] for name in names), keywords)


def parents(node: Node) -> list[str]:
    """The names of the files that a graph is made of, each once, in the order of its operands."""
    return list(dict.fromkeys(each.file.path.stem for each in _in_order(node) if isinstance(each, ModelNode)))


def graph_data(node: Node, output: Mapping[str, Any], vae: Node | None = None, **top: Any) -> dict[str, Any]:
    """The graph that ends in `node` as a recipe's plain data, with one output called "output"."""
    models: dict[str, Any] = {}
    steps: dict[str, Any] = {}
    names: dict[int, str] = {}
    for each in dict.fromkeys([*_in_order(node), *(_in_order(vae) if vae else ())]):
        if isinstance(each, ModelNode):
            name = _free_name(each.file.path.stem, models, steps)
            entry = {"file": str(each.file.path.absolute())}
            models[name] = entry | ({"weights": each.weights} if each.weights != "file" else {})
        else:
            name = _free_name(each.operation.name, models, steps)
            operands = zip(each.operation.operands, each.operands, strict=True)
            links = {operand.name: names[id(source)] for operand, source in operands}
            steps[name] = {"op": each.operation.name, **links, **each.parameters}
        names[id(each)] = name
    data = {"recipe": 1, **top, "models": models}
    baked = {"vae": names[id(vae)]} if vae else {}
    made = {"output": {"model": names[id(node)], **output, **baked}}
    return data | ({"steps": steps} if steps else {}) | {"outputs": made}


def _free_name(wanted: str, *taken: Mapping[str, Any]) -> str:
    plain = "".join(c if c.isprintable() else "_" for c in wanted) or "model"
    names = (plain if number == 1 else f"{plain}-{number}" for number in range(1, 1 << 30))
    return next(name for name in names if not any(name in names for names in taken))


def _in_order(node: Node) -> list[Node]:
    """Every node once, operands first. A loop, not recursion: chains may be long."""
    order: list[Node] = []
    seen: set[int] = set()
    stack: list[tuple[Node, bool]] = [(node, False)]
    while stack:
        current, ready = stack.pop()
        if ready:
            order.append(current)
        elif id(current) not in seen:
            seen.add(id(current))
            stack.append((current, True))
            operands = current.operands if isinstance(current, StepNode) else ()
            stack.extend((operand, False) for operand in reversed(operands))
    return order
