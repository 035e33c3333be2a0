"""lora: LoRA files and their relatives into models; each command builds a recipe and runs it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

import mergekit_sd as mk
from mergekit_sd.cli.one_shot import carry_out, one_shot_options
from mergekit_sd.errors import UsageError
from mergekit_sd.text import shown

STRENGTHS = 2  # of the text encoders and the UNet


@click.group("lora")
def lora_command() -> None:
    """Work with LoRA files and their relatives (LoCon, LoHa, LoKr, DoRA, OFT, …)."""


@lora_command.command("inject")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("loras", nargs=-1, required=True, metavar="LORA[:STRENGTH]…")
@click.option(
    "--blocks",
    metavar="WEIGHTS",
    help="Per block, for all of them: 17, 26, 12 or 20 numbers, or a preset such as OUTALL.",
)
@one_shot_options(dtype="keep")
@click.pass_obj
def inject_command(
    token: mk.CancelToken, /, model: Path, loras: Sequence[str], blocks: str | None, **options: Any
) -> int:
    """Put LoRA files into a checkpoint.

    STRENGTH is 1 unless given; two are for the text encoder and the UNet, as in a prompt: style.safetensors:0.5:0.8.
    A negative one takes out what was put in.
    """
    more = {"blocks": blocks} if blocks else {}
    entries = [{**_entry(text), **more} for text in loras]
    node = mk.ops.inject_lora(mk.open(model), entries)
    return carry_out(token, node, keys={"junk": "keep", "ema": "keep"}, **options)


def _entry(text: str) -> dict[str, Any]:
    """A file and its strengths; a colon of the file's own name stays with it."""
    path, numbers = text, []
    while len(numbers) < STRENGTHS and not Path(path).exists():
        start, colon, end = path.rpartition(":")
        try:
            numbers.insert(0, float(end))
        except ValueError:
            break
        if not colon:
            raise UsageError(f'"{shown(text)}" names no file.', hint="write FILE or FILE:STRENGTH")
        path = start
    strengths = {"text_encoder": numbers[0], "strength": numbers[1]} if len(numbers) == STRENGTHS else {}
    return {"lora": mk.open(path), **({"strength": numbers[0]} if len(numbers) == 1 else strengths)}
