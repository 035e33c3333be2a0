"""`inspect` on embeddings, hypernetworks, ControlNets and parts alone; on training checkpoints; metadata in words."""

from __future__ import annotations

import itertools
import json

import adapter_files as made
import models
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from pickle_files import packed_again
from small_models import save, small

import mergekit_sd as mk
from mergekit_sd import architectures
from mergekit_sd.cli.inspect import inspect_command
from mergekit_sd.formats.open import open_model
from mergekit_sd.inspection import inspect_file
from mergekit_sd.inspection.training import about


def report_of(path):
    report = inspect_file(path).as_json()
    assert json.loads(json.dumps(report)) == report
    return report


def words(path):
    result = CliRunner().invoke(inspect_command, [str(path)], catch_exceptions=False)
    assert result.exit_code == 0
    return " ".join(result.stdout.split())


def saved(path, value):
    torch.save(value, path)
    return path


# --- textual inversion -----------------------------------------------------------------------------


@pytest.mark.parametrize("parameters", [dict, torch.nn.ParameterDict], ids=["dict", "ParameterDict"])
@pytest.mark.parametrize(("width", "family"), [(768, "sd1"), (1024, "sd2"), (640, None)])
def test_the_webuis_embedding(tmp_path, parameters, width, family):
    value = {
        "string_to_token": {"*": torch.tensor(265)},
        "string_to_param": parameters({"*": torch.nn.Parameter(torch.zeros(5, width))}),
        "name": "lantern",
        "step": 1999,
        "sd_checkpoint": "a9263745",
        "sd_checkpoint_name": "v1-5-pruned",
    }
    path = saved(tmp_path / "lantern.pt", value)
    report = report_of(path)
    assert report["kind"] == "embedding"
    assert report["embedding"] == {
        "vectors": 5,
        "widths": {"*": width},
        "family": family,
        "token": None,
        "name": "lantern",
        "step": 1999,
        "trained_on": "v1-5-pruned",
    }
    told = words(path)
    assert f"vectors 5 of width {width} token the file's name" in told
    assert "step 1,999 trained on v1-5-pruned Metadata sd_checkpoint: a9263745" in told


@pytest.mark.parametrize("shape", [(768,), (1, 768), (3, 768)])
@pytest.mark.parametrize("token", ["<cat-toy>", "style", "a b", "*"])
def test_an_embedding_of_diffusers(tmp_path, shape, token):
    report = report_of(saved(tmp_path / "learned_embeds.bin", {token: torch.zeros(shape)}))
    assert (report["kind"], report["embedding"]["family"]) == ("embedding", "sd1")
    assert report["embedding"]["vectors"] == (shape[0] if len(shape) == 2 else 1)
    assert report["embedding"]["token"] == (None if token == "*" else token)


def test_embeddings_in_safetensors(tmp_path):
    report = report_of(save(tmp_path / "a.safetensors", {"emb_params": torch.zeros(8, 1024)}))
    assert (report["embedding"]["vectors"], report["embedding"]["family"]) == (8, "sd2")
    path = save(tmp_path / "b.safetensors", {"clip_l": torch.zeros(6, 768), "clip_g": torch.zeros(6, 1280)})
    embedding = report_of(path)["embedding"]
    assert (embedding["vectors"], embedding["family"], embedding["token"]) == (6, "sdxl", None)
    assert embedding["widths"] == {"clip_g": 1280, "clip_l": 768}
    assert "for Stable Diffusion XL vectors 6 of width" in words(path)


def test_vectors_of_no_width(tmp_path):
    embedding = report_of(save(tmp_path / "a.safetensors", {"emb_params": torch.zeros(3, 0)}))["embedding"]
    assert (embedding["vectors"], embedding["family"]) == (0, None)


@pytest.mark.parametrize("shape", [(), (1, 4, 64, 64), (4, 320, 3, 3)])
def test_one_tensor_of_another_rank_is_no_embedding(tmp_path, shape):
    assert report_of(save(tmp_path / "a.safetensors", {"latent": torch.zeros(shape)}))["kind"] == "unknown"


def test_two_tensors_are_no_embedding(tmp_path):
    path = save(tmp_path / "a.safetensors", {"a": torch.zeros(768), "b": torch.zeros(768)})
    assert report_of(path)["kind"] == "unknown"


# --- hypernetworks ---------------------------------------------------------------------------------


