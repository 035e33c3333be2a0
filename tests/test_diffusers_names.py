"""Diffusers' names of every tensor of every layout, there and back."""

from __future__ import annotations

import pytest

from mergekit_sd.architectures import catalog
from mergekit_sd.formats.diffusers.names import Twin, to_diffusers, to_ldm

PARTS = [
    ("sd1", "unet", "unet", 686),
    ("sd1", "vae", "vae", 248),
    ("sd1", "text_encoder", "clip", 197),
    ("sd2", "unet", "unet", 686),
    ("sd2", "text_encoder", "openclip", 389),  # q, k, v apart, and no logit_scale
    ("sdxl", "unet", "unet", 1680),
    ("sdxl", "text_encoder_2", "openclip", 517),
]


@pytest.mark.parametrize(("family", "component", "part", "number"), PARTS)
def test_every_tensor_has_a_twin_of_its_own_and_comes_back(family, component, part, number):
    names = list(catalog.component_tensors(family, component))
    twins = {name: to_diffusers(part, name) for name in names}
    assert [name for name, found in twins.items() if not found] == (["logit_scale"] if part == "openclip" else [])
    theirs = [twin.name for found in twins.values() for twin in found]
    assert len(theirs) == len(set(theirs)) == number
    back = to_ldm(part, theirs)
    for name, found in twins.items():
        for twin in found:
            assert back[twin.name] == Twin(name, twin.rows, twin.transposed)


@pytest.mark.parametrize(
    ("part", "ldm", "diffusers"),
    [
        ("unet", "input_blocks.0.0.weight", "conv_in.weight"),
        ("unet", "input_blocks.6.0.op.bias", "down_blocks.1.downsamplers.0.conv.bias"),
        ("unet", "input_blocks.7.0.skip_connection.weight", "down_blocks.2.resnets.0.conv_shortcut.weight"),
        ("unet", "input_blocks.8.1.proj_in.weight", "down_blocks.2.attentions.1.proj_in.weight"),
        ("unet", "middle_block.2.emb_layers.1.bias", "mid_block.resnets.1.time_emb_proj.bias"),
        ("unet", "output_blocks.2.1.conv.weight", "up_blocks.0.upsamplers.0.conv.weight"),
        ("unet", "output_blocks.11.0.out_layers.3.weight", "up_blocks.3.resnets.2.conv2.weight"),
        ("unet", "label_emb.0.2.weight", "add_embedding.linear_2.weight"),
        ("unet", "out.2.bias", "conv_out.bias"),
        ("vae", "encoder.down.2.downsample.conv.weight", "encoder.down_blocks.2.downsamplers.0.conv.weight"),
        ("vae", "decoder.up.3.block.2.conv1.weight", "decoder.up_blocks.0.resnets.2.conv1.weight"),
        ("vae", "decoder.up.1.upsample.conv.bias", "decoder.up_blocks.2.upsamplers.0.conv.bias"),
        ("vae", "decoder.mid.attn_1.q.weight", "decoder.mid_block.attentions.0.to_q.weight"),
        ("vae", "decoder.mid.attn_1.proj_out.bias", "decoder.mid_block.attentions.0.to_out.0.bias"),
        ("openclip", "ln_final.weight", "text_model.final_layer_norm.weight"),
        ("openclip", "transformer.resblocks.3.mlp.c_proj.bias", "text_model.encoder.layers.3.mlp.fc2.bias"),
    ],
)
def test_some_by_hand(part, ldm, diffusers):
    assert to_diffusers(part, ldm) == (Twin(diffusers),)
    assert to_ldm(part, [diffusers]) == {diffusers: Twin(ldm)}


def test_what_older_and_newer_versions_write():
    old = {"query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}
    start = "encoder.mid_block.attentions.0."
    found = to_ldm("vae", [f"{start}{each}.weight" for each in old])
    assert [twin.name for twin in found.values()] == [f"encoder.mid.attn_1.{each}.weight" for each in old.values()]
    newest = "encoder.layers.0.layer_norm1.weight"
    assert to_ldm("clip", [newest]) == {newest: Twin(f"text_model.{newest}")}
    assert to_ldm("openclip", [newest]) == {newest: Twin("transformer.resblocks.0.ln_1.weight")}


def test_sdxl_has_attention_beside_its_first_upsampler():
    upsampler, attention = "up_blocks.0.upsamplers.0.conv.weight", "up_blocks.0.attentions.0.proj_in.weight"
    assert to_ldm("unet", [upsampler, attention])[upsampler] == Twin("output_blocks.2.2.conv.weight")


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("unet", "input_blocks.0.1.norm.weight"),
        ("unet", "input_blocks.3.1.norm.weight"),
        ("unet", "input_blocks.4.0.op.weight"),
        ("unet", "output_blocks.0.1.conv.weight"),
        ("unet", "out.20.weight"),
        ("unet", "middle_block.3.norm.weight"),
        ("vae", "encoder.mid.attn_2.q.weight"),
        ("vae", "loss.logvar"),
        ("clip", "logit_scale"),
        ("openclip", "transformer.resblocks.x.ln_1.weight"),
    ],
)
def test_unknown_names_have_none(part, name):
    assert to_diffusers(part, name) == ()
    assert to_ldm(part, [name]) == {}
