"""lora: LoRA files and their relatives into models; each command builds a recipe and runs it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

import mergekit_sd as mk
from mergekit_sd.cli.one_shot import carry_out, one_shot_options
from mergekit_sd.errors import UsageError
from mergekit_sd.text import count, shown, size

RULES = ("fixed", "threshold", "ratio", "quantile", "norm", "error")
RESIZE_RULES = ("fixed", "sv_ratio", "sv_cumulative", "sv_fro", "threshold", "ratio", "quantile", "norm", "error")
STRENGTHS = 2  # of the text encoders and the UNet


STYLE = click.option(
    "--style",
    type=click.Choice(["kohya", "peft", "diffusers", "comfyui"]),
    default="kohya",
    show_default=True,
    help="Whose names.",
)
FILE = click.argument("file", type=click.Path(path_type=Path), metavar="LORA")


@click.group("lora")
def lora_command() -> None:
    """Work with LoRA files and their relatives (LoCon, LoHa, LoKr, DoRA, OFT, …)."""


@lora_command.command("extract")
@click.argument("tuned", type=click.Path(path_type=Path))
@click.argument("base", type=click.Path(path_type=Path))
@click.option("--rank", type=click.IntRange(1), default=32, show_default=True, help="Of linear layers.")
@click.option("--conv-rank", type=click.IntRange(0), default=0, show_default=True, help="Of convolutions; 0: none.")
@click.option("--rule", type=click.Choice(RULES), default="fixed", show_default=True, help="How each rank is found.")
@click.option("--amount", type=float, default=0.9, show_default=True, help="The rule's number.")
@click.option("--size-mb", type=float, default=0.0, help="A size shared out over the layers by what they gain.")
@click.option(
    "--text-encoder",
    type=click.Choice(["keep", "drop", "threshold"]),
    default="keep",
    show_default=True,
    help="threshold: dropped where nothing changed by more than --min-diff.",
)
@click.option("--min-diff", type=float, default=0.01, show_default=True, help="For --text-encoder threshold.")
@click.option(
    "--algorithm",
    type=click.Choice(["lora", "loha", "lokr", "full"]),
    default="lora",
    show_default=True,
    help="What to write; lokr takes the rank as its factor.",
)
@click.option(
    "--rest", type=click.Choice(["drop", "keep"]), default="drop", show_default=True, help="Biases and norms, whole."
)
@click.option("--clamp", type=float, default=1.0, show_default=True, help="Cut factors off at this quantile.")
@STYLE
@one_shot_options(dtype="fp16")
@click.pass_obj
def extract_command(token: mk.CancelToken, /, tuned: Path, base: Path, **options: Any) -> int:
    """Make a LoRA of what TUNED has learnt over BASE: base with it is nearly tuned."""
    rank = ("rank", "conv_rank", "rule", "amount", "size_mb", "clamp")
    names = (*rank, "text_encoder", "min_diff", "algorithm", "rest", "style")
    settings = {name: options.pop(name) for name in names}
    node = mk.ops.extract_lora(mk.open(tuned), mk.open(base), **settings)
    return carry_out(token, node, tell=_tell_extracted, **options)


def _tell_extracted(report: mk.RunReport) -> None:
    """What the factors keep of the change, block by block."""
    made = report.outputs[0]
    found = made.lora
    kept = "nothing has changed" if found["kept"] is None else f"{found['kept']:.2%} of the change kept"
    click.echo(f"{shown(str(made.path))}: {count(found['layers'], 'layer')}, {size(made.bytes)}, {kept}")
    for component, greatest in found["dropped"].items():
        click.echo(f"  left out: {component}, which changed by at most {greatest:.2g}")
    if found["unchanged"]:
        click.echo(f"  {count(found['unchanged'], 'layer')} had not changed")
    cells = [f"{block:15} {each['kept']:7.1%}" for block, each in found["blocks"].items() if each["change"]]
    for start in range(0, len(cells), 3):
        click.echo("  " + "   ".join(cells[start : start + 3]))


@lora_command.command("merge")
@click.argument("loras", nargs=-1, required=True, metavar="LORA[:STRENGTH]…")
@click.option("--rank", type=click.IntRange(0), default=0, show_default=True, help="Of the result; 0: exact.")
@click.option(
    "--method",
    type=click.Choice(["sum", "ties", "dare"]),
    default="sum",
    show_default=True,
    help="How they are joined.",
)
@click.option("--density", type=float, default=0.5, show_default=True, help="For ties and dare.")
@STYLE
@one_shot_options(dtype="fp16")
@click.pass_obj
def merge_command(token: mk.CancelToken, /, loras: Sequence[str], **options: Any) -> int:
    """Make one LoRA that does what several do together.

    STRENGTH is 1 unless given; two are for the text encoder and the UNet: a.safetensors:0.5:0.8.
    """
    settings = {name: options.pop(name) for name in ("rank", "method", "density", "style")}
    node = mk.ops.merge_loras([_entry(text) for text in loras], **settings)
    return carry_out(token, node, tell=_tell_extracted, **options)


@lora_command.command("resize")
@FILE
@click.option("--rank", type=click.IntRange(1), required=True, help="Of every layer, or the most a rule may give.")
@click.option("--rule", type=click.Choice(RESIZE_RULES), default="fixed", show_default=True, help="How each is found.")
@click.option("--amount", type=float, default=0.9, show_default=True, help="The rule's number.")
@one_shot_options(dtype="keep")
@click.pass_obj
def resize_command(token: mk.CancelToken, /, file: Path, **options: Any) -> int:
    """Make a LoRA smaller: the greatest singular values of every layer's change."""
    settings = {name: options.pop(name) for name in ("rank", "rule", "amount")}
    return carry_out(token, mk.ops.resize_lora(mk.open(file), **settings), tell=_tell_extracted, **options)


@lora_command.command("convert")
@FILE
@STYLE
@one_shot_options(dtype="keep")
@click.pass_obj
def convert_command(token: mk.CancelToken, /, file: Path, style: str, **options: Any) -> int:
    """Write a LoRA under another trainer's names."""
    return carry_out(token, mk.ops.rename_lora(mk.open(file), style=style), tell=_tell_renamed, **options)


def _tell_renamed(report: mk.RunReport) -> None:
    made = report.outputs[0]
    click.echo(f"{shown(str(made.path))}: {count(sum(made.counts.values()), 'tensor')}, {size(made.bytes)}")


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
    return carry_out(token, node, **options)


def _entry(text: str) -> dict[str, Any]:
    """A file and its strengths; a colon of the file's own name stays with it."""
    path = text
    numbers: list[float] = []
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
