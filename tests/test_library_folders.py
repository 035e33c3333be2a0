"""Finding the folders of models: installs of other programs, ComfyUI's extra paths, roots."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import mergekit_sd as mk
from mergekit_sd.library import folders


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A home of the test's own, and no places outside of it."""
    folder = (tmp_path / "home").resolve()
    folder.mkdir()
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(folder))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    for system in ("posix", "windows"):
        monkeypatch.setitem(folders._data()["places"], system, [])
    return folder


def made(base, *places):
    for place in places:
        (base / place).mkdir(parents=True, exist_ok=True)
    return base


def a1111(base):
    made(base, "models/Stable-diffusion", "models/Lora", "embeddings")
    (base / "webui.py").touch()
    return base


def comfy(base):
    return made(base, "custom_nodes", "models/checkpoints", "models/vae")


def found(home):
    return {str(each.path.relative_to(home)).replace(os.sep, "/"): each.kind for each in mk.model_folders()}


def test_nothing_is_found_where_nothing_is(home):
    assert mk.model_folders() == []
    made(home, "stable-diffusion-webui/embeddings", "ComfyUI/models/checkpoints")  # no installs: some marks are missing
    assert mk.model_folders() == []


@pytest.mark.parametrize(
    "place",
    [
        "stable-diffusion-webui",
        "stable-diffusion-webui-forge",
        "Documents/sd.webui/webui",
        "AI/webui_forge_cu121_torch231/webui",
        "StabilityMatrix/Packages/Forge",
        "pinokio/api/automatic1111.git/app",
    ],
)
def test_installs_of_a1111_and_forge(home, place):
    a1111(home / place)
    expected = {"models/Stable-diffusion": "checkpoint", "models/Lora": "lora", "embeddings": "embedding"}
    assert found(home) == {f"{place}/{name}": kind for name, kind in expected.items()}
    assert {each.why for each in mk.model_folders()} == {f"A1111 or Forge in {home / place}"}


@pytest.mark.parametrize("place", ["ComfyUI", "comfyui", "Documents/ComfyUI", "ComfyUI_windows_portable/ComfyUI"])
def test_installs_of_comfyui(home, place):
    comfy(home / place)
    assert found(home) == {f"{place}/models/checkpoints": "checkpoint", f"{place}/models/vae": "vae"}


def test_the_shared_models_of_stabilitymatrix(home):
    made(home / "StabilityMatrix/Data/Models", "StableDiffusion", "VAE", "ESRGAN")
    assert found(home) == {
        "StabilityMatrix/Data/Models/StableDiffusion": "checkpoint",
        "StabilityMatrix/Data/Models/VAE": "vae",
    }


def test_extra_model_paths_are_read(home, monkeypatch):
    base = comfy(home / "ComfyUI")
    a1111(home / "webui")
    made(home, "webui/models/LyCORIS", "absolute", "ComfyUI/beside", "from-env/vae")
    monkeypatch.setenv("MY_MODELS", str(home / "from-env"))
    (base / "extra_model_paths.yaml").write_text(
        "\ufeff# ours\n"
        "a111:\n"
        "    base_path: ~/webui/\n"
        "    is_default: true\n"
        "    checkpoints: models/Stable-diffusion\n"
        "    configs: models/Stable-diffusion\n"
        "    loras: |\n"
        "         models/Lora\n"
        "         models/LyCORIS\n"
        "         models/not-there\n"
        "    upscale_models: embeddings\n"
        "env:\n"
        "    base_path: ${MY_MODELS}\n"
        "    vae: vae\n"
        "plain:\n"
        f"    checkpoints: {home / 'absolute'}\n"
        "    embeddings: [beside]\n"
        "empty:\n"
        "other: 3\n",
        encoding="utf-8",
    )
    assert found(home) == {
        "ComfyUI/models/checkpoints": "checkpoint",
        "ComfyUI/models/vae": "vae",
        "webui/models/Stable-diffusion": "checkpoint",
        "webui/models/Lora": "lora",
        "webui/models/LyCORIS": "lora",
        "from-env/vae": "vae",
        "absolute": "checkpoint",
        "ComfyUI/beside": "embedding",
    }
    why = next(each.why for each in mk.model_folders() if each.path.name == "Lora")
    assert why == f"a111 in {base / 'extra_model_paths.yaml'}"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "just text",
        "- a\n- b",
        "a: [unclosed",
        "a:\n\tb: c",
        "a: !!python/object/apply:os.system ['touch hacked']",
        "a: {checkpoints: {b: c}, base_path: [1], vae: 3}",
        "a: &a [*a]",
        "[" * 5_000,
        "1: {checkpoints: nowhere}",
        "a: {base_path: '~nobody-of-that-name', vae: x}",
        'a: {vae: "x\\0y"}',
    ],
)
def test_extra_model_paths_that_make_no_sense_are_left_out(home, text, monkeypatch):
    monkeypatch.chdir(home)
    base = comfy(home / "ComfyUI")
    (base / "extra_model_paths.yaml").write_text(text)
    assert list(found(home)) == ["ComfyUI/models/checkpoints", "ComfyUI/models/vae"]
    assert not Path("hacked").exists()


def test_extra_model_paths_of_another_encoding_or_size_are_left_out(home):
    file = comfy(home / "ComfyUI") / "extra_model_paths.yaml"
    for raw in ("a: {vae: é}".encode("latin-1"), b"a: {vae: x}" + b" " * folders.MOST_BYTES):
        file.write_bytes(raw)
        assert folders.read_extra_paths(file) == []


def test_roots_are_folders_of_models(home):
    made(home, "mine", "gone")
    mk.add_root("mine", home / "mine")
    mk.add_root("gone", home / "gone")
    (home / "gone").rmdir()
    assert [(each.path, each.kind, each.why) for each in mk.model_folders()] == [(home / "mine", None, "root mine")]
    mk.roots_file().write_text("{")
    assert mk.model_folders() == []  # `doctor` says what is wrong


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX")
def test_one_folder_is_found_once(home):
    base = comfy(home / "ComfyUI")
    (home / "comfyui").symlink_to(base)
    mk.add_root("comfy", base / "models" / "vae")
    assert found(home) == {"ComfyUI/models/checkpoints": "checkpoint", "ComfyUI/models/vae": "vae"}


def test_the_data_is_sound():
    data = folders._data()
    kinds = {"checkpoint", "vae", "lora", "lycoris", "controlnet", "hypernetwork", "embedding", "unet", "text_encoder"}
    for program in data["program"]:
        assert program["marks"]
        assert set(program["folders"].values()) <= kinds
    assert set(data["extra"].values()) <= kinds
    assert not any(Path(name).is_absolute() for name in data["places"]["names"])


def test_a_scan_without_folders_goes_to_what_is_found(home, monkeypatch, tmp_path_factory):
    import models
    import torch

    monkeypatch.setenv("MERGEKIT_SD_DATA", str(tmp_path_factory.mktemp("data")))
    base = comfy(home / "ComfyUI")
    models.write(base / "models/vae/a.safetensors", {"emb_params": torch.zeros(1, 8)})
    models.write(base / "custom_nodes/b.safetensors", {"emb_params": torch.zeros(1, 8)})
    report = mk.scan_library()
    assert report.files == 1
    assert set(report.folders) == {base / "models/checkpoints", base / "models/vae"}
