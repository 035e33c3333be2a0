"""What there is to say of an operation: its names, folds, an example; and `docs/operations.md`.

Owns the words about operations, all read off the registry. Must not know how a terminal shows them.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import product
from typing import Any

from mergekit_sd.errors import UsageError
from mergekit_sd.operations.registry import OPERATIONS, Operation, Parameter
from mergekit_sd.text import did_you_mean, shown

ANY = 0.37  # stands for any number when folds are looked for
SPACES = {
    "weight": "a model",
    "delta": "a difference of models",
    "same": "a model or a difference, all alike",
}
STREAMING = {False: "streamed in small pieces", True: "works on whole tensors, one after the other"}

# --- finding one ------------------------------------------------------------------------------------


def find_operation(text: str) -> Operation:
    """The operation of this name, be it ours or another tool's; UsageError if there is none, or several."""
    wanted = _plain(text)
    for names_of in (lambda o: (o.name,), lambda o: o.also, lambda o: map(_without_tool, o.also)):
        found = [each for each in OPERATIONS.values() if wanted in map(_plain, names_of(each))]
        if len(found) > 1:
            names = [f"{each.name}: {each.formula}" for each in found]
            raise UsageError(f'"{shown(text)}" is the name of several.', hint=f"take {found[0].name}", details=names)
        if found:
            return found[0]
    others = [_without_tool(alias) for each in OPERATIONS.values() for alias in each.also]
    hint = did_you_mean(text, [*OPERATIONS, *others]) or ""
    if not hint.startswith("did you mean"):
        hint = did_you_mean(text, OPERATIONS) or ""
    raise UsageError(f'There is no operation "{shown(text)}".', hint=hint or None)


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _without_tool(alias: str) -> str:
    return re.sub(r"\s*\([^)]*\)$", "", alias)


def by_purpose() -> dict[str, list[Operation]]:
    """Every operation, under what it is for."""
    sections: dict[str, list[Operation]] = {}
    for operation in OPERATIONS.values():
        sections.setdefault(operation.purpose, []).append(operation)
    return sections


# --- what is said of one ------------------------------------------------------------------------------


def describe_operation(operation: Operation) -> dict[str, Any]:
    """All of it as plain data, in the order in which it is read."""
    return {
        "name": operation.name,
        "purpose": operation.purpose,
        "summary": operation.summary,
        "notes": notes(operation),
        "formula": operation.formula,
        "operands": [
            {"name": each.name, "space": each.space, "takes": SPACES[each.space]} for each in operation.operands
        ],
        "parameters": [
            {
                "name": each.name,
                "default": each.default,
                "low": each.low,
                "high": each.high,
                "takes": parameter_words(each),
            }
            for each in operation.parameters
        ],
        "result": operation.result,
        "gives": SPACES[operation.result],
        "whole_tensor": operation.whole,
        "folds": [{"where": where, "copy_of": operand} for where, operand in folds(operation)],
        "also": list(operation.also),
        "recipe": example_recipe(operation),
        "command": one_shot(operation),
    }


def notes(operation: Operation) -> str:
    """What the function's docstring says beyond its first paragraph: cases, and the formula's source."""
    paragraphs = (inspect.getdoc(operation.function) or "").split("\n\n")[1:]
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def folds(operation: Operation) -> list[tuple[dict[str, float], str]]:
    """The parameters for which the result is an operand itself, found by trying; the others may be any."""
    names = [parameter.name for parameter in operation.parameters]
    found: list[tuple[dict[str, float], str]] = []
    tries = sorted(product((ANY, 0.0, 1.0), repeat=len(names)), key=lambda values: -values.count(ANY))
    for values in tries:
        operand = operation.folds_to(dict(zip(names, values, strict=True)))
        where = {name: value for name, value in zip(names, values, strict=True) if value != ANY}
        if operand and not any(general.items() <= where.items() for general, _ in found):
            found.append((where, operand))
    return found


def parameter_words(parameter: Parameter) -> str:
    """`0.5 unless given; per block, 0 to 1`."""
    default = "must be given" if parameter.default is None else f"{parameter.default:g} unless given"
    if parameter.low is None and parameter.high is None:
        return f"{default}; per block, any number"
    low, high = ("any" if end is None else f"{end:g}" for end in (parameter.low, parameter.high))
    return f"{default}; per block, {low} to {high} (beyond: extrapolate = true)"


