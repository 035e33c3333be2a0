"""The table of models: rows that come in small portions, so that keys are answered meanwhile.

Owns rows, their order and the cursor. Must not know where models come from.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rich.text import Text
from textual.coordinate import Coordinate
from textual.widgets import DataTable

import mergekit_sd as mk
from mergekit_sd_tui import rows
from mergekit_sd_tui.list_keys import list_keys

PORTION = 0.01  # seconds of adding rows at a time
REST = 0.02  # seconds between two portions: keys are answered and the screen is drawn
MOST_ROWS = 200  # of a portion


@dataclass(frozen=True, slots=True)
class Row:
    """A model, or the line above a group of them (`entry` None)."""

    key: str
    entry: mk.LibraryEntry | None
    words: str = ""


class Mark(Text):
    """The first cell of a row; knows the row, which is how rows are sorted."""

    row: Row


class ModelTable(DataTable[Text], inherit_bindings=False):
    """Models as rows, with one of them under the cursor."""

    BINDINGS: ClassVar = list_keys()

    def __init__(self, is_marked: Callable[[Path], bool]) -> None:
        super().__init__(cursor_type="row", fixed_columns=2, id="models", classes="main")
        self._is_marked = is_marked
        self._waiting: deque[Row] = deque()
        self._rows: dict[str, Row] = {}
        self._wanted: str | None = None  # the row that the cursor shall go to once it is there

    def on_mount(self) -> None:
        """The columns."""
        self.add_column(" ", width=1, key="mark")
        for column in rows.COLUMNS:
            self.add_column(column.name, width=column.width, key=column.name)

    @property
    def under_cursor(self) -> mk.LibraryEntry | None:
        """The model under the cursor."""
        row = self._row_at(self.cursor_row)
        return row.entry if row else None

    @property
    def models(self) -> int:
        """How many models are shown or about to be."""
        every = {row.key: row for row in (*self._waiting, *self._rows.values())}
        return sum(1 for row in every.values() if row.entry)

    def _row_at(self, index: int) -> Row | None:
        if not self.is_valid_row_index(index):
            return None
        return self._rows.get(self.coordinate_to_cell_key(Coordinate(index, 0)).row_key.value or "")

    def show_rows(self, every: Iterable[Row]) -> None:
        """Only these rows, in this order; the cursor stays on its model."""
        row = self._row_at(self.cursor_row)
        self._wanted = self._wanted or (row.key if row else None)
        self.clear()
        self._rows.clear()
        self._waiting = deque(every)
        self._pour()

    def add_rows_later(self, every: Iterable[Row]) -> None:
        """More rows, at the end; those that are there already are renewed in their places."""
        begin = not self._waiting
        self._waiting.extend(every)
        if begin:
            self._pour()

    def forget(self, key: str) -> None:
        """Take a row out."""
        self._waiting = deque(row for row in self._waiting if row.key != key)
        if self._rows.pop(key, None):
            self.remove_row(key)

    def renew_marks(self) -> None:
        """Show who is marked now."""
        for row in self._rows.values():
            if row.entry:
                mark = self._cells(row)[0]
                if mark.plain != self.get_cell(row.key, "mark").plain:
                    self.update_cell(row.key, "mark", mark)

    def sort_by(self, order: Callable[[mk.LibraryEntry], Any]) -> None:
        """Put the rows in order, the cursor with its model. Only where there are no groups."""
        here = self._row_at(self.cursor_row)

        def key(mark: Text) -> Any:
            assert isinstance(mark, Mark)
            assert mark.row.entry
            return order(mark.row.entry)

        self.sort("mark", key=key)
        if here is not None and self.cursor_row:
            self.move_cursor(row=self.get_row_index(here.key), animate=False)

    def _pour(self) -> None:
        """A portion of the rows that wait; the rest when keys had their turn."""
        begun = time.monotonic()
        for row in self._portion():
            if row.key in self._rows:
                self._renew(row)
            else:
                self._append(row)
            if time.monotonic() - begun > PORTION:
                break
        if self._waiting:
            self.set_timer(REST, self._pour)
        else:
            self._wanted = None

    def _append(self, row: Row) -> None:
        self.add_row(*self._cells(row), key=row.key, height=rows.height(row.entry) if row.entry else 1)
        self._rows[row.key] = row
        if row.key == self._wanted:
            self._wanted = None
            self.move_cursor(row=self.row_count - 1, animate=False)

    def _portion(self) -> Iterator[Row]:
        for _ in range(min(MOST_ROWS, len(self._waiting))):
            yield self._waiting.popleft()

    def _renew(self, row: Row) -> None:
        self._rows[row.key] = row
        for name, cell in zip(("mark", *(column.name for column in rows.COLUMNS)), self._cells(row), strict=True):
            if name == "mark" or cell != self.get_cell(row.key, name):
                self.update_cell(row.key, name, cell)

    def _cells(self, row: Row) -> list[Text]:
        if row.entry is None:
            title = Text(row.words, style="bold", no_wrap=True, overflow="ellipsis")
            return [_mark(row, "="), title, *(Text("") for _ in rows.COLUMNS[1:])]
        made = rows.cells(row.entry, self._is_marked(row.entry.path))
        return [_mark(row, made[0].plain), *made[1:]]


def _mark(row: Row, words: str) -> Mark:
    mark = Mark(words, style="bold")
    mark.row = row
    return mark
