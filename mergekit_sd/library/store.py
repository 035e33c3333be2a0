"""The index's file: where it lies, its schema, and what becomes of one that is old, damaged or held.

Owns the connection and the words for SQLite's refusals. Must not know what a row means.

The index holds only what a scan finds again, so one of an older schema is emptied, and one that is
damaged is put aside and begun anew.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

from mergekit_sd.errors import DiskFull, EnvironmentFault, NotWritable, TargetLocked

DATA_VARIABLE = "MERGEKIT_SD_DATA"
SCHEMA = 2
APPLICATION = 0x6D6B7364  # "mksd": tells our file from another program's library.db
PATIENCE = 30.0  # seconds to wait for another process's transaction

# Paths are the system's bytes: not every name is Unicode. `node` is device:inode, empty where the system has no
# such numbers; `version` is of the program that read the header, `facts` the rest of what it says, as JSON.
_TABLES = (
    """CREATE TABLE files (
        path BLOB PRIMARY KEY,
        node TEXT NOT NULL,
        size INTEGER NOT NULL,
        mtime_ns INTEGER NOT NULL,
        version TEXT NOT NULL,
        format TEXT,
        kind TEXT NOT NULL,
        architecture TEXT,
        facts TEXT NOT NULL
    ) WITHOUT ROWID""",
    "CREATE INDEX files_by_node ON files (node)",
    """CREATE TABLE hashes (
        path BLOB NOT NULL REFERENCES files (path) ON DELETE CASCADE ON UPDATE CASCADE,
        kind TEXT NOT NULL,
        value TEXT NOT NULL,
        PRIMARY KEY (path, kind)
    ) WITHOUT ROWID""",
    "CREATE INDEX hashes_by_value ON hashes (value)",
    # `method` is the way in which a signature was made: those of another cannot be compared.
    """CREATE TABLE signatures (
        path BLOB PRIMARY KEY REFERENCES files (path) ON DELETE CASCADE ON UPDATE CASCADE,
        method INTEGER NOT NULL,
        data BLOB NOT NULL
    )""",
    "CREATE TABLE folders (path BLOB PRIMARY KEY) WITHOUT ROWID",
)
_BUSY_TRIES, _BUSY_PAUSE = 100, 0.05
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class _DamagedError(Exception):
    """The file is no SQLite database, or a torn one."""


def data_folder() -> Path:
    """The user's data folder; `MERGEKIT_SD_DATA` names another."""
    named = os.environ.get(DATA_VARIABLE)
    if named:
        return Path(named)
    import platformdirs

    return Path(platformdirs.user_data_dir("mergekit-sd", appauthor=False))


def library_file() -> Path:
    """Where the index is kept."""
    return data_folder() / "library.db"


def connect(path: Path) -> tuple[sqlite3.Connection, bool]:
    """The index's file, opened; and whether a damaged one was put aside for it."""
    try:
        return _connect(path), False
    except _DamagedError:
        with _told(path):
            path.replace(path.with_name(f"{path.name}.damaged"))
            for side in ("-wal", "-shm"):
                path.with_name(path.name + side).unlink(missing_ok=True)
    try:
        return _connect(path), True
    except _DamagedError as error:
        raise EnvironmentFault(
            "The library's file is damaged again at once.", file=path, hint="check the disk"
        ) from error


@contextlib.contextmanager
def told(path: Path) -> Iterator[None]:
    """SQLite's refusals in our words."""
    try:
        with _told(path):
            yield
    except _DamagedError as error:
        hint = "delete it, then scan again: it holds nothing else"
        raise EnvironmentFault("The library's file is damaged.", file=path, hint=hint) from error


def _connect(path: Path) -> sqlite3.Connection:
    with _told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(path, timeout=PATIENCE, isolation_level=None)
        try:
            _use_wal(connection)
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute("PRAGMA foreign_keys = ON")
            if connection.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
                raise _DamagedError
            _prepare(connection, path)
        except BaseException:
            connection.close()
            raise
    return connection


def _use_wal(connection: sqlite3.Connection) -> None:
    """Readers then never wait for a writer. SQLite itself does not wait here for one who does the same."""
    for _ in range(_BUSY_TRIES):
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                raise
            time.sleep(_BUSY_PAUSE)
        else:
            return


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    """Make the tables, unless they are there as we know them."""
    if _marks(connection) == (APPLICATION, SCHEMA):
        return
    connection.execute("BEGIN IMMEDIATE")  # from here on no other process makes them
    try:
        application, version = _marks(connection)
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        if application != APPLICATION and (application or tables):
            raise EnvironmentFault("This file is another program's.", file=path, hint=f"set {DATA_VARIABLE}")
        if version > SCHEMA:
            hint = "update mergekit-sd, or delete the file and scan again: it holds nothing else"
            raise EnvironmentFault("The library was made by a newer mergekit-sd.", file=path, hint=hint)
        if version != SCHEMA:
            for name in reversed(tables):
                connection.execute(f'DROP TABLE "{name}"')
            for statement in _TABLES:
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION}")
            connection.execute(f"PRAGMA user_version = {SCHEMA}")
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise


def _marks(connection: sqlite3.Connection) -> tuple[int, int]:
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    return application, connection.execute("PRAGMA user_version").fetchone()[0]


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise NotWritable(f"The library cannot be kept here: {error.strerror}.", file=path) from error
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", None)
        if code is None:  # a wrong call, not SQLite's refusal
            raise
        raise _fault(code & 0xFF, error, path) from error


def _fault(code: int, error: sqlite3.Error, path: Path) -> Exception:
    if code in _DAMAGE:
        return _DamagedError()
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        message = f"Another program has held the library for {PATIENCE:.0f} seconds."
        return TargetLocked(message, file=path, hint="let the other scan finish, then try again")
    if code == sqlite3.SQLITE_FULL:
        return DiskFull("The disk of the library is full.", file=path, hint=f"make room, or set {DATA_VARIABLE}")
    if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_IOERR):
        hint = f"check the folder's permissions and disk, or set {DATA_VARIABLE}"
        return NotWritable(f"The library cannot be kept here: {error}.", file=path, hint=hint)
    return error
