"""Which models are near to one: against ASimilarity and cosines by numpy in float64, over whole weights."""

from __future__ import annotations

import os
import re
from pathlib import Path

import models
import numpy as np
import pytest
import story
import torch

import mergekit_sd as mk
from mergekit_sd.errors import Cancelled, MissingTensors
from mergekit_sd.library import signature, similar
from mergekit_sd.library.entry import open_header

POSIX = pytest.mark.skipif(os.name == "nt", reason="needs POSIX")
ATTENTION = {"sd1": range(3, 11), "sdxl": range(6)}


@pytest.fixture
def shell(capsys):
    return story.Shell(capsys)


def unet(name="sd1", width=4, seed=0, *, scale=0.05, attention=None):
    """A UNet's tensors; `attention`: the scale of the self-attention's weights, if another."""
    wanted = {key: shape for key, shape in models.shapes(name, width).items() if key.startswith(models.UNET)}
    made = models.filled(wanted, seed, scale=scale)
    if attention:
        made = {key: each * (attention / scale) if ".attn1.to_" in key else each for key, each in made.items()}
    return made


def tuned(tensors, amount, seed=7, only=""):
    """The same with noise, more of it in some rows than in others."""
    rng = torch.Generator().manual_seed(seed)

    def change(each):
        rows = 2 * torch.rand((each.shape[0], *[1] * (each.dim() - 1)), generator=rng)
        return (each.float() + amount * rows * torch.randn(each.shape, generator=rng)).to(each.dtype)

    return {key: change(each) if only in key and each.dim() else each for key, each in tensors.items()}


def asimilarity(a, b, name="sd1"):
    """ASimilarityCalculator's number, in float64."""
    torch.manual_seed(114514)
    found = []
    for number in ATTENTION[name]:
        place = f"{models.UNET}output_blocks.{number}.1.transformer_blocks.0.attn1.to_"
        size = a[place + "q.weight"].shape[0]
        noise = torch.randn([size, size]).double().numpy()

        def response(tensors, noise=noise, place=place):
            q, k, v = (noise @ models.f64(tensors[f"{place}{part}.weight"]).T for part in "qkv")
            logits = q @ k.T
            attention = np.exp(logits - logits.max(1, keepdims=True))
            return attention / attention.sum(1, keepdims=True) * v.sum(0)

        x, y = response(a), response(b)
        found.append(np.mean((x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)))
    return 100 * np.mean(found)


def cosines(a, b, name="sd1"):
    """The cosine of each block over all its weights, in float64."""
    sums = {}
    for key, x in a.items():
        block = models.block_of(key, xl=name == "sdxl")
        x, y = models.f64(x).ravel(), models.f64(b[key]).ravel()
        sums[block] = sums.get(block, 0) + np.array([x @ y, x @ x, y @ y])
    return {block: xy / np.sqrt(xx * yy) for block, (xy, xx, yy) in sums.items()}


def shelf(folder, **tensors):
    """A folder of these models, scanned."""
    for name, each in tensors.items():
        models.write(folder / f"{name}.safetensors", each)
    mk.scan_library([folder], hashes="none")
    return folder


def names(found):
    return [model.path.stem for model in found.models]


# --- the numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "attention"), [("sd1", 0.25), ("sd1", 0.12), ("sd1", 0.02), ("sdxl", 0.25)])
def test_both_measures_are_those_of_whole_weights(tmp_path, name, attention):
    """Peaked attention as real models have it, and flat. Of the largest 32 elements of 48, two percentage points."""
    base = unet(name, 48, attention=attention)
    near, far = tuned(base, 0.002), tuned(base, 0.03)
    found = mk.find_similar(shelf(tmp_path, base=base, near=near, far=far) / "base.safetensors")
    assert names(found) == ["near", "far"]
    assert found.attention == tuple(f"OUT{number:02}" for number in ATTENTION[name])
    for model, other in zip(found.models, (near, far), strict=True):
        wanted = asimilarity(base, other, name)
        assert model.asimilarity == pytest.approx(wanted, abs=0.1 if attention > 0.2 else 2.0)
        oracle = cosines(base, other, name)
        assert list(model.blocks) == (models.XL_BLOCKS if name == "sdxl" else models.SD_BLOCKS)
        for block, cosine in model.blocks.items():
            assert 1 - cosine == pytest.approx(1 - oracle[block], rel=0.45), block
        assert 1 - model.cosine == pytest.approx(1 - np.mean(list(oracle.values())), rel=0.1)


