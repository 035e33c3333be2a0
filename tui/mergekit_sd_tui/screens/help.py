"""Help: what the focused widget's keys are, then the screen's, then those that work everywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rich.table import Table
from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import VerticalScroll
from textual.screen import ModalScreen, Screen
from textual.widget import Widget
from textual.widgets import Static

from mergekit_sd_tui.actions import APP, SCREENS, actions_of

# What a widget is called, by its id.
WIDGETS = {
    "models": "the table of models",
    "filter": "the filter",
    "tensors": "the tree",
    "bars": "the block weights",
    "graph": "models, steps and outputs",
    "fields": "what the step is made of",
    "editor": "the text",
    "jobs": "the list of jobs",
    "pictures": "the pictures",
    "differences": "the table",
    "side": "the plan",
}

Row = tuple[str, str, str]  # keys, label, a sentence


@dataclass(frozen=True, slots=True)
class Section:
    """Some keys under a title."""

    title: str
    rows: tuple[Row, ...]


def sections(
    place: str, screen: Screen[Any], keys_of: Callable[[str], str], display: Callable[[Binding], str]
) -> list[Section]:
    """All keys of a screen; what is about the focused widget first. `keys_of` and `display` write keys as people do."""
    focused = screen.focused
    here: list[Row] = []
    there: list[Row] = []
    everywhere: list[Row] = []
    for action in actions_of(place):
        row = (keys_of(action.id), action.label, action.help)
        if action.place == APP:
            everywhere.append(row)
        else:
            (here if focused is not None and focused.id in action.widgets else there).append(row)
    if focused is not None:
        here += _own_rows(screen, focused, display)
    titled = ((f"Here: {WIDGETS.get(focused.id or '', 'this') if focused else ''}", here), (SCREENS[place], there))
    return [Section(title, tuple(rows)) for title, rows in (*titled, ("Everywhere", everywhere)) if rows]


def _own_rows(screen: Screen[Any], widget: Widget, display: Callable[[Binding], str]) -> Iterator[Row]:
    """The keys that the widget itself has, those of one action together."""
    found: dict[str, list[Binding]] = {}
    for active in screen.active_bindings.values():
        if active.node is widget and active.binding.description:
            found.setdefault(active.binding.description, []).append(active.binding)
    for description, bindings in found.items():
        yield " ".join(map(display, bindings)), description, ""


class HelpScreen(ModalScreen[None]):
    """Tables of keys; `names`: by which tui.toml gives actions other keys."""

    BINDINGS: ClassVar = [Binding("escape,question_mark,f1,q,enter", "dismiss", "Close")]
    CSS = """
    HelpScreen { align: center middle; }
    HelpScreen VerticalScroll { max-width: 76; height: auto; max-height: 100%; border: round $primary; padding: 0 1; }
    HelpScreen .title { margin-top: 1; }
    HelpScreen .title:first-of-type { margin-top: 0; }
    """

    def __init__(self, every: Sequence[Section], names: Sequence[str]) -> None:
        super().__init__()
        self.sections = every
        self._names = names

    def compose(self) -> ComposeResult:
        """The tables, their columns in line, scrolled by the arrow keys."""
        rows = [row for section in self.sections for row in section.rows]
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        with VerticalScroll() as box:
            box.border_subtitle = "Esc closes this."
            for section in self.sections:
                yield Static(Text(section.title, style="bold underline"), classes="title")
                yield Static(_table(section, widths))
            yield Static(Text("Other keys: [keys] in tui.toml, by the names:", style="dim"), classes="title")
            yield Static(Text(", ".join(self._names), style="dim"))


def _table(section: Section, widths: Sequence[int]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    for width in widths:
        table.add_column(width=width, no_wrap=True)
    for keys, label, words in section.rows:
        table.add_row(Text(keys, style="bold"), label, Text(words))
    return table
