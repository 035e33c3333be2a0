"""merge: one operation without writing a recipe first."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

import mergekit_sd as mk
from mergekit_sd.cli.options import dry_run_option, engine_options, force_option, json_option
from mergekit_sd.cli.show import Talk, print_json
from mergekit_sd.errors import UsageError
from mergekit_sd.text import shown

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
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The file to write: any path.")
@click.option("--method", default="weighted_sum", show_default=True, help="The operation; see `ops`.")
@parameter_options
@click.option("--extrapolate", is_flag=True, help="Allow weights outside 0 to 1.")
@click.option("--dtype", default="fp16", show_default=True, type=click.Choice([*mk.OUTPUT_DTYPES, "keep"]))
@click.option("--vae", type=click.Path(path_type=Path), help="Bake this VAE.")
@click.option("--title", help="The title in the file's metadata.")
@click.option("--save-recipe", type=click.Path(path_type=Path), metavar="FILE", help="Write the recipe, too.")
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
) -> None:
    """Merge two or three models: A B [C] in the order of the operation's operands."""
    operation = mk.find_operation(method)
    weights = _weights(options, [parameter.name for parameter in operation.parameters])
    node = getattr(mk.ops, operation.name)(*(mk.open(model) for model in models), **weights)
    recipe = mk.recipe_of(node, output, dtype=dtype, title=title, vae=mk.open(vae) if vae else None)
    if save_recipe:
        mk.save_recipe(recipe, save_recipe, force=force)
    if dry_run:
        _dry_run(recipe, as_json, force, options["metadata"])
        return
    with Talk(as_json) as talk:
        report = mk.run(recipe, anywhere=True, on_event=talk, cancel=token, force=force, **options)
    if as_json:
        print_json(report.as_json())
        return
    made = report.outputs[0]
    counts = ", ".join(f"{number:,} {how}" for how, number in made.counts.items() if number)
    click.echo(f"{shown(str(made.path))}: {counts}; content {made.content_hash}")


def _dry_run(recipe: mk.Recipe, as_json: bool, force: bool, metadata: Any) -> None:
    from mergekit_sd.cli.plan_view import print_plan

    made = mk.plan(recipe, anywhere=True, metadata=metadata)
    report = mk.plan_as_json(made)
    print_json(report) if as_json else print_plan(report)
    mk.check_run(made, force=force)


def _weights(options: dict[str, Any], known: list[str]) -> dict[str, Any]:
    """Take the parameters' options out of `options`, read as a recipe would read them."""
    every = {p.name for operation in mk.OPERATIONS.values() for p in operation.parameters}
    given = {name: options.pop(name) for name in every}
    extrapolate = options.pop("extrapolate")
    for name, text in given.items():
        if text is not None and name not in known:
            raise UsageError(f"This operation has no parameter --{name}.", hint=f"it takes: {', '.join(known)}")
    weights = {name: _read(text) for name, text in given.items() if text is not None}
    return weights | ({"extrapolate": True} if extrapolate else {})


def _read(text: str) -> Any:
    """A number, array or table as TOML reads it; anything else is a preset or a pasted list."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
