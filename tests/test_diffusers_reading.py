"""Folders of diffusers and their single files, opened as models with LDM's names; and every refusal."""

from __future__ import annotations

import io
import json
import os
import shutil
import zipfile

import models
import pytest
import story
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import read, same
from safetensors.torch import save_file

import mergekit_sd as mk
from mergekit_sd.diffusers_folder import save_diffusers
from mergekit_sd.errors import (
    InputChanged,
    MalformedFile,
    MissingInput,
    OutputIsInput,
    PinMismatch,
    RecipeError,
    UnreadableInput,
    WrongFormat,
)
from mergekit_sd.formats.diffusers.folder import combined
from mergekit_sd.formats.dtypes import DTYPES
from mergekit_sd.formats.open import open_model, read_bytes
from mergekit_sd.formats.reading import InputFile, file_state
from mergekit_sd.formats.tensor import ModelFile, TensorInfo
from mergekit_sd.formats.views import Joined

FAMILIES = ("sd1", "sd2", "sdxl")
UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
# What a checkpoint has and a folder of diffusers has not.
NOT_KEPT = ("position_ids", "logit_scale")


def checkpoint(family):
    return models.checkpoint(family, width=6)  # divisible by 3: query, key and value lie in one tensor


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A folder of each family that tests only read, and the checkpoint that it was made of."""
    place = tmp_path_factory.mktemp("diffusers")
    for family in FAMILIES:
        path = models.write(place / f"{family}.safetensors", checkpoint(family))
        save_diffusers(mk.open(path), place / family, dtype="keep")
    return place


@pytest.fixture
def folder(folders, tmp_path):
    """A copy of SD1's that a test may change."""
    shutil.copytree(folders / "sd1", tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def shell(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return story.Shell(capsys)


def values(path):
    """All tensors of what was opened, by LDM's names."""
    model = open_model(path)
    kinds = {dtype.name: getattr(torch, dtype.torch_name) for dtype in DTYPES.values()}
    return {
        name: torch.frombuffer(bytearray(read_bytes(model, t)), dtype=kinds[t.dtype.name]).reshape(t.shape)
        if t.nbytes
        else torch.empty(t.shape, dtype=kinds[t.dtype.name])
        for name, t in model.tensors.items()
    }


def expected(family):
    dropped = (*NOT_KEPT, "text_projection") if family == "sd2" else NOT_KEPT
    return {n: each for n, each in checkpoint(family).items() if "." in n and not n.endswith(dropped)}


def check_same(made, wanted):
    assert set(made) == set(wanted)
    assert [name for name in wanted if not same(made[name], wanted[name])] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_is_the_checkpoint_that_it_was_made_of(folders, family):
    check_same(values(folders / family), expected(family))
    model = open_model(folders / family)
    assert (model.format, model.path) == ("diffusers", folders / family)
    found = mk.inspect_file(folders / family)
    assert (found.kind, found.architecture, found.junk.bytes) == ("checkpoint", family, 0)
    assert found.file_bytes == sum(path.stat().st_size for path in (folders / family).rglob("*.safetensors"))


def test_it_merges_like_its_checkpoint(folders, tmp_path, room):
    other = mk.open(models.write(tmp_path / "b.safetensors", models.checkpoint("sdxl", 1, "fp32", width=6)))
    made = []
    for number, source in enumerate((folders / "sdxl", folders / "sdxl.safetensors")):
        mk.save(mk.ops.weighted_sum(mk.open(source), other, alpha=0.3), tmp_path / f"{number}.safetensors")
        made.append(read(tmp_path / f"{number}.safetensors"))
    names = expected("sdxl")
    check_same({n: t for n, t in made[0].items() if n in names}, {n: t for n, t in made[1].items() if n in names})


@pytest.mark.parametrize(
    ("family", "said", "markers"),
    [
        ("sd2", {"prediction_type": "v_prediction"}, set()),
        ("sdxl", {"prediction_type": "v_prediction"}, {"v_pred"}),
        ("sdxl", {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, {"v_pred", "ztsnr"}),
    ],
)
def test_the_scheduler_says_what_is_predicted(folders, tmp_path, family, said, markers):
    shutil.copytree(folders / family, tmp_path / "model")
    (tmp_path / "model" / "scheduler" / "scheduler_config.json").write_text(json.dumps(said))
    assert mk.inspect_file(tmp_path / "model").prediction == "v"
    assert set(open_model(tmp_path / "model").tensors) - set(expected(family)) == markers
    mk.save(mk.open(tmp_path / "model"), tmp_path / "out.safetensors")
    assert mk.inspect_file(tmp_path / "out.safetensors").prediction == "v"


# --- which files are read ---------------------------------------------------------------------------


def test_the_only_variant_is_taken_and_told(folder):
    (folder / UNET).rename(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert open_model(folder).notes == ("UNet: the fp16 variant",)
    check_same(values(folder), expected("sd1"))


@pytest.mark.parametrize("other", ["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin"])
def test_the_plain_safetensors_comes_first(folder, other):
    (folder / "unet" / other).write_bytes(b"not to be opened")
    check_same(values(folder), expected("sd1"))


def test_several_variants_and_no_plain_one(folder):
    for variant in ("fp16", "non_ema"):
        shutil.copy(folder / UNET, folder / "unet" / f"diffusion_pytorch_model.{variant}.safetensors")
    (folder / UNET).unlink()
    with pytest.raises(WrongFormat, match="fp16, non_ema"):
        open_model(folder)


@pytest.mark.parametrize("packed", [False, True])
def test_pickles(folder, packed):
    """Packed again, the file's tensors are views, which move with it."""
    for name, new in ((UNET, "diffusion_pytorch_model.bin"), (TEXT, "pytorch_model.bin")):
        path = (folder / name).with_name(new)
        torch.save(read(folder / name), buffer := io.BytesIO())
        with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as fresh:
            for member in old.namelist():
                fresh.writestr(member, old.read(member))
        if not packed:
            path.write_bytes(buffer.getvalue())
        (folder / name).unlink()
    check_same(values(folder), expected("sd1"))


def in_pieces(folder, pieces=3):
    """The UNet cut into pieces with an index, as diffusers cuts it."""
    tensors = read(folder / UNET)
    stem, names = "diffusion_pytorch_model", list(tensors)
    where = {name: f"{stem}-{number % pieces + 1:05}-of-{pieces:05}.safetensors" for number, name in enumerate(names)}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in names if where[name] == file}, folder / "unet" / file)
    (folder / UNET).unlink()
    index = folder / "unet" / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return index


def test_pieces(folder):
    in_pieces(folder)
    model = open_model(folder)
    assert len(model.parts) == 5
    check_same(values(folder), expected("sd1"))


@pytest.mark.parametrize("name", ["gone.safetensors", "../vae/diffusion_pytorch_model.safetensors", 7, None])
def test_an_index_that_names_no_file(folder, name):
    index = in_pieces(folder)
    said = json.loads(index.read_text())
    said["weight_map"]["conv_in.weight"] = name
    index.write_text(json.dumps(said))
    kind = MissingInput if name == "gone.safetensors" else MalformedFile
    with pytest.raises(kind) as caught:
        open_model(folder)
    assert caught.value.file == str(index.with_name(name) if kind is MissingInput else index)


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"weight_map": {}}', b'{"weight_map": []}', b"\xff"])
def test_a_damaged_index(folder, content):
    index = in_pieces(folder)
    index.write_bytes(content)
    with pytest.raises(MalformedFile) as caught:
        open_model(folder)
    assert caught.value.file == str(index)


def test_a_damaged_piece(folder):
    piece = in_pieces(folder).with_name("diffusion_pytorch_model-00002-of-00003.safetensors")
    os.truncate(piece, piece.stat().st_size - 1)
    with pytest.raises(MalformedFile, match="cut short") as caught:
        open_model(folder)
    assert caught.value.file == str(piece)


def test_a_piece_that_lacks_what_the_index_says(folder):
    index = in_pieces(folder)
    said = json.loads(index.read_text())
    said["weight_map"]["more.weight"] = said["weight_map"]["conv_in.weight"]
    index.write_text(json.dumps(said))
    with pytest.raises(MalformedFile, match="does not") as caught:
        open_model(folder)
    assert caught.value.key == "more.weight"


# --- folders that are refused -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "entry", "words"),
    [
        ("unet", None, "a FluxPipeline, which has no UNet"),
        ("unet", ["diffusers", "UNetSpatioTemporalConditionModel"], "UNetSpatioTemporalConditionModel"),
        ("vae", ["diffusers", "AutoencoderTiny"], "AutoencoderTiny"),
        ("text_encoder", ["transformers", "T5EncoderModel"], "T5EncoderModel"),
    ],
)
def test_other_pipelines(folder, name, entry, words):
    index = json.loads((folder / "model_index.json").read_text()) | {"_class_name": "FluxPipeline"}
    index = {**index, name: entry} if entry else {key: each for key, each in index.items() if key != name}
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(WrongFormat, match=words) as caught:
        open_model(folder)
    assert caught.value.file == str(folder)


