"""The small trained family: its models draw what is asked, and merging moves them as it should.

What a picture shows is judged by the rule of training/judge.py: shape, colour, background.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import numpy as np
import pytest
import tomlkit
import torch
from safetensors.torch import load_file, save_file

from training.drawings import caption, prompts
from training.drawings import pictures as drawings
from training.judge import see

pytest.importorskip("diffusers")

import mergekit_sd as mk
from mergekit_sd.family import ADAPTERS, MODELS, write_family

MOST_BYTES = 15_000_000
FEW = [("circle", "red", "white"), ("triangle", "blue", "white"), ("square", "yellow", "black")]
QUICK = mk.SampleOptions(checks="none", threads=1)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    write_family(folder)
    return folder


def pictures(folder, of, wanted=FEW, seeds=(1,), suffix="", options=QUICK, **recipe: Any):
    """What models, steps and outputs draw for captions: (model, the report's pictures in their order)."""
    data = {
        "recipe": 1,
        "models": {name: f"{name}.safetensors" for name in MODELS},
        **recipe,
        "samples": [{"of": of, "prompt": caption(*each) + suffix, "seeds": list(seeds)} for each in wanted],
    }
    path = folder / "drawn.toml"
    path.write_text(tomlkit.dumps(data), encoding="utf-8")
    report = mk.sample(path, options=options)
    return {name: [each.pixels for each in report.pictures if each.model == name] for name in of}, report


def judged(drawn):
    return [see(np.asarray(each)) for each in drawn]


def apart(a, b):
    """The mean difference of two rows of pictures, of 255."""
    return float(np.abs(np.stack(a).astype(float) - np.stack(b)).mean())


def holes(drawn):
    return float(np.mean([each.hole for each in judged(drawn)]))


def test_it_is_small_and_whole(family):
    data = files("mergekit_sd.family.data")
    assert sum(len(each.read_bytes()) for each in data.iterdir() if each.is_file()) < MOST_BYTES
    assert {path.name for path in family.iterdir()} == {*(f"{name}.safetensors" for name in MODELS), *ADAPTERS}
    for name in MODELS:
        found = mk.inspect_file(family / f"{name}.safetensors")
        assert (found.kind, found.architecture, found.prediction) == ("checkpoint", "sd1", "epsilon")
        assert found.position_ids.state == "ok"
        assert found.junk.tensors == 0
    kinds = {name: mk.inspect_file(family / name).kind for name in ADAPTERS}
    assert [kinds[name] for name in ADAPTERS] == ["lora", "lycoris", "lycoris", "embedding", "hypernetwork"]


def test_base_draws_what_it_is_asked(family):
    drawn, _ = pictures(family, ["base"], prompts())
    right = [each.is_right(*wanted) for each, wanted in zip(judged(drawn["base"]), prompts(), strict=True)]
    assert sum(right) >= 22


def test_half_of_outline_is_between(family):
    half = {"op": "weighted_sum", "a": "base", "b": "outline", "alpha": 0.5}
    drawn, _ = pictures(family, ["base", "half", "outline"], seeds=(1, 2), steps={"half": half})
    whole = apart(drawn["base"], drawn["outline"])
    assert 0.1 * whole < apart(drawn["base"], drawn["half"]) < 0.9 * whole
    assert 0.1 * whole < apart(drawn["outline"], drawn["half"]) < 0.9 * whole
    assert holes(drawn["base"]) < 0.02 < 0.2 < holes(drawn["outline"])


def test_add_difference_carries_star_onto_night(family):
    taught = {"op": "add_difference", "a": "night", "b": "star", "c": "base", "alpha": 1.2, "extrapolate": True}
    wanted = [("sks", "red", "white")]
    drawn, _ = pictures(family, ["night", "star", "taught"], wanted, (1, 2, 3, 4), steps={"taught": taught})
    night, star, both = (judged(drawn[name]) for name in ("night", "star", "taught"))
    assert not any(each.shape == "sks" for each in night)
    assert all(each.palette == "night" for each in (*night, *both))
    assert all((each.shape, each.palette) == ("sks", "day") for each in star)
    assert sum(each.is_right(*wanted[0]) for each in both) >= 3


def test_a_lora_out_of_outline_draws_lines(family, tmp_path):
    mk.save(
        mk.ops.extract_lora(
            mk.open(family / "outline.safetensors"),
            mk.open(family / "base.safetensors"),
            rank=32,
            conv_rank=32,
        ),
        tmp_path / "lines.safetensors",
    )
    lined = {"op": "inject_lora", "model": "base", "loras": [{"lora": "lines"}]}
    models = {"base": str(family / "base.safetensors"), "lines": str(tmp_path / "lines.safetensors")}
    drawn, _ = pictures(family, ["base", "lined"], models=models, steps={"lined": lined})
    assert holes(drawn["base"]) < 0.02 < 0.15 < holes(drawn["lined"])
    assert sum(each.is_right(*wanted) for each, wanted in zip(judged(drawn["lined"]), FEW, strict=True)) >= 2


def stripes(seen, _plain):
    return sum(each.parts > 1 for each in seen) >= 2


def frame(seen, _plain):
    return all(each.framed for each in seen)


def pale(seen, plain):
    return all(mine.strength < 0.7 * theirs.strength for mine, theirs in zip(seen, plain, strict=True))


@pytest.mark.parametrize(
    ("suffix", "shows"), [("<lora:stripes>", stripes), ("<lora:frame>", frame), ("<hypernet:pale>", pale)]
)
def test_an_adapter_in_the_prompt_is_seen(family, suffix, shows):
    plain = judged(pictures(family, ["base"])[0]["base"])
    seen = judged(pictures(family, ["base"], suffix=f" {suffix}")[0]["base"])
    assert shows(seen, plain)
    assert not shows(plain, plain)


def test_the_loha_casts_a_shadow(family):
    wanted = [("circle", "blue", "white"), ("square", "red", "white")]
    plain, shadowed = (
        pictures(family, ["base"], wanted, suffix=suffix)[0]["base"] for suffix in ("", " <lora:shadow>")
    )
    for before, after in zip(plain, shadowed, strict=True):
        darker = before.astype(float).mean(2) - after.astype(float).mean(2) > 40
        rows, _ = np.nonzero(darker)
        assert len(rows) > 60
        assert rows.mean() > 34  # below the middle


def test_the_inversion_is_a_colour_that_base_has_no_word_for(family):
    wanted = [("circle", "mk-orange", "white"), ("triangle", "mk-orange", "white"), ("square", "mk-orange", "black")]
    seen = judged(pictures(family, ["base"], wanted)[0]["base"])
    assert [each.colour for each in seen].count("orange") >= 2
    assert all(each.shape == shape for each, (shape, _, _) in zip(seen, wanted, strict=True))
    without = judged(pictures(family, ["base"], [("circle", "orange", "white")])[0]["base"])
    assert without[0].colour != "orange"


PROBES = """\
[few]
timesteps = [250, 750]
traced = "a red circle on white background"
picture = { ground = [242, 242, 242], disc = [215, 45, 45] }
[few.concepts]
"red circle" = "a red circle on white background"
"blue square" = "a blue square on black background"
"""
DAMAGED = """\
recipe = 1
[models]
base = "base.safetensors"
outline = "outline.safetensors"
zeros = "zeros.safetensors"
[steps.half]
op = "weighted_sum"
a = "base"
b = "outline"
alpha = 0.5
[steps.mute]
op = "weighted_sum"
a = "half"
b = "zeros"
alpha = { default = 0, text_encoder = 1 }
[steps.gap]
op = "weighted_sum"
a = "half"
b = "zeros"
alpha = { default = 0, OUT05 = 1 }
[steps.blind]
op = "weighted_sum"
a = "half"
b = "zeros"
alpha = { default = 0, vae = 1 }
[[samples]]
of = ["half", "mute", "gap", "blind"]
prompt = "a red circle on white background"
seeds = [1]
steps = 6
"""


def test_damages_are_caught_by_name_and_a_healthy_merge_passes(family, tmp_path):
    for name in ("base", "outline"):
        (tmp_path / f"{name}.safetensors").hardlink_to(family / f"{name}.safetensors")
    tensors = load_file(family / "base.safetensors")
    torch.manual_seed(3)
    for key, value in tensors.items():
        if value.dtype == torch.float16:  # the VAE of another kind: noise
            noise = (0.1 * torch.randn(value.shape)).half()
            tensors[key] = noise if key.startswith("first_stage_model") else value * 0
    save_file(tensors, tmp_path / "zeros.safetensors", {"format": "pt"})
    (tmp_path / "damaged.toml").write_text(DAMAGED, encoding="utf-8")
    (tmp_path / "probes.toml").write_text(PROBES, encoding="utf-8")
    report = mk.sample(tmp_path / "damaged.toml", options=mk.SampleOptions(threads=1, probes=tmp_path / "probes.toml"))
    bad = {name: {c.name: c for c in report.checks if c.model == name and c.level != "ok"} for name in report.models}
    assert bad["half"] == {}
    assert "text encoder" in bad["mute"]["empty parts"].message
    assert "every concept" in bad["mute"]["forgetting"].message
    assert "OUT05" in bad["gap"]["empty parts"].message
    assert bad["blind"]["VAE"].level == "failed"


def test_position_ids_of_a_merge_by_floats_are_caught(family, tmp_path):
    key = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    tensors = load_file(family / "base.safetensors")
    ids = tensors[key].half()
    tensors[key] = ids * (1 - 0.04) + ids * 0.04  # as tools that merge every tensor do
    save_file(tensors, tmp_path / "merged.safetensors", {"format": "pt"})
    report = mk.sample(
        tmp_path / "merged.safetensors", "a red circle on white background", steps=2, seeds=[1], size=[64, 64],
        options=mk.SampleOptions(threads=1, checks="quick"),
    )  # fmt: skip
    assert [each.level for each in report.checks if each.name == "position ids"] == ["failed"]


def test_a_style_is_what_its_judge_says():
    """The judge sees what is drawn by hand: or it could not be believed above."""
    for name in ("base", "outline", "night", "star", "frame", "pale"):
        drawn, captions = drawings(name, 24, 7)
        shapes = [see(each).shape for each in drawn]
        assert sum(shape in words for shape, words in zip(shapes, captions, strict=True)) >= 23, name
