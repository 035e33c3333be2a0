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
from mergekit_sd.operations.types import FormulaKind
from mergekit_sd.recipe.formula import parse_formula
from mergekit_sd.recipe.positions import Where
from mergekit_sd.text import did_you_mean


@dataclass(frozen=True, eq=False)
class ModelNode:
    """A model file, its header read. `weights = "ema"` takes its EMA weights as the UNet."""

    file: ModelFile
    weights: str = "file"


@dataclass(frozen=True, eq=False)
class StepNode:
    """An operation on nodes, or on lists of them; parameters in every form that a recipe takes.

    A formula's operands are those that its text names.
    """

    operation: Operation
    operands: Mapping[str, Node | tuple[Node, ...]]
    parameters: Mapping[str, Any]

    def nodes(self) -> list[Node]:
        """All operands, one after the other."""
        return [node for each in self.operands.values() for node in (each if isinstance(each, tuple) else (each,))]


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

        def build(*operands: Any, **parameters: Any) -> StepNode:
            return _step(operation, operands, parameters)

        build.__name__ = name
        build.__doc__ = f"{operation.summary}\n\n{operation.formula}"
        return build

    def __dir__(self) -> list[str]:
        return sorted(OPERATIONS)


ops = Ops()


def _step(operation: Operation, given: tuple[Any, ...], keywords: dict[str, Any]) -> StepNode:
    if any(isinstance(parameter.kind, FormulaKind) for parameter in operation.parameters):
        return _formula_step(operation, *given, **keywords)
    names = [operand.name for operand in operation.operands]
    if operation.many and len(given) > len(names) - 1:
        single, rest = given[: len(names) - 1], given[len(names) - 1 :]
        given = (*single, rest[0] if len(rest) == 1 and isinstance(rest[0], list | tuple) else rest)
    operands = dict(zip(names, given, strict=False))
    operands |= {name: keywords.pop(name) for name in names if name in keywords and name not in operands}
    needed = {operand.name for operand in operation.operands if not operand.optional}
    if len(given) > len(names) or needed - set(operands):
        raise UsageError(f"{operation.name} takes {len(names)} models: {', '.join(names)}.", hint="see ops NAME")
    if operation.many and operation.many.space == "lora":
        operands[operation.many.name], keywords["loras"] = _lora_entries(operands[operation.many.name])
    operands = {name: _checked(operation, name, operand) for name, operand in operands.items() if operand is not None}
    known = {parameter.name for parameter in operation.parameters} | {"extrapolate"}
    known |= {"seed"} if operation.seeded else set()
    known |= {"loras"} & set(operands)
    for name in keywords:
        if name not in known:
            raise UsageError(f'{operation.name} has no parameter "{name}".', hint=did_you_mean(name, known))
    return StepNode(operation, operands, keywords)


def _lora_entries(given: object) -> tuple[tuple[Node, ...], list[dict[str, Any]]]:
    """The files of a list of LoRAs, and what is said of each.

    An entry is an opened file, a pair of it and its strength, or the table of a recipe with the file as `lora`.
    """
    files: list[Any] = []
    tables: list[dict[str, Any]] = []
    for entry in given if isinstance(given, list | tuple) else [given]:
        if isinstance(entry, tuple) and len(entry) == 2:
            entry = {"lora": entry[0], "strength": entry[1]}
        table = dict(entry) if isinstance(entry, Mapping) else {"lora": entry}
        files.append(table.pop("lora", None))
        tables.append(table)
    return tuple(files), tables


def _checked(operation: Operation, name: str, operand: object) -> Any:
    """The operand, a list of them as a tuple. Raises UsageError for what is no node."""
    if operation.operand(name).many and isinstance(operand, list | tuple) and operand:
        return tuple(_checked_node(operation, name, each) for each in operand)
    return _checked_node(operation, name, operand)


def _checked_node(operation: Operation, name: str, operand: object) -> Node:
    if isinstance(operand, ModelNode | StepNode):
        return operand
    raise UsageError(f"{name} of {operation.name} is no model but {operand!r}.", hint="open it: mk.open(path)")


def _formula_step(operation: Operation, expr: str = "", **operands: Node) -> StepNode:
    """`ops.formula("mix + 0.7*(db - sd15)", mix=…, db=…, sd15=…)`: every name in the text is a keyword."""
    named = dict.fromkeys(parse_formula(expr, Where()).names())
    missing = [name for name in named if name not in operands]
    if missing or set(operands) - set(named):
        takes = ", ".join(f"{name}=…" for name in named)
        raise UsageError(f"This formula takes its {len(named)} models by name: {takes}.", hint="see ops formula")
    return StepNode(operation, {n: _checked_node(operation, n, operands[n]) for n in named}, {"expr": expr})


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
            steps[name] = {"op": each.operation.name, **_said(each, names)}
        names[id(each)] = name
    data = {"recipe": 1, **top, "models": models}
    baked = {"vae": names[id(vae)]} if vae else {}
    made = {"output": {"model": names[id(node)], **output, **baked}}
    return data | ({"steps": steps} if steps else {}) | {"outputs": made}


def _said(step: StepNode, names: Mapping[int, str]) -> dict[str, Any]:
    """A step's operands and parameters as a recipe says them, with the names that the nodes have got."""
    links = {
        operand: [names[id(node)] for node in value] if isinstance(value, tuple) else names[id(value)]
        for operand, value in step.operands.items()
    }
    if "expr" in step.parameters:
        chosen = {operand: name for operand, name in links.items() if isinstance(name, str)}
        return {"expr": parse_formula(step.parameters["expr"], Where()).text(chosen)}
    if "loras" in step.parameters:
        entries = zip(links["loras"], step.parameters["loras"], strict=True)
        listed = [{"lora": name, **table} if table else name for name, table in entries]
        return {**links, **step.parameters, "loras": listed}
    return {**links, **step.parameters}


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
            operands = current.nodes() if isinstance(current, StepNode) else ()
            stack.extend((operand, False) for operand in reversed(operands))
    return order
