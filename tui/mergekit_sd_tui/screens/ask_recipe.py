"""Asking for a recipe to open; the recipes of a folder are proposed while one types."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.suggester import SuggestFromList
from textual.widgets import Input, Static

from mergekit_sd.text import shown

MOST = 5  # recipes that are named


class AskRecipe(ModalScreen[Path | None]):
    """Answers with the path of a file that is there, or None."""

    BINDINGS: ClassVar = [Binding("escape", "leave", "Leave it")]
    CSS = """
    AskRecipe { align: center middle; }
    AskRecipe Vertical { max-width: 90; height: auto; border: round $primary; padding: 0 1; }
    AskRecipe Input { border: none; height: 1; margin: 1 0; }
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def compose(self) -> ComposeResult:
        """The question, the path, what is there."""
        names = sorted(path.name for path in self._folder.glob("*.toml") if path.name.isprintable())
        here = f"In {shown(str(self._folder))}: " + ", ".join(names[:MOST]) + (" …" if len(names) > MOST else "")
        with Vertical():
            yield Static(Text("Open a recipe:"))
            yield Input(placeholder="path of a .toml file", suggester=SuggestFromList(names))
            yield Static(Text(here if names else f"There are no recipes in {shown(str(self._folder))}."))
            yield Static(Text("Enter opens it, Right completes the name, Esc leaves it.", style="dim"), id="answer")

    @on(Input.Submitted)
    def _answer(self, event: Input.Submitted) -> None:
        path = self._folder / Path(event.value.strip()).expanduser()
        try:
            there = bool(event.value.strip()) and path.is_file()
        except (OSError, ValueError):
            there = False
        if there:
            self.dismiss(path)
        else:
            self.query_one("#answer", Static).update(Text("There is no such file.", style="bold"))

    def action_leave(self) -> None:
        """No answer."""
        self.dismiss(None)
