"""The field into which words are typed that narrow a list; hidden until it is asked for.

Must not know what is listed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from textual import on
from textual.message import Message
from textual.timer import Timer
from textual.widgets import Input

PAUSE = 0.15  # seconds without a key before the list is narrowed


class WordFilter(Input):
    """Posts `Narrowed` when the words have changed, and no key has come for a moment."""

    DEFAULT_CLASSES: ClassVar = "filter"

    @dataclass
    class Narrowed(Message):
        """The words are others now."""

        words: list[str]

    def __init__(self, placeholder: str) -> None:
        super().__init__(placeholder=placeholder, id="filter")
        self._words: list[str] = []
        self._later: Timer | None = None

    def open(self) -> None:
        """Show it, and take the keys at once: what is typed meanwhile is no key of the screen."""
        self.display = True
        self.screen.set_focus(self)

    def leave(self) -> bool:
        """Hide it and forget the words; whether it was open."""
        was_open = self.display
        self.value = ""
        self.display = False
        self._narrow()
        return was_open

    @on(Input.Changed)
    def _typed(self) -> None:
        if self._later:
            self._later.stop()
        self._later = self.set_timer(PAUSE, self._narrow)

    @on(Input.Submitted)
    def _narrow(self) -> None:
        words = self.value.casefold().split()
        if words != self._words:
            self._words = words
            self.post_message(self.Narrowed(words))
