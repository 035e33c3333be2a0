"""Editing a recipe's text: each function takes the text and gives a new one, with comments and order kept.

Owns what is written where. What comes out has been checked as a recipe; where it would be none, the engine's
RecipeError is raised and nothing has happened. Must not know widgets or read models.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import tomlkit
from tomlkit.exceptions import TOMLKitError

import mergekit_sd as mk
from mergekit_sd.errors import RecipeError, UsageError
from mergekit_sd.text import shown
from mergekit_sd_tui import toml_text as toml
from mergekit_sd_tui import weights
from mergekit_sd_tui.operands import Kind, expression, fitting, labels, method_for
from mergekit_sd_tui.state import Draft

# --- a new recipe ---------------------------------------------------------------------------------------


def new_mix(models: Sequence[Path], folder: Path, loras: Sequence[Path] = ()) -> Draft:
    """A recipe that merges these models, by a method that takes as many, and puts LoRAs into the result."""
    if not models:
        raise UsageError("There is nothing to merge.", hint="mark models in the library")
    names = free_names([*models, *loras], taken=("mix", "styled"))
    lines = ["recipe = 1", "", "[models]"]
    lines += [f"{toml.key_text(name)} = {toml.text_of(file_text(path, folder))}" for name, path in names.items()]
    last, tables = next(iter(names)), []
    heads = list(names)[: len(models)]
    if len(heads) > 1:
        tables.append(("mix", _step_values(method_for(len(heads)), heads)))
        last = "mix"
    if loras:
        tables.append(("styled", {"op": "inject_lora", "model": last, "loras": list(names)[len(models) :]}))
        last = "styled"
    for name, values in tables:
        lines += ["", f"[steps.{name}]", *(f"{key} = {toml.text_of(value)}" for key, value in values.items())]
    lines += ["", "[outputs.final]", f"model = {toml.text_of(last)}", f"file = {toml.text_of(_free_file(folder))}", ""]
    return Draft(_checked("\n".join(lines)))


def _free_file(folder: Path) -> str:
    names = (f"mix{'' if number == 1 else f'-{number}'}.safetensors" for number in range(1, 1 << 30))
    return next(name for name in names if not (folder / name).exists())


def free_names(paths: Iterable[Path], taken: Iterable[str]) -> dict[str, Path]:
    """A short name that is not taken for each file: "anything-v3" of "Anything v3.safetensors"."""
    used, found = set(taken), {}
    for path in paths:
        stem = path.name.removesuffix(path.suffix) if path.suffix[1:].isalpha() else path.name
        short = re.sub(r"[^A-Za-z0-9_]+", "-", stem).strip("-_").lower()[:32].rstrip("-_") or "model"
        names = (short if number == 1 else f"{short}-{number}" for number in range(1, 1 << 30))
        name = next(name for name in names if name not in used)
        used.add(name)
        found[name] = path
    return found


def file_text(path: Path, folder: Path) -> str:
    """How a recipe in a folder names a file: relative below it, by a registered root, else as a whole path."""
    path = Path(path).absolute()
    if path.is_relative_to(folder.absolute()):
        return path.relative_to(folder.absolute()).as_posix()
    for name, root in mk.load_roots().items():
        if path.is_relative_to(root):
            return f"{name}:{path.relative_to(root).as_posix()}"
    return str(path)


def detached(draft: Draft) -> str:
    """The text for a recipe elsewhere that draws but writes nothing: models by their whole paths, no samples."""
    document = _parsed(draft.text)
    _rename_files(document, draft.folder, str)
    document.pop("samples", None)
    return _checked(tomlkit.dumps(document))


def moved(text: str, folder: Path, to: Path) -> str:
    """The text for a recipe in another folder, where its models are the same files; as it is where it is no recipe."""
    try:
        document = _parsed(text) if folder != to else None
    except RecipeError:
        document = None
    if document is None:
        return text
    _rename_files(document, folder, lambda path: file_text(path, to))
    return tomlkit.dumps(document)


def _rename_files(document: tomlkit.TOMLDocument, folder: Path, name_of: Callable[[Path], str]) -> None:
    """Another name for each model that lies where its relative path says: others are found under roots."""
    for name, entry in document.get("models", {}).items():
        table, key = (entry, "file") if isinstance(entry, dict) else (document["models"], name)
        beside = folder.absolute() / Path(str(table[key])).expanduser()
        if beside.exists():
            toml.write(table, key, name_of(beside))


# --- parameters -----------------------------------------------------------------------------------------


def set_parameter(text: str, step: str, parameter: str, value: Any) -> str:
    """With another value. `weights.1` is the second model's own; the others keep theirs."""
    with _edited(text) as document:
        table = _step(document, step)
        name, _, index = parameter.partition(".")
        if index:
            each = weights_of_models(table.unwrap(), name)
            value = [value if number == int(index) else one for number, one in enumerate(each)]
        toml.write(table, name, value)
    return _checked(tomlkit.dumps(document))


def unset(text: str, step: str, key: str) -> str:
    """Without one of a step's keys, which has its default again."""
    with _edited(text) as document:
        _step(document, step).pop(key, None)
    return _checked(tomlkit.dumps(document))


