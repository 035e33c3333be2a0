"""The application: screens as modes, what they share, and what becomes of errors, keys and the theme.

Owns the shared state: workers and screens post messages or call the methods here. It reads models through
`mergekit_sd`'s API alone.
"""

from __future__ import annotations

import signal
import tempfile
import traceback
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from textual import on
from textual.app import App, SystemCommand
from textual.binding import Binding
from textual.filter import LineFilter
from textual.reactive import var
from textual.screen import Screen
from textual.theme import Theme

import mergekit_sd as mk
from mergekit_sd.errors import MergekitError
from mergekit_sd.text import count, shown
from mergekit_sd_tui.actions import ACTIONS, APP, actions_of, bindings
from mergekit_sd_tui.drafting import new_mix
from mergekit_sd_tui.glyphs import LETTERS, filters
from mergekit_sd_tui.history import History
from mergekit_sd_tui.jobs import Job, JobQueue
from mergekit_sd_tui.messages import Failed, JobEnded
from mergekit_sd_tui.screens.choose import Choose
from mergekit_sd_tui.screens.diff import DiffScreen
from mergekit_sd_tui.screens.gallery import GalleryScreen
from mergekit_sd_tui.screens.help import HelpScreen, sections
from mergekit_sd_tui.screens.inspector import InspectorScreen
from mergekit_sd_tui.screens.jobs import JobsScreen
from mergekit_sd_tui.screens.library import LibraryScreen
from mergekit_sd_tui.screens.mix import MixScreen
from mergekit_sd_tui.screens.recipe import RecipeScreen
from mergekit_sd_tui.settings import THEME, load_settings, save_theme
from mergekit_sd_tui.state import Draft, Workspace


