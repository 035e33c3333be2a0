"""The hashes that a scan makes, scans that are stopped or not alone, and how long a scan takes."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import models
import numpy as np
import pytest
import torch

import mergekit_sd as mk
from mergekit_sd.architectures import detect
from mergekit_sd.errors import Cancelled, InputChanged
from mergekit_sd.formats.hashing import LEAF, file_hashes, hash_file_tensors
from mergekit_sd.formats.open import open_model
from mergekit_sd.inspection import weights_hashes
from mergekit_sd.library import digests, scan
from mergekit_sd.library.entry import open_header


@pytest.fixture(autouse=True)
def data(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MERGEKIT_SD_DATA", str(tmp_path_factory.mktemp("data")))


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


# --- hashes -----------------------------------------------------------------------------------------------


def leafy(dtype, *sizes, seed=0):
    """A VAE whose first tensors have as many elements as told: leaves, and not quite."""
    tensors = models.vae_file(seed, dtype)
    rng = np.random.default_rng(seed)
    four_dimensional = [name for name, tensor in tensors.items() if tensor.ndim == 4]
    for name, size in zip(four_dimensional, sizes, strict=False):
        numbers = torch.from_numpy(rng.standard_normal(size).astype("float32"))
        tensors[name] = numbers.reshape(size, 1, 1, 1).to(models.DTYPES[dtype])
    return tensors


@pytest.mark.parametrize("dtype", ["fp16", "fp32", "bf16", "fp64", "fp8_e4m3fn"])
def test_hashes_are_those_of_the_other_commands(shelf, dtype):
    leaf = LEAF // 2
    path = models.write(shelf / "a.safetensors", leafy(dtype, 2 * leaf + 7, 2 * leaf, 1, leaf - 1))
    model = open_model(path)
    mk.scan_library([shelf], sha256=True, threads=3)
    found = dict(by_name()["a.safetensors"].hashes)
    files = file_hashes(path)
    assert (found.pop("sha256"), found.pop("autov1")) == (files.sha256, files.auto_v1)
    assert found.pop("autov3") == files.auto_v3
    assert found.pop("content") == hash_file_tensors(model)
    assert found == {"weights:vae": weights_hashes(model, detect(model.tensors))["vae"]}


@pytest.mark.parametrize("name", ["sd1-a", "sd1-b", "sd2-c", "sdxl-b"])
def test_every_component_is_hashed(library, shelf, name):
    os.link(library / f"{name}.safetensors", shelf / "a.safetensors")
    mk.scan_library([shelf])
    model = open_model(shelf / "a.safetensors")
    expected = {f"weights:{part}": value for part, value in weights_hashes(model, detect(model.tensors)).items()}
    assert by_name()["a.safetensors"].hashes == expected | {"content": hash_file_tensors(model)}
    assert len(expected) >= 3


def test_levels_read_what_they_must(library, shelf):
    os.link(library / "sd1-a.safetensors", shelf / "a.safetensors")
    tiny(shelf / "b.safetensors")
    assert mk.scan_library([shelf], hashes="none").hashed_bytes == 0
    report = mk.scan_library([shelf], hashes="vae")
    found = by_name()
    assert report.hashed == 1
    assert report.hashed_bytes == found["a.safetensors"].components["vae"]
    assert set(found["a.safetensors"].hashes) == {"weights:vae"}
    former = found["a.safetensors"].hashes
    report = mk.scan_library([shelf], hashes="all")
    assert report.hashed == 2
    assert by_name()["a.safetensors"].hashes.items() > former.items()
    assert mk.scan_library([shelf], hashes="vae").hashed == 0


def test_what_is_no_model_has_file_hashes_all_the_same(shelf):
    (shelf / "page.ckpt").write_text("<html>")
    mk.scan_library([shelf], sha256=True)
    assert by_name()["page.ckpt"].hashes["sha256"] == file_hashes(shelf / "page.ckpt").sha256
    assert mk.scan_library([shelf], sha256=True).hashed == 0
    assert by_name()["page.ckpt"].hashes["sha256"]


def test_files_without_tensors_are_hashed_too(shelf):
    models.write(shelf / "none.safetensors", {})
    models.write(shelf / "empty.safetensors", {"x": torch.zeros(0, 3)})
    report = mk.scan_library([shelf])
    assert (report.hashed, report.notes) == (2, [])
    for name in ("none", "empty"):
        model = open_model(shelf / f"{name}.safetensors")
        assert by_name()[f"{name}.safetensors"].content == hash_file_tensors(model)
    assert mk.scan_library([shelf]).hashed == 0


def test_headers_beyond_what_is_kept_are_opened_again(shelf, monkeypatch):
    monkeypatch.setattr(scan, "MOST_OPENED", 0)
    path = models.write(shelf / "a.safetensors", models.vae_file())
    mk.scan_library([shelf])
    assert by_name()["a.safetensors"].content == hash_file_tensors(open_model(path))


def transposed(tensor):
    """The same values, lying otherwise in memory."""
    return tensor.transpose(0, 1).contiguous().transpose(0, 1) if tensor.ndim > 1 else tensor


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_a_pickle_meets_its_safetensors(shelf, dtype):
    tensors = models.vae_file(3, dtype)
    models.write(shelf / "a.safetensors", tensors)
    torch.save({"state_dict": {name: transposed(tensor) for name, tensor in tensors.items()}}, shelf / "b.ckpt")
    mk.scan_library([shelf])
    found = by_name()
    assert found["b.ckpt"].hashes == found["a.safetensors"].hashes
    assert found["b.ckpt"].content == hash_file_tensors(open_model(shelf / "b.ckpt"))


def test_a_file_that_changes_while_it_is_read_has_no_hash(shelf):
    path = tiny(shelf / "a.safetensors")
    found = []
    wanted = [digests.Wanted(open_header(path))]
    digests.hash_files(wanted, lambda _, hashes: found.append(hashes), lambda _: os.utime(path, ns=(0, 10**18)))
    assert isinstance(found[0], InputChanged)


# --- being stopped, and not being alone ------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["token", "interrupt"])
@pytest.mark.parametrize("where", [mk.FileRead, mk.FileHashed])
def test_what_was_done_before_a_stop_is_kept(shelf, how, where):
    for number in range(6):
        tiny(shelf / f"{number}.safetensors", number)
    token, seen = mk.CancelToken(), []

    def stop(event):
        if isinstance(event, where):
            seen.append(event)
            if len(seen) == 3:
                if how == "interrupt":
                    raise KeyboardInterrupt
                token.cancel()

    with pytest.raises((Cancelled, KeyboardInterrupt)):
        mk.scan_library([shelf], on_event=stop, cancel=token)
    found = by_name()
    if where is mk.FileRead:
        assert len(found) == 3
    else:
        assert len(found) == 6
        assert sum(entry.content is not None for entry in found.values()) >= 3
    mk.scan_library([shelf])
    assert all(entry.content for entry in by_name().values())


def test_a_stop_is_heard_among_folders_without_models(shelf):
    for number in range(9):
        (shelf / f"{number}").mkdir()
    token = mk.CancelToken()
    token.cancel()
    with pytest.raises(Cancelled):
        mk.scan_library([shelf], cancel=token)


def test_a_stop_is_heard_within_a_file(shelf):
    models.write(shelf / "big.safetensors", {"x": torch.zeros(24 << 20, dtype=torch.uint8)})

    def stop(event):
        if isinstance(event, mk.HashingStarted):
            token.cancel()

    for options in ({"hashes": "all"}, {"hashes": "none", "sha256": True}):
        token = mk.CancelToken()
        with pytest.raises(Cancelled):
            mk.scan_library([shelf], on_event=stop, cancel=token, **options)
    assert by_name()["big.safetensors"].hashes == {}


def test_what_another_scan_has_hashed_meanwhile_is_taken(shelf):
    models.write(shelf / "a.safetensors", models.vae_file())

    def meddle(event):
        if isinstance(event, mk.HashingStarted):
            mk.scan_library([shelf])

    report = mk.scan_library([shelf], on_event=meddle)
    assert (report.hashed, report.hashed_bytes) == (1, 0)


SCAN = "import sys, mergekit_sd as mk; mk.scan_library([sys.argv[1]])"


def test_two_scans_at_once(shelf):
    for number in range(300):
        tiny(shelf / f"{number}.safetensors", number)
    running = [subprocess.Popen([sys.executable, "-c", SCAN, str(shelf)], stderr=subprocess.PIPE) for _ in range(3)]
    for process in running:
        assert process.communicate()[1] == b""
        assert process.returncode == 0
    found = by_name()
    assert len(found) == 300
    assert all(entry.content for entry in found.values())


# --- speed ----------------------------------------------------------------------------------------------------


def test_thousands_of_files_take_seconds(shelf):
    """5,000 headers in less than 10 s, and then 200 files a second's fifth; generous, for a busy machine."""
    whole = tiny(shelf / "0.safetensors").read_bytes()
    for number in range(1, 5_000):
        (shelf / f"{number}.safetensors").write_bytes(whole)
    begun = time.perf_counter()
    assert mk.scan_library([shelf], hashes="none").new == 5_000
    first = time.perf_counter() - begun
    begun = time.perf_counter()
    assert mk.scan_library([shelf], hashes="none").new == 0
    assert first < 10
    assert (time.perf_counter() - begun) / 25 < 0.2
