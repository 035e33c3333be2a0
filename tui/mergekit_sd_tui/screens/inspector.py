"""The inspector: what is in one model, down to its tensors, and what can be mended.

Owns what is shown of the chosen model. Reading and writing is the engine's.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.containers import Container, Vertical, VerticalScroll
from textual.widgets import Footer, Input, Static, Tree

import mergekit_sd as mk
from mergekit_sd.events import CancelToken, Event, Progressed
from mergekit_sd.text import count, shown, size
from mergekit_sd_tui import messages, report
from mergekit_sd_tui.actions import bindings
from mergekit_sd_tui.leaves import Leaf, read_leaves
from mergekit_sd_tui.screens.ask import AskPath, free_path
from mergekit_sd_tui.screens.working import Post, WorkingScreen
from mergekit_sd_tui.tensor_tree import TensorTree
from mergekit_sd_tui.word_filter import WordFilter

PROGRESS_SECONDS = 0.1


class InspectorScreen(WorkingScreen):
    """Screen 2."""

    place = "inspector"
    BINDINGS: ClassVar = bindings(place)
    CSS = """
    InspectorScreen #tree { height: 2fr; width: 1fr; }
    InspectorScreen.-wide #tree { height: 1fr; width: 2fr; }
    InspectorScreen #tensors { height: 1fr; width: 1fr; }
    InspectorScreen #empty { display: none; padding: 1 2; height: 1fr; }
    InspectorScreen.empty #empty { display: block; }
    InspectorScreen.empty #tree { display: none; }
    InspectorScreen #name { height: 1; text-style: bold; padding: 0 1; }
    """

    def __init__(self) -> None:
        super().__init__()
        self._path: Path | None = None
        self._found: mk.Inspection | None = None
        self._leaves: tuple[Leaf, ...] = ()
        self._numbers: dict[str, Any] = {}
        self._words: list[str] = []

    def compose(self) -> ComposeResult:
        """The model's name, tree and details, the line that tells, the keys."""
        yield self.places()
        yield Static(id="name")
        with Container(id="body"):
            with Vertical(id="tree"):
                yield WordFilter("words in the names of tensors")
                yield TensorTree()
            yield Static(id="empty")
            with VerticalScroll(classes="side"):
                yield Static(id="node")
                yield Static(id="model")
                yield Static(id="metadata")
        yield Static(id="status", classes="status")
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        """Show the chosen model, now and whenever another is chosen."""
        self._tree.focus()
        self.watch(self.app, "current", self._chosen)

    @property
    def _filter(self) -> WordFilter:
        return self.query_one(WordFilter)

    @property
    def _tree(self) -> TensorTree:
        return self.query_one(TensorTree)

    def _put(self, where: str, words: Text | str) -> None:
        self.query_one(f"#{where}", Static).update(words)

    def _chosen(self) -> None:
        path = self.workbench.current
        self._path, self._found, self._leaves = path, None, ()
        self._filter.leave()
        self._numbers.clear()
        self._tree.show_leaves((), opened=False)
        for where in ("name", "node", "model", "metadata"):
            self._put(where, "")
        self.set_class(path is None, "empty")
        if path is None:
            keys = self.workbench.keys_of
            self._put(
                "empty",
                "No model is chosen yet.\n\nA model is shown here down to its tensors: go to the library "
                f"({keys('app.library')}) and press {keys('library.inspect')} on one.",
            )
            self.tell("No model yet")
            return
        self._put("name", Text(f"{shown(path.name)}  in {shown(str(path.parent))}", no_wrap=True, overflow="ellipsis"))
        self.tell("Reading …")
        self.start("Reading the model", lambda post: _inspect(path, post))

    # --- what workers tell ---

    @on(messages.Inspected)
    def _inspected(self, message: messages.Inspected) -> None:
        if message.path != self._path:
            return
        self._found, self._leaves = message.found, message.leaves
        keys = self.workbench.keys_of
        self._put("model", report.model_words(message.found, keys("inspector.fix"), keys("inspector.prune")))
        self._put("metadata", report.metadata_words(message.found))
        self._refill()

    @on(messages.StatisticsMade)
    def _statistics_made(self, message: messages.StatisticsMade) -> None:
        if message.path == self._path:
            self._numbers[message.name] = message.found
            self._show_node()
            self._tell_count()

    @on(messages.FileWritten)
    def _written(self, message: messages.FileWritten) -> None:
        self.finished(f"{shown(message.path.name)} is written, {size(message.bytes)}")

    @on(messages.Failed)
    def _nothing_read(self, message: messages.Failed) -> None:
        if not self.busy:
            self.tell(f"{message.work} failed")

    # --- what is shown ---

    def _refill(self) -> None:
        chosen = [leaf for leaf in self._leaves if all(word in leaf.name.casefold() for word in self._words)]
        self._tree.show_leaves(chosen, opened=bool(self._words))
        self._tell_count(len(chosen))

    def _tell_count(self, chosen: int | None = None) -> None:
        if not self.busy:
            every = count(len(self._leaves), "tensor")
            self.tell(every if chosen in (None, len(self._leaves)) else f"{chosen:,} of {every}")

    @on(Tree.NodeHighlighted)
    def _show_node(self) -> None:
        data = self._tree.under_cursor
        numbers = self._numbers.get(data.name) if isinstance(data, Leaf) else None
        self._put("node", report.node_words(data, numbers, self.workbench.keys_of("inspector.statistics")))

    # --- actions ---

    def action_open(self) -> None:
        """Open or close the branch under the cursor."""
        self._tree.action_toggle_node()

    def action_filter(self) -> None:
        """Type words."""
        self._filter.open()

    @on(WordFilter.Narrowed)
    def _narrowed(self, message: WordFilter.Narrowed) -> None:
        self._words = message.words
        self._refill()

    @on(Input.Submitted, "#filter")
    def _typed(self) -> None:
        self._tree.focus()

    def action_back(self) -> None:
        """Leave the filter, else go back to the library."""
        if self._filter.leave():
            self._tree.focus()
        else:
            self.workbench.action_show_screen("library")

    def action_statistics(self) -> None:
        """The numbers of the tensor under the cursor."""
        leaf, path = self._tree.under_cursor, self._path
        if not isinstance(leaf, Leaf) or path is None:
            self.workbench.say("Go to a tensor: only tensors have numbers.")
            return
        self.tell(f"Reading {shown(leaf.name)} …")
        self.start("Reading the tensor", lambda post: _statistics(path, leaf.name, post))

    def action_fix(self) -> None:
        """Write a copy with mended position_ids and NovelAI's names."""
        self._ask("Mend position_ids and old names; all else stays bit for bit. Write to:", "fixed", _fix)

    def action_prune(self) -> None:
        """Write a copy without EMA and junk."""
        self._ask("Leave EMA and junk out; all else stays bit for bit. Write to:", "pruned", _prune)

    def _ask(self, question: str, word: str, write: Any) -> None:
        path = self._path
        if path is None or self._found is None:
            self.workbench.say("No model is open.")
            return

        def answered(target: Path | None) -> None:
            if target is not None and self.start_long("The writing", lambda p, token: write(path, target, p, token)):
                self.tell(f"Writing {shown(target.name)} …")

        self.app.push_screen(AskPath(question, free_path(path, word)), answered)


