"""recover, verify: where a merged file came from."""

from __future__ import annotations

import contextlib
from pathlib import Path

import click

import mergekit_sd as mk
from mergekit_sd.cli.options import json_option, threads_option
from mergekit_sd.cli.show import Talk, print_json
from mergekit_sd.errors import NotWritable, OutputExists, OutputIsInput, PinMismatch
from mergekit_sd.text import count, shown

FILE = click.argument("file", type=click.Path(path_type=Path))


@click.command("recover")
@FILE
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="FILE", help="Write the recipe to this file.")
@click.option("--force", is_flag=True, help="Replace a file that exists.")
@json_option
def recover_command(file: Path, output: Path | None, force: bool, as_json: bool) -> None:
    """Get the recipe back out of a merged file's metadata: ours, A1111's or supermerger's."""
    found = mk.recover(file)
    comments = [f"recovered from {shown(file.name)} ({found.source})", *found.notes]
    comments += [f"{shown(name)}: content hash of what was used {digest}" for name, digest in found.content.items()]
    text = mk.recipe_text(found.data, comments)
    if output:
        _write(text, output, file, force)
    if as_json:
        report = {"source": found.source, "recipe": found.data, "content": dict(found.content)}
        print_json(report | {"notes": list(found.notes)})
    elif not output:
        click.echo(text, nl=False)
    else:
        click.echo(f"{shown(str(output))}: written; its models are looked for beside it", err=True)


def _write(text: str, output: Path, source: Path, force: bool) -> None:
    """The recipe as a file, by rename; never over the model that it came from."""
    if output.exists() and output.samefile(source):
        raise OutputIsInput("The recipe would overwrite the model.", file=output, hint="give the recipe its own file")
    if output.exists() and not force:
        raise OutputExists("The recipe file exists already.", file=output, hint="give --force to replace it")
    fresh = output.with_name(f".{output.name}.new")
    try:
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(output)
    except OSError as error:
        with contextlib.suppress(OSError):
            fresh.unlink()
        hint = "name a file in a folder that exists and can be written to"
        raise NotWritable(f"The recipe cannot be written: {error.strerror}.", file=output, hint=hint) from error


@click.command("verify")
@FILE
@click.option(
    "--models",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Look for the models here, too; else beside the file and under the roots.",
)
@threads_option
@json_option
@click.pass_obj
def verify_command(
    token: mk.CancelToken, /, file: Path, models: Path | None, threads: int | None, as_json: bool
) -> None:
    """Make a file again from the recipe in it and compare every byte. Nothing is written.

    Ends with 3 where the file or one of its models differs.
    """
    with Talk(as_json) as talk:
        result = mk.verify(file, models=models, threads=threads, on_event=talk, cancel=token)
    if not result.same:
        differ = count(len(result.different), "part") + (" differs" if len(result.different) == 1 else " differ")
        raise PinMismatch(
            f"The file is not what its recipe makes: {differ}.",
            file=file,
            hint="it was changed after the merge, or made by another version",
            details=result.different,
        )
    if as_json:
        print_json({"path": str(file), "same": True, "inputs": dict(result.inputs)})
    else:
        click.echo(f"{shown(str(file))}: the same bytes as its recipe makes")
