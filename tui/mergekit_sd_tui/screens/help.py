"""Help: all keys of a screen, from the registry of actions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from rich.table import Table
from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

from mergekit_sd_tui.actions import Action


class HelpScreen(ModalScreen[None]):
    """A table of keys; `keys` are those of each action, by its id, as people write them."""

    BINDINGS: ClassVar = [Binding("escape,question_mark,q,enter", "dismiss", "Close")]
    CSS = """
    HelpScreen { align: center middle; }
    HelpScreen VerticalScroll { max-width: 76; height: auto; max-height: 100%; border: round $primary; padding: 0 1; }
    """

    def __init__(self, actions: Sequence[Action], keys: Mapping[str, str]) -> None:
        super().__init__()
        self._actions = actions
        self._keys = keys

    def compose(self) -> ComposeResult:
        """The table, scrolled by the arrow keys."""
        table = Table.grid(padding=(0, 2, 0, 0))
        for action in self._actions:
            table.add_row(Text(self._keys[action.id], style="bold", no_wrap=True), action.label, Text(action.help))
        with VerticalScroll():
            yield Static(table)
            yield Static(Text("\nOther keys: [keys] in tui.toml, by the names:", style="dim"))
            yield Static(Text(", ".join(action.id for action in self._actions), style="dim"))
            yield Static(Text("Esc closes this.", style="dim"))
