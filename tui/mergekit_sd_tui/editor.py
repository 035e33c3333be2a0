"""The editor of a recipe's text: TOML in colours that fit the theme, and the place of a problem underlined.

Owns how text is shown and typed. Must not know what a recipe is.
"""

from __future__ import annotations

from typing import ClassVar

from rich.style import Style
from rich.text import Text
from textual import events
from textual.binding import BindingType
from textual.theme import Theme
from textual.widgets import TextArea

MARK = Style(underline=True, bold=True)  # not by colour: NO_COLOR
WANTED_ELSEWHERE = ("f6", "f7")


class Editor(TextArea, inherit_bindings=False):
    """A TextArea that leaves Esc and the function keys to its screen."""

    BINDINGS: ClassVar[list[BindingType]] = [
        binding for binding in TextArea.BINDINGS if getattr(binding, "key", "") not in WANTED_ELSEWHERE
    ]
    DEFAULT_CSS = """
    Editor { border: none; padding: 0; }
    Editor:focus { border: none; }
    """

    def __init__(self, placeholder: str) -> None:
        super().__init__(
            soft_wrap=False, tab_behavior="indent", show_line_numbers=True, placeholder=placeholder, id="editor"
        )
        self._problem: tuple[int, int] | None = None

    def on_mount(self) -> None:
        """Colours as far as the grammar is installed."""
        if "toml" in self.available_languages:
            self.language = "toml"
        self._fit(self.app.current_theme)
        self.app.theme_changed_signal.subscribe(self, self._fit)

    def _fit(self, theme: Theme) -> None:
        self.theme = "css" if theme.dark else "github_light"

    async def _on_key(self, event: events.Key) -> None:
        if event.key == "escape":
            event.prevent_default()  # a TextArea would go to the next widget

    def show_text(self, text: str) -> None:
        """Another text, with the cursor where it was as far as there is such a place."""
        row, column = self.cursor_location
        self.load_text(text)
        row = min(row, self.document.line_count - 1)
        self.move_cursor((row, min(column, len(self.document.get_line(row)))))

    def mark(self, line: int | None, column: int | None = None) -> None:
        """Underline a line from a column on, both from 1; None: nothing."""
        problem = (line - 1, (column or 1) - 1) if line else None
        if problem != self._problem:
            self._problem = problem
            self.notify_style_update()  # lines are cached
            self.refresh()

    def get_line(self, line_index: int) -> Text:
        """The line, underlined where the problem is."""
        line = super().get_line(line_index)
        if self._problem and self._problem[0] == line_index:
            line.stylize(MARK, min(self._problem[1], max(len(line) - 1, 0)))
        return line
