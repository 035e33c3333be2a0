"""ops, presets, schema: what can be written in a recipe. Nothing here opens a file or computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click
from click.shell_completion import CompletionItem

import mergekit_sd as mk
from mergekit_sd.cli.layout import entry
from mergekit_sd.cli.options import json_option
from mergekit_sd.cli.show import print_json
from mergekit_sd.errors import UsageError
from mergekit_sd.text import did_you_mean, shown

BARS = "▁▂▃▄▅▆▇█"
# What an SDXL UNet has not: IN09 to IN11 and OUT09 to OUT11.
ONLY_SD1 = {f"{side}{number:02}" for side in ("IN", "OUT") for number in (9, 10, 11)}

# --- ops ----------------------------------------------------------------------------------------------


def _complete_ops(_context: click.Context, _parameter: click.Parameter, typed: str) -> list[CompletionItem]:
    operations = [each for section in mk.by_purpose().values() for each in section]
    return [CompletionItem(each.name, help=each.summary) for each in operations if each.name.startswith(typed)]


@click.command("ops")
@click.argument("name", required=False, shell_complete=_complete_ops)
@json_option
def ops_command(name: str | None, as_json: bool) -> None:
    """List the merge operations, or explain one: by its name, or by another tool's name for it."""
    if name is not None:
        described = mk.describe_operation(mk.find_operation(name))
        print_json(described) if as_json else _print_operation(described)
        return
    sections = mk.by_purpose()
    every = [operation for section in sections.values() for operation in section]
    if as_json:
        print_json({"operations": [mk.describe_operation(operation) for operation in every]})
        return
    column = max(len(operation.name) for operation in every) + 4
    for purpose, section in sections.items():
        click.echo(f"{purpose}:")
        for operation in section:
            click.echo(entry(operation.name, operation.formula, column))
        click.echo()
    click.echo("mergekit-sd ops NAME explains one; another tool's name will do.")


def _print_operation(operation: dict[str, Any]) -> None:
    click.echo(entry(operation["name"], operation["summary"], 2, indent=0))
    if operation["notes"]:
        click.echo(entry("", operation["notes"], 2, indent=0))
    click.echo()
    lines = [("for", operation["purpose"]), ("formula", operation["formula"])]
    lines += [(each["name"], each["takes"]) for each in (*operation["operands"], *operation["parameters"])]
    lines.append(("gives", operation["gives"]))
    lines.append(("works", operation["works"]))
    if operation["seeded"]:
        lines.append(("seed", "random numbers depend on the seed and the tensor's name alone"))
    for fold in operation["folds"]:
        where = ", ".join(f"{name} = {value:g}" for name, value in fold["where"].items())
        lines.append(("copies", f"{fold['copy_of']} where {where}"))
    lines += [("elsewhere", alias) for alias in operation["also"]]
    column = max(len(label) for label, _ in lines) + 4
    for number, (label, text) in enumerate(lines):
        repeated = number > 0 and lines[number - 1][0] == label
        click.echo(entry("" if repeated else label, text, column))
    click.echo("\nIn a recipe:\n")
    click.echo("".join(f"  {line}\n" if line else "\n" for line in operation["recipe"].splitlines()))
    if operation["command"]:
        click.echo(f"Without a recipe:\n\n  {_folded(operation['command'])}")


def _folded(command: str) -> str:
    """The command in lines that a shell takes as one."""
    return command.replace(" --method", " \\\n    --method").replace(" -o ", " \\\n    -o ")


# --- presets ------------------------------------------------------------------------------------------


def _complete_presets(_context: click.Context, _parameter: click.Parameter, typed: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in mk.PRESETS if name.startswith(typed.upper())]


@click.command("presets")
@click.argument("name", required=False, shell_complete=_complete_presets)
@json_option
def presets_command(name: str | None, as_json: bool) -> None:
    """List the block weight presets with their curves, or print one's numbers."""
    if name is not None:
        exact = mk.find_preset(name)
        if exact is None:
            raise UsageError(f'There is no preset "{shown(name)}".', hint=did_you_mean(name, mk.PRESETS))
        described = _describe(exact)
        print_json(described) if as_json else _print_preset(described)
        return
    every = [_describe(exact) for exact in mk.PRESETS]
    if as_json:
        print_json({"presets": every})
        return
    column = max(map(len, mk.PRESETS)) + 2
    click.echo(f"{'':{column}}base  IN00 to 11  M00  OUT00 to 11")
    for preset in every:
        click.echo(f"{preset['name']:{column}}{preset['base']:<4g}  {_curve(list(preset['blocks'].values()))}")
    click.echo("\nmergekit-sd presets NAME prints the numbers.")


def _describe(exact: str) -> dict[str, Any]:
    base, values = mk.preset(exact)
    blocks = dict(zip(mk.SD_BLOCKS, values, strict=True))
    small = [value for block, value in blocks.items() if block not in ONLY_SD1]
    return {
        "name": exact,
        "base": base,
        "blocks": blocks,
        "text": _comma_text([base, *values]),
        "sdxl_text": _comma_text([base, *small]),
    }


def _comma_text(values: Sequence[float]) -> str:
    """The numbers as the WebUI takes them, so exact that pasting them gives the preset's bytes."""
    return ",".join(f"{value:g}" if float(f"{value:g}") == value else repr(value) for value in values)


def _bar(value: float) -> str:
    return BARS[round(min(max(value, 0.0), 1.0) * (len(BARS) - 1))]


def _curve(values: Sequence[float]) -> str:
    bars = "".join(map(_bar, values))
    return f"{bars[:12]}  {bars[12]}    {bars[13:]}"


def _print_preset(preset: dict[str, Any]) -> None:
    click.echo(preset["name"])
    click.echo("\n26 numbers, base first, as the WebUI and recipes take them:\n")
    click.echo(preset["text"])
    click.echo("\n20 for SDXL:\n")
    click.echo(preset["sdxl_text"])
    click.echo("\nBlock by block:\n")
    cells = {"base": [("base", preset["base"])]}
    for block, value in preset["blocks"].items():
        cells.setdefault(block.rstrip("0123456789"), []).append((block, value))
    for group in cells.values():
        for start in range(0, len(group), 4):
            row = [f"{block:5} {_bar(value)} {value:<7.4g}" for block, value in group[start : start + 4]]
            click.echo(f"  {'  '.join(row)}".rstrip())


# --- schema -------------------------------------------------------------------------------------------


@click.command("schema")
@json_option
def schema_command(as_json: bool) -> None:  # noqa: ARG001  (every command that reports takes it)
    """Print the JSON Schema of a recipe, for editors; it is JSON with or without --json."""
    print_json(mk.recipe_json_schema())
