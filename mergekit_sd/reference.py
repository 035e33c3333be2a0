"""What there is to say of an operation: its names, folds, an example; and `docs/operations.md`.

Owns the words about operations, all read off the registry. Must not know how a terminal shows them.
"""

from __future__ import annotations

import inspect
import json
import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from itertools import product
from typing import Any

from mergekit_sd.errors import UsageError
from mergekit_sd.operations import OPERATIONS, PURPOSES, Operand, Operation, Parameter
from mergekit_sd.operations.types import ChoiceKind, FormulaKind, Key, ListKind, NumberKind, SettingKind
from mergekit_sd.text import did_you_mean, shown

ANY = 0.37  # stands for any number when folds are looked for
SMALL_FILES = PURPOSES[-1]
"""The purpose whose models have no blocks."""
SPACES = {
    "weight": "a model",
    "delta": "a difference of models",
    "same": "a model or a difference, all alike",
    "lora": "a LoRA or one of its relatives",
}
WORKS = {
    "element": "streaming, in small pieces",
    "row": "on whole tensors, row by row",
    "tensor": "on whole tensors",
    "model": "on whole tensors, after a first look at the whole models",
}

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
    return {purpose: [each for each in OPERATIONS.values() if each.purpose == purpose] for purpose in PURPOSES}


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
            {
                "name": each.name,
                "space": each.space,
                "many": each.many,
                "optional": each.optional,
                "takes": operand_words(each),
            }
            for each in operation.operands
        ],
        "parameters": [
            {
                "name": each.name,
                "default": each.default,
                "low": getattr(each.kind, "low", None),
                "high": getattr(each.kind, "high", None),
                "options": list(getattr(each.kind, "options", ())),
                "takes": parameter_words(each, operation),
            }
            for each in operation.parameters
        ],
        "result": operation.result,
        "gives": SPACES[operation.result],
        "whole_tensor": operation.whole,
        "by": operation.by,
        "works": WORKS[operation.by],
        "seeded": operation.seeded,
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
    """The parameters for which the result is an operand itself, found by trying; the others may be any.

    Only numbers per block are tried, of an operation that takes single models.
    """
    numbers = [p for p in operation.parameters if isinstance(p.kind, NumberKind)]
    if operation.many or any(not isinstance(p.kind, NumberKind) and p.default is None for p in operation.parameters):
        return []
    names = [parameter.name for parameter in numbers]
    rest = {p.name: p.default for p in operation.parameters if p.name not in names}
    found: list[tuple[dict[str, float], str]] = []
    tries = sorted(product((ANY, 0.0, 1.0), repeat=len(names)), key=lambda values: -values.count(ANY))
    for values in tries:
        given = dict(zip(names, values, strict=True))
        operand = operation.folds_to(given | rest, Key("a.weight", "sd1", "unet", "IN04"))
        where = {name: value for name, value in given.items() if value != ANY}
        if operand and where and not any(general.items() <= where.items() for general, _ in found):
            found.append((where, operand))
    return found


def operand_words(operand: Operand) -> str:
    """`a list: each a model`."""
    words = SPACES[operand.space]
    if operand.space == "lora" and operand.many:
        return f'a list: each a name, "{IN_PROMPT}", or a table {{ lora, strength, text_encoder, blocks }}'
    if operand.many:
        return f"a list of {words.replace('a model', 'models', 1).replace('a difference', 'differences')}"
    return f"{words}; may be left out" if operand.optional else words


def parameter_words(parameter: Parameter, operation: Operation) -> str:
    """`0.5 unless given; per block, 0 to 1`."""
    kind = parameter.kind
    default = "must be given" if parameter.default is None else f"{_plain_value(parameter.default)} unless given"
    if isinstance(kind, ChoiceKind):
        return f"{default}; one of {', '.join(map(str, kind.options))}"
    if isinstance(kind, SettingKind):
        return f"{default}; {_range(kind)}"
    if isinstance(kind, ListKind):
        return f"{default}; numbers: {', '.join(kind.names)}"
    if isinstance(kind, FormulaKind):
        return f"{default}; text such as {EXPRESSION!r}"
    per = "per block and model" if kind.each else "per block"
    if operation.purpose == SMALL_FILES:
        per = "for each file"
    if kind.low is None and kind.high is None:
        return f"{default}; {per}, any number"
    low, high = ("any" if end is None else f"{end:g}" for end in (kind.low, kind.high))
    return f"{default}; {per}, {low} to {high} (beyond: extrapolate = true)"


def _range(kind: SettingKind) -> str:
    number = "a whole number" if kind.whole else "a number"
    if kind.high is None:
        return number if kind.low is None else f"{number} from {kind.low:g}"
    return f"{number}, {kind.low or 0:g} to {kind.high:g}"


def parameter_forms(parameter: Parameter) -> str:
    """What may be written for it, for a command's help."""
    kind = parameter.kind
    if isinstance(kind, ChoiceKind):
        return f"One of {', '.join(map(str, kind.options))}"
    if isinstance(kind, SettingKind):
        return _range(kind).capitalize()
    if isinstance(kind, ListKind):
        return f"Numbers: {', '.join(kind.names)}"
    if isinstance(kind, FormulaKind):
        return "A sum of the models a, b, c, …: 'a + 0.7*(b - c)'"
    each = ", for all models or in brackets one for each" if kind.each else ""
    return f"A number, a preset, a list, or a TOML table of blocks{each}"


