"""What the engine's JSON says, in words: events for a log, errors, the files of a report.

Must not know processes or widgets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mergekit_sd.errors import MergekitError
from mergekit_sd.text import shown, size

Data = Mapping[str, Any]


def _memory(event: Data) -> str:
    free = f"; {size(event['free'])} are free" if event["free"] is not None else ""
    return f"pictures will take about {size(event['bytes'])} of memory{free}"


def _error(event: Data) -> str:
    hint = f" ({event['hint']})" if event.get("hint") else ""
    return f"error: {event['message']}{hint}"


_WORDS: dict[str, Callable[[Data], str]] = {
    "warning": lambda event: f"warning: {event['message']}",
    "output_started": lambda event: f"writing {event['path']}, {size(event['bytes'])}",
    "output_finished": lambda event: f"wrote {event['path']}, {size(event['bytes'])} in {event['seconds']:.1f} s",
    "memory": _memory,
    "error": _error,
}


def told(event: Data) -> str | None:
    """A line for the log, escaped; None for what is only progress."""
    words = _WORDS.get(event["event"])
    return shown(words(event)) if words else None


def error_of(data: Data) -> MergekitError:
    """The error that a report or an event tells."""
    place = {name: data.get(name) for name in ("file", "key", "line", "column", "hint")}
    return MergekitError(str(data.get("message", "")), details=data.get("details", ()), **place)


def paths_of(report: Data) -> tuple[Path, ...]:
    """The files that a report names as made."""
    outputs = report.get("outputs", ())
    found = [each.get("path") for each in outputs if isinstance(each, Mapping)] or [report.get("path")]
    return tuple(Path(path).absolute() for path in found if path)
