"""lora: LoRA files and their relatives; each command builds a recipe and runs it.

Owns the words of their options; what each takes is read off its operation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

import mergekit_sd as mk
from mergekit_sd.cli.one_shot import carry_out, one_shot_options
from mergekit_sd.cli.options import together
from mergekit_sd.errors import UsageError
from mergekit_sd.text import count, shown, size

F = TypeVar("F", bound=Callable[..., Any])

STRENGTHS = 2  # of the text encoders and the UNet
COLUMNS = 3  # of blocks, on a line
HELP = {
    "rank": "Of every layer, or the most that a rule gives.",
    "conv_rank": "Of convolutions over more than a pixel; 0: none.",
    "rule": "How each layer's rank is found.",
    "amount": "The rule's number; 0: usual for the rule (norm 0.9, error 0.3, sv_ratio 10, …).",
    "size_mb": "MiB shared out over the layers by what they gain; 0: no limit.",
    "clamp": "Cut factors off at this quantile; 1: not at all.",
    "text_encoder": "threshold: dropped where nothing changed by more than --min-diff.",
    "min_diff": "For --text-encoder threshold.",
    "algorithm": "What to write; lokr takes the rank as its factor.",
    "rest": "The changes of biases and norms, whole.",
    "style": "Whose names.",
    "method": "How the changes are joined; ties and dare need a rank.",
    "density": "For ties and dare.",
}

_PATH = click.Path(path_type=Path)
_DRAW = click.option(
    "--draw", metavar="PROMPT", help="Draw with the result and without, four pictures each, into OUTPUT-samples."
)
_SEEDS = range(1, 5)
_LORA = click.argument("file", type=_PATH, metavar="LORA")
_LORAS = click.argument("loras", nargs=-1, required=True, metavar="LORA[:STRENGTH]…")


def settings_of(operation: str) -> Callable[[F], F]:
    """The options of an operation's settings, with its bounds and defaults."""
    return together(*(_option(parameter) for parameter in mk.OPERATIONS[operation].parameters))


def _option(parameter: Any) -> Callable[[F], F]:
    kind = parameter.kind
    if hasattr(kind, "options"):
        takes: Any = click.Choice(kind.options)
    else:
        takes = (click.IntRange if kind.whole else click.FloatRange)(kind.low, kind.high)
    name = f"--{parameter.name.replace('_', '-')}"
    return click.option(name, type=takes, default=parameter.default, show_default=True, help=HELP[parameter.name])


def _settings(operation: str, options: dict[str, Any]) -> dict[str, Any]:
    """An operation's own among a command's options; they are taken out."""
    return {parameter.name: options.pop(parameter.name) for parameter in mk.OPERATIONS[operation].parameters}


@click.group("lora")
def lora_command() -> None:
    """Work with LoRA files and their relatives (LoCon, LoHa, LoKr, DoRA, OFT, …)."""


@lora_command.command("inject")
@click.argument("model", type=_PATH)
@_LORAS
@click.option(
    "--blocks",
    metavar="WEIGHTS",
    help="Per block, for all of them: 17, 26, 12 or 20 numbers, or a preset such as OUTALL.",
)
@_DRAW
@one_shot_options(dtype="keep")
@click.pass_obj
def inject_command(
    token: mk.CancelToken, /, model: Path, loras: Sequence[str], blocks: str | None, draw: str | None, **options: Any
) -> int:
    """Put LoRA files into a checkpoint.

    STRENGTH is 1 unless given; two are for the text encoder and the UNet, as in a prompt: style.safetensors:0.5:0.8.
    A negative one takes out what was put in.
    """
    more = {} if blocks is None else {"blocks": blocks}
    entries = [{**_entry(text), **more} for text in loras]
    if draw and blocks:
        raise UsageError("A prompt takes no --blocks.", key="--draw", hint="leave one of the two out")

    def drawn() -> mk.Recipe:
        used = {entry["lora"].file.path: _strengths(entry) for entry in entries}
        return mk.injection_samples(model, options["output"], used, draw or "", _SEEDS)

    node = mk.ops.inject_lora(mk.open(model), entries)
    return carry_out(token, node, drawn=drawn if draw else None, **options)


def _strengths(entry: Mapping[str, Any]) -> tuple[float, float]:
    """For the text encoder and the UNet."""
    unet = entry.get("strength", 1.0)
    return entry.get("text_encoder", unet), unet


