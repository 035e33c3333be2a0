"""roots, doctor, completion: what makes this machine ready."""

from __future__ import annotations

import os
from pathlib import Path, PurePath
from typing import NamedTuple

import click

import mergekit_sd as mk
from mergekit_sd.cli.layout import entry
from mergekit_sd.cli.options import json_option
from mergekit_sd.cli.show import print_json
from mergekit_sd.errors import EnvironmentFault, UsageError
from mergekit_sd.text import count, did_you_mean, shown

# --- roots --------------------------------------------------------------------------------------------


@click.group("roots")
def roots_command() -> None:
    """Name the folders that models lie in: a recipe then writes `webui:v1-5.ckpt`."""


@roots_command.command("add")
@click.argument("name")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@json_option
def add_command(name: str, folder: Path, as_json: bool) -> None:
    """Register DIR under NAME; a known name gets the new folder."""
    former = mk.load_roots().get(name)
    now = mk.add_root(name, folder)[name]
    if as_json:
        print_json({"name": name, "path": str(now), "replaced": str(former) if former else None})
        return
    click.echo(f"{shown(name)}: {shown(str(now))}")
    if former and former != now:
        click.echo(f"{shown(name)} was {shown(str(former))} until now", err=True)


@roots_command.command("list")
@json_option
def list_command(as_json: bool) -> None:
    """List the registered folders."""
    roots = mk.load_roots()
    if as_json:
        entries = [{"name": name, "path": str(path), "exists": path.is_dir()} for name, path in roots.items()]
        print_json({"file": str(mk.roots_file()), "roots": entries})
        return
    if not roots:
        click.echo("No roots yet: mergekit-sd roots add NAME DIR", err=True)
    column = max((len(shown(name)) for name in roots), default=0) + 2
    for name, path in roots.items():
        missing = "" if path.is_dir() else "  (not there)"
        click.echo(f"{shown(name).ljust(column)}{shown(str(path))}{missing}")


# --- doctor -------------------------------------------------------------------------------------------

COLOURS = {"ok": "green", "note": "yellow", "problem": "red"}


@click.command("doctor")
@json_option
def doctor_command(as_json: bool) -> int:
    """Check this machine: programs, memory, disks, roots; and say what to do about each."""
    findings: list[mk.Finding] = []
    for finding in mk.check_machine():
        findings.append(finding)
        if not as_json:
            _print_finding(finding)
    problems = sum(finding.state == "problem" for finding in findings)
    if as_json:
        print_json({"ok": not problems, "checks": [finding.as_json() for finding in findings]})
    else:
        click.echo(f"\n{count(problems, 'problem')}." if problems else "\nReady.")
    return EnvironmentFault.exit_code if problems else 0


def _print_finding(finding: mk.Finding) -> None:
    label = f"{finding.state:8} {shown(finding.name)}"
    text = entry(label, shown(finding.found), 28, indent=0)
    click.echo(click.style(text[:8], fg=COLOURS[finding.state]) + text[8:])
    if finding.todo:
        click.echo(entry("", shown(finding.todo), 28))


# --- completion ---------------------------------------------------------------------------------------

PROGRAM = "mergekit-sd"
VARIABLE = "_MERGEKIT_SD_COMPLETE"


class Shell(NamedTuple):
    """Where a shell looks for completion scripts."""

    place: str
    more: str = ""


SHELLS = {
    "bash": Shell(f"~/.local/share/bash-completion/completions/{PROGRAM}"),
    "zsh": Shell(f"~/.zfunc/_{PROGRAM}", ", with `fpath+=~/.zfunc` before `compinit` in ~/.zshrc"),
    "fish": Shell(f"~/.config/fish/completions/{PROGRAM}.fish"),
}


@click.command("completion")
@click.argument("shell", required=False, metavar="[bash|zsh|fish]")
@json_option
@click.pass_context
def completion_command(context: click.Context, shell: str | None, as_json: bool) -> None:
    """Print the script that completes commands and options with the Tab key; the shell is $SHELL."""
    from click.shell_completion import get_completion_class

    name = shell or _own_shell()
    maker = get_completion_class(name) if name in SHELLS else None
    if maker is None:
        raise UsageError(f'There is no completion for "{shown(name)}".', hint=did_you_mean(name, SHELLS))
    script = maker(context.find_root().command, {}, PROGRAM, VARIABLE).source()
    place, more = SHELLS[name]
    if as_json:
        print_json({"shell": name, "script": script, "place": place})
        return
    click.echo(script)
    click.echo(f"Put it into {place}{more}; a new {name} completes {PROGRAM}.", err=True)


def _own_shell() -> str:
    name = PurePath(os.environ.get("SHELL", "")).name
    if not name:
        raise UsageError("$SHELL is not set.", hint=f"name the shell: {PROGRAM} completion bash")
    return name
