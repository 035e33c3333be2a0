"""The small trained family: its models draw what is asked, and merging moves them as it should.

What a picture shows is judged by the rule of training/judge.py: shape, colour, background.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import numpy as np
import pytest
import story
import tomlkit
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from training.drawings import caption, prompts
from training.drawings import pictures as drawings
from training.judge import see

pytest.importorskip("diffusers")

import mergekit_sd as mk
from mergekit_sd.cli import lora
from mergekit_sd.family import ADAPTERS, MODELS, write_family
from mergekit_sd.sampling.prompts.tokens import ids_of

MOST_BYTES = 15_000_000
FEW = [("circle", "red", "white"), ("triangle", "blue", "white"), ("square", "yellow", "black")]
QUICK = mk.SampleOptions(checks="none", threads=1)
STEPS = 12  # of the 20 that the models ask for: the judge sees no difference


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    write_family(folder)
    return folder


def pictures(folder, of, wanted=FEW, seeds=(1,), suffixes=("",), **recipe: Any):
    """What models and steps draw for captions, with each suffix: the pictures of each model, in their order."""
    data = {
        "recipe": 1,
        "models": {name: f"{name}.safetensors" for name in MODELS},
        **recipe,
        "samples": [
            {"of": of, "prompt": caption(*each) + suffix, "seeds": list(seeds), "steps": STEPS}
            for suffix in suffixes
            for each in wanted
        ],
    }
    path = folder / "drawn.toml"
    path.write_text(tomlkit.dumps(data), encoding="utf-8")
    report = mk.sample(path, options=QUICK)
    return {name: [each.pixels for each in report.pictures if each.model == name] for name in of}


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
    drawn = pictures(family, ["base"], prompts())
    right = [each.is_right(*wanted) for each, wanted in zip(judged(drawn["base"]), prompts(), strict=True)]
    assert sum(right) >= 22


def test_half_of_outline_is_between(family):
    half = {"op": "weighted_sum", "a": "base", "b": "outline", "alpha": 0.5}
    drawn = pictures(family, ["base", "half", "outline"], steps={"half": half})
    whole = apart(drawn["base"], drawn["outline"])
    assert 0.1 * whole < apart(drawn["base"], drawn["half"]) < 0.9 * whole
    assert 0.1 * whole < apart(drawn["outline"], drawn["half"]) < 0.9 * whole
    assert holes(drawn["base"]) < 0.02 < 0.2 < holes(drawn["outline"])


def test_add_difference_carries_star_onto_night(family):
    taught = {"op": "add_difference", "a": "night", "b": "star", "c": "base", "alpha": 1.2, "extrapolate": True}
    wanted = [("sks", "red", "white")]
    drawn = pictures(family, ["night", "star", "taught"], wanted, (1, 2, 3, 4), steps={"taught": taught})
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
    drawn = pictures(family, ["base", "lined"], models=models, steps={"lined": lined})
    assert holes(drawn["base"]) < 0.02 < 0.15 < holes(drawn["lined"])
    assert sum(each.is_right(*wanted) for each, wanted in zip(judged(drawn["lined"]), FEW, strict=True)) >= 2


def test_a_lora_is_drawn_beside_its_making_and_its_baking(family, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lora, "_SEEDS", (1,))
    shell, prompt = story.Shell(capsys), caption("circle", "red", "white")
    base = family / "base.safetensors"
    made = ("lora", "extract", family / "outline.safetensors", base, "--conv-rank", 32, "-o", "lines.safetensors")
    report = shell.json(*made, "--draw", prompt)
    assert [each["level"] for each in report["samples"]["checks"] if each["level"] == "failed"] == []
    seen = {name: drawn(f"lines-samples/{name}-seed-1.png") for name in ("tuned", "base + LoRA", "base")}
    assert holes([seen["base"]]) < 0.02 < 0.15 < min(holes([seen["tuned"]]), holes([seen["base + LoRA"]]))
    shell("lora", "inject", base, "lines.safetensors:0.9", "-o", "baked.safetensors", "--draw", prompt)
    plain, in_prompt = (drawn(f"baked-samples/model-prompt-{n}-seed-1.png") for n in (1, 2))
    baked = drawn("baked-samples/baked-prompt-1-seed-1.png")
    assert holes([plain]) < 0.02 < 0.15 < holes([baked])
    # Baked weights were rounded to fp16, those of the prompt were not.
    assert apart([baked], [in_prompt]) < 1 < 5 < apart([baked], [plain])


def drawn(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


ADAPTED = {"": "", "stripes": " <lora:stripes>", "frame": " <lora:frame>", "pale": " <hypernet:pale>"}


@pytest.fixture(scope="module")
def adapted(family):
    """What base draws with each adapter in the prompt, "" without."""
    drawn = iter(pictures(family, ["base"], suffixes=list(ADAPTED.values()))["base"])
    loaded = ("", "pale", "stripes", "frame")  # a model is loaded anew for each LoRA, after all else
    return {name: [next(drawn) for _ in FEW] for name in loaded}


def stripes(seen, _plain):
    return sum(each.parts > 1 for each in seen) >= 2


def frame(seen, _plain):
    return all(each.framed for each in seen)


def pale(seen, plain):
    return all(mine.strength < 0.7 * theirs.strength for mine, theirs in zip(seen, plain, strict=True))


@pytest.mark.parametrize("shows", [stripes, frame, pale])
def test_an_adapter_in_the_prompt_is_seen(adapted, shows):
    plain = judged(adapted[""])
    assert shows(judged(adapted[shows.__name__]), plain)
    assert not shows(plain, plain)


def test_the_loha_casts_a_shadow(family):
    wanted = [("circle", "blue", "white"), ("square", "red", "white")]
    drawn = pictures(family, ["base"], wanted, suffixes=("", " <lora:shadow>"))["base"]
    for before, after in zip(drawn[:2], drawn[2:], strict=True):
        rows, _ = np.nonzero(before.astype(float).mean(2) - after.astype(float).mean(2) > 40)
        assert len(rows) > 60
        assert rows.mean() > 34  # below the middle


def test_the_inversion_is_a_colour_that_base_has_no_word_for(family):
    wanted = [("circle", "mk-orange", "white"), ("triangle", "mk-orange", "white"), ("square", "mk-orange", "black")]
    drawn = pictures(family, ["base"], [*wanted, ("circle", "orange", "white")])["base"]
    *seen, without = judged(drawn)
    assert [each.colour for each in seen].count("orange") >= 2
    assert all(each.shape == shape for each, (shape, _, _) in zip(seen, wanted, strict=True))
    assert without.colour != "orange"


PROBES = """\
[few]
timesteps = [250, 750]
traced = "a red circle on white background"
picture = { ground = [242, 242, 242], disc = [215, 45, 45] }
[few.concepts]
"red circle" = "a red circle on white background"
"blue square" = "a blue square on black background"
"green circle" = "a green circle on white background"
"green triangle" = "a green triangle on white background"
"""
PARTS = {"text encoder": "cond_stage_model.", "VAE": "first_stage_model.", "UNet": "model.diffusion_model."}
BLOCK = "model.diffusion_model.output_blocks.5."


def noise(like):
    return like.float().std().nan_to_num(0.02) * torch.randn(like.shape)


# By name: the weights that a bad tool would write, and what becomes of each.
DAMAGES = {
    "mute": (PARTS["text encoder"], lambda weight: 0 * weight),
    "gap": (BLOCK, lambda weight: 0 * weight),
    "wild": (BLOCK, noise),
    "loud": (PARTS["UNet"], lambda weight: 1.5 * weight),
    "blind": (PARTS["VAE"], lambda weight: 0.1 * torch.randn(weight.shape)),
    "dim": (PARTS["VAE"], lambda weight: 0.5 * weight),
}
FOUND = {
    "mute": {"empty parts": "text encoder", "forgetting": "every concept"},
    "gap": {"empty parts": "OUT05"},
    "wild": {"stray blocks": "OUT05"},
    "loud": {"prediction type": "worse than nothing"},
    "blind": {"VAE": "of another family"},
    "dim": {"VAE": "times worse than its parents'"},
    "said v": {"prediction type": 'Write prediction = "epsilon"'},
    "swapped": {"forgetting": "takes green triangle for "},
}


def write_damages(folder, half):
    """Files that are `half` but for one fault each."""
    tensors = load_file(half)
    torch.manual_seed(3)
    for name, (part, change) in DAMAGES.items():
        changed = {
            key: change(weight).half() if key.startswith(part) and weight.is_floating_point() else weight
            for key, weight in tensors.items()
        }
        save_file(changed, folder / f"{name}.safetensors", SAID)
    save_file(tensors, folder / "said v.safetensors", SAID | {"modelspec.prediction_type": "v"})
    words = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    (triangle,), (circle,) = ids_of("triangle"), ids_of("circle")
    table = tensors[words].clone()
    table[triangle] = table[circle]
    save_file({**tensors, words: table}, folder / "swapped.safetensors", SAID)


SAID = {"format": "pt", "modelspec.prediction_type": "epsilon", "modelspec.resolution": "64x64"}
HEALTHY = {
    "half": {"op": "weighted_sum", "a": "base", "b": "outline", "alpha": 0.5},
    "three": {"op": "sum_twice", "a": "base", "b": "outline", "c": "night", "alpha": 0.3, "beta": 0.3},
    "striped": {"op": "inject_lora", "model": "base", "loras": ["stripes"]},
    "taught": {"op": "add_difference", "a": "night", "b": "star", "c": "base", "alpha": 1.0},
}


def findings(report):
    """What was not ok: messages by model, then by check."""
    found = {name: {} for name in report.models}
    for check in report.checks:
        if check.level != "ok":
            found[check.model][check.name] = check.message
    return found


def test_damages_are_caught_by_name(family, tmp_path):
    (tmp_path / "probes.toml").write_text(PROBES, encoding="utf-8")
    half = HEALTHY["half"]
    sound = mk.ops.weighted_sum(
        mk.open(family / "base.safetensors"), mk.open(family / "outline.safetensors"), alpha=0.5
    )
    mk.save(sound, tmp_path / "half.safetensors")
    write_damages(tmp_path, tmp_path / "half.safetensors")
    data = {
        "recipe": 1,
        "models": {name: str(family / f"{name}.safetensors") for name in ("base", "outline")},
        "steps": {"mix": half},
        "outputs": {name: {"model": "mix", "file": f"{name}.out.safetensors"} for name in ("half", *FOUND)},
        "samples": [{"of": ["half", *FOUND], "prompt": caption(*FEW[0]), "seeds": [1], "steps": 6}],
    }
    (tmp_path / "r.toml").write_text(tomlkit.dumps(data), encoding="utf-8")
    options = mk.SampleOptions(threads=1, probes=tmp_path / "probes.toml")
    written = {name: tmp_path / f"{name}.safetensors" for name in ("half", *FOUND)}
    found = findings(mk.prepare_samples(mk.load(tmp_path / "r.toml"), options=options, written=written).run())
    assert found.pop("half") == {}
    for name, wanted in FOUND.items():
        for check, words in wanted.items():
            assert words in found[name][check], name


def test_healthy_merges_pass(family):
    data = {
        "recipe": 1,
        "models": {name: f"{name}.safetensors" for name in (*MODELS, "stripes")},
        "steps": HEALTHY,
        "samples": [{"of": list(HEALTHY), "prompt": caption(*FEW[0]), "seeds": [1], "steps": 6}],
    }
    (family / "healthy.toml").write_text(tomlkit.dumps(data), encoding="utf-8")
    report = mk.sample(family / "healthy.toml", options=mk.SampleOptions(threads=1))
    assert findings(report) == {name: {} for name in HEALTHY}
    assert {"forgetting", "stray blocks", "association", "unasked", "VAE"} <= {each.name for each in report.checks}


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
