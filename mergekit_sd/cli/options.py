"""Options that several commands share, each declared once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from mergekit_sd.errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])

json_option = click.option("--json", "as_json", is_flag=True, help="One report as JSON on stdout, progress on stderr.")
force_option = click.option("--force", is_flag=True, help="Replace an output that exists.")
dry_run_option = click.option("--dry-run", is_flag=True, help="Tell what would be done, and stop.")
threads_option = click.option(
    "--threads", type=click.IntRange(1, 256), metavar="N", help="Threads; the bytes do not depend on it."
)
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change the recipe: steps.mix.alpha=0.4."
)
output_root_option = click.option(
    "--output-root",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Outputs go below this folder instead of the recipe's.",
)
metadata_option = click.option(
    "--metadata",
    type=click.Choice(["full", "webui", "none"]),
    default="full",
    show_default=True,
    help="What the file says of itself; webui adds A1111's merge record.",
)
device_option = click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Where to compute.",
)
allow_nonfinite_option = click.option("--allow-nonfinite", is_flag=True, help="Write NaN and Inf all the same.")
scan_option = click.option("--scan", is_flag=True, help="Look for NaN and Inf in tensors that are only copied, too.")


def together(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator, shown in the order given."""

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


engine_options = together(threads_option, device_option, allow_nonfinite_option, scan_option, metadata_option)


def parsed_overrides(pairs: tuple[str, ...]) -> dict[str, object]:
    """`KEY=VALUE` texts as a mapping."""
    found: dict[str, object] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise UsageError(f'"{pair}" is not KEY=VALUE.', hint="write --set steps.mix.alpha=0.4")
        found[key.strip()] = value.strip()
    return found
