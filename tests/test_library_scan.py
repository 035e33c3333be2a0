"""Scanning: what is read, what is not read again, what is hashed, and what becomes of files that are none."""

from __future__ import annotations

import json
import os

import models
import pytest
import torch

import mergekit_sd as mk
from mergekit_sd.errors import UnreadableInput, UsageError
from mergekit_sd.formats.hashing import hash_file_tensors
from mergekit_sd.formats.open import open_model
from mergekit_sd.library import digests, entry, index, scan

POSIX = pytest.mark.skipif(os.name == "nt", reason="needs POSIX")
NOT_ROOT = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read anything")


@pytest.fixture(autouse=True)
def data(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("data")
    monkeypatch.setenv("MERGEKIT_SD_DATA", str(folder))
    return folder


@pytest.fixture
def shelf(tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


def tiny(path, number=0):
    """An embedding, the smallest file that is a model."""
    return models.write(path, {"emb_params": torch.full((2, 8), float(number))})


def by_name():
    with mk.Library() as library:
        return {entry.path.name: entry for entry in library.entries()}


def news(folder, **options):
    """What a scan says of each file, by name."""
    events = []
    mk.scan_library([folder], on_event=events.append, **options)
    return {event.entry.path.name: event.news for event in events if isinstance(event, mk.FileRead)}


# --- rows ---------------------------------------------------------------------------------------------


def test_what_headers_say_is_in_the_index(shelf):
    ema = models.with_ema(models.checkpoint("sd1"))
    models.write(shelf / "full.safetensors", ema | {"junk.x": torch.zeros(3)}, {"modelspec.title": "A title"})
    models.write(shelf / "vae.safetensors", models.vae_file(dtype="fp32"))
    lora = {"lora_unet_x.lora_down.weight": torch.zeros(2, 2), "lora_unet_x.lora_up.weight": torch.zeros(2, 2)}
    models.write(shelf / "style.safetensors", lora, {"ss_output_name": "style-v2"})
    report = mk.scan_library([shelf], hashes="none")
    assert (report.files, report.new, report.changed, report.gone, report.hashed) == (3, 3, 0, 0, 0)
    found = by_name()
    full, inspected = found["full.safetensors"], mk.inspect_file(shelf / "full.safetensors")
    assert (full.kind, full.architecture, full.format, full.title) == ("checkpoint", "sd1", "safetensors", "A title")
    assert full.components == {name: share.bytes for name, share in inspected.components.items()}
    assert (full.ema, full.junk, full.position_ids) == (inspected.ema.bytes, inspected.junk.bytes, "ok")
    assert full.dtypes == inspected.dtypes
    assert full.junk == 12
    assert full.state.size == (shelf / "full.safetensors").stat().st_size
    assert (found["vae.safetensors"].kind, list(found["vae.safetensors"].components)) == ("vae", ["vae"])
    assert (found["style.safetensors"].kind, found["style.safetensors"].trained_as) == ("lora", "style-v2")
    assert all(not entry.hashes and entry.error is None for entry in found.values())


def test_rows_are_told_as_they_are_read_and_come_back_the_same(shelf):
    for number in range(5):
        tiny(shelf / f"{number}.safetensors", number)
    told = []
    mk.scan_library([shelf], on_event=told.append)
    read = [event for event in told if isinstance(event, mk.FileRead)]
    assert [event.entry.path.name for event in read] == [f"{number}.safetensors" for number in range(5)]
    hashed = {event.entry.path: event.entry for event in told if isinstance(event, mk.FileHashed)}
    with mk.Library() as library:
        assert {entry.path: entry for entry in library.entries()} == hashed
    kinds = [event.kind for event in told]
    assert kinds.index("hashing_started") > kinds.index("file")
    assert all(json.dumps(event.as_json(), default=str) for event in told)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".CKPT"])
def test_models_are_found_by_suffix_and_read_by_content(shelf, suffix):
    tiny(shelf / f"a{suffix}")
    (shelf / "a.yaml").write_text("model: x")
    assert mk.scan_library([shelf]).files == 1
    assert by_name()[f"a{suffix}"].kind == "embedding"


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(UsageError, match="not a folder"):
        mk.scan_library([tmp_path / "nowhere"])
    tiny(tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match="not a folder"):
        mk.scan_library([tmp_path / "a.safetensors"])


