"""run, plan, check: recipes on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import mergekit_sd as mk
from mergekit_sd.cli.options import (
    dry_run_option,
    engine_options,
    force_option,
    json_option,
    metadata_option,
    output_root_option,
    parsed_overrides,
    set_option,
)
from mergekit_sd.cli.show import Talk, print_error, print_json, print_made, print_warning, wrong_pictures
from mergekit_sd.errors import Cancelled, MergekitError
from mergekit_sd.text import count, shown

RECIPES = click.argument("recipes", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RECIPE…")
RECIPE = click.argument("recipe", type=click.Path(path_type=Path))


@click.command("run")
@RECIPES
@set_option
@dry_run_option
@force_option
@click.option("--keep-going", is_flag=True, help="Go on with the next recipe after a failure.")
@click.option("--skip-done", is_flag=True, help="Skip recipes that their lock says are done.")
@click.option("--locked", is_flag=True, help="Refuse to differ from the recipe's lock.")
@click.option("--samples/--no-samples", default=True, help="Draw what the recipe's samples ask for, or nothing.")
@click.option("--strict", is_flag=True, help="End with code 3 where a check of the pictures fails.")
@click.option("--hash", "sha256", is_flag=True, help="Put the sha256 of every input into the lock.")
@output_root_option
@engine_options
@json_option
@click.pass_obj
def run_command(
    token: mk.CancelToken,
    /,
    recipes: tuple[Path, ...],
    overrides: tuple[str, ...],
    dry_run: bool,
    keep_going: bool,
    strict: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Make every output of one or more recipes, each in one streaming pass."""
    changes = parsed_overrides(overrides)
    reports: list[dict[str, Any]] = []
    failures: list[tuple[Path, MergekitError]] = []
    for recipe in recipes:
        try:
            if dry_run:
                report, problem = _planned(recipe, changes, as_json, options)
                reports.append(report)
            else:
                report, problem = _made(recipe, changes, token, as_json, strict, options)
                reports.append(report)
        except MergekitError as error:
            print_error(error, as_json)
            problem = error
        if problem:
            failures.append((recipe, problem))
            if isinstance(problem, Cancelled) or not keep_going:
                break
    if as_json:
        print_json(_joined(reports, failures, len(recipes)))
    return _exit_code([error for _, error in failures])


def _made(
    recipe: Path,
    changes: dict[str, object],
    token: mk.CancelToken,
    as_json: bool,
    strict: bool,
    options: dict[str, Any],
) -> tuple[dict[str, Any], MergekitError | None]:
    """Run a recipe and print what it made; for the report, too, what --strict finds wrong with the pictures."""
    with Talk(as_json) as talk:
        report = mk.run(recipe, set=changes, on_event=talk, cancel=token, **options)
    if not as_json:
        print_made(report)
    problem = wrong_pictures(report.samples["checks"]) if strict and report.samples else None
    if problem:
        print_error(problem, as_json)
    return report.as_json(), problem


def _exit_code(errors: list[MergekitError]) -> int:
    """The first failure's, but a cancellation's before all."""
    told = [error for error in errors if isinstance(error, Cancelled)] or errors
    return told[0].exit_code if told else 0


def _joined(reports: list[dict[str, Any]], failures: list[tuple[Path, MergekitError]], recipes: int) -> dict[str, Any]:
    """One report of all recipes: a single one's own, or their outputs together; the first failure as "error"."""
    error = {"error": failures[0][1].as_json()} if failures else {}
    if recipes == 1:
        return (reports[0] if reports else {}) | error
    outputs = [output | {"recipe": report["recipe"]} for report in reports for output in report["outputs"]]
    failed = [{"recipe": str(recipe), "error": error.as_json()} for recipe, error in failures]
    return {"outputs": outputs, "recipes": reports, "failed": failed, **error}


@click.command("plan")
@RECIPE
@set_option
@force_option
@output_root_option
@metadata_option
@json_option
def plan_command(recipe: Path, overrides: tuple[str, ...], as_json: bool, **options: Any) -> int:
    """Tell what a run would do, before any weight is read.

    Sizes, dtypes, each block's weight per step, what is merged, kept, dropped and copied. Ends
    with the exit code that `run` would have by then.
    """
    report, problem = _planned(recipe, parsed_overrides(overrides), as_json, options)
    if as_json:
        print_json(report)
    return problem.exit_code if problem else 0


def _planned(
    recipe: Path, changes: dict[str, object], as_json: bool, options: dict[str, Any]
) -> tuple[dict[str, Any], MergekitError | None]:
    """Print a plan (as text), and what a run would raise before computing; both for the report, too."""
    from mergekit_sd.cli.plan_view import tell_plan

    made = mk.plan(recipe, set=changes, output_root=options["output_root"], metadata=options["metadata"])
    return tell_plan(made, force=options["force"], as_json=as_json)


@click.command("check")
@RECIPE
@set_option
@json_option
def check_command(recipe: Path, overrides: tuple[str, ...], as_json: bool) -> int:
    """Check a recipe's language, names, weights and numbers. No model is opened."""
    checked = mk.load(recipe, parsed_overrides(overrides))
    if as_json:
        warnings = list(checked.warnings)
        print_json({"recipe": str(recipe), "ok": True, "warnings": warnings, "outputs": list(checked.outputs)})
        return 0
    for warning in checked.warnings:
        print_warning(warning)
    parts = {"model": len(checked.models), "step": len(checked.steps), "output": len(checked.outputs)}
    if checked.samples:
        parts["sample"] = len(checked.samples)
    click.echo(f"{shown(str(recipe))}: sound ({', '.join(count(n, noun) for noun, n in parts.items())})")
    return 0
