"""Model roots: folders that recipes name by a short prefix (`webui:v1-5.ckpt`).

Owns the user's list of them and how a recipe's path becomes a path on this machine. Must not
open models.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from mergekit_sd.errors import EnvironmentFault, NotWritable, RecipeError, UsageError
from mergekit_sd.text import did_you_mean, shown

CONFIG_VARIABLE = "MERGEKIT_SD_CONFIG"
FORBIDDEN = set(':/\\ \t"')


def config_folder() -> Path:
    """The user's configuration folder; `MERGEKIT_SD_CONFIG` names another."""
    named = os.environ.get(CONFIG_VARIABLE)
    if named:
        return Path(named)
    import platformdirs

    return Path(platformdirs.user_config_dir("mergekit-sd", appauthor=False))


def roots_file() -> Path:
    """Where the list is kept."""
    return config_folder() / "roots.json"


def load_roots() -> dict[str, Path]:
    """The registered roots, in the order of their registration."""
    path = roots_file()
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): Path(folder) for name, folder in entries.items()}
    except FileNotFoundError:
        return {}
    except OSError as error:
        hint = "check its permissions"
        raise EnvironmentFault(f"The list of roots cannot be read: {error.strerror}.", file=path, hint=hint) from error
    except (ValueError, AttributeError, TypeError) as error:
        raise UsageError(f"The list of roots cannot be read: {error}.", file=path, hint="mend or delete it") from error


def add_root(name: str, folder: Path) -> dict[str, Path]:
    """Register a folder under a name, or another folder under a known name. Returns all roots."""
    if len(name) < 2:
        raise UsageError(f'"{shown(name)}" is too short for a root: one letter is a drive.', hint="take a word")
    if FORBIDDEN & set(name) or not name.isprintable():
        raise UsageError(f'"{shown(name)}" cannot name a root.', hint="take a word without blanks, colons or slashes")
    if not folder.is_dir():
        raise UsageError("This is not a folder.", file=folder, hint="name a folder that exists")
    roots = load_roots() | {name: folder.resolve()}
    path = roots_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps({n: str(f) for n, f in roots.items()}, indent=2) + "\n", encoding="utf-8")
        fresh.replace(path)
    except OSError as error:
        raise NotWritable(f"The list of roots cannot be written: {error.strerror}.", file=path) from error
    return roots


def _under_root(text: str, roots: Mapping[str, Path]) -> Path | None:
    name, colon, rest = text.partition(":")
    return roots[name] / rest.lstrip("/\\") if colon and name in roots else None


def input_path(text: str, folder: Path, roots: Mapping[str, Path]) -> Path:
    """Where a recipe's model lies: under a named root, beside the recipe, or under any root.

    A file that is nowhere gives the path beside the recipe: opening it will say what is missing.
    """
    named = _under_root(text, roots)
    if named is not None:
        return named
    beside = folder / Path(text).expanduser()
    if os.path.lexists(beside):
        return beside
    return next((root / text for root in roots.values() if (root / text).is_file()), beside)


def output_path(text: str, folder: Path, output_root: Path | None, roots: Mapping[str, Path]) -> Path:
    """Where an output goes: below the recipe's folder, `--output-root` or a registered root only.

    Links are followed before it is judged, so that a recipe from elsewhere cannot write anywhere.
    Raises RecipeError for every other place; the caller adds the line.
    """
    named = _under_root(text, roots)
    path = named if named is not None else (output_root or folder) / text
    allowed = [folder, *([output_root] if output_root else []), *roots.values()]
    real = Path(os.path.realpath(path))
    if not any(real.is_relative_to(os.path.realpath(place)) for place in allowed):
        prefix = text.partition(":")[0]
        hint = "keep it below the recipe's folder, give --output-root DIR, or register the folder: roots add NAME DIR"
        if ":" in text and len(prefix) > 1:
            hint = did_you_mean(prefix, roots) or hint
        raise RecipeError(f'The output "{shown(text)}" lies outside the allowed folders.', hint=hint)
    return path
