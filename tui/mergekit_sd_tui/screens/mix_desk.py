"""What the parts of the Mix screen have in common: the draft as a recipe, and which step of it is worked on.

Owns the choice of step and parameter. Must not know how the recipe's text is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mergekit_sd as mk
from mergekit_sd_tui.bars import BlockBars
from mergekit_sd_tui.screens.pick import AskText, Item, Pick
from mergekit_sd_tui.screens.working import WorkingScreen


class Desk(WorkingScreen):
    """The screen as its parts know it."""

    def __init__(self) -> None:
        super().__init__()
        self.recipe: mk.Recipe | None = None
        self.step_name: str | None = None
        self.parameter: str | None = None
        self.problem = ""

    @property
    def step(self) -> Any:
        """The step that is worked on, checked; None where there is none."""
        return self.recipe.steps.get(self.step_name or "") if self.recipe else None

    @property
    def table(self) -> dict[str, Any]:
        """The same as it is written."""
        found: dict[str, Any] = self.recipe.data["steps"][self.step_name] if self.recipe and self.step else {}
        return found

    @property
    def bars(self) -> BlockBars:
        """The row of bars."""
        return self.query_one(BlockBars)

    def ask(self, question: str, items: Sequence[Item], answered: Callable[[str], object], **more: Any) -> None:
        """Ask for one of many; nothing happens without an answer."""
        self._push(Pick(question, items, **more), answered)

    def ask_text(
        self, question: str, text: str, answered: Callable[[str], object], check: Callable[[str], object] = str
    ) -> None:
        """Ask for a few words that `check` takes."""
        self._push(AskText(question, text, check), answered)

    def _push(self, asking: Pick | AskText, answered: Callable[[str], object]) -> None:
        def take(answer: str | None) -> None:
            if answer is not None:
                answered(answer)

        self.app.push_screen(asking, take)

    @property
    def family(self) -> str:
        """Whose blocks the bars are."""
        raise NotImplementedError

    def change(self, make: Callable[[str], str], said: str = "") -> bool:
        """Rewrite the draft."""
        raise NotImplementedError

    def show_step(self) -> None:
        """Show the step that is worked on."""
        raise NotImplementedError

    def mark_picture(self) -> None:
        """Say where a picture is older than the draft."""
        raise NotImplementedError
