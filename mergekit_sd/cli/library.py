"""The commands of the library: scan, folders, list, duplicates, show, rename, undo.

Owns how their reports read. What is in the index, and how it comes there, is `mergekit_sd.library`'s.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path, PurePath

import click

import mergekit_sd as mk
from mergekit_sd.cli.layout import entry, width
from mergekit_sd.cli.options import json_option, threads_option
from mergekit_sd.cli.show import print_json
from mergekit_sd.cli.watch import Watch
from mergekit_sd.events import CancelToken
from mergekit_sd.text import count, shown, size

MOST = 20  # groups, or files that cannot be read, that a report shows; all of them are in the JSON
MOST_FILES = 10  # of one group
NARROWEST_NAME = 24
KINDS = (
    "checkpoint",
    "vae",
    "unet",
    "text_encoder",
    "lora",
    "lycoris",
    "embedding",
    "hypernetwork",
    "controlnet",
    "unknown",
    "unreadable",
)
PARTS = {"unet": "UNet", "vae": "VAE", "text_encoder": "text encoder", "text_encoder_2": "text encoder 2"}

_FOLDER = click.Path(path_type=Path)


@click.group("library")
def library_command() -> None:
    """Index the models of this machine, and find what is there twice.

    Files whose size, time and place are as they were are never read again.
    """


# --- scan ---------------------------------------------------------------------------------------------


@library_command.command("scan")
@click.argument("folders", type=_FOLDER, nargs=-1, metavar="[DIR…]")
@click.option(
    "--hash",
    "hashes",
    type=click.Choice(["none", "vae", "all"]),
    default="all",
    show_default=True,
    help="What to hash: nothing, the VAEs' weights, or every tensor.",
)
@click.option("--sha256", is_flag=True, help="Make sha256, AutoV1 and AutoV3 of every file, too.")
@threads_option
@json_option
@click.pass_context
def scan_command(
    context: click.Context, folders: Sequence[Path], hashes: str, sha256: bool, threads: int | None, as_json: bool
) -> None:
    """Bring the index up to date.

    Without a DIR: the folders that `library folders` lists, and those scanned before.
    """
    token = context.find_object(CancelToken)
    with Watch(as_json) as watch, token.guarded() if token else nullcontext():
        report = mk.scan_library(
            folders,
            hashes=hashes,  # type: ignore[arg-type]
            sha256=sha256,
            threads=threads,
            on_event=watch,
            cancel=token,
        )
    if as_json:
        print_json(report.as_json())
    else:
        _show_scan(report)


def _show_scan(report: mk.ScanReport) -> None:
    news = ((report.new, "new"), (report.changed, "changed"), (report.gone, "gone"))
    told = ", ".join(f"{number:,} {word}" for number, word in news if number) or "nothing new"
    click.echo(f"{count(report.files, 'file')} in {count(len(report.folders), 'folder')}: {told}")
    if report.hashed:
        click.echo(f"{count(report.hashed, 'file')} hashed, {size(report.hashed_bytes)}; {report.seconds:.1f} s in all")
    if report.unreadable:
        click.echo(f"{count(len(report.unreadable), 'file')} cannot be read:")
        for each in report.unreadable[:MOST]:
            click.echo(f"  {shown(str(each.path))}\n    {shown(each.error or '')}")
        _tell_rest(len(report.unreadable) - MOST)


# --- folders ------------------------------------------------------------------------------------------


@library_command.command("folders")
@json_option
def folders_command(as_json: bool) -> None:
    """List the folders of models that are found, and why.

    Installs of A1111, Forge, ComfyUI and StabilityMatrix at the usual places, what
    ComfyUI's extra_model_paths.yaml names, and the roots.
    """
    found = mk.model_folders()
    if as_json:
        print_json({"folders": [folder.as_json() for folder in found]})
        return
    if not found:
        click.echo("None found. Name one: mergekit-sd roots add NAME DIR", err=True)
    why = None
    for folder in found:
        if folder.why != why:
            why = folder.why
            click.echo(shown(why))
        click.echo(f"  {folder.kind or '':14}{shown(str(folder.path))}")


# --- list ---------------------------------------------------------------------------------------------


@library_command.command("list")
@click.argument("words", nargs=-1, metavar="[FILTER…]")
@click.option(
    "--kind", type=click.Choice(KINDS), metavar="KIND", help="Only one kind: checkpoint, vae, lora, unreadable …"
)
@click.option(
    "--sort", type=click.Choice(["name", "size", "date", "kind"]), default="name", show_default=True, help="The order."
)
@json_option
def list_command(words: Sequence[str], kind: str | None, sort: str, as_json: bool) -> None:
    """List the models of the index.

    FILTER: words that are all in the path, kind, architecture or title.
    """
    found = mk.list_library(words, kind=kind, sort=sort)  # type: ignore[arg-type]
    if as_json:
        print_json({"files": [each.as_json() for each in found], "bytes": sum(each.state.size for each in found)})
        return
    if not found:
        click.echo("Nothing found. Scan first: mergekit-sd library scan [DIR…]", err=True)
        return
    _show_list(found)


def _show_list(found: Sequence[mk.LibraryEntry]) -> None:
    base = common_folder(each.path for each in found)
    rows = [
        (shown(str(each.path.relative_to(base))), each.what, each.architecture or "", size(each.state.size))
        for each in found
    ]
    kinds, architectures, sizes = (max(len(row[column]) for row in rows) for column in (1, 2, 3))
    room = max(width() - kinds - architectures - sizes - 6, NARROWEST_NAME)
    names = [fitted(row[0], room) for row in rows]
    room = max(map(len, names))
    click.echo(f"{shown(str(base))}:")
    for name, (_, what, architecture, nbytes) in zip(names, rows, strict=True):
        click.echo(f"{name:{room}}  {what:{kinds}}  {architecture:{architectures}}  {nbytes:>{sizes}}")
    click.echo(f"{count(len(found), 'file')}, {size(sum(each.state.size for each in found))}")


def common_folder(paths: Iterable[Path]) -> Path:
    """The folder that all of them lie below; none if they are on several drives."""
    folders = {str(path.parent) for path in paths}
    try:
        return Path(os.path.commonpath(folders))
    except ValueError:
        return Path()


def fitted(name: str, room: int) -> str:
    """A path that fits: without folders where it must be, the name itself with its beginning and end."""
    if len(name) <= room:
        return name
    parts = PurePath(name).parts
    tails = (str(PurePath("…", *parts[start:])) for start in range(1, len(parts)))
    short = next((tail for tail in tails if len(tail) <= room), parts[-1])
    if len(short) <= room:
        return short
    end = room // 2
    return f"{short[: room - end - 1]}…{short[-end:]}"


# --- duplicates ---------------------------------------------------------------------------------------


@library_command.command("duplicates")
@click.argument("folders", type=_FOLDER, nargs=-1, metavar="[DIR…]")
@json_option
def duplicates_command(folders: Sequence[Path], as_json: bool) -> None:
    """Find equal files, and equal VAEs, UNets and text encoders in files that differ.

    By what was scanned with hashes; in every container and dtype. Published VAEs are
    named where sha256 was scanned.
    """
    found = mk.find_duplicates(folders)
    if as_json:
        print_json(found.as_json())
        return
    if found.files:
        click.echo(f"Equal files: {_counted(found.files)}, {size(found.saves)} could be saved")
        _show_groups(found.files)
    for component in dict.fromkeys(group.component or "" for group in found.components):
        groups = [group for group in found.components if group.component == component]
        click.echo(f"The same {PARTS.get(component, component)} in files that differ: {_counted(groups)}")
        _show_groups(groups)
    if not found.files and not found.components:
        click.echo("Nothing is there twice.")
    for number, why in ((found.unhashed, "not hashed yet"), (found.changed, "changed since the scan")):
        if number:
            click.echo(f"{count(number, 'file')} left out, {why}: mergekit-sd library scan", err=True)


def _counted(groups: Sequence[mk.DuplicateGroup]) -> str:
    return f"{count(len(groups), 'group')}, {count(sum(len(group.entries) for group in groups), 'file')}"


def _show_groups(groups: Sequence[mk.DuplicateGroup]) -> None:
    for group in groups[:MOST]:
        named = f"{shown(group.name)}: " if group.name else ""
        files, repeated = count(len(group.entries), "file"), size(group.repeated)
        same = group.copies == len(group.entries)
        if group.component:
            told = f"in {files}{'' if same else f', {group.copies} of them different'}, {repeated} repeated"
        else:
            told = f"{files}{'' if same else f', {group.copies} on the disk'}, {repeated} could be saved"
        click.echo(f"  {named}{told}")
        for each in group.entries[:MOST_FILES]:
            click.echo(f"    {shown(str(each.path))}")
        _tell_rest(len(group.entries) - MOST_FILES, "    ")
    _tell_rest(len(groups) - MOST)


def _tell_rest(number: int, indent: str = "  ") -> None:
    if number > 0:
        click.echo(f"{indent}… and {number:,} more (all of them with --json)")


# --- show ---------------------------------------------------------------------------------------------


@library_command.command("show")
@click.argument("file", type=_FOLDER)
@json_option
def show_command(file: Path, as_json: bool) -> None:
    """Tell what is known of a model: what it is, what lies beside it, where else its parts are."""
    found = mk.look_up(file)
    beside = mk.sidecars(file)
    others = mk.also_in(found) if found.hashes else {}
    if as_json:
        also = {part: [str(each.path) for each in every] for part, every in others.items()}
        print_json({**found.as_json(), "sidecars": [str(each) for each in beside], "also_in": also})
        return
    click.echo(shown(str(file)))
    for label, text in _facts(found):
        click.echo(entry(label, shown(text), 18))
    for part, every in others.items():
        what = "the same file" if part == "content" else f"the same {PARTS.get(part, part)}"
        _show_paths(what, (each.path for each in every))
    _show_paths("beside it", beside)


def _facts(found: mk.LibraryEntry) -> Iterable[tuple[str, str]]:
    yield "is", f"{found.architecture or ''} {found.what}".strip() + f", {found.format}, {size(found.state.size)}"
    yield "written", f"{found.modified:%Y-%m-%d %H:%M}"
    for label, text in (("title", found.title), ("trained as", found.trained_as)):
        if text:
            yield label, text
    parts = {**{PARTS.get(name, name): nbytes for name, nbytes in found.components.items()}, "EMA": found.ema}
    sizes = ", ".join(f"{part} {size(nbytes)}" for part, nbytes in {**parts, "junk": found.junk}.items() if nbytes)
    if sizes:
        yield "holds", sizes
    yield "dtypes", ", ".join(f"{name} {number:,}" for name, number in found.dtypes.items()) or "no tensors"
    if found.position_ids:
        yield "position_ids", found.position_ids
    yield from found.hashes.items()


def _show_paths(title: str, paths: Iterable[Path]) -> None:
    every = list(paths)
    if every:
        click.echo(f"  {title}:")
    for path in every[:MOST_FILES]:
        click.echo(f"    {shown(str(path))}")
    _tell_rest(len(every) - MOST_FILES, "    ")


# --- rename -------------------------------------------------------------------------------------------


@library_command.command("rename")
@click.argument("file", type=_FOLDER)
@click.argument("name")
@json_option
def rename_command(file: Path, name: str, as_json: bool) -> None:
    """Give a model another NAME, with its previews, config and notes.

    All or none of them; never over a file.
    """
    moves = mk.rename_model(file, name)
    if as_json:
        print_json({"renamed": [{"from": str(old), "to": str(new)} for old, new in moves]})
        return
    for old, new in moves:
        click.echo(f"{shown(old.name)} -> {shown(new.name)}")
    if not moves:
        click.echo("It has this name already.", err=True)


# --- undo ---------------------------------------------------------------------------------------------


@library_command.command("undo")
@click.argument("run", type=click.IntRange(1), required=False)
@click.option("--list", "listing", is_flag=True, help="List what was deduped, and stop.")
@json_option
@click.pass_context
def undo_command(context: click.Context, run: int | None, listing: bool, as_json: bool) -> None:
    """Undo a dedupe: RUN, or the last that is not undone yet.

    Links become files of their own again, deleted files come back.
    """
    if listing:
        _show_runs(mk.dedupe_runs(), as_json)
        return
    token = context.find_object(CancelToken)
    with Watch(as_json, "restoring") as watch, token.guarded() if token else nullcontext():
        report = mk.undo_dedupe(run, on_event=watch, cancel=token)
    if as_json:
        print_json(report.as_json())
    else:
        _show_undone(report)
    if report.refused:
        context.exit(4)


def _show_runs(runs: Sequence[mk.DedupeRun], as_json: bool) -> None:
    if as_json:
        print_json({"runs": [run.as_json() for run in runs]})
        return
    if not runs:
        click.echo("Nothing was deduped yet.", err=True)
    for run in runs:
        undone = len(run.steps) - len(run.pending)
        state = f", {'all' if undone == len(run.steps) else undone} undone" if undone else ""
        what = f"{run.link:8}{count(len(run.steps), 'file')}, {size(run.bytes)}{state}"
        click.echo(f"{run.number:4}  {run.time:%Y-%m-%d %H:%M}  {what}")


def _show_undone(report: mk.UndoReport) -> None:
    _show_paths("as they were", report.restored)
    _show_paths("never replaced, or undone before", report.untouched)
    if report.refused:
        click.echo("  left as they are:")
    for each in report.refused:
        click.echo(f"    {shown(str(each.path))}\n      {each.reason}")
    if report.restored or report.untouched or report.refused:
        click.echo(f"Run {report.run}: {count(len(report.restored), 'file')} restored")
    else:
        click.echo(f"Run {report.run} was undone before.", err=True)
