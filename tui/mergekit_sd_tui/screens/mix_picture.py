"""The Mix screen's picture: drawn with a step as it is, before anything is written.

Owns the temporary recipes and where their pictures are shown. The drawing is a job.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from rich.text import Text
from textual import on

import mergekit_sd as mk
from mergekit_sd.errors import UsageError
from mergekit_sd.text import shown
from mergekit_sd_tui import drafting, messages
from mergekit_sd_tui.pictures import PictureView, read_shot
from mergekit_sd_tui.screens.mix_desk import Desk
from mergekit_sd_tui.screens.working import Post

SAMPLE_STEPS = 8


class PictureActions(Desk):
    """What is drawn, and shown beside the bars."""

    def __init__(self) -> None:
        super().__init__()
        self._prompt: str | None = None
        self._drawn = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._awaited: dict[str, str] = {}  # folders of pictures to come, and the draft's text that they are of
        self._drawn_text = ""

    def action_sample(self) -> None:
        """Draw with the step as it is now."""
        recipe, step = self.recipe, self.step_name
        of = step or (next(iter(recipe.models), None) if recipe else None)
        if recipe is None or of is None:
            self.workbench.say("There is nothing to draw with.")
        elif self.step and self.step.operation.result in ("delta", "lora"):
            self.workbench.say(f"{shown(of)} is no model: only a model can draw.")
        else:
            first = recipe.samples[0].prompt if recipe.samples else ""
            said = self._prompt if self._prompt is not None else first
            self.ask_text(f"What shall {shown(of)} draw?", said, partial(self._draw, of), _prompt)

    def _draw(self, of: str, prompt: str) -> None:
        self._prompt = prompt
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="mergekit-sd-")
        self._drawn += 1
        room = Path(self._folder.name) / str(self._drawn)
        room.mkdir()
        (room / "recipe.toml").write_text(drafting.detached(self.workbench.workspace.draft), encoding="utf-8")
        pictures = str(room / "pictures")
        self._awaited[pictures] = self.workbench.workspace.draft.text
        settings = ["--steps", str(SAMPLE_STEPS), "--seeds", "1", "--checks", "none"]
        asked = ["--of", of, f"--prompt={prompt}", *settings, "-o", pictures]
        self.workbench.submit(f"Picture of {of}", ["sample", str(room / "recipe.toml"), *asked])
        self.tell(f"Drawing with {shown(of)} …")

    def _jobs_changed(self, jobs: tuple[Any, ...]) -> None:
        for job in jobs:
            folder = job.arguments[-1] if job.arguments else ""
            if job.is_over and folder in self._awaited:
                text = self._awaited.pop(folder)
                if job.state == "done":
                    self._drawn_text = text
                    self.start("Reading the picture", partial(_read_picture, Path(folder)))
                else:
                    self.tell(f"{shown(job.title)}: {job.state}")

    @on(messages.StepDrawn)
    def _show_picture(self, message: messages.StepDrawn) -> None:
        """Beside the bars where there is room, else in the gallery."""
        view = self.query_one(PictureView)
        view.show(message.shot)
        view.border_title = Text(f"{message.picture.model}: {message.picture.prompt}")
        self.add_class("drawn")
        self.mark_picture()
        self.workbench.pictures = message.folder
        self.tell(f"{shown(message.picture.model)} is drawn; the gallery has it in full")
        if self.is_current and not self.has_class("-wide"):
            self.workbench.show_pictures(message.folder)

    def mark_picture(self) -> None:
        """Say where the picture is of an older mix than the one that is shown."""
        is_old = self._drawn_text not in ("", self.workbench.workspace.draft.text)
        self.query_one(PictureView).border_subtitle = "before the last changes" if is_old else ""

    def on_unmount(self) -> None:
        """The temporary recipes and pictures go."""
        if self._folder is not None:
            self._folder.cleanup()


def _read_picture(folder: Path, post: Post) -> None:
    first = mk.read_samples(folder).pictures[0]
    post(messages.StepDrawn(folder, first, read_shot(first.path)))


def _prompt(text: str) -> None:
    if not text.strip():
        raise UsageError("There is nothing to draw.", hint="say what: a lantern in the rain")
