"""The index's file: made, old, new, damaged, held by another, on a disk that refuses."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import models
import pytest
import torch

import mergekit_sd as mk
from mergekit_sd.errors import DiskFull, EnvironmentFault, NotWritable, TargetLocked
from mergekit_sd.library import store

NOT_ROOT = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")


@pytest.fixture(autouse=True)
def data(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("data")
    monkeypatch.setenv("MERGEKIT_SD_DATA", str(folder))
    return folder


@pytest.fixture
def shelf(tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    models.write(folder / "a.safetensors", {"emb_params": torch.zeros(1, 8)})
    return folder


def paths():
    with mk.Library() as library:
        return [entry.path.name for entry in library.entries()]


def edited(*statements):
    """The index's file after some SQL of somebody else's."""
    connection = sqlite3.connect(mk.library_file())
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()


def test_it_lies_in_the_data_folder(data, monkeypatch, shelf):
    assert mk.library_file() == data / "library.db"
    mk.scan_library([shelf])
    assert mk.library_file().is_file()
    monkeypatch.setenv("MERGEKIT_SD_DATA", "")
    assert mk.library_file().is_absolute()
    assert mk.library_file().parent.name == "mergekit-sd"


def test_its_folder_is_made(data, monkeypatch, shelf):
    monkeypatch.setenv("MERGEKIT_SD_DATA", str(data / "not" / "yet"))
    assert mk.scan_library([shelf]).new == 1
    assert paths() == ["a.safetensors"]


def test_readers_do_not_wait_for_a_writer(shelf):
    mk.scan_library([shelf])
    with mk.Library() as one:
        assert one._connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        one._connection.execute("BEGIN IMMEDIATE")
        assert paths() == ["a.safetensors"]
        one._connection.execute("ROLLBACK")


def test_a_newer_schema_is_refused_and_kept(shelf):
    mk.scan_library([shelf])
    edited(f"PRAGMA user_version = {store.SCHEMA + 1}")
    with pytest.raises(EnvironmentFault, match="newer") as refusal:
        mk.scan_library([shelf])
    assert "update" in refusal.value.hint
    edited(f"PRAGMA user_version = {store.SCHEMA}")
    assert paths() == ["a.safetensors"]


def test_an_older_schema_is_emptied_and_scanned_again(shelf):
    mk.scan_library([shelf])
    edited("PRAGMA user_version = 0", "DROP TABLE hashes", "ALTER TABLE files RENAME TO old", "CREATE TABLE hashes (x)")
    assert paths() == []
    assert mk.scan_library([shelf]).new == 1
    assert paths() == ["a.safetensors"]


@pytest.mark.parametrize("application", [0, 1234])
def test_another_programs_file_is_refused_and_kept(shelf, application):
    edited("CREATE TABLE albums (name)", "INSERT INTO albums VALUES ('x')", f"PRAGMA application_id = {application}")
    with pytest.raises(EnvironmentFault, match="another program's"):
        mk.scan_library([shelf])
    connection = sqlite3.connect(mk.library_file())
    assert connection.execute("SELECT name FROM albums").fetchall() == [("x",)]
    connection.close()


def test_what_is_no_database_is_put_aside(shelf, data):
    for text in (b"not a database at all, but long enough" * 100, b"short"):
        mk.library_file().write_bytes(text)
        report = mk.scan_library([shelf])
        assert report.new == 1
        assert "damaged" in report.notes[0]
        assert (data / "library.db.damaged").read_bytes() == text
        assert paths() == ["a.safetensors"]
        assert mk.scan_library([shelf]).notes == []


def test_a_torn_database_is_put_aside(shelf):
    for number in range(300):
        models.write(shelf / f"{number}.safetensors", {"emb_params": torch.zeros(1, 8)})
    mk.scan_library([shelf])
    raw = bytearray(mk.library_file().read_bytes())
    raw[8192:40960] = os.urandom(32768)
    mk.library_file().write_bytes(raw)
    report = mk.scan_library([shelf])
    assert report.new == report.files == 301
    assert len(paths()) == 301


def test_damage_that_is_found_later_is_told(shelf):
    with mk.Library() as library:
        with pytest.raises(EnvironmentFault, match="damaged") as refusal, store.told(library.path):
            raise _refusal(sqlite3.SQLITE_CORRUPT)
        assert "delete" in refusal.value.hint


def _refusal(code):
    error = sqlite3.DatabaseError("in SQLite's words")
    error.sqlite_errorcode = code
    return error


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (sqlite3.SQLITE_BUSY, TargetLocked),
        (sqlite3.SQLITE_FULL, DiskFull),
        (sqlite3.SQLITE_CANTOPEN, NotWritable),
        (sqlite3.SQLITE_READONLY | 8 << 8, NotWritable),
        (sqlite3.SQLITE_IOERR | 4 << 8, NotWritable),
    ],
)
def test_refusals_of_the_system_have_a_type_and_a_way_out(code, kind, data):
    with pytest.raises(kind) as refusal, store.told(data / "library.db"):
        raise _refusal(code)
    assert refusal.value.exit_code == 4
    assert refusal.value.hint


def test_a_wrong_call_is_our_bug():
    with pytest.raises(sqlite3.ProgrammingError), store.told(Path("x")):
        raise sqlite3.ProgrammingError("Cannot operate on a closed database.")


def test_a_library_that_is_held_for_long_is_told(shelf, monkeypatch):
    mk.scan_library([shelf])
    monkeypatch.setattr(store, "PATIENCE", 0.1)
    models.write(shelf / "b.safetensors", {"emb_params": torch.zeros(1, 8)})
    with mk.Library() as other:
        other._connection.execute("BEGIN IMMEDIATE")
        with pytest.raises(TargetLocked, match="held"):
            mk.scan_library([shelf])
        other._connection.execute("ROLLBACK")
    assert mk.scan_library([shelf]).new == 1


def test_a_data_folder_that_cannot_be_is_told(data, monkeypatch, shelf):
    (data / "file").touch()
    monkeypatch.setenv("MERGEKIT_SD_DATA", str(data / "file"))
    with pytest.raises(NotWritable):
        mk.scan_library([shelf])
    mk.library_file().parent.unlink()
    mk.library_file().mkdir(parents=True)
    with pytest.raises(NotWritable):
        mk.scan_library([shelf])


@NOT_ROOT
def test_a_data_folder_without_permission_is_told(data, shelf):
    data.chmod(0o500)
    try:
        with pytest.raises(NotWritable):
            mk.scan_library([shelf])
    finally:
        data.chmod(0o700)


OPEN = "import mergekit_sd as mk; mk.Library().close()"


def test_many_may_begin_it_at_once():
    running = [subprocess.Popen([sys.executable, "-c", OPEN], stderr=subprocess.PIPE) for _ in range(6)]
    assert [process.communicate()[1] for process in running] == [b""] * 6
    assert [process.returncode for process in running] == [0] * 6


def test_looking_something_up_makes_no_library(data, tmp_path):
    assert mk.find_by_hash("0" * 64) == []
    assert mk.find_by_name("x") == []
    path = models.write(tmp_path / "a.safetensors", {"emb_params": torch.zeros(1, 8)})
    assert mk.look_up(path).kind == "embedding"
    mk.rename_model(path, "b")
    assert list(data.iterdir()) == []