def hypernetwork(widths, structure, *, norm=False, old=False):
    """As A1111 saves it: for each width two nets, of layers that count their activations and norms along."""

    def net(width):
        tensors, place = {}, 1 if old else 0
        for n, (one, two) in enumerate(itertools.pairwise(structure)):
            shape = (int(width * two), int(width * one))
            dot = "" if old else "."
            tensors[f"linear{dot}{place}.weight"] = torch.zeros(shape)
            tensors[f"linear{dot}{place}.bias"] = torch.zeros(shape[0])
            place += 1 if old else 2  # an activation lies between
            if norm and n < len(structure) - 2:
                tensors[f"linear.{place}.weight"] = tensors[f"linear.{place}.bias"] = torch.zeros(shape[0])
                place += 1
        return tensors

    return {width: (net(width), net(width)) for width in widths}


@pytest.mark.parametrize("structure", [[1, 2, 1], [1, 1.5, 2, 1]])
@pytest.mark.parametrize("norm", [False, True])
def test_a_hypernetwork(tmp_path, structure, norm):
    value = hypernetwork((768, 320, 640, 1280), structure, norm=norm) | {
        "step": 5000,
        "name": "fog",
        "layer_structure": structure,
        "activation_func": "relu",
        "is_layer_norm": norm,
        "weight_initialization": "Normal",
        "use_dropout": True,
        "sd_checkpoint": "925997e9",
        "sd_checkpoint_name": "animefull",
        "activate_output": False,
        "last_layer_dropout": False,
        "dropout_structure": [0, 0.3, 0],
        "optional_info": None,
    }
    path = saved(tmp_path / "fog.pt", value)
    report = report_of(path)
    assert report["kind"] == "hypernetwork"
    assert report["hypernetwork"] == {
        "widths": [320, 640, 768, 1280],
        "structure": structure,
        "activation": "relu",
        "activates_output": False,
        "layer_norm": norm,
        "dropout": "0, 0.3, 0",
        "step": 5000,
        "name": "fog",
        "family": "sd1",
        "trained_on": "animefull",
    }
    told = words(path)
    assert f"layers {'×'.join(f'{each:g}' for each in structure)}, relu layer norm {'yes' if norm else 'no'}" in told
    assert "dropout 0, 0.3, 0 name fog steps 5,000 trained on animefull" in told


def test_an_old_hypernetwork_says_less(tmp_path):
    path = saved(tmp_path / "old.pt", hypernetwork((1024, 320), (1, 2, 1), old=True) | {"step": 10, "name": None})
    net = report_of(path)["hypernetwork"]
    assert (net["structure"], net["family"], net["activation"]) == ([1, 2, 1], "sd2", None)
    assert (net["dropout"], net["name"], net["activates_output"]) == (None, None, True)


def test_an_optimizer_beside_a_hypernetwork_is_not_its(tmp_path):
    """A1111 wrote it into the file itself for a while."""
    nets = hypernetwork((768,), (1, 2, 1))
    state = {n: {"step": n, "exp_avg": torch.zeros(768, 768), "exp_avg_sq": torch.zeros(768, 768)} for n in range(8)}
    path = saved(tmp_path / "a.pt", nets | {"optimizer_name": "AdamW", "optimizer_state_dict": {"state": state}})
    report = report_of(path)
    assert (report["kind"], report["tensors"]) == ("hypernetwork", 8)
    assert report["unread"] == {"tensors": 16, "bytes": 16 * 768 * 768 * 4}
    assert report["prunable"] is None


def test_short_lists_of_a_pickle_are_kept_and_nothing_else(tmp_path):
    value = {
        "state_dict": {"w": torch.zeros(2)},
        "structure": [1, 2.5, 1],
        "pair": (True, 3),
        "long": [1] * 33,
        "empty": [],
        "nested": [[1]],
        "texts": ["a"],
        "huge": [1 << 70],
    }
    assert open_model(saved(tmp_path / "a.pt", value)).metadata == {"structure": "[1, 2.5, 1]", "pair": "[True, 3]"}


# --- ControlNets -----------------------------------------------------------------------------------

