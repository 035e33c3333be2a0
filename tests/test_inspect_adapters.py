"""`inspect` on LoRA and LyCORIS files: algorithms, parts, ranks, alphas, families, whatever tool wrote them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import adapter_files as made
import pytest
import torch
from adapter_files import adapted, sd_conv, sd_unet, sdxl_unet, text_encoder
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import save

from mergekit_sd.cli.inspect import inspect_command
from mergekit_sd.inspection import inspect_file


def told_of(tmp_path, tensors, metadata=None):
    """The JSON's part on the adapter, and the whole JSON."""
    report = inspect_file(save(tmp_path / "a.safetensors", tensors, metadata)).as_json()
    assert json.loads(json.dumps(report)) == report
    return report["adapter"], report


def words(tmp_path, tensors, metadata=None):
    path = save(tmp_path / "a.safetensors", tensors, metadata)
    result = CliRunner().invoke(inspect_command, [str(path)], catch_exceptions=False)
    assert result.exit_code == 0
    return " ".join(result.stdout.split())


CLIP_L = text_encoder(12, 768)
ONE_SIZE = {"linear": {"4": 264}, "conv": {}}

# --- whole files -----------------------------------------------------------------------------------


def test_a_plain_lora_of_sd1(tmp_path):
    tensors = adapted(sd_unet()) | adapted(CLIP_L, "lora_te_")
    adapter, report = told_of(tmp_path, tensors)
    assert (report["kind"], report["tensors"], report["architecture"]) == ("lora", 792, None)
    assert adapter == {
        "modules": 264,
        "algorithms": {"lora": 264},
        "dora": 0,
        "parts": {"unet": 192, "text_encoder": 72},
        "ranks": ONE_SIZE,
        "alphas": {"linear": {"2": 264}, "conv": {}},
        "style": "kohya",
        "family": "sd1",
        "embeddings": [],
        "stray": 0,
        "usable": True,
    }
    told = words(tmp_path, tensors)
    for part in (
        "for Stable Diffusion 1 modules LoRA 264 changes UNet 192, text encoder 72",
        "rank 4 alpha 2 names kohya's names",
    ):
        assert part in told
    assert "not recognised" not in told


def test_a_lora_with_convolutions(tmp_path):
    linear = [layer for layer in sd_conv() if layer[2] == 1]
    conv = [layer for layer in sd_conv() if layer[2] == 3]
    tensors = adapted(sd_unet() + linear) | adapted(conv, rank=3, alpha=1) | adapted(CLIP_L, "lora_te_")
    adapter, _ = told_of(tmp_path, tensors)
    assert adapter["modules"] == 350
    assert adapter["algorithms"] == {"lora": 300, "locon": 50}
    assert adapter["ranks"] == {"linear": {"4": 300}, "conv": {"3": 50}}
    assert adapter["alphas"] == {"linear": {"2": 300}, "conv": {"1": 50}}
    assert "LoRA 300, LoCon (convolutions) 50" in (told := words(tmp_path, tensors))
    assert "rank 4, 3 in convolutions alpha 2, 1 in convolutions" in told


def test_a_lora_of_sd2(tmp_path):
    tensors = adapted(sd_unet("sd2")) | adapted(text_encoder(23, 1024), "lora_te_")
    adapter, _ = told_of(tmp_path, tensors)
    assert (adapter["modules"], adapter["family"], adapter["parts"]["text_encoder"]) == (330, "sd2", 138)


def test_a_lora_of_sdxl(tmp_path):
    tensors = adapted(sdxl_unet()) | adapted(CLIP_L, "lora_te1_") | adapted(text_encoder(32, 1280), "lora_te2_")
    adapter, report = told_of(tmp_path, tensors)
    assert (adapter["modules"], report["tensors"], adapter["family"]) == (986, 2958, "sdxl")
    assert adapter["parts"] == {"unet": 722, "text_encoder_2": 192, "text_encoder": 72}
    assert "UNet 722, text encoder 2 192, text encoder 72" in words(tmp_path, tensors)


# --- algorithms ------------------------------------------------------------------------------------

LAYERS = [*sd_unet()[:24], *(layer for layer in sd_conv()[:4])]


