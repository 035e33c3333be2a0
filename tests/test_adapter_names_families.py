"""Which family a LoRA-family file is for, and the refusal of one that is for another."""

from __future__ import annotations

import pytest
from adapter_headers import FAMILIES, header, lora, lora_shapes, of_keys
from small_models import small

from mergekit_sd import architectures
from mergekit_sd.adapters.matching import family_of, match
from mergekit_sd.adapters.names import read_adapter
from mergekit_sd.adapters.styles import STYLES
from mergekit_sd.adapters.targets import targets_of
from mergekit_sd.errors import FamilyMismatch


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("style", STYLES)
def test_the_family_is_told(family, style):
    assert family_of(lora(family, style)) == family


@pytest.mark.parametrize("family", FAMILIES)
def test_the_family_is_told_by_cross_attention_alone(family):
    assert family_of(lora(family, "diffusers", part="attn2.to_k")) == family


def test_the_family_is_told_by_the_rows_of_fused_projections():
    """SD1's text encoder has the first twelve layers, too, of another width."""
    layers = [each for each in targets_of(architectures.get("sd2")) if "q_proj" in each.diffusers][:12]
    assert family_of(read_adapter(header(lora_shapes("sd2", layers)))) == "sd2"


@pytest.mark.parametrize(("family", "told"), [("sd1", None), ("sd2", "sd2"), ("sdxl", "sdxl")])
def test_the_family_of_a_small_model_is_told_by_names(family, told):
    """SD1's are SD2's, too, which has more layers of text."""
    assert family_of(of_keys(*lora_shapes(family, targets_of(architectures.get(family))))) == told


@pytest.mark.parametrize(
    ("down", "up", "parts"),
    [
        ("hada_w1_b", "hada_w1_a", {}),
        ("lokr_w2_b", "lokr_w2_a", {"lokr_w1": (1, 1)}),
        ("diff", "diff", {}),
    ],
)
@pytest.mark.parametrize(("context", "family"), [(768, "sd1"), (1024, "sd2")])
def test_the_family_is_told_by_other_algorithms(down, up, parts, context, family):
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k."
    shapes = {name + up: (1280, 4), name + down: (1280 if up == down else 4, context)}
    assert family_of(read_adapter(header(shapes | {name + part: each for part, each in parts.items()}))) == family


@pytest.mark.parametrize(
    ("out", "inside", "family"),
    [(320, 960, "sdxl"), (768, 2304, "sdxl-refiner"), (640, 1920, None), (960, 320, None)],
    ids=["sdxl", "refiner", "sd1-and-sd2", "nobody"],
)
def test_the_family_is_told_by_tucker_factors(out, inside, family):
    name = "lora_unet_up_blocks_2_resnets_0_conv1."
    hada = {"hada_t1": (4, 4, 3, 3), "hada_w1_a": (4, out), "hada_w1_b": (4, inside)}
    lokr = {"lokr_t2": (4, 4, 3, 3), "lokr_w1": (2, 3), "lokr_w2_a": (4, out // 2), "lokr_w2_b": (4, inside // 3)}
    factored = {"lokr_w1_a": (2, 1), "lokr_w1_b": (1, 3), "lokr_w2": (out // 2, inside // 3, 3, 3)}
    for parts in (hada, lokr, factored):
        assert family_of(read_adapter(header({name + part: shape for part, shape in parts.items()}))) == family


def test_self_attention_alone_fits_sd1_and_sd2():
    adapter = read_adapter(header(lora_shapes("sd1", [
        each for each in targets_of(architectures.get("sd1")) if "attn1" in each.diffusers
    ])))  # fmt: skip
    assert family_of(adapter) is None
    assert match(adapter, architectures.get("sd2")).matches
    with pytest.raises(FamilyMismatch):
        match(adapter, architectures.get("sdxl"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("other", FAMILIES)
@pytest.mark.parametrize("style", ["kohya", "diffusers"])
def test_a_file_for_another_family_is_refused(family, other, style):
    if family == other:
        return
    title, this = architectures.get(family).title, architectures.get(other).title
    with pytest.raises(FamilyMismatch, match=f"This LoRA is for {title}; this checkpoint is {this}") as caught:
        match(lora(family, style), architectures.get(other))
    assert caught.value.file == "x.safetensors"
    assert caught.value.hint == f"take a checkpoint of {title}"


def test_variants_take_the_familys_files():
    assert len(match(lora("sd1"), architectures.get("sd1-inpainting")).matches) == 264


@pytest.mark.parametrize(
    ("key", "title"),
    [
        ("lora_unet_double_blocks_0_img_attn_proj.lora_down.weight", "Flux"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "Flux"),
        ("lora_unet_joint_blocks_0_x_block_attn_proj.lora_down.weight", "Stable Diffusion 3"),
    ],
)
def test_files_for_models_that_are_no_stable_diffusion_unet(key, title):
    """Even with CLIP-L's layers, which SD1 has, too."""
    adapter = of_keys(key, "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight")
    with pytest.raises(FamilyMismatch, match=f"This LoRA is for {title}; this checkpoint is Stable Diffusion 1"):
        match(adapter, architectures.get("sd1"))


def test_nothing_that_fits_and_no_idea_what_it_is():
    with pytest.raises(
        FamilyMismatch, match="Nothing in this LoRA fits; this checkpoint is Stable Diffusion 2"
    ) as caught:
        match(of_keys("lora_unet_blocks_0.lora_down.weight"), architectures.get("sd2"))
    assert caught.value.details == (
        "its names: lora_unet_blocks_0",
        "1 module: no Stable Diffusion model has a layer of this name",
    )


def test_a_file_of_the_family_whose_layers_the_checkpoint_lacks():
    with pytest.raises(
        FamilyMismatch, match="Nothing in this LoRA fits; this checkpoint is Stable Diffusion 1"
    ) as caught:
        match(lora("sd1", part="layers.11."), architectures.detect(small("sd1")))
    assert caught.value.details[1:] == ("6 modules: no such layer in this model; Stable Diffusion 1 has one",)


def test_hostile_names_are_escaped_in_messages():
    with pytest.raises(FamilyMismatch) as caught:
        match(of_keys("lora_unet_\x1b]0;x\x07.diff"), architectures.get("sd1"))
    assert all(detail.isprintable() for detail in caught.value.details)
