"""recover: the records that A1111 and supermerger leave in a file become recipes, or are refused by name."""

from __future__ import annotations

import json
import tomllib

import models
import pytest
import story

import mergekit_sd as mk
from mergekit_sd.provenance import SDXL_BLOCKS, UNET_BLOCKS

SHA = {slot: slot * 64 for slot in "abcde"}


@pytest.fixture
def shell(capsys):
    return story.Shell(capsys)


A1111 = {
    "type": "webui",
    "primary_model_hash": SHA["a"],
    "secondary_model_hash": SHA["b"],
    "tertiary_model_hash": SHA["c"],
    "interp_method": "Weighted sum",
    "multiplier": 0.3,
    "save_as_half": True,
    "custom_name": "",
    "config_source": 0,
    "bake_in_vae": "None",
    "discard_weights": "",
    "is_inpainting": False,
    "is_instruct_pix2pix": False,
}
KNOWN = {
    SHA["a"]: {"name": "sub\\first.safetensors", "legacy_hash": "12345678", "sd_merge_recipe": None},
    SHA["b"]: {"name": "second.safetensors", "legacy_hash": "12345678", "sd_merge_recipe": None},
}
SUPERMERGER = {
    "type": "sd-webui-supermerger",
    "weights_alpha": None,
    "weights_beta": None,
    "weights_alpha_orig": None,
    "weights_beta_orig": None,
    "model_a": SHA["a"],
    "model_b": SHA["b"],
    "model_c": SHA["c"],
    "base_alpha": 0.4,
    "base_beta": 0.2,
    "mode": "Weight sum",
    "mbw": False,
    "elemental_merge": "",
    "calcmode": "normal",
    "Off": [""],
}


def short(data):
    """The data with models as text says them: the file alone where there is nothing else."""
    entries = {name: entry["file"] if list(entry) == ["file"] else entry for name, entry in data["models"].items()}
    return {**data, "models": entries}


def recovered(folder, record, known=KNOWN):
    """The recipe that a record becomes; it is sound, and its text says the same."""
    metadata = {"format": "pt", "sd_merge_recipe": json.dumps(record)}
    metadata |= {} if known is None else {"sd_merge_models": json.dumps(known)}
    path = models.write(folder / "merged.safetensors", {"t": models.torch.ones(2)}, metadata)
    found = mk.recover(path)
    assert tomllib.loads(mk.recipe_text(found.data, found.notes)) == short(found.data)
    return found


def test_a1111_weighted_sum(tmp_path):
    found = recovered(tmp_path, A1111)
    assert found.source == "a1111"
    assert found.notes == ()
    assert found.data == {
        "recipe": 1,
        "title": "merged",
        "models": {
            "a": {"file": "sub/first.safetensors", "sha256": SHA["a"]},
            "b": {"file": "second.safetensors", "sha256": SHA["b"]},
        },
        "steps": {"merge": {"op": "weighted_sum", "a": "a", "b": "b", "alpha": 0.3}},
        "outputs": {"output": {"model": "merge", "file": "merged.safetensors"}},
    }


def test_a1111_add_difference_as_it_can_be(tmp_path):
    record = A1111 | {
        "interp_method": "Add difference",
        "multiplier": 1.4,
        "custom_name": "Mine",
        "save_as_half": False,
    }
    data = recovered(tmp_path, record, None).data
    assert data["title"] == "Mine"
    assert data["models"]["c"] == {"file": "cccccccccc.safetensors", "sha256": SHA["c"]}
    assert data["steps"]["merge"] == {
        **{"op": "add_difference", "a": "a", "b": "b", "c": "c"},
        **{"alpha": 1.4, "extrapolate": True},
    }
    assert data["outputs"]["output"]["dtype"] == "keep"


def test_a1111_no_interpolation_with_a_vae(tmp_path):
    record = A1111 | {
        "interp_method": "No interpolation",
        "bake_in_vae": "mse.safetensors",
        "discard_weights": "ema\x1b",
    }
    found = recovered(tmp_path, record | {"secondary_model_hash": None, "tertiary_model_hash": None})
    assert "steps" not in found.data
    assert list(found.data["models"]) == ["a", "vae"]
    assert found.data["outputs"]["output"] == {"model": "a", "file": "merged.safetensors", "vae": "vae"}
    assert found.notes == ("the WebUI left out weights that match 'ema\\x1b'; the recipe does not",)


