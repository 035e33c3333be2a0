"""sample: pictures of models, of merges that were never written, of a recipe's samples."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

import mergekit_sd as mk
from mergekit_sd.cli.options import force_option, json_option, parsed_overrides, set_option, together
from mergekit_sd.cli.show import Talk, print_error, print_json, print_samples, wrong_pictures
from mergekit_sd.errors import RecipeError, UsageError
from mergekit_sd.text import shown

machine_options = together(
    click.option("--vae", type=click.Path(path_type=Path), metavar="FILE", help="A VAE for all models."),
    click.option("--device", default="cpu", show_default=True, metavar="NAME", help="cpu, cuda or mps."),
    click.option(
        "--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), help="The fastest on the device unless given."
    ),
    click.option(
        "--threads", type=click.IntRange(1, 256), metavar="N", help="Threads; pictures depend on it a little."
    ),
    click.option("--batch", type=click.IntRange(1, 256), default=8, metavar="N", help="Rows of one call of the UNet."),
    click.option("--tiled/--whole", default=None, help="Decode in tiles; large pictures are unless told."),
    click.option(
        "--checks",
        type=click.Choice(["full", "quick", "none"]),
        help="full: measure models and parents on probes, too. [default: full; quick for a sweep]",
    ),
    click.option("--probes", type=click.Path(path_type=Path), metavar="FILE", help="Probes of your own, a TOML file."),
    click.option("--probe-set", metavar="NAME", help="A set of the probes: general, shapes."),
)


picture_options = together(
    click.option("-p", "--prompt", help="What to draw, as in the WebUI: (emphasis:1.2), BREAK, <lora:name:0.8>, …"),
    click.option("-n", "--negative", help="What to keep away from."),
    click.option("--seeds", metavar="1,2,3", help="One picture for each; 1-8 is a range. [default: 0]"),
    click.option("--steps", type=click.IntRange(1, 1000), help="[default: the model's own, or 20]"),
    click.option("--cfg", type=click.FloatRange(0, 100), help="[default: the model's own, or 7]"),
    click.option(
        "--sampler", metavar="NAME", help="dpmpp_2m_karras, euler_a, … [default: the model's own, or the first]"
    ),
    click.option("--size", metavar="WxH", help="[default: the model's own]"),
    click.option("--clip-skip", type=click.IntRange(1, 12), metavar="N", help="SD1: 1 is the last layer."),
    click.option("--cfg-rescale", type=click.FloatRange(0, 1), metavar="PHI", help="For v-prediction: 0.7."),
    click.option(
        "--extras",
        type=click.Path(path_type=Path),
        multiple=True,
        metavar="PATH",
        help="Files or folders that prompts name.",
    ),
    click.option(
        "--control", "controls", multiple=True, metavar="NET=PICTURE[:WEIGHT[:START:END]]", help="A ControlNet."
    ),
)


@click.command("sample")
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="MODEL…")
@picture_options
@click.option("--of", multiple=True, metavar="NAME", help="Of a recipe: these models, steps and outputs only.")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="DIR", help="The folder of the pictures.")
@click.option("--strict", is_flag=True, help="End with code 3 where a check fails.")
@machine_options
@set_option
@force_option
@json_option
@click.pass_obj
def sample_command(
    token: mk.CancelToken,
    /,
    models: tuple[Path, ...],
    output: Path | None,
    strict: bool,
    overrides: tuple[str, ...],
    force: bool,
    as_json: bool,
    **given: Any,
) -> int:
    """Draw with MODEL: a checkpoint, a diffusers folder, or a RECIPE.toml, whose merge need not be written.

    DIR gets the pictures, sheet.png, report.html and report.json.
    """
    machine = {name: given.pop(name) for name in MACHINE}
    machine["checks"] = machine["checks"] or "full"
    of, asked = given.pop("of"), asked_of(given)
    folder = output or Path(f"{models[0].stem or 'model'}-samples")
    with told_as_options({**asked, "of": of}), Talk(as_json) as talk:
        recipe = mk.samples_recipe(list(models), of=of, set=parsed_overrides(overrides), **asked)
        mk.check_samples_folder(folder, force=force)
        session = mk.prepare_samples(recipe, options=mk.SampleOptions(**machine), on_event=talk, cancel=token)
        report = session.run()
    return finish(report, folder, force=force, strict=strict, as_json=as_json)


@contextlib.contextmanager
def told_as_options(asked: Mapping[str, Any]) -> Iterator[None]:
    """A refusal of what the command line asks for names the option, not a line of a recipe that nobody wrote."""
    named = {name for name, value in asked.items() if value is not None}
    try:
        yield
    except RecipeError as error:
        name = re.match(r"samples\.\d+\.(\w+)", error.key or "")
        if name and name[1] in named:
            error.key = f"--{name[1].replace('_', '-')}"
            error.file = error.line = error.column = None
        raise


def finish(report: mk.SamplingReport, folder: Path, *, force: bool, strict: bool, as_json: bool) -> int:
    """Write the pictures, say what was made and found; the exit code."""
    mk.write_samples(report, folder, force=force)
    told = {"folder": str(folder), **mk.sampling_as_json(report)}
    problem = wrong_pictures(told["checks"]) if strict else None
    if as_json:
        print_json(told | ({"error": problem.as_json()} if problem else {}))
    else:
        print_samples(told)
    if problem:
        print_error(problem, as_json)
    return problem.exit_code if problem else 0


MACHINE = ("device", "dtype", "threads", "batch", "tiled", "checks", "probes", "probe_set", "vae")


def asked_of(given: dict[str, Any]) -> dict[str, Any]:
    """A sample's keys as a recipe has them."""
    asked = {key: value for key, value in given.items() if key not in ("seeds", "size", "extras", "controls")}
    seeds, picture = given["seeds"], given["size"]
    if seeds is not None:
        asked["seeds"] = _seeds(seeds)
    if picture is not None:
        asked["size"] = _size(picture)
    if given["extras"]:
        asked["extras"] = [str(path.absolute()) for path in given["extras"]]
    if given["controls"]:
        asked["control"] = [_control(text) for text in given["controls"]]
    return asked


