"""Which tensors of a checkpoint a LoRA-family file's modules are: by every name, for every family."""

from __future__ import annotations

import models
import pytest
from adapter_headers import FAMILIES, header, lora, lora_shapes, of_keys, width
from small_models import small

from mergekit_sd import architectures
from mergekit_sd.adapters.matching import match
from mergekit_sd.adapters.names import read_adapter
from mergekit_sd.adapters.styles import STYLES
from mergekit_sd.adapters.targets import Target, layers_of, lora_name, targets_of
from mergekit_sd.errors import FamilyMismatch, MalformedFile

UNET = "model.diffusion_model."
SD1_TEXT = "cond_stage_model.transformer.text_model.encoder.layers."
SD2_TEXT = "cond_stage_model.model.transformer.resblocks."
BIGG = "conditioner.embedders.1.model.transformer.resblocks."

# A few names looked up by hand: module, family, what it targets.
BY_HAND = [
    ("lora_unet_down_blocks_0_attentions_0_proj_in", "sd1", UNET + "input_blocks.1.1.proj_in.weight", None),
    ("lora_unet_up_blocks_0_upsamplers_0_conv", "sd1", UNET + "output_blocks.2.1.conv.weight", None),
    ("lora_unet_up_blocks_1_upsamplers_0_conv", "sd1", UNET + "output_blocks.5.2.conv.weight", None),
    ("lora_unet_up_blocks_0_upsamplers_0_conv", "sdxl", UNET + "output_blocks.2.2.conv.weight", None),
    ("lora_unet_down_blocks_2_downsamplers_0_conv", "sd2", UNET + "input_blocks.9.0.op.weight", None),
    ("lora_unet_mid_block_resnets_1_conv2", "sd1", UNET + "middle_block.2.out_layers.3.weight", None),
    ("lora_unet_conv_in", "sd1", UNET + "input_blocks.0.0.weight", None),
    ("lora_unet_conv_out", "sdxl", UNET + "out.2.weight", None),
    ("lora_unet_time_embedding_linear_2", "sd1", UNET + "time_embed.2.weight", None),
    ("lora_unet_time_embed_2", "sdxl", UNET + "time_embed.2.weight", None),
    ("lora_unet_label_emb_0_2", "sdxl", UNET + "label_emb.0.2.weight", None),
    ("unet.add_embedding.linear_1", "sdxl", UNET + "label_emb.0.0.weight", None),
    ("lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_out_0", "sdxl",
     UNET + "input_blocks.4.1.transformer_blocks.1.attn2.to_out.0.weight", None),
    ("lora_unet_input_blocks_1_1_proj_out", "sd1", UNET + "input_blocks.1.1.proj_out.weight", None),
    ("diffusion_model.middle_block.1.proj_in", "sd2", UNET + "middle_block.1.proj_in.weight", None),
    ("lycoris_up_blocks_3_resnets_2_conv1", "sd2", UNET + "output_blocks.11.0.in_layers.2.weight", None),
    ("up_blocks.3.resnets.2.time_emb_proj", "sd1", UNET + "output_blocks.11.0.emb_layers.1.weight", None),
    ("lora_te_text_model_encoder_layers_11_mlp_fc1", "sd1", SD1_TEXT + "11.mlp.fc1.weight", None),
    ("lora_te1_text_model_encoder_layers_0_self_attn_q_proj", "sd1", SD1_TEXT + "0.self_attn.q_proj.weight", None),
    ("text_encoder.encoder.layers.1.self_attn.out_proj", "sd1", SD1_TEXT + "1.self_attn.out_proj.weight", None),
    ("base_model.model.text_model.encoder.layers.1.mlp.fc2", "sd1", SD1_TEXT + "1.mlp.fc2.weight", None),
    ("text_encoder.text_model.embeddings.token_embedding", "sd1",
     "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight", None),
    ("lora_te_text_model_encoder_layers_22_mlp_fc1", "sd2", SD2_TEXT + "22.mlp.c_fc.weight", None),
    ("lora_te_text_model_encoder_layers_23_self_attn_v_proj", "sd2", SD2_TEXT + "23.attn.in_proj_weight", (2, 3)),
    ("lora_te2_text_model_encoder_layers_5_self_attn_k_proj", "sdxl", BIGG + "5.attn.in_proj_weight", (1, 3)),
    ("text_encoder_2.text_model.encoder.layers.5.self_attn.q_proj", "sdxl", BIGG + "5.attn.in_proj_weight", (0, 3)),
    ("lora_te2_text_model_encoder_layers_31_self_attn_out_proj", "sdxl", BIGG + "31.attn.out_proj.weight", None),
]  # fmt: skip


