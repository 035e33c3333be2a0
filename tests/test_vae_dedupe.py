"""`vae dedupe`: what is replaced by what, and what is left alone."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import models
import pytest
import story
from vae_files import POSIX, dedupe, inode, make_shelf, only, reasons

import mergekit_sd as mk
from mergekit_sd.library import journal, published
from mergekit_sd.library.published import Published

pytestmark = POSIX

LINKS = ["hard", "sym", "delete"]


@pytest.fixture
def shelf(tmp_path, tmp_path_factory):
    return make_shelf(tmp_path, tmp_path_factory)


@pytest.fixture
def shell(capsys):
    return story.Shell(capsys)


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
    report = dedupe(shelf)
    assert inode(kept) == inode(one) == inode(two) != inode(other)
    assert only(report).replaced == (one, two)
    assert report.saves == 2 * kept.stat().st_size
    again = dedupe(shelf)
    assert (again.run, again.saves, only(again).replaced, only(again).linked) == (None, 0, (), (one, two))
    assert shelf.left() == []


def test_symlinks_are_relative(shelf):
    kept, one = shelf.put("a.safetensors"), shelf.put("sub/deep/b.safetensors")
    dedupe(shelf, "sym")
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
    dedupe(shelf, link)
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
    report = dedupe(shelf)
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
    dedupe(shelf, "sym")
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
    report = dedupe(shelf, link)
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
    report = dedupe(shelf, "delete")
    assert only(report).kept.name == "target.safetensors"  # the shortest path of those that must stay
    assert only(report).why == "shortest path"
    assert {path.name for path in only(report).replaced} == {"a.safetensors", "plain.safetensors"}
    names = ("model.vae.safetensors", "diffusers/diffusion_pytorch_model.safetensors")
    assert reasons(report) == {name.split("/")[-1]: needed[name] for name in names}
    (shelf.folder / "link.safetensors").unlink()
    shelf.put("a.safetensors")
    assert needed["target.safetensors"] not in reasons(dedupe(shelf, "delete")).values()


def test_delete_leaves_what_a_former_symlink_leads_to(shelf, tmp_path):
    """The symlink lies in a folder that is not looked into this time."""
    kept = shelf.put("in/kept.safetensors")
    shelf.put("outside/link.safetensors")
    dedupe(shelf, "sym")
    assert only(mk.dedupe_vaes([shelf.folder / "in", shelf.folder])).kept == kept
    (shelf.folder / "in/b.safetensors").write_bytes(kept.read_bytes())
    (shelf.folder / "in/b.png").write_text("x")
    report = mk.dedupe_vaes([shelf.folder / "in"], link="delete", apply=True)
    assert only(report).kept == kept
    assert (shelf.folder / "outside/link.safetensors").is_file()


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
    assert "3 files are hard-linked now, 121.1 KiB saved\nTo undo it: mergekit-sd library undo 1\n" in out
    assert "  linked   a.safetensors" in shell("vae", "dedupe", shelf.folder)[0]
    assert "There is nothing to replace." in shell("vae", "dedupe", shelf.folder)[0]


def test_other_bytes_are_shown_once_each(shelf, shell):
    for name in "ab":
        shelf.put(f"{name}.safetensors")
    models.write(shelf.folder / "noted.safetensors", models.read(shelf.folder / "a.safetensors"), {"a": "note"})
    out, _ = shell("vae", "dedupe", shelf.folder)
    told = out.split("not touched\n")[1].splitlines()[1:-1]
    assert told == ["  F16      a.safetensors", "  F16      noted.safetensors"]