# --- what is not read again ------------------------------------------------------------------------------


def test_the_second_scan_reads_nothing(shelf, monkeypatch):
    for number in range(3):
        tiny(shelf / f"{number}.safetensors", number)
    mk.scan_library([shelf])
    before = by_name()

    def never(*_):
        raise AssertionError("read again")

    monkeypatch.setattr(scan, "read_entry", never)
    monkeypatch.setattr(scan, "open_header", never)
    monkeypatch.setattr(digests, "InputFile", never)
    assert set(news(shelf).values()) == {"same"}
    assert by_name() == before


def test_a_changed_file_is_read_and_hashed_again(shelf):
    path = tiny(shelf / "a.safetensors", 1)
    tiny(shelf / "b.safetensors", 2)
    mk.scan_library([shelf])
    before = by_name()
    tiny(path, 3)
    assert news(shelf, hashes="none") == {"a.safetensors": "changed", "b.safetensors": "same"}
    after = by_name()
    assert after["a.safetensors"].hashes == {}  # those of what it was are gone
    assert after["b.safetensors"] == before["b.safetensors"]
    mk.scan_library([shelf])
    assert by_name()["a.safetensors"].content == hash_file_tensors(open_model(path)) != before["a.safetensors"].content


def test_same_size_and_another_time_is_another_file(shelf):
    path = tiny(shelf / "a.safetensors", 1)
    mk.scan_library([shelf])
    os.utime(path, ns=(0, 10**18))
    assert news(shelf) == {"a.safetensors": "changed"}


