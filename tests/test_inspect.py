"""`inspect`: what is told of a file, in JSON and in words."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from small_models import CLIP, UNET, VAE, bare, save, small

from mergekit_sd import architectures
from mergekit_sd.architectures import ema_name
from mergekit_sd.cli.inspect import hash_command, inspect_command
from mergekit_sd.errors import MissingInput
from mergekit_sd.formats.dtypes import DTYPES
from mergekit_sd.formats.values import decode
from mergekit_sd.inspection import bytes_to_read, inspect_file

POSITION_IDS = CLIP + "text_model.embeddings.position_ids"
CONTRACT = {
    *("path", "format", "kind", "architecture", "prediction", "tensors", "bytes", "dtypes", "components"),
    *("ema", "junk", "position_ids", "metadata", "hashes"),
}


def cli(command, *arguments):
    result = CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def words(*arguments):
    return cli(inspect_command, *arguments)


def size_of(tensors):
    return sum(tensor.nbytes for tensor in tensors.values())


# --- the report ------------------------------------------------------------------------------------


def test_the_json_has_the_whole_contract(tmp_path):
    model = small("sd1")
    path = save(tmp_path / "a.safetensors", model, {"format": "pt"})
    report = json.loads(words(path, "--json"))
    assert set(report) == CONTRACT | {"file_bytes", "prunable", "notes", "unread", "encoders", "about"}
    assert (report["path"], report["format"]) == (str(path), "safetensors")
    assert (report["kind"], report["architecture"], report["prediction"]) == ("checkpoint", "sd1", "epsilon")
    assert (report["tensors"], report["bytes"]) == (len(model), size_of(model))
    assert report["file_bytes"] == path.stat().st_size
    assert report["dtypes"] == {"F16": len(model) - 1, "I64": 1}
    vae = {"tensors": 248, "bytes": size_of(bare(model, VAE)), "dtypes": {"F16": 248}, "hash": None}
    assert report["components"]["vae"] == vae
    assert report["components"]["text_encoder"]["dtypes"] == {"F16": len(bare(model, CLIP)) - 1, "I64": 1}
    assert (report["unread"], report["encoders"], report["about"]) == ({"tensors": 0, "bytes": 0}, [], {})
    assert list(report["components"]) == ["unet", "vae", "text_encoder"]
    assert report["ema"] == {"tensors": 0, "bytes": 0}
    assert report["junk"] == {"tensors": 0, "bytes": 0, "keys": []}
    assert report["position_ids"] == {"state": "ok", "wrong": []}
    assert (report["metadata"], report["hashes"], report["prunable"]) == ({"format": "pt"}, None, 0)


def test_hashes_are_told_when_asked_for(tmp_path):
    path = save(tmp_path / "a.safetensors", small("sd1"))
    report = json.loads(words(path, "--json", "--hash"))
    assert set(report["hashes"]) == {"sha256", "autov1", "autov2", "autov3", "content"}
    assert all(len(component["hash"]) == 32 for component in report["components"].values())
    assert report["hashes"] | {"path": str(path)} == json.loads(cli(hash_command, path, "--json"))["files"][0]
    told = words(path, "--hash")
    assert all(value in told for value in report["hashes"].values())
    assert report["components"]["unet"]["hash"] in told


def test_ema_and_junk_are_counted_apart(tmp_path):
    model = small("sd1")
    ema = {ema_name(key): value.clone() for key, value in model.items() if key.startswith(UNET)}
    ema["model_ema.decay"] = torch.tensor(0.9999)
    junk = {CLIP + "text_projection.weight": torch.zeros(3, 4), "loss.logvar": torch.zeros(())}
    path = save(tmp_path / "a.safetensors", model | ema | junk)
    report = inspect_file(path).as_json()
    assert report["ema"] == {"tensors": 687, "bytes": size_of(ema)}
    assert report["junk"] == {"tensors": 2, "bytes": 52, "keys": report["junk"]["keys"]}
    assert set(report["junk"]["keys"]) == set(junk)
    assert report["prunable"] == size_of(ema) + 52
    told = words(path)
    assert "EMA copies of the UNet" in told
    assert "Junk, 2 tensors, 52 B\n        48 B  cond_stage_model.transformer.text_projection.weight\n" in told


def test_markers_and_schedules_are_neither_junk_nor_ema(tmp_path):
    model = small("sdxl") | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0), "betas": torch.zeros(1000)}
    report = inspect_file(save(tmp_path / "a.safetensors", model)).as_json()
    assert (report["architecture"], report["prediction"]) == ("sdxl", "v")
    assert report["ema"]["tensors"] == report["junk"]["tensors"] == report["prunable"] == 0
    assert list(report["components"]) == ["unet", "vae", "text_encoder", "text_encoder_2"]


def test_lora(tmp_path):
    names = [f"lora_unet_down_blocks_0_attentions_0_proj_in.{end}" for end in ("lora_up.weight", "lora_down.weight")]
    report = inspect_file(save(tmp_path / "a.safetensors", {name: torch.zeros(2, 2) for name in names})).as_json()
    assert (report["kind"], report["architecture"], report["prediction"]) == ("lora", None, None)
    assert (report["components"], report["position_ids"], report["prunable"]) == ({}, None, None)


def test_unknown_has_no_junk(tmp_path):
    path = save(tmp_path / "a.safetensors", {"layer.weight": torch.zeros(2, 2)})
    report = inspect_file(path).as_json()
    assert (report["kind"], report["architecture"]) == ("unknown", None)
    assert (report["junk"]["tensors"], report["components"], report["prunable"]) == (0, {}, None)
    assert "not recognised" in words(path)
    assert "no tensors" in words(save(tmp_path / "none.safetensors", {}))


def test_bare_vae(tmp_path):
    report = inspect_file(save(tmp_path / "a.safetensors", bare(small("sd1", only="vae"), VAE))).as_json()
    assert (report["kind"], report["architecture"], report["position_ids"]) == ("vae", None, None)
    assert report["components"]["vae"]["tensors"] == 248


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(MissingInput):
        inspect_file(tmp_path / "a.safetensors", hashes=True)


def test_scan_counts_what_is_not_finite(tmp_path):
    model = {"a": torch.zeros(300_000, dtype=torch.float16), "b": torch.ones(5), "c": torch.arange(3)}
    model["a"][[0, 299_999]] = torch.tensor([float("nan"), float("-inf")]).half()
    model["e5"], model["wide"] = (
        torch.tensor([float("inf")]).to(torch.float8_e5m2),
        torch.tensor([1e300], dtype=torch.float64),
    )
    path = save(tmp_path / "a.safetensors", model)
    done = []
    found = inspect_file(path, hashes=True, scan=True, on_bytes=done.append)
    assert found.as_json()["nonfinite"] == {"a": 2, "e5": 1}
    assert 0.4 < sum(done) / bytes_to_read(path, hashes=True, scan=True) <= 1.01
    assert "NaN or Inf in 2 tensors" in words(path, "--scan")
    assert "nonfinite" not in inspect_file(path).as_json()
    fine = save(tmp_path / "b.safetensors", {"b": torch.ones(5)})
    assert "every value is finite" in words(fine, "--scan")
    assert inspect_file(fine, scan=True).as_json()["nonfinite"] == {}


# --- position_ids ----------------------------------------------------------------------------------

IDS = torch.arange(77)[None]


@pytest.mark.parametrize(
    ("ids", "state", "wrong", "told"),
    [
        (IDS, "ok", [], ": ok"),
        (IDS.int(), "ok", [], ": ok"),
        (None, "missing", [], ": missing"),
        (IDS.half(), "corrupt", [], "corrupt: stored as F16"),
        (IDS.double(), "corrupt", [], "corrupt: stored as F64"),
        (IDS.bfloat16(), "corrupt", [], "corrupt: stored as BF16"),
        (IDS + 1, "corrupt", list(range(77)), "corrupt: 77 of 77 wrong"),
        (IDS.float() + 0.9, "corrupt", [], "corrupt: stored as F32"),
        (IDS[:, :75], "corrupt", [75, 76], "corrupt: 2 of 77 wrong (75, 76)"),
        (torch.arange(79), "corrupt", [77, 78], "corrupt: 2 of 77 wrong"),
        (torch.full((1, 77), float("nan")), "corrupt", list(range(77)), "77 of 77"),
        (torch.zeros(100, 100), "corrupt", list(range(77)), "77 of 77"),
    ],
)
def test_position_ids(tmp_path, ids, state, wrong, told):
    model = small("sd1") | {POSITION_IDS: ids}
    path = save(tmp_path / "a.safetensors", {key: value for key, value in model.items() if value is not None})
    assert inspect_file(path).as_json()["position_ids"] == {"state": state, "wrong": wrong}
    assert told in words(path)


def test_the_classic_corruption(tmp_path):
    """Merged as float at alpha 0.04 and stored: 21 of 77 lie just below their id."""
    model = small("sd1") | {POSITION_IDS: IDS.float() * 0.96 + IDS.float() * 0.04}
    path = save(tmp_path / "a.safetensors", model)
    found = inspect_file(path).position_ids
    assert len(found.wrong) == 21
    assert "position_ids: corrupt: 21 of 77 wrong (3, " in words(path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_ids_in_float8_are_decoded_as_torch_does(tmp_path, dtype):
    ids = IDS.to(dtype)
    found = inspect_file(save(tmp_path / "a.safetensors", small("sd1") | {POSITION_IDS: ids})).position_ids
    assert found.wrong == tuple((ids.float().long() != IDS)[0].nonzero().flatten().tolist())


@pytest.mark.parametrize("name", [name for name in DTYPES if name != "BOOL"])
def test_decode(name):
    dtype = DTYPES[name]
    data = bytes(range(256))
    expected = torch.frombuffer(bytearray(data), dtype=getattr(torch, dtype.torch_name))
    values = torch.tensor(decode(data, dtype), dtype=torch.float64)
    # As float32 in between: torch casts float8 to nothing else. U64's largest are beyond int64, not beyond float64.
    expected = expected.float().double() if dtype.is_float and dtype.itemsize < 8 else expected.double()
    assert torch.equal(values.nan_to_num(7), expected.nan_to_num(7))


def test_novelai_names(tmp_path):
    model = {key.replace("transformer.text_model.", "transformer."): value for key, value in small("sd1").items()}
    model[CLIP + "embeddings.position_ids"] = IDS + 1
    report = inspect_file(save(tmp_path / "a.safetensors", model)).as_json()
    assert (report["architecture"], report["junk"]["tensors"]) == ("sd1", 0)
    assert report["position_ids"] == {"state": "corrupt", "wrong": list(range(77))}


@pytest.mark.parametrize("name", ["sdxl", "sd2", "sdxl-refiner"])
def test_other_families(tmp_path, name):
    model = small(name)
    ids = architectures.get(name).position_ids
    found = inspect_file(save(tmp_path / "a.safetensors", model)).as_json()["position_ids"]
    if ids is None:
        assert found is None
        return
    assert found["state"] == "ok"
    del model[ids]
    assert inspect_file(save(tmp_path / "b.safetensors", model)).as_json()["position_ids"]["state"] == "missing"


@pytest.mark.parametrize("prefix", ["", CLIP])
def test_a_text_encoder_alone(tmp_path, prefix):
    model = {prefix + key: value for key, value in bare(small("sd1", only="text_encoder"), CLIP).items()}
    report = inspect_file(save(tmp_path / "a.safetensors", model)).as_json()
    assert (report["kind"], report["position_ids"]["state"]) == ("text_encoder", "ok")
    del model[prefix + "text_model.embeddings.position_ids"]
    assert inspect_file(save(tmp_path / "b.safetensors", model)).as_json()["position_ids"]["state"] == "missing"


def test_without_a_text_encoder_there_are_no_ids(tmp_path):
    model = {key: value for key, value in small("sd1").items() if not key.startswith(CLIP)}
    assert inspect_file(save(tmp_path / "a.safetensors", model)).position_ids is None


# --- for people ------------------------------------------------------------------------------------


def test_names_are_shown_escaped(tmp_path):
    """Bad inputs, row 11."""
    name = "a\x1b[31m\n[/x]"
    path = save(
        tmp_path / "[b] x\x1b[31m.safetensors", small("sd1") | {name: torch.full((3,), float("nan"))}, {name: name}
    )
    told = words(path, "--scan", "--hash")
    assert "\x1b" not in told
    assert f"a\\x1b[31m\\n[/x]: a\\x1b[31m\\n[/x]" in told  # noqa: F541
    assert "12 B  a\\x1b[31m\\n[/x]\n" in told
    assert "[b] x\\x1b[31m.safetensors\n" in told
    assert json.loads(words(path, "--json"))["junk"]["keys"] == [name]


def test_long_lists_and_values_are_cut(tmp_path):
    junk = {f"loss.{i:02}": torch.zeros(1) for i in range(50)}
    told = words(save(tmp_path / "a.safetensors", small("sd1") | junk, {"recipe": "x" * 5000}))
    assert "… and 30 more" in told
    assert "x" * 240 + " … (5,000 characters)" in told
    assert "x" * 241 not in told


def test_a_report_fits_80_columns(tmp_path):
    model = small("sd1") | {ema_name(UNET + "out.2.bias"): torch.zeros(4)}
    path = save(tmp_path / "a.safetensors", model)
    command = [sys.executable, "-m", "mergekit_sd", "inspect", "a.safetensors", "--hash"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, env={**os.environ, "COLUMNS": "80"})
    lines = done.stdout.decode().splitlines()
    assert path.name == lines[0]
    assert max(map(len, lines)) <= 80
    assert any(line.startswith(" UNet") and len(line.split()[-1]) == 32 for line in lines)


@pytest.mark.parametrize("arguments", [["inspect"], ["inspect", "--json"], ["hash"], ["inspect", "--hash"]])
def test_neither_torch_nor_numpy_is_imported(tmp_path, arguments):
    path = save(tmp_path / "a.safetensors", small("sd1"))
    code = "import sys; from mergekit_sd.cli.main import run; code = run(sys.argv[1:]);"
    code += "sys.exit(code or 7 * any(name in sys.modules for name in ('torch', 'numpy')))"
    done = subprocess.run([sys.executable, "-c", code, *arguments, str(path)], capture_output=True)
    assert done.returncode == 0, done
