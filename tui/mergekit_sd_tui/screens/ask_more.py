"""Questions with more than a path to write: a folder that is there; a LoRA's rank, path and direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from mergekit_sd.text import shown
from mergekit_sd_tui.screens.ask import free_path, path_problem


class AskFolder(ModalScreen[Path | None]):
    """Answers with a folder that is there, typed or one of those known; or None."""

    BINDINGS: ClassVar = [Binding("escape", "leave", "Leave it")]
    CSS = """
    AskFolder { align: center middle; }
    AskFolder Vertical { max-width: 90; height: auto; max-height: 100%; border: round $primary; padding: 0 1; }
    AskFolder Input { border: none; height: 1; margin: 1 0; }
    AskFolder OptionList { height: auto; max-height: 8; border: none; padding: 0; }
    """

    def __init__(self, question: str, known: Sequence[Path]) -> None:
        super().__init__()
        self._question = question
        self._known = known

    def compose(self) -> ComposeResult:
        """The question, a path to type, those known."""
        with Vertical():
            yield Static(Text(self._question))
            yield Input(placeholder="path of a folder")
            if self._known:
                yield OptionList(*(Option(Text(shown(str(path)))) for path in self._known))
            words = "Tab goes to those found. " if self._known else ""
            yield Static(Text(f"{words}Enter opens it, Esc leaves it."), id="answer")

    @on(Input.Submitted)
    def _typed(self, event: Input.Submitted) -> None:
        path = Path(event.value).expanduser()
        try:
            there = bool(event.value.strip()) and path.is_dir()
        except (OSError, ValueError):
            there = False
        if there:
            self.dismiss(path)
        else:
            self.query_one("#answer", Static).update(Text(f"There is no folder {shown(event.value)}.", style="bold"))

    @on(OptionList.OptionSelected)
    def _chosen(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(self._known[event.option_index])

    def action_leave(self) -> None:
        """No answer."""
        self.dismiss(None)


@dataclass(frozen=True, slots=True)
class LoraWish:
    """A LoRA to be made: what `tuned` has over `base`."""

    tuned: Path
    base: Path
    rank: int
    path: Path

    @property
    def title(self) -> str:
        """What the job is called."""
        return f"LoRA of {self.tuned.name}"

    @property
    def arguments(self) -> tuple[str, ...]:
        """The command."""
        models = (str(self.tuned.absolute()), str(self.base.absolute()))
        return ("lora", "extract", *models, "-o", str(self.path.absolute()), "--rank", str(self.rank))


class AskLora(ModalScreen[LoraWish | None]):
    """Answers with the LoRA to make, or None."""

    BINDINGS: ClassVar = [
        Binding("escape", "leave", "Leave it"),
        Binding("ctrl+r", "reverse", "The other way", priority=True),
    ]
    CSS = """
    AskLora { align: center middle; }
    AskLora Vertical { max-width: 90; height: auto; max-height: 100%; border: round $primary; padding: 0 1; }
    AskLora Input { border: none; height: 1; }
    """

    def __init__(self, base: Path, tuned: Path) -> None:
        super().__init__()
        self._base, self._tuned = base, tuned

    def compose(self) -> ComposeResult:
        """Which way, the rank, the path, what to press."""
        with Vertical():
            yield Static(id="which")
            yield Static(Text("\nRank, from 1 on; 32 is usual:"))
            yield Input("32", id="rank", select_on_focus=False)
            yield Static(Text("\nWrite to:"))
            yield Input(str(free_path(self._tuned, "lora")), id="path", select_on_focus=False)
            yield Static(Text("\nTab: next field. Ctrl+r: the other way. Enter makes it, Esc leaves it."), id="answer")

    def on_mount(self) -> None:
        """Say which way; the end of the path is what one looks at."""
        self._tell()
        self.call_after_refresh(self._to_the_end)

    def _to_the_end(self) -> None:
        box = self.query_one("#path", Input)
        box.action_home()  # only a cursor that moves is scrolled to
        box.action_end()

    def _tell(self) -> None:
        words = Text("A LoRA of what ")
        words.append(shown(self._tuned.name), style="bold")
        words.append(" has over ")
        words.append(shown(self._base.name), style="bold")
        self.query_one("#which", Static).update(words)

    def action_reverse(self) -> None:
        """Base and tuned change places; so does a proposed path."""
        box = self.query_one("#path", Input)
        proposed = box.value == str(free_path(self._tuned, "lora"))
        self._base, self._tuned = self._tuned, self._base
        if proposed:
            box.value = str(free_path(self._tuned, "lora"))
            self._to_the_end()
        self._tell()

    @on(Input.Submitted)
    def _answer(self) -> None:
        rank, typed = self.query_one("#rank", Input).value.strip(), self.query_one("#path", Input).value
        path = Path(typed).expanduser()
        problem = path_problem(typed, path)
        if not (rank.isascii() and rank.isdigit() and 0 < int(rank) < 100_000):
            problem = "The rank must be a whole number from 1 on."
        if problem:
            self.query_one("#answer", Static).update(Text(f"\n{problem}", style="bold"))
            return
        self.dismiss(LoraWish(self._tuned, self._base, int(rank), path))

    def action_leave(self) -> None:
        """No answer."""
        self.dismiss(None)