class Workbench(App[None], inherit_bindings=False):
    """The terminal UI of mergekit-sd."""

    TITLE = "mergekit-sd"
    MODES: ClassVar = {
        "library": LibraryScreen,
        "inspector": InspectorScreen,
        "mix": MixScreen,
        "recipe": RecipeScreen,
        "jobs": JobsScreen,
        "gallery": GalleryScreen,
        "diff": DiffScreen,
    }
    DEFAULT_MODE = "library"
    BINDINGS: ClassVar = [*bindings(APP), Binding("ctrl+c", "help_quit", show=False, system=True)]
    # Textual declares these two as of an instance.
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (100, "-wide")]  # noqa: RUF012
    VERTICAL_BREAKPOINTS = [(0, "-short"), (16, "-tall")]  # noqa: RUF012
    CSS = """
    #body { height: 1fr; layout: vertical; }
    .-wide #body { layout: horizontal; }
    .main { height: 2fr; width: 1fr; }
    .-wide .main { height: 1fr; width: 2fr; }
    .side { height: 1fr; width: 1fr; border-top: solid $primary; padding: 0 1; }
    .-wide .side { height: 1fr; width: 1fr; border-top: none; border-left: solid $primary; }
    .-short .side, .empty .side { display: none; }
    .status { height: 1; background: $panel; padding: 0 1; }
    .filter { display: none; height: 1; border: none; padding: 0 1; }
    .places { height: 1; background: $panel; padding: 0 1; }
    .-short .places { display: none; }
    .side, ModelTable, TensorTree { scrollbar-size: 1 1; }
    """

    history: var[History[Workspace]] = var(History(Workspace()), init=False)
    current: var[Path | None] = var(None, init=False)
    """The model that the inspector shows."""
    pictures: var[Path | None] = var(None, init=False, always_update=True)
    """The folder of samples that the gallery was asked for."""
    pair: var[tuple[Path, Path] | None] = var(None, init=False, always_update=True)
    """The two models that are to be compared."""
    jobs: var[tuple[Job, ...]] = var((), init=False)
    made: var[tuple[Path, ...]] = var((), init=False)
    """All files that jobs have made."""
    asked: var[str] = var("", init=False)
    """What the Recipe screen is to do with the draft: "plan" or "run"; it takes this back."""

    def __init__(self, start: Path | None = None) -> None:
        super().__init__()
        self._settings = load_settings()
        self._start = start
        self._ascii = filters()
        self.queue = JobQueue(self._show_jobs, self._tell_end)
        self.last_words = ""  # for the terminal, once it is the user's again
        self._leaving = False

    def on_mount(self) -> None:
        """Theme and keys as the user wants them."""
        known = self._settings.theme in self.available_themes
        self.theme = self._settings.theme if known else THEME
        self.set_keymap(dict(self._settings.keys))
        self.theme_changed_signal.subscribe(self, self._keep_theme)
        for note in self._settings.notes:
            self.say(note, severity="warning")
        if not known:
            self.say(f'tui.toml: no theme "{shown(self._settings.theme)}"', severity="warning")
        self._leave_on_signals()
        if self._start is not None and not self._start.is_dir():
            open_it = self.open_recipe if self._start.suffix == ".toml" else self.inspect_model
            self.call_after_refresh(open_it, self._start)

    @property
    def folder(self) -> Path | None:
        """The folder that the user named at the start, for the library to scan."""
        return self._start if self._start is not None and self._start.is_dir() else None

    def get_line_filters(self) -> Sequence[LineFilter]:
        """What all that is drawn goes through."""
        return (*super().get_line_filters(), *self._ascii)

    def get_key_display(self, binding: Binding) -> str:
        """A key as people write it; in letters where the terminal has no signs for it."""
        display = super().get_key_display(binding)
        return LETTERS.get(binding.key, binding.key) if self._ascii and not display.isascii() else display

    def _leave_on_signals(self) -> None:
        """`kill` and a closed terminal leave as ctrl+q does: workers stop, the terminal is as it was."""
        import asyncio

        for name in ("SIGTERM", "SIGHUP"):
            if hasattr(signal, name):
                try:
                    asyncio.get_running_loop().add_signal_handler(getattr(signal, name), self._leave)
                except (NotImplementedError, RuntimeError, ValueError):  # Windows; not the main thread
                    return

    def _keep_theme(self, theme: Theme) -> None:
        try:
            save_theme(theme.name)
        except (OSError, ValueError) as error:
            self.say(f"The theme cannot be kept: {shown(str(error))}", severity="warning")

    # --- what screens share ---

    @property
    def workspace(self) -> Workspace:
        """What is marked now."""
        return self.history.now

    def edit(self, workspace: Workspace) -> None:
        """Change what is shared, so that it can be undone."""
        self.history = self.history.edited(workspace)

    def inspect_model(self, path: Path) -> None:
        """Show a model in the inspector."""
        self.current = path
        self.action_show_screen("inspector")

    def compare(self, a: Path, b: Path) -> None:
        """Compare two models on the Diff screen."""
        self.pair = (a, b)
        self.action_show_screen("diff")

    def show_pictures(self, folder: Path) -> None:
        """Show a folder of samples in the gallery."""
        self.pictures = folder
        self.action_show_screen("gallery")

    def mix(self, paths: Sequence[Path]) -> None:
        """Make a draft that merges these models, LoRAs put into the result; z brings back what was there before."""
        former = self.workspace.draft
        try:
            kinds = {path: mk.look_up(path).kind for path in paths}
            loras = [path for path in paths if kinds[path] in ("lora", "lycoris")]
            draft = new_mix([path for path in paths if path not in loras], Draft().folder, loras)
        except MergekitError as error:
            self.say(told(error), title="This cannot be mixed", severity="error")
            return
        self.edit(replace(self.workspace, draft=draft))
        if former.text and not former.is_saved:
            self.say(f"What was here was not saved: {self.keys_of('app.undo')} brings it back.")
        self.action_show_screen("mix")

    def open_recipe(self, path: Path) -> None:
        """Make the draft of a recipe's file, and show it; z brings back what was there before."""
        path = path.absolute()
        try:
            text = mk.read_recipe_text(path)
        except MergekitError as error:
            self.say(told(error), title="The recipe cannot be opened", severity="error")
            return
        former = self.workspace.draft
        self.edit(replace(self.workspace, draft=Draft(text, path, text)))
        if former.text and not former.is_saved:
            self.say(f"What was here was not saved: {self.keys_of('app.undo')} brings it back.")
        self.action_show_screen("recipe")

    def plan_draft(self) -> None:
        """Tell on the Recipe screen what a run of the draft would do."""
        self.action_show_screen("recipe")
        self.asked = "plan"

    def run_draft(self) -> None:
        """Save the draft and run it as a job."""
        self.action_show_screen("recipe")
        self.asked = "run"

    def submit(self, title: str, arguments: Sequence[str]) -> None:
        """Queue `python -m mergekit_sd ARGUMENTS --json` as a job."""
        waiting = [job for job in self.jobs if job.state == "queued" and job.arguments == tuple(arguments)]
        if waiting:  # two runs of one file would both run what it says when their turn comes
            self.say("This is in the queue already; it runs as its files are then.")
        else:
            self.queue.submit(title, arguments)

    def _show_jobs(self, jobs: tuple[Job, ...]) -> None:
        self.jobs = jobs

    def _tell_end(self, job: Job) -> None:
        self.post_message(JobEnded(job))

    @on(JobEnded)
    def _job_ended(self, message: JobEnded) -> None:
        job = message.job
        if job.files:
            self.made = (*self.made, *job.files)
        severity = "error" if job.state == "failed" else "information"
        words = told(job.error) if job.state == "failed" and job.error else f"{shown(job.title)}: {job.state}"
        if job.pictures and self.current_mode != "gallery":
            self.pictures = job.pictures
            words += f"; {self.keys_of('app.gallery')} shows its pictures"
        self.say(words, title=f"{shown(job.title)} failed" if job.state == "failed" else "", severity=severity)

    def say(self, words: str, *, title: str = "", severity: str = "information") -> None:
        """A message in the corner. Foreign text in it must be escaped; nothing in it is markup."""
        timeout = 10.0 if severity == "error" else 5.0
        self.notify(words, title=title, severity=severity, timeout=timeout, markup=False)  # type: ignore[arg-type]

    @on(Failed)
    def _tell_failure(self, message: Failed) -> None:
        self.say(told(message.error), title=f"{message.work} failed", severity="error")

    def _fatal_error(self) -> None:
        """Of Textual's: what becomes of a bug. A sentence, not pages; the traceback and the recipe are in files."""
        error = self._exception or RuntimeError("unknown")
        self.last_words = "\n".join([told(error), *self._rescued()])
        self.panic()

    def _rescued(self) -> list[str]:
        """Where a recipe lies now that was not saved."""
        draft = self.workspace.draft
        if draft.is_saved or not draft.text.strip():
            return []
        with tempfile.NamedTemporaryFile(
            "w", prefix="mergekit-sd-", suffix=".toml", delete=False, encoding="utf-8"
        ) as file:
            file.write(draft.text)
        return [f"The recipe that was not saved is in {file.name}"]

    # --- actions ---

    def action_show_screen(self, name: str) -> None:
        """Go to a screen."""
        self.switch_mode(name)

    def action_undo(self) -> None:
        """Take the last edit back."""
        self._travel(self.history.undone(), "Nothing to undo.")

    def action_redo(self) -> None:
        """Do again what was undone."""
        self._travel(self.history.redone(), "Nothing to redo.")

    def _travel(self, history: History[Workspace], otherwise: str) -> None:
        if history is self.history:
            self.say(otherwise)
        self.history = history

    async def action_quit(self) -> None:
        """Leave; where something would be lost, ask."""
        under_way = sum(not job.is_over for job in self.jobs)
        draft = self.workspace.draft
        reasons = [f"{count(under_way, 'job')} under way: leaving cancels."] if under_way else []
        reasons += ["The recipe is not saved."] if draft.text.strip() and not draft.is_saved else []
        if reasons and not self._leaving:
            answers = {"stay": "Stay", "leave": "Leave"}
            ask = Choose("\n".join(reasons), answers)
            self.push_screen(ask, lambda answer: self._leave() if answer == "leave" else None)
        else:
            self._leave()

    def _leave(self) -> None:
        """Wait for the jobs to end, then leave."""
        if not self._leaving:
            self._leaving = True
            if any(not job.is_over for job in self.jobs):
                self.say("Stopping the jobs …")
            self.run_worker(self._stop_and_exit())

    async def _stop_and_exit(self) -> None:
        await self.queue.close()
        self.exit()

    async def on_unmount(self) -> None:
        """However the UI ends, no process is left."""
        await self.queue.close()

    def action_help(self) -> None:
        """All keys of the screen, those of the focused widget first."""
        place = self.current_mode
        every = sections(place, self.screen, self.keys_of, self.get_key_display)
        self.push_screen(HelpScreen(every, [action.id for action in actions_of(place)]))

    def keys_of(self, action_id: str) -> str:
        """The keys of an action as people write them, the user's own included."""
        default = next(action.keys for action in ACTIONS if action.id == action_id)
        keys = self._settings.keys.get(action_id, default).split(",")
        return " ".join(self.get_key_display(Binding(key.strip(), "")) for key in keys)

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        """The palette: the screen's actions, then those of Textual that make sense here."""
        for action in actions_of(self.current_mode):
            if action.id != "app.command_palette":
                # No brackets around the key: the palette takes them for markup.
                words = f"{action.help} Key: {self.keys_of(action.id)}"
                yield SystemCommand(action.label, words, self._caller(action.call))
        yield SystemCommand("Theme", "Choose other colours; the choice is kept.", self.action_change_theme)

    def _caller(self, call: str) -> Callable[[], Awaitable[None]]:
        async def run() -> None:
            await self.run_action(call, self.screen)

        return run


def told(error: Exception) -> str:
    """An error in words: what, where, what to do. What is none of ours leaves its traceback in a file."""
    if isinstance(error, MergekitError):
        lines = [error.message, error.file or "", *error.details[:5], error.hint or ""]
        return "\n".join(shown(line) for line in lines if line)
    with tempfile.NamedTemporaryFile("w", prefix="mergekit-sd-", suffix=".log", delete=False, encoding="utf-8") as log:
        traceback.print_exception(error, file=log)
    return f"This is a bug: {type(error).__name__}: {shown(str(error))}\nPlease report it with the file {log.name}"
