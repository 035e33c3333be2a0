"""Sidecars, renaming a model with them, and finding a model by hash or by another tool's name for it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import models
import pytest
import torch

import mergekit_sd as mk
from mergekit_sd.errors import MissingInput, NotWritable, OutputExists, UsageError
from mergekit_sd.library import renaming

POSIX = pytest.mark.skipif(os.name == "nt", reason="needs POSIX")


@pytest.fixture(autouse=True)
def data(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MERGEKIT_SD_DATA", str(tmp_path_factory.mktemp("data")))


@pytest.fixture
def shelf(tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


def tiny(path, number=0):
    path.parent.mkdir(exist_ok=True)
    return models.write(path, {"emb_params": torch.full((2, 8), float(number))})


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def put(folder, *names):
    """Files with their own names in them."""
    for name in names:
        (folder / name).write_text(name)
    return folder / names[0]


# --- sidecars ---------------------------------------------------------------------------------------------


def test_sidecars_are_what_belongs_to_a_model(shelf):
    theirs = ["mix.yaml", "mix.vae.pt", "mix.preview.png", "mix.PNG", "mix.civitai.info", "mix.json", "mix.txt"]
    model = put(shelf, "mix.safetensors", *theirs, "mix2.png", "mix-v2.yaml", "Mix.txt2", "remix.png", "mix.zip")
    (shelf / "mix.jpg").mkdir()
    assert [path.name for path in mk.sidecars(model)] == sorted(theirs)
    assert mk.sidecars(str(shelf / "remix.ckpt")) == [shelf / "remix.png"]
    assert mk.sidecars(shelf / "nowhere" / "x.ckpt") == []


def test_a_vae_beside_a_model_has_sidecars_of_its_own(shelf):
    vae = put(shelf, "mix.vae.pt", "mix.ckpt", "mix.vae.yaml", "mix.png")
    assert [path.name for path in mk.sidecars(vae)] == ["mix.vae.yaml"]


def test_dots_in_a_name_are_no_suffix(shelf):
    put(shelf, "v1.5.safetensors", "v1.5.png", "v1.png", "v1.yaml")
    assert mk.sidecars(shelf / "v1.5.safetensors") == [shelf / "v1.5.png"]


# --- rename -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["new.1", "new.1.safetensors", "new.1.SAFETENSORS"])
def test_a_model_is_renamed_with_its_sidecars(shelf, name):
    model = put(shelf, "old.safetensors", "old.preview.png", "old.vae.pt", "older.png")
    model.write_text("model")
    moves = mk.rename_model(model, name)
    assert sorted(path.name for _, path in moves) == ["new.1.preview.png", "new.1.safetensors", "new.1.vae.pt"]
    assert contents(shelf) == {
        "new.1.safetensors": b"model",
        "new.1.preview.png": b"old.preview.png",
        "new.1.vae.pt": b"old.vae.pt",
        "older.png": b"older.png",
    }


@pytest.mark.parametrize("taken", ["new.safetensors", "new.png", "new.vae.pt"])
def test_nothing_is_renamed_where_one_name_is_taken(shelf, taken):
    model = put(shelf, "old.safetensors", "old.png", "old.vae.pt", taken)
    before = contents(shelf)
    with pytest.raises(OutputExists) as refusal:
        mk.rename_model(model, "new")
    assert taken in refusal.value.message
    assert contents(shelf) == before


@POSIX
def test_a_dangling_link_takes_a_name_too(shelf):
    model = put(shelf, "old.safetensors", "old.png")
    (shelf / "new.png").symlink_to(shelf / "nothing")
    with pytest.raises(OutputExists):
        mk.rename_model(model, "new")
    assert model.exists()


@pytest.mark.parametrize(
    "name", ["", " ", ".", "..", ".hidden", "a/b", "../x", "a\\b", "a\nb", "a\x1b[31m", "new.ckpt"]
)
def test_names_that_cannot_be_are_refused(shelf, name):
    model = put(shelf, "old.safetensors", "old.png")
    before = contents(shelf)
    with pytest.raises(UsageError):
        mk.rename_model(model, name)
    assert contents(shelf) == before


def test_two_models_of_one_name_share_their_sidecars(shelf):
    model = put(shelf, "old.safetensors", "old.ckpt", "old.yaml")
    with pytest.raises(UsageError, match=r"old\.ckpt has the same name"):
        mk.rename_model(model, "new")
    (shelf / "old.yaml").unlink()
    mk.rename_model(model, "new")
    assert set(contents(shelf)) == {"new.safetensors", "old.ckpt"}


def test_what_is_not_there_cannot_be_renamed(shelf):
    with pytest.raises(MissingInput):
        mk.rename_model(shelf / "x.safetensors", "y")


def test_its_own_name_changes_nothing(shelf):
    model = put(shelf, "old.safetensors", "old.png")
    assert mk.rename_model(model, "old") == []
    assert set(contents(shelf)) == {"old.safetensors", "old.png"}


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_failure_gives_all_their_old_names_back(shelf, monkeypatch, number):
    model = put(shelf, "old.safetensors", "old.json", "old.png")
    before, moved = contents(shelf), []
    move = renaming._move

    def failing(old, new):
        if len(moved) == number:
            moved.append(None)
            raise PermissionError(errno.EACCES, "Permission denied")
        moved.append((old, new))
        move(old, new)

    monkeypatch.setattr(renaming, "_move", failing)
    with pytest.raises(NotWritable, match="All files have their old names"):
        mk.rename_model(model, "new")
    assert contents(shelf) == before


def test_what_cannot_be_given_back_is_told(shelf, monkeypatch):
    model = put(shelf, "old.safetensors", "old.png")
    move = renaming._move

    def once(old, new):
        if old != model:
            raise PermissionError(errno.EACCES, "Permission denied")
        move(old, new)

    monkeypatch.setattr(renaming, "_move", once)
    with pytest.raises(NotWritable, match="Some files have new names") as refusal:
        mk.rename_model(model, "new")
    assert refusal.value.details == ("new.safetensors is still to be called old.safetensors",)


@POSIX
@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_comes_in_between_is_never_replaced(shelf, monkeypatch, links):
    model = put(shelf, "old.safetensors")
    if not links:

        def none(*_, **__):
            raise PermissionError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", none)
    put(shelf, "new.safetensors")
    with pytest.raises(FileExistsError):
        renaming._move(model, shelf / "new.safetensors")
    (shelf / "new.safetensors").unlink()
    mk.rename_model(model, "new")
    assert contents(shelf) == {"new.safetensors": b"old.safetensors"}


@POSIX
def test_the_case_of_a_name_may_change(shelf, monkeypatch):
    model = put(shelf, "old.safetensors", "old.png")
    lexists = os.path.lexists
    # As where case does not count:
    monkeypatch.setattr(os.path, "lexists", lambda path: lexists(path) or Path(path).name.startswith("OLD"))
    mk.rename_model(model, "OLD")
    assert set(contents(shelf)) == {"OLD.safetensors", "OLD.png"}
    put(shelf, "old.png", "old.safetensors")
    with pytest.raises(OutputExists):
        mk.rename_model(shelf / "OLD.safetensors", "old")


@POSIX
def test_a_link_is_renamed_itself(shelf):
    target = put(shelf, "target.safetensors")
    (shelf / "old.safetensors").symlink_to(target)
    mk.rename_model(shelf / "old.safetensors", "new")
    assert (shelf / "new.safetensors").is_symlink()
    assert target.exists()


@pytest.mark.parametrize("relative", [False, True])
def test_the_index_goes_along(shelf, monkeypatch, relative):
    path = tiny(shelf / "old.safetensors")
    mk.scan_library([shelf])
    hashes = mk.look_up(path).hashes
    monkeypatch.chdir(shelf)
    mk.rename_model(Path("old.safetensors") if relative else path, "new")
    with mk.Library() as library:
        assert {entry.path.name: entry.hashes for entry in library.entries()} == {"new.safetensors": hashes}
    report = mk.scan_library([shelf])
    assert (report.new, report.gone, report.hashed) == (0, 0, 0)


def test_a_library_that_cannot_be_opened_does_not_stop_a_rename(shelf):
    path = tiny(shelf / "old.safetensors")
    mk.library_file().mkdir(parents=True)
    mk.rename_model(path, "new")
    assert (shelf / "new.safetensors").exists()


# --- finding ------------------------------------------------------------------------------------------------


@pytest.fixture
def scanned(shelf):
    """Three files, scanned with sha256, and one without."""
    for number, name in enumerate(("anything-v3", "sub/orange.v2", "other")):
        tiny(shelf / f"{name}.safetensors", number)
    mk.scan_library([shelf], sha256=True)
    tiny(shelf / "unhashed.safetensors", 9)
    mk.scan_library([shelf], hashes="none")
    return shelf


def names(entries):
    return [entry.path.stem for entry in entries]


def test_a_file_is_found_by_any_of_its_hashes(scanned):
    hashes = mk.look_up(scanned / "anything-v3.safetensors").hashes
    values = [hashes["sha256"], hashes["sha256"][:10], hashes["sha256"][:12], hashes["content"], hashes["autov1"]]
    for value in [*values, hashes["autov3"], hashes["sha256"].upper(), f" {hashes['content']}\n"]:
        assert "anything-v3" in names(mk.find_by_hash(value)), value
    assert names(mk.find_by_hash(hashes["sha256"])) == ["anything-v3"]


@pytest.mark.parametrize("value", ["", "xyz", "0" * 64, "0" * 9, "g" * 10, "%" * 10, "0" * 65])
def test_what_is_no_hash_or_unknown_finds_nothing(scanned, value):
    assert mk.find_by_hash(value) == []


def test_moved_and_changed_files_are_not_found_as_they_were(scanned):
    content = mk.look_up(scanned / "other.safetensors").hashes["content"]
    (scanned / "other.safetensors").rename(scanned / "moved.safetensors")
    assert mk.find_by_hash(content) == []
    mk.scan_library([scanned])
    assert names(mk.find_by_hash(content)) == ["moved"]
    tiny(scanned / "moved.safetensors", 7)
    assert mk.find_by_hash(content) == []
    assert mk.find_by_name("moved") == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("anything-v3", ["anything-v3"]),
        ("Anything-V3.safetensors", ["anything-v3"]),
        ("anything-v3.ckpt", ["anything-v3"]),
        ("anything", []),
        ("orange.v2", ["orange.v2"]),
        ("sub/orange.v2.safetensors", ["orange.v2"]),
        ("sub\\orange.v2", ["orange.v2"]),
        ("models/sub/orange.v2", ["orange.v2"]),
        ("models/orange.v2", []),
        ("orange", []),
        ("", []),
        ("/" * 9, []),
        ("a/" * 99 + "orange.v2", []),
        ("unhashed [0123456789]", ["unhashed"]),  # nothing is known of its hash
        ("other [0123456789]", []),  # but of this one's
    ],
)
def test_a_file_is_found_by_name(scanned, name, expected):
    assert names(mk.find_by_name(name)) == expected


def test_a_hash_counts_more_than_a_name(scanned):
    hashes = mk.look_up(scanned / "other.safetensors").hashes
    for digits in (hashes["sha256"][:10], hashes["sha256"], hashes["sha256"][:10].upper()):
        assert names(mk.find_by_name(f"renamed [{digits}]")) == ["other"]
        assert names(mk.find_by_name(f"other.safetensors [{digits}]")) == ["other"]
        assert names(mk.find_by_name(f"unhashed [{digits}]")) == ["other", "unhashed"]
    assert "other" in names(mk.find_by_name(f"other [{hashes['autov1']}]"))


def test_brackets_in_a_name_are_no_hash(scanned):
    tiny(scanned / "mix [final].safetensors")
    mk.scan_library([scanned], hashes="none")
    assert names(mk.find_by_name("mix [final]")) == ["mix [final]"]


def test_a_file_that_changed_is_looked_at_anew(scanned):
    before = mk.look_up(scanned / "other.safetensors")
    assert before.hashes
    models.write(scanned / "other.safetensors", models.vae_file())
    after = mk.look_up(str(scanned / "other.safetensors"))
    assert (after.kind, after.hashes) == ("vae", {})
