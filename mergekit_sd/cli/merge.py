"""merge: one operation without writing a recipe first."""

from __future__ import annotations

import contextlib
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click

import mergekit_sd as mk
from mergekit_sd.cli.options import dry_run_option, engine_options, force_option, json_option
from mergekit_sd.cli.show import Talk, print_json, print_made
from mergekit_sd.errors import OutputIsInput, RecipeError, UsageError
from mergekit_sd.text import count

F = TypeVar("F", bound=Callable[..., Any])


def parameter_options(function: F) -> F:
    """One option for each parameter that some operation has."""
    for name in sorted({p.name for operation in mk.OPERATIONS.values() for p in operation.parameters}, reverse=True):
        users = [each.name for each in mk.OPERATIONS.values() if any(p.name == name for p in each.parameters)]
        text = f"A number, a preset, a list, or a TOML table of blocks ({', '.join(users)})."
        function = click.option(f"--{name}", metavar="WEIGHTS", help=text)(function)
    return function


@click.command("merge")
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="A B [C]")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The file to write: any path.",
)
@click.option("--method", default="weighted_sum", show_default=True, metavar="OP", help="The operation; see `ops`.")
@parameter_options
@click.option("--extrapolate", is_flag=True, help="Allow weights outside 0 to 1.")
@click.option(
    "--dtype",
    default="fp16",
    show_default=True,
    type=click.Choice([*mk.OUTPUT_DTYPES, "keep"]),
    help="Of the file's weights.",
)
@click.option("--vae", type=click.Path(path_type=Path), metavar="FILE", help="Bake this VAE: a VAE file or a model.")
@click.option("--title", metavar="TEXT", help="The title in the file's metadata.  [default: the models' names]")
@click.option(
    "--save-recipe",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the recipe, too, with --dry-run as well; `run` makes the same file of it.",
)
@force_option
@dry_run_option
@engine_options
@json_option
@click.pass_obj
def merge_command(
    token: mk.CancelToken,
    /,
    models: tuple[Path, ...],
    output: Path,
    method: str,
    vae: Path | None,
    save_recipe: Path | None,
    as_json: bool,
    dry_run: bool,
    force: bool,
    dtype: str,
    title: str | None,
    **options: Any,
) -> int:
    """Merge models: A B [C] in the order of the operation's operands."""
    operation = mk.find_operation(method)
    _check_number(models, operation)
    weights = _weights(options, [parameter.name for parameter in operation.parameters])
    opened = {path: mk.open(path) for path in [*models, *([vae] if vae else [])]}
    with _said_by_options():
        node = getattr(mk.ops, operation.name)(*(opened[model] for model in models), **weights)
        recipe = mk.recipe_of(node, output, dtype=dtype, title=title, vae=opened[vae] if vae else None)
        if dry_run:
            return _dry_run(recipe, as_json, force, save_recipe, options["metadata"])
        with _saved(recipe, save_recipe, force) as recipe, Talk(as_json) as talk:
            report = mk.run(recipe, anywhere=True, on_event=talk, cancel=token, force=force, **options)
    print_json(report.as_json()) if as_json else print_made(report)
    return 0


def _check_number(models: tuple[Path, ...], operation: Any) -> None:
    """As many models as the operation has operands; else name the operations that take so many."""
    wanted = len(operation.operands)
    if len(models) != wanted:
        others = [name for name, each in mk.OPERATIONS.items() if len(each.operands) == len(models)]
        names = ", ".join(operand.name for operand in operation.operands)
        raise UsageError(
            f"{operation.name} takes {count(wanted, 'model')} ({names}), not {len(models)}.",
            key="--method",
            hint=f"for {len(models)}: --method {', '.join(others)}" if others else f"give {wanted}",
        )


@contextlib.contextmanager
def _said_by_options() -> Iterator[None]:
    """Refusals name what was typed, not the recipe that it became."""
    try:
        yield
    except (RecipeError, OutputIsInput) as error:
        if error.line is not None or not error.key:  # it points into a recipe that was saved
            raise
        _, _, key, *rest = [*error.key.split(".", 3), "", ""]
        option = {"file": "output", "model": "method"}.get(key, key)
        beyond = error.hint and "extrapolate = true" in error.hint
        raise type(error)(
            error.message,
            file=error.file,
            key=f"--{option} {' '.join(rest)}".strip(),
            hint="if you mean to go beyond, give --extrapolate" if beyond else error.hint,
            details=error.details,
        ) from error


@contextlib.contextmanager
def _saved(recipe: mk.Recipe, path: Path | None, force: bool) -> Iterator[mk.Recipe]:
    """The recipe as saved, so that it is what runs: the same bytes when it is run again. Gone after a failure."""
    if path is None:
        yield recipe
        return
    before = path.read_bytes() if force and path.is_file() else None
    mk.plan(recipe, anywhere=True)  # what is wrong with the options is told without a file that holds them
    mk.save_recipe(recipe, path, force=force)
    try:
        yield mk.load(path)
    except BaseException:
        path.unlink() if before is None else path.write_bytes(before)
        raise


def _dry_run(recipe: mk.Recipe, as_json: bool, force: bool, save_recipe: Path | None, metadata: Any) -> int:
    from mergekit_sd.cli.plan_view import tell_plan

    with _saved(recipe, save_recipe, force) as recipe:
        made = mk.plan(recipe, anywhere=True, metadata=metadata)
    report, problem = tell_plan(made, force=force, as_json=as_json)
    if as_json:
        print_json(report)
    return problem.exit_code if problem else 0


def _weights(options: dict[str, Any], known: list[str]) -> dict[str, Any]:
    """Take the parameters' options out of `options`, read as a recipe would read them."""
    every = {p.name for operation in mk.OPERATIONS.values() for p in operation.parameters}
    given = {name: options.pop(name) for name in every}
    extrapolate = options.pop("extrapolate")
    for name, text in given.items():
        if text is not None and name not in known:
            takes = ", ".join(f"--{each}" for each in known) or "none"
            raise UsageError("This operation has no such parameter.", key=f"--{name}", hint=f"it takes: {takes}")
    weights = {name: _read(name, text) for name, text in given.items() if text is not None}
    return weights | ({"extrapolate": True} if extrapolate else {})


def _read(name: str, text: str) -> Any:
    """A number, array or table as TOML reads it; anything else is a preset or a pasted list."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        if text.lstrip()[:1] in ("{", "["):
            example = '{ default = 0.3, "OUT03-OUT05" = 0.8 }' if "{" in text else "[0.5, 0, 0.1, …]"
            raise UsageError(f"This is not TOML: {error}.", key=f"--{name}", hint=f"write {example}") from error
        return text
