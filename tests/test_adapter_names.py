"""LoRA-family files as modules: every style's keys, PEFT's settings, and what is refused."""

from __future__ import annotations

import json
import math

import models
import pytest
import torch
from adapter_headers import RANK, header, of_keys
from hypothesis import given
from hypothesis import strategies as st

from mergekit_sd.adapters.names import read_adapter
from mergekit_sd.adapters.styles import PARTS, STYLES, component_of, key_of, parse
from mergekit_sd.errors import MalformedFile, UnreadableInput, UsageError, WrongFormat
from mergekit_sd.formats.open import open_model

ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
TEXT = "text_model.encoder.layers.0.self_attn"

# key: module, part, style of a file that has only such keys, component, name without prefix
SPELLINGS = {
    "lora_unet_mid_x.lora_down.weight": ("lora_unet_mid_x", "lora_down.weight", "kohya", "unet", "mid_x"),
    "lora_te_text_model_x.alpha": ("lora_te_text_model_x", "alpha", "kohya", "text_encoder", "text_model_x"),
    "lora_te1_x.lora_up.weight": ("lora_te1_x", "lora_up.weight", "kohya", "text_encoder", "x"),
    "lora_te2_x.hada_w1_a": ("lora_te2_x", "hada_w1_a", "kohya", "text_encoder_2", "x"),
    "lora_unet_x.weight": ("lora_unet_x", "weight", "kohya", "unet", "x"),
    "lora_unet_x.on_input": ("lora_unet_x", "on_input", "kohya", "unet", "x"),
    "lora_unet_x.a1.weight": ("lora_unet_x", "a1.weight", "kohya", "unet", "x"),
    "oft_unet_x.oft_blocks": ("oft_unet_x", "oft_blocks", "kohya", "unet", "x"),
    "lycoris_down_x.lokr_w1": ("lycoris_down_x", "lokr_w1", "kohya", None, "down_x"),
    f"unet.{ATTENTION}.to_q.lora_A.weight": (
        f"unet.{ATTENTION}.to_q", "lora_down.weight", "peft", "unet", f"{ATTENTION}.to_q",
    ),
    f"unet.{ATTENTION}.to_q.lora_B.default.weight": (
        f"unet.{ATTENTION}.to_q", "lora_up.weight", "peft", "unet", f"{ATTENTION}.to_q",
    ),
    "base_model.model.unet.x.lora_A.weight": ("base_model.model.unet.x", "lora_down.weight", "peft", "unet", "x"),
    "unet.base_model.model.x.lora_A.weight": ("unet.base_model.model.x", "lora_down.weight", "peft", "unet", "x"),
    "base_model.model.x.y.lora_B.weight": ("base_model.model.x.y", "lora_up.weight", "peft", None, "x.y"),
    "unet.x.lora_magnitude_vector": ("unet.x", "dora_scale", "peft", "unet", "x"),
    "unet.x.lora_magnitude_vector.default.weight": ("unet.x", "dora_scale", "peft", "unet", "x"),
    "unet.x.lora.down.weight": ("unet.x", "lora_down.weight", "diffusers", "unet", "x"),
    f"unet.{ATTENTION}.processor.to_q_lora.down.weight": (
        f"unet.{ATTENTION}.to_q", "lora_down.weight", "diffusers", "unet", f"{ATTENTION}.to_q",
    ),
    f"{ATTENTION}.processor.to_out_lora.up.weight": (
        f"{ATTENTION}.to_out.0", "lora_up.weight", "diffusers", None, f"{ATTENTION}.to_out.0",
    ),
    f"text_encoder.{TEXT}.to_k_lora.up.weight": (
        f"text_encoder.{TEXT}.k_proj", "lora_up.weight", "diffusers", "text_encoder", f"{TEXT}.k_proj",
    ),
    f"text_encoder_2.{TEXT}.to_out_lora.down.weight": (
        f"text_encoder_2.{TEXT}.out_proj", "lora_down.weight", "diffusers", "text_encoder_2", f"{TEXT}.out_proj",
    ),
    "text_encoder.x.lora_linear_layer.down.weight": (
        "text_encoder.x", "lora_down.weight", "diffusers", "text_encoder", "x",
    ),
    "diffusion_model.input_blocks.0.0.diff": (
        "diffusion_model.input_blocks.0.0", "diff", "comfyui", "unet", "input_blocks.0.0",
    ),
    "diffusion_model.x.diff_b": ("diffusion_model.x", "diff_b", "comfyui", "unet", "x"),
    "model.diffusion_model.x.w_norm": ("model.diffusion_model.x", "w_norm", "comfyui", "unet", "x"),
    "text_encoders.clip_g.transformer.x.lora_up.weight": (
        "text_encoders.clip_g.transformer.x", "lora_up.weight", "comfyui", "text_encoder_2", "x",
    ),
}  # fmt: skip


