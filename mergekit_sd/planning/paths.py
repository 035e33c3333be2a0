"""Where inputs and outputs lie, and that no output destroys what is read. No file is opened here."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PureWindowsPath

from mergekit_sd.errors import MissingInput, OutputExists, OutputIsInput, RecipeError
from mergekit_sd.recipe.load import Recipe
from mergekit_sd.recipe.lock import lock_path
from mergekit_sd.recipe.roots import input_path, load_roots, output_path
from mergekit_sd.text import did_you_mean, shown


def resolve_inputs(recipe: Recipe, names: list[str], search: Sequence[Path] = ()) -> dict[str, Path]:
    """The path of each model that is used; one that is not there is looked for by name in `search`."""
    roots = load_roots()
    paths = {name: input_path(recipe.models[name].file, recipe.folder, roots) for name in names}
    for name, path in paths.items():
        file = PureWindowsPath(path).name.rpartition(":")[2]  # without a root's prefix
        elsewhere = (folder / file for folder in search)
        paths[name] = path if path.exists() else next((found for found in elsewhere if found.is_file()), path)
        _check_prefix(recipe, name, paths[name], roots)
    return paths


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