@pytest.mark.parametrize(
    ("algorithm", "prefix", "expected", "ranks", "kind", "family"),
    [
        (made.loha, "lora_unet_", {"loha": 28}, {"linear": {"3": 24}, "conv": {"3": 4}}, "lycoris", "sd1"),
        (made.loha, "lycoris_", {"loha": 28}, {"linear": {"3": 24}, "conv": {"3": 4}}, "lycoris", "sd1"),
        (made.lokr, "lora_unet_", {"lokr": 28}, {"linear": {"3": 24}, "conv": {"3": 4}}, "lycoris", "sd1"),
        (made.lokr_full, "lora_unet_", {"lokr": 28}, {"linear": {}, "conv": {}}, "lycoris", "sd1"),
        (made.glora, "lora_unet_", {"glora": 28}, {"linear": {"3": 24}, "conv": {"3": 4}}, "lycoris", "sd1"),
        (made.ia3, "lora_unet_", {"ia3": 28}, {"linear": {}, "conv": {}}, "lycoris", None),
        (made.oft, "oft_unet_", {"oft": 28}, {"linear": {}, "conv": {}}, "lycoris", None),
        (made.oft, "lycoris_", {"diag-oft": 28}, {"linear": {}, "conv": {}}, "lycoris", None),
        (made.oft, "lora_unet_", {"diag-oft": 28}, {"linear": {}, "conv": {}}, "lycoris", None),
        (made.boft, "lycoris_", {"boft": 28}, {"linear": {}, "conv": {}}, "lycoris", None),
        (made.full, "lora_unet_", {"full": 28}, {"linear": {}, "conv": {}}, "lycoris", "sd1"),
        (made.norm, "lora_unet_", {"norm": 28}, {"linear": {}, "conv": {}}, "lycoris", None),
        (made.tucker, "lora_unet_", {"lora": 24, "locon": 4}, {"linear": {"3": 24}, "conv": {"3": 4}}, "lora", "sd1"),
        (made.tlora, "lora_unet_", {"tlora": 28}, {"linear": {"3": 24}, "conv": {"3": 4}}, "lycoris", "sd1"),
    ],
)
def test_algorithms(tmp_path, algorithm, prefix, expected, ranks, kind, family):
    adapter, report = told_of(tmp_path, adapted(LAYERS, prefix, algorithm, rank=3))
    if algorithm is made.tucker:  # 1×1 layers have a kernel-less mid: a Tucker file is of convolutions alone
        tensors = adapted(LAYERS[:24], rank=3) | adapted(LAYERS[24:], prefix, algorithm, rank=3)
        adapter, report = told_of(tmp_path, tensors)
    assert report["kind"] == kind
    assert (adapter["algorithms"], adapter["ranks"], adapter["family"]) == (expected, ranks, family)
    assert (adapter["modules"], adapter["parts"], adapter["stray"]) == (28, {"unet": 28}, 0)


def test_lokr_of_full_factors_has_no_alpha(tmp_path):
    """Files hold 100000 there, which is ignored."""
    adapter, _ = told_of(tmp_path, adapted(LAYERS, algorithm=made.lokr_full, alpha=float("inf")))
    assert adapter["alphas"] == {"linear": {}, "conv": {}}


def test_old_glora_has_its_factors_the_other_way(tmp_path):
    swapped = {"a1": "a2", "a2": "a1", "b1": "b2", "b2": "b1"}
    tensors = {
        f"{name[:-9]}{swapped[name[-9:-7]]}.weight" if name.endswith("weight") else name: tensor
        for name, tensor in adapted(LAYERS, algorithm=made.glora, rank=3).items()
    }
    adapter, _ = told_of(tmp_path, tensors)
    assert (adapter["ranks"]["linear"], adapter["family"]) == ({"3": 24}, "sd1")


def test_dora_is_counted_beside_its_algorithm(tmp_path):
    tensors = adapted(sd_unet(), dora=True)
    adapter, _ = told_of(tmp_path, tensors)
    assert (adapter["algorithms"], adapter["dora"]) == ({"lora": 192}, 192)
    assert "LoRA 192; all with DoRA" in words(tmp_path, tensors)
    loha = adapted(sd_unet()[:9], algorithm=made.loha, dora=True) | adapted(sd_unet()[9:12], algorithm=made.loha)
    assert told_of(tmp_path, loha)[0]["dora"] == 9
    assert "LoHa 12; 9 with DoRA" in words(tmp_path, loha)


def test_t_lora_is_named_and_said_to_be_of_no_use(tmp_path):
    tensors = adapted(sd_unet(), algorithm=made.tlora)
    assert told_of(tmp_path, tensors)[0]["usable"] is False
    assert "T-LoRA cannot be applied" in words(tmp_path, tensors)


