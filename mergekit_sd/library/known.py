"""The hashes of whole files, made once: the index keeps them while the file stays as it is.

Owns what happens without an index: everything works, only slower.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from mergekit_sd.errors import EnvironmentFault
from mergekit_sd.formats.hashing import FileHashes, OnBytes, file_hashes
from mergekit_sd.inspection.identity import Identity, identify
from mergekit_sd.library.entry import LibraryEntry, read_entry, whole_path
from mergekit_sd.library.index import Library


def known_file_hashes(path: Path, on_bytes: OnBytes | None = None) -> FileHashes:
    """sha256, AutoV1 and AutoV3 of a file, from the index or by reading it. Raises as `file_hashes` does.

    Of AutoV3's sha256 the index knows only the digits that are shown.
    """
    path = whole_path(path)
    entry = _entry(path)
    known = _file_hashes(entry.hashes) if entry else None
    if known is not None:
        return known
    found = file_hashes(path, on_bytes)
    _keep(path, hashes_by_kind(found))
    return found


def known_identity(path: str | os.PathLike[str], on_bytes: OnBytes | None = None) -> Identity:
    """All hashes of a file, made once: as `inspection.identify`, with the index before and after."""
    where = whole_path(Path(path))
    entry = _entry(where)
    hashes = entry.hashes if entry else {}
    found = identify(path, on_bytes, file=_file_hashes(hashes), content=hashes.get("content"))
    made = hashes_by_kind(found.file) | ({"content": found.content} if found.content else {})
    if made.keys() - hashes.keys():
        _keep(where, made)
    return found


def _file_hashes(hashes: Mapping[str, str]) -> FileHashes | None:
    if "sha256" not in hashes or "autov1" not in hashes:
        return None
    return FileHashes(hashes["sha256"], hashes.get("autov3"), hashes["autov1"])


def _entry(path: Path) -> LibraryEntry | None:
    """What the index has of a file that is still as it was."""
    try:
        with Library() as library:
            entry = library.entry(path)
    except EnvironmentFault:
        return None
    return entry if entry is not None and entry.is_current() else None


def _keep(path: Path, hashes: Mapping[str, str]) -> None:
    try:
        with Library() as library:
            entry = library.entry(path)
            if entry is None or not entry.is_current():
                entry, _ = read_entry(path)
                library.keep([entry])
            library.add_hashes([entry], hashes)
    except EnvironmentFault:  # an index is no condition for a merge
        return


def hashes_by_kind(found: FileHashes) -> dict[str, str]:
    """File hashes as the index has them."""
    hashes = {"sha256": found.sha256, "autov1": found.auto_v1, "autov3": found.auto_v3}
    return {kind: value for kind, value in hashes.items() if value}
