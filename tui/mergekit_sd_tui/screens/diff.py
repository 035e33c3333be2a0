"""The comparison of two models: by block, down to tensors, and what can be made of it.

Owns which two are compared and what is marked. The arithmetic is the engine's.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.containers import Container, VerticalScroll
from textual.widgets import DataTable, Footer, Static

import mergekit_sd as mk
from mergekit_sd.errors import MergekitError
from mergekit_sd.events import CancelToken
from mergekit_sd.text import count, listed, shown, size
from mergekit_sd_tui import diff_rows, messages
from mergekit_sd_tui.actions import bindings
from mergekit_sd_tui.drafting import new_mix, set_parameter
from mergekit_sd_tui.list_keys import list_keys
from mergekit_sd_tui.screens.ask_more import AskLora, LoraWish
from mergekit_sd_tui.screens.working import Post, WorkingScreen
from mergekit_sd_tui.state import Draft

PROGRESS_SECONDS = 0.1
COMPONENTS = ("text_encoder", "text_encoder_2", "vae")


class DiffTable(DataTable[Text], inherit_bindings=False):
    """Rows of blocks, or of one block's tensors."""

    BINDINGS: ClassVar = list_keys()


class DiffScreen(WorkingScreen):
    """Screen 7. `_inside`: the block whose tensors are shown; None: all blocks are."""

    place = "diff"
    BINDINGS: ClassVar = bindings(place)
    CSS = """
    DiffScreen #name { height: 1; padding: 0 1; }
    DiffScreen #empty { padding: 1 2; height: 1fr; }
    DiffScreen #differences { display: none; scrollbar-size: 1 1; }
    DiffScreen.compared #empty { display: none; }
    DiffScreen.compared #differences { display: block; }
    """

    def __init__(self) -> None:
        super().__init__()
        self._pair: tuple[Path, Path] | None = None
        self._found: mk.Diff | None = None
        self._inside: mk.GroupDiff | None = None
        self._marked: tuple[str, ...] = ()
        self._by_change = False
        self._groups: Sequence[mk.GroupDiff] = ()
        self._tensors: Sequence[mk.TensorDiff] = ()

    def compose(self) -> ComposeResult:
        """The two models, the blocks, the details, the line that tells, the keys."""
        yield self.places()
        yield Static(id="name")
        with Container(id="body"):
            yield DiffTable(cursor_type="row", id="differences", classes="main")
            yield Static(id="empty")
            with VerticalScroll(classes="side", can_focus=False):
                yield Static(id="details")
        yield Static(id="status", classes="status")
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        """Compare what was asked for, now and whenever another pair is."""
        self.watch(self.app, "pair", self._asked)

    @property
    def _table(self) -> DiffTable:
        return self.query_one(DiffTable)

    def _put(self, where: str, words: Text | str) -> None:
        self.query_one(f"#{where}", Static).update(words)

    def _asked(self) -> None:
        pair = self.workbench.pair
        if pair is None:
            keys = self.workbench.keys_of
            self._put(
                "empty",
                f"Two models are compared here, block by block.\n\nMark two in the library "
                f"({keys('app.library')}, {keys('library.mark')}), then {keys('library.diff')} there, "
                f"or {keys('diff.renew')} here.",
            )
            self.add_class("empty")
            self.tell("Nothing is compared yet")
        elif self.start_long("The comparison", lambda post, token: _compare(*pair, post, token)):
            self._pair, self._found, self._inside, self._marked = pair, None, None, ()
            self.remove_class("compared")
            self._put("name", diff_rows.title_words(*pair))
            self._put("empty", "Both files are read once.")
            self._put("details", "")
            self.add_class("empty")
            self.tell("Comparing …")

    # --- what workers tell ---

    @on(messages.Compared)
    def _compared(self, message: messages.Compared) -> None:
        self._found = message.found
        self.add_class("compared")
        self.remove_class("empty")
        self.finished(diff_rows.summary(message.found))
        self._refill()
        self._table.focus()

    @on(messages.Failed)
    @on(messages.Stopped)
    def _came_to_nothing(self) -> None:
        if self._found is None:
            self._put("empty", f"Nothing was compared. {self.workbench.keys_of('diff.renew')} compares again.")

    # --- what is shown ---

    def _refill(self, cursor: int = 0) -> None:
        table, found = self._table, self._found
        assert found is not None
        columns = diff_rows.TENSOR_COLUMNS if self._inside else diff_rows.GROUP_COLUMNS
        table.clear(columns=True)
        table.add_column(" ", width=1)
        for name, width in columns:
            table.add_column(name, width=width)
        if self._inside:
            self._tensors = diff_rows.tensors_of(found, self._inside.name)
            most = diff_rows.longest(self._tensors)
            rows = [diff_rows.tensor_cells(each, most) for each in self._tensors]
        else:
            self._groups = sorted(found.groups, key=_by_change) if self._by_change else found.groups
            most = diff_rows.longest(self._groups)
            rows = [diff_rows.group_cells(each, each.name in self._marked, most) for each in self._groups]
        table.add_rows(rows)
        table.move_cursor(row=cursor, animate=False)
        self._show_details()

    @property
    def _group(self) -> mk.GroupDiff | None:
        """The block under the cursor, or the one that is open."""
        if self._inside or self._found is None or not self._groups:
            return self._inside
        return self._groups[min(self._table.cursor_row, len(self._groups) - 1)]

    @on(DataTable.RowHighlighted)
    def _show_details(self) -> None:
        row, group = self._table.cursor_row, self._group
        if self._found is None or group is None:
            return
        if self._inside and row < len(self._tensors):
            self._put("details", diff_rows.tensor_words(self._tensors[row]))
        else:
            self._put("details", diff_rows.group_words(group, self._found))

    # --- actions ---

    @on(DataTable.RowSelected)
    def action_open(self) -> None:
        """The tensors of the block under the cursor."""
        group = self._group
        if group is None:
            self.workbench.say("There is no block under the cursor.")
        elif self._inside is None:
            self._inside = group
            self._refill()
            tensors = count(len(self._tensors), "tensor")
            self.tell(f"{shown(group.name)}: {tensors}, the most changed first; Esc shows all blocks")

    def action_back(self) -> None:
        """All blocks again, else back to the library."""
        if self._inside is not None and self._found is not None:
            at = next(number for number, each in enumerate(self._groups) if each.name == self._inside.name)
            self._inside = None
            self._refill(at)
            self.tell(diff_rows.summary(self._found))
        else:
            self.workbench.action_show_screen("library")

    def action_mark(self) -> None:
        """Mark the block under the cursor for a merge, or no longer, and go on to the next."""
        group = self._group
        if group is None or self._inside or self._found is None:
            self.workbench.say("Blocks are marked where all of them are shown.")
        elif group.name not in _mergeable(self._found):
            self.workbench.say("Only blocks of the UNet, text encoders and VAEs can be merged alone.")
        else:
            name = group.name
            marked = self._marked
            self._marked = tuple(each for each in marked if each != name) if name in marked else (*marked, name)
            self._refill(min(self._table.cursor_row + 1, len(self._groups) - 1))
            self.tell(f"{count(len(self._marked), 'block')} marked: {listed(self._marked, 8)}".removesuffix(": "))

    def action_sort(self) -> None:
        """By change, or in the order of the model."""
        if self._found is None or self._inside:
            self.workbench.say("Blocks are sorted where all of them are shown.")
            return
        self._by_change = not self._by_change
        self._refill()
        self.tell("The most changed first" if self._by_change else "In the order of the model")

    def action_lora(self) -> None:
        """A LoRA of what B has over A."""
        if self._pair is None:
            self.workbench.say("Nothing is compared yet.")
        else:
            self.app.push_screen(AskLora(*self._pair), self._lora_asked)

    def _lora_asked(self, wish: LoraWish | None) -> None:
        if wish is not None:
            self.workbench.submit(wish.title, wish.arguments)

    def action_blocks(self) -> None:
        """A recipe that takes the marked blocks from B and all else from A."""
        if self._pair is None or not self._marked:
            self.workbench.say(f"Mark the blocks to take from B: {self.workbench.keys_of('diff.mark')} on each.")
            return
        try:
            draft = new_mix(self._pair, Draft().folder)
            weights = {"default": 0, **dict.fromkeys(self._marked, 1)}
            draft = replace(draft, text=set_parameter(draft.text, "mix", "alpha", weights))
        except MergekitError as error:
            self.post_message(messages.Failed("The draft", error))
            return
        self.workbench.edit(replace(self.workbench.workspace, draft=draft))
        self.workbench.action_show_screen("mix")

    def action_swap(self) -> None:
        """A becomes B, and B becomes A."""
        if self._pair is None:
            self.workbench.say("Nothing is compared yet.")
        elif not self.busy:
            self.workbench.compare(self._pair[1], self._pair[0])

    def action_renew(self) -> None:
        """Compare the two that are marked in the library, else the same again."""
        marked = self.workbench.workspace.marked
        pair = marked if len(marked) == 2 else self._pair
        if pair is None:
            self.workbench.say("Mark two models in the library.")
        else:
            self.workbench.compare(pair[0], pair[1])


def _by_change(group: mk.GroupDiff) -> float:
    change = diff_rows.change_of(group)
    return 1.0 if change is None else -change


def _mergeable(found: mk.Diff) -> set[str]:
    """The names that block weights know in both models' family."""
    family = found.a.architecture
    if family is None or family != found.b.architecture:
        return set()
    return {*mk.family_blocks(family), *COMPONENTS} - {"base"}


# --- the worker: it only posts --------------------------------------------------------------------------


def _compare(a: Path, b: Path, post: Post, token: CancelToken) -> None:
    last = 0.0

    def advance(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > PROGRESS_SECONDS:
            last = time.monotonic()
            post(messages.Advanced(f"Comparing: {size(done)} of {size(total)}"))

    post(messages.Compared(a, b, mk.diff_files(a, b, advance, token)))