def test_a_unet_of_other_names(folder):
    tensors = {name.replace("resnets", "motion_modules"): each for name, each in read(folder / UNET).items()}
    models.write(folder / UNET, tensors)
    with pytest.raises(WrongFormat, match="other names"):
        open_model(folder)


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_missing_component(folder, component, whole):
    shutil.rmtree(folder / component)
    if not whole:
        (folder / component).mkdir()
        (folder / component / "config.json").write_text("{}")
    with pytest.raises(MissingInput) as caught:
        open_model(folder)
    assert caught.value.file == str(folder / component)


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff\xfe"])
def test_a_damaged_model_index(folder, content):
    (folder / "model_index.json").write_bytes(content)
    with pytest.raises(MalformedFile, match="JSON"):
        open_model(folder)


def test_folders_without_an_index(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (folder / "model_index.json").unlink()
    hints = {tmp_path / "empty": "name a file in it", folder: "model_index.json", folder / "vae": "diffusion_pytorch_m"}
    for path, hint in hints.items():
        with pytest.raises(UnreadableInput, match="This is a folder") as caught:
            open_model(path)
        assert hint in caught.value.hint


def test_an_incomplete_attention(folders, tmp_path):
    shutil.copytree(folders / "sd2", tmp_path / "model")
    tensors = read(tmp_path / "model" / TEXT)
    name = "text_model.encoder.layers.0.self_attn.k_proj.weight"
    models.write(tmp_path / "model" / TEXT, {key: each for key, each in tensors.items() if key != name})
    with pytest.raises(MalformedFile, match="only") as caught:
        open_model(tmp_path / "model")
    assert caught.value.key.endswith("in_proj_weight")
    models.write(tmp_path / "model" / TEXT, tensors | {name: tensors[name].float()})
    with pytest.raises(MalformedFile, match="differ in dtype"):
        open_model(tmp_path / "model")


def test_two_tensors_for_one(folder):
    tensors = read(folder / "vae/diffusion_pytorch_model.safetensors")
    start = "decoder.mid_block.attentions.0."
    tensors[start + "query.weight"] = tensors[start + "to_q.weight"].clone()
    models.write(folder / "vae/diffusion_pytorch_model.safetensors", tensors)
    with pytest.raises(MalformedFile, match="Two tensors"):
        open_model(folder)


# --- single files -----------------------------------------------------------------------------------


def test_single_files_have_ldm_names(folders, tmp_path, shell):
    vae = folders / "sd1" / "vae" / "diffusion_pytorch_model.safetensors"
    whole = expected("sd1")
    check_same(values(vae), {n.removeprefix(models.VAE): t for n, t in whole.items() if n.startswith(models.VAE)})
    check_same(
        values(folders / "sd1" / UNET),
        {n.removeprefix(models.UNET): t for n, t in whole.items() if n.startswith(models.UNET)},
    )
    assert mk.inspect_file(vae).kind == "vae"
    assert mk.inspect_file(folders / "sdxl" / UNET).architecture == "sdxl"
    models.write(tmp_path / "other.safetensors", models.checkpoint("sd1", 5, width=6))
    shell("bake-vae", "other.safetensors", str(vae), "-o", "out.safetensors")
    made = read(tmp_path / "out.safetensors")
    assert all(same(made[name], whole[name]) for name in whole if name.startswith(models.VAE))


def test_old_names_of_the_vae(folders, tmp_path):
    new = read(folders / "sd1" / "vae" / "diffusion_pytorch_model.safetensors")
    renames = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for name, old in renames.items():
        new = {key.replace(f"attentions.0.{name}.", f"attentions.0.{old}."): each for key, each in new.items()}
    models.write(tmp_path / "vae.safetensors", new)
    check_same(values(tmp_path / "vae.safetensors"), values(folders / "sd1/vae/diffusion_pytorch_model.safetensors"))


def test_text_encoders_alone(folders, tmp_path):
    """CLIP's keeps its names; OpenCLIP's is told by its configuration, else by its width."""
    second = folders / "sdxl" / "text_encoder_2" / "model.safetensors"
    prefix = "conditioner.embedders.1.model."
    wanted = {n.removeprefix(prefix): t for n, t in expected("sdxl").items() if n.startswith(prefix)}
    check_same(values(second), wanted)
    check_same(values(folders / "sdxl" / TEXT), read(folders / "sdxl" / TEXT))
    alone = models.write(tmp_path / "clip_l.safetensors", read(second))  # 6 wide, so for all we know CLIP's
    check_same(values(alone), read(second))
    level = {name.removeprefix("text_model."): each for name, each in read(folders / "sdxl" / TEXT).items()}
    models.write(tmp_path / "newest.safetensors", level)
    check_same(values(tmp_path / "newest.safetensors"), read(folders / "sdxl" / TEXT))


def test_the_width_tells_openclip(folders, tmp_path):
    second = read(folders / "sdxl" / "text_encoder_2" / "model.safetensors")
    words = "text_model.embeddings.token_embedding.weight"
    models.write(tmp_path / "clip_g.safetensors", second | {words: torch.zeros(2, 1280)})
    assert "transformer.resblocks.0.attn.in_proj_weight" in open_model(tmp_path / "clip_g.safetensors").tensors


def test_what_is_no_component_keeps_its_names(folders, tmp_path):
    unet = read(folders / "sd1" / UNET)
    controlnet = {n: t for n, t in unet.items() if not n.startswith(("up_blocks", "conv_out", "conv_norm_out"))}
    controlnet["controlnet_cond_embedding.conv_in.weight"] = torch.zeros(2, 2)
    lora = {n.replace(".weight", ".lora_A.weight"): t for n, t in unet.items() if "to_q" in n}
    for name, tensors in (("controlnet", controlnet), ("lora", lora)):
        path = models.write(tmp_path / f"{name}.safetensors", tensors)
        assert list(open_model(path).tensors) == list(tensors) or set(open_model(path).tensors) == set(tensors)


def test_names_that_ldm_has_not_are_kept_and_told(folder):
    more = {"time_embedding.cond_proj.weight": torch.zeros(2, 2)}  # LCM's
    models.write(folder / UNET, read(folder / UNET) | more)
    model = open_model(folder)
    assert any("time_embedding.cond_proj.weight" in note for note in model.notes)
    assert models.UNET + "time_embedding.cond_proj.weight" in model.tensors


# --- what goes on with several files ------------------------------------------------------------------


def test_every_part_is_watched(folder):
    for part in open_model(folder).parts:
        model = open_model(folder)
        file = InputFile.of(model)
        os.utime(part.path, ns=(1, part.state.mtime_ns + 1))
        with pytest.raises(InputChanged) as caught:
            file.check_unchanged()
        file.close()
        assert caught.value.file == str(part.path)
        with pytest.raises(InputChanged):
            InputFile.of(model)


def test_an_output_that_is_a_part_is_refused(folder):
    before = (folder / UNET).read_bytes()
    with pytest.raises(OutputIsInput):
        mk.save(mk.open(folder), folder / UNET, force=True)
    assert (folder / UNET).read_bytes() == before


def test_recipes_locks_and_pins(folder, tmp_path):
    path = models.recipe(tmp_path, {"a": "model"})
    mk.run(path)
    assert not mk.verify(tmp_path / "out.safetensors").different
    assert mk.run(path, skip_done=True).skipped == ("out",)
    mk.run(path, locked=True, force=True)
    changed = read(folder / TEXT)
    changed[next(iter(changed))] += 1
    models.write(folder / TEXT, changed)
    with pytest.raises(PinMismatch):
        mk.run(path, locked=True, force=True)
    models.recipe(tmp_path, {"a": {"file": "model", "sha256": "0" * 64}})
    with pytest.raises(RecipeError, match="folder of several files"):
        mk.run(path, force=True)


def test_hash_says_that_a_folder_has_none(folder, shell):
    _, err = shell("hash", str(folder), code=3)
    assert "This is a folder" in err
    assert "single files" in err
    shell("inspect", str(folder), "--hash", code=3)


def test_a_vae_has_one_weights_hash_whatever_it_lies_in(folders):
    files = ("sdxl.safetensors", "sdxl/vae/diffusion_pytorch_model.safetensors")
    assert len({mk.inspect_file(folders / file, hashes=True).weights_hashes["vae"] for file in files}) == 1


def test_the_library_leaves_the_parts_out(folder, tmp_path):
    models.write(folder / "whole.safetensors", checkpoint("sd1"))
    report = mk.scan_library([tmp_path], hashes="none")
    assert report.files == 1


@given(st.data())
def test_joined_stretches_of_several_files(tmp_path_factory, data):
    """Whatever the sizes: what is read is what a join of the bytes would give."""
    place = tmp_path_factory.mktemp("parts")
    files, wanted = [], {}
    for number, content in enumerate(data.draw(st.lists(st.binary(min_size=1, max_size=50), min_size=1, max_size=4))):
        path = place / str(number)
        path.write_bytes(content)
        span = st.tuples(st.integers(0, len(content) - 1), st.integers(1, 50))
        views, tensors, end = [], {}, len(content)
        for index, drawn in enumerate(data.draw(st.lists(st.lists(span, min_size=1, max_size=3), max_size=3))):
            pieces = [(at, min(size, len(content) - at)) for at, size in drawn]
            made = b"".join(content[at : at + size] for at, size in pieces)
            views.append(Joined(end, len(made), tuple(pieces)))
            name = f"{number}.{index}"
            tensors[name], wanted[name] = TensorInfo(name, DTYPES["U8"], (len(made),), end, len(made)), made
            end += len(made)
        name = f"{number}.plain"
        tensors[name], wanted[name] = TensorInfo(name, DTYPES["U8"], (len(content),), 0, len(content)), content
        files.append(ModelFile(path, "x", tensors, {}, file_state(path.stat()), tuple(views)))
    model = combined(place, [combined(place, files[:2], {}, ()), *files[2:]], {}, ())
    assert {name: read_bytes(model, tensor) for name, tensor in model.tensors.items()} == wanted
