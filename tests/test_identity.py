"""The hashes of a file, and the weights hash by which one VAE is known in any container."""

from __future__ import annotations

import hashlib
import json
import struct

import pytest
import torch
import xxhash
from click.testing import CliRunner
from safetensors.torch import save_file
from small_models import CLIP, VAE, bare, save, small

from mergekit_sd.architectures import detect
from mergekit_sd.cli.inspect import hash_command
from mergekit_sd.errors import MissingInput, MissingTensors
from mergekit_sd.formats.hashing import LEAF, hash_file_tensors
from mergekit_sd.formats.open import open_model
from mergekit_sd.inspection import identify, weights_hash, weights_hashes

ENTRY = "decoder.conv_in.weight"
LARGE = "encoder.mid.block_1.conv1.weight"


def weights(path, component="vae", **options):
    model = open_model(path)
    return weights_hash(model, detect(model.tensors), component, **options)


def cast(tensors, dtype):
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in tensors.items()}


def by_the_book(tensors):
    """The docstrings of `hashing` and `identity`, once more, as plainly as can be."""
    book = b""
    for name in sorted(tensors):
        data = tensors[name].half().numpy().tobytes()
        leaves = [data[i : i + 4194304] for i in range(0, len(data), 4194304)]
        shape = tensors[name].shape
        book += struct.pack("<Q", len(name)) + name.encode() + struct.pack("<Q", 3) + b"F16"
        book += struct.pack(f"<Q{len(shape)}Q", len(shape), *shape)
        book += struct.pack("<Q", len(leaves)) + b"".join(xxhash.xxh3_128_digest(leaf) for leaf in leaves)
    return xxhash.xxh3_128_hexdigest(book)


@pytest.fixture(scope="module")
def vae():
    """A VAE in float32 with values that float16 must round, and one tensor of more than a leaf."""
    random = torch.Generator().manual_seed(5)
    made = bare(small("sd1", only="vae"), VAE)
    made = {key: torch.randn(value.shape, generator=random) for key, value in made.items()}
    made[LARGE] = torch.randn(600, 400, 3, 3, generator=random)
    assert made[LARGE].numel() * 2 > LEAF
    return made


def baked(vae, name="sd1"):
    model = {key: value for key, value in small(name).items() if not key.startswith(VAE)}
    return model | {VAE + key: value for key, value in vae.items()}


def test_one_vae_in_any_container_has_one_hash(tmp_path, vae):
    expected = by_the_book(vae)
    files = [
        vae,
        cast(vae, torch.float16),
        dict(reversed(vae.items())),
        {VAE + key: value for key, value in vae.items()},
        baked(vae),
        baked(cast(vae, torch.float16)),
        baked(vae, "sdxl"),
        vae | {"loss.logvar": torch.zeros(())},
    ]
    for number, tensors in enumerate(files):
        assert weights(save(tmp_path / f"{number}.safetensors", tensors, {"n": str(number)})) == expected, number


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float8_e5m2], ids=str)
def test_other_dtypes_are_hashed_by_their_float16_values(tmp_path, vae, dtype):
    as_stored = cast(vae, dtype)
    found = weights(save(tmp_path / "a.safetensors", as_stored))
    assert found == by_the_book({key: value.float().half() for key, value in as_stored.items()})
    assert (found == by_the_book(vae)) == (dtype == torch.float64)


def test_another_vae_has_another_hash(tmp_path, vae):
    expected = by_the_book(vae)
    other = vae | {ENTRY: vae[ENTRY].clone()}
    other[ENTRY].view(-1)[3] += 0.01
    assert weights(save(tmp_path / "a.safetensors", other)) == by_the_book(other) != expected
    reshaped = vae | {LARGE: vae[LARGE].reshape(400, 600, 3, 3)}  # the same bytes
    assert weights(save(tmp_path / "b.safetensors", reshaped)) == by_the_book(reshaped) != expected


