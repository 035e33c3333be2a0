"""`library tree` and `library similar`: where a model comes from, and what it is near to.

Owns how their reports read, and the tree that `inspect` shows, too.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import click

import mergekit_sd as mk
from mergekit_sd.cli.layout import width
from mergekit_sd.cli.library import library_command
from mergekit_sd.cli.options import json_option
from mergekit_sd.cli.show import Talk, print_json
from mergekit_sd.events import CancelToken, Event
from mergekit_sd.text import count, shown

__all__ = ["library_command", "show_lineage"]

MOST_LINES = 100  # of a tree in `inspect`
MOST_CHILDREN = 20
NARROWEST_NAME = 24

_FILE = click.argument("file", type=click.Path(path_type=Path))
_BRANCHES = ("├─ ", "└─ ", "│  ", "   ")
_PLAIN = ("|- ", "`- ", "|  ", "   ")
_BY = {"autov1": "AutoV1", "autov2": "AutoV2", "autov3": "AutoV3", "content": "content hash"}


# --- tree ---------------------------------------------------------------------------------------------


@library_command.command("tree")
@_FILE
@json_option
def tree_command(file: Path, as_json: bool) -> None:
    """Tell what a model was made of, as far back as is known, and what was made of it.

    By the records in the metadata: ours, A1111's, supermerger's. Parents are looked for
    in the library, by their hashes (scan with --sha256 for other tools' records), else
    by their names.
    """
    found = mk.family_tree(file)
    if as_json:
        print_json(found.as_json())
        return
    for line in _tree(found.root, located=True):
        click.echo(line)
    if not found.root.parents and not found.root.note:
        click.echo("  Its metadata does not tell what it was made of.")
    if found.children:
        click.echo(f"Made of it, {count(len(found.children), 'model')}:")
        for child in found.children[:MOST_CHILDREN]:
            by = " (by its name)" if child.by == "name" else ""
            click.echo(f"  {shown(str(child.path))}{by}")
        if len(found.children) > MOST_CHILDREN:
            click.echo(f"  … and {len(found.children) - MOST_CHILDREN:,} more (all of them with --json)")
    if not mk.library_file().exists():
        click.echo("There is no library yet: mergekit-sd library scan [DIR…]", err=True)


def show_lineage(root: mk.Ancestor) -> None:
    """What a model was made of, by its own metadata alone; nothing where that is not told."""
    if not root.parents and not root.note:
        return
    lines = list(_tree(root, located=False))
    click.echo("Made of")
    for line in lines[:MOST_LINES]:
        click.echo(f"  {line}")
    if len(lines) > MOST_LINES:
        click.echo("  … the whole tree: mergekit-sd library tree FILE")


def _tree(root: mk.Ancestor, *, located: bool) -> Iterator[str]:
    """A tree as lines; `located`: with where each model is."""
    encoding = (sys.stdout.encoding or "").lower().replace("-", "")
    yield _headline(root)
    if root.note:
        yield f"  ({root.note})"
    yield from _below(root, "", _BRANCHES if encoding.startswith("utf") else _PLAIN, located)


def _below(node: mk.Ancestor, indent: str, signs: tuple[str, ...], located: bool) -> Iterator[str]:
    branch, last_branch, beside, blank = signs
    for number, parent in enumerate(node.parents, start=1):
        last = number == len(node.parents)
        role = f"{shown(parent.role)}: " if parent.role else ""
        yield f"{indent}{last_branch if last else branch}{role}{_headline(parent)}"
        inside = indent + (blank if last else beside)
        hang = inside + (beside if parent.parents else blank)
        for line in _remarks(parent, located):
            yield f"{hang}{line}"
        yield from _below(parent, inside, signs, located)


def _headline(node: mk.Ancestor) -> str:
    name = f"step {shown(node.name)}" if node.step else shown(node.name)
    return f"{name} = {shown(node.made)}" if node.made else name


def _remarks(node: mk.Ancestor, located: bool) -> Iterator[str]:
    if located and not node.step:
        if node.path is None:
            yield f"not in the library{_known_by(node)}"
        else:
            by = " (found by its name)" if node.found_by == "name" else ""
            yield f"{shown(str(node.path))}{by}"
    if node.note:
        yield f"({node.note})"


def _known_by(node: mk.Ancestor) -> str:
    for kind in ("sha256", "autov3", "autov2", "autov1", "content"):
        if kind in node.hashes:
            return f" ({_BY.get(kind, kind)} {node.hashes[kind][:10]})"
    return ""


# --- similar ------------------------------------------------------------------------------------------


@library_command.command("similar")
@_FILE
@click.option(
    "--top", type=click.IntRange(1), default=20, show_default=True, metavar="N", help="How many models to show."
)
@json_option
@click.pass_context
def similar_command(context: click.Context, file: Path, top: int, as_json: bool) -> None:
    """Find the models of the library that are nearest to one.

    \b
    ASim    ASimilarity: how alike the self-attention of OUT03-OUT10 answers to
            the same noise (SDXL: all OUT blocks with attention). A copy: 100 %.
    cosine  of the UNet's weights: the mean of its blocks, from samples.

    Compared are the models of one family: SD1, SD2, SDXL. The first time, some 40 MB
    are read of each.
    """
    token = context.find_object(CancelToken)
    with _Watch(as_json) as watch, token.guarded() if token else nullcontext():
        found = mk.find_similar(file, on_event=watch, cancel=token)
    if as_json:
        print_json({**found.as_json(), "models": [model.as_json() for model in found.models[:top]]})
        return
    if not found.models:
        click.echo(f"The library has no other {found.family} model: mergekit-sd library scan [DIR…]", err=True)
    else:
        _show_similar(found, top)
    for path, error in found.unread.items():
        click.echo(f"not compared: {shown(str(path))}\n  {shown(error)}", err=True)


def _show_similar(found: mk.Similarity, top: int) -> None:
    nearest = found.models[:top]
    names = _names([model.path for model in nearest])
    room = max(min(max(map(len, names)), width() - 37), NARROWEST_NAME)
    click.echo(f"{'model':{room}}  {'ASim':>8}  {'cosine':>8}  differs most in")
    for name, model in zip(names, nearest, strict=True):
        asimilarity = "-" if model.asimilarity is None else f"{model.asimilarity:.2f} %"
        lowest = model.most_different
        most = "" if lowest is None else f"{lowest[0]} {_cosine(lowest[1])}"
        click.echo(f"{_middle(name, room):{room}}  {asimilarity:>8}  {_cosine(model.cosine):>8}  {most}".rstrip())
    if len(found.models) > top:
        click.echo(f"… and {len(found.models) - top:,} more (--top)")


def _cosine(cosine: float | None) -> str:
    if cosine is None:
        return "-"
    text = f"{cosine:.5f}"
    return ">0.99999" if text == "1.00000" and cosine < 1 else text


def _names(paths: list[Path]) -> list[str]:
    """Paths below their common folder."""
    try:
        base = os.path.commonpath([path.parent for path in paths])
    except ValueError:  # several drives
        return [shown(str(path)) for path in paths]
    return [shown(str(path.relative_to(base))) for path in paths]


def _middle(name: str, room: int) -> str:
    """A name that fits: its beginning and its end."""
    end = room // 2
    return name if len(name) <= room else f"{name[: room - end - 1]}…{name[-end:]}"


class _Watch:
    """Shows how far the comparison is: a count on a terminal, JSON lines with `--json`."""

    def __init__(self, as_json: bool) -> None:
        self._talk = Talk(as_json)
        self._as_json = as_json
        self._counted = False

    def __enter__(self) -> _Watch:
        return self

    def __exit__(self, *_: object) -> None:
        if self._counted:
            click.echo("\r\x1b[K", nl=False, err=True)

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if self._as_json:
            self._talk(event)
        elif isinstance(event, mk.ModelCompared) and sys.stderr.isatty():
            self._counted = True
            click.echo(f"\r{event.done:,} of {count(event.files, 'model')} …", nl=False, err=True)