def test_small_blocks_are_compared_whole(tmp_path):
    base = unet(width=4)
    other = tuned(base, 0.01)
    (model,) = mk.find_similar(shelf(tmp_path, base=base, other=other) / "base.safetensors").models
    for block, wanted in cosines(base, other).items():
        assert model.blocks[block] == pytest.approx(wanted, abs=2e-4)
    assert model.asimilarity == pytest.approx(asimilarity(base, other), abs=0.05)


def test_the_order_is_sensible(tmp_path):
    base, other = unet(width=12, attention=0.5), unet(width=12, seed=1, attention=0.5)

    def mix(alpha):
        return {key: ((1 - alpha) * each.float() + alpha * other[key].float()).half() for key, each in base.items()}

    made = {"mix": mix(0.3), "fp32": {key: each.float() for key, each in mix(0.3).items()}}
    made |= {"bf16": {key: each.bfloat16() for key, each in mix(0.3).items()}, "renamed": mix(0.3)}
    made |= {"nearby": mix(0.33), "tuned": tuned(mix(0.3), 0.015), "half": mix(0.5), "base": base, "other": other}
    made |= {"unrelated": unet(width=12, seed=5, attention=0.5)}
    found = mk.find_similar(shelf(tmp_path, **made) / "mix.safetensors")
    by_name = {model.path.stem: model for model in found.models}
    assert set(names(found)[:2]) == {"renamed", "fp32"}
    for copy in ("renamed", "fp32"):
        assert by_name[copy].asimilarity == pytest.approx(100, abs=1e-6)
        assert by_name[copy].cosine == 1
        assert by_name[copy].most_different is None
    assert by_name["bf16"].asimilarity > 99
    assert names(found)[2] == "bf16"
    assert names(found)[-1] == "unrelated"
    assert names(found).index("nearby") < names(found).index("half") < names(found).index("other")
    assert names(found).index("nearby") < names(found).index("base")
    assert names(found).index("tuned") < names(found).index("other")


def test_the_block_that_differs_most_is_named(tmp_path):
    base = unet()
    other = tuned(base, 0.02, only=".output_blocks.5.")
    (model,) = mk.find_similar(shelf(tmp_path, base=base, other=other) / "base.safetensors").models
    assert model.most_different == ("OUT05", model.blocks["OUT05"])
    assert [block for block, cosine in model.blocks.items() if cosine < 1] == ["OUT05"]


def test_inpainting_models_are_compared_by_the_channels_that_all_have(tmp_path):
    base = models.checkpoint("sd1")
    inpainting = models.checkpoint("sd1-inpainting", seed=9)
    inpainting |= {key: each for key, each in base.items() if key != models.CONV_IN}
    inpainting[models.CONV_IN][:, :4] = base[models.CONV_IN]
    found = mk.find_similar(shelf(tmp_path, base=base, inpainting=inpainting) / "base.safetensors")
    (model,) = found.models
    assert (model.architecture, model.cosine, model.asimilarity) == ("sd1-inpainting", 1.0, pytest.approx(100))


