"""Asking for the path of a file to write, with a proposal."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Input, Static

from mergekit_sd.text import shown


class AskPath(ModalScreen[Path | None]):
    """Answers with a path that is free, or None. A taken one is refused before anything is computed."""

    BINDINGS: ClassVar = [Binding("escape", "leave", "Leave it")]
    CSS = """
    AskPath { align: center middle; }
    AskPath Vertical { max-width: 90; height: auto; border: round $primary; padding: 0 1; }
    AskPath Input { border: none; height: 1; margin: 1 0; }
    """

    def __init__(self, question: str, proposal: Path) -> None:
        super().__init__()
        self._question = question
        self._proposal = proposal

    def compose(self) -> ComposeResult:
        """The question, the path, what to press."""
        with Vertical():
            yield Static(Text(self._question))
            yield Input(str(self._proposal), select_on_focus=False)
            yield Static(Text("Enter writes it, Esc leaves it."), id="answer")

    def on_mount(self) -> None:
        """The end of the path is what one looks at."""
        self.call_after_refresh(self._to_the_end)

    def _to_the_end(self) -> None:
        box = self.query_one(Input)
        box.action_home()  # only a cursor that moves is scrolled to
        box.action_end()

    @on(Input.Submitted)
    def _answer(self, event: Input.Submitted) -> None:
        path = Path(event.value).expanduser()
        problem = path_problem(event.value, path)
        if problem:
            self.query_one("#answer", Static).update(Text(problem, style="bold"))
            return
        self.dismiss(path)

    def action_leave(self) -> None:
        """No answer."""
        self.dismiss(None)


def path_problem(text: str, path: Path) -> str:
    """What is wrong with an answer; nothing if it is good."""
    try:
        if not text.strip():
            return "Type the path of the file to write."
        if not text.isprintable():
            return "This cannot be a path: it has characters that cannot be shown."
        if path.exists():
            return f"{shown(path.name)} exists already: take another name."
        return "" if path.parent.is_dir() else f"There is no folder {shown(str(path.parent))}."
    except (OSError, ValueError) as error:
        return f"This cannot be a path: {shown(str(error))}"


def free_path(model: Path, word: str) -> Path:
    """A path that is free: `name-WORD.safetensors` beside the model, else with a number; one that can be typed."""
    stem = "".join(c if c.isprintable() else "_" for c in model.name.removesuffix(model.suffix))
    folder = model.parent if str(model.parent).isprintable() else Path.cwd()
    names = (f"{stem}-{word}{'' if number == 1 else f'-{number}'}.safetensors" for number in range(1, 1 << 30))
    return next(path for name in names if not (path := folder / name).exists())
