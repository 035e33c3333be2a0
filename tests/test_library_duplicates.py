"""What is there twice: files, components in other containers and dtypes, and the names of published VAEs."""

from __future__ import annotations

import os

import models
import pytest

import mergekit_sd as mk
from mergekit_sd.errors import UsageError
from mergekit_sd.library import published
from mergekit_sd.library.published import Published

POSIX = pytest.mark.skipif(os.name == "nt", reason="needs POSIX")


@pytest.fixture(autouse=True)
def data(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MERGEKIT_SD_DATA", str(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def pieces():
    """Two checkpoints and a VAE in float32; its float16 copy, prefixed; and the first checkpoint with it baked in."""
    one, two, vae = models.checkpoint("sd1", 1), models.checkpoint("sd1", 2), models.vae_file(7, "fp32")
    half = {models.VAE + name: tensor.half() for name, tensor in vae.items()}
    return {"one": one, "two": two, "vae": vae, "half": half, "baked": one | half}


@pytest.fixture
def shelf(tmp_path, pieces):
    """`put(name, piece)` writes a file there."""

    def put(name, piece, metadata=None):
        path = tmp_path / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        return models.write(path, pieces[piece], metadata)

    put.folder = tmp_path
    return put


def named(groups):
    """Groups as component and sorted names."""
    return {(group.component, tuple(sorted(entry.path.stem for entry in group.entries))) for group in groups}


def test_equal_files_meet_whatever_their_metadata(shelf):
    one, two = shelf("a", "one"), shelf("b", "one", {"format": "pt", "a": "note"})
    shelf("c", "two")
    mk.scan_library([shelf.folder])
    found = mk.find_duplicates()
    assert named(found.files) == {(None, ("a", "b"))}
    assert found.components == ()
    assert found.saves == min(one.stat().st_size, two.stat().st_size) == found.files[0].repeated
    assert found.files[0].copies == 2


def test_components_meet_across_files_containers_and_dtypes(shelf, pieces):
    for name in ("one", "two", "vae", "half", "baked"):
        shelf(name, name)
    mk.scan_library([shelf.folder])
    found = mk.find_duplicates()
    assert found.files == ()
    assert named(found.components) == {
        ("vae", ("baked", "half", "vae")),
        ("unet", ("baked", "one")),
        ("text_encoder", ("baked", "one")),
    }
    sizes = [group.repeated for group in found.components]
    assert sizes == sorted(sizes, reverse=True)
    (vae,) = [group for group in found.components if group.component == "vae"]
    half = sum(tensor.nbytes for tensor in pieces["half"].values())
    assert (vae.copies, vae.repeated) == (3, 2 * half)  # one of float32, which could be kept, and two of half its size


def test_the_vaes_alone_are_enough_for_vaes(shelf):
    shelf("vae", "vae")
    shelf("baked", "baked")
    mk.scan_library([shelf.folder], hashes="vae")
    found = mk.find_duplicates()
    assert named(found.components) == {("vae", ("baked", "vae"))}
    assert found.unhashed == 2


def test_equal_files_are_no_equal_components_of_different_files(shelf):
    shelf("a", "vae")
    shelf("b", "vae")
    mk.scan_library([shelf.folder])
    assert mk.find_duplicates().components == ()
    shelf("c", "half")
    mk.scan_library([shelf.folder])
    (group,) = mk.find_duplicates().components
    assert (len(group.entries), group.copies) == (3, 2)


@POSIX
def test_links_are_one_file(shelf):
    path = shelf("a", "one")
    os.link(path, shelf.folder / "b.safetensors")
    (shelf.folder / "c.safetensors").symlink_to(path)
    mk.scan_library([shelf.folder])
    assert mk.find_duplicates().files == ()
    shelf("d", "one")
    mk.scan_library([shelf.folder])
    (group,) = mk.find_duplicates().files
    assert (len(group.entries), group.copies, group.repeated) == (4, 2, path.stat().st_size)


def test_some_folders_alone_can_be_asked_for(shelf):
    shelf("x/a", "vae")
    shelf("x/b", "vae")
    shelf("y/c", "vae")
    mk.scan_library([shelf.folder])
    assert named(mk.find_duplicates([shelf.folder / "x"]).files) == {(None, ("a", "b"))}
    assert mk.find_duplicates([str(shelf.folder / "y")]).files == ()
    with pytest.raises(UsageError):
        mk.find_duplicates([shelf.folder / "z"])


def test_what_is_not_as_it_was_scanned_does_not_count(shelf):
    shelf("a", "vae")
    shelf("b", "vae")
    shelf("c", "half")
    mk.scan_library([shelf.folder])
    shelf("b", "one")
    (shelf.folder / "c.safetensors").unlink()
    found = mk.find_duplicates()
    assert (found.files, found.components, found.changed) == ((), (), 2)


def test_published_vaes_have_their_names(shelf, monkeypatch):
    path = shelf("mine", "vae")
    shelf("baked", "baked")
    mk.scan_library([shelf.folder], sha256=True)
    sha256 = mk.look_up(path).hashes["sha256"]
    monkeypatch.setattr(published, "published", lambda: {sha256: Published("the VAE", "vae")})
    (group,) = mk.find_duplicates().components
    assert group.name == "the VAE"
    assert group.as_json()["name"] == "the VAE"
    monkeypatch.setattr(published, "published", lambda: {sha256: Published("a model", "checkpoint")})
    assert mk.find_duplicates().components[0].name is None


def test_the_list_of_published_files_is_sound():
    known = published.published()
    assert len(known) == 17
    assert known["735e4c3a447a3255760d7f86845f09f937809baa529c17370d83e4c3758f3c75"].name == "vae-ft-mse-840000"
    assert {entry.kind for entry in known.values()} == {"vae", "checkpoint"}
    assert all(len(sha256) == 64 and int(sha256, 16) for sha256 in known)


def test_where_else_a_file_and_its_parts_are(shelf):
    for name in ("one", "two", "vae", "baked"):
        shelf(name, name)
    shelf("copy", "one")
    mk.scan_library([shelf.folder])

    def also(name):
        others = mk.also_in(mk.look_up(shelf.folder / f"{name}.safetensors"))
        return {part: sorted(entry.path.stem for entry in every) for part, every in others.items()}

    assert also("one") == {"content": ["copy"], "unet": ["baked"], "text_encoder": ["baked"]}
    assert also("vae") == {"vae": ["baked"]}
    assert also("baked") == {"vae": ["vae"], "unet": ["copy", "one"], "text_encoder": ["copy", "one"]}
    assert also("two") == {}