def test_algorithms_mix(tmp_path):
    tensors = adapted(sd_unet()[:100]) | adapted(sd_unet()[100:150], algorithm=made.lokr)
    tensors |= adapted(sd_unet()[150:], algorithm=made.norm, alpha=None)
    tensors["lora_unet_down_blocks_0_attentions_0_proj_in.diff_b"] = torch.zeros(8)  # a LoRA's bias: no module more
    adapter, report = told_of(tmp_path, tensors)
    assert adapter["algorithms"] == {"lora": 100, "lokr": 50, "norm": 42}
    assert (adapter["modules"], report["kind"]) == (192, "lycoris")


@pytest.mark.parametrize("prefix", ["diffusion_model.", "model.diffusion_model."])
def test_comfyuis_differences(tmp_path, prefix):
    layers = ["input_blocks.4.1.transformer_blocks.0.attn2.to_k", "out.2"]
    tensors = {f"{prefix}{name}.{end}": torch.zeros(8, 2048) for name in layers for end in ("diff", "diff_b")}
    adapter, report = told_of(tmp_path, tensors)
    assert (report["kind"], adapter["algorithms"], adapter["style"]) == ("lycoris", {"full": 2}, "comfyui")
    assert (adapter["family"], adapter["parts"]) == ("sdxl", {"unet": 2})


# --- names -----------------------------------------------------------------------------------------

ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn2"


def pairs(layers, ends):
    """Down and up, of rank 4 and reading the text of SDXL."""
    down, up = ends
    return {f"{name}{end}": torch.zeros(shape) for name in layers for end, shape in ((down, (4, 2048)), (up, (8, 4)))}


@pytest.mark.parametrize(
    ("style", "layers", "ends", "part"),
    [
        ("diffusers", [f"unet.{ATTENTION}.to_k"], (".lora_A.weight", ".lora_B.weight"), "unet"),
        ("peft", [f"base_model.model.{ATTENTION}.to_k"], (".lora_A.weight", ".lora_B.weight"), "unet"),
        ("peft", [f"base_model.model.{ATTENTION}.to_k"], (".lora_A.default.weight", ".lora_B.default.weight"), "unet"),
        ("peft", [f"base_model.model.unet.{ATTENTION}.to_v"], (".lora_A.weight", ".lora_B.weight"), "unet"),
        ("peft", [f"{ATTENTION}.to_v"], (".lora_A.weight", ".lora_B.weight"), "unet"),
        ("diffusers", [f"unet.{ATTENTION}.to_k"], (".lora.down.weight", ".lora.up.weight"), "unet"),
        ("diffusers", [f"{ATTENTION}.processor.to_k"], ("_lora.down.weight", "_lora.up.weight"), "unet"),
        ("diffusers", [f"unet.{ATTENTION}.processor.to_k"], ("_lora.down.weight", "_lora.up.weight"), "unet"),
        (
            "comfyui",
            ["diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k"],
            (".lora_down.weight", ".lora_up.weight"),
            "unet",
        ),
        (
            "comfyui",
            ["diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k"],
            (".lora_A.weight", ".lora_B.weight"),
            "unet",
        ),
        (
            "lycoris",
            ["lycoris_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"],
            (".lora_down.weight", ".lora_up.weight"),
            "unet",
        ),
    ],
)
def test_styles(tmp_path, style, layers, ends, part):
    adapter, report = told_of(tmp_path, pairs(layers, ends))
    assert (report["kind"], adapter["style"], adapter["parts"]) == ("lora", style, {part: 1})
    assert (adapter["ranks"]["linear"], adapter["family"], adapter["algorithms"]) == ({"4": 1}, "sdxl", {"lora": 1})
    assert adapter["alphas"] == {"linear": {}, "conv": {}}
    assert "alpha none: applied as it is" in words(tmp_path, pairs(layers, ends))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("text_encoder.text_model.encoder.layers.0.mlp.fc1", "text_encoder"),
        ("text_encoder_2.text_model.encoder.layers.0.mlp.fc1", "text_encoder_2"),
        ("base_model.model.text_encoder_2.text_model.encoder.layers.0.mlp.fc1", "text_encoder_2"),
        ("base_model.model.text_model.encoder.layers.0.mlp.fc1", "text_encoder"),
        ("text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1", "text_encoder"),
        ("text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc1", "text_encoder_2"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", "text_encoder"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1", "text_encoder"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1", "text_encoder_2"),
        ("lycoris_text_model_encoder_layers_0_mlp_fc1", "text_encoder"),
        ("lora_unet_time_embedding_linear_1", "unet"),
    ],
)
def test_parts(tmp_path, name, part):
    tensors = {f"{name}.lora_down.weight": torch.zeros(4, 8), f"{name}.lora_up.weight": torch.zeros(8, 4)}
    assert told_of(tmp_path, tensors)[0]["parts"] == {part: 1}


