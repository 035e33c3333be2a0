"""Finding a model that is not where it was, by its hash or by the name that another tool gives it.

Owns what a hash or a name may mean. Only files that are as they were scanned are found.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from mergekit_sd.formats.open import MODEL_SUFFIXES
from mergekit_sd.library.entry import LibraryEntry
from mergekit_sd.library.index import Library
from mergekit_sd.library.known import known_file_hashes
from mergekit_sd.library.store import library_file
from mergekit_sd.planning.paths import Findings, Sought

_HEX = re.compile(r"[0-9a-f]{8,64}")
_NAMED = re.compile(r"(?P<name>.*?)\s*(?:\[(?P<hash>[0-9A-Fa-f]{8,64})\])?", re.DOTALL)

# Digits of a hash, and the kinds that have so many (or of which tools show so many).
_KINDS = {
    8: ("autov1", "sha256"),
    10: ("sha256",),
    12: ("sha256", "autov3"),
    32: ("content",),
    64: ("sha256",),
}


def find_by_hash(value: str) -> list[LibraryEntry]:
    """The files of that hash: sha256 (also its first 8, 10 or 12 digits), content, AutoV1, AutoV3; in any case.

    Nothing is found by a hash that no scan has made: sha256, AutoV1 and AutoV3 are made only where asked for.
    """
    value = value.strip().lower()
    if len(value) not in _KINDS or not _HEX.fullmatch(value) or not library_file().exists():
        return []
    with Library() as library:
        found = library.with_hash(value, _KINDS[len(value)])
    return [entry for entry in found if entry.is_current()]


def find_by_name(name: str) -> list[LibraryEntry]:
    """The files that "name [543bcbc212]" means, as the WebUI writes it; name alone will do, too.

    Those of that hash come first, whatever their names; then those of the name, unless a hash is given that
    theirs is known to differ from. A folder before the name and a model's suffix need not be there.
    """
    parsed = _NAMED.fullmatch(name.strip())
    if parsed is None or not library_file().exists():
        return []
    digits = (parsed["hash"] or "").lower()
    found = find_by_hash(digits) if digits else []
    with Library() as library:
        named = [entry for entry in library.entries() if _is_called(entry, parsed["name"])]
    return found + [entry for entry in named if not _contradicts(entry, digits) and entry.is_current()]


def find_input(sought: Sought) -> Findings:
    """Where else a recipe's model lies, for `PlanOptions.find`.

    It is certainly a file of its pinned sha256, of its content hash in the lock, or of the hash that the
    WebUI writes after its name; the sha256 of a file with that name is made where it is not known yet.
    """
    for value in (sought.sha256, sought.content):
        same = find_by_hash(value) if value else []
        if same:
            return Findings(same=tuple(entry.path for entry in same))
    named = find_by_name(sought.file)
    digits = (parsed["hash"] or "").lower() if (parsed := _NAMED.fullmatch(sought.file.strip())) else ""
    if digits and not sought.sha256:
        same = [entry for entry in named if _has(entry, digits)]
        return Findings(tuple(entry.path for entry in same), tuple(e.path for e in named if e not in same))
    return Findings(named=tuple(entry.path for entry in named))


def _has(entry: LibraryEntry, digits: str) -> bool:
    """Whether a file is known by these digits, as AutoV1, AutoV2 or AutoV3."""
    hashes = known_file_hashes(entry.path)
    return digits in (hashes.auto_v1, hashes.auto_v3) or hashes.sha256.startswith(digits)


def _is_called(entry: LibraryEntry, name: str) -> bool:
    wanted = [part.casefold() for part in PurePosixPath(name.replace("\\", "/")).parts]
    if not wanted:
        return False
    parts = [part.casefold() for part in entry.path.parts]
    return _stem(parts[-1]) == _stem(wanted[-1]) and parts[max(len(parts) - len(wanted), 0) : -1] == wanted[:-1]


def _stem(name: str) -> str:
    """A name without a model's suffix: "v1.5" has none."""
    suffix = Path(name).suffix
    return name[: -len(suffix)] if suffix in MODEL_SUFFIXES else name


def _contradicts(entry: LibraryEntry, digits: str) -> bool:
    """Whether the file's hash of that kind is known: then it differs, or the file was found by it."""
    return any(kind in entry.hashes for kind in _KINDS.get(len(digits), ()))
