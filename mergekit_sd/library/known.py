"""The hashes of whole files, made once: the index keeps them while the file stays as it is.

Owns what happens without an index: everything works, only slower.
"""

from __future__ import annotations

from pathlib import Path

from mergekit_sd.errors import EnvironmentFault
from mergekit_sd.formats.hashing import FileHashes, OnBytes, file_hashes
from mergekit_sd.library.entry import read_entry, whole_path
from mergekit_sd.library.index import Library


def known_file_hashes(path: Path, on_bytes: OnBytes | None = None) -> FileHashes:
    """sha256, AutoV1 and AutoV3 of a file, from the index or by reading it. Raises as `file_hashes` does.

    Of AutoV3's sha256 the index knows only the digits that are shown.
    """
    path = whole_path(path)
    known = _looked_up(path)
    if known is not None:
        return known
    found = file_hashes(path, on_bytes)
    _keep(path, found)
    return found


def _looked_up(path: Path) -> FileHashes | None:
    try:
        with Library() as library:
            entry = library.entry(path)
    except EnvironmentFault:
        return None
    if entry is None or "sha256" not in entry.hashes or not entry.is_current():
        return None
    return FileHashes(entry.hashes["sha256"], entry.hashes.get("autov3"), entry.hashes["autov1"])


def _keep(path: Path, found: FileHashes) -> None:
    try:
        with Library() as library:
            entry = library.entry(path)
            if entry is None or not entry.is_current():
                entry, _ = read_entry(path)
                library.keep([entry])
            library.add_hashes([entry], hashes_by_kind(found))
    except EnvironmentFault:  # an index is no condition for a merge
        return


def hashes_by_kind(found: FileHashes) -> dict[str, str]:
    """File hashes as the index has them."""
    hashes = {"sha256": found.sha256, "autov1": found.auto_v1, "autov3": found.auto_v3}
    return {kind: value for kind, value in hashes.items() if value}