@pytest.mark.parametrize("key", SPELLINGS)
def test_every_spelling_gives_module_part_style_and_component(key):
    module, part, style, component, name = SPELLINGS[key]
    adapter = of_keys(key)
    assert [(each.name, list(each.parts)) for each in adapter.modules] == [(module, [part])]
    assert adapter.modules[0].parts[part].name == key
    assert adapter.style == style
    assert component_of(module) == (component, name)


@pytest.mark.parametrize("part", PARTS)
def test_every_part_is_known_behind_dots_and_underscores(part):
    assert parse(f"lora_unet_a.{part}").module == "lora_unet_a"
    assert parse(f"diffusion_model.a.b.{part}").module == "diffusion_model.a.b"
    assert parse(f"lora_unet_a.{part}").part == parse(f"diffusion_model.a.b.{part}").part == part


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("module", ["lora_unet_a", "unet.a.b", "text_encoder.a.b", "diffusion_model.a"])
@pytest.mark.parametrize("part", ["lora_down.weight", "lora_up.weight", "dora_scale"])
def test_a_key_that_is_written_reads_as_it_was(style, module, part):
    key = parse(key_of(module, part, style))
    assert (key.module, key.part) == (module, part)


@pytest.mark.parametrize("style", ["peft", "diffusers"])
@pytest.mark.parametrize("part", ["alpha", "hada_w1_a", "diff"])
def test_a_style_without_a_name_for_a_part_says_so(style, part):
    with pytest.raises(UsageError, match=f'"{style}" has no name for the part "{part}"'):
        key_of("unet.a", part, style)


def test_the_keys_of_one_module_come_together_in_the_order_of_the_file():
    adapter = of_keys("lora_unet_b.alpha", "lora_unet_a.alpha", "lora_unet_b.lora_up.weight", "lora_unet_a.dora_scale")
    assert [(each.name, list(each.parts)) for each in adapter.modules] == [
        ("lora_unet_b", ["alpha", "lora_up.weight"]),
        ("lora_unet_a", ["alpha", "dora_scale"]),
    ]


def test_the_style_is_that_of_most_keys():
    assert of_keys("unet.a.lora_A.weight", "unet.a.lora_B.weight", "lora_unet_a.diff").style == "peft"
    assert of_keys("unet.a.lora.down.weight", "unet.a.lora.up.weight", "unet.a.alpha").style == "diffusers"


@pytest.mark.parametrize(
    "key",
    [
        *("unet.x.lora_embedding_A", "unet.x.lora_B.bias", "bundle_emb.token.string_to_param.*", "lora_unet_x.foo"),
        *("unet.x.weight", "x.weight", "lora_unet_x", "", ".", "...", ".alpha", "..alpha.", ".lora_down.weight"),
        *("processor.lora.down.weight", "\x1b[31m.\n", "a." * 5000 + "b"),
    ],
)
def test_what_is_no_part_is_listed_as_unused(key):
    adapter = of_keys("lora_unet_a.alpha", key)
    assert adapter.unused == (key,)
    assert [each.name for each in adapter.modules] == ["lora_unet_a"]


