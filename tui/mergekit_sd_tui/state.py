"""What the screens share, as a frozen value: an edit makes a new one, and can be undone.

Must not know widgets.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Draft:
    """A recipe in the making: its TOML text, the file that it is of, and what that file holds.

    The text is all there is: the Mix and the Recipe screen both show it and both edit it.
    """

    text: str = ""
    path: Path | None = None
    saved: str = ""

    @property
    def folder(self) -> Path:
        """Where relative paths in the recipe start."""
        return self.path.parent if self.path else Path.cwd()

    @property
    def is_saved(self) -> bool:
        """Whether the file holds this text."""
        return self.path is not None and self.text == self.saved


@dataclass(frozen=True, slots=True)
class Workspace:
    """What the user has put together: the marked files, in the order of marking, and the recipe."""

    marked: tuple[Path, ...] = ()
    draft: Draft = Draft()

    def toggled(self, path: Path) -> Workspace:
        """With a file marked, or no longer so."""
        if path in self.marked:
            return replace(self, marked=tuple(each for each in self.marked if each != path))
        return replace(self, marked=(*self.marked, path))