def test_what_cannot_be_compared_is_not(tmp_path):
    base = unet(width=8)
    place = models.UNET + "output_blocks.4.1.transformer_blocks.0.attn1.to_q.weight"
    ill = {key: each.clone() for key, each in base.items()}
    ill[place][0, 0] = float("nan")
    made = {"base": base, "ill": ill, "wide": unet(width=12)}
    found = mk.find_similar(shelf(tmp_path, **made) / "base.safetensors")
    by_name = {model.path.stem: model for model in found.models}
    assert by_name["ill"].asimilarity is None
    assert by_name["ill"].blocks["OUT04"] == pytest.approx(1)  # the one value is left out
    assert by_name["wide"].asimilarity is None
    assert by_name["wide"].cosine is None
    assert names(found) == ["ill", "wide"]
    zero = {key: torch.zeros_like(each) for key, each in base.items()}
    models.write(tmp_path / "zero.safetensors", zero)
    (model,) = (m for m in mk.find_similar(tmp_path / "zero.safetensors").models if m.path.stem == "base")
    assert (model.asimilarity, model.cosine) == (0, None)


@pytest.mark.parametrize("dtype", ["fp32", "fp64", "bf16", "fp8_e4m3fn", "fp8_e5m2"])
def test_every_dtype_is_read(tmp_path, dtype):
    base = {key: each.to(models.DTYPES[dtype]) for key, each in unet().items()}
    plain = {key: each.float() for key, each in base.items()}
    (model,) = mk.find_similar(shelf(tmp_path, base=base, plain=plain) / "base.safetensors").models
    assert (model.cosine, model.asimilarity) == (1, pytest.approx(100))


# --- the index -----------------------------------------------------------------------------------------


def test_a_signature_survives_its_bytes(tmp_path):
    made = signature.make_signature(open_header(models.write(tmp_path / "a.safetensors", unet(width=16))))
    again = signature.Signature.from_bytes(made.to_bytes())
    assert list(again.samples) == list(made.samples)
    for block, sampled in made.samples.items():
        assert again.samples[block].shapes == sampled.shapes
        assert np.array_equal(again.samples[block].values, sampled.values)
    for block, response in made.responses.items():
        assert again.responses[block].size == response.size
        assert np.array_equal(again.responses[block].places, response.places)
        assert np.array_equal(again.responses[block].values, response.values)
    for broken in (b"", b"PK", made.to_bytes()[:-20], made.to_bytes()[:40]):
        assert signature.Signature.from_bytes(broken) is None


def test_signatures_are_made_once(tmp_path, monkeypatch):
    folder = shelf(tmp_path, a=unet(), b=unet(seed=1), c=unet(seed=2))
    made = []

    def counted(opened):
        made.append(opened.model.path.stem)
        return signature.make_signature(opened)

    monkeypatch.setattr(similar, "make_signature", counted)
    first = mk.find_similar(folder / "a.safetensors")
    assert made == ["a", "b", "c"]
    assert mk.find_similar(folder / "a.safetensors") == first
    mk.rename_model(folder / "b.safetensors", "d")
    mk.find_similar(folder / "c.safetensors")
    assert made == ["a", "b", "c"]
    models.write(folder / "a.safetensors", unet(seed=3))
    assert names(mk.find_similar(folder / "c.safetensors")) == ["d"]  # "a" is not as it was scanned
    mk.scan_library([folder], hashes="none")
    mk.find_similar(folder / "c.safetensors")
    assert made == ["a", "b", "c", "a"]
    monkeypatch.setattr(similar, "METHOD", signature.METHOD + 1)
    mk.find_similar(folder / "c.safetensors")
    assert len(made) == 7


@POSIX
def test_the_file_itself_and_its_links_are_left_out(tmp_path):
    folder = shelf(tmp_path, a=unet(), b=unet(seed=1))
    os.link(folder / "a.safetensors", folder / "linked.safetensors")
    (folder / "symbolic.safetensors").symlink_to(folder / "a.safetensors")
    mk.scan_library([folder], hashes="none")
    assert names(mk.find_similar(folder / "a.safetensors")) == ["b"]
    assert names(mk.find_similar(folder / "symbolic.safetensors")) == ["b"]


def test_only_models_of_the_family_are_compared(tmp_path, monkeypatch):
    made = {"a": models.checkpoint("sd1"), "b": unet(), "v2": models.checkpoint("sd2"), "vae": models.vae_file()}
    folder = shelf(tmp_path, **made)
    (folder / "page.ckpt").write_text("<html>")
    mk.scan_library([folder], hashes="none")
    assert names(mk.find_similar(folder / "a.safetensors")) == ["b"]
    monkeypatch.chdir(folder)
    assert mk.find_similar("v2.safetensors").models == ()