def test_text_encoders_meet_without_position_ids(tmp_path):
    clip = bare(small("sd1", only="text_encoder"), CLIP)
    ids = "text_model.embeddings.position_ids"
    expected = by_the_book({key: value for key, value in clip.items() if key != ids})
    novelai = {CLIP + key.removeprefix("text_model."): value for key, value in clip.items()}
    xl = {key: value for key, value in small("sdxl").items() if not key.startswith("conditioner.embedders.0.")}
    xl |= {"conditioner.embedders.0.transformer." + key: value for key, value in clip.items()}
    files = [
        clip,
        clip | {ids: torch.arange(77.0)[None]},
        {key: value for key, value in clip.items() if key != ids},
        small("sd1") | {CLIP + key: value for key, value in clip.items()},
        {key: value for key, value in small("sd1").items() if not key.startswith(CLIP)} | novelai,
        xl,
    ]
    for number, tensors in enumerate(files):
        assert weights(save(tmp_path / f"{number}.safetensors", tensors), "text_encoder") == expected, number


def test_all_components_in_one_pass(tmp_path):
    path = save(tmp_path / "a.safetensors", small("sdxl"))
    model = open_model(path)
    layout = detect(model.tensors)
    done = []
    found = weights_hashes(model, layout, threads=3, on_bytes=done.append)
    assert set(found) == {"unet", "vae", "text_encoder", "text_encoder_2"}
    assert all(weights(path, component, threads=1) == value for component, value in found.items())
    assert sum(done) == sum(t.nbytes for t in model.tensors.values() if t.dtype.is_float)
    with pytest.raises(MissingTensors) as refused:
        weights_hash(model, layout, "vea")
    assert refused.value.hint == 'did you mean "vae"?'


def test_a_float16_tensor_hashes_as_its_bytes(tmp_path):
    """The weights hash of a float16 component is the content hash of its file without prefixes."""
    unet = bare(small("sd1", only="unet"), "model.diffusion_model.")
    path = save(tmp_path / "a.safetensors", unet)
    assert weights(path, "unet") == hash_file_tensors(open_model(path))


def test_empty_tensors_and_overflow_are_hashed_too(tmp_path, vae):
    odd = vae | {ENTRY: torch.full((2, 4, 3, 3), 1e6), "encoder.conv_in.bias": torch.zeros(0)}
    assert weights(save(tmp_path / "a.safetensors", odd)) == by_the_book(odd)


# --- the hashes of a file --------------------------------------------------------------------------


def hashed(*arguments):
    result = CliRunner().invoke(hash_command, [str(each) for each in arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_identity_and_its_report(tmp_path):
    path = save(tmp_path / "a.safetensors", {"x": torch.randn(500_000)})
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    found = identify(path)
    assert found.as_json() == {
        "sha256": hashlib.sha256(raw).hexdigest(),
        "autov1": hashlib.sha256(raw[0x100000:0x110000]).hexdigest()[:8],
        "autov2": hashlib.sha256(raw).hexdigest()[:10],
        "autov3": hashlib.sha256(raw[start:]).hexdigest()[:12],
        "content": hash_file_tensors(open_model(path)),
    }
    told = hashed(path)
    assert all(value in told for value in found.as_json().values())
    assert all(len(line) <= 80 for line in told.splitlines()[1:])


def test_any_file_has_hashes_and_some_no_content_hash(tmp_path):
    page = tmp_path / "a.safetensors"
    page.write_text("<html>")
    model = save(tmp_path / "b.safetensors", {"x": torch.zeros(3)})
    cut = tmp_path / "c.safetensors"
    cut.write_bytes(model.read_bytes()[:-1])
    reports = json.loads(hashed(page, model, cut, "--json"))["files"]
    assert [report["content"] is None for report in reports] == [True, False, True]
    assert ["note" in report for report in reports] == [True, False, True]
    assert reports[0]["sha256"] == hashlib.sha256(b"<html>").hexdigest()
    assert "content  none: " in hashed(page)


def test_missing_file(tmp_path):
    with pytest.raises(MissingInput):
        identify(tmp_path / "a.safetensors")


def test_a_lora_says_what_a1111_shows(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(3)}, str(path), metadata={"sshs_model_hash": "0123456789abcdef\x1b"})
    assert "0123456789ab  A1111 shows this one" in hashed(path)
    save_file({"x": torch.zeros(3)}, str(path), metadata={"sshs_model_hash": identify(path).file.sha256_data})
    assert "A1111 shows this one" not in hashed(path)
