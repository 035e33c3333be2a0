"""Mix: operands, method and block weights of the recipe in the making, changed by hand.

Owns what is shown of the draft and which step, parameter and block are worked on. The draft is the
workbench's; how it is rewritten is `drafting`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.widgets import Footer, OptionList, Static
from textual.widgets.option_list import Option

import mergekit_sd as mk
from mergekit_sd.errors import MergekitError
from mergekit_sd.text import count, shown
from mergekit_sd_tui import drafting, messages, mix_rows, weights
from mergekit_sd_tui.actions import bindings
from mergekit_sd_tui.bars import BlockBars
from mergekit_sd_tui.pictures import PictureView
from mergekit_sd_tui.screens.mix_bars import BarActions
from mergekit_sd_tui.screens.mix_fields import FieldActions
from mergekit_sd_tui.screens.mix_picture import PictureActions
from mergekit_sd_tui.screens.working import Post

FAMILIES = ("sdxl-refiner", "sdxl", "sd2", "sd1")  # the longer name first
SUPPOSED = "sd1"  # where the models' family is not known


class MixScreen(BarActions, FieldActions, PictureActions):
    """Screen 3."""

    place = "mix"
    BINDINGS: ClassVar = bindings(place)
    CSS = """
    MixScreen #desk { height: 1fr; }
    MixScreen #lists { height: 1fr; max-height: 14; }
    MixScreen OptionList { width: 1fr; height: 1fr; border: none; padding: 0; scrollbar-size: 1 1;
        text-wrap: nowrap; text-overflow: ellipsis; }
    MixScreen #graph { border-right: solid $primary; }
    MixScreen #formula { height: 1; background: $panel; padding: 0 1; }
    MixScreen #value { height: 1; padding: 0 1; text-style: bold; }
    MixScreen.-short #formula { display: none; }
    MixScreen #bench { height: 1fr; min-height: 3; }
    MixScreen #picture { display: none; width: 40; border: round $primary; }
    MixScreen.-wide.drawn #picture { display: block; }
    MixScreen #empty { display: none; padding: 1 2; height: 1fr; }
    MixScreen.empty #empty { display: block; }
    MixScreen.empty #desk { display: none; }
    """

    def __init__(self) -> None:
        super().__init__()
        self._families: dict[Path, str | None] = {}

    def compose(self) -> ComposeResult:
        """The graph and the step's fields, the formula, the bars, the line that tells, the keys."""
        yield self.places()
        yield Static(id="empty")
        with Vertical(id="desk"):
            with Horizontal(id="lists"):
                yield OptionList(id="graph")
                yield OptionList(id="fields")
            yield Static(id="formula")
            yield Static(id="value")
            with Horizontal(id="bench"):
                yield BlockBars(id="bars")
                yield PictureView(id="picture")
        yield Static(id="status", classes="status")
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        """Show the draft, and whatever it becomes."""
        self.watch(self.app, "history", self._draft_changed, init=False)
        self.watch(self.app, "jobs", self._jobs_changed, init=False)
        self._draft_changed()
        self.bars.focus()

    # --- what is shown ---

    def _draft_changed(self) -> None:
        draft = self.workbench.workspace.draft
        self.recipe = None
        if not draft.text.strip():
            self._say_instead(self._first_words())
            return
        try:
            self.recipe = mk.parse_recipe(draft.text, draft.folder, draft.path)
        except MergekitError as error:
            self._say_instead(Text("\n\n".join(_problem(error, self.workbench.keys_of("app.recipe")))))
            return
        self.remove_class("empty")
        if self.step_name not in self.recipe.steps:
            self.step_name = next(reversed(self.recipe.steps), None)
        self._look_at_models()
        self.show_step()
        self.mark_picture()
        self.tell(_where(draft))

    def _say_instead(self, words: Text) -> None:
        self.add_class("empty")
        self.query_one("#empty", Static).update(words)
        self.bars.numbers = {}
        self.tell("No recipe" if not self.workbench.workspace.draft.text else "The recipe has a mistake")

    def _first_words(self) -> Text:
        keys = self.workbench.keys_of
        marked = len(self.workbench.workspace.marked)
        ready = f"\n\n{count(marked, 'model')} marked: {keys('mix.add')} mixes them." if marked else ""
        return Text(
            f"Nothing is mixed yet.\n\nMark models in the library (key {keys('app.library')}, then Space), come back "
            f"and press {keys('mix.add')};\nor press {keys('mix.add')} now and choose one by its name.{ready}"
        )

    def show_step(self) -> None:
        """The lists, the formula and the bars of the step that is worked on."""
        recipe = self.recipe
        if recipe is None:
            return
        step = self.step
        names = mix_rows.bars_of(step) if step else []
        if self.parameter not in names:
            self.parameter = names[0] if names else None
        _fill(self.query_one("#graph", OptionList), mix_rows.graph(recipe, self.step_name))
        rows = mix_rows.fields(step, self.table, self.parameter) if step else []
        _fill(self.query_one("#fields", OptionList), rows)
        words = mix_rows.formula(step.operation) if step else "No step yet."
        self.query_one("#formula", Static).update(Text(words, no_wrap=True, overflow="ellipsis"))
        self._show_bars()

    def _show_bars(self) -> None:
        self.problem = ""
        if self.step is None or self.parameter is None or self.recipe is None:
            self.bars.numbers = {}
            self.problem = "This method has no block weights." if self.step else ""
        else:
            try:
                value = drafting.value_in(self.table, self.parameter)
                place = f"steps.{self.step_name}.{self.parameter}"
                seed = self.recipe.seed if self.step.seed is None else self.step.seed
                self.bars.numbers = mk.block_weights(value, self.family, parameter=self.parameter, seed=seed)
            except MergekitError as error:
                self.bars.numbers = {}
                self.problem = f"{place}: {error.message}"
        self.show_value()

    @on(BlockBars.Moved)
    def show_value(self) -> None:
        """The line above the bars: which block has what, and how it is written."""
        block = self.bars.block
        if block is None or self.parameter is None:
            words = shown(self.problem)
        else:
            number = self.bars.numbers[block]
            span = "" if number.is_one else f" (in parts {number.low:g} to {number.high:g})"
            written = weights.shortly(drafting.value_in(self.table, self.parameter))
            known = self.family if self.known_family else f"as {SUPPOSED}: the family is not known"
            words = f"{self.parameter} at {block}: {number.value:.4g}{span}    = {written}    ({known})"
        self.query_one("#value", Static).update(Text(words, no_wrap=True, overflow="ellipsis"))

    @on(OptionList.OptionHighlighted, "#graph")
    def _step_under_cursor(self, event: OptionList.OptionHighlighted) -> None:
        what, _, name = (event.option.id or "").partition(":")
        if what == "step" and name != self.step_name:
            self.step_name = name
            self.call_next(self.show_step)

    # --- the models' family ---

    @property
    def known_family(self) -> str | None:
        """The family of the step's first model, once it has been read."""
        return next((found for path in self._paths() if (found := self._families.get(path))), None)

    @property
    def family(self) -> str:
        """Whose blocks the bars are."""
        return self.known_family or SUPPOSED

    def _paths(self) -> Sequence[Path]:
        """The files that the step is made of, its first operand's first."""
        recipe, found = self.recipe, []
        waiting, seen = [self.step_name], set()
        while recipe and waiting:
            name = waiting.pop(0)
            if name in seen or name is None:
                continue
            seen.add(name)
            if name in recipe.models:
                found.append(mk.input_path(recipe.models[name].file, recipe.folder, mk.load_roots()))
            elif name in recipe.steps:
                waiting = [*recipe.steps[name].operands.values(), *waiting]
        return found

    def _look_at_models(self) -> None:
        paths = [path for path in self._paths() if path not in self._families]
        if paths:
            self.start("Looking at the models", lambda post: _read_families(paths, post))

    @on(messages.FamilyRead)
    def _family_read(self, message: messages.FamilyRead) -> None:
        self._families[message.path] = message.family
        self.show_step()

    # --- editing ---

    def change(self, make: Callable[[str], str], said: str = "") -> bool:
        """Rewrite the draft, so that it can be undone; False, and the reason in the corner, where it cannot be."""
        workspace = self.workbench.workspace
        try:
            text = make(workspace.draft.text)
        except MergekitError as error:
            self.post_message(messages.Failed("The change", error))
            return False
        self.workbench.edit(replace(workspace, draft=replace(workspace.draft, text=text)))
        if said:
            self.tell(said)
        return True

    def action_plan(self) -> None:
        """What a run would do."""
        self.workbench.plan_draft()

    def action_run(self) -> None:
        """Write the outputs."""
        self.workbench.run_draft()