def fold_words(operation: Operation) -> Iterator[str]:
    """`alpha = 0: a copy of a`, for each fold."""
    for where, operand in folds(operation):
        yield f"{', '.join(f'{name} = {value:g}' for name, value in where.items())}: a copy of {operand}"


def one_shot(operation: Operation) -> str | None:
    """The command that does it without a recipe; None where a difference goes in or comes out."""
    if operation.result == "delta" or any(operand.space == "delta" for operand in operation.operands):
        return None
    files = " ".join(f"{operand.name}.safetensors" for operand in operation.operands)
    values = "".join(f" --{parameter.name} {_value(parameter)}" for parameter in operation.parameters)
    return f"mergekit-sd merge {files} --method {operation.name}{values} -o out.safetensors"


def _value(parameter: Parameter) -> str:
    return f"{0.5 if parameter.default is None else parameter.default:g}"


def example_recipe(operation: Operation) -> str:
    """A recipe that uses the operation, as one would write it by hand."""
    models = [operand.name for operand in operation.operands if operand.space != "delta"]
    steps: list[str] = []
    sources: dict[str, str] = {}
    for operand in operation.operands:
        sources[operand.name] = operand.name
        if operand.space == "delta":
            sources[operand.name] = "difference" if not steps else f"difference{len(steps) + 1}"
            steps.append(_step(sources[operand.name], "subtract", {"a": "tuned", "b": "original"}))
    models += ["tuned", "original"] if steps else []
    steps.append(_step("result", operation.name, sources, [*_parameter_lines(operation)]))
    if operation.result == "delta":
        models.append("other")
        steps.append(_step("sum", "add", {"a": "other", "b": "result"}))
    files = [f'{name} = "{name}.safetensors"' for name in models]
    last = "sum" if operation.result == "delta" else "result"
    output = ["[outputs.out]", f'model = "{last}"', 'file = "out.safetensors"']
    return "\n".join(["recipe = 1\n", "[models]", *files, "", *steps, *output]) + "\n"


def _step(name: str, op: str, sources: dict[str, str], more: Iterable[str] = ()) -> str:
    operands = [f'{operand} = "{source}"' for operand, source in sources.items()]
    return "\n".join([f"[steps.{name}]", f'op = "{op}"', *operands, *more]) + "\n"


def _parameter_lines(operation: Operation) -> Iterator[str]:
    for number, parameter in enumerate(operation.parameters):
        line = f"{parameter.name} = {_value(parameter)}"
        per_block = number == 0 and (parameter.low, parameter.high) == (0.0, 1.0)
        yield f'{line}  # or per block: {{ preset = "GRAD_V", base = 0.5 }}' if per_block else line


# --- docs/operations.md --------------------------------------------------------------------------------

HEAD = """# Operations

<!-- Made from the registry: python -m mergekit_sd.reference > docs/operations.md -->

Each operation is one pure function in `mergekit_sd/operations/`; what follows is read off its signature.
`mergekit-sd ops NAME` shows the same, and finds an operation by another tool's name for it.
A parameter takes a number, a preset, a list, or a table of blocks.
Where the result equals an operand, its tensors are copied, not computed.
"""


def markdown() -> str:
    """The whole page."""
    parts = [HEAD]
    for purpose, operations in by_purpose().items():
        parts.append(f"## {purpose[0].upper()}{purpose[1:]}\n")
        parts += [_section(operation) for operation in operations]
    return "\n".join(parts)


def _section(operation: Operation) -> str:
    facts = [f"- `{each.name}`: {SPACES[each.space]}" for each in operation.operands]
    facts += [f"- `{each.name}`: {parameter_words(each)}" for each in operation.parameters]
    facts.append(f"- gives {SPACES[operation.result]}; {STREAMING[operation.whole]}")
    facts += [f"- {words}" for words in fold_words(operation)]
    if operation.also:
        facts.append(f"- elsewhere: {', '.join(operation.also)}")
    command = one_shot(operation)
    shell = f"```sh\n{command}\n```\n" if command else ""
    more = notes(operation)
    text = [f"### {operation.name}\n", f"{operation.summary}\n", f"    {operation.formula}\n"]
    text += [f"{more}\n"] if more else []
    return "\n".join([*text, *facts, "", f"```toml\n{example_recipe(operation)}```\n", *([shell] if shell else [])])


if __name__ == "__main__":
    sys.stdout.buffer.write(markdown().encode())
