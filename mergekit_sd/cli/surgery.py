"""prune, fix, extract, bake-vae: surgery on one model; each builds a recipe and runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import mergekit_sd as mk
from mergekit_sd.cli.one_shot import carry_out, one_shot_options
from mergekit_sd.cli.show import print_made
from mergekit_sd.text import listed, size

FILE = click.argument("file", type=click.Path(path_type=Path), metavar="FILE")


@click.command("prune")
@FILE
@click.option(
    "--ema",
    type=click.Choice(["drop", "keep", "use"]),
    default="drop",
    show_default=True,
    help="The EMA copy: leave it out, keep it, or make it the UNet.",
)
@one_shot_options(dtype="keep")
@click.pass_obj
def prune_command(token: mk.CancelToken, /, file: Path, ema: str, **options: Any) -> int:
    """Take out junk and the EMA copy; position ids are mended, all else stays bit for bit."""
    before = file.stat().st_size if file.is_file() else 0

    def tell(report: mk.RunReport) -> None:
        print_made(report)
        saved = before - report.outputs[0].bytes
        click.echo(f"  {size(saved)} less than {size(before)}" if saved > 0 else "  nothing was to be pruned")

    keys = {"ema": "keep"} if ema == "keep" else {}
    return carry_out(token, mk.ops.prune(mk.open(file), ema=ema), tell=tell, keys=keys, **options)


@click.command("fix")
@FILE
@one_shot_options(dtype="keep")
@click.pass_obj
def fix_command(token: mk.CancelToken, /, file: Path, **options: Any) -> int:
    """Mend position ids (broken, float or missing) and NovelAI's names; all else stays bit for bit.

    NaN and Inf are looked for and reported: they cannot be mended.
    """
    before = mk.inspect_file(file)

    def tell(report: mk.RunReport) -> None:
        print_made(report)
        _tell_position_ids("before", before)
        _tell_position_ids("after", mk.inspect_file(report.outputs[0].path))

    keys = {"junk": "keep", "ema": "keep"}
    options = {**options, "scan": True, "allow_nonfinite": True}
    return carry_out(token, mk.ops.fix(mk.open(file)), tell=tell, keys=keys, **options)


def _tell_position_ids(when: str, found: Any) -> None:
    ids = found.position_ids
    if ids is None:
        click.echo(f"  position_ids {when}: this model has none")
        return
    wrong = f", {len(ids.wrong)} of them wrong: {listed(map(str, ids.wrong), 30)}" if ids.wrong else ""
    click.echo(f"  position_ids {when}: {ids.state}{wrong}")


@click.command("extract")
@FILE
@click.option(
    "--component",
    required=True,
    type=click.Choice(["unet", "vae", "text_encoder", "text_encoder_2", "ema"]),
    help="What to take out; ema is the UNet made of the EMA weights.",
)
@one_shot_options(dtype="keep")
@click.pass_obj
def extract_command(token: mk.CancelToken, /, file: Path, component: str, **options: Any) -> int:
    """Write one component as a file of its own, under names without prefix, as VAE files have them."""
    return carry_out(token, mk.ops.extract(mk.open(file), component=component), **options)


@click.command("bake-vae")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("vae", type=click.Path(path_type=Path))
@one_shot_options(dtype="keep")
@click.pass_obj
def bake_vae_command(token: mk.CancelToken, /, model: Path, vae: Path, **options: Any) -> int:
    """Put another VAE into a checkpoint: MODEL with the VAE of a VAE file or of another checkpoint."""
    node = mk.ops.replace(mk.open(model), mk.open(vae), component="vae")
    return carry_out(token, node, keys={"junk": "keep", "ema": "keep"}, **options)
