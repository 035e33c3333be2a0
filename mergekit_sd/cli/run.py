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
from mergekit_sd.cli.show import Talk, print_error, print_json
from mergekit_sd.errors import Cancelled, MergekitError
from mergekit_sd.text import shown

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
                reports.append(_planned(recipe, changes, as_json, options))
            else:
                with Talk(as_json) as talk:
                    report = mk.run(recipe, set=changes, on_event=talk, cancel=token, **options)
                _tell_run(report, as_json)
                reports.append(report.as_json())
        except Cancelled:
            raise
        except MergekitError as error:
            if not keep_going:
                raise
            print_error(error, as_json)
            failures.append((recipe, error))
    if as_json:
        print_json(_joined(reports, failures))
    return failures[0][1].exit_code if failures else 0


def _joined(reports: list[dict[str, Any]], failures: list[tuple[Path, MergekitError]]) -> dict[str, Any]:
    """One report of all recipes: a single one's own, or their outputs together."""
    if len(reports) == 1 and not failures:
        return reports[0]
    outputs = [output | {"recipe": report["recipe"]} for report in reports for output in report["outputs"]]
    failed = [{"recipe": str(recipe), "error": error.as_json()} for recipe, error in failures]
    return {"outputs": outputs, "recipes": reports, "failed": failed}


def _tell_run(report: mk.RunReport, as_json: bool) -> None:
    if as_json:
        return
    for output in report.outputs:
        counts = ", ".join(f"{number:,} {how}" for how, number in output.counts.items() if number)
        dropped = "".join(f", {number:,} {reason} dropped" for reason, number in output.dropped.items())
        click.echo(f"{shown(str(output.path))}: {counts}{dropped}; content {output.content_hash}")
        for name, number in output.clamped.items():
            click.echo(f"  clamped {number:,} in {shown(name)}", err=True)
    for name in report.skipped:
        click.echo(f"{shown(name)}: done already")


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
    report = _planned(recipe, parsed_overrides(overrides), as_json, options)
    if as_json:
        print_json(report)
    return 0


def _planned(recipe: Path, changes: dict[str, object], as_json: bool, options: dict[str, Any]) -> dict[str, Any]:
    """Print a plan (as text), then raise what a run would raise before computing."""
    from mergekit_sd.cli.plan_view import print_plan

    made = mk.plan(recipe, set=changes, output_root=options["output_root"], metadata=options["metadata"])
    report = mk.plan_as_json(made)
    if not as_json:
        print_plan(report)
    mk.check_run(made, force=options["force"])
    return report


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
        click.echo(f"warning: {shown(warning)}", err=True)
    models, steps, outputs = len(checked.models), len(checked.steps), len(checked.outputs)
    click.echo(f"{shown(str(recipe))}: sound ({models} models, {steps} steps, {outputs} outputs)")
    return 0
