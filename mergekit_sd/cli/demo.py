"""demo: small models made by code, merged by the quickstart recipe."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import click

import mergekit_sd as mk
from mergekit_sd.cli.options import json_option
from mergekit_sd.cli.show import Talk, made_counts, print_json
from mergekit_sd.text import shown, size


@click.command("demo")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False), default="mergekit-sd-demo")
@click.option("--force", is_flag=True, help="Make it again over an earlier one.")
@json_option
@click.pass_obj
def demo_command(token: mk.CancelToken, /, folder: Path, force: bool, as_json: bool) -> None:
    """Make three small SD1 checkpoints in FOLDER and merge them by the quickstart recipe."""
    say = (lambda _text: None) if as_json else click.echo
    recipe = mk.make_demo(folder, force=force)
    say(f"Three small models of Stable Diffusion 1's layout, made by code, in {shown(str(folder))}")
    say("(they cannot draw):\n")
    for path in sorted(folder.glob("*.safetensors")):
        say(f"  {path.name:26} {size(path.stat().st_size)}")
    say(f"\nTheir recipe, {shown(recipe.name)}:\n")
    for line in recipe.read_text(encoding="utf-8").splitlines():
        say(f"  {line}")
    say("")
    with Talk(as_json) as talk:
        report = mk.run(recipe, on_event=talk, cancel=token, force=force)
    made = report.outputs[0]
    if as_json:
        print_json({"folder": str(folder), **report.as_json()})
        return
    say(f"Made {shown(str(made.path))} in one pass:\n")
    say(f"  {size(made.bytes)} in {made.seconds:.1f} s; tensors: {made_counts(made.counts, made.dropped)}")
    say(f"  content hash {made.content_hash}: run again, it is the same, bit for bit\n")
    say("Now look around:")
    file, parent, again = (_quoted(path) for path in (made.path, folder / "base.safetensors", recipe))
    for command, what in (
        (f"plan {again} --force", "what the recipe does, block by block"),
        (f"inspect {file}", "what is in the result"),
        (f"diff {parent} {file}", "how far it is from base, per block"),
        (f"recover {file}", "the recipe, back out of the file"),
        (f"verify {file}", "make it again and compare"),
    ):
        say(f"  mergekit-sd {command}")
        say(f"      {what}")


def _quoted(path: Path) -> str:
    """A path to be pasted into a shell."""
    text = shown(str(path))
    return subprocess.list2cmdline([text]) if os.name == "nt" else shlex.quote(text)
