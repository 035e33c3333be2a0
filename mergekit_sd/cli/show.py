"""How the command line looks: errors, tables, progress, JSON. Reports go to stdout, talk to stderr.

Text from files reaches rich only as `Text`, never as markup, and escaped.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import click

from mergekit_sd.cli.streams import wanted_color
from mergekit_sd.errors import MergekitError
from mergekit_sd.events import Event, Noted, OutputFinished, OutputStarted, Progressed
from mergekit_sd.text import shown, size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

MOST_DETAILS = 20


def console(*, stderr: bool = False) -> Console:
    """A terminal that keeps its width in pipes, has no markup and no emoji codes."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else 120
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False, width=width)


def table(*columns: str, right: Sequence[str] = ()) -> Table:
    """An empty table with our looks; `right` names the columns of numbers."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def row(target: Table, *cells: object) -> None:
    """Add a row of plain values: escaped, never read as markup."""
    from rich.text import Text

    target.add_row(*(cell if isinstance(cell, Text) else Text(shown(str(cell))) for cell in cells))


def print_json(report: object) -> None:
    """One report on stdout."""
    click.echo(_json(report, indent=2))


def _json(value: object, indent: int | None = None) -> str:
    """JSON in UTF-8 where it can be, escaped where a name or the stream cannot be encoded."""
    text = json.dumps(value, indent=indent, ensure_ascii=False, default=str)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent, default=str)
    return text


def print_error(error: MergekitError, as_json: bool = False) -> None:
    """An error on stderr: what, where, what to do; or one JSON line."""
    if as_json:
        click.echo(_json({"event": "error", **error.as_json()}), err=True)
        return
    for line in error_lines(error):
        click.echo(line, err=True, color=wanted_color())


def error_lines(error: MergekitError) -> Iterable[str]:
    """An error as lines of plain text."""
    yield click.style("error: ", fg="red", bold=True) + shown(error.message)
    place = shown(error.file) if error.file else ""
    if error.line:
        place += f":{error.line}" + (f":{error.column}" if error.column else "")
    if place:
        yield f"  in  {place}"
    if error.key:
        yield f"  at  {shown(error.key)}"
    for detail in error.details[:MOST_DETAILS]:
        yield f"   -  {detail}"
    if len(error.details) > MOST_DETAILS:
        yield f"   -  … and {len(error.details) - MOST_DETAILS} more (all of them with --json)"
    if error.hint:
        yield click.style("  try ", fg="cyan") + shown(error.hint)


class Talk:
    """Listens to a run: a bar with bytes and time left on a terminal, JSON lines with `--json`."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Talk:
        return self

    def __exit__(self, *_: object) -> None:
        self._end_bar()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if self._as_json:
            click.echo(_json(event.as_json()), err=True)
        elif isinstance(event, Noted):
            click.echo(click.style("warning: ", fg="yellow", bold=True) + shown(event.message), err=True)
        elif isinstance(event, OutputStarted):
            self._start_bar(event)
        elif isinstance(event, Progressed) and self._bar:
            self._bar.update(self._task, completed=event.done)
        elif isinstance(event, OutputFinished):
            self._end_bar()
            click.echo(f"{shown(event.path)}: {size(event.bytes)} in {event.seconds:.1f} s", err=True)

    def _start_bar(self, event: OutputStarted) -> None:
        if not sys.stderr.isatty():
            return
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.text import Text

        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TimeRemainingColumn(),
            console=console(stderr=True),
            transient=True,
        )
        self._bar.start()
        self._task = self._bar.add_task(Text(shown(event.output)).plain, total=event.bytes)

    def _end_bar(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None