LDM_ATTENTION = "input_blocks.1.1.transformer_blocks.0.attn2.to_k"
DIFFUSERS_ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.mark.parametrize(
    ("names", "style", "family", "rank"),
    [
        (
            {"control_model.zero_convs.0.0.weight": (4, 4), f"control_model.{LDM_ATTENTION}.weight": (8, 768)},
            "ldm",
            "sd1",
            None,
        ),
        ({"zero_convs.0.0.weight": (4, 4), f"{LDM_ATTENTION}.weight": (8, 1024)}, "ldm", "sd2", None),
        (
            {"controlnet_cond_embedding.conv_in.weight": (4, 3), f"{DIFFUSERS_ATTENTION}.weight": (8, 2048)},
            "diffusers",
            "sdxl",
            None,
        ),
        ({"controlnet_down_blocks.0.weight": (4, 3)}, "diffusers", None, None),
        (
            {
                "lora_controlnet": (0,),
                "input_hint_block.0.weight": (4, 3),
                f"{LDM_ATTENTION}.down": (64, 2048),
                f"{LDM_ATTENTION}.up": (8, 64),
            },
            "control-lora",
            "sdxl",
            64,
        ),
        (
            {
                f"lllite_unet_input_blocks_7_1_transformer_blocks_{n}_attn1_to_q.{end}": (4, 4)
                for n in range(10)
                for end in ("down.0.weight", "mid.0.weight", "up.0.weight", "conditioning1.0.weight")
            },
            "lllite",
            "sdxl",
            None,
        ),
    ],
)
def test_controlnets(tmp_path, names, style, family, rank):
    path = save(tmp_path / "a.safetensors", {name: torch.zeros(shape) for name, shape in names.items()})
    report = report_of(path)
    assert report["kind"] == "controlnet"
    assert report["controlnet"] == {"style": style, "family": family, "rank": rank, "checkpoint": False}
    told = words(path)
    assert ("rank 64" in told) == (rank is not None)
    assert ("cannot be told" in told) == (family is None)


def test_a_controlnet_with_its_checkpoint(tmp_path):
    model = small("sd1")
    copy = {
        name.replace("model.diffusion_model.", "control_model."): t for name, t in model.items() if ".input_" in name
    }
    path = save(tmp_path / "a.safetensors", model | copy)
    assert report_of(path)["controlnet"]["checkpoint"] is True
    assert "besides a whole checkpoint" in words(path)


# --- parts alone -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "part", "encoder"),
    [
        ("sd1", "text_encoder", "CLIP ViT-L"),
        ("sd2", "text_encoder", "OpenCLIP ViT-H"),
        ("sdxl", "text_encoder", "CLIP ViT-L"),
        ("sdxl", "text_encoder_2", "OpenCLIP ViT-bigG"),
    ],
)
@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize("ids", [True, False])
def test_text_encoders_by_name(tmp_path, name, part, encoder, bare, ids):
    architecture = architectures.get(name)
    prefix = architecture.components[part]
    tensors = {}
    for key, spec in architecture.tensors.items():
        shape = [min(size, 4) for size in spec.shape]
        if spec.component == part and (ids or not key.endswith("position_ids")):
            if key.endswith("token_embedding.weight"):  # its width tells
                shape[-1] = spec.shape[-1]
            tensors[key.removeprefix(prefix) if bare else key] = torch.zeros(shape)
    path = save(tmp_path / "a.safetensors", tensors)
    report = report_of(path)
    assert (report["kind"], report["encoders"]) == ("text_encoder", [encoder])
    assert report["components"][part]["tensors"] == len(tensors)
    assert f"text encoder: {encoder} " in words(path)
    state = (report["position_ids"] or {}).get("state")
    assert state == (None if encoder.startswith("OpenCLIP") else "corrupt" if ids else "missing")


# --- dtypes, and what pruning saves ----------------------------------------------------------------


def test_dtypes_of_each_component(tmp_path):
    model = small("sd1")
    model = {name: t.float() if name.startswith("first_stage_model.") else t for name, t in model.items()}
    path = save(tmp_path / "a.safetensors", model)
    components = report_of(path)["components"]
    assert components["unet"]["dtypes"] == {"F16": 686}
    assert components["vae"]["dtypes"] == {"F32": 248}
    assert set(components["text_encoder"]["dtypes"]) == {"F16", "I64"}
    assert "F16 686" in words(path)
    assert "F32 248" in words(path)


def training(seed=3, *, optimizer=True, ema=True):
    """A training checkpoint: weights in float32, their EMA, junk, and Adam's moments around them."""
    weights = {
        name: t.float() if t.is_floating_point() else t for name, t in models.checkpoint("sd1", seed, width=16).items()
    }
    state = models.with_ema(weights) if ema else dict(weights)
    state["model.diffusion_model.left.over"] = torch.zeros(5000)
    moments = {n: {"step": n, "exp_avg": t.clone(), "exp_avg_sq": t.clone()} for n, t in enumerate(weights.values())}
    around = {"optimizer_states": [{"state": moments, "param_groups": [{"lr": 1e-4}]}]} if optimizer else {}
    return {"state_dict": state, "epoch": 3, "global_step": 900, **around}