@given(st.lists(st.text(alphabet="ab._\x00é\u202e", max_size=12) | st.sampled_from(sorted(SPELLINGS)), max_size=8))
def test_no_key_gets_lost(keys):
    try:
        adapter = of_keys(*keys)
    except (WrongFormat, MalformedFile):
        return
    kept = [part.name for module in adapter.modules for part in module.parts.values()]
    assert sorted([*kept, *adapter.unused]) == sorted(set(keys))


def test_a_checkpoint_is_no_lora(tmp_path):
    path = models.write(tmp_path / "sd1.safetensors", models.checkpoint("sd1"))
    with pytest.raises(WrongFormat, match="no LoRA or LyCORIS file: none of its tensors") as caught:
        read_adapter(open_model(path))
    assert caught.value.file == str(path)


def test_a_file_without_tensors_is_no_lora():
    with pytest.raises(WrongFormat, match="it holds no tensors"):
        of_keys()


def test_a_file_is_read_from_the_disk(tmp_path):
    tensors = {"lora_unet_a.lora_down.weight": torch.zeros(2, 3), "lora_unet_a.alpha": torch.tensor(1.0)}
    adapter = read_adapter(open_model(models.write(tmp_path / "a.safetensors", tensors, {"ss_network_dim": "2"})))
    assert adapter.modules[0].parts["lora_down.weight"].shape == (2, 3)
    assert adapter.metadata["ss_network_dim"] == "2"
    assert adapter.path == tmp_path / "a.safetensors"


def test_two_keys_for_one_part_are_refused():
    with pytest.raises(MalformedFile, match="same part") as caught:
        of_keys("unet.a.lora_A.weight", "unet.a.lora_A.default.weight")
    assert caught.value.details == ("unet.a.lora_A.weight", "unet.a.lora_A.default.weight")


# --- PEFT's settings -----------------------------------------------------------------------------------------


def scales(settings: object, *keys: str) -> list[float | None]:
    keys = keys or ("unet.a.b.to_q.lora_A.weight",)
    said = settings if isinstance(settings, str) else json.dumps(settings)
    return [each.scale for each in of_keys(*keys, metadata={"lora_adapter_metadata": said}).modules]


def test_without_settings_there_is_no_scale():
    assert of_keys("unet.a.lora_A.weight").modules[0].scale is None


def test_alpha_by_rank_and_rank_stabilised():
    assert scales({"unet.lora_alpha": 6, "unet.r": RANK}) == [6 / RANK]
    assert scales({"unet.lora_alpha": 6, "unet.r": RANK, "unet.use_rslora": True}) == [6 / math.sqrt(RANK)]


def test_the_rank_is_the_tensors_own():
    """`rank_pattern` says what the shapes say, too."""
    assert scales({"unet.lora_alpha": 8, "unet.r": 64}) == [8 / RANK]


def test_each_component_has_its_own_settings():
    keys = ("unet.a.lora_A.weight", "text_encoder.a.lora_A.weight", "text_encoder_2.a.lora_A.weight")
    said = {"unet.lora_alpha": 4, "text_encoder.lora_alpha": 8, "text_encoder.use_rslora": True}
    assert scales(said, *keys) == [1, 4, None]


@pytest.mark.parametrize(
    ("pattern", "fits"),
    [
        ("to_q", True),
        ("b.to_q", True),
        ("a.b.to_q", True),
        (r"a\.b\.to_q$", True),
        ("^a.b.to_q", True),
        ("^to_q", False),
        ("o_q", False),
        ("to_k", False),
    ],
)
def test_alpha_patterns_are_names_or_their_ends(pattern, fits):
    assert scales({"unet.lora_alpha": 4, "unet.alpha_pattern": {pattern: 40}}) == [10 if fits else 1]


