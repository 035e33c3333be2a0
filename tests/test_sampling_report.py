"""The text and the PNG of a picture, names of files, the report as data."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json

import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sampling_reports import HOSTILE, hostile, picture, report

from mergekit_sd.recipe.samplers import SAMPLERS
from mergekit_sd.sampling.files import file_names
from mergekit_sd.sampling.json_report import sampling_as_json
from mergekit_sd.sampling.parameters import parameters, png, read_parameters
from mergekit_sd.sampling.values import Picture, Settings
from mergekit_sd.version import VERSION

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
# The WebUI's text has no mark for such a line but itself.
PROMPTS = TEXTS.filter(lambda text: "Negative prompt:" not in text)
NAMES = TEXTS.filter(bool) | st.sampled_from(['a, b: "c"', '"quoted"', " spaced ", "back\\slash", "Steps: 3, Seed: 4"])


def with_text(prompt="", negative="", model="base", **more):
    return picture(model, settings=Settings(prompt, negative, **more))


def test_the_text_is_the_webuis():
    made = Picture(
        "mix",
        Settings("a cat, sitting", "blurry", (1,), size=(16, 8), clip_skip=2),
        1,
        np.zeros((8, 16, 3), np.uint8),
        "0123456789",
    )
    assert parameters(made) == (
        "a cat, sitting\nNegative prompt: blurry\nSteps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 1, "
        f"Size: 16x8, Model hash: 0123456789, Model: mix, Clip skip: 2, Version: mergekit-sd {VERSION}"
    )


def test_what_is_not_known_is_not_said():
    text = parameters(with_text("a cat"))
    assert "Negative" not in text
    assert "hash" not in text
    assert "Clip skip" not in text
    assert "Rescale" not in text
    assert "CFG Rescale phi: 0.7" in parameters(with_text("a cat", cfg_rescale=0.7))


@pytest.mark.parametrize("name", ["a,b", "a:b", "a\nb"])
def test_values_with_separators_are_quoted_as_json(name):
    assert f"Model: {json.dumps(name)}, " in parameters(with_text(model=name))


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=lambda sampler: sampler.name)
def test_samplers_have_the_webuis_names(sampler):
    assert read_parameters(parameters(with_text(sampler=sampler.name)))["Sampler"] == sampler.label


@given(PROMPTS, PROMPTS, NAMES, st.floats(0, 50, allow_nan=False), st.integers(0, 2**64 - 1))
def test_parameters_are_read_back(prompt, negative, model, cfg, seed):
    made = picture(model, settings=Settings(prompt, negative, cfg=cfg, clip_skip=1))
    made = dataclasses.replace(made, seed=seed)
    found = read_parameters(parameters(made))
    assert (found["Prompt"], found["Negative prompt"], found["Model"]) == (prompt, negative, model)
    assert (float(found["CFG scale"]), int(found["Seed"])) == (cfg, seed)
    assert (found["Steps"], found["Size"], found["Clip skip"]) == ("20", "8x8", "1")


@pytest.mark.parametrize("text", ["", "a cat", "a cat\nSteps: 20", "Negative prompt: no\nsettings"])
def test_a_text_without_settings_is_all_prompt(text):
    expected = ("", "no\nsettings") if text.startswith("Neg") else (text, "")
    found = read_parameters(text)
    assert (found["Prompt"], found["Negative prompt"]) == expected
    assert len(found) == 2


def test_a_broken_quotation_is_read_as_it_stands():
    found = read_parameters('a cat\nSteps: 20, Seed: 1, Model: "\\x", Size: 8x8')
    assert found["Model"] == '"\\x"'


@given(TEXTS, st.integers(1, 9), st.integers(1, 9))
def test_a_png_has_the_pixels_and_the_text(prompt, width, height):
    made = picture("base", 3, Settings(prompt), width, height)
    with Image.open(io.BytesIO(png(made))) as image:
        image.load()
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), made.pixels)
        assert image.text == {"parameters": parameters(made)}


@pytest.mark.parametrize(("prompt", "chunk"), [("a café", b"tEXt"), ("ein Bild, 水彩", b"iTXt")])
def test_the_texts_chunk_is_latin_1_where_it_can_be(prompt, chunk):
    data = png(with_text(prompt))
    assert data.count(chunk) == 1
    assert data.count(b"tEXt") + data.count(b"iTXt") == 1
    assert prompt.encode("latin-1" if chunk == b"tEXt" else "utf-8") in data


def test_half_a_surrogate_pair_is_written_plainly():
    assert "Model: a\\udcff," in parameters(with_text(model="a\udcff"))
    assert png(with_text(model="a\udcff"))


def test_the_same_picture_gives_the_same_bytes():
    assert png(with_text("a cat")) == png(with_text("a cat"))


@given(st.lists(st.tuples(NAMES, PROMPTS, st.integers(0, 9)), max_size=8))
def test_names_of_files_are_distinct_and_good_everywhere(every):
    names = file_names([picture(model, seed, Settings(prompt)) for model, prompt, seed in every])
    assert len({name.casefold() for name in names}) == len(every)
    for name in names:
        assert not set(name) & set('<>:"/\\|?*\0\n')
        assert len(name.encode()) < 210
        assert name.endswith(".png")
        assert name[0] not in ". "


def test_a_name_says_model_prompt_and_seed():
    assert file_names(report(models=("Mix",), prompts=("a",)).pictures) == ("Mix-seed-0.png", "Mix-seed-7.png")
    assert file_names(report(models=("Mix", "mix"), seeds=(7,)).pictures)[2:] == (
        "Mix-prompt-2-seed-7.png",
        "mix-prompt-2-seed-7-2.png",
    )
    assert file_names([picture("../..\\é", 1)]) == ("_.._é-seed-1.png",)


TEXT, NUMBER = {"type": "string"}, {"type": ["number", "null"]}
OPTIONAL = {"type": ["string", "null"]}


def an_object(**properties):
    required = list(properties)
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def a_list(items):
    return {"type": "array", "items": items}


def a_table(values):
    return {"type": "object", "additionalProperties": values}


WHOLE = {"type": "integer"}
SCHEMA = an_object(
    title=TEXT,
    recipe=OPTIONAL,
    models=a_list(TEXT),
    parents=a_list(TEXT),
    made=a_table(TEXT),
    pictures=a_list(
        an_object(
            file=TEXT,
            model=TEXT,
            model_hash=OPTIONAL,
            seed=WHOLE,
            width=WHOLE,
            height=WHOLE,
            pixels_sha256={"type": "string", "pattern": "^[0-9a-f]{64}$"},
            settings=an_object(
                prompt=TEXT,
                negative=TEXT,
                steps=WHOLE,
                cfg=NUMBER,
                sampler=TEXT,
                size={"type": ["array", "null"]},
                clip_skip={"type": ["integer", "null"]},
                cfg_rescale=NUMBER,
            ),
        )
    ),
    checks=a_list(
        an_object(
            name=TEXT,
            heading={"enum": ["prompt", "unasked", "looks", "sound"]},
            level={"enum": ["ok", "warning", "failed"]},
            model=TEXT,
            message=TEXT,
            figures=a_table(NUMBER),
        )
    ),
    charts=a_list(an_object(title=TEXT, note=TEXT, values=a_table(a_table(NUMBER)))),
    notes=a_list(TEXT),
    machine={"type": "object"},
)


@pytest.mark.parametrize("made", [report(), hostile(), report(recipe=None, models=(), seeds=())])
def test_the_report_as_data_is_strict_json_of_one_schema(made):
    data = json.loads(json.dumps(sampling_as_json(made), allow_nan=False))
    jsonschema.validate(data, SCHEMA)
    assert data == sampling_as_json(made)
    for entry, each in zip(data["pictures"], made.pictures, strict=True):
        assert entry["pixels_sha256"] == hashlib.sha256(bytes(each.pixels.ravel().tolist())).hexdigest()
        assert (entry["model"], entry["seed"]) == (each.model, each.seed)
    assert [entry["file"] for entry in data["pictures"]] == list(file_names(made.pictures))


def test_data_keeps_names_as_they_are_and_numbers_that_json_has():
    data = sampling_as_json(hostile())
    assert data["models"][1] == HOSTILE
    assert data["checks"][0]["figures"] == {HOSTILE: None, "of": 24}
    assert data["charts"][0]["values"][HOSTILE]["OUT00"] is None
    assert data["machine"]["list"] == [1, {"a": None}]