@pytest.mark.parametrize(("module", "family", "tensor", "rows"), BY_HAND)
def test_names_looked_up_by_hand(module, family, tensor, rows):
    found = match(of_keys(f"{module}.lora_down.weight"), architectures.get(family))
    assert [each.targets for each in found.matches] == [(Target(tensor, "weight", rows),)]


def test_a_projection_that_is_stored_transposed():
    found = match(of_keys("lora_te2_text_projection.lora_down.weight"), architectures.get("sdxl"))
    expected = Target("conditioner.embedders.1.model.text_projection", "weight", transposed=True)
    assert found.matches[0].targets == (expected,)


# --- the countable facts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "conv", "modules", "weights_by_rank"),
    [
        ("sd1", False, 264, 589_824),
        ("sd1", True, 350, 1_216_704),
        ("sd2", False, 330, None),
        ("sd2", True, 416, None),
        ("sdxl", False, 986, 3_563_008),
        ("sdxl", True, 1052, None),
    ],
)
def test_the_modules_that_kohya_trains(family, conv, modules, weights_by_rank):
    architecture = architectures.get(family)
    layers = targets_of(architecture, conv=conv)
    assert len(layers) == modules
    kernels = {layer: architecture.tensors[layer.target("weight").tensor].shape[2:] for layer in layers}
    assert all(len(kernel) in (0, 2) for kernel in kernels.values())
    weights = sum(
        width(family, each)[0] + width(family, each)[1] * (kernels[each][0] * kernels[each][1] if kernels[each] else 1)
        for each in layers
    )
    assert weights_by_rank in (weights, None)


@pytest.mark.parametrize(
    ("family", "counts"), [("sd1", (192, 72, 0)), ("sd2", (192, 138, 0)), ("sdxl", (722, 72, 192))]
)
def test_the_modules_of_each_component(family, counts):
    components = [layer.component for layer in targets_of(architectures.get(family))]
    assert tuple(map(components.count, ("unet", "text_encoder", "text_encoder_2"))) == counts


# --- every style, there and back -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("style", STYLES)
def test_what_is_written_in_a_style_means_the_layer_it_was_written_for(family, style):
    architecture = architectures.get(family)
    adapter = lora(family, style, conv=True)
    found = match(adapter, architecture)
    assert adapter.style == style
    assert not found.unmatched
    assert [each.layer for each in found.matches] == list(targets_of(architecture, conv=True))
    assert [lora_name(each.layer, style, family) for each in found.matches] == [each.name for each in adapter.modules]


@pytest.mark.parametrize("family", [*FAMILIES, "sdxl-refiner"])
@pytest.mark.parametrize("style", STYLES)
def test_every_layer_has_a_name_of_its_own(family, style):
    layers = layers_of(architectures.get(family))
    assert len({lora_name(layer, style, family) for layer in layers.every}) == len(layers.every)
    for layer in layers.every:
        assert layers.named[layer.component][layer.diffusers] is layer
        assert layers.named[layer.component][layer.diffusers.replace(".", "_")] is layer


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_and_bias_can_be_reached_and_only_once(family):
    architecture = architectures.get(family)
    targets = [target for layer in layers_of(architecture).every for target in layer.targets]
    assert len(set(targets)) == len(targets)
    missed = {name for name, spec in architecture.tensors.items() if spec.component in ("unet", *TEXT_ENCODERS)}
    missed -= {target.tensor for target in targets}
    assert {name.rpartition(".")[2] for name in missed} <= {"position_ids", "logit_scale"}


TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