def test_the_first_pattern_that_fits_counts():
    assert scales({"unet.lora_alpha": 4, "unet.alpha_pattern": {"b.to_q": 8, "to_q": 12}}) == [2]


def test_an_alpha_in_the_file_goes_before_the_settings():
    keys = ("unet.a.lora_A.weight", "unet.a.alpha")
    assert scales({"unet.lora_alpha": 8}, *keys) == [None]


@pytest.mark.parametrize(("part", "rank_of"), [("hada_w1_b", 2), ("lokr_w2_b", 2), ("lokr_w1_b", 2), ("lokr_w1", None)])
def test_the_rank_of_other_algorithms(part, rank_of):
    file = header({f"unet.a.{part}": (2, 9)}, {"lora_adapter_metadata": '{"unet.alpha": 8}'})
    assert read_adapter(file).modules[0].scale == (8 / rank_of if rank_of else None)


@pytest.mark.parametrize("shape", [(), (0, 4)])
def test_no_rank_gives_no_scale(shape):
    file = header({"unet.a.lora_A.weight": shape}, {"lora_adapter_metadata": '{"unet.lora_alpha": 8}'})
    assert read_adapter(file).modules[0].scale is None


@pytest.mark.parametrize("said", ["", "[]", "{", "null", "[" * 100_000])
def test_settings_that_are_no_object_are_refused(said):
    with pytest.raises(MalformedFile, match="no JSON object") as caught:
        scales(said)
    assert caught.value.key == "lora_adapter_metadata"


@pytest.mark.parametrize("alpha", ['"8"', "true", "NaN", "Infinity", "1e999", "1" + "0" * 400, "[]"])
def test_an_alpha_that_is_no_number_is_refused(alpha):
    with pytest.raises(MalformedFile, match="must be a number"):
        scales('{"unet.lora_alpha": %s}' % alpha)  # noqa: UP031
    with pytest.raises(MalformedFile, match="must be a number"):
        scales('{"unet.alpha_pattern": {"to_q": %s}}' % alpha)  # noqa: UP031


def test_patterns_must_be_an_object():
    with pytest.raises(MalformedFile, match="must be an object"):
        scales({"unet.alpha_pattern": ["to_q"]})


@pytest.mark.parametrize("pattern", ["(a+)+$", "to_(q|k)", ".*to_q", "", "to_q|to_k"])
def test_a_pattern_that_is_more_than_a_name_is_refused(pattern):
    with pytest.raises(MalformedFile, match="regular expressions"):
        scales({"unet.alpha_pattern": {pattern: 1}})


def peft_folder(tmp_path, config: object, name: str = "adapter_model.safetensors"):
    path = models.write(tmp_path / name, {"base_model.model.a.b.lora_A.weight": torch.zeros(RANK, 3)})
    text = config if isinstance(config, bytes) else json.dumps(config).encode()
    (tmp_path / "adapter_config.json").write_bytes(text)
    return read_adapter(open_model(path)).modules[0]


def test_the_config_beside_an_adapter_model(tmp_path):
    assert peft_folder(tmp_path, {"lora_alpha": 10, "alpha_pattern": {"b": 12}}).scale == 12 / RANK


def test_the_config_is_no_other_files(tmp_path):
    assert peft_folder(tmp_path, {"lora_alpha": 10}, "lora.safetensors").scale is None


def test_a_config_that_is_too_large_or_broken_is_refused(tmp_path):
    with pytest.raises(MalformedFile, match="more than 1 MiB"):
        peft_folder(tmp_path, b" " * 2_000_000)
    with pytest.raises(MalformedFile, match="no JSON object") as caught:
        peft_folder(tmp_path, b"\xff\xfe{")
    assert caught.value.file == str(tmp_path / "adapter_config.json")


def test_a_config_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    peft_folder(tmp_path, {})
    model = open_model(tmp_path / "adapter_model.safetensors")

    def refuse(path, *_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(UnreadableInput, match="Permission denied"):
        read_adapter(model)