@lora_command.command("extract")
@click.argument("tuned", type=_PATH)
@click.argument("base", type=_PATH)
@settings_of("extract_lora")
@_DRAW
@one_shot_options(dtype="fp16")
@click.pass_obj
def extract_command(token: mk.CancelToken, /, tuned: Path, base: Path, draw: str | None, **options: Any) -> int:
    """Make a LoRA of what TUNED has learnt over BASE: base with it is nearly tuned."""
    settings = _settings("extract_lora", options)
    node = mk.ops.extract_lora(mk.open(tuned), mk.open(base), **settings)

    def tell(report: mk.RunReport) -> None:
        _tell_kept(report)
        if not settings["conv_rank"]:
            click.echo("  convolutions were not taken (--conv-rank)")
        if settings["rest"] == "drop":
            click.echo("  biases and norms were not taken (--rest keep)")

    def drawn() -> mk.Recipe:
        return mk.extraction_samples(tuned, base, options["output"], draw or "", _SEEDS)

    return carry_out(token, node, tell=tell, drawn=drawn if draw else None, **options)


@lora_command.command("merge")
@_LORAS
@settings_of("merge_loras")
@one_shot_options(dtype="fp16")
@click.pass_obj
def merge_command(token: mk.CancelToken, /, loras: Sequence[str], **options: Any) -> int:
    """Make one LoRA that does what several do together; at rank 0 exactly.

    STRENGTH is 1 unless given; two are for the text encoder and the UNet: a.safetensors:0.5:0.8.
    """
    node = mk.ops.merge_loras([_entry(text) for text in loras], **_settings("merge_loras", options))
    return carry_out(token, node, tell=_tell_kept, **options)


@lora_command.command("resize")
@_LORA
@settings_of("resize_lora")
@one_shot_options(dtype="keep")
@click.pass_obj
def resize_command(token: mk.CancelToken, /, file: Path, **options: Any) -> int:
    """Make a LoRA smaller: the greatest singular values of every layer's change."""
    node = mk.ops.resize_lora(mk.open(file), **_settings("resize_lora", options))
    return carry_out(token, node, tell=_tell_kept, **options)


@lora_command.command("convert")
@_LORA
@settings_of("rename_lora")
@one_shot_options(dtype="keep")
@click.pass_obj
def convert_command(token: mk.CancelToken, /, file: Path, **options: Any) -> int:
    """Write a LoRA under another trainer's names."""
    node = mk.ops.rename_lora(mk.open(file), **_settings("rename_lora", options))
    return carry_out(token, node, tell=_tell_made, **options)


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
        if not colon or not start:
            raise UsageError(f'"{shown(text)}" names no file.', hint="write FILE or FILE:STRENGTH")
        path = start
    strengths = {"text_encoder": numbers[0], "strength": numbers[1]} if len(numbers) == STRENGTHS else {}
    return {"lora": mk.open(path), **({"strength": numbers[0]} if len(numbers) == 1 else strengths)}


# --- what was made -----------------------------------------------------------------------------------------


def _tell_made(report: mk.RunReport) -> None:
    made = report.outputs[0]
    click.echo(f"{shown(str(made.path))}: {count(sum(made.counts.values()), 'tensor')}, {size(made.bytes)}")


def _tell_kept(report: mk.RunReport) -> None:
    """What the factors keep of the change, block by block."""
    made, found = report.outputs[0], report.outputs[0].lora
    if not found["layers"]:
        _tell_made(report)
    else:
        kept = "nothing has changed" if found["kept"] is None else f"{found['kept']:.2%} of their change kept"
        click.echo(f"{shown(str(made.path))}: {count(found['layers'], 'layer')}, {size(made.bytes)}, {kept}")
    for component, greatest in found["dropped"].items():
        click.echo(f"  left out: {component}, which changed by at most {greatest:.2g}")
    if found["unchanged"]:
        click.echo(f"  {count(found['unchanged'], 'layer')} had not changed")
    _tell_blocks(found["blocks"])


def _tell_blocks(blocks: Mapping[str, Any]) -> None:
    cells = [f"{block:15} {each['kept']:7.1%}" for block, each in blocks.items() if each["change"]]
    for start in range(0, len(cells), COLUMNS):
        click.echo("  " + "   ".join(cells[start : start + COLUMNS]))