@pytest.mark.parametrize(
    ("family", "tensor", "names"),
    [
        ("sd1", UNET + "input_blocks.1.1.proj_in.weight", {
            "kohya": "lora_unet_down_blocks_0_attentions_0_proj_in",
            "peft": "unet.down_blocks.0.attentions.0.proj_in",
            "comfyui": "diffusion_model.input_blocks.1.1.proj_in",
        }),
        ("sdxl", UNET + "input_blocks.4.1.proj_in.weight", {
            "kohya": "lora_unet_input_blocks_4_1_proj_in",
            "diffusers": "unet.down_blocks.1.attentions.0.proj_in",
            "comfyui": "diffusion_model.input_blocks.4.1.proj_in",
        }),
        ("sd1", SD1_TEXT + "3.mlp.fc1.weight", {
            "kohya": "lora_te_text_model_encoder_layers_3_mlp_fc1",
            "comfyui": "text_encoders.clip_l.transformer.text_model.encoder.layers.3.mlp.fc1",
        }),
        ("sd2", SD2_TEXT + "3.mlp.c_fc.weight", {
            "kohya": "lora_te_text_model_encoder_layers_3_mlp_fc1",
            "comfyui": "text_encoders.clip_h.transformer.text_model.encoder.layers.3.mlp.fc1",
        }),
        ("sdxl", "conditioner.embedders.0.transformer.text_model.encoder.layers.3.mlp.fc1.weight", {
            "kohya": "lora_te1_text_model_encoder_layers_3_mlp_fc1",
            "peft": "text_encoder.text_model.encoder.layers.3.mlp.fc1",
        }),
        ("sdxl", BIGG + "3.mlp.c_fc.weight", {
            "kohya": "lora_te2_text_model_encoder_layers_3_mlp_fc1",
            "peft": "text_encoder_2.text_model.encoder.layers.3.mlp.fc1",
            "comfyui": "text_encoders.clip_g.transformer.text_model.encoder.layers.3.mlp.fc1",
        }),
    ],
)  # fmt: skip
def test_names_that_are_written(family, tensor, names):
    every = layers_of(architectures.get(family)).every
    layer = next(each for each in every if each.target("weight").tensor == tensor)
    assert {style: lora_name(layer, style, family) for style in names} == names


def test_sdxl_files_with_names_of_diffusers():
    shapes = {
        key.replace(lora_name(layer, "kohya", "sdxl"), "lora_unet_" + layer.diffusers.replace(".", "_")): shape
        for layer in targets_of(architectures.get("sdxl"))
        if layer.component == "unet"
        for key, shape in lora_shapes("sdxl", [layer]).items()
    }
    assert any(key.startswith("lora_unet_down_blocks_2_attentions_1_transformer_blocks_9") for key in shapes)
    found = match(read_adapter(header(shapes)), architectures.get("sdxl"))
    assert len(found.matches) == 722
    assert not found.unmatched


# --- checkpoints: small ones, bare ones, their own names -----------------------------------------------------


def layout_of(tensors):
    return architectures.detect(tensors)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_with_fewer_layers(family):
    layout = layout_of(small(family))
    layers = targets_of(layout, conv=True)
    found = match(read_adapter(header(lora_shapes(family, layers))), layout)
    assert [each.layer for each in found.matches] == list(layers)
    assert {target.tensor for each in found.matches for target in each.targets} <= set(layout.places)
    assert len([each for each in layers if each.component == "text_encoder"]) == 2 * 6


def test_layers_that_the_checkpoint_lacks_are_reported():
    found = match(lora("sd1"), layout_of(small("sd1")))
    assert len(found.matches) == 192 + 2 * 6
    assert len(found.unmatched) == 10 * 6
    assert {each.why for each in found.unmatched} == {"no such layer in this model; Stable Diffusion 1 has one"}


def test_a_unet_alone_with_bare_names():
    unet = {name.removeprefix(UNET): each for name, each in small("sd1", only="unet").items()}
    found = match(lora("sd1"), layout_of(unet))
    assert len(found.matches) == 192
    assert all(target.tensor in unet for each in found.matches for target in each.targets)
    assert {each.why for each in found.unmatched} == {"the checkpoint holds no text encoder"}


def test_a_text_encoder_alone():
    text = small("sd2", only="text_encoder")
    found = match(lora("sd2", part="layers.1."), layout_of(text))
    assert {each.layer.part for each in found.matches} == {"openclip"}
    assert len(found.matches) == 6


def test_novelai_names_are_met_by_their_logical_ones():
    layout = layout_of(models.novelai(models.checkpoint("sd1")))
    found = match(of_keys("lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"), layout)
    assert found.matches[0].targets[0].tensor == SD1_TEXT + "0.mlp.fc1.weight"