def _plain_value(value: Any) -> str:
    if isinstance(value, tuple | list):
        return ", ".join(f"{each:g}" for each in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def fold_words(operation: Operation) -> Iterator[str]:
    """`alpha = 0: a copy of a`, for each fold."""
    for where, operand in folds(operation):
        yield f"{', '.join(f'{name} = {value:g}' for name, value in where.items())}: a copy of {operand}"


# --- examples -------------------------------------------------------------------------------------------

EXPRESSION = "mix + 0.7*(tuned - original)"
IN_PROMPT = "<lora:style:0.8>"
IN_TABLE = '{ lora = "style", strength = 0.8, blocks = "OUTALL" }'


# Operations on one model have commands of their own.
COMMANDS = {
    "prune": "prune a.safetensors --ema drop",
    "fix": "fix a.safetensors",
    "extract": "extract a.safetensors --component vae",
    "convert": "convert a.ckpt",
    "replace": "bake-vae a.safetensors b.safetensors",
    "extract_lora": "lora extract tuned.safetensors base.safetensors --rank 32",
    "merge_loras": "lora merge style.safetensors:0.8 other.safetensors:0.4 --rank 32",
    "resize_lora": "lora resize style.safetensors --rank 8",
    "rename_lora": "lora convert style.safetensors --style peft",
    "merge_embeddings": "embedding merge cat.pt:0.5 dog.pt:0.5",
    "merge_hypernetworks": "hypernetwork merge fog.safetensors:0.8",
    "inject_lora": "lora inject model.safetensors style.safetensors:0.8",
}


def one_shot(operation: Operation) -> str | None:
    """The command that does it without a recipe; None where a difference goes in or comes out."""
    if operation.name in COMMANDS:
        return f"mergekit-sd {COMMANDS[operation.name]} -o out.safetensors"
    deltas = operation.result == "delta" or any(operand.space == "delta" for operand in operation.operands)
    if deltas or any(parameter.name == "dtype" for parameter in operation.parameters):
        return None
    files = " ".join(f"{name}.safetensors" for name in _example_models(operation))
    values = "".join(f" --{p.name} {shlex.quote(_shell_value(p))}" for p in operation.parameters)
    return f"mergekit-sd merge {files} --method {operation.name}{values} -o out.safetensors"


def _example_models(operation: Operation) -> list[str]:
    """Names for the models of an example; a list has two."""
    if any(isinstance(parameter.kind, FormulaKind) for parameter in operation.parameters):
        return ["mix", "tuned", "original"]
    names: list[str] = []
    for operand in operation.operands:
        if operand.space == "lora":
            names.append("style")
        elif operand.space != "delta" and not operand.optional:
            names += ["one", "other"] if operand.many else [operand.name]
    return names


def _value(parameter: Parameter) -> Any:
    """What an example gives for a parameter."""
    kind = parameter.kind
    if isinstance(kind, FormulaKind):
        return EXPRESSION
    if isinstance(kind, ListKind):
        return [0, 0, 0, 0, 1, 0, 0.5, 0][: len(kind.names)]
    if isinstance(kind, NumberKind) and kind.each:
        return [0.5, 0.3]
    if parameter.default is None:
        return kind.options[0] if isinstance(kind, ChoiceKind) else 0.5
    return parameter.default


def _shell_value(parameter: Parameter) -> str:
    value = _value(parameter)
    if isinstance(parameter.kind, FormulaKind):
        return "a + 0.7*(b - c)"
    if isinstance(value, list):
        return str(value) if isinstance(parameter.kind, NumberKind) else ",".join(f"{each:g}" for each in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def example_recipe(operation: Operation) -> str:
    """A recipe that uses the operation, as one would write it by hand."""
    models = _example_models(operation)
    steps: list[str] = []
    sources: dict[str, str] = {}
    for operand in operation.operands:
        if operand.space == "lora" and operand.many:
            sources[operand.name] = f"[{IN_TABLE}]" if operation.operands[0] is not operand else f'["{IN_PROMPT}"]'
        elif operand.space == "lora":
            sources[operand.name] = '"style"'
        elif operand.many:
            sources[operand.name] = json.dumps(models[-2:])
        elif operand.space == "delta":
            name = "difference" if not steps else f"difference{len(steps) + 1}"
            steps.append(_step(name, "subtract", {"a": '"tuned"', "b": '"original"'}))
            sources[operand.name] = f'"{name}"'
        elif not operand.optional:
            sources[operand.name] = f'"{operand.name}"'
    models += ["tuned", "original"] if steps else []
    steps.append(_step("result", operation.name, sources, [*_parameter_lines(operation)]))
    if operation.result == "delta":
        models.append("other")
        steps.append(_step("sum", "add", {"a": '"other"', "b": '"result"'}))
    files = [f'{name} = "{name}.safetensors"' for name in models]
    last = "sum" if operation.result == "delta" else "result"
    output = ["[outputs.out]", f'model = "{last}"', 'file = "out.safetensors"']
    return "\n".join(["recipe = 1\n", "[models]", *files, "", *steps, *output]) + "\n"


def _step(name: str, op: str, sources: dict[str, str], more: Iterable[str] = ()) -> str:
    operands = [f"{operand} = {source}" for operand, source in sources.items()]
    return "\n".join([f"[steps.{name}]", f'op = "{op}"', *operands, *more]) + "\n"


def _parameter_lines(operation: Operation) -> Iterator[str]:
    for number, parameter in enumerate(operation.parameters):
        value, kind = _value(parameter), parameter.kind
        line = f"{parameter.name} = {f'{value:g}' if isinstance(value, float) else json.dumps(value)}"
        per_block = number == 0 and isinstance(kind, NumberKind) and (kind.low, kind.high) == (0.0, 1.0)
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
    facts = [f"- `{each.name}`: {operand_words(each)}" for each in operation.operands]
    facts += [f"- `{each.name}`: {parameter_words(each, operation)}" for each in operation.parameters]
    facts.append(f"- gives {SPACES[operation.result]}; works {WORKS[operation.by]}")
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