def set_block(text: str, step: str, parameter: str, numbers: Mapping[str, float], family: str) -> str:
    """With other numbers at some blocks of a parameter."""
    value = value_of(text, step, parameter)
    return set_parameter(text, step, parameter, weights.changed(value, numbers, family))


def value_of(text: str, step: str, parameter: str) -> Any:
    """The value of a parameter as it is written, or the one that the operation takes where it is not."""
    return value_in(_step(_parsed(text), step).unwrap(), parameter)


def value_in(table: Mapping[str, Any], parameter: str) -> Any:
    """The same, of a step as plain data."""
    name, _, index = parameter.partition(".")
    if index:
        return weights_of_models(table, name)[int(index)]
    return table[name] if name in table else _default(table, name)


def weights_of_models(table: Mapping[str, Any], name: str) -> list[Any]:
    """The values of a parameter that each model of a step has its own of."""
    operation = mk.OPERATIONS[table["op"]]
    many = next(operand.name for operand in operation.operands if operand.many)
    number = len(table.get(many, ()))
    value = table[name] if name in table else _default(table, name)
    if isinstance(value, str) and ":" not in value and "," in value:
        value = [weights.number_in(item) for item in value.split(",")]
    return list(value) if isinstance(value, list) else [value] * number


def _default(table: Mapping[str, Any], name: str) -> Any:
    known = {parameter.name: parameter.default for parameter in mk.OPERATIONS[table["op"]].parameters}
    value = known.get(name)
    return list(value) if isinstance(value, tuple) else 1.0 if value is None else value


# --- models, steps, outputs --------------------------------------------------------------------------------


def add_models(text: str, paths: Sequence[Path], folder: Path) -> str:
    """With more models, under names that are free."""
    with _edited(text) as document:
        names = free_names(paths, taken=[*document.get("models", {}), *document.get("steps", {}), "mix"])
        if "models" not in document:
            document["models"] = tomlkit.table()
        for name, path in names.items():
            toml.write(cast("Any", document["models"]), name, file_text(path, folder))
    return _checked(tomlkit.dumps(document))


def set_model(text: str, name: str, path: Path, folder: Path) -> str:
    """With another file under a model's name; a pin of the old one goes."""
    with _edited(text) as document:
        models = cast("Any", document["models"])
        if isinstance(models[name], dict):
            toml.write(models[name], "file", file_text(path, folder))
            models[name].pop("sha256", None)
        else:
            toml.write(models, name, file_text(path, folder))
    return _checked(tomlkit.dumps(document))


def remove_model(text: str, name: str) -> str:
    """Without a model; raises RecipeError while a step uses it."""
    with _edited(text) as document:
        cast("Any", document["models"]).remove(name)
    return _checked(tomlkit.dumps(document))


def add_step(text: str, op: str, operands: Sequence[str]) -> tuple[str, str]:
    """With a step at the end of the others, and its name; outputs of the first operand are of the step now."""
    with _edited(text) as document:
        taken = [*document.get("models", {}), *document.get("steps", {})]
        name = next(free for number in range(1, 1 << 30) if (free := f"step{number}") not in taken)
        table = tomlkit.table()
        for key, value in _step_values(op, operands).items():
            table.append(key, toml.item_of(value))
        tables = toml.step_tables(document)
        if tables:
            container, _, last = tables[-1]
            tail = toml.cut_tail(last)
            toml.end_with_blank(last)
            container.append(name, table)
            toml.append_tail(table, tail)
        else:
            steps = tomlkit.table(is_super_table=True)
            steps.append(name, table)
            toml.insert_before(document, "outputs", "steps", steps)
        if mk.OPERATIONS[op].result not in ("delta", "lora"):
            for output in document.get("outputs", {}).values():
                if operands and output.get("model") == operands[0]:
                    toml.write(output, "model", name)
    return _checked(tomlkit.dumps(document)), name


def remove_step(text: str, name: str) -> str:
    """Without a step; what used it takes the step's first operand."""
    with _edited(text) as document:
        first = next((label for label in labels(_step(document, name).unwrap()).values() if label), None)
        tables = toml.step_tables(document)
        found = next((index for index, (_, key, _) in enumerate(tables) if key == name), None)
        if found is None:
            cast("Any", document["steps"]).pop(name)
        else:
            container, _, table = tables[found]
            tail = toml.cut_tail(table)
            container.remove(name)
            toml.append_tail(toml.before(document, tables, found), tail)
        if first:
            _rename_uses(document, name, first)
        if not document["steps"]:
            document.remove("steps")
    return _checked(tomlkit.dumps(document))


def set_operand(text: str, step: str, label: str, name: str | None) -> str:
    """With another model or step as an operand; `models.2` is the third of a list, one past its end a new one.

    None leaves out one that may be left out.
    """
    with _edited(text) as document:
        table = _step(document, step)
        key, _, index = label.partition(".")
        if not index:
            if name is None:
                table.pop(key, None)
            else:
                toml.write(table, key, name)
        else:
            _change_list(table, key, int(index), name)
    return _checked(tomlkit.dumps(document))


