"""`vae list`: equal VAEs meet in every container and dtype, baked in or not."""

from __future__ import annotations

import hashlib

import models
import pytest
import story
import torch
from vae_files import make_shelf

import mergekit_sd as mk
from mergekit_sd.errors import Cancelled, UsageError
from mergekit_sd.library import published
from mergekit_sd.library.published import Published


@pytest.fixture
def shelf(tmp_path, tmp_path_factory):
    return make_shelf(tmp_path, tmp_path_factory)


@pytest.fixture
def shell(capsys):
    return story.Shell(capsys)


@pytest.fixture
def mixed(shelf):
    """One VAE in float32 as a .ckpt, in float16, and baked in; another with one value changed; one baked in alone."""
    half = models.vae_file(7)
    torch.save({"state_dict": {name: each.float() for name, each in half.items()}}, shelf.folder / "full.ckpt")
    models.write(shelf.folder / "half.safetensors", half)
    baked = models.checkpoint("sd1", 1) | {models.VAE + name: each for name, each in half.items()}
    models.write(shelf.folder / "baked.safetensors", baked)
    name = next(iter(half))
    changed = half | {name: half[name].clone()}
    changed[name].view(-1)[0] += 1
    models.write(shelf.folder / "changed.safetensors", changed)
    models.write(shelf.folder / "other.safetensors", models.checkpoint("sd1", 2))
    return shelf.folder


def names(found):
    return [[entry.path.name for entry in group.entries] for group in found.groups]


def test_equal_weights_are_one_group(mixed):
    found = mk.list_vaes([mixed])
    assert names(found) == [
        ["baked.safetensors", "full.ckpt", "half.safetensors"],
        ["changed.safetensors"],
        ["other.safetensors"],
    ]
    assert [entry.path.name for entry in found.groups[0].files] == ["full.ckpt", "half.safetensors"]
    assert found.groups[0].hash == mk.inspect_file(mixed / "half.safetensors", hashes=True).weights_hashes["vae"]


def test_json_holds_the_contract(mixed, shell):
    report = shell.json("vae", "list", mixed)
    group, *alone = report["groups"]
    assert group["files"] == [str(mixed / name) for name in ("baked.safetensors", "full.ckpt", "half.safetensors")]
    assert group["name"] is None
    assert len(group["hash"]) == 32
    assert [each["kind"] for each in group["members"]] == ["checkpoint", "vae", "vae"]
    assert group["members"][1]["size"] == (mixed / "full.ckpt").stat().st_size
    assert [len(each["files"]) for each in alone] == [1, 1]
    assert report["unreadable"] == []


def test_a_published_vae_names_its_group_and_what_is_baked(mixed, monkeypatch):
    known = {hashlib.sha256((mixed / "half.safetensors").read_bytes()).hexdigest(): Published("famous", "vae")}
    monkeypatch.setattr(published, "published", lambda: known)
    assert [group.name for group in mk.list_vaes([mixed]).groups] == ["famous", None, None]
    (mixed / "sub").mkdir()
    (mixed / "baked.safetensors").rename(mixed / "sub" / "b.safetensors")
    assert [group.name for group in mk.list_vaes([mixed / "sub"]).groups] == ["famous"]  # from elsewhere in the index


def test_what_is_known_is_not_read_again(mixed):
    hashed = []

    def listen(event):
        if isinstance(event, mk.HashingStarted):
            hashed.append(event.files)

    mk.list_vaes([mixed], on_event=listen)
    assert hashed == [5, 3]  # the VAEs' weights; the whole of VAE files
    hashed.clear()
    mk.list_vaes([mixed], on_event=listen)
    assert hashed == []
    models.write(mixed / "changed.safetensors", models.vae_file(9))
    assert len(names(mk.list_vaes([mixed]))) == 3


def test_what_cannot_be_read_is_told(mixed, shell):
    (mixed / "bad.ckpt").write_text("<html>")
    assert [each["path"] for each in shell.json("vae", "list", mixed)["unreadable"]] == [str(mixed / "bad.ckpt")]
    assert "1 file cannot be read" in shell("vae", "list", mixed)[1]


def test_the_list_reads_well(mixed, shell, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    (mixed / ("deep" * 10)).mkdir()
    models.write(mixed / ("deep" * 10) / ("a\x1b" + "long" * 30 + ".safetensors"), models.vae_file(9))
    out, err = shell("vae", "list", mixed)
    assert err == ""
    assert "\x1b" not in out
    assert out.startswith(f"Below {mixed}:\nunnamed VAE, 3 files (")
    assert "  in a checkpoint " in out
    assert "  VAE F32 " in out
    assert out.endswith("4 different VAEs in 6 files\n")
    assert max(map(len, out.splitlines()[1:])) <= 80


def test_an_empty_folder_has_none(shelf, shell):
    assert shell("vae", "list", shelf.folder) == ("0 different VAEs in 0 files\n", "")
    assert shell.json("vae", "list", shelf.folder)["groups"] == []


def test_refusals(mixed, shell):
    shell.refused("UsageError", 2, "vae", "list", mixed / "nowhere")
    assert "Missing argument" in shell("vae", "list", code=2)[1]
    with pytest.raises(UsageError, match="No folder"):
        mk.list_vaes([])


def test_a_cancel_ends_it(mixed):
    token = mk.CancelToken()

    def listen(event):
        if isinstance(event, mk.FileHashed):
            token.cancel()

    with pytest.raises(Cancelled):
        mk.list_vaes([mixed], on_event=listen, cancel=token)
