"""What a training says: a line for each event, to the terminal and to log.jsonl."""

from __future__ import annotations

import json
from pathlib import Path

_FILES: list[Path] = []


def log_to(folder: Path) -> None:
    """Every later `say` is written to `folder/log.jsonl` as well."""
    _FILES[:] = [folder / "log.jsonl"]


def say(stage: str, **values: object) -> None:
    """Tell what a stage reached."""
    rounded = {key: round(value, 5) if isinstance(value, float) else value for key, value in values.items()}
    line = json.dumps({"stage": stage, **rounded})
    print(line, flush=True)
    for path in _FILES:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
