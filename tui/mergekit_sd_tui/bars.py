"""Block weights as one row of bars: what is where, and which block the cursor is on.

Owns how numbers are drawn. Must not know recipes: it shows numbers per block and tells what was typed or clicked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rich.text import Text
from textual import events
from textual.message import Message
from textual.reactive import reactive
from textual.widget import Widget

import mergekit_sd as mk
from mergekit_sd_tui.glyphs import glyphs

NARROWEST, WIDEST = 3, 5  # cells of a block
BEGIN = "0.-"  # what a value may begin with: 1 to 7 are the screens' keys


class BlockBars(Widget, can_focus=True):
    """A bar for each block: values, bars, names, and below them the cursor and the other end of a range."""

    DEFAULT_CSS = """
    BlockBars { width: 1fr; height: 1fr; min-height: 3; padding: 0 1; }
    """
    numbers: reactive[Mapping[str, mk.BlockNumber]] = reactive(dict)
    cursor: reactive[int] = reactive(0)
    pinned: reactive[str | None] = reactive(None)

    @dataclass
    class Typed(Message):
        """The beginning of a number was typed, or a whole text pasted."""

        text: str
        pasted: bool = False

    class Moved(Message):
        """The cursor is on another block."""

    class Nudged(Message):
        """The wheel was turned: `steps` up or down."""

        def __init__(self, steps: int) -> None:
            super().__init__()
            self.steps = steps

    @property
    def block(self) -> str | None:
        """The block under the cursor."""
        names = list(self.numbers)
        return names[min(self.cursor, len(names) - 1)] if names else None

    @property
    def chosen(self) -> list[str]:
        """The blocks from the pinned one to the cursor; all of them where none is pinned."""
        names = list(self.numbers)
        if self.pinned not in names or self.block is None:
            return names
        first, last = sorted((names.index(self.pinned), names.index(self.block)))
        return names[first : last + 1]

    def move(self, by: int) -> None:
        """Move the cursor, as far as there are blocks."""
        self.cursor = max(0, min(self.cursor + by, len(self.numbers) - 1))

    def watch_cursor(self) -> None:
        """Tell it."""
        self.post_message(self.Moved())

    def render(self) -> Text:
        """All of it."""
        return bars_text(
            self.numbers,
            width=self.content_size.width,
            height=self.content_size.height,
            cursor=self.block if self.has_focus else None,
            pinned=self.pinned,
            around=self.cursor,
        )

    def on_focus(self) -> None:
        """The cursor is shown."""
        self.refresh()

    def on_blur(self) -> None:
        """The cursor is not shown."""
        self.refresh()

    def on_key(self, event: events.Key) -> None:
        """A number is typed: who asks for it begins with this character."""
        if event.character and event.character in BEGIN:
            event.stop()
            event.prevent_default()
            self.post_message(self.Typed(event.character))

    def on_paste(self, event: events.Paste) -> None:
        """Text was pasted into the terminal."""
        event.stop()
        self.post_message(self.Typed(event.text, pasted=True))

    def on_click(self, event: events.Click) -> None:
        """The cursor goes where the mouse is."""
        first, number, width = _window(len(self.numbers), self.content_size.width, self.cursor)
        place = (event.x - self.gutter.left) // width
        if 0 <= place < number:
            self.cursor = first + place

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        """More."""
        event.stop()
        self.post_message(self.Nudged(1))

    def on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        """Less."""
        event.stop()
        self.post_message(self.Nudged(-1))


def _window(blocks: int, width: int, cursor: int) -> tuple[int, int, int]:
    """The first block that is shown, how many are, and the cells of each."""
    cells = max(min(width // max(blocks, 1), WIDEST), NARROWEST)
    number = max(min(blocks, width // cells), 1)
    first = min(max(cursor - number // 2, 0), max(blocks - number, 0))
    return first, number, cells


def bars_text(
    numbers: Mapping[str, mk.BlockNumber],
    *,
    width: int,
    height: int,
    cursor: str | None = None,
    pinned: str | None = None,
    around: int = 0,
) -> Text:
    """The rows of bars as text of that size. A `~` beside a value: not all tensors of the block have it."""
    if not numbers or height < 1:
        return Text("")
    first, number, cells = _window(len(numbers), width, around)
    names = list(numbers)[first : first + number]
    shown = [numbers[name] for name in names]
    lines: list[Text] = []
    below = [_groups(names, cells), _indices(names, cells, cursor)]
    if height >= 5:
        below.append(_marks(names, cells, cursor, pinned))
    if height >= 6:
        lines.append(Text("".join(_beside(each, cells) for each in shown)))
    rows = max(height - len(lines) - len(below), 0)
    low = min(0.0, *(each.value for each in numbers.values()))
    high = max(1.0, *(each.value for each in numbers.values()))
    parts = [round((each.value - low) / (high - low) * rows * 8) for each in shown]
    levels = glyphs().levels
    for row in reversed(range(rows)):
        line = Text()
        for name, part in zip(names, parts, strict=True):
            cell = levels[max(0, min(part - row * 8, 8))]
            line.append(cell * (cells - 1), style="bold" if name == cursor else "")
            line.append(" ")
        lines.append(line)
    return Text("\n", no_wrap=True).join([*lines, *below][-height:])


def _groups(names: list[str], cells: int) -> Text:
    """IN, M and OUT above the first of each."""
    text = Text()
    last = ""
    for name in names:
        group = name.rstrip("0123456789")
        words = "" if group == last else "BA" if group == "base" else group
        text.append(words[:cells].ljust(cells), style="bold")
        last = group
    return text


def _indices(names: list[str], cells: int, cursor: str | None) -> Text:
    text = Text()
    for name in names:
        words = "SE" if name == "base" else name[-2:]
        text.append(words, style="reverse" if name == cursor else "")
        text.append(" " * (cells - 2))
    return text


def _marks(names: list[str], cells: int, cursor: str | None, pinned: str | None) -> Text:
    signs = glyphs()

    def sign(name: str) -> str:
        return signs.cursor if name == cursor else signs.anchor if name == pinned else " "

    return Text("".join((sign(name) * 2).ljust(cells) for name in names), style="bold")


def _beside(number: mk.BlockNumber, cells: int) -> str:
    return (short_number(number.value, cells - 1) + ("" if number.is_one else "~")).ljust(cells)[:cells]


def short_number(number: float, cells: int) -> str:
    """A number in so few cells: `0.50`, `.50` or, in two, hundredths; `1` for 1."""
    if cells >= 4:
        return f"{number:.2f}"[:cells]
    if 0 <= number < 0.995:
        hundredths = f"{number:.2f}"[1:]
        return hundredths if cells >= 3 else hundredths[1:] if number >= 0.005 else "0"
    return next(
        (words for words in (f"{number:.1f}", f"{number:.0f}") if len(words) <= cells), "+" if number > 0 else "-"
    )
