"""embedding, hypernetwork: merging these small files; each command builds a recipe and runs it.

Owns how weights are written beside the files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

import mergekit_sd as mk
from mergekit_sd.cli.one_shot import carry_out, one_shot_options
from mergekit_sd.errors import UsageError
from mergekit_sd.text import shown

_FILES = click.argument("files", nargs=-1, required=True, metavar="FILE[:WEIGHT]…")


@click.group("embedding")
def embedding_command() -> None:
    """Work with textual inversions. `convert` changes between .safetensors, .pt and .bin."""


@embedding_command.command("merge")
@_FILES
@click.option(
    "--mode",
    type=click.Choice(["blend", "concat"]),
    default="blend",
    show_default=True,
    help="Add the vectors up, or put them one after the other.",
)
@click.option(
    "--style",
    type=click.Choice(["auto", "a1111", "diffusers"]),
    default="auto",
    show_default=True,
    help="Whose names; auto: diffusers' in .bin, else the WebUI's.",
)
@one_shot_options(dtype="keep")
@click.pass_obj
def merge_embeddings_command(
    token: mk.CancelToken, /, files: Sequence[str], mode: str, style: str, **options: Any
) -> int:
    """Make one textual inversion of several.

    Weights are taken as they are: cat.pt:0.5 dog.pt:0.5 adds up half of each. Without any, a blend is the mean, and
    concat changes nothing. Where a file has fewer vectors, a blend takes zeros for the missing ones. The output may be
    .safetensors, .pt or .bin.
    """
    paths, weights = _weighted(files, 1.0 if mode == "concat" else 1 / len(files))
    node = mk.ops.merge_embeddings([mk.open(path) for path in paths], weights=weights, mode=mode, style=style)
    return carry_out(token, node, **options)


@click.group("hypernetwork")
def hypernetwork_command() -> None:
    """Work with hypernetworks. `convert` changes between .safetensors and .pt."""


@hypernetwork_command.command("merge")
@_FILES
@one_shot_options(dtype="keep")
@click.pass_obj
def merge_hypernetworks_command(token: mk.CancelToken, /, files: Sequence[str], **options: Any) -> int:
    """Average hypernetworks of one structure; of one file, change its strength: fog.pt:0.5.

    The weights say each file's share, and their sum the strength of the result; without any, the mean. An average of
    networks is NOT the sum of their effects: for that, name both in the prompt. It is useful for networks that were
    trained from one beginning. The output may be .safetensors or .pt; the WebUI loads .pt only.
    """
    paths, weights = _weighted(files, 1 / len(files))
    return carry_out(token, mk.ops.merge_hypernetworks([mk.open(path) for path in paths], weights=weights), **options)


def _weighted(files: Sequence[str], usual: float) -> tuple[list[str], list[float]]:
    """Files and their weights, `usual` for all where none has one. Raises UsageError where only some have."""
    pairs = [_entry(text) for text in files]
    given = [weight for _, weight in pairs if weight is not None]
    if given and len(given) < len(pairs):
        raise UsageError("Some files have a weight and some have none.", hint="give a weight to each, or to none")
    return [path for path, _ in pairs], given or [usual] * len(pairs)


def _entry(text: str) -> tuple[str, float | None]:
    """A file and its weight; a colon of the file's own name stays with it."""
    start, colon, end = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, None
    try:
        weight = float(end)
    except ValueError:
        return text, None
    if not start or not math.isfinite(weight):
        raise UsageError(f'"{shown(text)}" is no file with a weight.', hint="write FILE or FILE:0.5")
    return start, weight
