"""The lock beside a recipe: what a run used and what it made, so that the next can refuse to differ.

Owns the file `r.lock` of `r.toml`: JSON, sorted, one entry a line, made to lie in git. Must not
know how a run is done.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_sd.errors import PinMismatch

LOCK_VERSION = 1


@dataclass(frozen=True)
class LockedInput:
    """An input as a run used it: `content` is of the tensors that were read, `file` of all, where it is known."""

    size: int
    content: str
    sha256: str | None = None
    file: str | None = None

    def as_json(self) -> dict[str, object]:
        """The entry in the lock."""
        known = {"sha256": self.sha256, "file": self.file}
        return {"size": self.size, "content": self.content, **{name: value for name, value in known.items() if value}}


@dataclass(frozen=True)
class LockedOutput:
    """An output as a run made it."""

    size: int
    content: str


@dataclass(frozen=True)
class Lock:
    """A lock: `recipe` is the fingerprint of all that changes the result."""

    version: str
    recipe: str
    inputs: Mapping[str, LockedInput]
    outputs: Mapping[str, LockedOutput]


def lock_path(recipe: Path) -> Path:
    """`r.lock` for `r.toml`; a recipe that is itself called `r.lock` gets `r.lock.lock`."""
    return recipe.with_suffix(".lock") if recipe.suffix != ".lock" else recipe.with_name(f"{recipe.name}.lock")


def fingerprint(data: Mapping[str, Any]) -> str:
    """A hash of a recipe's plain data, samples left out: they change no file."""
    import xxhash

    relevant = {key: value for key, value in data.items() if key != "samples"}
    text = json.dumps(relevant, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))


def write_lock(path: Path, lock: Lock) -> None:
    """Write a lock by rename. Raises OSError."""
    data = {
        "lock": LOCK_VERSION,
        "mergekit_sd": lock.version,
        "recipe": lock.recipe,
        "inputs": {name: each.as_json() for name, each in lock.inputs.items()},
        "outputs": {name: {"size": each.size, "content": each.content} for name, each in lock.outputs.items()},
    }
    fresh = _draft(path)
    try:
        fresh.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def sweep_draft(path: Path) -> None:
    """Take away what a run left that was killed while it wrote this lock."""
    with contextlib.suppress(OSError):  # where nothing can be removed, the run says so itself
        _draft(path).unlink(missing_ok=True)


def _draft(path: Path) -> Path:
    return path.with_name(f".{path.name}.new")


def read_lock(path: Path) -> Lock | None:
    """The lock, or None if there is none. Raises PinMismatch for one that cannot be understood."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["lock"] != LOCK_VERSION:
            raise ValueError(f"its version is {data['lock']!r}")
        return Lock(
            str(data["mergekit_sd"]),
            str(data["recipe"]),
            {name: _locked(entry) for name, entry in data["inputs"].items()},
            {n: LockedOutput(int(e["size"]), str(e["content"])) for n, e in data["outputs"].items()},
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PinMismatch(
            f"The lock cannot be read: {error}.", file=path, hint="delete it; the next run makes a new one"
        ) from error


def _locked(entry: Mapping[str, Any]) -> LockedInput:
    return LockedInput(int(entry["size"]), str(entry["content"]), entry.get("sha256"), entry.get("file"))
