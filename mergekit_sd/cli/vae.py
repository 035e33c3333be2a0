"""The commands of VAEs: list, dedupe.

Owns how their reports read. Which VAEs are one, and what becomes of copies, is `mergekit_sd.library`'s.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import click

import mergekit_sd as mk
from mergekit_sd.cli.layout import width
from mergekit_sd.cli.library import NARROWEST_NAME, common_folder, fitted
from mergekit_sd.cli.options import json_option, threads_option
from mergekit_sd.cli.show import print_json
from mergekit_sd.cli.watch import Watch
from mergekit_sd.events import CancelToken
from mergekit_sd.text import count, shown, size

_DIRS = click.argument("folders", type=click.Path(path_type=Path), nargs=-1, required=True, metavar="DIR…")
UNKNOWN = "unnamed VAE"
_DONE = {"hard": "hard-linked", "sym": "symlinked", "reflink": "reflinked", "delete": "deleted"}


@click.group("vae")
def vae_command() -> None:
    """Find out which VAEs are one, and keep each only once."""


# --- list ---------------------------------------------------------------------------------------------


@vae_command.command("list")
@_DIRS
@threads_option
@json_option
@click.pass_obj
def list_command(token: CancelToken | None, folders: Sequence[Path], threads: int | None, as_json: bool) -> None:
    """List the VAEs below DIR, also those baked into checkpoints.

    Equal weights are one VAE, in whatever container and dtype. Published ones are named.
    """
    with Watch(as_json) as watch, token.guarded() if token else nullcontext():
        found = mk.list_vaes(folders, threads=threads, on_event=watch, cancel=token)
    if as_json:
        print_json(found.as_json())
        return
    entries = [entry for group in found.groups for entry in group.entries]
    base = common_folder(entry.path for entry in entries) if entries else Path()
    if entries:
        click.echo(f"Below {shown(str(base))}:")
    for group in found.groups:
        _show_group(group, base)
    click.echo(f"{count(len(found.groups), 'different VAE')} in {count(len(entries), 'file')}")
    if found.unreadable:
        hint = "mergekit-sd library list --kind unreadable"
        click.echo(f"{count(len(found.unreadable), 'file')} cannot be read: {hint}", err=True)


def _show_group(group: mk.VaeGroup, base: Path) -> None:
    click.echo(f"{shown(group.name or UNKNOWN)}, {count(len(group.entries), 'file')} ({group.hash[:12]})")
    for entry in group.entries:
        what = f"VAE {'/'.join(entry.dtypes)}" if entry in group.files else f"in a {entry.kind}"
        head = f"  {what:18} {size(entry.state.size):>10}  "
        click.echo(head + _name(entry.path, base, len(head)))


# --- dedupe -------------------------------------------------------------------------------------------


@vae_command.command("dedupe")
@_DIRS
@click.option(
    "--link",
    type=click.Choice(["hard", "sym", "reflink", "delete"]),
    default="hard",
    show_default=True,
    help="What copies become: links, files that share their bytes on the disk (reflink), or nothing.",
)
@click.option("--apply", is_flag=True, help="Do it. Without, only tell what would be done.")
@threads_option
@json_option
@click.pass_obj
def dedupe_command(
    token: CancelToken | None, folders: Sequence[Path], link: str, apply: bool, threads: int | None, as_json: bool
) -> None:
    """Keep one of each set of VAE files below DIR that are equal to the byte.

    Checkpoints are never touched, nor what is reached through a link. `library undo`
    brings everything back.
    """
    with Watch(as_json) as watch, token.guarded() if token else nullcontext():
        report = mk.dedupe_vaes(
            folders,
            link=link,  # type: ignore[arg-type]
            apply=apply,
            threads=threads,
            on_event=watch,
            cancel=token,
        )
    if as_json:
        print_json(report.as_json())
        return
    _show_deduped(report)


def _show_deduped(report: mk.DedupeReport) -> None:
    others = [entry.path for group in report.other_bytes for entry in _one_of_each(group)]
    paths = [path for group in report.groups for path in (group.kept, *group.replaced, *group.linked)]
    paths += [each.path for group in report.groups for each in group.skipped]
    base = common_folder([*paths, *others]) if paths or others else Path()
    if paths or others:
        click.echo(f"Below {shown(str(base))}:")
    for group in report.groups:
        _show_equal(group, report.link, base)
    if others:
        click.echo("The same weights, other bytes (container, dtype or metadata): not touched")
    for vae in report.other_bytes:
        click.echo(f"{shown(vae.name or UNKNOWN)} ({vae.hash[:12]})")
        for entry in _one_of_each(vae):
            _say("/".join(entry.dtypes), entry.path, base)
    _show_sum(report)


def _one_of_each(vae: mk.VaeGroup) -> list[mk.LibraryEntry]:
    """A file for each of the ways in which the VAE's weights are stored."""
    return list({entry.hashes.get("sha256"): entry for entry in reversed(vae.files)}.values())[::-1]


def _show_equal(group: mk.DedupeGroup, link: str, base: Path) -> None:
    files = 1 + len(group.replaced) + len(group.linked) + len(group.skipped)
    click.echo(f"{shown(group.name or UNKNOWN)}, {count(files, 'equal file')} of {size(group.size)}")
    _say("keep", group.kept, base, f"chosen: {group.why}")
    for path in group.replaced:
        beside = ", ".join(shown(each.name) for each in mk.sidecars(path)) if link == "delete" else ""
        _say("delete" if link == "delete" else "link", path, base, f"stays beside it: {beside}" if beside else "")
    for path in group.linked:
        _say("linked", path, base)
    for each in group.skipped:
        _say("skip", each.path, base, each.reason)


def _show_sum(report: mk.DedupeReport) -> None:
    number = sum(len(group.replaced) for group in report.groups)
    if not number:
        click.echo("There is nothing to replace.")
        return
    saved, became = size(report.saves), _DONE[report.link]
    if report.run is None:
        click.echo(f"{count(number, 'file')} would be {became}, {saved} saved. Nothing is done yet: add --apply")
    else:
        is_or_are = "is" if number == 1 else "are"
        click.echo(f"{count(number, 'file')} {is_or_are} {became} now, {saved} saved")
        click.echo(f"To undo it: mergekit-sd library undo {report.run}")


def _say(word: str, path: Path, base: Path, more: str = "") -> None:
    head = f"  {word:8} "
    click.echo(head + _name(path, base, len(head)))
    if more:
        indent = " " * len(head)
        click.echo(textwrap.fill(more, width(), initial_indent=indent, subsequent_indent=indent))


def _name(path: Path, base: Path, column: int) -> str:
    """A path below the base, shortened to what is left of the line."""
    return fitted(shown(str(path.relative_to(base))), max(width() - column, NARROWEST_NAME))
