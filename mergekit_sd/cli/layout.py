"""Plain lines that fit the terminal: for reports that are read, piped and copied, without a table's frame."""

from __future__ import annotations

import shutil
import textwrap

NARROWEST, WIDEST = 40, 100


def width() -> int:
    """The columns to fill: the terminal's, 80 in a pipe."""
    return min(max(shutil.get_terminal_size((80, 24)).columns, NARROWEST), WIDEST)


def entry(label: str, text: str, column: int, indent: int = 2) -> str:
    """A label, and text beside it from `column` on, wrapped under itself."""
    head = f"{' ' * indent}{label}"
    gap = " " * max(column - len(head), 2)
    lines = textwrap.wrap(
        text, width(), initial_indent=head + gap, subsequent_indent=" " * column, break_on_hyphens=False
    )
    return "\n".join(lines) or head
