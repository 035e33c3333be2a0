"""prune, fix, extract, bake-vae: surgery on one model; each builds a recipe and runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import mergekit_sd as mk
from mergekit_sd.cli.one_shot import carry_out, one_shot_options
from mergekit_sd.cli.show import Talk, made_counts, print_json, print_made
from mergekit_sd.errors import UsageError
from mergekit_sd.text import listed, shown, size

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
    node = mk.open(file)
    before = node.file.state.size

    def tell(report: mk.RunReport) -> None:
        print_made(report)
        saved = before - report.outputs[0].bytes
        click.echo(f"  {size(saved)} less than {size(before)}" if saved > 0 else "  nothing was to be pruned")

    keys = {"ema": "keep"} if ema == "keep" else {}
    return carry_out(token, mk.ops.prune(node, ema=ema), tell=tell, keys=keys, **options)


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
    type=click.Choice(["unet", "vae", "text_encoder", "text_encoder_2", "ema"]),
    help="What to take out; ema is the UNet made of the EMA weights.",
)
@click.option(
    "--format",
    "container",
    type=click.Choice(["safetensors", "diffusers"]),
    default="safetensors",
    show_default=True,
    help="diffusers: a folder as diffusers loads it, of the whole model or of one component.",
)
@one_shot_options(dtype="keep")
@click.pass_obj
def extract_command(token: mk.CancelToken, /, file: Path, component: str | None, container: str, **options: Any) -> int:
    """Write one component as a file of its own, under names without prefix, as VAE files have them.

    With --format diffusers, write the model as a folder that diffusers loads.
    """
    if container == "diffusers":
        return _write_folder(token, mk.open(file), component, **options)
    if component is None:
        raise UsageError("There is nothing to take out.", key="--component", hint="name a component: --component vae")
    return carry_out(token, mk.ops.extract(mk.open(file), component=component), **options)


def _write_folder(
    token: mk.CancelToken,
    node: Any,
    component: str | None,
    *,
    output: Path,
    save_recipe: Path | None,
    title: str | None,
    metadata: str,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> int:
    given = {"--save-recipe": save_recipe, "--title": title, "--metadata": metadata == "webui"}
    if any(given.values()):
        option = next(name for name, value in given.items() if value)
        hint = "leave it out, or write a file first and the folder from it"
        raise UsageError("A folder of diffusers has no place for this.", key=option, hint=hint)
    if component == "ema":
        node, component = mk.ops.prune(node, ema="use"), "unet"
    if dry_run:
        kept = {name: options[name] for name in ("dtype", "force")}
        planned = mk.plan_diffusers(node, output, component=component, **kept)
        report: dict[str, Any] = {"path": str(output), "bytes": planned.bytes, "files": list(planned.weights)}
        if as_json:
            print_json(report)
        else:
            click.echo(f"{shown(str(output))}: would be {size(planned.bytes)}: {', '.join(planned.weights)}")
        return 0
    with Talk(as_json) as talk:
        made = mk.save_diffusers(node, output, component=component, on_event=talk, cancel=token, **options)
    if as_json:
        print_json(made.as_json())
        return 0
    click.echo(f"{shown(str(made.path))}: {size(made.bytes)} in {made.seconds:.1f} s")
    for name, each in made.components.items():
        click.echo(f"  {name}: {size(each.bytes)}, {made_counts(each.counts, each.dropped)}")
    return 0


@click.command("bake-vae")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("vae", type=click.Path(path_type=Path))
@one_shot_options(dtype="keep")
@click.pass_obj
def bake_vae_command(token: mk.CancelToken, /, model: Path, vae: Path, **options: Any) -> int:
    """Put another VAE into a checkpoint: MODEL with the VAE of a VAE file or of another checkpoint."""
    node = mk.ops.replace(mk.open(model), mk.open(vae), component="vae")
    return carry_out(token, node, keys={"junk": "keep", "ema": "keep"}, **options)
