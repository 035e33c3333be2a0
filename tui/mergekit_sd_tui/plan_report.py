"""What the Recipe screen says of a recipe, its problem and its plan.

Must not know widgets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

import mergekit_sd as mk
from mergekit_sd.errors import MergekitError, OutputExists
from mergekit_sd.text import count, shown, size
from mergekit_sd_tui.glyphs import takes_unicode

MOST_DETAILS = 3


def parts(recipe: mk.Recipe) -> str:
    """What is in a sound recipe: "2 models, 1 step, 1 output"."""
    models, steps, outputs, samples = recipe.models, recipe.steps, recipe.outputs, recipe.samples
    found = {"model": len(models), "step": len(steps), "output": len(outputs), "sample": len(samples)}
    return ", ".join(count(number, noun) for noun, number in found.items() if number)


def problem(error: MergekitError, *, named: bool) -> Text:
    """An error: where, what, what to do. `named`: with the file's name, where that is not the recipe's own."""
    where = f"line {error.line}" if error.line else ""
    where += f", column {error.column}" if where and error.column else ""
    text = Text()
    if where or error.key:
        text.append(" at ".join(part for part in (where, shown(error.key or "")) if part) + ": ", style="bold")
    text.append(shown(error.message))
    if named and error.file:
        text.append(f"\n{shown(error.file)}")
    for detail in error.details[:MOST_DETAILS]:
        text.append(f"\n- {shown(detail)}")
    if error.hint:
        text.append(f"\n{shown(error.hint)}", style="italic")
    return text


def placed(error: MergekitError, recipe: mk.Recipe) -> MergekitError:
    """An error that planning found, with the line of what it is about, as far as its key or its file tells that."""
    if error.line or isinstance(error, OutputExists):
        return error
    roots = mk.load_roots()
    files = {
        name: (ref.file, str(mk.input_path(ref.file, recipe.folder, roots))) for name, ref in recipe.models.items()
    }
    of_file = [("models", name) for name, spelled in files.items() if error.file in spelled]
    of_key = [path for path in recipe.positions.offsets if error.key and recipe.error("", path).key == error.key]
    for path in (*of_key, *of_file):
        place = recipe.error("", path)
        named = any(error.file in detail for detail in error.details if error.file)
        details = (error.file, *error.details) if error.file and not named else error.details
        where = {"key": place.key, "line": place.line, "column": place.column}
        return MergekitError(error.message, **where, hint=error.hint, details=details)  # type: ignore[arg-type]
    return error


def summary(report: Mapping[str, Any]) -> str:
    """A plan in one line."""
    return f"reads {size(report['read_bytes'])}, writes {size(report['write_bytes'])}"


@dataclass(frozen=True, slots=True)
class Plan:
    """All of a plan, after a note, in whatever width it is given."""

    report: Mapping[str, Any]
    note: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The text for so many columns."""
        text = Text()
        text.append(self.note, style="italic")
        for each in self.report["inputs"]:
            kind = each["architecture"] or each["kind"]
            text.append(f"{shown(each['name'])}: {kind}, {size(each['bytes'])}\n", style="bold")
            text.append(f"  {shown(each['path'])}\n")
        text.append("\n")
        for line in mk.plan_lines(self.report, options.max_width, bars=takes_unicode()):
            text.append(f"{line}\n", style="" if line.startswith(" ") else "bold")
        for warning in self.report["warnings"]:
            text.append(f"\nwarning: {shown(warning)}\n")
        yield text
