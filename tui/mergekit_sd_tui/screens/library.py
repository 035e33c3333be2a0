"""The library: the models of this machine, found, listed, marked, hashed.

Owns what is listed. The index and its scan are the engine's.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.containers import Container, Vertical, VerticalScroll
from textual.timer import Timer
from textual.widgets import DataTable, Footer, Input, Static

import mergekit_sd as mk
from mergekit_sd.text import count, shown, size
from mergekit_sd_tui import library_workers, messages, rows
from mergekit_sd_tui.actions import bindings
from mergekit_sd_tui.model_table import ModelTable, Row
from mergekit_sd_tui.pictures import PictureView
from mergekit_sd_tui.screens.ask import AskPath, free_path
from mergekit_sd_tui.screens.ask_more import AskLora, LoraWish
from mergekit_sd_tui.screens.working import WorkingScreen
from mergekit_sd_tui.word_filter import WordFilter

PAUSE = 0.15  # seconds without a key before what costs time is looked at
SORT_SECONDS = 0.5  # between two sortings while entries come in


class LibraryScreen(WorkingScreen):
    """Screen 1."""

    place = "library"
    BINDINGS: ClassVar = bindings(place)
    CSS = """
    LibraryScreen #list { height: 2fr; width: 1fr; }
    LibraryScreen.-wide #list { height: 1fr; width: 2fr; }
    LibraryScreen #models { height: 1fr; width: 1fr; }
    LibraryScreen #empty { display: none; padding: 1 2; height: 1fr; }
    LibraryScreen.empty #empty { display: block; }
    LibraryScreen.empty #models { display: none; }
    LibraryScreen #preview { display: none; height: 12; }
    LibraryScreen.-wide #preview.there { display: block; }
    """

    def __init__(self) -> None:
        super().__init__()
        self._entries: dict[Path, mk.LibraryEntry] = {}
        self._words: list[str] = []
        self._column = rows.COLUMNS[0]
        self._groups: mk.Duplicates | None = None
        self._sorted = 0.0
        self._later: Timer | None = None

    def compose(self) -> ComposeResult:
        """List and details, the line that tells, the keys."""
        yield self.places()
        with Container(id="body"):
            with Vertical(id="list"):
                yield WordFilter("words in path, kind, family or title")
                yield ModelTable(lambda path: path in self.workbench.workspace.marked)
                yield Static(id="empty")
            with VerticalScroll(classes="side", can_focus=False):
                yield PictureView(id="preview")
                yield Static(id="details")
        yield Static(id="status", classes="status")
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        """Show what the index has, then see whether it is still so."""
        self.watch(self.app, "history", self._marks_changed, init=False)
        self.watch(self.app, "made", self._look_at_made)
        self._table.focus()
        self.tell("Reading the index …")
        self.start("Reading the index", library_workers.read_index)

    @property
    def _table(self) -> ModelTable:
        return self.query_one(ModelTable)

    @property
    def _preview(self) -> PictureView:
        return self.query_one("#preview", PictureView)

    # --- what workers tell ---

    @on(messages.EntriesFound)
    def _take(self, message: messages.EntriesFound) -> None:
        self.remove_class("empty")
        for entry in message.entries:
            self._entries[entry.path] = entry
        if self._groups is None:
            self._table.add_rows_later(_row(each) for each in message.entries if rows.has(each, self._words))
            if time.monotonic() - self._sorted > SORT_SECONDS:
                self._sort()
        if self._table.under_cursor in message.entries:
            self._show_details()

    @on(messages.EntryGone)
    def _forget(self, message: messages.EntryGone) -> None:
        self._entries.pop(message.path, None)
        self._table.forget(str(message.path))

    @on(messages.IndexRead)
    def _index_read(self, message: messages.IndexRead) -> None:
        folder = self.workbench.folder
        if folder is not None:
            self._scan_folder(folder)
            return
        if not message.empty:
            self._tell_count()
            self.action_rescan()
            return
        self.add_class("empty")
        self.tell("No models yet")
        self.query_one("#empty", Static).update(_first_words(message.folders, self.workbench.keys_of("library.rescan")))

    @on(messages.Scanned)
    def _scanned(self, message: messages.Scanned) -> None:
        report = message.report
        self._sort()
        news = ((report.new, "new"), (report.changed, "changed"), (report.gone, "gone"))
        told = ", ".join(f"{number:,} {word}" for number, word in news if number) or "nothing new"
        bad = f", {len(report.unreadable):,} cannot be read" if report.unreadable else ""
        self.finished(f"{count(report.files, 'model')}: {told}{bad}")
        for note in report.notes[:3]:
            self.workbench.say(shown(note), severity="warning")
        self.set_class(not self._entries, "empty")
        if not self._entries:
            folders = ", ".join(str(folder) for folder in report.folders)
            self.query_one("#empty", Static).update(Text(f"There are no models in {shown(folders)}."))

    @on(messages.Hashed)
    def _hashed(self, message: messages.Hashed) -> None:
        self.finished(f"{count(message.files, 'model')} hashed")

    @on(messages.DuplicatesFound)
    def _duplicates_found(self, message: messages.DuplicatesFound) -> None:
        found = message.found
        self._groups = found
        self._refill()
        groups = len(found.files) + len(found.components)
        told = f"{count(groups, 'group')}, {size(found.saves)} could be saved" if groups else "Nothing is there twice"
        hashes = f"; {found.unhashed:,} not hashed yet: {self.workbench.keys_of('library.hash_all')}"
        self.tell(told + (hashes if found.unhashed else "") + "; Esc shows all models")

    @on(messages.BesideFound)
    def _beside_found(self, message: messages.BesideFound) -> None:
        entry = self._table.under_cursor
        if entry is not None and entry.path == message.path:
            self.query_one("#details", Static).update(rows.details(entry, message.names))

    @on(messages.PreviewFound)
    def _preview_found(self, message: messages.PreviewFound) -> None:
        entry = self._table.under_cursor
        if entry is not None and entry.path == message.model:
            self._preview.show(message.shot)
            self._preview.set_class(message.shot is not None, "there")

    # --- what is shown ---

    def _refill(self) -> None:
        self._table.show_rows(self._rows())

    def _rows(self) -> Iterable[Row]:
        if self._groups is not None:
            return list(_group_rows(self._groups, self._words))
        chosen = [entry for entry in self._entries.values() if rows.has(entry, self._words)]
        return [_row(entry) for entry in sorted(chosen, key=self._column.order)]

    def _sort(self) -> None:
        if self._groups is None:
            self._table.sort_by(self._column.order)
            self._sorted = time.monotonic()

    def _tell_count(self) -> None:
        if not self.busy:
            all_of_them = count(len(self._entries), "model")
            self.tell(f"{self._table.models:,} of {all_of_them}" if self._words else all_of_them)

    def _marks_changed(self) -> None:
        self._table.renew_marks()
        if not self.busy:
            self.tell(f"{count(len(self.workbench.workspace.marked), 'model')} marked")

    @on(DataTable.RowHighlighted)
    def _show_details(self) -> None:
        entry = self._table.under_cursor
        self.query_one("#details", Static).update(rows.details(entry, None) if entry else Text(""))
        self._preview.remove_class("there")
        if self._later:
            self._later.stop()
        self._later = self.set_timer(PAUSE, self._look_beside)

    def _look_beside(self) -> None:
        entry = self._table.under_cursor
        if entry is not None:
            path = entry.path
            self.start("Looking beside the model", lambda post: library_workers.look_beside(path, post))

    # --- actions ---

    @on(DataTable.RowSelected)
    def action_inspect(self) -> None:
        """Show the model under the cursor in the inspector."""
        entry = self._table.under_cursor
        if entry is None:
            self.workbench.say("There is no model under the cursor.")
        elif entry.error:
            self.workbench.say(shown(entry.error), title="This cannot be read", severity="warning")
        else:
            self.workbench.inspect_model(entry.path)

    def action_mark(self) -> None:
        """Mark the model under the cursor, and go on to the next."""
        entry = self._table.under_cursor
        if entry is None or entry.error:
            self.workbench.say("Only a model that can be read can be marked.")
            return
        self.workbench.edit(self.workbench.workspace.toggled(entry.path))
        self._table.action_cursor_down()

    def action_mix(self) -> None:
        """Begin a recipe with the marked models, else with the one under the cursor."""
        entry = self._table.under_cursor
        paths = self.workbench.workspace.marked or ((entry.path,) if entry and not entry.error else ())
        if paths:
            self.workbench.mix(paths)
        else:
            self.workbench.say(f"Mark the models to merge: {self.workbench.keys_of('library.mark')} on each.")

    def _two_marked(self) -> tuple[Path, Path] | None:
        """The two marked models; None, and a word to the user, where there are not two."""
        marked = self.workbench.workspace.marked
        if len(marked) != 2:
            key = self.workbench.keys_of("library.mark")
            self.workbench.say(f"Mark two models, {key} on each: {len(marked)} marked now.")
            return None
        return marked

    def action_diff(self) -> None:
        """Compare the two marked models."""
        pair = self._two_marked()
        if pair:
            self.workbench.compare(*pair)

    def action_extract(self) -> None:
        """A LoRA of what the second marked model has over the first."""
        pair = self._two_marked()
        if pair:
            self.app.push_screen(AskLora(*pair), self._lora_asked)

    def _lora_asked(self, wish: LoraWish | None) -> None:
        if wish is not None:
            self.workbench.submit(wish.title, wish.arguments)

    def action_prune(self) -> None:
        """Write a copy of the model under the cursor without EMA and junk."""
        entry = self._table.under_cursor
        if entry is None or entry.error:
            self.workbench.say("There is nothing to prune: no model under the cursor can be read.")
            return
        path = entry.path.absolute()

        def answered(target: Path | None) -> None:
            if target is not None:
                self.workbench.submit(f"Prune {path.name}", ("prune", str(path), "-o", str(target.absolute())))

        question = "Leave EMA and junk out; all else stays bit for bit. Write to:"
        self.app.push_screen(AskPath(question, free_path(path, "pruned")), answered)

    def action_filter(self) -> None:
        """Type words."""
        self.query_one(WordFilter).open()

    @on(WordFilter.Narrowed)
    def _narrowed(self, message: WordFilter.Narrowed) -> None:
        self._words = message.words
        self._refill()
        self._tell_count()

    @on(Input.Submitted, "#filter")
    def _typed(self) -> None:
        self._table.focus()

    def action_back(self) -> None:
        """Leave the filter, else the groups."""
        if not self.query_one(WordFilter).leave() and self._groups is not None:
            self._groups = None
            self._refill()
            self._tell_count()
        self._table.focus()

    def action_sort(self) -> None:
        """Sort by the next column."""
        self._sort_by(rows.COLUMNS[(rows.COLUMNS.index(self._column) + 1) % len(rows.COLUMNS)])

    @on(DataTable.HeaderSelected)
    def _header_clicked(self, event: DataTable.HeaderSelected) -> None:
        column = next((each for each in rows.COLUMNS if each.name == event.column_key.value), None)
        if column:
            self._sort_by(column)

    def _sort_by(self, column: rows.Column) -> None:
        if self._groups is not None:
            self.workbench.say("Groups have their own order: Esc leaves them.")
            return
        self._column = column
        self._sort()
        if not self.busy:
            self.tell(f"Sorted by {column.name}")

    def action_rescan(self) -> None:
        """Bring the list up to date, without hashing."""
        if self.start_long("The scan", lambda post, token: library_workers.scan("none", post, token)):
            self.tell("Scanning …")

    def _scan_folder(self, folder: Path) -> None:
        if self.start_long("The scan", lambda post, token: library_workers.scan("none", post, token, (folder,))):
            self.tell("Scanning …")

    def _look_at_made(self, paths: tuple[Path, ...]) -> None:
        """Files that jobs made come into the list without a scan."""
        if paths:
            self.start("Reading new models", lambda post: library_workers.read_made(paths, post))

    def action_hash(self) -> None:
        """Hash the marked models, or the one under the cursor."""
        entry = self._table.under_cursor
        paths = self.workbench.workspace.marked or ((entry.path,) if entry and not entry.error else ())
        if not paths:
            self.workbench.say("There is nothing to hash: no model under the cursor can be read.")
        elif self.start_long("Hashing", lambda post, token: library_workers.hash_models(paths, post, token)):
            self.tell("Hashing …")

    def action_hash_all(self) -> None:
        """Make the hashes that are missing."""
        if self.start_long("Hashing", lambda post, token: library_workers.scan("all", post, token)):
            self.tell("Hashing …")

    def action_duplicates(self) -> None:
        """Group what is there more than once."""
        self.tell("Comparing …")
        self.start("Looking for duplicates", lambda post: post(messages.DuplicatesFound(mk.find_duplicates())))


def _row(entry: mk.LibraryEntry) -> Row:
    return Row(str(entry.path), entry)


def _group_rows(found: mk.Duplicates, words: list[str]) -> Iterable[Row]:
    for number, group in enumerate((*found.files, *found.components)):
        members = [entry for entry in group.entries if rows.has(entry, words)]
        if members:
            yield Row(f"group {number}", None, rows.group_words(group))
            yield from (Row(f"{number} {entry.path}", entry) for entry in members)


def _first_words(folders: Iterable[mk.ModelFolder], key: str) -> Text:
    """What to do where nothing was scanned yet."""
    every = list(folders)
    if not every:
        return Text(
            "No folders of models were found.\n\nName one on the command line:\n\n"
            "  mergekit-sd library scan DIR\n  mergekit-sd roots add NAME DIR\n\n"
            f"then press {key} here. No models at hand? `mergekit-sd demo` makes a folder of small ones, and\n"
            "`mergekit-sd tui mergekit-sd-demo` opens it."
        )
    lines = "\n".join(f"  {shown(str(folder.path))}  ({shown(folder.why)})" for folder in every[:12])
    more = f"\n  … and {len(every) - 12} more" if len(every) > 12 else ""
    return Text(
        f"These folders of models were found:\n\n{lines}{more}\n\nPress {key} to scan them: only headers are read."
    )
