"""`vae dedupe` where files change under it, the system refuses, or links cannot be."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import story
from vae_files import POSIX, dedupe, make_shelf, only, reasons

import mergekit_sd as mk
from mergekit_sd.errors import Cancelled, MergekitError, NotWritable, TargetLocked, UsageError
from mergekit_sd.formats.claims import TEMPORARY_SUFFIX
from mergekit_sd.library import journal, reflink, replacing

pytestmark = POSIX

LINKS = ["hard", "sym", "delete"]


@pytest.fixture
def shelf(tmp_path, tmp_path_factory):
    return make_shelf(tmp_path, tmp_path_factory)


@pytest.fixture
def shell(capsys):
    return story.Shell(capsys)


# --- what happens meanwhile ---------------------------------------------------------------------------


def meanwhile(monkeypatch, action, when="_digest", before=False):
    """Do something when the files have been compared, or before they are."""
    real = getattr(replacing, when)

    def wrapped(*arguments):
        if before:
            action()
            return real(*arguments)
        result = real(*arguments)
        action()
        return result

    monkeypatch.setattr(replacing, when, wrapped)


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize(("which", "whose"), [("a", "the kept file"), ("b", "it")])
@pytest.mark.parametrize("before", [True, False])
def test_a_file_that_changes_is_left(shelf, monkeypatch, link, which, whose, before):
    for name in "ab":
        shelf.put(f"{name}.safetensors")
    path = shelf.folder / f"{which}.safetensors"

    def change():
        path.rename(path.with_suffix(".old"))
        path.write_bytes(b"new")

    meanwhile(monkeypatch, change, "_held" if before else "_digest", before)
    assert reasons(dedupe(shelf, link)) == {"b.safetensors": f"{whose} has changed meanwhile"}
    assert path.read_bytes() == b"new"
    assert shelf.left() == []
    assert mk.dedupe_runs() == []


@pytest.mark.parametrize("link", ["hard", "sym"])
def test_a_file_that_changes_at_the_last_moment_is_left(shelf, monkeypatch, link):
    shelf.put("a.safetensors")
    path = shelf.put("b.safetensors")
    new = shelf.folder / "new"
    new.write_bytes(b"new")
    meanwhile(monkeypatch, lambda: new.replace(path), "_make")  # who would write into it has to wait
    assert reasons(dedupe(shelf, link)) == {"b.safetensors": "it has changed meanwhile"}
    assert path.read_bytes() == b"new"
    assert shelf.left() == []


@pytest.mark.parametrize("link", LINKS)
def test_a_folder_that_becomes_a_link_is_left(shelf, tmp_path, monkeypatch, link):
    shelf.put("a.safetensors")
    path = shelf.put("sub/b.safetensors")

    def move():
        if not path.parent.is_symlink():
            path.parent.rename(tmp_path / "elsewhere")
            path.parent.symlink_to(tmp_path / "elsewhere")

    meanwhile(monkeypatch, move, "_held", before=True)
    assert reasons(dedupe(shelf, link)) == {"b.safetensors": "it is reached through a link by now"}
    assert (tmp_path / "elsewhere" / path.name).stat().st_nlink == 1


@pytest.mark.parametrize("link", LINKS)
def test_bytes_decide_not_the_index(shelf, link):
    """A byte changes behind size and time, as the index knows them."""
    kept, one = shelf.put("a.safetensors"), shelf.put("b.safetensors")
    mk.list_vaes([shelf.folder])
    status = one.stat()
    changed = bytearray(one.read_bytes())
    changed[-1] ^= 1
    with one.open("r+b") as file:
        file.write(changed)
    os.utime(one, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert reasons(dedupe(shelf, link)) == {"b.safetensors": "its bytes are not those of the kept file"}
    assert one.read_bytes() == bytes(changed) != kept.read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has leases")
@pytest.mark.parametrize(("which", "whose"), [("a", "the kept file"), ("b", "it")])
def test_a_file_that_is_open_to_write_is_left(shelf, which, whose):
    for name in "ab":
        shelf.put(f"{name}.safetensors")
    with (shelf.folder / f"{which}.safetensors").open("r+b"):
        assert reasons(dedupe(shelf)) == {"b.safetensors": f"another program has {whose} open to write"}
    with (shelf.folder / f"{which}.safetensors").open("rb"):
        assert len(only(dedupe(shelf)).replaced) == 1


@pytest.mark.parametrize("link", ["hard", "sym"])
def test_a_temporary_name_of_another_is_left(shelf, link):
    shelf.put("a.safetensors")
    one = shelf.put("b.safetensors")
    foreign = one.with_name(f".b.safetensors.link{TEMPORARY_SUFFIX}")
    foreign.write_text("another's")
    with pytest.raises(NotWritable) as caught:
        dedupe(shelf, link)
    assert "another run's" in caught.value.details[0]
    assert foreign.read_text() == "another's"
    assert one.stat().st_nlink == 1


def test_a_rerun_that_finds_all_linked_is_no_failure(shelf, monkeypatch):
    shelf.put("a.safetensors")
    one = shelf.put("b.safetensors")
    dedupe(shelf)
    two = shelf.put("c.safetensors")
    monkeypatch.setattr(os, "access", lambda *_: False)
    report = dedupe(shelf)
    assert (only(report).linked, report.run) == ((one,), None)
    assert reasons(report) == {two.name: "its folder cannot be written to"}


@pytest.mark.parametrize("link", LINKS)
def test_a_refusal_of_the_system_leaves_everything(shelf, monkeypatch, link):
    shelf.put("a.safetensors")
    shelf.put("b.safetensors")
    before = story.state(shelf.folder)

    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    for call in ("os.link", "pathlib.Path.symlink_to", "pathlib.Path.unlink" if link == "delete" else "os.getpid"):
        monkeypatch.setattr(call, refuse)
    with pytest.raises(NotWritable, match="No file can be") as caught:
        dedupe(shelf, link)
    monkeypatch.undo()
    assert "Operation not permitted" in caught.value.details[0]
    assert story.state(shelf.folder) == before


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize(("link", "call"), [("hard", "os.link"), ("delete", "pathlib.Path.unlink")])
def test_every_step_is_on_the_disk_before_it_is_taken(shelf, monkeypatch, link, call):
    for name in "abc":
        shelf.put(f"{name}.safetensors")
    synced, taken = [], []
    real_sync, (module, name) = os.fsync, call.rsplit(".", 1)
    real = getattr(os if module == "os" else type(shelf.folder), name)

    def sync(descriptor):
        real_sync(descriptor)
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink())

    def take(path, *rest, **options):
        if str(path).startswith(str(shelf.folder)) and not path.name.startswith("."):
            assert synced[-1].name == "0001.jsonl"
            taken.append(json.loads(synced[-1].read_text().splitlines()[-1])["path"])
        return real(path, *rest, **options)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(call, take)
    dedupe(shelf, link)
    assert taken == [str(shelf.folder / f"{name}.safetensors") for name in "bc"]


def test_one_at_a_time(shelf, shell):
    shelf.put("a.safetensors")
    shelf.put("b.safetensors")
    with journal.exclusive():
        with pytest.raises(TargetLocked, match="Another dedupe"):
            dedupe(shelf)
        shell.refused("TargetLocked", 4, "library", "undo")
        assert len(only(mk.dedupe_vaes([shelf.folder])).replaced) == 1  # telling needs no lock
    assert len(only(dedupe(shelf)).replaced) == 1


def test_a_cancel_ends_between_files_and_what_is_done_can_be_undone(shelf, monkeypatch):
    for name in "abcd":
        shelf.put(f"{name}.safetensors")
    before = shelf.state()
    token = mk.CancelToken()
    monkeypatch.setattr(os, "link", lambda *paths, real=os.link: (real(*paths), token.cancel()))
    with pytest.raises(Cancelled):
        dedupe(shelf, cancel=token)
    assert shelf.left() == []
    assert (shelf.folder / "a.safetensors").stat().st_nlink == 2
    assert len(mk.undo_dedupe().restored) == 1
    assert shelf.state() == before


# --- disks and folders --------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path_factory):
    """Makes small file systems of their own; needs root, and what makes them."""
    made = []

    def mount(*command):
        folder = tmp_path_factory.mktemp("disk")
        if os.geteuid() != 0 or subprocess.run([*command, folder], capture_output=True).returncode:
            pytest.skip("cannot mount a file system here")
        made.append(folder)
        return folder

    yield mount
    for folder in made:
        subprocess.run(["umount", "-l", folder], check=True)


def tmpfs(disk):
    return disk("mount", "-t", "tmpfs", "-o", "size=8m", "none")


@pytest.mark.parametrize("link", ["hard", "reflink"])
def test_another_disk_is_refused_by_file(shelf, disk, link):
    kept, small = shelf.put("a.safetensors"), tmpfs(disk)
    far = shutil.copy2(kept, small / "far.safetensors")
    told = list(reasons(mk.dedupe_vaes([shelf.folder, small], link=link)).values())
    assert told == ["it is on another disk than the kept file"]
    one = shelf.put("b.safetensors")
    report = mk.dedupe_vaes([shelf.folder, small], link=link)
    assert (only(report).kept, only(report).replaced) == (kept, (one,))
    assert [each.path for each in only(report).skipped] == [far]
    near = shutil.copy2(kept, small / "near.safetensors")
    report = mk.dedupe_vaes([shelf.folder, small], link=link)  # one is kept on each
    assert {group.replaced for group in report.groups} == {(one,), (near,)}
    assert len(only(mk.dedupe_vaes([shelf.folder, small], link="sym")).replaced) == 3
    if link == "hard":
        mk.dedupe_vaes([shelf.folder, small], apply=True)
        assert [path.stat().st_nlink for path in (kept, one, far, near)] == [2, 2, 2, 2]
        assert len(mk.undo_dedupe().restored) == 2


def test_a_read_only_disk_is_told(shelf, disk, shell):
    small = tmpfs(disk)
    for name in "ab":
        shutil.copy2(shelf.put("a.safetensors"), small / f"{name}.safetensors")
    subprocess.run(["mount", "-o", "remount,ro", small], check=True)
    for arguments in ([], ["--apply"]):
        error = shell.refused("NotWritable", 4, "vae", "dedupe", small, *arguments)
        assert "its folder cannot be written to" in error["details"][0]


def test_a_file_of_another_user_is_left(shelf, monkeypatch):
    shelf.put("a.safetensors")
    shelf.put("b.safetensors")
    mk.list_vaes([shelf.folder])
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert reasons(dedupe(shelf)) == {"b.safetensors": "it belongs to another user"}


def test_reflinks(shelf, disk, tmp_path_factory):
    image = tmp_path_factory.mktemp("image") / "btrfs"
    image.touch()
    os.truncate(image, 128 << 20)
    if not shutil.which("mkfs.btrfs") or subprocess.run(["mkfs.btrfs", "-q", image], capture_output=True).returncode:
        pytest.skip("no file system with reflinks here")
    folder = disk("mount", "-o", "loop", image)
    kept, one = folder / "a.safetensors", folder / "b.safetensors"
    for path in (kept, one):
        path.write_bytes(shelf.put(path.name).read_bytes())
    one.chmod(0o640)
    os.utime(one, ns=(1, 10**18))
    os.sync()
    assert only(mk.dedupe_vaes([folder], link="reflink")).replaced == (one,)
    report = mk.dedupe_vaes([folder], link="reflink", apply=True)
    assert only(report).replaced == (one,)
    status = one.stat()
    assert (status.st_mode & 0o777, status.st_mtime_ns, status.st_nlink) == (0o640, 10**18, 1)
    assert one.read_bytes() == kept.read_bytes()
    assert only(mk.dedupe_vaes([folder], link="reflink")).linked == (one,)
    assert mk.undo_dedupe().restored == (one,)
    assert only(mk.dedupe_vaes([folder], link="reflink")).replaced == (one,)
    assert one.stat().st_mtime_ns == 10**18
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_no_reflinks_is_told(shelf, disk):
    small = tmpfs(disk)
    for name in "ab":
        shutil.copy2(shelf.put("a.safetensors"), small / f"{name}.safetensors")
    with pytest.raises(NotWritable, match="No file can be replaced by a link") as caught:
        mk.dedupe_vaes([small], link="reflink", apply=True)
    assert "this file system has no reflinks" in caught.value.details[0]
    assert sorted(path.name for path in small.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_only_linux_has_reflinks(shelf, monkeypatch):
    monkeypatch.setattr(reflink, "AVAILABLE", False)
    with pytest.raises(UsageError, match="Only Linux"):
        mk.dedupe_vaes([shelf.folder], link="reflink")


def test_a_journal_that_cannot_be_kept_stops_it_before_anything(shelf, monkeypatch):
    shelf.put("a.safetensors")
    shelf.put("b.safetensors")
    before = story.state(shelf.folder)
    mk.list_vaes([shelf.folder])
    journal._folder().write_text("in the way")
    with pytest.raises(MergekitError, match="cannot be kept here"):
        dedupe(shelf)
    assert story.state(shelf.folder) == before
