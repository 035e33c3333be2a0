"""The commands of the library, as a user calls them."""

from __future__ import annotations

import os
from pathlib import Path

import models
import pytest
import story
import torch

import mergekit_sd as mk

POSIX = pytest.mark.skipif(os.name == "nt", reason="needs POSIX")


@pytest.fixture(autouse=True)
def data(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MERGEKIT_SD_DATA", str(tmp_path_factory.mktemp("data")))
    monkeypatch.setattr("mergekit_sd.library.scan.model_folders", list)


@pytest.fixture
def shell(capsys):
    return story.Shell(capsys)


@pytest.fixture
def shelf(tmp_path_factory, tmp_path):
    return story.room(tmp_path_factory, tmp_path, recipe=None).resolve()


def test_scan_tells_what_is_new(shell, shelf):
    out, err = shell("library", "scan", shelf)
    assert "4 files in 1 folder: 4 new\n4 files hashed" in out
    assert err == ""
    assert shell("library", "scan", shelf)[0] == "4 files in 1 folder: nothing new\n"
    (shelf / "base.safetensors").unlink()
    assert shell("library", "scan")[0] == "3 files in 1 folder: 1 gone\n"
    report = shell.json("library", "scan", shelf)
    assert (report["files"], report["new"], report["hashed"], report["notes"]) == (3, 0, 0, [])
    assert report["folders"] == [str(shelf)]


def test_scan_tells_what_cannot_be_read(shell, shelf):
    for number in range(25):
        (shelf / f"page{number:02}.ckpt").write_text("<html>")
    out, _ = shell("library", "scan", shelf)
    assert "25 files cannot be read:" in out
    assert "page19.ckpt\n    This is an HTML page" in out
    assert "page20.ckpt" not in out
    assert "… and 5 more" in out
    assert len(shell.json("library", "scan", shelf)["unreadable"]) == 25


def test_scan_refuses_what_is_no_folder(shell, shelf):
    shell.refused("UsageError", 2, "library", "scan", shelf / "nowhere")
    shell.refused("UsageError", 2, "library", "scan")
    assert "Invalid value" in shell("library", "scan", "--hash", "some", shelf, code=2)[1]


def test_scan_with_json_tells_progress_as_lines(shell, shelf):
    _, err = shell("library", "scan", shelf, "--json")
    assert '"event": "hashing_started"' in err
    assert '"event": "file"' not in err


def test_a_stop_ends_with_130_and_keeps_what_was_done(shell, shelf, monkeypatch):
    real = mk.scan_library

    def stopped(folders, *, on_event, cancel, **options):
        def listen(event):
            on_event(event)
            if isinstance(event, mk.FileHashed):
                cancel.cancel()

        return real(folders, on_event=listen, cancel=cancel, **options)

    monkeypatch.setattr("mergekit_sd.library.scan_library", stopped)
    shell("library", "scan", shelf, code=130)
    assert len(shell.json("library", "list")["files"]) == 4


def test_list_finds_and_sorts(shell, shelf):
    models.write(shelf / "z-vae.safetensors", models.vae_file(), {"modelspec.title": "Kobold"})
    (shelf / "bad.ckpt").write_text("<html>")
    shell("library", "scan", shelf, "--hash", "none")
    out, _ = shell("library", "list")
    lines = out.splitlines()
    assert lines[0] == f"{shelf}:"
    assert [line.split()[0] for line in lines[1:-1]][-1] == "z-vae.safetensors"
    assert lines[-1].startswith("6 files, ")

    def names(*arguments):
        return [Path(each["path"]).name for each in shell.json("library", "list", *arguments)["files"]]

    assert names("--kind", "vae") == names("kobold") == names("Z-VAE", "safetensors") == ["z-vae.safetensors"]
    assert names("--kind", "unreadable") == ["bad.ckpt"]
    assert names("sd1", "checkpoint", "anime") == ["anime.safetensors"]
    assert names("--sort", "size")[-1] == "bad.ckpt"
    assert names("--sort", "date")[0] == "bad.ckpt"
    assert names("--sort", "kind")[-1] == "z-vae.safetensors"
    assert names("nothing like it") == []
    assert "Scan first" in shell("library", "list", "nothing like it")[1]


def test_tables_fit_and_names_are_escaped(shell, shelf, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    folder = shelf / ("deep-" * 12) / "x"
    folder.mkdir(parents=True)
    for name in ("short", "long-" * 30, "a\x1b[31mb"):
        models.write(folder / f"{name}.safetensors", {"emb_params": torch.zeros(1, 8)}, {"modelspec.title": "\x1b[2J"})
    shell("library", "scan", shelf)
    out, _ = shell("library", "list")
    assert "\x1b" not in out
    assert "a\\x1b[31mb.safetensors" in out
    assert max(map(len, out.splitlines()[1:])) <= 80
    assert f"…{os.sep}short.safetensors" in out or f"…{os.sep}x{os.sep}short.safetensors" in out
    assert "\x1b" not in shell("library", "show", folder / "a\x1b[31mb.safetensors")[0]
    assert "\x1b" not in shell("library", "duplicates")[0]


def test_duplicates_are_told_with_what_they_take(shell, shelf):
    (shelf / "copy.safetensors").write_bytes((shelf / "base.safetensors").read_bytes())
    shell(
        "extract", shelf / "anime.safetensors", "--component", "vae", "-o", shelf / "v.safetensors", "--dtype", "fp32"
    )
    shell("library", "scan", shelf)
    out, err = shell("library", "duplicates")
    assert "Equal files: 1 group, 2 files, " in out
    assert f"could be saved\n    {shelf / 'base.safetensors'}\n    {shelf / 'copy.safetensors'}\n" in out
    assert (
        "The same VAE in files that differ: 1 group, 6 files\n  in 6 files, 5 of them different, " in out
    )  # the demo's
    assert err == ""
    report = shell.json("library", "duplicates", shelf)
    assert report["saves"] == (shelf / "copy.safetensors").stat().st_size
    assert report["components"][0]["component"] == "vae"
    assert report["components"][0]["copies"] == 5
    assert {str(shelf / "anime.safetensors"), str(shelf / "v.safetensors")} < set(report["components"][0]["files"])


def test_links_are_told_from_copies(shell, shelf):
    (shelf / "copy.safetensors").write_bytes((shelf / "base.safetensors").read_bytes())
    (shelf / "link.safetensors").hardlink_to(shelf / "base.safetensors")
    shell("library", "scan", shelf)
    out, _ = shell("library", "duplicates")
    assert "Equal files: 1 group, 3 files, " in out
    assert "\n  3 files, 2 on the disk, " in out


def test_duplicates_tell_what_they_do_not_know(shell, shelf):
    assert shell("library", "duplicates")[0] == "Nothing is there twice.\n"
    shell("library", "scan", shelf, "--hash", "none")
    assert "4 files left out, not hashed yet" in shell("library", "duplicates")[1]
    shell("library", "scan", shelf)
    (shelf / "base.safetensors").unlink()
    assert "1 file left out, changed since the scan" in shell("library", "duplicates")[1]
    shell.refused("UsageError", 2, "library", "duplicates", shelf / "nowhere")


def test_long_groups_are_cut(shell, shelf):
    for number in range(15):
        models.write(shelf / f"{number:02}.safetensors", {"emb_params": torch.zeros(1, 8)})
    shell("library", "scan", shelf)
    out, _ = shell("library", "duplicates")
    assert "09.safetensors" in out
    assert "10.safetensors" not in out
    assert "… and 5 more" in out


def test_show_tells_what_is_known(shell, shelf):
    path = shelf / "base.safetensors"
    (shelf / "base.png").touch()
    before = shell("library", "show", path)[0]
    assert "sd1 checkpoint, safetensors" in before
    assert "content" not in before
    assert str(shelf / "base.png") in before
    (shelf / "copy.safetensors").write_bytes(path.read_bytes())
    shell("library", "scan", shelf)
    out, _ = shell("library", "show", path)
    assert "weights:unet" in out
    assert f"the same file:\n    {shelf / 'copy.safetensors'}" in out
    report = shell.json("library", "show", path)
    assert report["sidecars"] == [str(shelf / "base.png")]
    assert report["also_in"]["content"] == [str(shelf / "copy.safetensors")]
    assert report["hashes"]["content"]
    error = shell.refused("MissingInput", 3, "library", "show", shelf / "bas.safetensors")
    assert "base.safetensors" in error["hint"]
    (shelf / "page.ckpt").write_text("<html>")
    shell.refused("WrongFormat", 3, "library", "show", shelf / "page.ckpt")


def test_rename_tells_each_file(shell, shelf):
    (shelf / "base.yaml").touch()
    out, _ = shell("library", "rename", shelf / "base.safetensors", "start")
    assert out == "base.safetensors -> start.safetensors\nbase.yaml -> start.yaml\n"
    assert "this name already" in shell("library", "rename", shelf / "start.safetensors", "start")[1]
    report = shell.json("library", "rename", shelf / "start.safetensors", "base")
    assert report["renamed"][0] == {"from": str(shelf / "start.safetensors"), "to": str(shelf / "base.safetensors")}
    shell.refused("OutputExists", 2, "library", "rename", shelf / "base.safetensors", "anime")
    shell.refused("UsageError", 2, "library", "rename", shelf / "base.safetensors", "a/b")
    shell.refused("MissingInput", 3, "library", "rename", shelf / "none.safetensors", "x")


def test_folders_are_listed_with_the_reason(shell, shelf, monkeypatch):
    found = [mk.ModelFolder(shelf, "vae", "ComfyUI in \x1b"), mk.ModelFolder(shelf / "x", None, "root webui")]
    monkeypatch.setattr("mergekit_sd.library.model_folders", lambda: found)
    out, _ = shell("library", "folders")
    assert out.splitlines()[0] == "ComfyUI in \\x1b"
    assert out.splitlines()[1].split() == ["vae", str(shelf)]
    listed = shell.json("library", "folders")["folders"]
    assert listed[1] == {"path": str(shelf / "x"), "kind": None, "why": "root webui"}
    monkeypatch.setattr("mergekit_sd.library.model_folders", list)
    assert "roots add NAME DIR" in shell("library", "folders")[1]


@pytest.mark.parametrize("command", ["scan", "folders", "list", "duplicates", "show", "rename"])
def test_every_command_has_help_that_fits(shell, command):
    out, _ = shell("library", command, "--help")
    assert max(map(len, out.splitlines())) <= 80


def test_a_library_that_is_too_new_is_refused(shell, shelf):
    import sqlite3

    shell("library", "scan", shelf)
    connection = sqlite3.connect(mk.library_file())
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    for command in (["scan", shelf], ["list"], ["duplicates"], ["show", shelf / "base.safetensors"]):
        shell.refused("EnvironmentFault", 4, "library", *command)


def test_listing_needs_no_torch(shell, shelf):
    import subprocess
    import sys

    shell("library", "scan", shelf)
    code = "import sys\nfrom mergekit_sd.cli.main import run\n"
    code += f"assert run(['library', 'list']) == run(['library', 'scan', {str(shelf)!r}]) == 0\n"
    code += "assert not {'torch', 'numpy', 'yaml'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
