"""`vae dedupe`: what is replaced by what, and what is left alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import models
import pytest
import story
from vae_files import POSIX, inode, make_shelf

import mergekit_sd as mk
from mergekit_sd.errors import Cancelled, MergekitError, NotWritable, TargetLocked, UsageError
from mergekit_sd.formats.claims import TEMPORARY_SUFFIX
from mergekit_sd.library import dedupe, journal, published, replacing
from mergekit_sd.library.published import Published

pytestmark = POSIX

LINKS = ["hard", "sym", "delete"]


@pytest.fixture
def shelf(tmp_path, tmp_path_factory):
    return make_shelf(tmp_path, tmp_path_factory)


@pytest.fixture
def shell(capsys):
    return story.Shell(capsys)


def run(shelf, link="hard", **options):
    return mk.dedupe_vaes([shelf.folder], link=link, apply=True, **options)


def only(report):
    """The one group of a report."""
    (group,) = report.groups
    return group


def reasons(report):
    return {each.path.name: each.reason for group in report.groups for each in group.skipped}


# --- what is done -------------------------------------------------------------------------------------


def test_nothing_is_touched_unless_asked(shelf):
    shelf.put("a.safetensors")
    shelf.put("sub/b.safetensors")
    before = story.state(shelf.folder)
    for link in LINKS:
        report = mk.dedupe_vaes([shelf.folder], link=link)
        assert (report.applied, report.run, len(only(report).replaced)) == (False, None, 1)
        assert report.saves == (shelf.folder / "a.safetensors").stat().st_size
    assert story.state(shelf.folder) == before
    assert mk.dedupe_runs() == []
    assert not journal._folder().exists()


def test_hard_links(shelf):
    kept, one, two = (shelf.put(f"{name}.safetensors") for name in ("a", "b", "sub/c"))
    other = shelf.put("other.safetensors", 1)
    report = run(shelf)
    assert inode(kept) == inode(one) == inode(two) != inode(other)
    assert only(report).replaced == (one, two)
    assert report.saves == 2 * kept.stat().st_size
    again = run(shelf)
    assert (again.run, again.saves, only(again).replaced, only(again).linked) == (None, 0, (), (one, two))
    assert shelf.left() == []


def test_symlinks_are_relative(shelf):
    kept, one = shelf.put("a.safetensors"), shelf.put("sub/deep/b.safetensors")
    run(shelf, "sym")
    assert one.readlink() == Path("..", "..", "a.safetensors")
    assert kept.is_file()
    assert not kept.is_symlink()
    shelf.folder.rename(shelf.folder.with_name("moved"))
    assert (shelf.folder.with_name("moved") / "sub/deep/b.safetensors").is_file()


def test_delete_keeps_one_and_names_what_stays_beside(shelf, shell):
    kept, one = shelf.put("a.safetensors"), shelf.put("sub/b.safetensors")
    for name in ("a.png", "a.txt", "sub/b.png"):
        (shelf.folder / name).write_text("x")
    report = shell.json("vae", "dedupe", shelf.folder, "--link", "delete", "--apply")
    assert report["groups"][0]["replaced"] == [{"path": str(one), "sidecars": [str(one.with_suffix(".png"))]}]
    assert sorted(path.name for path in shelf.folder.rglob("*")) == ["a.png", "a.safetensors", "a.txt", "b.png", "sub"]
    assert kept.is_file()


@pytest.mark.parametrize("link", LINKS)
def test_the_index_follows_without_reading(shelf, link):
    shelf.put("a.safetensors")
    shelf.put("b.safetensors")
    run(shelf, link)
    started = []
    found = mk.list_vaes([shelf.folder], on_event=lambda event: started.append(event.kind))
    assert "hashing_progress" not in started
    assert [len(group.entries) for group in found.groups] == [1 if link == "delete" else 2]


# --- which one is kept --------------------------------------------------------------------------------


def test_the_kept_one_is_chosen_by_what_is_beside_it_its_name_and_its_path(shelf, monkeypatch):
    shelf.put("b.safetensors")
    shelf.put("a.safetensors")

    def kept():
        group = only(mk.dedupe_vaes([shelf.folder]))
        return group.kept.relative_to(shelf.folder).as_posix(), group.why

    assert kept() == ("a.safetensors", "first by name")
    shelf.put("c.ckpt")
    assert kept() == ("c.ckpt", "shortest path")
    shelf.put("old/Famous-v2.safetensors")
    sha256 = only(mk.dedupe_vaes([shelf.folder])).sha256
    monkeypatch.setattr(published, "published", lambda: {sha256: Published("famous", "vae")})
    assert kept() == ("old/Famous-v2.safetensors", "published name")
    (shelf.folder / "b.png").write_text("x")
    assert kept() == ("b.safetensors", "most files beside it")


# --- what is left alone -------------------------------------------------------------------------------


def test_other_bytes_and_checkpoints_are_told_and_left(shelf):
    tensors = models.vae_file(0)
    shelf.put("a.safetensors")
    models.write(shelf.folder / "noted.safetensors", tensors, {"note": "other bytes"})
    models.write(shelf.folder / "full.safetensors", {name: each.float() for name, each in tensors.items()})
    baked = models.checkpoint("sd1", 1) | {models.VAE + name: each for name, each in tensors.items()}
    models.write(shelf.folder / "one.safetensors", baked)
    shutil.copy(shelf.folder / "one.safetensors", shelf.folder / "two.safetensors")  # checkpoints, equal to the byte
    before = story.state(shelf.folder)
    report = run(shelf)
    assert story.state(shelf.folder) == before
    assert report.groups == ()
    (group,) = report.other_bytes
    assert [entry.path.stem for entry in group.files] == ["a", "full", "noted"]


def test_links_are_not_touched_nor_followed_out(shelf, tmp_path):
    kept = shelf.put("a.safetensors")
    outside = tmp_path / "outside"
    outside.mkdir()
    shutil.copy(kept, outside / "o.safetensors")
    (shelf.folder / "away").symlink_to(outside)
    (shelf.folder / "out.safetensors").symlink_to(outside / "o.safetensors")
    (shelf.folder / "in.safetensors").symlink_to("a.safetensors")
    os.link(kept, shelf.folder / "hard.safetensors")
    twin = shelf.put("twin.safetensors")
    before = story.state(shelf.folder), story.state(outside)
    for link in LINKS:
        report = mk.dedupe_vaes([shelf.folder], link=link)
        group = only(report)
        assert (group.kept, group.replaced) == (kept, (twin,))
        assert {path.name for path in group.linked} == {"in.safetensors", "hard.safetensors"}
        assert reasons(report) == dict.fromkeys(("o.safetensors", "out.safetensors"), "it is reached through a link")
    assert (story.state(shelf.folder), story.state(outside)) == before
    run(shelf, "sym")
    assert (shelf.folder / "in.safetensors").readlink() == Path("a.safetensors")
    assert twin.readlink() == Path("a.safetensors")
    assert story.state(outside) == before[1]


def test_what_is_saved_counts_links_that_remain(shelf, tmp_path):
    shelf.put("a.safetensors")
    one = shelf.put("bb.safetensors")
    os.link(one, shelf.folder / "cc.safetensors")
    size = one.stat().st_size
    assert mk.dedupe_vaes([shelf.folder]).saves == size
    os.link(one, tmp_path / "elsewhere.safetensors")
    assert mk.dedupe_vaes([shelf.folder]).saves == 0


@pytest.mark.parametrize("link", ["hard", "sym"])
def test_other_permissions_are_not_lost(shelf, link):
    shelf.put("a.safetensors", mode=0o600)
    shelf.put("bb.safetensors", mode=0o644)
    report = run(shelf, link)
    assert reasons(report) == {"bb.safetensors": "its owner or permissions are not those of the kept file"}


def test_delete_leaves_what_others_need_under_its_name(shelf):
    shelf.put("a.safetensors")
    needed = {
        "model.vae.safetensors": "it is loaded with model.ckpt",
        "diffusers/diffusion_pytorch_model.safetensors": "the config.json beside it belongs to it",
        "target.safetensors": f"the link {shelf.folder / 'link.safetensors'} leads to it",
        "plain.safetensors": None,
    }
    for name in needed:
        shelf.put(name)
    (shelf.folder / "model.ckpt").write_bytes(b"x")
    (shelf.folder / "diffusers/config.json").write_text("{}")
    (shelf.folder / "link.safetensors").symlink_to("target.safetensors")
    report = run(shelf, "delete")
    assert only(report).kept.name == "target.safetensors"  # the shortest path of those that must stay
    assert only(report).why == "shortest path"
    assert {path.name for path in only(report).replaced} == {"a.safetensors", "plain.safetensors"}
    names = ("model.vae.safetensors", "diffusers/diffusion_pytorch_model.safetensors")
    assert reasons(report) == {name.split("/")[-1]: needed[name] for name in names}
    (shelf.folder / "link.safetensors").unlink()
    shelf.put("a.safetensors")
    assert needed["target.safetensors"] not in reasons(run(shelf, "delete")).values()


def test_delete_leaves_what_a_former_symlink_leads_to(shelf, tmp_path):
    """The symlink lies in a folder that is not looked into this time."""
    kept = shelf.put("in/kept.safetensors")
    shelf.put("outside/link.safetensors")
    run(shelf, "sym")
    assert only(mk.dedupe_vaes([shelf.folder / "in", shelf.folder])).kept == kept
    (shelf.folder / "in/b.safetensors").write_bytes(kept.read_bytes())
    (shelf.folder / "in/b.png").write_text("x")
    report = mk.dedupe_vaes([shelf.folder / "in"], link="delete", apply=True)
    assert only(report).kept == kept
    assert (shelf.folder / "outside/link.safetensors").is_file()


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
    assert reasons(run(shelf, link)) == {"b.safetensors": f"{whose} has changed meanwhile"}
    assert path.read_bytes() == b"new"
    assert shelf.left() == []
    assert mk.dedupe_runs() == []


@pytest.mark.parametrize("link", ["hard", "sym"])
def test_a_file_that_changes_at_the_last_moment_is_left(shelf, monkeypatch, link):
    shelf.put("a.safetensors")
    path = shelf.put("b.safetensors")
    meanwhile(monkeypatch, lambda: path.write_bytes(b"new"), "_make")
    assert reasons(run(shelf, link)) == {"b.safetensors": "it has changed meanwhile"}
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
    assert reasons(run(shelf, link)) == {"b.safetensors": "it is reached through a link by now"}
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
    assert reasons(run(shelf, link)) == {"b.safetensors": "its bytes are not those of the kept file"}
    assert one.read_bytes() == bytes(changed) != kept.read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has leases")
@pytest.mark.parametrize(("which", "whose"), [("a", "the kept file"), ("b", "it")])
def test_a_file_that_is_open_to_write_is_left(shelf, which, whose):
    for name in "ab":
        shelf.put(f"{name}.safetensors")
    with (shelf.folder / f"{which}.safetensors").open("r+b"):
        assert reasons(run(shelf)) == {"b.safetensors": f"another program has {whose} open to write"}
    with (shelf.folder / f"{which}.safetensors").open("rb"):
        assert len(only(run(shelf)).replaced) == 1


@pytest.mark.parametrize("link", ["hard", "sym"])
def test_a_temporary_name_of_another_is_left(shelf, link):
    shelf.put("a.safetensors")
    one = shelf.put("b.safetensors")
    foreign = one.with_name(f".b.safetensors.link{TEMPORARY_SUFFIX}")
    foreign.write_text("another's")
    with pytest.raises(NotWritable) as caught:
        run(shelf, link)
    assert "another run's" in caught.value.details[0]
    assert foreign.read_text() == "another's"
    assert one.stat().st_nlink == 1


def test_a_rerun_that_finds_all_linked_is_no_failure(shelf, monkeypatch):
    shelf.put("a.safetensors")
    one = shelf.put("b.safetensors")
    run(shelf)
    two = shelf.put("c.safetensors")
    monkeypatch.setattr(os, "access", lambda *_: False)
    report = run(shelf)
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
        run(shelf, link)
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
    run(shelf, link)
    assert taken == [str(shelf.folder / f"{name}.safetensors") for name in "bc"]


def test_one_at_a_time(shelf, shell):
    shelf.put("a.safetensors")
    shelf.put("b.safetensors")
    with journal.exclusive():
        with pytest.raises(TargetLocked, match="Another dedupe"):
            run(shelf)
        shell.refused("TargetLocked", 4, "library", "undo")
        assert len(only(mk.dedupe_vaes([shelf.folder])).replaced) == 1  # telling needs no lock
    assert len(only(run(shelf)).replaced) == 1


def test_a_cancel_ends_between_files_and_what_is_done_can_be_undone(shelf, monkeypatch):
    for name in "abcd":
        shelf.put(f"{name}.safetensors")
    before = shelf.state()
    token = mk.CancelToken()
    monkeypatch.setattr(os, "link", lambda *paths, real=os.link: (real(*paths), token.cancel()))
    with pytest.raises(Cancelled):
        run(shelf, cancel=token)
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
    assert reasons(run(shelf)) == {"b.safetensors": "it belongs to another user"}


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
    monkeypatch.setattr(dedupe.reflink, "AVAILABLE", False)
    with pytest.raises(UsageError, match="Only Linux"):
        mk.dedupe_vaes([shelf.folder], link="reflink")


def test_a_journal_that_cannot_be_kept_stops_it_before_anything(shelf, monkeypatch):
    shelf.put("a.safetensors")
    shelf.put("b.safetensors")
    before = story.state(shelf.folder)
    mk.list_vaes([shelf.folder])
    journal._folder().write_text("in the way")
    with pytest.raises(MergekitError, match="cannot be kept here"):
        run(shelf)
    assert story.state(shelf.folder) == before


# --- words --------------------------------------------------------------------------------------------


def test_the_report_reads_well(shelf, shell, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("a", "sub/b", "long-" * 30, "model.vae"):
        shelf.put(f"{name}.safetensors")
    (shelf.folder / "model.ckpt").write_text("x")
    models.write(shelf.folder / "full.safetensors", models.vae_file(0, "fp32"))
    (shelf.folder / "sub/b.png").write_text("x")
    out, _ = shell("vae", "dedupe", shelf.folder, "--link", "delete")
    assert max(map(len, out.splitlines()[1:])) <= 80
    for words in (
        f"Below {shelf.folder}:",
        "unnamed VAE, 4 equal files of 40.4 KiB",
        "  keep     model.vae.safetensors\n           chosen: must stay",
        "  delete   sub/b.safetensors\n           stays beside it: b.png",
        "3 files would be deleted, 121.1 KiB saved. Nothing is done yet: add --apply",
    ):
        assert words in out
    out, _ = shell("vae", "dedupe", shelf.folder, "--apply")
    assert "3 files are hard links now, 121.1 KiB saved\nTo undo it: mergekit-sd library undo 1\n" in out
    assert "  linked   a.safetensors" in shell("vae", "dedupe", shelf.folder)[0]
    assert "There is nothing to replace." in shell("vae", "dedupe", shelf.folder)[0]


def test_other_bytes_are_shown_once_each(shelf, shell):
    for name in "ab":
        shelf.put(f"{name}.safetensors")
    models.write(shelf.folder / "noted.safetensors", models.read(shelf.folder / "a.safetensors"), {"a": "note"})
    out, _ = shell("vae", "dedupe", shelf.folder)
    told = out.split("not touched\n")[1].splitlines()[1:-1]
    assert told == ["  F16      a.safetensors", "  F16      noted.safetensors"]
