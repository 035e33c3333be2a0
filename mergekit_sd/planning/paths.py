"""Where inputs and outputs lie, and that no output destroys what is read. No file is opened here."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import TypeAlias

from mergekit_sd.errors import MissingInput, OutputExists, OutputIsInput, PinMismatch, RecipeError
from mergekit_sd.recipe.load import Recipe
from mergekit_sd.recipe.lock import lock_path, read_lock
from mergekit_sd.recipe.roots import input_path, load_roots, output_path
from mergekit_sd.text import count, did_you_mean, shown


@dataclass(frozen=True, slots=True)
class Sought:
    """A model that is not where its recipe says.

    `name` is the recipe's name for it and `file` its path there, `sha256` its pin, `content` its whole
    content hash when it was used last.
    """

    name: str
    file: str
    sha256: str | None
    content: str | None


@dataclass(frozen=True, slots=True)
class Findings:
    """Where else a model lies: certainly it (by its hash), or files that are only called so."""

    same: tuple[Path, ...] = ()
    named: tuple[Path, ...] = ()


Finder: TypeAlias = Callable[[Sought], Findings]


def resolve_inputs(
    recipe: Recipe, names: list[str], search: Sequence[Path] = (), find: Finder = lambda _: Findings()
) -> tuple[dict[str, Path], list[str]]:
    """The path of each model that is used, and a note for each that was found elsewhere.

    One that is not there is looked for by name in `search`, then by `find`. Raises MissingInput with
    all that are missing, where they are several or `find` knows a file of that name.
    """
    roots = load_roots()
    paths = {name: input_path(recipe.models[name].file, recipe.folder, roots) for name in names}
    notes: list[str] = []
    missing: dict[str, Findings] = {}
    for name, path in paths.items():
        file = PureWindowsPath(path).name.rpartition(":")[2]  # without a root's prefix
        elsewhere = (folder / file for folder in search)
        paths[name] = path if path.exists() else next((found for found in elsewhere if found.is_file()), path)
        if not os.path.lexists(paths[name]):
            found = find(_sought(recipe, name))
            if found.same:
                paths[name] = found.same[0]
                notes.append(f'"{name}" is not where the recipe says; by its hash it is {shown(str(paths[name]))}')
                continue
            missing[name] = found
        _check_prefix(recipe, name, paths[name], roots)
    if len(missing) > 1 or any(found.named for found in missing.values()):
        raise _missing(paths, missing)
    return paths, notes


def _sought(recipe: Recipe, name: str) -> Sought:
    try:
        lock = read_lock(lock_path(recipe.path)) if recipe.path else None
    except PinMismatch:  # it cannot be read: it helps no one
        lock = None
    locked = lock.inputs.get(name) if lock else None
    pin = recipe.models[name].sha256 or (locked.sha256 if locked else None)
    return Sought(name, recipe.models[name].file, pin, locked.file if locked else None)


def _missing(paths: Mapping[str, Path], missing: Mapping[str, Findings]) -> MissingInput:
    """Every model that is missing, with the files that are called so."""
    details = []
    for name, found in missing.items():
        known = f"; called so: {', '.join(shown(str(path)) for path in found.named)}" if found.named else ""
        details.append(f"{name}: {shown(str(paths[name]))}{known}")
    first = next(iter(missing))
    others = f", and {count(len(missing) - 1, 'other model')}" if len(missing) > 1 else ""
    return MissingInput(
        f"There is no such file{others}.",
        file=paths[first],
        key=f"models.{first}",
        hint="change the paths; pinned models are found wherever `mergekit-sd library scan --sha256` saw them",
        details=details,
    )


def _check_prefix(recipe: Recipe, name: str, path: Path, roots: Mapping[str, Path]) -> None:
    """A file that is nowhere and looks as if it had a root's prefix: say which root is missing."""
    prefix, colon, rest = recipe.models[name].file.partition(":")
    if colon and len(prefix) > 1 and prefix not in roots and not os.path.lexists(path):
        raise MissingInput(
            f'There is no such file, and no root called "{shown(prefix)}" to look for "{shown(rest)}" in.',
            file=path,
            key=f"models.{name}",
            hint=did_you_mean(prefix, roots) if roots else f"mergekit-sd roots add {shown(prefix)} DIR",
        )


def resolve_outputs(recipe: Recipe, names: list[str], output_root: Path | None, anywhere: bool) -> dict[str, Path]:
    """The path of each output; `anywhere` for the one-shot commands, whose `-o` takes any path."""
    roots = load_roots()
    paths: dict[str, Path] = {}
    for name in names:
        text = recipe.outputs[name].file
        where = ("outputs", name, "file")
        try:
            paths[name] = recipe.folder / text if anywhere else output_path(text, recipe.folder, output_root, roots)
        except RecipeError as error:
            raise recipe.error(error.message, where, hint=error.hint) from None
        twin = next((n for n in paths if n != name and same_file(paths[n], paths[name])), None)
        if twin:
            raise recipe.error(f'"{name}" and "{twin}" write one file.', where, hint="give each its own file")
    return paths


def same_file(one: Path, other: Path) -> bool:
    """Whether two paths lead to one file: through links of both kinds, `./`, or letter case."""
    try:
        return one.samefile(other)
    except OSError:  # one of them does not exist: compare where they would lie
        return os.path.normcase(os.path.realpath(one)) == os.path.normcase(os.path.realpath(other))


def check_apart(recipe: Recipe, inputs: Mapping[str, Path], outputs: Mapping[str, Path]) -> None:
    """Raises OutputIsInput where a target is an input, the recipe itself or its lock."""
    own = {"the recipe": recipe.path, "its lock": lock_path(recipe.path)} if recipe.path else {}
    read = {f'the input "{name}"': path for name, path in inputs.items()} | own
    for name, target in outputs.items():
        for what, path in read.items():
            if same_file(target, path):
                place = recipe.error("", ("outputs", name, "file"))
                raise OutputIsInput(
                    f'The output "{name}" would overwrite {what}.',
                    file=target,
                    key=place.key,
                    line=place.line,
                    column=place.column,
                    hint="give the output another name",
                )


def check_new(outputs: Mapping[str, Path], force: bool) -> None:
    """Raises OutputExists where a target is there already, unless `force`."""
    for name, target in outputs.items():
        if target.exists() and not force:
            raise OutputExists(f'The output "{name}" exists already.', file=target, hint="give --force to replace it")
