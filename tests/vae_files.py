"""Folders of small VAE files for the tests of `vae list` and `vae dedupe`."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import models
import pytest

import mergekit_sd as mk

OLD = 1_600_000_000_000_000_000  # ns
POSIX = pytest.mark.skipif(os.name == "nt", reason="needs POSIX")


class Shelf:
    """A folder with copies of VAEs; the same `seed` is the same file, each copy with a time of its own."""

    def __init__(self, folder: Path, made: Path) -> None:
        self.folder = folder
        self._made = made
        self._count = 0

    def put(self, name: str, seed: int = 0, mode: int = 0o644) -> Path:
        """One more copy."""
        original = self._made / f"{seed}.safetensors"
        if not original.exists():
            models.write(original, models.vae_file(seed))
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(original, path)
        path.chmod(mode)
        self._count += 1
        os.utime(path, ns=(OLD, OLD + self._count * 1_000_000_000))
        return path

    def state(self) -> dict[str, tuple[str, int, int]]:
        """Every file's bytes, permissions and time, followed through links."""
        found = {}
        for path in sorted(self.folder.rglob("*")):
            if path.is_file():
                status = path.stat()
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                found[path.relative_to(self.folder).as_posix()] = digest, status.st_mode, status.st_mtime_ns
        return found

    def left(self) -> list[str]:
        """Temporary files."""
        return [path.name for path in self.folder.rglob(".*")]


def make_shelf(tmp_path: Path, factory: pytest.TempPathFactory) -> Shelf:
    """An empty one for a test; the originals are made once in a session."""
    made = factory.getbasetemp() / "vaes"
    made.mkdir(exist_ok=True)
    folder = tmp_path / "models"
    folder.mkdir()
    return Shelf(folder.resolve(), made)


def inode(path: Path) -> int:
    return path.lstat().st_ino


def dedupe(shelf: Shelf, link: str = "hard", **options: Any) -> mk.DedupeReport:
    """Really."""
    return mk.dedupe_vaes([shelf.folder], link=link, apply=True, **options)


def only(report: mk.DedupeReport) -> mk.DedupeGroup:
    """The one group of a report."""
    (group,) = report.groups
    return group


def reasons(report: mk.DedupeReport) -> dict[str, str]:
    """Why files were left, by name."""
    return {each.path.name: each.reason for group in report.groups for each in group.skipped}
