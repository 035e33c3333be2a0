"""How the command line looks: errors, tables, progress, JSON. Reports go to stdout, talk to stderr.

Text from files reaches rich only as `Text`, never as markup, and escaped.
"""

from __future__ import annotations

import json
import os
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_sd.cli.layout import width
from mergekit_sd.cli.streams import wanted_color
from mergekit_sd.errors import ChecksFailed, MergekitError
from mergekit_sd.events import Event, MemoryTold, Noted, OutputFinished, OutputStarted, Progressed, Sampling
from mergekit_sd.text import count, listed, shown, size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    import mergekit_sd as mk

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
    yield _labelled("error: ", error.message, fg="red", bold=True)
    place = shown(error.file) if error.file else ""
    if error.line:
        place += f":{error.line}" + (f":{error.column}" if error.column else "")
    if place:
        yield f"  in  {place}"
    if error.key:
        yield f"  at  {shown(error.key)}"
    for detail in error.details[:MOST_DETAILS]:
        yield f"   -  {shown(detail)}"
    if len(error.details) > MOST_DETAILS:
        yield f"   -  … and {len(error.details) - MOST_DETAILS} more (all of them with --json)"
    if error.hint:
        yield _labelled("  hint: ", error.hint, fg="cyan")


def print_warning(text: str) -> None:
    """Something that the user should know, on stderr."""
    click.echo(_labelled("warning: ", text, fg="yellow", bold=True), err=True, color=wanted_color())


def _labelled(label: str, text: str, **style: Any) -> str:
    """A coloured label and foreign text, escaped: on a terminal wrapped under itself, in a pipe one line."""
    text = shown(text)
    if sys.stderr.isatty():
        room = max(width() - len(label), 20)
        lines = textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False)
        text = ("\n" + " " * len(label)).join(lines)
    return click.style(label, **style) + text


def print_made(report: mk.RunReport) -> None:
    """What a run made: on stdout each file, on stderr what was odd about it."""
    for output in report.outputs:
        click.echo(f"{shown(str(output.path))}: {size(output.bytes)} in {output.seconds:.1f} s")
        click.echo(f"  {made_counts(output.counts, output.dropped)}")
        click.echo(f"  content {output.content_hash}")
        for what, found in (("clamped", output.clamped), ("NaN or Inf", output.nonfinite)):
            if found:
                elements, where = count(sum(found.values()), "element"), count(len(found), "tensor")
                print_warning(f"{what}: {elements} in {where}: {listed(found)}")
    if report.skipped and not report.outputs:
        whose = f"{shown(report.recipe)}: " if report.recipe else ""
        click.echo(f"{whose}nothing to do, done already: {listed(report.skipped, len(report.skipped))}")
    else:
        for name in report.skipped:
            click.echo(f"{shown(name)}: done already")
    if report.samples:
        print_samples(report.samples)


WORDS = {"warning": "look", "failed": "BAD"}


def print_samples(samples: Mapping[str, Any]) -> None:
    """What was drawn, where it lies, and each check that is not fine."""
    folder, checks, machine = samples["folder"], samples["checks"], samples["machine"]
    pictures, models = count(len(samples["pictures"]), "picture"), count(len(samples["models"]), "model")
    peak = f", {size(machine['peak_memory'])} of memory at most" if machine.get("peak_memory") else ""
    click.echo(f"{shown(folder)}: {pictures} of {models} in {machine['seconds']} s{peak}")
    for check in checks:
        if check["level"] != "ok":
            click.echo(f"  {WORDS[check['level']]:4}  {shown(check['message'])}")
    if checks:
        good = sum(check["level"] == "ok" for check in checks)
        click.echo(f"  {good} of {count(len(checks), 'check')} found nothing wrong")
    click.echo(f"  look at {shown(str(Path(folder, 'report.html')))}")
    for note in samples["notes"]:
        click.echo(f"  {shown(note)}")


def wrong_pictures(checks: Sequence[Mapping[str, Any]]) -> MergekitError | None:
    """What `--strict` ends with if checks failed; which ones was told with the pictures."""
    failed = sum(check["level"] == "failed" for check in checks)
    if not failed:
        return None
    message = f"{count(failed, 'check')} of the pictures failed; the files were written."
    return ChecksFailed(message, hint="look at report.html beside the pictures")


def made_counts(counts: Mapping[Any, int], dropped: Mapping[str, int]) -> str:
    """`1,130 merged, 12 copied; dropped: 3 junk`."""
    made = ", ".join(f"{number:,} {how}" for how, number in counts.items() if number)
    left_out = ", ".join(f"{number:,} {reason}" for reason, number in dropped.items())
    return made + (f"; dropped: {left_out}" if left_out else "")


def _tell_memory(told: MemoryTold) -> None:
    free = f"; {size(told.free)} are free" if told.free is not None else ""
    text = f"pictures will take about {size(told.bytes)} of memory{free}"
    if told.free is not None and told.free < told.bytes:
        print_warning(f"{text}: give a smaller --size or --batch, or close other programs")
    else:
        click.echo(text, err=True)


class Talk:
    """Listens to a run: a bar with bytes and time left on a terminal, JSON lines with `--json`."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._bar: Any = None
        self._task: Any = None
        self._drawing = False

    def __enter__(self) -> Talk:
        return self

    def __exit__(self, *_: object) -> None:
        self._end_bar()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if self._as_json:
            click.echo(_json(event.as_json()), err=True)
        elif isinstance(event, Noted):
            print_warning(event.message)
        elif isinstance(event, OutputStarted):
            self._start_bar(event.output, event.bytes, in_bytes=True)
        elif isinstance(event, MemoryTold):
            _tell_memory(event)
        elif isinstance(event, Sampling):
            self._sampled(event)
        elif isinstance(event, Progressed) and self._bar and not self._drawing:  # a model's loading has no bar
            self._bar.update(self._task, completed=event.done)
        elif isinstance(event, OutputFinished):
            self._end_bar()

    def _sampled(self, event: Sampling) -> None:
        """A bar for the pictures of all models, which says at what it is."""
        if not self._drawing:
            self._end_bar()
            self._start_bar(event.model, event.steps, in_bytes=False)
            self._drawing = True
        if self._bar:
            self._bar.update(self._task, completed=event.done, description=shown(f"{event.model}: {event.stage}"))

    def _start_bar(self, what: str, total: int, *, in_bytes: bool) -> None:
        if not sys.stderr.isatty():
            return
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(binary_units=True) if in_bytes else MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console(stderr=True),
            transient=True,
        )
        self._bar.start()
        self._task = self._bar.add_task(shown(what), total=total)

    def _end_bar(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None
        self._drawing = False
