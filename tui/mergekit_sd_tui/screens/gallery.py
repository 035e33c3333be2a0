"""The gallery: pictures of models by seeds, one alone, two in one place, favourites.

Owns which folder and pictures are shown. Drawing samples is the engine's.
"""

from __future__ import annotations

import webbrowser
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.containers import Container
from textual.timer import Timer
from textual.widgets import Footer, Static
from textual.worker import get_current_worker

import mergekit_sd as mk
from mergekit_sd.text import count, shown
from mergekit_sd_tui import messages
from mergekit_sd_tui.actions import bindings
from mergekit_sd_tui.favourites import load_favourites, save_favourites
from mergekit_sd_tui.picture_grid import PictureGrid
from mergekit_sd_tui.pictures import PictureView, graphics, read_shot
from mergekit_sd_tui.screens.ask_more import AskFolder
from mergekit_sd_tui.screens.working import Post, WorkingScreen

FLICKER = 0.6  # seconds that each of two pictures is seen
CHOSEN = ("A", "B")
FAVOURITE = "*"


class GalleryScreen(WorkingScreen):
    """Screen 6. `_alone`: one picture is shown large; `_side`: which of the two chosen, None while none is compared."""

    place = "gallery"
    BINDINGS: ClassVar = bindings(place)
    CSS = """
    GalleryScreen #body { layout: vertical; }
    GalleryScreen #name { height: 1; text-style: bold; padding: 0 1; }
    GalleryScreen #pictures { height: 1fr; padding: 0 1; }
    GalleryScreen #large { display: none; height: 1fr; padding: 0 1; }
    GalleryScreen #empty { display: none; padding: 1 2; height: 1fr; }
    GalleryScreen #about { height: 3; padding: 0 1; border-top: none; background: $panel; }
    GalleryScreen.-short #about { display: none; }
    GalleryScreen.alone #pictures, GalleryScreen.empty #pictures { display: none; }
    GalleryScreen.alone #large { display: block; }
    GalleryScreen.alone.graphic #large { display: none; }
    GalleryScreen.empty #empty { display: block; }
    GalleryScreen .pixels { width: auto; height: 1fr; }
    """

    def __init__(self) -> None:
        super().__init__()
        self._folder: Path | None = None
        self._samples: mk.SavedSamples | None = None
        self._favourites: frozenset[str] = frozenset()
        self._chosen: tuple[mk.SavedPicture, ...] = ()
        self._side: int | None = None
        self._flicker: Timer | None = None
        self._known: tuple[Path, ...] = ()

    def compose(self) -> ComposeResult:
        """The folder's name, the pictures, what is known of the one under the cursor, the keys."""
        yield self.places()
        yield Static(id="name")
        with Container(id="body"):
            yield PictureGrid(id="pictures")
            yield PictureView(id="large")
            yield Static(id="empty")
        yield Static(id="about")
        yield Static(id="status", classes="status")
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        """Show the folder that was asked for, else the first that is found."""
        self.watch(self.app, "pictures", self._asked)

    def on_screen_resume(self) -> None:
        """Jobs may have drawn since."""
        self._look_for_folders()

    def on_screen_suspend(self) -> None:
        """Nobody looks."""
        self._stop_flicker()

    @property
    def _grid(self) -> PictureGrid:
        return self.query_one(PictureGrid)

    def _put(self, where: str, words: Text | str) -> None:
        self.query_one(f"#{where}", Static).update(words)

    def _asked(self) -> None:
        if self.workbench.pictures is not None:
            self._open(self.workbench.pictures)

    def _look_for_folders(self) -> None:
        places = self._places_to_look()
        self.start("Looking for samples", lambda post: post(messages.SamplesFound(mk.samples_in(places))))

    def _places_to_look(self) -> list[Path]:
        """Where jobs drew, then beside the models and the recipe in hand, then here."""
        bench = self.workbench
        drawn = [job.pictures for job in reversed(bench.jobs) if job.pictures]
        files = [*([bench.current] if bench.current else []), *bench.workspace.marked, *bench.made]
        beside = [path.parent for path in files] + [bench.workspace.draft.folder, Path.cwd()]
        asked = [bench.pictures] if bench.pictures else []
        return list(dict.fromkeys(path.absolute() for path in (*asked, *drawn, *beside)))

    # --- what workers tell ---

    @on(messages.SamplesFound)
    def _found(self, message: messages.SamplesFound) -> None:
        self._known = message.folders
        if self._folder is None and self._known:
            self._open(self._known[0])
        elif self._folder is None:
            self.add_class("empty")
            keys = self.workbench.keys_of
            self._put(
                "empty",
                f"No samples were found.\n\n{keys('mix.sample')} on the Mix screen ({keys('app.mix')}) draws with a "
                "mix, `mergekit-sd sample MODEL -o DIR` with a model;\na recipe with [[samples]] draws when it is run."
                f"\n\n{keys('gallery.folder')} opens a folder that has some.",
            )
            self.tell("No samples yet")
        else:
            self._tell_name()

    @on(messages.SamplesRead)
    def _read(self, message: messages.SamplesRead) -> None:
        if message.samples.folder != self._folder:
            return
        self._samples, self._favourites = message.samples, message.favourites
        self._grid.show_pictures(message.samples.pictures)
        self._show()
        self._tell_count()
        pictures = message.samples.pictures
        self.start("Reading the pictures", lambda post: _read_shots(pictures, post))

    @on(messages.PictureRead)
    def _picture_read(self, message: messages.PictureRead) -> None:
        if message.path.parent == self._folder:
            self._grid.show_shot(message.path, message.shot)
            if self.has_class("alone"):
                self._show_large()

    # --- what is shown ---

    def _open(self, folder: Path) -> None:
        self._leave_large()
        self._folder, self._samples, self._chosen = folder, None, ()
        self.remove_class("empty")
        self._grid.show_pictures(())
        self._tell_name()
        self._put("about", "")
        self.tell("Reading …")
        self.start("Reading the samples", lambda post: _read_samples(folder, post))

    def _tell_name(self) -> None:
        assert self._folder is not None
        words = Text(no_wrap=True, overflow="ellipsis")
        if self._folder in self._known and len(self._known) > 1:
            words.append(f"{self._known.index(self._folder) + 1} of {len(self._known)}: ")
        words.append(f"{shown(self._folder.name)}  in {shown(str(self._folder.parent))}")
        self._put("name", words)

    def _tell_count(self) -> None:
        found = self._samples
        assert found is not None
        sound = f"{count(found.checks, 'check')}, {len(found.findings)} not in order" if found.checks else "no checks"
        self.tell(f"{count(len(found.pictures), 'picture')} of {count(len(found.models), 'model')}; {sound}")

    @property
    def _picture(self) -> mk.SavedPicture | None:
        """The picture that keys are about."""
        return self._chosen[self._side] if self._side is not None else self._grid.under_cursor

    @on(PictureGrid.Moved)
    def _show(self) -> None:
        self._grid.show_marks(self._marks())
        self._put("about", self._about())
        if self.has_class("alone"):
            self._show_large()

    def _marks(self) -> dict[Path, str]:
        pictures = self._samples.pictures if self._samples else ()
        marks = {each.path: FAVOURITE for each in pictures if each.path.name in self._favourites}
        for letter, each in zip(CHOSEN, self._chosen, strict=False):
            marks[each.path] = f"{letter}{marks.get(each.path, '')}"
        return marks

    def _about(self) -> Text:
        """Three lines: which picture, its prompt, what the checks say of its model."""
        picture, text = self._picture, Text(no_wrap=True, overflow="ellipsis")
        if picture is None or self._samples is None:
            return text
        mark = self._marks().get(picture.path, "")
        text.append(f"{shown(picture.model)}, seed {picture.seed}{mark and f' ({mark})'}", style="bold")
        text.append(f"  {shown(picture.settings)}\n")
        text.append(f"{shown(picture.prompt)}\n")
        findings = [each for each in self._samples.findings if each.model == picture.model]
        words = "; ".join(f"{each.level}: {shown(each.name)}: {shown(each.message)}" for each in findings)
        text.append(words or ("all checks are ok" if self._samples.checks else ""), style="bold" if words else "")
        return text

    def _show_large(self) -> None:
        picture = self._picture
        shot = self._grid.shot_of(picture.path) if picture else None
        kind = graphics()
        self.query_one("#large", PictureView).show(shot)
        if picture is not None and shot is not None and shot.picture is not None and kind is not None:
            self._show_pixels(kind, picture.path)

    def _show_pixels(self, kind: Any, path: Path) -> None:
        """The file itself, by the terminal's own graphics."""
        self.add_class("graphic")
        every = self.query(".pixels")
        if every:
            every.first().image = path  # type: ignore[attr-defined]
        else:
            self.query_one("#body").mount(kind(path, classes="pixels"))

    # --- actions ---

    @on(PictureGrid.Opened)
    def action_enlarge(self) -> None:
        """The picture under the cursor alone; again: all."""
        if self.has_class("alone"):
            self._leave_large()
        elif self._grid.under_cursor is None:
            self.workbench.say("There is no picture under the cursor.")
        else:
            self.add_class("alone")
            self._show()

    def _leave_large(self) -> None:
        self._stop_flicker()
        self._side = None
        self.remove_class("alone")
        self.remove_class("graphic")
        self.query(".pixels").remove()
        self._show()

    def action_left(self) -> None:
        """The model before."""
        self._move(-1, 0)

    def action_right(self) -> None:
        """The next model."""
        self._move(1, 0)

    def action_up(self) -> None:
        """The seed before."""
        self._move(0, -1)

    def action_down(self) -> None:
        """The next seed."""
        self._move(0, 1)

    def _move(self, across: int, down: int) -> None:
        self._side = None
        self._stop_flicker()
        self._grid.move(across, down)
        self._show()

    def action_choose(self) -> None:
        """Take the picture under the cursor as one of two to compare, or no longer."""
        picture = self._grid.under_cursor
        if picture is None or self._side is not None:
            return
        if picture in self._chosen:
            self._chosen = tuple(each for each in self._chosen if each != picture)
        else:
            self._chosen = (*self._chosen[-1:], picture)
        self._show()

    def action_compare(self) -> None:
        """The two that are chosen in one place: each press shows the other."""
        if self._choose_pair():
            self._stop_flicker()
            self._flip()

    def action_flicker(self) -> None:
        """The two that are chosen in one place, in turn; again: it stands still."""
        if self._flicker is not None:
            self._stop_flicker()
            self._tell_side()
        elif self._choose_pair():
            self._flip()
            self._flicker = self.set_interval(FLICKER, self._flip)

    def _choose_pair(self) -> bool:
        """Whether there are two; the one under the cursor is the second where only one is chosen."""
        here = self._grid.under_cursor
        if len(self._chosen) == 1 and here is not None and here != self._chosen[0] and self._side is None:
            self._chosen = (*self._chosen, here)
        if len(self._chosen) < len(CHOSEN):
            self.workbench.say(f"Choose two pictures: {self.workbench.keys_of('gallery.choose')} on each.")
            return False
        self.add_class("alone")
        return True

    def _flip(self) -> None:
        self._side = 1 - self._side if self._side is not None else 0
        self._show()
        self._tell_side()

    def _tell_side(self) -> None:
        assert self._side is not None
        picture, turn = self._chosen[self._side], " in turn" if self._flicker else ""
        self.tell(f"{CHOSEN[self._side]}: {shown(picture.model)}, seed {picture.seed}{turn}")

    def _stop_flicker(self) -> None:
        if self._flicker is not None:
            self._flicker.stop()
            self._flicker = None

    def action_favourite(self) -> None:
        """Make it a favourite, or no longer; kept though the folder be drawn anew."""
        picture = self._picture
        if picture is None or self._folder is None:
            return
        names = self._favourites ^ {picture.path.name}
        try:
            save_favourites(self._folder, names)
        except OSError as error:
            self.workbench.say(f"Favourites cannot be kept: {shown(str(error))}", severity="error")
            return
        self._favourites = names
        self._show()

    def action_report(self) -> None:
        """Open the report in the browser."""
        page = self._samples.page if self._samples else None
        if page is None or not page.is_file():
            self.workbench.say("There is no report here.")
            return
        try:
            opened = webbrowser.open(page.absolute().as_uri())
        except (webbrowser.Error, OSError):
            opened = False
        words = "The browser shows" if opened else "No browser opens here. The report is"
        self.workbench.say(f"{words} {shown(str(page.absolute()))}")

    def action_next(self) -> None:
        """The next folder of those found."""
        if len(self._known) < 2 and self._folder in (None, *self._known):
            self.workbench.say("No other samples were found.")
            return
        at = self._known.index(self._folder) if self._folder in self._known else -1
        self._open(self._known[(at + 1) % len(self._known)])

    def action_folder(self) -> None:
        """Open another folder."""
        self.app.push_screen(AskFolder("Show the samples in:", self._known), self._folder_asked)

    def _folder_asked(self, folder: Path | None) -> None:
        if folder is not None:
            self.workbench.show_pictures(folder.absolute())

    def action_back(self) -> None:
        """All pictures again."""
        if self.has_class("alone"):
            self._leave_large()
            if self._samples:
                self._tell_count()


# --- workers: they only post ---------------------------------------------------------------------------


def _read_samples(folder: Path, post: Post) -> None:
    post(messages.SamplesRead(mk.read_samples(folder), load_favourites(folder)))


def _read_shots(pictures: Iterable[mk.SavedPicture], post: Post) -> None:
    worker = get_current_worker()
    for each in pictures:
        if worker.is_cancelled:  # another folder is shown by now
            return
        post(messages.PictureRead(each.path, read_shot(each.path)))
