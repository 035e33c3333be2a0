"""The index: the user's model files, what their headers say, and their hashes.

Owns the rows: how an entry becomes one and comes back. Must not read model files.

A row is good while size, time, inode and device of the file are the same, and a header also only for
the version that read it. Rows are written in short transactions, so that several scans may go on at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_sd.formats.tensor import FileState
from mergekit_sd.library.entry import WEIGHTS, LibraryEntry
from mergekit_sd.library.store import connect, library_file, told
from mergekit_sd.version import VERSION

_COLUMNS = "path, node, size, mtime_ns, version, format, kind, architecture, facts"
_FACTS = ("dtypes", "components", "ema", "junk", "position_ids", "title", "trained_as", "error", "parents")
_NAMES = _COLUMNS.split(", ")
_UPSERT = (
    f"INSERT INTO files ({_COLUMNS}) VALUES ({', '.join('?' * len(_NAMES))}) ON CONFLICT (path) DO UPDATE SET "
    + ", ".join(f"{name} = excluded.{name}" for name in _NAMES[1:])
)
_IS_ROW = "path = ? AND node = ? AND size = ? AND mtime_ns = ?"


class Library:
    """The opened index, for one thread. `renewed`: a damaged file was put aside for this one."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or library_file()
        self._connection, self.renewed = connect(self.path)

    def __enter__(self) -> Library:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    # --- reading ---

    def entries(self, folders: Collection[Path] = ()) -> list[LibraryEntry]:
        """Every entry, or those below some folders, by their paths."""
        if not folders:
            return self._entries("", ())
        ranges = [_range(folder) for folder in folders]
        below = " OR ".join(["path >= ? AND path < ?"] * len(ranges))
        return self._entries(f"WHERE {below}", [end for both in ranges for end in both])

    def entry(self, path: Path) -> LibraryEntry | None:
        """The entry of a path as the index has it, whether or not the file has changed since."""
        return next(iter(self._entries("WHERE path = ?", (os.fsencode(path),))), None)

    def same_file(self, state: FileState) -> LibraryEntry | None:
        """An entry of this very file under whatever path: a hard link's, or where it was before it moved."""
        node = _node(state)
        if not node:
            return None
        condition = "WHERE node = ? AND size = ? AND mtime_ns = ? AND version = ?"
        found = self._entries(condition, (node, state.size, state.mtime_ns, VERSION))
        return max(found, key=lambda entry: len(entry.hashes), default=None)

    def with_hash(self, value: str, kinds: Collection[str]) -> list[LibraryEntry]:
        """The entries of which a hash of these kinds begins with `value`."""
        marks = ", ".join("?" * len(kinds))
        condition = f"WHERE path IN (SELECT path FROM hashes WHERE value >= ? AND value < ? AND kind IN ({marks}))"
        return self._entries(condition, (value, value + "g", *kinds))  # "g" follows every hex digit

    def signature(self, entry: LibraryEntry, method: int) -> bytes | None:
        """The signature of a file as it is in the entry, or of a hard link to it, made by that method."""
        condition = f"({_IS_ROW}) OR (node = ? AND node <> '' AND size = ? AND mtime_ns = ?)"
        sql = f"SELECT data FROM signatures JOIN files USING (path) WHERE method = ? AND ({condition}) LIMIT 1"
        state = _state(entry.state)
        found = self._read(sql, (method, os.fsencode(entry.path), *state, *state))
        return found[0][0] if found else None

    def outdated(self) -> set[Path]:
        """Files whose header another version of the program read."""
        return {_path(path) for (path,) in self._read("SELECT path FROM files WHERE version <> ?", (VERSION,))}

    def folders(self) -> list[Path]:
        """The folders that were scanned by name."""
        return [_path(path) for (path,) in self._read("SELECT path FROM folders ORDER BY path", ())]

    # --- writing ---

    def keep(self, entries: Iterable[LibraryEntry]) -> None:
        """Add entries, or put them in the place of others of the same path; old hashes stay with an unchanged file."""
        with self._writing() as connection:
            for entry in entries:
                path, state = os.fsencode(entry.path), _state(entry.state)
                _forget_old(connection, path, state)
                facts = json.dumps({name: value for name in _FACTS if (value := getattr(entry, name))})
                row = (path, *state, VERSION, entry.format, entry.kind, entry.architecture, facts)
                connection.execute(_UPSERT, row)
                _insert_hashes(connection, path, entry.hashes)

    def add_hashes(self, entries: Iterable[LibraryEntry], hashes: Mapping[str, str]) -> None:
        """Add hashes to files that are one; those whose row is of another state by now are left."""
        with self._writing() as connection:
            for entry in entries:
                row = (os.fsencode(entry.path), *_state(entry.state))
                if connection.execute(f"SELECT 1 FROM files WHERE {_IS_ROW}", row).fetchone():
                    _insert_hashes(connection, row[0], hashes)

    def add_signature(self, entry: LibraryEntry, method: int, data: bytes) -> None:
        """Add a file's signature, unless its row is of another state by now."""
        with self._writing() as connection:
            row = (os.fsencode(entry.path), *_state(entry.state))
            if connection.execute(f"SELECT 1 FROM files WHERE {_IS_ROW}", row).fetchone():
                connection.execute("INSERT OR REPLACE INTO signatures VALUES (?, ?, ?)", (row[0], method, data))

    def drop(self, paths: Iterable[Path]) -> None:
        """Forget files."""
        with self._writing() as connection:
            connection.executemany("DELETE FROM files WHERE path = ?", [(os.fsencode(path),) for path in paths])

    def move(self, old: Path, new: Path) -> None:
        """Follow a file to its new path, with its hashes."""
        with self._writing() as connection:
            connection.execute("DELETE FROM files WHERE path = ?", (os.fsencode(new),))
            connection.execute("UPDATE files SET path = ? WHERE path = ?", (os.fsencode(new), os.fsencode(old)))

    def note_folders(self, folders: Iterable[Path]) -> None:
        """Remember folders that were scanned by name."""
        with self._writing() as connection:
            rows = [(os.fsencode(folder),) for folder in folders]
            connection.executemany("INSERT OR IGNORE INTO folders VALUES (?)", rows)

    # --- SQL ---

    def _read(self, sql: str, values: Sequence[Any]) -> list[Any]:
        with told(self.path):
            return self._connection.execute(sql, values).fetchall()

    def _entries(self, condition: str, values: Sequence[Any]) -> list[LibraryEntry]:
        rows = self._read(f"SELECT {_COLUMNS} FROM files {condition} ORDER BY path", values)
        hashes: dict[bytes, dict[str, str]] = {}
        chosen = f"WHERE path IN (SELECT path FROM files {condition})" if condition else ""
        for path, kind, value in self._read(f"SELECT path, kind, value FROM hashes {chosen}", values):
            hashes.setdefault(path, {})[kind] = value
        return [_entry(row, hashes.get(row[0], {})) for row in rows]

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with told(self.path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise


# --- values and rows ---------------------------------------------------------------------------------


def _forget_old(connection: sqlite3.Connection, path: bytes, state: tuple[str, int, int]) -> None:
    """All that were made of another state of the file; the components' too where another version told them apart."""
    same = f"EXISTS (SELECT 1 FROM files WHERE {_IS_ROW})"
    for table in ("hashes", "signatures"):
        connection.execute(f"DELETE FROM {table} WHERE path = ? AND NOT {same}", (path, path, *state))
    read_by_us = "EXISTS (SELECT 1 FROM files WHERE path = ? AND version = ?)"
    components = f"DELETE FROM hashes WHERE path = ? AND kind LIKE '{WEIGHTS}%' AND NOT {read_by_us}"
    connection.execute(components, (path, path, VERSION))


def _insert_hashes(connection: sqlite3.Connection, path: bytes, hashes: Mapping[str, str]) -> None:
    rows = [(path, kind, value) for kind, value in hashes.items()]
    connection.executemany("INSERT OR REPLACE INTO hashes VALUES (?, ?, ?)", rows)


def _path(raw: bytes) -> Path:
    return Path(os.fsdecode(raw))


def _range(folder: Path) -> tuple[bytes, bytes]:
    """The first path that can lie below a folder, and the first that no longer can."""
    separator = os.fsencode(os.sep)
    start = os.fsencode(folder).rstrip(separator) + separator
    return start, start[:-1] + bytes([start[-1] + 1])


def _node(state: FileState) -> str:
    return f"{state.device}:{state.inode}" if state.inode else ""


def _state(state: FileState) -> tuple[str, int, int]:
    return _node(state), state.size, state.mtime_ns


def _entry(row: Sequence[Any], hashes: Mapping[str, str]) -> LibraryEntry:
    path, node, size, mtime_ns, _, format, kind, architecture, facts = row
    device, inode = map(int, node.split(":")) if node else (0, 0)
    state = FileState(device, inode, size, mtime_ns)
    return LibraryEntry(_path(path), state, format, kind, architecture, **json.loads(facts), hashes=hashes)
