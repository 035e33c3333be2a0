"""A plan as a person reads it: inputs, steps with their block weights, outputs, problems."""

from __future__ import annotations

import sys
from typing import Any

import mergekit_sd as mk
from mergekit_sd.cli.layout import width
from mergekit_sd.cli.show import console, print_error, print_warning, row, table
from mergekit_sd.errors import MergekitError
from mergekit_sd.text import size


def tell_plan(plan: Any, *, force: bool, as_json: bool) -> tuple[dict[str, Any], MergekitError | None]:
    """Print a plan (as text), and what a run would raise before it computes; both for the report, too."""
    report = mk.plan_as_json(plan)
    if not as_json:
        print_plan(report)
    try:
        mk.check_run(plan, force=force)
    except MergekitError as error:
        print_error(error, as_json)
        return report | {"error": error.as_json()}, error
    return report, None


def print_plan(plan: dict[str, Any]) -> None:
    """Print the plan that `plan_as_json` gave."""
    out = console()
    inputs = table("model", "kind", "size", "path", right=["size"])
    for each in plan["inputs"]:
        kind = each["architecture"] or each["kind"]
        row(inputs, each["name"], kind, size(each["bytes"]), each["path"])
    out.print(inputs)
    for line in mk.plan_lines(plan, width(), bars=_has_bars()):
        out.print(line, soft_wrap=True)  # a path is left to the terminal
    for warning in plan["warnings"]:
        print_warning(warning)


def _has_bars() -> bool:
    """Whether stdout can say a bar: "0.5" with a stand-in for it would read as another number."""
    try:
        "▁▂▃▄▅▆▇█".encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True