@pytest.mark.parametrize("mode", ["Weight sum", "Add difference", "Triple sum", "sum Twice", "Weight", "Twice"])
def test_supermerger_modes(tmp_path, mode):
    found = recovered(tmp_path, SUPERMERGER | {"mode": mode})
    step = found.data["steps"]["merge"]
    operations = {"Weight": "weighted_sum", "Add": "add_difference", "Triple": "triple_sum", "Twice": "sum_twice"}
    assert step["op"] == next(operation for word, operation in operations.items() if word in mode)
    assert step["alpha"] == 0.4
    assert step.get("beta") == (0.2 if mode in ("Triple sum", "sum Twice", "Twice") else None)
    assert list(found.data["models"]) == (["a", "b"] if "Weight" in mode else ["a", "b", "c"])
    assert found.data["models"]["b"] == {"file": "second.safetensors", "sha256": SHA["b"]}
    assert found.notes


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("blocks", [UNET_BLOCKS, [*SDXL_BLOCKS, "vae"], SDXL_BLOCKS])
def test_supermerger_block_weights(tmp_path, blocks, as_text):
    numbers = [round(index / 32, 3) for index in range(len(blocks))]
    weights = ",".join(map(str, numbers)) if as_text else numbers
    more = {"mode": "sum Twice", "mbw": True, "weights_alpha": weights, "weights_beta": weights}
    step = recovered(tmp_path, SUPERMERGER | more).data["steps"]["merge"]
    assert step["alpha"] == {"base": 0.4, **dict(zip(blocks, numbers, strict=True))}
    assert step["beta"] == {"base": 0.2, **dict(zip(blocks, numbers, strict=True))}


def test_supermerger_beyond_one_and_models_by_name(tmp_path):
    record = SUPERMERGER | {"base_alpha": -0.2, "model_a": "mine.safetensors [0123456789]", "model_b": "other.ckpt"}
    data = recovered(tmp_path, record, None).data
    assert data["models"] == {"a": {"file": "mine.safetensors"}, "b": {"file": "other.ckpt"}}
    assert data["steps"]["merge"]["extrapolate"] is True


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (A1111 | {"interp_method": "Train difference"}, '"Train difference"'),
        (A1111 | {"interp_method": None}, '"None"'),
        (A1111 | {"secondary_model_hash": None}, "which file model b was"),
        (A1111 | {"multiplier": "x\x1b"}, "cannot be used"),
        (A1111 | {"multiplier": None}, "cannot be used"),
        (SUPERMERGER | {"mode": "Swap\x1b"}, "mode Swap\\x1b"),
        (SUPERMERGER | {"calcmode": "cosineA"}, "calculation cosineA"),
        (SUPERMERGER | {"calcmode": "trainDifference"}, "calculation trainDifference"),
        (SUPERMERGER | {"elemental_merge": ["OUT05:attn:0.5"]}, "elemental merge"),
        (SUPERMERGER | {"Exclude": ["BASE", ""]}, "Exclude blocks"),
        (SUPERMERGER | {"model_b": ""}, "which file model b was"),
        (SUPERMERGER | {"base_alpha": "much"}, "no weights in base_alpha"),
        (SUPERMERGER | {"mbw": True, "weights_alpha": [0.5] * 24}, "24 block weights in weights_alpha"),
        (SUPERMERGER | {"mbw": True, "weights_alpha": None}, "no weights in weights_alpha"),
        (SUPERMERGER | {"mbw": True, "weights_alpha": [[]]}, "no weights in weights_alpha"),
    ],
)
def test_records_without_a_counterpart_are_refused_by_name(tmp_path, monkeypatch, shell, record, said):
    monkeypatch.chdir(tmp_path)
    metadata = {"sd_merge_recipe": json.dumps(record), "sd_merge_models": json.dumps(KNOWN)}
    models.write(tmp_path / "x.safetensors", {"t": models.torch.ones(2)}, metadata)
    error = shell.refused("NoRecipe", 3, "recover", "x.safetensors")
    _, err = shell("recover", "x.safetensors", code=3)
    assert said in err
    assert "\x1b" not in err
    assert error["hint"]