def measured(path, tmp_path):
    out = tmp_path / "pruned.safetensors"
    mk.save(mk.ops.prune(mk.open(path)), out, dtype="keep", force=True)
    return path.stat().st_size - out.stat().st_size


@pytest.mark.parametrize("container", ["zip", "legacy"])
@pytest.mark.parametrize("optimizer", [True, False])
@pytest.mark.parametrize("ema", [True, False])
def test_prune_saves_what_inspect_says(tmp_path, container, optimizer, ema):
    path = tmp_path / "last.ckpt"
    value = training(optimizer=optimizer, ema=ema)
    torch.save(value, path, _use_new_zipfile_serialization=container == "zip")
    found = inspect_file(path)
    saving = measured(path, tmp_path)
    tensors = len(value["state_dict"]) + found.unread[0]
    assert abs(found.prunable - saving) < 600 * tensors  # the containers' own bytes for each tensor
    assert found.prunable > 0.95 * (found.ema.bytes + found.junk.bytes + found.unread[1])
    weights = sum(t.nbytes for name, t in value["state_dict"].items() if not name.startswith("model_ema."))
    assert (found.unread[1] > 1.9 * (weights - 20_000)) == optimizer
    told = words(path)
    assert ("no part of the model" in told) == optimizer
    assert ("Without EMA, junk and what is no part of the model: " in told) == optimizer
    assert report_of(path)["unread"]["tensors"] == (2 * len(models.shapes("sd1")) if optimizer else 0)


def test_of_large_weights_the_prediction_is_near(tmp_path):
    """Of a real file's gigabytes, what the containers take for each tensor is nothing."""
    value = training()
    large = torch.zeros(1500, 1500)
    value["state_dict"][models.UNET + "time_embed.0.weight"] = large
    value["state_dict"]["model_ema.diffusion_modeltime_embed0weight"] = large + 1
    value["optimizer_states"].append({"exp_avg": large + 2, "exp_avg_sq": large + 3})
    path = saved(tmp_path / "last.ckpt", value)
    assert inspect_file(path).prunable == pytest.approx(measured(path, tmp_path), rel=0.03)


def test_a_compressed_checkpoint_shrinks_by_less(tmp_path):
    """What stays is unpacked: zeros that took nothing take their room again."""
    path = saved(tmp_path / "a.ckpt", training())
    plain = inspect_file(path).prunable
    path.write_bytes(packed_again(path.read_bytes()))
    found = inspect_file(path)
    assert found.prunable < plain
    assert found.prunable - measured(path, tmp_path) < 600 * 6000
    zeros = {name: torch.zeros_like(t) for name, t in models.checkpoint("sd1", 0, width=16).items()}
    path = saved(tmp_path / "b.ckpt", zeros | {"junk": torch.zeros(1000)})
    path.write_bytes(packed_again(path.read_bytes()))
    assert inspect_file(path).prunable == 0 > measured(path, tmp_path)


def test_tensors_that_share_the_models_memory_take_none(tmp_path):
    weights = {"a": torch.zeros(1000), "b": torch.zeros(10)}
    again = {"state_dict": weights, "callbacks": {"best": dict(weights)}, "more": [weights["a"][:500], torch.zeros(7)]}
    model = open_model(saved(tmp_path / "a.ckpt", again))
    assert (model.unread_tensors, model.unread_bytes) == (2, 28)  # the slice and the seven numbers


# --- metadata in words -----------------------------------------------------------------------------

