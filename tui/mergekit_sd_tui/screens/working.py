"""What screens with workers have in common: a thread that only posts, a token that stops it, a line that tells.

Owns how work is started, stopped and how it ends. Must not know what the work is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, TypeAlias, cast

from rich.text import Text
from textual import on
from textual.message import Message
from textual.screen import Screen
from textual.widgets import Static

from mergekit_sd.errors import Cancelled
from mergekit_sd.events import CancelToken
from mergekit_sd_tui.actions import SCREENS
from mergekit_sd_tui.messages import Advanced, Failed, Stopped

if TYPE_CHECKING:
    from mergekit_sd_tui.app import Workbench

Post: TypeAlias = Callable[[Message], object]


class WorkingScreen(Screen[None]):
    """A screen that starts workers. It has a Static with the id "status"."""

    AUTO_FOCUS = ""  # or the closed filter would get the keys where the table is hidden
    place: ClassVar[str]
    """Its name among the screens and actions."""

    def __init__(self) -> None:
        super().__init__()
        self._tokens: dict[str, CancelToken] = {}

    @property
    def workbench(self) -> Workbench:
        """The application."""
        return cast("Workbench", self.app)

    def start(self, work: str, do: Callable[[Post], object]) -> None:
        """Do something short in a thread; an older one of the same name may go on, but who handles looks for that."""

        def guarded() -> None:
            try:
                do(self.post_message)
            except Exception as error:
                self.post_message(Failed(work, error))

        self.run_worker(guarded, name=work, group=work, thread=True, exclusive=True, exit_on_error=False)

    def start_long(self, work: str, do: Callable[[Post, CancelToken], object]) -> bool:
        """Do something long, one at a time on a screen; False, and a word to the user, while another goes on."""
        if self._tokens:
            self.workbench.say(f"{next(iter(self._tokens))} is under way: {self._stop_key()} stops it.")
            return False
        token = self._tokens[work] = CancelToken()

        def guarded() -> None:
            try:
                do(self.post_message, token)
            except Cancelled:
                self.post_message(Stopped(work))
            except Exception as error:
                self.post_message(Failed(work, error))

        self.run_worker(guarded, name=work, group=work, thread=True, exit_on_error=False)
        return True

    def places(self) -> Static:
        """The line that says which screens there are, and which this is."""
        words = Text(no_wrap=True, overflow="ellipsis")
        for name, label in SCREENS.items():
            here = name == self.place
            words.append(f"{self.workbench.keys_of(f'app.{name}')} ", style="bold")
            words.append(f"[{label}]" if here else label, style="bold reverse" if here else "")
            words.append("  ")
        return Static(words, classes="places")

    @property
    def busy(self) -> bool:
        """Whether something long is under way."""
        return bool(self._tokens)

    def finished(self, words: str) -> None:
        """Something long has ended; `words` for the status line."""
        self._tokens.clear()
        self.tell(words)

    def tell(self, words: str) -> None:
        """Put words into the status line. Foreign text in them must be escaped."""
        self.query_one("#status", Static).update(Text(words, no_wrap=True, overflow="ellipsis"))

    def action_stop(self) -> None:
        """Ask what is under way to stop; it is over when it says so."""
        if not self._tokens:
            self.workbench.say("Nothing is under way.")
        for work, token in self._tokens.items():
            token.cancel()
            self.tell(f"{work}: stopping …")

    def _stop_key(self) -> str:
        return self.workbench.keys_of(f"{self.place}.stop")

    def on_unmount(self) -> None:
        """Nobody waits for a worker when the UI is left."""
        for token in self._tokens.values():
            token.cancel()

    @on(Advanced)
    def _advance(self, message: Advanced) -> None:
        if not any(token.cancelled for token in self._tokens.values()):
            self.tell(message.words)

    @on(Stopped)
    def _stopped(self, message: Stopped) -> None:
        self.finished(f"{message.work} was stopped")

    @on(Failed)
    def _failed(self, message: Failed) -> None:
        """The line says so too; the message itself goes on to the application."""
        if message.work in self._tokens:
            self.finished(f"{message.work} failed")
