"""A question with a few answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option


class Choose(ModalScreen[str | None]):
    """Answers with the id of what was chosen, or None. The first answer is under the cursor."""

    BINDINGS: ClassVar = [Binding("escape", "leave", "Leave it")]
    CSS = """
    Choose { align: center middle; }
    Choose Vertical { max-width: 76; height: auto; max-height: 100%; border: round $primary; padding: 0 1; }
    Choose OptionList { height: auto; border: none; margin: 1 0; padding: 0; }
    """

    def __init__(self, question: str, answers: Mapping[str, str]) -> None:
        super().__init__()
        self._question = question
        self._answers = answers

    def compose(self) -> ComposeResult:
        """The question, the answers, what to press."""
        with Vertical():
            yield Static(Text(self._question))
            yield OptionList(*(Option(Text(words), id=answer) for answer, words in self._answers.items()))
            yield Static(Text("Enter chooses, Esc goes back.", style="dim"))

    @on(OptionList.OptionSelected)
    def _chosen(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(event.option.id)

    def action_leave(self) -> None:
        """No answer."""
        self.dismiss(None)
