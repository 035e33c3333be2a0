"""Recipes whose models have moved: the library finds them by their hashes, and says what it cannot find."""

from __future__ import annotations

import hashlib
import sqlite3

import models
import pytest

import mergekit_sd as mk
from mergekit_sd.errors import MissingInput, PinMismatch
from mergekit_sd.library import known
from mergekit_sd.library.store import library_file


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def away(room):
    """A folder that no recipe names, with one of the models; it has moved."""
    folder = room / "elsewhere"
    folder.mkdir()
    (room / "sd1-b.safetensors").rename(folder / "renamed.safetensors")
    return folder


def mixing(room, b="sd1-b.safetensors", **more):
    entry = {"file": b, **more} if more else b
    steps = {"m": {"op": "weighted_sum", "a": "a", "b": "b", "alpha": 0.3}}
    return models.recipe(room, {"a": "sd1-a.safetensors", "b": entry}, steps)


def test_a_pinned_model_is_found_by_its_sha256(room, away):
    where = mixing(room, sha256=sha256(away / "renamed.safetensors"))
    with pytest.raises(MissingInput):
        mk.plan(where)
    mk.scan_library([away], sha256=True)
    plan = mk.plan(where)
    assert plan.inputs[1].file.path == away / "renamed.safetensors"
    assert any('"b" is not where the recipe says' in text for text in plan.warnings)
    mk.run(where)
    assert (room / "out.safetensors").exists()


def test_a_model_that_a_lock_knows_is_found_by_its_content(room, away):
    (away / "renamed.safetensors").rename(room / "sd1-b.safetensors")
    where = mixing(room)
    mk.run(where)
    first = (room / "out.safetensors").read_bytes()
    (room / "sd1-b.safetensors").rename(away / "renamed.safetensors")
    mk.scan_library([away])
    mk.run(where, force=True)
    assert (room / "out.safetensors").read_bytes() == first


@pytest.mark.parametrize("digits", [8, 10, 12])
def test_names_as_the_webui_writes_them(room, away, digits):
    short = sha256(away / "renamed.safetensors")[:digits]
    where = mixing(room, f"renamed [{short}]")
    mk.scan_library([away])  # no sha256 yet: it is made when it is asked for
    assert mk.plan(where).inputs[1].file.path == away / "renamed.safetensors"


def test_a_name_with_another_hash_is_not_taken(room, away):
    mk.scan_library([away])
    with pytest.raises(MissingInput) as caught:
        mk.plan(mixing(room, "renamed [0123456789]"))
    assert "renamed.safetensors" in caught.value.details[0]


def test_a_name_alone_is_told_but_not_taken(room, away):
    mk.scan_library([away])
    with pytest.raises(MissingInput) as caught:
        mk.plan(mixing(room, "renamed.safetensors"))
    assert caught.value.key == "models.b"
    assert caught.value.details == (f"b: {room / 'renamed.safetensors'}; called so: {away / 'renamed.safetensors'}",)


def test_all_that_is_missing_is_listed(room):
    where = models.recipe(
        room,
        {"a": "x.safetensors", "b": "y.safetensors", "c": "sd1-c.safetensors"},
        {"m": {"op": "add_difference", "a": "a", "b": "b", "c": "c", "alpha": 0.3}},
    )
    with pytest.raises(MissingInput, match="and 1 other model") as caught:
        mk.plan(where)
    assert [each.partition(":")[0] for each in caught.value.details] == ["a", "b"]


def test_a_file_that_changed_since_the_scan_is_not_found(room, away):
    where = mixing(room, sha256=sha256(away / "renamed.safetensors"))
    mk.scan_library([away], sha256=True)
    models.write(away / "renamed.safetensors", models.read(room / "sd1-c.safetensors"))
    with pytest.raises(MissingInput):
        mk.plan(where)


def test_verify_finds_what_moved(room, away):
    (away / "renamed.safetensors").rename(room / "sd1-b.safetensors")
    mk.run(mixing(room))
    (room / "sd1-b.safetensors").rename(away / "sd1-b.safetensors")
    mk.scan_library([away])
    assert mk.verify(room / "out.safetensors").same
    models.write(away / "sd1-b.safetensors", models.read(room / "sd1-c.safetensors"))
    mk.scan_library([away])
    with pytest.raises(PinMismatch):
        mk.verify(room / "out.safetensors")


# --- file hashes are made once ---------------------------------------------------------------------------


def test_a_pin_is_hashed_once_while_the_file_stays(room, monkeypatch):
    asked = []
    hasher = known.file_hashes
    monkeypatch.setattr(known, "file_hashes", lambda path, on_bytes=None: asked.append(path) or hasher(path, on_bytes))
    where = mixing(room, sha256=sha256(room / "sd1-b.safetensors"))
    mk.run(where)
    mk.run(where, force=True)
    assert len(asked) == 1
    models.write(room / "sd1-b.safetensors", models.read(room / "sd1-c.safetensors"))
    with pytest.raises(PinMismatch):
        mk.run(where, force=True)
    assert len(asked) == 2


def test_the_index_keeps_what_it_knew_besides(room):
    path = room / "sd1-a.safetensors"
    mk.scan_library([room])
    before = mk.look_up(path).hashes
    assert known.known_file_hashes(path).sha256 == sha256(path)
    after = mk.look_up(path).hashes
    assert before.items() <= after.items()
    assert after["sha256"] == sha256(path)
    assert known.known_file_hashes(path) == known.known_file_hashes(path)


def test_without_a_place_for_the_index_it_is_only_slower(room, monkeypatch):
    blocked = room / "file"
    blocked.write_text("no folder")
    monkeypatch.setenv("MERGEKIT_SD_DATA", str(blocked))
    where = mixing(room, sha256=sha256(room / "sd1-b.safetensors"))
    mk.run(where)
    assert (room / "out.safetensors").exists()


def test_a_file_that_is_no_model_is_hashed_too(room):
    path = room / "notes.txt"
    path.write_text("no model")
    assert known.known_file_hashes(path).sha256 == sha256(path)
    with sqlite3.connect(library_file()) as connection:
        rows = connection.execute("SELECT count(*) FROM hashes WHERE kind = 'sha256'").fetchone()
    assert rows == (1,)


def test_the_hash_command_makes_each_hash_once(room, monkeypatch, capsys):
    from mergekit_sd.cli.main import run

    path = room / "sd1-a.safetensors"
    assert run(["hash", str(path)]) == 0
    first = capsys.readouterr().out
    for name in ("file_hashes", "hash_file_tensors"):
        monkeypatch.setattr(f"mergekit_sd.inspection.identity.{name}", None)
    assert run(["hash", str(path)]) == 0
    assert capsys.readouterr().out == first
    assert sha256(path) in first