def test_dora_of_peft(tmp_path):
    tensors = pairs([f"base_model.model.{ATTENTION}.to_k"], (".lora_A.weight", ".lora_B.weight"))
    for end in ("lora_magnitude_vector", "lora_magnitude_vector.weight", "lora_magnitude_vector.default.weight"):
        with_scale = tensors | {f"base_model.model.{ATTENTION}.to_k.{end}": torch.zeros(8)}
        adapter, _ = told_of(tmp_path, with_scale)
        assert (adapter["modules"], adapter["dora"], adapter["stray"]) == (1, 1, 0), end


def test_diffusers_alphas_are_in_the_metadata(tmp_path):
    layers = [f"unet.{ATTENTION}.{layer}" for layer in ("to_k", "to_v", "to_q")]
    said = {"unet.r": 4, "unet.lora_alpha": 8, "unet.alpha_pattern": {"attn2.to_q": 2}, "text_encoder.lora_alpha": 5}
    tensors = pairs(layers, (".lora_A.weight", ".lora_B.weight"))
    adapter, _ = told_of(tmp_path, tensors, {"lora_adapter_metadata": json.dumps(said)})
    assert adapter["alphas"]["linear"] == {"8": 2, "2": 1}
    for broken in ("{", "[1]", '{"unet.lora_alpha": "x", "unet.alpha_pattern": 3}', "[" * 100_000):
        assert told_of(tmp_path, tensors, {"lora_adapter_metadata": broken})[0]["alphas"]["linear"] == {}


# --- ranks and alphas ------------------------------------------------------------------------------


def test_ranks_of_a_resized_lora(tmp_path):
    tensors = adapted(sd_unet()[:12], rank=1, alpha=1) | adapted(sd_unet()[12:20], rank=16, alpha=16)
    tensors |= adapted(sd_unet()[20:40], rank=9, alpha=9)
    adapter, _ = told_of(tmp_path, tensors)
    assert list(adapter["ranks"]["linear"].items()) == [("9", 20), ("1", 12), ("16", 8)]
    assert "rank 1–16 (mostly 9) alpha 1–16 (mostly 9)" in words(tmp_path, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(), (1,)])
def test_alphas_of_every_kind(tmp_path, dtype, shape):
    tensors = adapted(sd_unet()[:5], alpha=None)
    tensors |= {f"lora_unet_{name}.alpha": torch.full(shape, 16, dtype=dtype) for name, _, _ in sd_unet()[:5]}
    assert told_of(tmp_path, tensors)[0]["alphas"]["linear"] == {"16": 5}


def test_alphas_that_say_nothing(tmp_path):
    tensors = adapted(sd_unet()[:5], alpha=float("nan"))
    assert told_of(tmp_path, tensors)[0]["alphas"]["linear"] == {"nan": 5}
    assert "alpha nan" in words(tmp_path, tensors)
    for shape in ((0,), (2, 2)):
        odd = adapted(sd_unet()[:5], alpha=None) | {f"lora_unet_{sd_unet()[0][0]}.alpha": torch.zeros(shape)}
        assert told_of(tmp_path, odd)[0]["alphas"]["linear"] == {}


@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_a_lora_in_a_checkpoint(tmp_path, container):
    tensors = adapted(sd_unet()) | adapted(CLIP_L, "lora_te_")
    torch.save(tensors, tmp_path / "a.pt", _use_new_zipfile_serialization=container == "zip")
    adapter = inspect_file(tmp_path / "a.pt").adapter
    assert (adapter.modules, adapter.ranks.linear, adapter.alphas.linear) == (264, {"4": 264}, {"2": 264})