def _problem(error: MergekitError, key: str) -> list[str]:
    line = getattr(error, "line", None)
    place = f"line {line}: " if line else ""
    lines = [
        "The recipe has a mistake:",
        f"{place}{error.message}",
        error.hint or "",
        f"Mend it on the Recipe screen ({key}).",
    ]
    return [shown(each) for each in lines if each]


def _where(draft: Any) -> str:
    if draft.path is None:
        return "A draft in no file yet"
    return f"{shown(draft.path.name)}{'' if draft.is_saved else ', changed'}"


def _fill(listed: OptionList, lines: list[mix_rows.Line]) -> None:
    """New lines; the cursor stays on the line of its id."""
    old = listed.highlighted_option.id if listed.highlighted_option else None
    width = min(max((len(shown(line.label)) for line in lines), default=0), 18)
    listed.clear_options()
    listed.add_options(Option(Text(line.text(width), no_wrap=True, overflow="ellipsis"), id=line.id) for line in lines)
    ids = [line.id for line in lines]
    listed.highlighted = ids.index(old) if old in ids else 0 if lines else None


def _read_families(paths: list[Path], post: Post) -> None:
    for path in paths:
        try:
            found = mk.look_up(path).architecture or ""
        except MergekitError:  # what is missing is told by the plan
            found = ""
        family = next((each for each in FAMILIES if found == each or found.startswith(f"{each}-")), None)
        post(messages.FamilyRead(path, family))