# --- workers: they only post ---------------------------------------------------------------------------


def _inspect(path: Path, post: Post) -> None:
    found = mk.inspect_file(path)
    post(messages.Inspected(path, found, read_leaves(path, found)))


def _statistics(path: Path, name: str, post: Post) -> None:
    post(messages.StatisticsMade(path, name, mk.tensor_statistics(path, name)))


def _fix(path: Path, target: Path, post: Post, token: CancelToken) -> None:
    _write(mk.ops.fix(mk.open(path)), target, post, token, junk="keep", ema="keep", scan=True, allow_nonfinite=True)


def _prune(path: Path, target: Path, post: Post, token: CancelToken) -> None:
    _write(mk.ops.prune(mk.open(path), ema="drop"), target, post, token)


def _write(node: Any, target: Path, post: Post, token: CancelToken, **options: Any) -> None:
    last = 0.0

    def listen(event: Event) -> None:
        nonlocal last
        if isinstance(event, Progressed) and time.monotonic() - last > PROGRESS_SECONDS:
            last = time.monotonic()
            post(messages.Advanced(f"Writing {shown(target.name)}: {size(event.done)} of {size(event.bytes)}"))

    made = mk.save(node, target, dtype="keep", on_event=listen, cancel=token, **options)
    post(messages.FileWritten(Path(made.path), made.bytes))