def _seeds(text: str) -> list[int]:
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not _is_whole(first) or (dash and not _is_whole(last)):
            raise UsageError(f'"{shown(text)}" are no seeds.', key="--seeds", hint="write --seeds 1,2,3 or --seeds 1-8")
        end = int(last) if dash else int(first)
        if not 0 <= end - int(first) < MOST_SEEDS:
            raise UsageError(f'"{shown(part)}" is no range of seeds.', key="--seeds", hint="write --seeds 1-8")
        found += range(int(first), end + 1)
    return found


def _is_whole(text: str) -> bool:
    return text.isdecimal() and len(text) <= 20


MOST_SEEDS = 1000


def _size(text: str) -> list[int]:
    width, _, height = text.lower().partition("x")
    if not _is_whole(width) or not _is_whole(height):
        raise UsageError(f'"{shown(text)}" is no size.', key="--size", hint="write --size 512x768")
    return [int(width), int(height)]


def _control(text: str) -> dict[str, Any]:
    net, equals, rest = text.partition("=")
    picture, *numbers = rest.rsplit(":", 3) if rest.count(":") >= 3 else rest.rsplit(":", 1)
    try:
        values = [float(number) for number in numbers]
    except ValueError:  # a colon of the path
        picture, values = rest, []
    if not net or not equals or not picture:
        hint = "write --control canny.safetensors=edges.png:0.8 or …:0.8:0:0.5"
        raise UsageError(f'"{shown(text)}" is no ControlNet with its picture.', key="--control", hint=hint)
    return {
        "net": str(Path(net).absolute()),
        "picture": str(Path(picture).absolute()),
        **dict(zip(("weight", "start", "end"), values, strict=False)),
    }
