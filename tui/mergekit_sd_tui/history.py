"""Undo and redo of a frozen value.

Owns the order of what was. Must not know what the value is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

MOST = 200  # steps that can be undone

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class History(Generic[T]):
    """A value with what it was before, oldest first, and with what was undone, the next to redo first."""

    now: T
    past: tuple[T, ...] = ()
    future: tuple[T, ...] = ()

    def edited(self, value: T) -> History[T]:
        """With a new value; what was undone can no longer be redone. No step where nothing changes."""
        return self if value == self.now else History(value, (*self.past, self.now)[-MOST:])

    def amended(self, change: Callable[[T], T]) -> History[T]:
        """With every step changed alike: for what is no edit and must outlive undo, as that a file was saved."""
        return History(change(self.now), tuple(map(change, self.past)), tuple(map(change, self.future)))

    def undone(self) -> History[T]:
        """One step back; itself where there is none."""
        return History(self.past[-1], self.past[:-1], (self.now, *self.future)) if self.past else self

    def redone(self) -> History[T]:
        """One step forward again; itself where there is none."""
        return History(self.future[0], (*self.past, self.now), self.future[1:]) if self.future else self
