"""The commands that look at files: `inspect`, `diff`, `hash`.

Owns how the reports of `diff` and `hash` read. What is reported is `mergekit_sd.inspection`'s.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import click

import mergekit_sd as mk
from mergekit_sd.cli.inspect_report import show_identity, show_inspection
from mergekit_sd.cli.inspect_words import KINDS, PARTS, items, say, tight
from mergekit_sd.cli.options import json_option
from mergekit_sd.cli.show import Talk, console, print_json, row, table
from mergekit_sd.events import CancelToken, OutputStarted, Progressed
from mergekit_sd.text import count, shown

if TYPE_CHECKING:
    from rich.text import Text

_PROGRESS_SECONDS = 0.5
_BESIDES = 60  # columns that the table of `diff` takes besides its tensors' names
_FILE = click.Path(path_type=Path)
_SHORT = {"schedule": "schedule", "ema": "EMA"}


# --- inspect ---------------------------------------------------------------------------------------


@click.command("inspect")
@click.argument("file", type=_FILE)
@json_option
@click.option("--hash", "hashes", is_flag=True, help="Hash the file and the weights of each component.")
@click.option("--scan", is_flag=True, help="Look for NaN and Inf in every value.")
def inspect_command(file: Path, as_json: bool, hashes: bool, scan: bool) -> None:
    """Tell what a model file is and what is in it."""
    if hashes or scan:
        with _progress(str(file), as_json) as tell:
            # A missing file is told by the inspection, in better words.
            total = mk.bytes_to_read(file, hashes=hashes, scan=scan) if file.is_file() else 0
            found = mk.inspect_file(file, hashes=hashes, scan=scan, on_bytes=_summing(tell, total))
    else:
        found = mk.inspect_file(file)
    if as_json:
        print_json(found.as_json())
    else:
        show_inspection(found)


# --- hash ------------------------------------------------------------------------------------------


@click.command("hash")
@click.argument("files", type=_FILE, nargs=-1, required=True, metavar="FILE…")
@json_option
def hash_command(files: Sequence[Path], as_json: bool) -> None:
    """Hash files the ways that tools know them by.

    \b
    sha256   of the whole file: download pages, A1111's merge metadata, pins
    AutoV1   A1111's oldest model hash, from 64 KiB of the file
    AutoV2   A1111's model hash in pictures and menus, Civitai
    AutoV3   Civitai, and A1111 for LoRA: of the data after the header
    content  mergekit-sd: the tensors whatever container, order and metadata
    """
    reports = []
    for file in files:
        with _progress(str(file), as_json) as tell:
            total = 2 * file.stat().st_size if file.is_file() else 0
            found = mk.known_identity(file, _summing(tell, total))
        note = {"note": found.no_content} if found.no_content else {}
        reports.append({"path": str(file), **found.as_json(), **note})
        if not as_json:
            say(shown(str(file)), "bold")
            show_identity(found)
    if as_json:
        print_json({"files": reports})


# --- diff ------------------------------------------------------------------------------------------


@click.command("diff")
@click.argument("a", type=_FILE)
@click.argument("b", type=_FILE)
@json_option
@click.option("--tensors", is_flag=True, help="List the most changed tensors, too.")
@click.pass_context
def diff_command(context: click.Context, a: Path, b: Path, as_json: bool, tensors: bool) -> None:
    """Compare two models block by block.

    Change is ‖B − A‖ / ‖A‖ (L2). Tensors meet by name, whatever prefix or container.
    """
    token = context.find_object(CancelToken)
    with _progress(f"{a} and {b}", as_json) as tell, token.guarded() if token else nullcontext():
        found = mk.diff_files(a, b, tell, token)
    if as_json:
        print_json(found.as_json(tensors=tensors))
    else:
        _show_diff(found, tensors)


def _show_diff(found: mk.Diff, tensors: bool) -> None:
    for letter, side in (("A", found.a), ("B", found.b)):
        architecture = f" ({side.architecture})" if side.architecture else ""
        say(f"{letter}  {shown(side.path)}: {KINDS[side.kind]}{architecture}")
    if found.same:
        say(f"The same: {count(len(found.tensors), 'tensor')}, no value differs.", "green")
        return
    _show_groups(found)
    if tensors and (changed := found.most_changed()):
        items("Most changed", (_changed_line(each) for each in changed))
    mismatched = found.of_state("shape")
    if mismatched:
        items(
            "Other shapes", (f"{shown(t.name)}: {_shape(t.shape_a)} in A, {_shape(t.shape_b)} in B" for t in mismatched)
        )
    for state, letter in (("only_a", "A"), ("only_b", "B")):
        if alone := found.of_state(state):  # type: ignore[arg-type]
            items(f"Only in {letter}, {count(len(alone), 'tensor')}", (shown(each.name) for each in alone))


def _show_groups(found: mk.Diff) -> None:
    screen = console()
    numbers = ("change", "cosine", "largest", "equal")
    groups = tight(table("part", "change", "cosine", "largest", "in", "equal", right=numbers))
    hottest = max((group.distance.relative_l2 or 0.0 for group in found.groups), default=0.0)
    every = [*found.groups, found.total]
    for group in every:
        if group is found.total:
            groups.add_section()
        row(
            groups,
            _SHORT.get(group.name) or PARTS.get(group.name, group.name),
            _heat(group, hottest),
            _cosine(group),
            f"{group.distance.largest:.3g}" if group.compared else "",
            _tail(group.largest_in, screen.width - _BESIDES) if group.largest_in else _why_nothing(group),
            f"{group.equal}/{group.compared}" if group.compared else "",
        )
    screen.print(groups)
    bad = sum(group.distance.nonfinite for group in found.groups)
    if bad:
        say(f"{count(bad, 'value')} left out of the numbers: NaN or Inf in A or B", "yellow")


def _heat(group: mk.GroupDiff, hottest: float) -> Text:
    """The change as a number, coloured by its share of the largest one."""
    from rich.text import Text

    change = group.distance.relative_l2
    if not group.compared:
        return Text("")
    if change == 0:
        return Text("none" if group.equal == group.compared else "values", style="dim")
    share = 1.0 if change is None or not hottest else change / hottest
    style = next(style for least, style in _HEAT if share >= least)
    return Text(_percent(change), style=style)


_HEAT = ((0.75, "bold red"), (0.5, "red"), (0.25, "yellow"), (0.0, "green"))


def _percent(change: float | None) -> str:
    if change is None:
        return "from zero"
    return f"{change:.2%}" if change >= 0.0001 else f"{change * 100:.1e}%"


def _cosine(group: mk.GroupDiff) -> str:
    cosine = group.distance.cosine
    if cosine is None or not group.compared:
        return ""
    text = f"{round(cosine, 5) + 0:.5f}"  # + 0: no negative zero
    return ">0.99999" if text == "1.00000" and group.distance.squares_of_difference else text


def _tail(name: str, room: int) -> str:
    """A tensor's name, or as many of its last parts as there is room for."""
    if len(name) <= room:
        return name
    parts = name.split(".")
    tails = ("…" + ".".join(parts[start:]) for start in range(1, len(parts)))
    return next((tail for tail in tails if len(tail) <= room), "…" + parts[-1])


