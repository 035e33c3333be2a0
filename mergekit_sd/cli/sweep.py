"""sweep: pictures of all variants of a recipe whose values say `{ try = […] }`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import mergekit_sd as mk
from mergekit_sd.cli.options import force_option, json_option, parsed_overrides, set_option
from mergekit_sd.cli.sample import MACHINE, asked_of, finish, machine_options, picture_options, told_as_options
from mergekit_sd.cli.show import Talk


@click.command("sweep")
@click.argument("recipe", type=click.Path(path_type=Path))
@picture_options
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="DIR", help="The folder of the pictures.")
@click.option("--strict", is_flag=True, help="End with code 3 where a check fails.")
@machine_options
@set_option
@force_option
@json_option
@click.pass_obj
def sweep_command(
    token: mk.CancelToken,
    /,
    recipe: Path,
    output: Path | None,
    strict: bool,
    overrides: tuple[str, ...],
    force: bool,
    as_json: bool,
    **given: Any,
) -> int:
    """Draw every variant of RECIPE, where steps say `alpha = { try = [0.2, 0.4] }`, side by side; write no model.

    The recipe's samples are drawn, or --prompt. What it says at the end writes the variant that you choose.
    """
    machine = {name: given.pop(name) for name in MACHINE}
    machine["checks"] = machine["checks"] or "quick"
    folder = output or Path(f"{recipe.stem}-sweep")
    mk.check_samples_folder(folder, force=force)
    asked = asked_of(given)
    with told_as_options(asked), Talk(as_json) as talk:
        options = mk.SampleOptions(**machine)
        changes = parsed_overrides(overrides)
        report = mk.sweep(recipe, set=changes, options=options, on_event=talk, cancel=token, **asked)
    return finish(report, folder, force=force, strict=strict, as_json=as_json)
