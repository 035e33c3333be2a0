"""demo: the small trained family, merged by the quickstart recipe, and pictures of it."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import click

import mergekit_sd as mk
from mergekit_sd.cli.options import json_option
from mergekit_sd.cli.show import Talk, made_counts, print_json, print_samples
from mergekit_sd.text import shown, size


@click.command("demo")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False), default="mergekit-sd-demo")
@click.option("--force", is_flag=True, help="Make it again over an earlier one.")
@click.option("--samples/--no-samples", default=True, help="Draw, or only merge.")
@click.option("--open/--no-open", "opens", default=None, help="Show the pictures; it does where there is a screen.")
@json_option
@click.pass_obj
def demo_command(
    token: mk.CancelToken, /, folder: Path, force: bool, samples: bool, opens: bool | None, as_json: bool
) -> None:
    """Put small trained SD1 models into FOLDER, merge them by a recipe, and draw.

    They know drawn shapes; the recipe teaches one of them another's shape.
    """
    say = (lambda _text: None) if as_json else click.echo
    recipe = mk.make_demo(folder, force=force)
    say(f"Stable Diffusion 1 in little, trained on drawn shapes, in {shown(str(folder))}:\n")
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.pt")]):
        say(f"  {path.name:26} {size(path.stat().st_size):>9}  {WHAT.get(path.stem, '')}")
    say(f"\nTheir recipe, {shown(recipe.name)}:\n")
    for line in recipe.read_text(encoding="utf-8").splitlines():
        say(f"  {line}".rstrip())
    say("")
    with Talk(as_json) as talk:
        report = mk.run(recipe, on_event=talk, cancel=token, force=force, samples=samples)
    made = report.outputs[0]
    if as_json:
        print_json({"folder": str(folder), **report.as_json()})
        return
    say(f"Made {shown(str(made.path))} in one pass:\n")
    say(f"  {size(made.bytes)} in {made.seconds:.1f} s; tensors: {made_counts(made.counts, made.dropped)}")
    say(f"  content hash {made.content_hash}: run again, it is the same, bit for bit\n")
    if report.samples:
        print_samples(report.samples)
        sheet = Path(report.samples["folder"], "sheet.png")
        say(f"  all pictures at a glance: {shown(str(sheet))}\n")
        if _has_screen() if opens is None else opens:
            click.launch(str(sheet))
    say("Now look around:")
    say(f"  cd {_quoted(folder)}")
    for command, what in NEXT:
        say(f"  mergekit-sd {command}")
        say(f"      {what}")


def _has_screen() -> bool:
    """Whether a person sits there who can be shown a picture."""
    desktop = os.name == "nt" or sys.platform == "darwin" or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY")))
    return sys.stdout.isatty() and bool(desktop)


NEXT = (
    ("plan quickstart.toml --force", "what the recipe does, block by block"),
    ("diff base.safetensors quickstart.safetensors", "how far the result is from base"),
    ('sample base.safetensors -p "a blue circle on white background <lora:stripes>"', "a LoRA in the prompt"),
    ('sample base.safetensors -p "a mk-orange square on white background" -o orange', "a textual inversion"),
    (
        "lora extract outline.safetensors base.safetensors --conv-rank 32 -o lines.safetensors "
        '--draw "a green triangle on white background"',
        "what outline learned as a LoRA, and how well it draws",
    ),
    ("verify quickstart.safetensors", "make the result again from its own recipe, and compare"),
)
WHAT = {
    "base": "knows circles, squares and triangles",
    "outline": "tuned from base: draws them as lines",
    "night": "tuned from base: draws at night",
    "star": 'tuned from base: knows a star as well, as "sks"',
    "stripes": "a LoRA for base",
    "shadow": "a LoHa for base",
    "frame": "a LoKr for base",
    "pale": "a hypernetwork for base",
    "mk-orange": "a textual inversion: a colour that base has no word for",
}


def _quoted(path: Path) -> str:
    """A path to be pasted into a shell."""
    text = shown(str(path))
    return subprocess.list2cmdline([text]) if os.name == "nt" else shlex.quote(text)
