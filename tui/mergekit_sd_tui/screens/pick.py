"""Asking for one of many with a preview, and asking for a few words.

Own the questions. Must not know what becomes of the answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from rich.text import Text
from textual import events, on
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from mergekit_sd.errors import MergekitError
from mergekit_sd.text import shown

MOST = 200  # that are listed; typing narrows them


@dataclass(frozen=True, slots=True)
class Item:
    """One of many: what is answered, its line, and what is looked through besides."""

    id: str
    line: str
    more: str = ""

    def has(self, words: Sequence[str]) -> bool:
        """Whether all words are in it."""
        text = f"{self.line} {self.more}".casefold()
        return all(word in text for word in words)


class Pick(ModalScreen[str | None]):
    """Answers with the id of an item, or None. Typing narrows; the arrows move; `preview` shows what one is."""

    BINDINGS: ClassVar = [Binding("escape", "leave", "Leave it")]
    CSS = """
    Pick { align: center middle; }
    Pick Vertical { width: 80; max-width: 100%; height: 90%; border-top: solid $primary; border-bottom: solid $primary;
        padding: 0 1; }
    Pick Input { border: none; height: 1; padding: 0; }
    Pick OptionList { height: 1fr; border: none; padding: 0; }
    Pick #preview { height: auto; max-height: 9; }
    """

    def __init__(
        self, question: str, items: Sequence[Item], preview: Callable[[str], Text] | None = None, at: str | None = None
    ) -> None:
        super().__init__()
        self._question = question
        self._items = items
        self._preview = preview
        self._at = at

    def compose(self) -> ComposeResult:
        """The question, words to narrow by, the items, the preview."""
        with Vertical():
            yield Static(Text(self._question))
            yield Input(placeholder="words to look for")
            yield OptionList()
            yield Static(id="preview")
            yield Static(Text("Enter chooses, Esc goes back.", style="dim"), id="told")

    def on_mount(self) -> None:
        """All items, the cursor on the present one."""
        self.query_one(OptionList).can_focus = False
        self._fill(self._items)
        at = next((index for index, item in enumerate(self._items[:MOST]) if item.id == self._at), 0)
        self.query_one(OptionList).highlighted = at if self._items else None

    def _fill(self, items: Sequence[Item]) -> None:
        listed = self.query_one(OptionList)
        listed.clear_options()
        listed.add_options(Option(Text(shown(item.line), no_wrap=True), id=item.id) for item in items[:MOST])
        listed.highlighted = 0 if items else None
        more = f"{len(items) - MOST:,} more: type words. " if len(items) > MOST else ""
        none = "Nothing has these words. " if not items else ""
        self.query_one("#told", Static).update(Text(f"{none}{more}Enter chooses, Esc goes back.", style="dim"))
        if not items:
            self.query_one("#preview", Static).update("")

    @on(Input.Changed)
    def _narrow(self, event: Input.Changed) -> None:
        text = event.value.casefold()
        found = [item for item in self._items if item.has(text.split())]
        self._fill(sorted(found, key=lambda item: not item.line.casefold().strip().startswith(text)))

    def on_key(self, event: events.Key) -> None:
        """The arrows move in the list while words are typed."""
        moves = {"up": "cursor_up", "down": "cursor_down", "pageup": "page_up", "pagedown": "page_down"}
        if event.key in moves:
            event.stop()
            getattr(self.query_one(OptionList), f"action_{moves[event.key]}")()

    @on(OptionList.OptionHighlighted)
    def _show(self, event: OptionList.OptionHighlighted) -> None:
        if self._preview and event.option.id is not None:
            self.query_one("#preview", Static).update(self._preview(event.option.id))

    @on(Input.Submitted)
    def _answer(self) -> None:
        option = self.query_one(OptionList).highlighted_option
        if option is not None:
            self.dismiss(option.id)

    @on(OptionList.OptionSelected)
    def _clicked(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(event.option.id)

    def action_leave(self) -> None:
        """No answer."""
        self.dismiss(None)


class AskText(ModalScreen[str | None]):
    """Answers with what was typed, or None. `check` raises one of our errors for what cannot be taken."""

    BINDINGS: ClassVar = [Binding("escape", "leave", "Leave it")]
    CSS = """
    AskText { align: center middle; }
    AskText Vertical { width: 76; max-width: 100%; height: auto; border: round $primary; padding: 0 1; }
    AskText Input { border: none; height: 1; margin: 1 0; padding: 0; }
    """

    def __init__(self, question: str, text: str = "", check: Callable[[str], object] = lambda _: None) -> None:
        super().__init__()
        self._question = question
        self._text = text
        self._check = check

    def compose(self) -> ComposeResult:
        """The question, the words, what is wrong with them."""
        with Vertical():
            yield Static(Text(self._question))
            yield Input(self._text, select_on_focus=False)
            yield Static(Text("Enter takes it, Esc goes back.", style="dim"), id="answer")

    @on(Input.Submitted)
    def _answer(self, event: Input.Submitted) -> None:
        try:
            self._check(event.value)
        except MergekitError as error:
            words = "\n".join(shown(line) for line in (error.message, error.hint) if line)
            self.query_one("#answer", Static).update(Text(words, style="bold"))
            return
        self.dismiss(event.value)

    def action_leave(self) -> None:
        """No answer."""
        self.dismiss(None)