def test_files_that_are_gone_are_forgotten(shelf, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    tiny(other / "b.safetensors")
    tiny(shelf / "a.safetensors").rename(tiny(shelf / "c.safetensors"))
    mk.scan_library([shelf, other])
    (shelf / "c.safetensors").unlink()
    (other / "b.safetensors").unlink()
    told = []
    report = mk.scan_library([shelf], on_event=told.append)
    assert report.gone == 1
    gone = [event.path for event in told if isinstance(event, mk.FileGone)]
    assert gone == [str(shelf.resolve() / "c.safetensors")]
    assert list(by_name()) == ["b.safetensors"]  # its folder was not looked into


@POSIX
@NOT_ROOT
def test_what_lies_in_a_folder_that_cannot_be_read_is_kept(shelf):
    locked = shelf / "locked"
    locked.mkdir()
    tiny(locked / "a.safetensors")
    mk.scan_library([shelf])
    locked.chmod(0)
    try:
        report = mk.scan_library([shelf])
    finally:
        locked.chmod(0o700)
    assert report.gone == 0
    assert "cannot be looked into" in report.notes[0]
    assert list(by_name()) == ["a.safetensors"]


@POSIX
def test_a_moved_file_keeps_its_hashes(shelf, monkeypatch):
    path = tiny(shelf / "a.safetensors")
    mk.scan_library([shelf], sha256=True)
    before = by_name()["a.safetensors"]
    (shelf / "sub").mkdir()
    path.rename(shelf / "sub" / "b.safetensors")
    monkeypatch.setattr(scan, "read_entry", None)
    report = mk.scan_library([shelf], sha256=True)
    assert (report.new, report.gone, report.hashed) == (1, 1, 0)
    assert by_name()["b.safetensors"].hashes == before.hashes


@POSIX
def test_hard_links_are_hashed_once(shelf):
    path = models.write(shelf / "a.safetensors", models.vae_file())
    os.link(path, shelf / "b.safetensors")
    (shelf / "c.safetensors").symlink_to(path)
    report = mk.scan_library([shelf], sha256=True)
    size = path.stat().st_size
    assert (report.files, report.hashed) == (3, 1)
    assert report.hashed_bytes <= 2 * size  # the tensors once, the file once
    found = by_name()
    assert found["a.safetensors"].hashes == found["b.safetensors"].hashes == found["c.safetensors"].hashes
    assert set(found["a.safetensors"].hashes) == {"content", "weights:vae", "sha256", "autov1", "autov3"}
    os.link(path, shelf / "d.safetensors")
    assert mk.scan_library([shelf]).hashed == 0
    assert by_name()["d.safetensors"].hashes == found["a.safetensors"].hashes


def test_another_version_reads_headers_anew_and_keeps_the_content_hash(shelf, monkeypatch):
    models.write(shelf / "a.safetensors", models.vae_file())
    with monkeypatch.context() as former:
        former.setattr(index, "VERSION", "0.0.1")
        mk.scan_library([shelf])
    before = by_name()["a.safetensors"].hashes
    read = []
    monkeypatch.setattr(scan, "read_entry", lambda path, real=scan.read_entry: read.append(path) or real(path))
    assert news(shelf, hashes="none") == {"a.safetensors": "same"}
    assert len(read) == 1
    assert by_name()["a.safetensors"].hashes == {"content": before["content"]}
    mk.scan_library([shelf])
    assert by_name()["a.safetensors"].hashes == before
    assert len(read) == 1


# --- the way through folders -----------------------------------------------------------------------------


@POSIX
def test_hidden_folders_are_left_out_and_links_are_followed_once(shelf, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    for folder in (shelf / ".hidden", shelf / "a" / "b", elsewhere):
        folder.mkdir(parents=True)
    for place in (".hidden/h", ".h", "a/b/deep", "top"):
        tiny(shelf / f"{place}.safetensors")
    tiny(elsewhere / "far.safetensors")
    (shelf / "0-link").symlink_to(shelf / "a")  # comes before `a`, which had better be found as itself
    (shelf / "a" / "b" / "loop").symlink_to(shelf)
    (shelf / "out").symlink_to(elsewhere)
    (shelf / "self").symlink_to(shelf / "self")
    mk.scan_library([shelf])
    with mk.Library() as library:
        found = [entry.path.relative_to(shelf.resolve()).as_posix() for entry in library.entries()]
    assert sorted(found) == ["a/b/deep.safetensors", "out/far.safetensors", "top.safetensors"]
    assert mk.scan_library([shelf / ".hidden"]).files == 1  # where it is named


def test_a_folder_within_another_is_scanned_once(shelf):
    (shelf / "sub").mkdir()
    tiny(shelf / "sub" / "a.safetensors")
    assert mk.scan_library([shelf, shelf / "sub", shelf / "sub" / ".."]).files == 1


def test_without_a_folder_those_scanned_before_are_scanned(shelf, monkeypatch):
    monkeypatch.setattr(scan, "model_folders", list)
    with pytest.raises(UsageError, match="No folders"):
        mk.scan_library()
    mk.scan_library([shelf])
    tiny(shelf / "a.safetensors")
    assert mk.scan_library().folders == (shelf.resolve(),)
    monkeypatch.setattr(scan, "model_folders", lambda: [mk.ModelFolder(shelf.resolve(), None, "found")])
    assert mk.scan_library().folders == (shelf.resolve(),)


# --- files that are no models ------------------------------------------------------------------------------


def test_what_cannot_be_read_is_a_row_with_the_reason(shelf):
    whole = tiny(shelf / "cut.safetensors").read_bytes()
    (shelf / "cut.safetensors").write_bytes(whole[:-4])
    (shelf / "page.ckpt").write_text("<html>login</html>")
    (shelf / "empty.pt").touch()
    (shelf / "folder.ckpt").mkdir()
    tiny(shelf / "folder.ckpt" / "inner.safetensors")
    report = mk.scan_library([shelf])
    found = by_name()
    assert {name: each.error for name, each in found.items() if not each.error} == {"inner.safetensors": None}
    assert "cut short" in found["cut.safetensors"].error
    assert "HTML" in found["page.ckpt"].error
    assert "empty" in found["empty.pt"].error
    assert [entry.what for entry in report.unreadable] == ["unreadable"] * 3
    assert report.hashed == 1


@POSIX
def test_what_is_no_regular_file_is_a_row_with_the_reason(shelf):
    os.mkfifo(shelf / "pipe.pt")
    (shelf / "dangling.safetensors").symlink_to(shelf / "nothing")
    (shelf / "loop.safetensors").symlink_to(shelf / "loop.safetensors")
    assert set(news(shelf, sha256=True).values()) == {"new"}
    found = by_name()
    assert "FIFO" in found["pipe.pt"].error
    assert "there is no file" in found["dangling.safetensors"].error
    assert "loop of links" in found["loop.safetensors"].error
    assert set(news(shelf).values()) == {"same"}


def test_what_could_not_be_read_is_tried_again(shelf, monkeypatch):
    tiny(shelf / "a.safetensors")
    with monkeypatch.context() as unable:
        unable.setattr(entry, "open_model", refusing)
        mk.scan_library([shelf])
    assert by_name()["a.safetensors"].error == "Not yet."
    assert news(shelf) == {"a.safetensors": "same"}
    assert by_name()["a.safetensors"].error is None
    assert by_name()["a.safetensors"].content


def refusing(_):
    raise UnreadableInput("Not yet.")


@POSIX
@NOT_ROOT
def test_rights_that_are_given_later_are_seen(shelf):
    path = tiny(shelf / "a.safetensors")
    path.chmod(0)
    mk.scan_library([shelf])
    assert by_name()["a.safetensors"].error
    path.chmod(0o600)
    mk.scan_library([shelf])
    assert by_name()["a.safetensors"].error is None
    assert by_name()["a.safetensors"].content


def test_a_file_that_is_written_meanwhile_is_noted_and_the_others_go_on(shelf):
    for number in range(3):
        tiny(shelf / f"{number}.safetensors", number)

    def meddle(event):
        if isinstance(event, mk.HashingStarted):
            tiny(shelf / "1.safetensors", 9)

    report = mk.scan_library([shelf], on_event=meddle)
    assert len(report.notes) == 1
    assert "1.safetensors was not hashed" in report.notes[0]
    assert report.hashed == 2
    assert by_name()["1.safetensors"].content is None
    mk.scan_library([shelf])
    assert by_name()["1.safetensors"].content == hash_file_tensors(open_model(shelf / "1.safetensors"))


def test_a_file_that_goes_meanwhile_is_noted(shelf):
    for number in range(2):
        tiny(shelf / f"{number}.safetensors", number)

    def meddle(event):
        if isinstance(event, mk.HashingStarted):
            (shelf / "0.safetensors").unlink(missing_ok=True)

    report = mk.scan_library([shelf], sha256=True, on_event=meddle)
    assert len(report.notes) == 2
    assert mk.scan_library([shelf]).gone == 1


@POSIX
@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31mb", "a‮b", "日本語", "a'b\"c;--", "a\udcffb", "%_*?[x]"])
def test_any_name_is_kept(shelf, name):
    folder = shelf / name
    folder.mkdir()
    path = tiny(folder / f"{name}.safetensors")
    mk.scan_library([folder])
    assert [str(entry.path) for entry in by_name().values()] == [str(path.resolve())]
    assert set(news(folder).values()) == {"same"}
    json.dumps(by_name()[path.name].as_json())
    path.unlink()
    assert mk.scan_library([folder]).gone == 1


def test_metadata_of_any_kind_is_kept(shelf):
    title = "x\x00\x1b" * 10_000
    models.write(shelf / "a.safetensors", {"emb_params": torch.zeros(1, 8)}, {"modelspec.title": title})
    mk.scan_library([shelf])
    assert by_name()["a.safetensors"].title == title[:500]


def test_a_folder_whose_name_begins_another_is_not_that(shelf, tmp_path):
    other = tmp_path / "models2"
    other.mkdir()
    tiny(other / "a.safetensors")
    mk.scan_library([other])
    assert mk.scan_library([shelf]).gone == 0
    with mk.Library() as library:
        assert library.entries([shelf.resolve()]) == []
        assert len(library.entries([other.resolve(), tmp_path.resolve()])) == 1