def _change_list(table: Any, key: str, index: int, name: str | None) -> None:
    listed = list(table[key].unwrap()) if key in table else []
    values = {
        parameter.name: table[parameter.name].unwrap()
        for parameter in mk.OPERATIONS[table["op"]].parameters
        if getattr(parameter.kind, "each", False) and isinstance(table.get(parameter.name), list)
    }
    if name is None:
        listed.pop(index)
        changed = {each: value[:index] + value[index + 1 :] for each, value in values.items()}
    elif index == len(listed):
        listed.append(name)
        changed = {each: [*value, 1.0] for each, value in values.items()}
    else:
        listed[index], changed = name, {}
    for each, value in {key: listed, **changed}.items():
        toml.write(table, each, value)


def set_method(text: str, step: str, op: str) -> str:
    """With another operation: operands go over in their order, parameters by their names."""
    with _edited(text) as document:
        table = _step(document, step)
        plain = table.unwrap()
        tail = toml.cut_tail(table)
        sources = [*document.get("models", {}), *(each for each in document.get("steps", {}) if each != step)]
        used = [name for name in labels(plain).values() if name]
        wanted = _step_values(op, used, others=sources, given=plain)
        for key in [key for key in table if key not in wanted]:
            table.remove(key)
        for key, value in wanted.items():
            if key not in table or table[key].unwrap() != value:
                toml.write(table, key, value)
        toml.put_in_order(table, list(wanted))
        toml.append_tail(table, tail)
    return _checked(tomlkit.dumps(document))


def set_output(text: str, name: str, key: str, value: Any) -> str:
    """With another value in an output: its model, its file, its dtype. A new output where there is none."""
    with _edited(text) as document:
        outputs = cast("Any", document.setdefault("outputs", tomlkit.table(is_super_table=True)))
        if name not in outputs:
            outputs.append(name, tomlkit.table())
        toml.write(outputs[name], key, value)
    return _checked(tomlkit.dumps(document))


def add_sample(text: str, of: Sequence[str], prompt: str, **settings: Any) -> str:
    """With pictures to draw at the end."""
    with _edited(text) as document:
        entry = tomlkit.table()
        for key, value in {"of": list(of), "prompt": prompt, **settings}.items():
            entry.append(key, toml.item_of(value))
        if "samples" not in document:
            document.append("samples", tomlkit.aot())
        cast("Any", document["samples"]).append(entry)
    return _checked(tomlkit.dumps(document))


def _step_values(
    op: str, names: Sequence[str], others: Sequence[str] = (), given: Mapping[str, Any] = {}
) -> dict[str, Any]:
    """A step's keys, as one would begin it: operands from `names`, then `others`; the first parameter to play with."""
    operation = mk.OPERATIONS[op]
    values: dict[str, Any] = {"op": op, **fitting(operation, names, others)}
    for number, parameter in enumerate(operation.parameters):
        if Kind.of(parameter) is Kind.FORMULA:
            values[parameter.name] = expression(names or others)
        elif parameter.name in given:
            values[parameter.name] = given[parameter.name]
        elif parameter.default is None or (number == 0 and Kind.of(parameter) is Kind.BLOCKS):
            options = getattr(parameter.kind, "options", ())
            values[parameter.name] = options[0] if options else 1.0 if parameter.default is None else parameter.default
    for key in ("extrapolate", *(("seed",) if operation.seeded else ())):
        if key in given:
            values[key] = given[key]
    return values


def _rename_uses(document: tomlkit.TOMLDocument, old: str, new: str) -> None:
    for table in document.get("steps", {}).values():
        for label, name in labels(table.unwrap()).items():
            if name == old:
                key, _, index = label.partition(".")
                toml.write(table, key, new) if not index else _change_list(table, key, int(index), new)
    for output in document.get("outputs", {}).values():
        for key in ("model", "vae"):
            if output.get(key) == old:
                toml.write(output, key, new)
    for sample in document.get("samples", ()):
        toml.write(sample, "of", [new if name == old else name for name in sample["of"]])


# --- checking ---------------------------------------------------------------------------------------------


def _parsed(text: str) -> tomlkit.TOMLDocument:
    """The text as a document; raises RecipeError where it is no recipe."""
    _checked(text)
    try:
        return tomlkit.parse(text)
    except TOMLKitError as error:
        raise _unedited() from error


@contextmanager
def _edited(text: str) -> Iterator[tomlkit.TOMLDocument]:
    document = _parsed(text)
    try:
        yield document
    except TOMLKitError as error:
        raise _unedited() from error


def _unedited() -> RecipeError:
    return RecipeError("This recipe is written in a way that only the Recipe screen can edit.")


def _checked(text: str) -> str:
    mk.parse_recipe(text, Path())
    return text


def _step(document: tomlkit.TOMLDocument, name: str) -> Any:
    steps = cast("Any", document.get("steps", {}))
    if name not in steps:
        raise UsageError(f'There is no step "{shown(name)}".')
    return steps[name]
