"""What the user chose for good: theme and keys, in `tui.toml` beside the list of roots.

Owns the file. A file that cannot be read changes nothing, and says so.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import mergekit_sd as mk
from mergekit_sd.text import did_you_mean, shown
from mergekit_sd_tui.actions import ACTIONS, SCREENS, actions_of

THEME = "textual-dark"


@dataclass(frozen=True, slots=True)
class Settings:
    """The theme's name, keys by the ids of actions, and what was wrong with the file."""

    theme: str = THEME
    keys: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def settings_file() -> Path:
    """Where they are kept."""
    folder: Path = mk.roots_file().parent
    return folder / "tui.toml"


def load_settings() -> Settings:
    """What the file says; what it says wrongly is left out, with a note."""
    path = settings_file()
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Settings()
    except (OSError, ValueError) as error:
        return Settings(notes=(f"{shown(str(path))} cannot be read: {shown(str(error))}",))
    notes: list[str] = []
    theme, keys = data.get("theme", THEME), data.get("keys", {})
    if not isinstance(theme, str):
        notes.append("tui.toml: theme must be a text")
        theme = THEME
    if not isinstance(keys, dict):
        notes.append("tui.toml: [keys] must be a table of texts")
        keys = {}
    # A TOML key with a dot is a table: both ways of writing an id are good.
    flat = {f"{a}.{b}": key for a, table in keys.items() if isinstance(table, dict) for b, key in table.items()}
    flat |= {name: key for name, key in keys.items() if not isinstance(key, dict)}
    return Settings(theme, _checked(flat, notes), tuple(notes))


def _checked(keys: Mapping[str, object], notes: list[str]) -> dict[str, str]:
    known = {action.id for action in ACTIONS}
    for name, key in keys.items():
        if name not in known:
            notes.append(f'tui.toml: no action "{shown(name)}"; {did_you_mean(name, known)}')
        elif not isinstance(key, str) or not key:
            notes.append(f"tui.toml: the key of {name} must be a text")
    good = {name: key for name, key in keys.items() if name in known and isinstance(key, str) and key}
    notes += _clashes(good)
    return good


def _clashes(keys: Mapping[str, str]) -> list[str]:
    """What has a key that another action of the same screen has, too."""
    found: dict[str, None] = {}
    for place in SCREENS:
        owners: dict[str, str] = {}
        for action in actions_of(place):
            for key in keys.get(action.id, action.keys).replace(" ", "").split(","):
                if owners.setdefault(key, action.id) != action.id:
                    found[f"tui.toml: {shown(key)} is the key of {owners[key]} and of {action.id}"] = None
    return list(found)


def save_theme(theme: str) -> None:
    """Keep the theme; the rest of the file stays as it is. Raises OSError or ValueError where that cannot be."""
    import tomlkit

    path = settings_file()
    document = tomlkit.parse(path.read_text(encoding="utf-8")) if path.exists() else tomlkit.document()
    document["theme"] = theme
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.write_text(tomlkit.dumps(document), encoding="utf-8")
    fresh.replace(path)