KOHYA = {
    "ss_v2": "False",
    "ss_sd_model_name": "v1-5-pruned.ckpt",
    "ss_base_model_version": "sd_v1",
    "ss_output_name": "lantern_v2",
    "ss_network_module": "lycoris.kohya",
    "ss_network_dim": "32",
    "ss_network_alpha": "16.0",
    "ss_network_args": json.dumps({"algo": "loha", "conv_dim": "8", "conv_alpha": 4}),
    "ss_learning_rate": "0.0001",
    "ss_unet_lr": "0.0001",
    "ss_text_encoder_lr": "5e-05",
    "ss_epoch": "8",
    "ss_num_epochs": "10",
    "ss_steps": "3200",
    "ss_max_train_steps": "4000",
    "ss_clip_skip": "2",
    "ss_resolution": "(512, 512)",
    "ss_num_train_images": "400",
    "ss_num_reg_images": "0",
    "ss_optimizer": "bitsandbytes.optim.adamw.AdamW8bit",
    "ss_lr_scheduler": "cosine",
    "ss_training_started_at": "1675000000.5",
    "ss_training_finished_at": "1675003600.0",
    "ss_training_comment": "None",
    "ss_dataset_dirs": json.dumps({"10_lantern": {"n_repeats": 10, "img_count": 40}}),
    "ss_tag_frequency": json.dumps(
        {
            "10_lantern": {"lantern": 40, "rain": 25, "night ": 3},
            "2_more": {"rain": 20, **{f"t{n}": 1 for n in range(20)}},
        }
    ),
    "ss_noise_offset": "0.05",
    "modelspec.title": "Lantern",
    "modelspec.author": "someone",
    "modelspec.trigger_phrase": "lantern in the rain",
    "modelspec.architecture": "stable-diffusion-v1/lora",
    "modelspec.date": "2023-01-29T14:46:40",
    "sd_merge_models": "{}",
}


def test_training_in_words(tmp_path):
    path = save(tmp_path / "a.safetensors", made.adapted(made.sd_unet()[:10]), KOHYA)
    report = report_of(path)
    facts = report["about"]
    assert report["metadata"] == KOHYA
    assert (facts["title"], facts["author"], facts["trigger_phrase"]) == ("Lantern", "someone", "lantern in the rain")
    assert (facts["name"], facts["base_model"], facts["base_version"]) == ("lantern_v2", "v1-5-pruned.ckpt", "sd_v1")
    assert (facts["rank"], facts["alpha"], facts["conv_rank"], facts["conv_alpha"]) == (32, 16, "8", 4)
    assert (facts["epochs"], facts["steps"], facts["clip_skip"], facts["images"]) == (8, 3200, 2, 400)
    assert (facts["learning_rate"], facts["text_encoder_learning_rate"]) == (0.0001, 0.00005)
    assert (facts["started"], facts["finished"]) == ("2023-01-29T13:46:40Z", "2023-01-29T14:46:40Z")
    assert facts["datasets"] == {"10_lantern": {"images": 40, "repeats": 10}}
    assert list(facts["tags"].items())[:4] == [("rain", 45), ("lantern", 40), ("night", 3), ("t0", 1)]
    assert len(facts["tags"]) == 10
    assert "description" not in facts  # "None" is nothing
    told = words(path)
    for part in (
        "trained on v1-5-pruned.ckpt (sd_v1) network lycoris.kohya (loha)",
        "learning rate 0.0001, UNet 0.0001, text encoder 5e-05",
        "rank, alpha 32, 16; 8, 4 in convolutions",
        "images 400 with repeats; 10_lantern: 40 × 10",
        "started 2023-01-29 13:46:40 UTC",
        "tags rain 45, lantern 40, night 3,",
        "ss_noise_offset: 0.05",
        "sd_merge_models: {}",
    ):
        assert part in told, part
    assert "ss_tag_frequency" not in told
    assert "modelspec.title" not in told


def test_no_metadata_is_no_about(tmp_path):
    path = save(tmp_path / "a.safetensors", made.adapted(made.sd_unet()[:2]), {"format": "pt"})
    assert report_of(path)["about"] == {}
    assert "About" not in words(path)
    assert "format: pt" in words(path)


def test_long_texts_are_cut_and_lines_joined(tmp_path):
    said = {"modelspec.description": "one\ntwo " + "x" * 500, "modelspec.author": "a\x1b[31m"}
    path = save(tmp_path / "a.safetensors", made.adapted(made.sd_unet()[:2]), said)
    told = words(path)
    assert "description one two x" in told
    assert "… (508 characters)" in told
    assert "\x1b" not in told
    assert report_of(path)["about"]["description"] == said["modelspec.description"]


VALUES = st.one_of(
    st.text(max_size=20),
    st.floats().map(str),
    st.integers().map(str),
    st.sampled_from(["None", "null", "{", "[1]", "[" * 5000, "1e400", "-1e18", "9" * 5000]),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=8,
    ).map(json.dumps),
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(KOHYA)), VALUES))
def test_any_metadata_at_all(metadata):
    """Values come from strangers: what does not read as it should is left out, and nothing raises."""
    found = about(metadata)
    json.dumps(found.facts, allow_nan=False)
    assert found.told <= set(metadata)
