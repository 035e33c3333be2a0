"""The command group, and the one place that owns stderr, signals and exit codes.

Commands are imported when they are called, so that `--help` and a typo answer at once.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import click
from click.shell_completion import CompletionItem

from mergekit_sd.cli.streams import make_speakable, wanted_color
from mergekit_sd.errors import Cancelled, MergekitError, UsageError
from mergekit_sd.events import CancelToken
from mergekit_sd.text import did_you_mean

# Command, module of mergekit_sd.cli that holds it, help in the list. Sections in the order shown.
COMMANDS: dict[str, dict[str, tuple[str, str]]] = {
    "Recipes": {
        "run": ("run", "Make the outputs of recipes."),
        "plan": ("run", "Tell what a run would do, from headers alone."),
        "check": ("run", "Check a recipe without opening a model."),
        "merge": ("merge", "Merge models without writing a recipe."),
        "demo": ("demo", "Make small models and merge them, to see how it works."),
    },
    "Pictures": {
        "sample": ("sample", "Draw with models, or with a merge that was never written."),
        "sweep": ("sweep", "Draw a recipe with every value that it wants tried."),
    },
    "Surgery": {
        "prune": ("surgery", "Take out junk and the EMA copy."),
        "fix": ("surgery", "Mend position ids and NovelAI's names."),
        "extract": ("surgery", "Write one component as a file of its own."),
        "bake-vae": ("surgery", "Put another VAE into a checkpoint."),
        "convert": ("convert", "Write any file with another dtype, container or names."),
    },
    "LoRA": {
        "lora": ("lora", "Put LoRA files and their relatives into models."),
    },
    "Embeddings": {
        "embedding": ("embedding", "Blend textual inversions, or put them one after the other."),
        "hypernetwork": ("embedding", "Average hypernetworks, or make one stronger or weaker."),
    },
    "Files": {
        "inspect": ("inspect", "Tell what a model file is and what is in it."),
        "diff": ("inspect", "Compare two models block by block."),
        "hash": ("inspect", "Hash a file the ways that tools know it by."),
        "recover": ("provenance", "Get the recipe back out of a merged file."),
        "verify": ("provenance", "Rebuild a file from its recipe and compare."),
    },
    "Library": {
        "tui": ("tui", "Look at models, mark and mend them in the terminal."),
        "library": ("lineage", "Index the models of this machine; find what is there twice."),
        "vae": ("vae", "Find out which VAEs are one, and keep each only once."),
    },
    "Reference": {
        "ops": ("reference", "List the merge operations, or explain one."),
        "presets": ("reference", "List the block weight presets."),
        "schema": ("reference", "Print the recipe's JSON Schema for editors."),
    },
    "Setup": {
        "roots": ("setup", "Name the folders that models lie in."),
        "doctor": ("setup", "Check this machine, and say what to do."),
        "completion": ("setup", "Print the shell completion script."),
    },
}


IMPATIENCE = 1.0  # seconds after which one more Ctrl-C is meant anew


class Group(click.Group):
    """A group that imports a command when it is called and suggests one for a typo."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every command, in the order of the sections."""
        return [name for section in COMMANDS.values() for name in section]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported."""
        for section in COMMANDS.values():
            if cmd_name in section:
                module = importlib.import_module(f"mergekit_sd.cli.{section[cmd_name][0]}")
                command: click.Command = getattr(module, f"{cmd_name.replace('-', '_')}_command")
                return command
        return None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with a suggestion."""
        if args and args[0] not in self.list_commands(ctx) and not args[0].startswith("-"):
            ctx.fail(f'No command "{args[0]}"; {did_you_mean(args[0], self.list_commands(ctx))}')
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """The commands from the table: none is imported for it."""
        known = [(name, text) for section in COMMANDS.values() for name, (_, text) in section.items()]
        items = [CompletionItem(name, help=text) for name, text in known if name.startswith(incomplete)]
        return [*items, *click.Command.shell_complete(self, ctx, incomplete)]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, from the table: nothing is imported for it."""
        for title, section in COMMANDS.items():
            with formatter.section(title):
                formatter.write_dl([(name, text) for name, (_, text) in section.items()])


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]}, no_args_is_help=True)
@click.version_option(package_name="mergekit-sd", prog_name="mergekit-sd")
def cli() -> None:
    """Merge and operate on Stable Diffusion models: streaming, from recipes, bit for bit."""


def run(arguments: list[str]) -> int:
    """Run the command line and return its exit code. Every error is told here, once."""
    make_speakable()
    token = CancelToken()
    json_wanted = "--json" in arguments
    with _interruptible(token):
        try:
            result = cli.main(
                arguments, prog_name="mergekit-sd", standalone_mode=False, obj=token, color=wanted_color()
            )
            return result if isinstance(result, int) else 0
        except MergekitError as error:
            return _tell(error, json_wanted)
        except click.ClickException as error:
            if json_wanted:
                return _tell(UsageError(error.format_message()), json_wanted)
            error.show()
            return 2
        except (KeyboardInterrupt, click.Abort):
            return _tell(Cancelled(), json_wanted)
        except SystemExit:  # click's way of saying that the reader of our output (`| head`) has gone
            return 0
        except MemoryError:
            return _tell(_out_of_memory(), json_wanted)
        except Exception as error:
            if token.cancelled:  # an import that is cut short may make anything of the KeyboardInterrupt
                return _tell(Cancelled(), json_wanted)
            return _tell_bug(error, json_wanted)


def _out_of_memory() -> MergekitError:
    from mergekit_sd.errors import EnvironmentFault

    return EnvironmentFault("The memory ran out.", hint="close other programs, or give --threads 1")


def _tell(error: MergekitError, json_wanted: bool) -> int:
    from mergekit_sd.cli.show import print_error, print_json

    if json_wanted:
        print_json({"error": error.as_json()})
    print_error(error, json_wanted)
    return error.exit_code


def _tell_bug(error: Exception, json_wanted: bool) -> int:
    """An error of ours: one line for the user, the traceback into a file for the report."""
    import tempfile
    import traceback

    with tempfile.NamedTemporaryFile("w", prefix="mergekit-sd-", suffix=".log", delete=False, encoding="utf-8") as log:
        traceback.print_exception(error, file=log)
    if json_wanted:
        from mergekit_sd.cli.show import print_json

        print_json({"error": {"type": type(error).__name__, "message": str(error), "exit_code": 1}})
    click.echo(f"This is a bug in mergekit-sd: {type(error).__name__}: {error}", err=True)
    click.echo(f"Please report it with the file {log.name}", err=True)
    return 1


@contextlib.contextmanager
def _interruptible(token: CancelToken) -> Iterator[None]:
    """Signals end a run through its token, everything else at once; more of them within a second change nothing."""
    raised = -math.inf

    def handle(_signal: int, _frame: FrameType | None) -> None:
        nonlocal raised
        token.cancel()
        if not token.listening and time.monotonic() - raised > IMPATIENCE:
            raised = time.monotonic()  # should some import have swallowed it, the next Ctrl-C raises again
            raise KeyboardInterrupt

    former: dict[int, Any] = {}
    try:
        for number in stop_signals():
            former[number] = signal.signal(number, handle)
    except ValueError:  # not in the main thread: the caller's handlers stay
        pass
    hook, sys.unraisablehook = sys.unraisablehook, _tell_unraisable
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in former.items():
            signal.signal(number, handler)


def stop_signals() -> list[int]:
    """Ctrl-C, `kill`, a closed terminal (unless under nohup), Ctrl-Break; as far as the platform has them."""
    found = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)]
    hangup = getattr(signal, "SIGHUP", None)
    if hangup is not None and signal.getsignal(hangup) == signal.SIG_DFL:
        found.append(hangup)
    return found


def _tell_unraisable(unraisable: sys.UnraisableHookArgs) -> None:
    """As Python does, but for a Ctrl-C that lands in a callback of the garbage collector: the token knows of it."""
    if not isinstance(unraisable.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
