"""Folders of diffusers, written: what is in them, that they appear whole or not at all, and every refusal."""

from __future__ import annotations

import json
import re

import models
import pytest
import story
import torch
from models import left_overs, read, same

import mergekit_sd as mk
from mergekit_sd import diffusers_folder
from mergekit_sd.diffusers_folder import plan_diffusers, save_diffusers
from mergekit_sd.errors import (
    Cancelled,
    MissingTensors,
    NonFiniteResult,
    NotWritable,
    OutputExists,
    OutputIsInput,
    ShapeMismatch,
    TargetLocked,
    UsageError,
    WrongFormat,
)
from mergekit_sd.events import CancelToken, OutputFinished, Progressed
from mergekit_sd.formats import claims, folders
from mergekit_sd.formats.folders import OutputFolder

UNET = "unet/diffusion_pytorch_model.safetensors"
FAMILIES = ("sd1", "sd2", "sdxl")


@pytest.fixture
def shell(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return story.Shell(capsys)


def written(tmp_path, family="sd1", seed=0, dtype="fp16", **changes):
    tensors = models.checkpoint(family, seed, dtype, width=6) | changes
    return models.write(tmp_path / f"{family}-{seed}.safetensors", tensors)


def weights(folder):
    return {str(path.relative_to(folder)): read(path) for path in sorted(folder.rglob("*.safetensors"))}


def check_same(one, other):
    assert one.keys() == other.keys()
    for file, tensors in one.items():
        assert tensors.keys() == other[file].keys()
        assert [name for name, each in tensors.items() if not same(each, other[file][name])] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merge_is_written_as_its_file_would_be(tmp_path, family):
    """Query, key and value out of a computed tensor, and out of one that lies in a file: the same bits."""
    one, other = (mk.open(written(tmp_path, family, seed, dtype)) for seed, dtype in ((0, "fp16"), (1, "fp32")))
    mixed = mk.ops.weighted_sum(one, other, alpha=0.3)
    mk.save(mixed, tmp_path / "mixed.safetensors", dtype="bf16")
    save_diffusers(mixed, tmp_path / "direct", dtype="bf16")
    save_diffusers(mk.open(tmp_path / "mixed.safetensors"), tmp_path / "after", dtype="keep")
    check_same(weights(tmp_path / "direct"), weights(tmp_path / "after"))


def test_dtypes_are_kept_or_as_asked(tmp_path):
    source = mk.open(written(tmp_path, dtype="fp32"))
    for dtype, wanted in (("keep", torch.float32), ("fp16", torch.float16), ({"default": "fp16", "vae": "fp32"}, None)):
        folder = tmp_path / str(wanted)
        save_diffusers(source, folder, dtype=dtype)
        found = {file: {each.dtype for each in tensors.values()} for file, tensors in weights(folder).items()}
        assert found["vae/diffusion_pytorch_model.safetensors"] == {wanted or torch.float32}
        assert found[UNET] == {wanted or torch.float16}


@pytest.mark.parametrize(
    ("family", "markers", "wanted"),
    [
        ("sd1", [], ("DDIMScheduler", "epsilon", False)),
        ("sdxl", [], ("EulerDiscreteScheduler", "epsilon", False)),
        ("sdxl", ["v_pred"], ("EulerDiscreteScheduler", "v_prediction", False)),
        ("sdxl", ["v_pred", "ztsnr"], ("EulerDiscreteScheduler", "v_prediction", True)),
    ],
)
def test_the_scheduler_goes_with_the_prediction(tmp_path, family, markers, wanted):
    path = written(tmp_path, family, **{name: torch.empty(0) for name in markers})
    save_diffusers(mk.open(path), tmp_path / "out")
    found = json.loads((tmp_path / "out/scheduler/scheduler_config.json").read_text())
    assert (found["_class_name"], found["prediction_type"], found["rescale_betas_zero_snr"]) == wanted
    assert found["timestep_spacing"] == ("trailing" if wanted[2] else "leading")
    assert mk.inspect_file(tmp_path / "out").prediction == wanted[1].removesuffix("_prediction")


def test_what_ldm_has_and_diffusers_has_not_is_left_out(tmp_path):
    whole = models.with_ema(models.checkpoint("sd2", width=6)) | {"more.junk": torch.zeros(1)}
    for number in (22, 23):  # the last of 24 layers, whose result is never used
        start = "cond_stage_model.model.transformer.resblocks."
        whole |= {
            n.replace(f"{start}0.", f"{start}{number}."): t.clone()
            for n, t in whole.items()
            if n.startswith(f"{start}0.")
        }
    models.write(tmp_path / "a.safetensors", whole)
    report = save_diffusers(mk.open(tmp_path / "a.safetensors"), tmp_path / "out")
    assert re.search(r"left out \d+ tensors .*cond_stage_model\.model\.(text_projection|logit_scale)", report.notes[0])
    text = weights(tmp_path / "out")["text_encoder/model.safetensors"]
    assert {int(name.split(".")[3]) for name in text if ".layers." in name} == {0, 22}
    assert not any("projection" in name or "logit" in name for name in text)


def test_without_the_vocabulary_it_says_what_to_copy(tmp_path, monkeypatch):
    monkeypatch.setattr(diffusers_folder, "tokenizer_files", lambda pad: None)
    told = []
    report = save_diffusers(mk.open(written(tmp_path, "sdxl")), tmp_path / "out", on_event=told.append)
    assert "tokenizer, tokenizer_2" in report.notes[0]
    assert any(getattr(event, "message", "") == report.notes[0] for event in told)
    assert not (tmp_path / "out" / "tokenizer").exists()


def test_the_vocabulary_is_read_from_the_package_or_missed(monkeypatch, tmp_path):
    from mergekit_sd.formats.diffusers import tokenizer

    monkeypatch.setattr(tokenizer, "PACKAGE", "no-such-package-here")
    assert tokenizer.tokenizer_files(tokenizer.END) is None


# --- whole or not at all ------------------------------------------------------------------------------


def test_an_existing_folder_is_replaced_only_by_force(tmp_path):
    source = mk.open(written(tmp_path))
    save_diffusers(source, tmp_path / "out")
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(OutputExists):
        save_diffusers(source, tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").exists()
    save_diffusers(source, tmp_path / "out", force=True)
    assert not (tmp_path / "out" / "mine.txt").exists()
    assert left_overs(tmp_path) == []


def test_what_is_no_model_is_never_replaced(tmp_path):
    source = mk.open(written(tmp_path))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("photos", "file"):
        with pytest.raises(UsageError):
            save_diffusers(source, tmp_path / name, force=True)
    assert (tmp_path / "photos" / "cat.jpg").read_text() == "x"
    with pytest.raises(NotWritable):
        save_diffusers(source, tmp_path / "no" / "such")


def test_an_input_within_is_never_replaced(tmp_path):
    source = mk.open(written(tmp_path))
    save_diffusers(source, tmp_path / "out", dtype="keep")
    before = weights(tmp_path / "out")
    for inner in (mk.open(tmp_path / "out"), mk.open(tmp_path / "out" / UNET)):
        with pytest.raises(OutputIsInput):
            save_diffusers(mk.ops.replace(source, inner, component="unet"), tmp_path / "out", force=True)
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with pytest.raises(OutputIsInput):
        save_diffusers(mk.open(tmp_path / "out"), tmp_path / "link", force=True)
    with pytest.raises(OutputIsInput):
        save_diffusers(mk.open(tmp_path / "link"), tmp_path / "out", force=True)
    (tmp_path / "out" / UNET).rename(tmp_path / "blob")  # as in the hub's cache
    (tmp_path / "out" / UNET).symlink_to(tmp_path / "blob")
    with pytest.raises(OutputIsInput):
        save_diffusers(
            mk.ops.replace(source, mk.open(tmp_path / "out" / UNET), component="unet"), tmp_path / "out", force=True
        )
    check_same(weights(tmp_path / "out"), before)


@pytest.mark.parametrize("there", [False, True])
def test_a_failure_leaves_nothing_and_what_was_there(tmp_path, there):
    source = mk.open(written(tmp_path))
    name = models.UNET + "out.2.bias"
    broken = mk.open(written(tmp_path, seed=1, **{name: torch.full((4,), torch.nan).half()}))
    if there:
        save_diffusers(source, tmp_path / "out")
    before = story.state(tmp_path)
    with pytest.raises(NonFiniteResult):
        save_diffusers(mk.ops.weighted_sum(source, broken, alpha=0.5), tmp_path / "out", force=True)
    assert story.state(tmp_path) == before


@pytest.mark.parametrize("kind", [OutputFinished, Progressed])
def test_a_cancel_leaves_nothing(tmp_path, kind):
    source, token = mk.open(written(tmp_path)), CancelToken()
    before = story.state(tmp_path)

    def listen(event):
        if isinstance(event, kind):
            token.cancel()

    with pytest.raises(Cancelled):
        save_diffusers(source, tmp_path / "out", on_event=listen, cancel=token)
    assert story.state(tmp_path) == before


def test_an_interrupt_while_the_small_files_are_written(tmp_path, monkeypatch):
    source, before = mk.open(written(tmp_path)), story.state(tmp_path)

    def interrupt(self, name, text):
        raise KeyboardInterrupt

    monkeypatch.setattr(OutputFolder, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_diffusers(source, tmp_path / "out")
    monkeypatch.undo()
    assert set(story.state(tmp_path)) == set(before)


def test_a_failed_rename_puts_the_old_folder_back(tmp_path, monkeypatch):
    source = mk.open(written(tmp_path))
    save_diffusers(source, tmp_path / "out")
    real = folders.Path.rename
    error: BaseException = OSError(5, "Input/output error")

    def rename(self, target):
        if self.name.endswith(".new"):
            raise error
        return real(self, target)

    before = story.state(tmp_path)
    monkeypatch.setattr(folders.Path, "rename", rename)
    with pytest.raises(NotWritable, match="Input/output error"):
        save_diffusers(source, tmp_path / "out", force=True)
    assert story.state(tmp_path) == before
    error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        save_diffusers(source, tmp_path / "out", force=True)
    assert story.state(tmp_path) == before


def test_leftovers_of_killed_runs(tmp_path):
    source = mk.open(written(tmp_path))
    save_diffusers(source, tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / ".out.mergekit-sd.old")  # killed between the two renames
    (tmp_path / ".out.mergekit-sd.new").mkdir()
    (tmp_path / ".out.mergekit-sd.new" / "rubbish").write_text("x")
    with pytest.raises(OutputExists):
        save_diffusers(source, tmp_path / "out")
    assert left_overs(tmp_path) == []
    assert (tmp_path / "out" / "model_index.json").exists()


def test_two_writers_of_one_folder(tmp_path):
    source = mk.open(written(tmp_path))
    with OutputFolder(tmp_path / "out", force=False):
        with pytest.raises(TargetLocked):
            save_diffusers(source, tmp_path / "out")
        assert list((tmp_path).glob(f".*{claims.TEMPORARY_SUFFIX}"))
    save_diffusers(source, tmp_path / "out")
    assert left_overs(tmp_path) == []


# --- what cannot be written ---------------------------------------------------------------------------


def test_only_whole_models_that_diffusers_knows(tmp_path):
    for name in ("sdxl-refiner", "sd2-depth"):
        path = models.write(tmp_path / f"{name}.safetensors", models.checkpoint(name, width=6))
        with pytest.raises(WrongFormat, match="cannot be written"):
            plan_diffusers(mk.open(path), tmp_path / "out")
    vae = models.write(tmp_path / "vae.safetensors", models.vae_file())
    with pytest.raises(WrongFormat, match="cannot be written"):
        plan_diffusers(mk.open(vae), tmp_path / "out")


def test_a_model_without_a_vae(tmp_path):
    tensors = {n: t for n, t in models.checkpoint("sd1", width=6).items() if not n.startswith(models.VAE)}
    node = mk.open(models.write(tmp_path / "a.safetensors", tensors))
    with pytest.raises(MissingTensors, match="no VAE"):
        save_diffusers(node, tmp_path / "out")
    save_diffusers(node, tmp_path / "unet", component="unet")
    assert sorted(path.name for path in (tmp_path / "unet").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]


def test_a_unet_that_does_not_tell_its_configuration(tmp_path):
    tensors = models.checkpoint("sd1", width=6)
    del tensors[models.UNET + "out.2.weight"]
    with pytest.raises(MissingTensors) as caught:
        save_diffusers(mk.open(models.write(tmp_path / "a.safetensors", tensors)), tmp_path / "out")
    assert caught.value.key == "conv_out.weight"


def test_query_key_and_value_that_do_not_divide(tmp_path):
    node = mk.open(models.write(tmp_path / "a.safetensors", models.checkpoint("sd2", width=4)))
    with pytest.raises(ShapeMismatch, match="no multiple of 3"):
        save_diffusers(node, tmp_path / "out")


# --- the command line ---------------------------------------------------------------------------------


def test_the_command(tmp_path, shell):
    written(tmp_path)
    command = ("extract", "sd1-0.safetensors", "--format", "diffusers", "-o")
    out, _ = shell(*command, "planned", "--dry-run")
    assert UNET in out
    assert not (tmp_path / "planned").exists()
    out, _ = shell(*command, "out")
    assert "unet:" in out
    out, _ = shell(*command, "again", "--json", "--dtype", "fp32")
    report = json.loads(out)
    assert UNET in report["files"]
    assert report["components"]["unet"]["path"] == "again/" + UNET
    shell(*command, "out", code=2)
    shell(*command, "out", "--force")
    shell(*command, "vae", "--component", "vae")
    assert (tmp_path / "vae" / "config.json").exists()
    out, _ = shell("inspect", "out")
    assert "Stable Diffusion 1" in out
    shell("prune", "out", "-o", "back.safetensors")
    assert mk.inspect_file("back.safetensors").architecture == "sd1"
    shell("diff", "out", "back.safetensors")


def test_the_ema_weights_as_a_folder(tmp_path, shell):
    whole = models.with_ema(models.checkpoint("sd1", width=6))
    models.write(tmp_path / "a.safetensors", whole)
    shell("extract", "a.safetensors", "--format", "diffusers", "--component", "ema", "-o", "out")
    made = read(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    assert same(made["conv_out.bias"], whole["model_ema.diffusion_modelout2bias"])


@pytest.mark.parametrize("more", [["--save-recipe", "r.toml"], ["--title", "x"], ["--metadata", "webui"]])
def test_options_that_a_folder_has_no_place_for(tmp_path, shell, more):
    written(tmp_path)
    _, err = shell("extract", "sd1-0.safetensors", "--format", "diffusers", "-o", "out", *more, code=2)
    assert more[0] in err
    assert not (tmp_path / "out").exists()


def test_extract_needs_a_component_or_the_format(tmp_path, shell):
    written(tmp_path)
    _, err = shell("extract", "sd1-0.safetensors", "-o", "out.safetensors", code=2)
    assert "--component" in err
