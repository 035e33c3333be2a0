"""The keys by which one moves in a list, a table or a tree: the same on every screen.

Must not know what is listed.
"""

from __future__ import annotations

from textual.binding import Binding, BindingType


def list_keys(first: str = "scroll_top", last: str = "scroll_bottom") -> list[BindingType]:
    """Bindings of a widget with rows; `first` and `last` are its actions for the ends."""
    keys = (
        ("up,k", "cursor_up", "Up"),
        ("down,j", "cursor_down", "Down"),
        ("pageup", "page_up", "A page up"),
        ("pagedown", "page_down", "A page down"),
        ("home,g", first, "First"),
        ("end,G", last, "Last"),
        ("left", "scroll_left", "Scroll left"),
        ("right", "scroll_right", "Scroll right"),
    )
    return [Binding(key, action, words, show=False) for key, action, words in keys]