# --- families --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "prefix", "family"),
    [
        (text_encoder(32, 1280), "lora_te2_", "sdxl"),
        (text_encoder(23, 1024), "lora_te_", "sd2"),
        (text_encoder(12, 1024), "lora_te_", "sd2"),
        (text_encoder(12, 768), "lora_te_", None),
        ([("input_blocks_7_1_transformer_blocks_9_attn1_to_q", 8, 1)], "lora_unet_", "sdxl"),
        ([("input_blocks_7_1_transformer_blocks_0_attn1_to_q", 8, 1)], "lora_unet_", None),
        ([("input_blocks_7_1_transformer_blocks_0_attn2_to_k", 1280, 1)], "lora_unet_", "sdxl-refiner"),
        ([("input_blocks_7_1_transformer_blocks_0_attn2_to_k", 640, 1)], "lora_unet_", None),
        ([("double_blocks_0_img_attn_qkv", 3072, 1)], "lora_unet_", None),
    ],
)
def test_families_by_what_there_is(tmp_path, layers, prefix, family):
    adapter, report = told_of(tmp_path, adapted(layers, prefix))
    assert (report["kind"], adapter["family"]) == ("lora", family)


def test_another_model_may_have_the_same_text_encoders(tmp_path):
    """Flux's and SD3's LoRAs have lora_te1 and lora_te2 modules, too."""
    tensors = adapted([("joint_blocks_0_x_block_attn_qkv", 1536, 1)]) | adapted(text_encoder(2, 1280), "lora_te2_")
    assert told_of(tmp_path, tensors)[0]["family"] is None
    assert "for cannot be told" in words(tmp_path, tensors)


def test_sd1_without_cross_attention(tmp_path):
    unet = [layer for layer in sd_unet() if "attn2" not in layer[0]]
    assert told_of(tmp_path, adapted(unet))[0]["family"] is None
    assert told_of(tmp_path, adapted(unet) | adapted(CLIP_L, "lora_te_"))[0]["family"] == "sd1"


# --- what else is in such files --------------------------------------------------------------------


def test_bundled_embeddings_and_strays(tmp_path):
    more = {f"bundle_emb.{name}.string_to_param.*": torch.zeros(2, 768) for name in ("mine", "yours")}
    tensors = adapted(sd_unet()) | more | {"x.alpha": torch.zeros(()), "noise": torch.zeros(3)}
    adapter, _ = told_of(tmp_path, tensors)
    assert (adapter["embeddings"], adapter["stray"], adapter["modules"]) == (["mine", "yours"], 2, 192)
    assert "embeddings mine, yours (bundled) besides 2 tensors of no module" in words(tmp_path, tensors)


ENDS = [
    *("lora_up.weight", "lora_down.weight", "alpha", "dora_scale", "hada_w1_b", "lokr_w2", "a1.weight", "b1.weight"),
    *("oft_blocks", "on_input", "weight", "diff", "w_norm", "lambda_layer", "lora_A.default.weight", "lora_B.bias"),
]


@settings(max_examples=60, deadline=None)
@given(
    names=st.lists(st.tuples(st.sampled_from(["a", "b_attn2_to_k", "c_conv1"]), st.sampled_from(ENDS)), unique=True),
    shape=st.lists(st.integers(0, 3), max_size=5),
)
def test_any_shapes_at_all(tmp_path_factory, names, shape):
    """Strangers' files: whatever the shapes, there is a report, and every tensor is in a module or stray."""
    tensors = {f"lora_unet_{name}.{end}": torch.zeros(shape) for name, end in names}
    path = save(
        tmp_path_factory.mktemp("any") / "a.safetensors", tensors | {"lora_unet_z.lora_up.weight": torch.ones(1)}
    )
    found = inspect_file(path)
    adapted_names = {name for name, end in names if end not in ("alpha", "dora_scale", "weight")} | {"z"}
    assert found.adapter.modules == len(adapted_names)
    assert sum(found.adapter.algorithms.values()) == found.adapter.modules
    CliRunner().invoke(inspect_command, [str(path)], catch_exceptions=False)


def test_a_report_fits_80_columns_and_needs_no_torch(tmp_path):
    tensors = (
        adapted(sdxl_unet(), dora=True) | adapted(CLIP_L, "lora_te1_") | adapted(text_encoder(32, 1280), "lora_te2_")
    )
    save(tmp_path / "a.safetensors", tensors, {"ss_tag_frequency": json.dumps({"1_x": {"a long tag " * 4: 5, "b": 3}})})
    code = "import sys; from mergekit_sd.cli.main import run; code = run(['inspect', 'a.safetensors']);"
    code += "sys.exit(code or 7 * any(name in sys.modules for name in ('torch', 'numpy')))"
    environment = {**os.environ, "COLUMNS": "80"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, env=environment)
    assert done.returncode == 0, done
    assert max(map(len, done.stdout.decode().splitlines())) <= 80
