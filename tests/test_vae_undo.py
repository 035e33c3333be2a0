"""`library undo`: every file comes back as it was, or it is said why not."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import story
from vae_files import POSIX, inode, make_shelf

import mergekit_sd as mk
from mergekit_sd.errors import Cancelled, EnvironmentFault, UsageError
from mergekit_sd.library import journal, undo

pytestmark = POSIX

LINKS = ["hard", "sym", "delete"]


@pytest.fixture
def shelf(tmp_path, tmp_path_factory):
    return make_shelf(tmp_path, tmp_path_factory)


@pytest.fixture
def shell(capsys):
    return story.Shell(capsys)


@pytest.fixture
def deduped(shelf):
    """Dedupes a folder of three copies; returns what lay there before."""

    def make(link):
        for name in ("a", "b", "sub/c"):
            shelf.put(f"{name}.safetensors", mode=0o640)
        before = shelf.state()
        mk.dedupe_vaes([shelf.folder], link=link, apply=True)
        return before

    return make


def reasons(report):
    return {each.path.name: each.reason for each in report.refused}


def files(shelf):
    """What lies in the folder, but for the times of folders: temporary files come and go."""
    return {name: each for name, each in story.state(shelf.folder).items() if name != "sub"}


def record():
    return next(journal._folder().glob("*.jsonl"))


@pytest.mark.parametrize("link", LINKS)
def test_everything_is_as_it_was(shelf, deduped, link):
    before = deduped(link)
    assert shelf.state() != before
    report = mk.undo_dedupe()
    assert {path.name for path in report.restored} == {"b.safetensors", "c.safetensors"}
    assert (report.run, report.untouched, report.refused) == (1, (), ())
    assert shelf.state() == before
    files = list(shelf.folder.rglob("*.safetensors"))
    assert len({inode(path) for path in files}) == 3
    assert not any(path.is_symlink() or path.stat().st_nlink > 1 for path in files)
    assert shelf.left() == []


@pytest.mark.parametrize("link", LINKS)
def test_undoing_twice_touches_nothing(shelf, deduped, link, shell):
    deduped(link)
    mk.undo_dedupe()
    before = story.state(shelf.folder)
    with pytest.raises(UsageError, match="no dedupe to undo"):
        mk.undo_dedupe()
    assert mk.undo_dedupe(1).restored == ()
    assert "undone before" in shell("library", "undo", 1)[1]
    shell.refused("UsageError", 2, "library", "undo", 7)
    assert story.state(shelf.folder) == before


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("lost", ["undone", "undoing"])
def test_an_undo_that_died_before_its_record_is_found_done(shelf, deduped, link, lost):
    before = deduped(link)
    mk.undo_dedupe()
    state = story.state(shelf.folder)
    lines = record().read_text().splitlines(keepends=True)
    kept = [line for line in lines if f'"{lost}"' not in line and '"undone"' not in line]
    record().write_text("".join(kept))
    report = mk.undo_dedupe()
    assert (len(report.untouched), report.restored, report.refused) == (2, (), ())
    assert story.state(shelf.folder) == state
    assert shelf.state() == before


def test_a_step_that_was_never_taken_is_left(shelf, deduped):
    """Not even what was a hard link of something else before is copied."""
    one = shelf.put("a.safetensors")
    two = shelf.put("b.safetensors")
    os.link(two, shelf.folder.parent / "elsewhere.safetensors")
    status = two.stat()
    with journal.exclusive(), journal.Journal("hard") as kept:
        sha256 = shelf.state()["b.safetensors"][0]
        owner = status.st_uid, status.st_gid
        numbers = (status.st_size, status.st_ino, 0o644, status.st_mtime_ns, *owner)
        kept.step(journal.Step(two, one, sha256, *numbers))
    before = story.state(shelf.folder)
    assert mk.undo_dedupe().untouched == (two,)
    assert story.state(shelf.folder) == before


def test_the_last_run_is_undone_first_and_any_by_its_number(shelf, shell):
    before = {}
    for seed, link in enumerate(LINKS):
        for name in "ab":
            shelf.put(f"{seed}{name}.safetensors", seed)
        before = shelf.state() | before
        assert mk.dedupe_vaes([shelf.folder], link=link, apply=True).run == seed + 1
    assert mk.undo_dedupe().run == 3
    assert mk.undo_dedupe(1).run == 1
    assert mk.undo_dedupe().run == 2
    assert shelf.state() == before
    listed = shell("library", "undo", "--list")[0].splitlines()
    assert [line.split()[0] for line in listed] == ["1", "2", "3"]
    assert all(line.endswith("1 file, 40.4 KiB, all undone") for line in listed)
    runs = shell.json("library", "undo", "--list")["runs"]
    assert [(run["run"], run["link"], run["files"], run["pending"]) for run in runs] == [
        (1, "hard", 1, 0),
        (2, "sym", 1, 0),
        (3, "delete", 1, 0),
    ]


# --- what cannot be undone ----------------------------------------------------------------------------


@pytest.mark.parametrize("link", ["sym", "delete"])
@pytest.mark.parametrize("change", ["gone", "changed"])
def test_without_the_kept_bytes_it_is_refused(shelf, deduped, shell, link, change):
    deduped(link)
    kept = shelf.folder / "a.safetensors"
    content = kept.read_bytes()
    if change == "gone":
        kept.unlink()
    else:
        kept.write_bytes(b"?" + content[1:])
    before = files(shelf)
    out, _ = shell("library", "undo", code=4)
    told = f"the kept file is gone: {kept}" if change == "gone" else f"the bytes of the kept file ({kept}) have changed"
    assert out.count(told) == 2
    assert "Run 1: 0 files restored" in out
    assert files(shelf) == before
    assert len(shell.json("library", "undo", code=4)["refused"]) == 2
    kept.write_bytes(content)
    assert len(mk.undo_dedupe().restored) == 2  # it may be tried again


def test_of_hard_links_the_bytes_are_there_without_the_kept_file(shelf, deduped):
    before = deduped("hard")
    (shelf.folder / "a.safetensors").unlink()
    assert len(mk.undo_dedupe().restored) == 2
    assert shelf.state() == {name: each for name, each in before.items() if name != "a.safetensors"}


def test_a_write_through_a_hard_link_is_seen(shelf, deduped):
    deduped("hard")
    with (shelf.folder / "a.safetensors").open("r+b") as file:
        file.write(b"?")
    told = dict.fromkeys(("b.safetensors", "c.safetensors"), "its bytes have changed since")
    assert reasons(mk.undo_dedupe()) == told


@pytest.mark.parametrize("link", LINKS)
def test_another_file_of_the_name_is_never_written_over(shelf, deduped, link):
    deduped(link)
    one = shelf.folder / "b.safetensors"
    one.unlink(missing_ok=True)
    one.write_text("new")
    assert reasons(mk.undo_dedupe())["b.safetensors"] == "its bytes have changed since"
    one.unlink()
    one.symlink_to("nowhere")
    assert reasons(mk.undo_dedupe())["b.safetensors"] == "something else has its name by now"
    assert one.readlink() == Path("nowhere")


@pytest.mark.parametrize("link", ["hard", "sym"])
def test_a_link_that_was_removed_does_not_come_back(shelf, deduped, link):
    deduped(link)
    (shelf.folder / "b.safetensors").unlink()
    assert reasons(mk.undo_dedupe()) == {"b.safetensors": "it is gone"}
    assert not (shelf.folder / "b.safetensors").exists()


@pytest.mark.parametrize("link", LINKS)
def test_what_comes_meanwhile_stays(shelf, deduped, link, monkeypatch):
    deduped(link)
    one = shelf.folder / "b.safetensors"
    real = undo._hashed

    def hashed(*arguments):
        real(*arguments)
        if arguments[2].path != one:
            return
        one.unlink(missing_ok=True)
        one.write_text("new")

    monkeypatch.setattr(undo, "_hashed", hashed)
    assert reasons(mk.undo_dedupe())["b.safetensors"] == "it has changed meanwhile"
    assert one.read_text() == "new"
    assert shelf.left() == []


@pytest.mark.parametrize("link", LINKS)
def test_a_full_disk_or_a_cancel_leaves_the_rest(shelf, deduped, link, monkeypatch):
    before = deduped(link)
    links = files(shelf)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(undo.os, "utime", full)
        assert reasons(mk.undo_dedupe())["b.safetensors"] == "the system says: No space left on device"
    assert files(shelf) == links
    token = mk.CancelToken()
    with monkeypatch.context() as context:
        context.setattr(undo.os, "utime", lambda *a, real=os.utime, **k: (real(*a, **k), token.cancel()))
        with pytest.raises(Cancelled):
            mk.undo_dedupe(cancel=token)
    assert shelf.left() == []
    assert len(mk.undo_dedupe().restored) == 1
    assert shelf.state() == before


# --- the journal --------------------------------------------------------------------------------------


@pytest.mark.parametrize("link", LINKS)
def test_a_torn_line_is_as_good_as_none(shelf, deduped, link):
    before = deduped(link)
    with record().open("ab") as file:
        file.write(b'{"record": "undo')
    assert len(mk.undo_dedupe().restored) == 2
    assert shelf.state() == before
    assert all(json.loads(line) for line in record().read_text().splitlines())


@pytest.mark.parametrize("text", ["{}\n", "<html>\n", '{"record": "run", "version": 1}\n{"record": "step"}\n', "[]\n"])
def test_a_damaged_journal_is_told(shelf, deduped, shell, text):
    deduped("hard")
    record().write_text(text)
    with pytest.raises(EnvironmentFault, match="damaged"):
        mk.dedupe_runs()
    shell.refused("EnvironmentFault", 4, "library", "undo")


def test_a_newer_journal_is_told(deduped, shell):
    deduped("hard")
    record().write_text(record().read_text().replace('"version": 1', '"version": 2'))
    assert "newer" in shell.refused("EnvironmentFault", 4, "library", "undo")["message"]


def test_an_empty_journal_is_no_run(deduped):
    deduped("hard")
    (journal._folder() / "0009.jsonl").write_bytes(b'{"record": "r')
    assert [run.number for run in mk.dedupe_runs()] == [1]


@pytest.mark.parametrize("name", ["b\udcff", "b\n", "bü" + "x" * 200])
def test_any_name_comes_back(shelf, name):
    shelf.put("a.safetensors")
    shelf.put(f"{name}.safetensors")
    before = shelf.state()
    mk.dedupe_vaes([shelf.folder], link="sym", apply=True)
    assert shelf.state() != before
    mk.undo_dedupe()
    assert shelf.state() == before


def test_nothing_was_ever_deduped(shell):
    assert shell("library", "undo", "--list") == ("", "Nothing was deduped yet.\n")
    assert shell.json("library", "undo", "--list") == {"runs": []}
    shell.refused("UsageError", 2, "library", "undo")