def test_a_model_that_is_not_in_the_library_is_compared(tmp_path, tmp_path_factory):
    shelf(tmp_path, a=unet())
    elsewhere = models.write(tmp_path_factory.mktemp("elsewhere") / "b.safetensors", unet())
    found = mk.find_similar(elsewhere)
    assert names(found) == ["a"]
    assert found.models[0].cosine == 1
    with mk.Library() as library:
        assert len(library.entries()) == 1


def test_what_cannot_be_read_is_told(tmp_path, monkeypatch):
    folder = shelf(tmp_path, a=unet(), b=unet(seed=1), c=unet(seed=2))

    def failing(opened):
        if opened.model.path.stem == "b":
            raise mk.errors.UnreadableInput("Reading it failed.", file=opened.model.path)
        return signature.make_signature(opened)

    monkeypatch.setattr(similar, "make_signature", failing)
    found = mk.find_similar(folder / "a.safetensors")
    assert names(found) == ["c"]
    assert found.unread == {folder / "b.safetensors": "Reading it failed."}


def test_a_stop_keeps_what_was_read(tmp_path, monkeypatch):
    folder = shelf(tmp_path, a=unet(), b=unet(seed=1), c=unet(seed=2))
    token = mk.CancelToken()
    with pytest.raises(Cancelled):
        mk.find_similar(folder / "a.safetensors", on_event=lambda _: token.cancel(), cancel=token)
    made = []
    monkeypatch.setattr(similar, "make_signature", lambda opened: made.append(1) or signature.make_signature(opened))
    mk.find_similar(folder / "a.safetensors")
    assert made == [1]


# --- the command ---------------------------------------------------------------------------------------


def test_the_report_fits_and_is_ordered(tmp_path, shell, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    base = unet(width=8)
    made = {"base": base, "copy": base, "far-" + "x" * 90: tuned(base, 0.05), "near": tuned(base, 0.001)}
    folder = shelf(tmp_path, **made)
    out, err = shell("library", "similar", folder / "base.safetensors")
    lines = out.splitlines()
    assert err == ""
    assert lines[0].split() == ["model", "ASim", "cosine", "differs", "most", "in"]
    assert re.fullmatch(r"copy\.safetensors +100\.00 % +1\.00000", lines[1])
    assert re.fullmatch(r"near\.safetensors +\d+\.\d\d % +0\.99\d+  [A-Z]+\d\d 0\.99\d+", lines[2])
    assert lines[3].startswith("far-xxx")
    assert max(map(len, lines)) <= 80
    assert shell("library", "similar", folder / "base.safetensors", "--top", "1")[0].endswith("… and 2 more (--top)\n")
    report = shell.json("library", "similar", folder / "base.safetensors", "--top", "2")
    assert [Path(each["path"]).name for each in report["models"]] == ["copy.safetensors", "near.safetensors"]
    assert list(report["models"][1]["blocks"]) == models.SD_BLOCKS
    assert report["family"] == "sd1"


def test_what_has_no_unet_is_refused(tmp_path, shell):
    models.write(tmp_path / "vae.safetensors", models.vae_file())
    models.write(tmp_path / "odd.safetensors", {"x": torch.ones(2)})
    for name in ("vae", "odd"):
        with pytest.raises(MissingTensors):
            mk.find_similar(tmp_path / f"{name}.safetensors")
        shell.refused("MissingTensors", 3, "library", "similar", tmp_path / f"{name}.safetensors")
    shell.refused("MissingInput", 3, "library", "similar", tmp_path / "none.safetensors")


def test_an_empty_library_is_told(tmp_path, shell):
    models.write(tmp_path / "a.safetensors", unet())
    out, err = shell("library", "similar", tmp_path / "a.safetensors")
    assert out == ""
    assert "no other sd1 model: mergekit-sd library scan" in err
