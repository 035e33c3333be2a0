"""A recipe as text: it loads as the data that it was written from, and reads as a person would say it."""

from __future__ import annotations

import datetime
import string

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mergekit_sd as mk
from mergekit_sd.recipe.load import recipe_from_data

SHA256 = "a" * 64

names = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1, max_size=8).filter(
    lambda name: name.isprintable() and name.strip()
)
plain = st.text(string.ascii_letters + string.digits + "-_. ", min_size=1, max_size=8)
numbers = st.floats(0, 1) | st.integers(0, 1)
selectors = st.sampled_from(["base", "vae", "text_encoder", "M00", "IN00-IN05", "OUT05.attn2", "*.norm*", "unet"])
weights = numbers | st.builds(lambda low, rest: {"default": low, **rest}, numbers, st.dictionaries(selectors, numbers))


@st.composite
def recipes(draw):
    """Plain data of a sound recipe: a chain of steps over some models."""
    inputs = draw(st.lists(names, min_size=1, max_size=3, unique=True))
    steps, sources = {}, list(inputs)
    for name in draw(st.lists(names.filter(lambda name: name not in inputs), max_size=3, unique=True)):
        operands = {"a": draw(st.sampled_from(sources)), "b": draw(st.sampled_from(sources))}
        steps[name] = {"op": "weighted_sum", **operands, "alpha": draw(weights)}
        sources.append(name)
    output = {"model": sources[-1], "file": "out.safetensors"}
    output |= draw(
        st.sampled_from([{}, {"dtype": "keep"}, {"dtype": {"default": "fp16", "vae": "fp32"}, "junk": "keep"}])
    )
    data = {"recipe": 1, "models": {name: draw(plain.map(lambda text: f"{text}.safetensors")) for name in inputs}}
    data |= {"title": draw(names)} if draw(st.booleans()) else {}
    data |= {"date": draw(st.dates(datetime.date(1, 1, 1)))} if draw(st.booleans()) else {}
    data |= {"samples": [{"of": [sources[-1]], "prompt": draw(names), "seeds": [1, 2]}]} if draw(st.booleans()) else {}
    return data | ({"steps": steps} if steps else {}) | {"outputs": {draw(names): output}}


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(recipes())
def test_text_of_a_recipe_loads_as_the_same_data(tmp_path, data):
    recipe_from_data(data, folder=tmp_path)
    text = mk.recipe_text(data, ["a comment"])
    path = tmp_path / "r.toml"
    path.write_bytes(text.encode("utf-8"))
    assert mk.load(path).data == data


def test_text_reads_as_a_person_would_say_it():
    data = {
        "models": {"date": "x.safetensors", "b": {"sha256": SHA256, "file": "y.safetensors"}},
        "recipe": 1,
        "date": "2026-01-31",
        "steps": {
            "mix": {
                "alpha": {"*.norm*": 1, "OUT05": 0.5, "IN01": 0.5, "default": 0},
                "b": "b",
                "a": "date",
                "op": "slerp",
            }
        },
        "outputs": {"out": {"dtype": "fp16", "file": "out.safetensors", "model": "mix"}},
    }
    assert mk.recipe_text(data) == (
        "recipe = 1\ndate = 2026-01-31\n\n"
        f'[models]\ndate = "x.safetensors"\nb = {{file = "y.safetensors", sha256 = "{SHA256}"}}\n\n'
        '[steps.mix]\nop = "slerp"\na = "date"\nb = "b"\n'
        'alpha = {default = 0, IN01 = 0.5, OUT05 = 0.5, "*.norm*" = 1}\n\n'
        '[outputs.out]\nmodel = "mix"\nfile = "out.safetensors"\ndtype = "fp16"\n'
    )