def test_a_checkpoint_without_anything_a_lora_changes():
    with pytest.raises(FamilyMismatch, match="is for Stable Diffusion XL; this checkpoint is of no family") as caught:
        match(lora("sdxl"), layout_of(models.vae_file()))
    assert "722 modules: the checkpoint holds no UNet" in caught.value.details


# --- weights and biases --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "kinds"),
    [
        (("diff",), ["weight"]),
        (("diff_b",), ["bias"]),
        (("diff", "diff_b"), ["weight", "bias"]),
        (("w_norm", "b_norm"), ["weight", "bias"]),
        (("b_norm",), ["bias"]),
        (("alpha", "lora_up.weight"), ["weight"]),
        (("alpha", "diff_b"), ["bias"]),
        (("alpha",), ["weight"]),
    ],
)
def test_the_parts_tell_whether_weight_or_bias_changes(parts, kinds):
    name = "diffusion_model.input_blocks.1.1.norm"
    found = match(of_keys(*(f"{name}.{part}" for part in parts)), architectures.get("sd1"))
    assert [target.kind for target in found.matches[0].targets] == kinds
    assert [target.tensor for target in found.matches[0].targets] == [
        f"{UNET}input_blocks.1.1.norm.{kind}" for kind in kinds
    ]


def test_a_bias_that_the_layer_lacks_is_reported():
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    adapter = of_keys(f"{name}.diff", f"{name}.diff_b", "lora_unet_conv_in.diff")
    found = match(adapter, architectures.get("sd1"))
    assert [(each.module.name, each.why) for each in found.unmatched] == [(name, "this layer has no bias")]


def test_the_fused_bias_has_rows_too():
    found = match(of_keys("lora_te2_text_model_encoder_layers_0_self_attn_v_proj.diff_b"), architectures.get("sdxl"))
    assert found.matches[0].targets == (Target(BIGG + "0.attn.in_proj_bias", "bias", (2, 3)),)


# --- partial, unknown, doubled -------------------------------------------------------------------------------


def test_a_file_of_queries_alone():
    found = match(lora("sdxl", part="q_proj"), architectures.get("sdxl"))
    assert len(found.matches) == 12 + 32
    assert {each.targets[0].rows for each in found.matches} == {None, (0, 3)}


def test_a_name_that_no_model_has_is_reported():
    adapter = of_keys("lora_unet_conv_in.diff", "lora_unet_conv_inn.diff", "\x1b[2J.diff")
    found = match(adapter, architectures.get("sd1"))
    assert [each.module.name for each in found.unmatched] == ["lora_unet_conv_inn", "\x1b[2J"]
    assert {each.why for each in found.unmatched} == {"no Stable Diffusion model has a layer of this name"}


def test_a_bare_name_that_both_text_encoders_have_is_reported():
    bare = "base_model.model.text_model.encoder.layers.{}.mlp.fc1"
    adapter = of_keys(*(bare.format(layer) + ".lora_A.weight" for layer in (0, 31)))
    found = match(adapter, architectures.get("sdxl"))
    assert [each.layer.component for each in found.matches] == ["text_encoder_2"]
    assert "does not say which" in found.unmatched[0].why


def test_sd1_names_do_not_reach_sdxls_first_text_encoder():
    adapter = of_keys("lora_te_text_model_encoder_layers_0_mlp_fc1.diff", "lora_te2_text_projection.diff",
                      "lora_te2_text_model_encoder_layers_0_mlp_fc1.diff")  # fmt: skip
    found = match(adapter, architectures.get("sdxl"))
    assert [each.why for each in found.unmatched] == ["a name of models with one text encoder; this one has two"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", "lora_te1_text_model_encoder_layers_0_mlp_fc1"),
        ("lora_unet_conv_in", "lora_unet_input_blocks_0_0"),
        ("unet.conv_in", "base_model.model.conv_in"),
    ],
)
def test_two_names_of_one_layer_are_refused(one, other):
    with pytest.raises(MalformedFile, match="1 tensor would be changed twice") as caught:
        match(of_keys(f"{one}.diff", f"{other}.diff"), architectures.get("sd1"))
    assert one in caught.value.details[0]
    assert other in caught.value.details[0]


def test_weight_and_bias_under_two_names_are_no_double():
    assert match(of_keys("lora_unet_conv_in.diff", "unet.conv_in.diff_b"), architectures.get("sd1"))
