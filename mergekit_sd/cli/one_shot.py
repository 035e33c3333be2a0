"""What the one-shot commands share: an operation becomes a recipe, the recipe a file.

Owns their common options and how refusals are said in the options' words.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

import mergekit_sd as mk
from mergekit_sd.cli.options import dry_run_option, engine_options, force_option, json_option, together
from mergekit_sd.cli.show import Talk, print_json, print_made, print_samples
from mergekit_sd.errors import OutputIsInput, RecipeError

F = TypeVar("F", bound=Callable[..., Any])


def one_shot_options(dtype: str) -> Callable[[F], F]:
    """The options of a command that writes one file; `dtype` is what it writes unless told."""
    return together(
        click.option(
            "-o",
            "--output",
            required=True,
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="The file to write: any path.",
        ),
        click.option(
            "--dtype",
            default=dtype,
            show_default=True,
            type=click.Choice([*mk.OUTPUT_DTYPES, "keep"]),
            help="Of the file's weights.",
        ),
        click.option("--title", metavar="TEXT", help="The title in the file's metadata.  [default: the models' names]"),
        click.option(
            "--save-recipe",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="Write the recipe, too, with --dry-run as well; `run` makes the same file of it.",
        ),
        force_option,
        dry_run_option,
        engine_options,
        json_option,
    )


def carry_out(
    token: mk.CancelToken,
    node: Any,
    *,
    output: Path,
    dtype: str,
    title: str | None,
    save_recipe: Path | None,
    as_json: bool,
    dry_run: bool,
    force: bool,
    metadata: Any,
    seed: int | None = None,
    vae: Any = None,
    tell: Callable[[mk.RunReport], None] = print_made,
    keys: Mapping[str, Any] = {},
    drawn: Callable[[], mk.Recipe] | None = None,
    **options: Any,
) -> int:
    """Make the file that `node` says, or tell what it would be; the exit code.

    `keys`: more of the recipe's output. `tell`: prints what was made, for people. `drawn`: the recipe of the
    pictures that are drawn once the file is there.
    """
    with _said_by_options():
        recipe = mk.recipe_of(node, output, dtype=dtype, title=title, vae=vae, seed=seed, **keys)
        if dry_run:
            return _dry_run(recipe, as_json, force, save_recipe, metadata)
        with _saved(recipe, save_recipe, force) as recipe, Talk(as_json) as talk:
            report = mk.run(
                recipe, anywhere=True, on_event=talk, cancel=token, force=force, metadata=metadata, **options
            )
    if drawn:
        with Talk(as_json) as talk:
            report = mk.draw_beside(report, drawn(), force=force, on_event=talk, cancel=token)
    print_json(report.as_json()) if as_json else tell(report)
    if report.samples and not as_json and tell is not print_made:
        print_samples(report.samples)
    return 0


@contextlib.contextmanager
def _said_by_options() -> Iterator[None]:
    """Refusals name what was typed, not the recipe that it became."""
    try:
        yield
    except (RecipeError, OutputIsInput) as error:
        if error.line is not None or not error.key:  # it points into a recipe that was saved
            raise
        _, _, key, *rest = [*error.key.split(".", 3), "", ""]
        option = {"file": "output", "model": "method"}.get(key, key.replace("_", "-"))
        if key == "loras":  # which of them is told by the words
            option, rest = ("blocks", []) if "blocks" in rest[0] else ("", [])
        beyond = error.hint and "extrapolate = true" in error.hint
        raise type(error)(
            error.message,
            file=error.file,
            key=f"--{option} {' '.join(rest)}".strip() if option else "LORA",
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
