"""convert: another dtype, container or prefix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import mergekit_sd as mk
from mergekit_sd.cli.one_shot import carry_out, one_shot_options


@click.command("convert")
@click.argument("file", type=click.Path(path_type=Path), metavar="FILE")
@click.option(
    "--prefix",
    type=click.Choice(["keep", "add", "remove"]),
    default="keep",
    show_default=True,
    help="Of a component alone: as in checkpoints, or bare.",
)
@click.option(
    "--family",
    type=click.Choice(["auto", "sd1", "sd2", "sdxl"]),
    default="auto",
    show_default=True,
    help="For --prefix add, where names do not tell.",
)
@click.option(
    "--style",
    type=click.Choice(["auto", "a1111", "diffusers"]),
    default="auto",
    show_default=True,
    help="Of a textual inversion: whose names; auto: diffusers' in .bin, the WebUI's in .pt.",
)
@one_shot_options(dtype="keep")
@click.pass_obj
def convert_command(token: mk.CancelToken, /, file: Path, prefix: str, family: str, style: str, **options: Any) -> int:
    """Write a model as safetensors, whatever it is now: a pickle, a diffusers folder, another dtype.

    Everything in it stays, EMA weights and junk as well; `prune` takes these out. For a diffusers folder:
    extract --format diffusers.

    Textual inversions and hypernetworks are written as the output is named: .safetensors, .pt, or .bin (textual
    inversions). Their name, steps and other settings go along, in all but diffusers' .bin.
    """
    node = mk.ops.convert(mk.open(file), prefix=prefix, family=family, style=style)
    return carry_out(token, node, keys={"junk": "keep", "ema": "keep"}, **options)
