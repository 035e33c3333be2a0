"""Writing a model as a folder that diffusers loads.

Owns the order: what is planned and checked, the weights in one streaming pass for each component, the
small files, the rename.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergekit_sd.api import plan, recipe_of
from mergekit_sd.errors import OutputIsInput
from mergekit_sd.events import CancelToken, Event, Listener, Noted, OutputFinished, OutputStarted, ignore
from mergekit_sd.execute.run import OutputReport, RunOptions, execute
from mergekit_sd.formats.diffusers.tokenizer import BANG, END, PACKAGE, tokenizer_files
from mergekit_sd.formats.folders import OutputFolder, check_new_folder
from mergekit_sd.graph import Node
from mergekit_sd.planning.diffusers import FolderPlan, plan_folder
from mergekit_sd.planning.values import Plan
from mergekit_sd.text import count, listed


@dataclass(frozen=True)
class FolderReport:
    """What was made: the report of each component's weights, all files by their path, what is to be known."""

    path: Path
    components: Mapping[str, OutputReport]
    files: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: float

    @property
    def bytes(self) -> int:
        """The size of all weights."""
        return sum(each.bytes for each in self.components.values())

    def as_json(self) -> dict[str, object]:
        """The report as plain data."""
        return {
            "path": str(self.path),
            "bytes": self.bytes,
            "components": {name: each.as_json() for name, each in self.components.items()},
            "files": list(self.files),
            "notes": list(self.notes),
            "seconds": self.seconds,
        }


def plan_diffusers(
    node: Node,
    folder: str | Path,
    *,
    component: str | None = None,
    force: bool = False,
    dtype: Any = "fp16",
    **output: Any,
) -> FolderPlan:
    """What `save_diffusers` would do. Raises what it would raise by then."""
    folder = Path(folder)
    made = plan(recipe_of(node, folder / "model", dtype=dtype, **output), anywhere=True, metadata="none")
    found = plan_folder(made, component)
    check_new_folder(folder, force=force)
    _check_apart(made, folder)
    return found


def save_diffusers(
    node: Node,
    folder: str | Path,
    *,
    component: str | None = None,
    dtype: Any = "fp16",
    force: bool = False,
    threads: int | None = None,
    device: str = "cpu",
    allow_nonfinite: bool = False,
    scan: bool = False,
    on_event: Listener = ignore,
    cancel: CancelToken | None = None,
    **output: Any,
) -> FolderReport:
    """Write a graph's result as a folder that `from_pretrained` of diffusers loads: SD1, SD2 and SDXL.

    `component`: only that one, its files right in the folder. `output` as for `save`. The folder appears
    whole or not at all; an existing one is replaced only with `force`, and only if it is a model's.
    """
    folder, begun = Path(folder), time.monotonic()
    planned = plan_diffusers(node, folder, component=component, force=force, dtype=dtype, **output)
    options = RunOptions(threads=threads, device=device, allow_nonfinite=allow_nonfinite, scan=scan, hashing=False)
    with OutputFolder(folder, force=force) as target:
        for output_ in planned.outputs.values():
            (target.place / output_.path).parent.mkdir(exist_ok=True)

        def tell(event: Event) -> None:
            if isinstance(event, OutputStarted | OutputFinished):
                event = replace(event, path=str(folder / Path(event.path).relative_to(target.place)))
            on_event(event)

        made = execute(planned.within(target.place), options, tell, cancel)
        small, notes = _small_files(planned)
        notes += _left_out(planned)
        for name, text in small.items():
            target.write(name, text)
        target.commit()
    for note in notes:
        on_event(Noted(note))
    paths = {name: each.path for name, each in planned.outputs.items()}
    reports = {each.name: replace(each, path=folder / paths[each.name]) for each in made.outputs}
    files = tuple(sorted([path.as_posix() for path in paths.values()] + list(small)))
    return FolderReport(folder, reports, files, tuple(notes), time.monotonic() - begun)


def _small_files(planned: FolderPlan) -> tuple[dict[str, str], list[str]]:
    """Everything but the weights, and what the user must do about what could not be made."""
    files = {name: json.dumps(config, indent=2) + "\n" for name, config in planned.files.items()}
    without = []
    for folder, is_clip in planned.pads.items():
        found = tokenizer_files(END if is_clip else BANG)
        if found is None:
            without.append(folder)
        else:
            files |= {f"{folder}/{name}": text for name, text in found.items()}
    if not without:
        return files, []
    return files, [
        f"without {listed(without)}: copy the folder from another model of this kind, "
        f"or install {PACKAGE} (pip install {PACKAGE}) and write it again"
    ]


def _left_out(planned: FolderPlan) -> list[str]:
    """What the folder has not, in words."""
    names = planned.left_out
    if not names:
        return []
    return [f"left out {count(len(names), 'tensor')} that diffusers makes itself or has no place for: {listed(names)}"]


def _check_apart(made: Plan, folder: Path) -> None:
    """Raises OutputIsInput where an input lies in the folder that would be replaced."""
    target = folder.resolve()
    for source in made.inputs:
        for path in [part.path for part in source.file.parts] or [source.file.path]:
            if target in path.resolve().parents or target in path.absolute().parents:
                message = f'The output would replace the folder that the input "{source.name}" lies in.'
                raise OutputIsInput(message, file=folder, hint="name another folder")
