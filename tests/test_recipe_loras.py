"""LoRAs in a recipe: every form of an entry, what is refused, and which tensor gets which strength."""

from __future__ import annotations

import models
import pytest

import mergekit_sd as mk
from mergekit_sd import architectures
from mergekit_sd.architectures import detect
from mergekit_sd.errors import RecipeError
from mergekit_sd.recipe.loras import LORA_PRESETS, parse_blocks
from mergekit_sd.recipe.positions import Where

UNET = "model.diffusion_model."


def loaded(folder, *entries):
    files = {"a": "a.safetensors", "style": "style.safetensors"}
    where = models.recipe(folder, files, {"m": {"op": "inject_lora", "model": "a", "loras": list(entries)}})
    return mk.load(where).steps["m"]


def refused(folder, *entries, match):
    with pytest.raises(RecipeError, match=match) as caught:
        loaded(folder, *entries)
    assert caught.value.line
    return caught.value


class Spec:
    def __init__(self, shape):
        self.shape = shape


def layout(name="sd1"):
    return detect({key: Spec(spec.shape) for key, spec in architectures.get(name).tensors.items()})


@pytest.mark.parametrize(
    ("entry", "unet", "first", "second"),
    [
        ("style", 1, 1, 1),
        ("<lora:style:0.8>", 0.8, 0.8, 0.8),
        ("<lora:style>", 1, 1, 1),
        ("<lora:style:0.5:0.8>", 0.8, 0.5, 0.5),
        ("<lora:style:te=0.5:unet=-1>", -1, 0.5, 0.5),
        ({"lora": "style"}, 1, 1, 1),
        ({"lora": "style", "strength": 0.8}, 0.8, 0.8, 0.8),
        ({"lora": "style", "strength": -0.8, "text_encoder": 0.5}, -0.8, 0.5, 0.5),
        ({"lora": "style", "text_encoder": 0.0, "text_encoder_2": 0.3}, 1, 0, 0.3),
    ],
)
def test_an_entry_in_every_form(tmp_path, entry, unet, first, second):
    step = loaded(tmp_path, entry)
    use = step.loras["loras.0"]
    assert step.operands == {"model": "a", "loras.0": "style"}
    assert (use.strength, use.text_encoder, use.text_encoder_2) == (unet, first, second)


def test_several_in_their_order(tmp_path):
    step = loaded(tmp_path, "style", {"lora": "style", "strength": -1})
    assert [step.loras[f"loras.{n}"].strength for n in (0, 1)] == [1, -1]


def test_what_is_no_entry(tmp_path):
    refused(tmp_path, "<lora:style:x>", match='"x" in')
    refused(tmp_path, "<lora:style:1:2:3>", match="says more")
    refused(tmp_path, "<lora:style:1:start=2>", match="says more")
    refused(tmp_path, "<hypernet:style:1>", match="no LoRA as a prompt")
    refused(tmp_path, "<lora:styel:1>", match='no model or step "styel"')
    refused(tmp_path, {"lora": "style", "strenght": 1}, match='"strenght" is no key of a LoRA')
    refused(tmp_path, {"strength": 1}, match="needs the key")
    refused(tmp_path, {"lora": "style", "strength": "1"}, match="takes a number")
    refused(tmp_path, {"lora": "style", "blocks": "OUTALLL"}, match="no preset")
    refused(tmp_path, {"lora": "style", "blocks": [1, 2, 3]}, match="3 numbers")
    refused(tmp_path, {"lora": "style", "blocks": [True] * 17}, match="no number")
    refused(tmp_path, 3, match="takes text in quotes or a table")
    with pytest.raises(RecipeError, match="at least 1"):
        loaded(tmp_path)


def test_a_step_is_no_lora(tmp_path):
    steps = {
        "x": {"op": "weighted_sum", "a": "a", "b": "b", "alpha": 0.5},
        "m": {"op": "inject_lora", "model": "a", "loras": ["x"]},
    }
    with pytest.raises(RecipeError, match="is a model, but loras of inject_lora takes a LoRA's file"):
        mk.load(models.recipe(tmp_path, {"a": "a.safetensors", "b": "b.safetensors"}, steps))


def test_strengths_go_to_the_parts_of_the_model(tmp_path):
    entry = {"lora": "style", "strength": 0.8, "text_encoder": 0.5, "blocks": "OUTALL"}
    use = loaded(tmp_path, entry).loras["loras.0"]
    found = layout()
    strengths = use.strengths(found, found.places)
    assert strengths[UNET + "output_blocks.5.0.in_layers.0.weight"] == 0.8
    assert strengths[UNET + "input_blocks.4.1.proj_in.weight"] == 0
    assert strengths["cond_stage_model.transformer.text_model.final_layer_norm.weight"] == 0.5


@pytest.mark.parametrize("preset", LORA_PRESETS)
def test_presets_have_17_numbers_for_the_blocks_that_loras_change(preset):
    assert len(LORA_PRESETS[preset]) == 17
    weights = parse_blocks(preset.lower(), Where()).resolve(layout(), layout().places)
    numbers = LORA_PRESETS[preset]
    assert weights["cond_stage_model.transformer.text_model.final_layer_norm.weight"] == numbers[0]
    blocks = ["input_blocks.1.", "input_blocks.2.", "input_blocks.4.", "input_blocks.5.", "input_blocks.7."]
    blocks += ["input_blocks.8.", "middle_block.", *(f"output_blocks.{n}." for n in range(3, 12))]
    for start, number in zip(blocks, numbers[1:], strict=True):
        name = next(each for each in weights if each.startswith(UNET + start))
        assert weights[name] == number, start
    assert weights[UNET + "input_blocks.0.0.weight"] == 0


def test_twelve_numbers_are_for_sdxl():
    weights = parse_blocks("1,0.1,0.2,0.3,0.4,0.5,0,1,2,3,4,5", Where())
    found = layout("sdxl")
    strengths = weights.resolve(found, found.places)
    assert strengths[UNET + "input_blocks.4.1.proj_in.weight"] == 0.1
    assert strengths[UNET + "middle_block.1.proj_in.weight"] == 0.5
    assert strengths[UNET + "output_blocks.5.1.proj_in.weight"] == 5
    assert strengths[UNET + "output_blocks.8.0.in_layers.2.weight"] == 0
    with pytest.raises(RecipeError, match="sd1 has 25"):
        weights.resolve(layout(), layout().places)


def test_our_own_forms_work_too():
    found = layout()
    table = parse_blocks({"default": 0.0, "OUT03-OUT05": 1.5}, Where()).resolve(found, found.places)
    assert table[UNET + "output_blocks.4.0.in_layers.2.weight"] == 1.5
    assert parse_blocks("GRAD_V", Where()).resolve(found, found.places)
    assert parse_blocks([0.5] * 26, Where()).resolve(found, found.places)
    assert parse_blocks("OUT04:attn2:0.5", Where()).resolve(found, found.places)