def _why_nothing(group: mk.GroupDiff) -> str:
    """What there is to say of a group without a changed value."""
    if group.compared:
        return ""
    alone = [f"only in {letter}" for letter, number in (("A", group.only_a), ("B", group.only_b)) if number]
    return " and ".join(alone) or "other shapes"


def _changed_line(tensor: mk.TensorDiff) -> str:
    distance = tensor.distance
    if distance is None or not distance.squares_of_difference:
        return f"{'':>9}  {shown(tensor.name)}: whole numbers, or NaN and Inf, differ"
    return f"{_percent(distance.relative_l2):>9}  {shown(tensor.name)}"


def _shape(shape: Sequence[int] | None) -> str:
    return "×".join(map(str, shape)) if shape else "scalar"


# --- common ----------------------------------------------------------------------------------------


@contextmanager
def _progress(name: str, as_json: bool) -> Iterator[Callable[[int, int], None]]:
    """Shows (bytes done, bytes in all): a bar on a terminal, now and then a JSON line with `--json`."""
    begun = last = time.monotonic()
    with Talk(as_json) as talk:

        def tell(done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last < _PROGRESS_SECONDS:
                return
            if last == begun and not as_json:  # what is done in a moment needs no bar
                talk(OutputStarted(name, name, total))
            last = now
            talk(Progressed(name, min(done, total), total, now - begun))

        yield tell


def _summing(tell: Callable[[int, int], None], total: int) -> Callable[[int], None]:
    """Takes numbers of bytes and tells their sum."""
    done = 0

    def add(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        tell(done, total)

    return add
