"""Where models lie on this machine: the folders of other programs' installs, and the registered roots.

Owns the search for them, and ComfyUI's file of extra paths. What is looked for where is data.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mergekit_sd.errors import MergekitError, UsageError
from mergekit_sd.recipe.roots import load_roots

MOST_BYTES = 1 << 20  # of an extra_model_paths.yaml
DATA = Path(__file__).parent / "data"


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A folder of models. `kind` is what mostly lies in it, None where nobody says; `why` is how it was found."""

    path: Path
    kind: str | None
    why: str

    def as_json(self) -> dict[str, object]:
        """One flat object."""
        return {"path": str(self.path), "kind": self.kind, "why": self.why}


def model_folders() -> list[ModelFolder]:
    """The folders of models that are there: of installs at the usual places, and the roots. Each once."""
    found: dict[Path, ModelFolder] = {}
    for folder in _candidates():
        path = _resolved(folder.path)
        if path is not None and path not in found:
            found[path] = ModelFolder(path, folder.kind, folder.why)
    return list(found.values())


def existing_folder(named: str | Path) -> Path:
    """The real path of a folder; raises UsageError where there is none."""
    folder = Path(named)
    if not folder.is_dir():
        raise UsageError("This is not a folder.", file=folder, hint="name a folder that exists")
    return folder.resolve()


def _candidates() -> Iterator[ModelFolder]:
    for program, install in _installs():
        why = f"{program['name']} in {install}"
        for name, kind in program["folders"].items():
            yield ModelFolder(install / name, kind, why)
        if "extra" in program:
            yield from read_extra_paths(install / program["extra"])
    yield from read_extra_paths(_desktop_paths())
    try:
        roots = load_roots()
    except MergekitError:  # `roots list` and `doctor` say what is wrong with it
        roots = {}
    for name, path in roots.items():
        yield ModelFolder(path, None, f"root {name}")


def _installs() -> Iterator[tuple[dict[str, Any], Path]]:
    """Each install of each program, once."""
    seen: set[Path] = set()
    for above in _above():
        for pattern in _data()["places"]["names"]:
            try:
                paths = sorted(above.glob(pattern))
            except OSError:
                continue
            for path in paths:
                install = _resolved(path)
                if install is not None and install not in seen:
                    seen.add(install)
                    yield from ((program, install) for program in _data()["program"] if _has(install, program["marks"]))


def _above() -> list[Path]:
    """The folders that installs are looked for in."""
    places = _data()["places"]
    try:
        home = Path.home()
    except RuntimeError:  # the home of nobody
        home = Path()
    texts = [*places["folders"], *places["windows" if os.name == "nt" else "posix"]]
    return [home / text[2:] if text.startswith("~") else Path(text) for text in texts]


def _has(install: Path, marks: list[str]) -> bool:
    return all(os.path.lexists(install / mark) for mark in marks)


def _resolved(path: Path) -> Path | None:
    """The real path of a folder; None where there is none that can be reached."""
    try:
        return path.resolve() if path.is_dir() else None
    except (OSError, RuntimeError, ValueError):
        return None


@cache
def _data() -> dict[str, Any]:
    return tomllib.loads((DATA / "layouts.toml").read_text(encoding="utf-8"))


# --- ComfyUI's extra_model_paths.yaml ----------------------------------------------------------------


def _desktop_paths() -> Path:
    """The file of ComfyUI's desktop program."""
    import platformdirs

    return Path(platformdirs.user_config_dir("ComfyUI", appauthor=False, roaming=True)) / "extra_models_config.yaml"


def read_extra_paths(file: Path) -> list[ModelFolder]:
    """The folders that such a file names, whether or not they are there; none if it cannot be read."""
    try:
        if file.stat().st_size > MOST_BYTES:
            return []
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return []
    found = []
    for section, entries in _sections(text):
        start = file.parent / _base(entries.get("base_path"))
        why = f"{section} in {file}"
        for word, kind in _data()["extra"].items():
            found += [ModelFolder(start / line, kind, why) for line in _lines(entries.get(word))]
    return found


def _base(text: object) -> Path:
    path = Path(os.path.expandvars(text.strip() if isinstance(text, str) else ""))
    try:
        return path.expanduser()
    except RuntimeError:  # the home of nobody
        return path


def _sections(text: str) -> list[tuple[str, dict[Any, Any]]]:
    import yaml  # type: ignore[import-untyped,unused-ignore]

    try:
        document = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return []
    if not isinstance(document, dict):
        return []
    return [(str(name), entries) for name, entries in document.items() if isinstance(entries, dict)]


def _lines(value: object) -> list[str]:
    """One folder, or one a line; a list is not ComfyUI's, but people write it."""
    every = value if isinstance(value, list) else [value]
    texts = [line.strip() for each in every if isinstance(each, str) for line in each.split("\n")]
    return [text for text in texts if text]
