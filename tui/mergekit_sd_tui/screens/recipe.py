"""The recipe: its text in an editor, checked while it is typed, saved, planned and run.

Owns what stands in the editor. The text itself is the workspace's draft, which the Mix screen edits, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from rich.text import Text
from textual import events, on
from textual.app import ComposeResult
from textual.containers import Container, Vertical, VerticalScroll
from textual.timer import Timer
from textual.widgets import Footer, Static, TextArea

import mergekit_sd as mk
from mergekit_sd.errors import MergekitError, OutputExists
from mergekit_sd.text import shown
from mergekit_sd_tui import messages, plan_report
from mergekit_sd_tui.actions import bindings
from mergekit_sd_tui.drafting import moved
from mergekit_sd_tui.editor import Editor
from mergekit_sd_tui.recipe_file import ChangedOutside, Stamp, stamp_of, write_recipe
from mergekit_sd_tui.screens.ask import AskPath
from mergekit_sd_tui.screens.ask_recipe import AskRecipe
from mergekit_sd_tui.screens.choose import Choose
from mergekit_sd_tui.screens.working import Post, WorkingScreen
from mergekit_sd_tui.state import Draft, Workspace

PAUSE = 0.4  # seconds without a key after which what was typed is one edit, and is checked
LOOK_SECONDS = 1.0  # between two looks at whether another program wrote the file
PLACEHOLDER = "No recipe yet. Enter starts one here; or mark models in the library and mix them."

Then = Callable[[], None]


class RecipeScreen(WorkingScreen):
    """Screen 4."""

    place = "recipe"
    BINDINGS: ClassVar = bindings(place)
    CSS = """
    RecipeScreen #written { height: 2fr; width: 1fr; }
    RecipeScreen.-wide #written { height: 1fr; width: 3fr; }
    RecipeScreen.-wide .side { width: 2fr; }
    RecipeScreen #editor { height: 1fr; }
    RecipeScreen #problem { height: auto; max-height: 5; padding: 0 1; background: $panel; display: none; }
    RecipeScreen #problem.open { display: block; }
    RecipeScreen.-narrow .side { display: none; }
    RecipeScreen.-narrow.-tall.planned .side { display: block; }
    RecipeScreen.-narrow.-tall.planned #written { height: 1fr; }
    """

    def __init__(self) -> None:
        super().__init__()
        self._taken = ""  # the draft's text that the editor was given or gave
        self._loaded = ""  # the same as the editor has it: it may write line ends in its own way
        self._seen: tuple[Path, Stamp | None] | None = None
        self._found = ""
        self._refused = ""  # the text that a plan, or the disk, found something wrong with
        self._plan: dict[str, Any] | None = None
        self._planned = ""  # the text that the plan is of
        self._typing: Timer | None = None

    def compose(self) -> ComposeResult:
        """Editor and problem, the plan, the line that tells, the keys."""
        yield self.places()
        with Container(id="body"):
            with Vertical(id="written"):
                yield Editor(PLACEHOLDER)
                yield Static(id="problem")
            with VerticalScroll(classes="side", id="side"):
                yield Static(id="plan")
        yield Static(id="status", classes="status")
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        """Show the draft; what was asked for before there was a screen is done now."""
        self.watch(self.app, "history", self._take_draft, init=False)
        self.query_one("#plan", Static).update(Text(f"{self.workbench.keys_of('recipe.plan')} tells what a run does."))
        self._take_draft()
        self._check()
        self.set_interval(LOOK_SECONDS, self._look_at_file)
        self.watch(self.app, "asked", self._do_asked)

    @property
    def _editor(self) -> Editor:
        return self.query_one(Editor)

    @property
    def _draft(self) -> Draft:
        return self.workbench.workspace.draft

    def _edit(self, draft: Draft) -> None:
        self.workbench.edit(replace(self.workbench.workspace, draft=draft))

    def _do_asked(self, asked: str) -> None:
        if asked:
            self.workbench.asked = ""
            self.call_later(self.action_plan if asked == "plan" else self.action_run)

    # --- the text, here and in the draft ---

    def _take_draft(self) -> None:
        """The draft may have been changed by another screen, or by undo."""
        draft = self._draft
        if draft.text != self._taken:
            self._editor.show_text(draft.text)
            self._taken, self._loaded = draft.text, self._editor.text
            self._check()
            self._draw_plan()
        self._tell_state()

    def keep(self) -> None:
        """Make one edit of what was typed since the last."""
        text = self._editor.text
        if text != self._loaded:
            self._taken = self._loaded = text
            self._edit(replace(self._draft, text=text))
            self._check()
            self._draw_plan()

    @on(TextArea.Changed)
    def _typed(self) -> None:
        if self._typing:
            self._typing.stop()
        self._typing = self.set_timer(PAUSE, self.keep)

    @on(events.ScreenSuspend)
    def _left(self) -> None:
        self.keep()

    # --- checks ---

    def _check(self) -> None:
        draft = self._draft
        if draft.text.strip():
            self.start("The check", lambda post: post(_checked(draft)))
        else:
            self._found = ""
            self._show_problem(None)

    @on(messages.RecipeChecked)
    def _take_check(self, message: messages.RecipeChecked) -> None:
        if message.text == self._draft.text and (message.error or message.text != self._refused):
            self._found = message.words
            self._show_problem(message.error)

    def _refuse(self, error: MergekitError | None, *, of_file: bool = False) -> None:
        """A problem that the text alone does not have: it stays until the text is another."""
        self._refused = self._draft.text if error else ""
        self._show_problem(error, of_file=of_file)

    def _show_problem(self, error: MergekitError | None, *, of_file: bool = False) -> None:
        """Underline its place, tell the rest below; None: all is well. `of_file`: its place is not in this text."""
        ours = error is not None and not of_file and error.file in (None, str(self._draft.path))
        self._editor.mark(error.line if error and ours else None, error.column if error else None)
        line = self.query_one("#problem", Static)
        line.set_class(error is not None, "open")
        line.update(plan_report.problem(error, named=not ours) if error else Text(""))
        self._tell_state("" if error is None else "a problem")

    def _tell_state(self, found: str | None = None) -> None:
        if found is not None:
            self._found = found or self._found
        draft = self._draft
        name = shown(draft.path.name) if draft.path else "new recipe"
        state = "" if draft.is_saved or not draft.text else " (not saved)"
        self.tell(f"{name}{state}" + (f": {self._found}" if self._found else ""))

    # --- the file ---

    def action_save(self) -> None:
        """Write the file."""
        self._save(lambda: None)

    def _save(self, then: Then) -> None:
        self.keep()
        draft = self._draft
        if not draft.text.strip():
            self.workbench.say("There is nothing to save yet.")
        elif draft.path is None:
            ask = AskPath("Save the recipe as:", _free_path(draft.folder))
            self.app.push_screen(ask, lambda path: self._write(draft, path, "", then) if path else None)
        else:
            self._write(draft, draft.path, draft.saved, then)

    def _write(self, draft: Draft, path: Path, expected: str | None, then: Then) -> None:
        path = path.absolute()
        text = draft.text if draft.path else moved(draft.text, draft.folder, path.parent)
        try:
            write_recipe(path, text, expected)
        except ChangedOutside as error:
            self._ask_which(draft, path, error.found, then)
        except MergekitError as error:
            self.post_message(messages.Failed("Saving", error))
        else:
            self._amend(draft.path, path, text)
            self._seen = (path, stamp_of(path))
            self._check()
            self._tell_state()
            self.workbench.say(f"{shown(path.name)} is saved.")
            then()

    def _amend(self, former: Path | None, path: Path, saved: str) -> None:
        """What a file holds is no edit: undo must not forget it."""

        def told(step: Workspace) -> Workspace:
            draft = step.draft
            if draft.path != former:
                return step
            text = draft.text if former else moved(draft.text, draft.folder, path.parent)
            return replace(step, draft=Draft(text, path, saved))

        self.workbench.history = self.workbench.history.amended(told)

    def _ask_which(self, draft: Draft, path: Path, found: str | None, then: Then) -> None:
        answers = {"keep": "Keep mine: write it over the other"}
        if found is not None:
            answers = {"reload": "Reload: take the other; z brings mine back", **answers}

        def answered(answer: str | None) -> None:
            if answer == "reload" and found is not None:
                self._take_file(path, found)
            elif answer == "keep":
                if found is not None:  # z finds it
                    self._edit(replace(draft, text=found))
                    self._edit(draft)
                self._write(draft, path, None, then)

        self.app.push_screen(Choose(f"{shown(path.name)} was changed by another program.", answers), answered)

    def _look_at_file(self) -> None:
        path = self._draft.path
        if path is not None:
            seen = self._seen[1] if self._seen and self._seen[0] == path else None
            self.start("Looking at the file", lambda post: _look(path, seen, post))

    @on(messages.RecipeRead)
    def _file_changed(self, message: messages.RecipeRead) -> None:
        self.keep()
        draft = self._draft
        if message.path != draft.path:
            return
        self._seen = (message.path, message.stamp)
        if message.error:
            self._refuse(message.error, of_file=True)
            self.workbench.say("The recipe's file cannot be read; what is here is kept.", severity="warning")
        elif message.text not in (None, draft.saved):
            if self._draft.is_saved and message.text is not None:
                self._take_file(message.path, message.text)
                self.workbench.say("Another program changed the recipe: this is its text. z brings yours back.")
            else:
                key = self.workbench.keys_of("recipe.save")
                self.workbench.say(f"Another program changed the recipe's file: {key} asks which to keep.")
                self._tell_state("its file was changed by another program")

    def _take_file(self, path: Path, text: str) -> None:
        self._amend(path, path, text)
        self._edit(replace(self._draft, path=path, text=text, saved=text))

    def action_open(self) -> None:
        """Open another recipe."""
        self.keep()
        self.app.push_screen(
            AskRecipe(self._draft.folder), lambda path: self.workbench.open_recipe(path) if path else None
        )

    # --- plan and run ---

    def action_plan(self) -> None:
        """What a run would do."""
        self.keep()
        draft = self._draft
        if not draft.text.strip():
            self.workbench.say("There is no recipe yet.")
            return
        self._tell_state("planning …")
        self.start("The plan", lambda post: post(_planned(draft)))

    @on(messages.Planned)
    def _show_plan(self, message: messages.Planned) -> None:
        if message.draft.text != self._draft.text:
            return
        self._plan, self._planned = message.report, message.draft.text
        self.set_class(message.report is not None, "planned")
        self._refuse(message.error)
        if message.report is not None:
            self._tell_state(plan_report.summary(message.report))
        self._draw_plan()

    def _draw_plan(self) -> None:
        if self._plan is not None:
            old = self._planned != self._draft.text
            note = f"Of an earlier text; {self.workbench.keys_of('recipe.plan')} plans anew.\n\n" if old else ""
            self.query_one("#plan", Static).update(plan_report.Plan(self._plan, note))

    def action_run(self) -> None:
        """Save, look whether it can be run, run."""
        self._save(self._before_run)

    def _before_run(self) -> None:
        draft = self._draft
        self._tell_state("looking at the targets …")
        self.start("The plan", lambda post: post(messages.RunChecked(draft, _planned(draft).error)))

    @on(messages.RunChecked)
    def _run_checked(self, message: messages.RunChecked) -> None:
        draft, error = message.draft, message.error
        if draft != self._draft or draft.path is None:
            return
        if isinstance(error, OutputExists):
            place = f"\n{shown(error.file)}" if error.file else ""
            answers = {"back": "No, go back", "force": "Yes, replace it"}
            ask = Choose(f"The output is there already. Replace it?{place}", answers)
            self.app.push_screen(ask, lambda answer: self._submit(draft, "--force") if answer == "force" else None)
        elif error:
            self._refuse(error)
        else:
            self._submit(draft)

    def _submit(self, draft: Draft, *options: str) -> None:
        assert draft.path is not None
        self.action_back()  # there keys are keys again when one comes back
        self.workbench.submit(f"run {draft.path.name}", ("run", str(draft.path), *options))
        self.workbench.action_show_screen("jobs")

    # --- focus ---

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """In the text there is only Esc, outside only Enter, for the other."""
        if action in ("back", "write"):
            return isinstance(self.focused, Editor) == (action == "back")  # asked before the screen is there, too
        return super().check_action(action, parameters)

    def action_back(self) -> None:
        """Leave the editor, so that keys are no longer text."""
        self.keep()
        self.query_one("#side").focus() if self._plan else self.set_focus(None)

    def action_write(self) -> None:
        """Back into the editor."""
        self.set_focus(self._editor)  # at once: what is typed meanwhile is text


def _free_path(folder: Path) -> Path:
    names = (f"recipe{'' if number == 1 else f'-{number}'}.toml" for number in range(1, 1 << 30))
    return next(path for name in names if not (path := folder / name).exists())


# --- workers: they only post ---------------------------------------------------------------------------


def _checked(draft: Draft) -> messages.RecipeChecked:
    try:
        recipe = mk.parse_recipe(draft.text, draft.folder, draft.path)
    except MergekitError as error:
        return messages.RecipeChecked(draft.text, "", error)
    return messages.RecipeChecked(draft.text, plan_report.parts(recipe), None)


def _planned(draft: Draft) -> messages.Planned:
    """The plan, and what a run would raise before it computes."""
    report = None
    try:
        recipe = mk.parse_recipe(draft.text, draft.folder, draft.path)
    except MergekitError as error:
        return messages.Planned(draft, None, error)
    try:
        plan = mk.plan(recipe)
        report = mk.plan_as_json(plan)
        mk.check_run(plan)
    except MergekitError as error:
        return messages.Planned(draft, report, plan_report.placed(error, recipe))
    return messages.Planned(draft, report, None)


def _look(path: Path, seen: Stamp | None, post: Post) -> None:
    stamp = stamp_of(path)
    if stamp is not None and stamp != seen:
        try:
            post(messages.RecipeRead(path, stamp, mk.read_recipe_text(path), None))
        except MergekitError as error:
            post(messages.RecipeRead(path, stamp, None, error))
