"""Pictures of files, plans and recipes, whole: random small models, two steps each."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import models
import numpy as np
import pytest
import small_files
import story

pytest.importorskip("diffusers")

import sampling_models as small

import mergekit_sd as mk
from mergekit_sd.errors import Cancelled, EnvironmentFault, MissingTensors, RecipeError, UsageError, WrongFormat
from mergekit_sd.events import CancelToken, MemoryTold, Noted, Sampling
from mergekit_sd.sampling import packages
from mergekit_sd.sampling.prompts.tokens import ids_of
from mergekit_sd.sampling.shots import hinted

QUICK = mk.SampleOptions(checks="none", threads=1)
MIX = """\
recipe = 1
[models]
night = "night.safetensors"
day = "day.safetensors"
[steps.mix]
op = "weighted_sum"
a = "night"
b = "day"
alpha = { default = 0.3, vae = 0 }
"""
PROBES = """\
[few]
timesteps = [500]
traced = "a cat"
pairs = [["cat", "car"]]
concepts = { cat = "a cat", car = "a car" }
"""
OUT = '[outputs.out]\nmodel = "mix"\nfile = "out.safetensors"\n'
LIT = """\
[models.glow]
file = "glow.safetensors"
[steps.lit]
op = "inject_lora"
model = "mix"
loras = [{}]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two models and what prompts may name, which no test changes."""
    folder = tmp_path_factory.mktemp("pictures")
    night = small.tensors(0)
    small.write(folder / "night.safetensors", night)
    small.write(folder / "day.safetensors", small.tensors(1))
    models.write(folder / "glow.safetensors", small.lora(night))
    (row,) = ids_of("cat")
    small_files.plain(folder / "zq.safetensors", night[small.EMBEDDED][[row]].clone())
    small_files.saved(folder / "fog.pt", small_files.hypernetwork((64, 32), activation_func="relu"))
    (folder / "probes.toml").write_text(PROBES)
    return folder


@pytest.fixture
def recipe(place, tmp_path):
    """Writes a recipe into a folder of the test's own, with links to the models."""
    for path in place.iterdir():
        (tmp_path / path.name).hardlink_to(path)

    def written(text, name="r.toml"):
        (tmp_path / name).write_text(MIX + text, encoding="utf-8")
        return tmp_path / name

    return written


def full(recipe):
    """All checks, on few probes."""
    return mk.SampleOptions(threads=1, probes=recipe.parent / "probes.toml")


def drawn(source, prompt="a lantern", *, options=QUICK, **asked):
    """The pictures' pixels."""
    return [each.pixels for each in report(source, prompt, options=options, **asked).pictures]


def report(source, prompt="a lantern", *, options=QUICK, **asked):
    if prompt is not None:
        asked = {"steps": 2, **asked}
    return mk.sample(source, prompt, options=options, **asked)


def same(one, other):
    return len(one) == len(other) > 0 and all(map(np.array_equal, one, other))


# --- a plan's pictures are its file's ---------------------------------------------------------------------

AS_WRITTEN = {
    "a merge": OUT,
    "declared": OUT + 'sampling = { steps = 3, sampler = "euler_a", size = [64, 128], clip_skip = 2 }\n',
    "a LoRA": OUT.replace('"mix"', '"lit"') + LIT.format('"<lora:glow:0.7>"'),
}


@pytest.mark.parametrize("text", AS_WRITTEN.values(), ids=AS_WRITTEN)
def test_pictures_of_a_plan_are_those_of_its_file(recipe, text):
    path = recipe(text)
    asked = {"seeds": [1], "steps": None if "steps" in text else 2}
    planned = report(path, **asked)
    mk.make_outputs(path)
    (name,) = {each.name for each in path.parent.glob("out.*")} - {"out.lock"}
    filed = report(path.parent / name, **asked)
    assert same([each.pixels for each in planned.pictures], [each.pixels for each in filed.pictures])
    assert planned.pictures[0].settings == filed.pictures[0].settings
    assert planned.pictures[0].pixels.shape == ((128, 64, 3) if "128" in text else (64, 64, 3))


@pytest.mark.parametrize(("hints", "cfg"), [(("CFG scale: 3",) * 2, 3), (("CFG scale: 3", "CFG scale: 4"), 7)])
def test_what_the_parents_say_of_their_use_counts_where_they_agree(place, recipe, hints, cfg):
    path = recipe(OUT)
    for name, hint in zip(("night", "day"), hints, strict=True):
        (path.parent / f"{name}.safetensors").unlink()
        small.write(path.parent / f"{name}.safetensors", models.read(place / f"{name}.safetensors"), usage_hint=hint)
    (planned,) = report(path).pictures
    mk.make_outputs(path)
    (filed,) = report(path.parent / "out.safetensors").pictures
    assert np.array_equal(planned.pixels, filed.pixels)
    assert planned.settings.cfg == filed.settings.cfg == cfg


def test_what_an_output_declares_is_in_its_file_and_used(recipe):
    path = recipe(OUT + 'sampling = { steps = 3, cfg = 1, sampler = "euler", clip_skip = 2 }\n')
    mk.make_outputs(path)
    file = path.parent / "out.safetensors"
    assert models.metadata(file)["modelspec.usage_hint"] == "Steps: 3, Sampler: Euler, CFG scale: 1, Clip skip: 2"
    own = report(file, steps=None).pictures[0].settings
    assert (own.steps, own.cfg, own.sampler, own.clip_skip, own.size) == (3, 1.0, "euler", 2, (64, 64))
    given = report(file, steps=1, cfg=2.0, sampler="ddim", clip_skip=1, size=[64, 72]).pictures[0].settings
    assert (given.steps, given.cfg, given.sampler, given.clip_skip, given.size) == (1, 2.0, "ddim", 1, (64, 72))


@pytest.mark.parametrize(
    ("hint", "found"),
    [
        ("Steps: 4", {"steps": 4}),
        ("Steps: 4, CFG scale: 1.5, Sampler: LCM", {"steps": 4, "cfg": 1.5, "sampler": "lcm"}),
        ("Size: 64x128, Clip skip: 2", {"size": (64, 128), "clip_skip": 2}),
        ("Size: 65x64, Clip skip: 99, Steps: 0, CFG scale: nan, Sampler: magic", {}),
        (f"Steps: {'9' * 5000}, Size: 64, CFG scale: {'9' * 5000}", {}),
        ("Steps: 2.5, Size: x", {}),
        ("use 20 steps and say please", {}),
        (None, {}),
    ],
)
def test_a_hint_says_settings_or_nothing(hint, found):
    assert hinted(hint) == found


# --- what prompts name ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tag", "entry"),
    [
        ("<lora:glow:0.7>", '"<lora:glow:0.7>"'),
        ("<lora:glow:0.3:0.9>", '{ lora = "glow", strength = 0.9, text_encoder = 0.3 }'),
        ("<lora:glow:0.5:lbw=OUTALL>", '{ lora = "glow", strength = 0.5, text_encoder = 0.5, blocks = "OUTALL" }'),
    ],
)
def test_a_lora_of_the_prompt_is_one_that_the_recipe_injects(recipe, tag, entry):
    step = (
        f'[models.glow]\nfile = "glow.safetensors"\n[steps.lit]\nop = "inject_lora"\nmodel = "mix"\nloras = [{entry}]\n'
    )
    lit = drawn(recipe(OUT.replace('"mix"', '"lit"') + step, "lit.toml"))
    plain = recipe(OUT)
    assert same(drawn(plain, f"a lantern{tag}"), lit)
    assert not same(drawn(plain), lit)


def test_each_sample_has_its_own_loras(recipe):
    sample = '[[samples]]\nof = ["night"]\nsteps = 2\nprompt = '
    path = recipe(
        "".join(f"{sample}'{text}'\n" for text in ("a<lora:glow:1>", "a", "a<lora:glow:0.5>", "a<lora:glow>"))
    )
    made = {each.settings.prompt: each.pixels for each in report(path, None).pictures}
    assert list(made) == ["a", "a<lora:glow:1>", "a<lora:glow>", "a<lora:glow:0.5>"]  # by networks
    assert np.array_equal(made["a<lora:glow:1>"], made["a<lora:glow>"])
    assert len({each.tobytes() for each in made.values()}) == 3


def test_a_textual_inversion_is_the_word_whose_row_it_holds(place):
    model, empty = place / "night.safetensors", place / "day.safetensors"
    assert same(drawn(model, "a zq"), drawn(model, "a cat"))
    assert not same(drawn(model, "a", negative="zq"), drawn(model, "a"))
    assert not same(drawn(empty, "a zq"), drawn(empty, "a cat"))  # the row of another model


def test_extras_are_found_where_they_are_named(place, tmp_path):
    (tmp_path / "alone").mkdir()
    model = tmp_path / "alone" / "night.safetensors"
    model.hardlink_to(place / "night.safetensors")
    with pytest.raises(RecipeError, match='no LoRA "glow"') as refused:
        drawn(model, "<lora:glow>")
    assert "--extras" in refused.value.hint
    wanted = drawn(place / "night.safetensors", "a <lora:glow> zq <hypernet:fog>")
    assert same(drawn(model, "a <lora:glow> zq <hypernet:fog>", extras=[str(place)]), wanted)
    files = [str(place / name) for name in ("glow.safetensors", "zq.safetensors", "fog.pt")]
    assert same(drawn(model, "a <lora:glow> zq <hypernet:fog>", extras=files), wanted)


def test_a_hypernetwork_at_0_changes_nothing_and_the_next_picture_knows_none(recipe):
    sample = '[[samples]]\nof = ["night"]\nsteps = 2\nprompt = '
    path = recipe("".join(f"{sample}'{text}'\n" for text in ("a", "a<hypernet:fog:0.5>", "a<hypernet:fog:0>")))
    plain, foggy, after = drawn(path, None)
    assert np.array_equal(plain, after)
    assert not np.array_equal(plain, foggy)


# --- recipes ----------------------------------------------------------------------------------------------

SAMPLES = """\
[[samples]]
of = ["out", "night", "mix"]
prompt = "a lantern"
negative = "fog"
seeds = [1, 2]
steps = 2
"""


def test_models_steps_and_outputs_are_drawn_and_compared_with_their_parents(recipe):
    path = recipe(OUT + SAMPLES)
    told = []
    made = mk.sample(path, on_event=told.append, options=full(path))
    assert made.models == ("out", "night", "mix")
    assert made.parents == ("night", "day")
    assert [(each.model, each.seed) for each in made.pictures] == [(m, s) for m in made.models for s in (1, 2)]
    assert made.title == "r"
    assert made.recipe == path.read_text()
    assert {each.model for each in made.checks} == {*made.models}
    for figure in ("out", "mix"):  # more is looked at where there are parents
        assert sum(each.model == figure for each in made.checks) > sum(each.model == "night" for each in made.checks)
    assert not any("mixes VAEs" in each.message for each in made.checks)
    assert {each.model for each in made.checks if each.name == "stray blocks"} == {"out", "mix"}
    how = "mix = weighted_sum(a = night, b = day), alpha by block"
    assert made.made == {"out": how, "mix": how}
    weights = {each.title: each.values for each in made.charts if each.title.startswith("Weights")}
    assert set(weights) == {"Weights of out, by block", "Weights of mix, by block"}
    blocks = weights["Weights of mix, by block"]["mix: alpha"]
    assert list(blocks)[:2] == ["text_encoder", "IN00"]
    assert (blocks["M00"], blocks["vae"]) == (0.3, 0)
    steps = [each for each in told if isinstance(each, Sampling)]
    assert steps[-1].done == steps[-1].steps == 12
    assert [each.done for each in steps] == sorted(each.done for each in steps)
    assert [each.model for each in steps if each.stage == "loading"] == ["night", "day", "out", "mix"]
    assert sum(isinstance(each, MemoryTold) for each in told) == 1


def test_a_loras_weights_by_block_are_shown_as_the_recipe_says(recipe):
    lora = '{ lora = "glow", strength = 0.8, text_encoder = 0.5, blocks = { default = 1, OUT05 = 0.25 } }'
    path = recipe(OUT.replace('"mix"', '"lit"') + LIT.format(lora))
    made = report(path, options=mk.SampleOptions(checks="quick", threads=1))
    assert made.made["out"].endswith("; lit = inject_lora(model = mix), glow by block")
    (chart,) = made.charts
    blocks = chart.values["lit: glow"]
    assert (blocks["text_encoder"], blocks["IN01"], blocks["OUT05"]) == (0.5, 0.8, 0.2)
    assert "vae" not in blocks
    assert "stray blocks" not in {each.name for each in mk.sample(path, "a cat", steps=1, options=full(path)).checks}


def test_a_device_is_refused_before_memory_is_told(place):
    told = []
    with pytest.raises(UsageError, match="no device to sample on"):
        mk.sample(place / "night.safetensors", "a cat", options=mk.SampleOptions(device="tpu"), on_event=told.append)
    assert told == []


def test_a_run_compares_with_the_parents_that_its_files_no_longer_name(recipe):
    path = recipe(OUT + SAMPLES.replace(', "night", "mix"', ""))
    options = full(path)
    checks = {each.name for each in mk.sample(path, options=options).checks}
    ran = mk.run(path, sampling=options)
    assert {each["name"] for each in ran.samples["checks"]} == checks
    assert not ran.warnings


def test_mixed_vaes_are_told_of_the_models_that_have_them(recipe):
    path = recipe((OUT + SAMPLES).replace("out.safe", "o.safe"))
    path.write_text(path.read_text().replace(", vae = 0", ""))
    made = mk.sample(path, options=full(path))
    told = {each.model for each in made.checks if "mixes VAEs" in each.message}
    assert "night" not in told
    assert told


def test_a_parent_without_vae_is_left_out_and_told(place, recipe):
    path = recipe(OUT + SAMPLES)
    bare = {name: each for name, each in models.read(place / "day.safetensors").items() if not name.startswith("first")}
    (path.parent / "day.safetensors").unlink()
    small.write(path.parent / "day.safetensors", bare)
    made = mk.sample(path, of=["out"], options=full(path))
    assert made.models == ("out",)
    assert len(made.pictures) == 2
    assert made.notes == ('nothing is compared with the parent day: "day" has no VAE.',)
    with pytest.raises(MissingTensors, match='"day" has no VAE') as refused:
        drawn(path.parent / "day.safetensors")
    assert "--vae" in refused.value.hint
    options = mk.SampleOptions(checks="none", threads=1, vae=path.parent / "night.safetensors")
    assert same(drawn(path.parent / "day.safetensors", options=options), drawn(path, of=["day"], options=options))


def test_what_is_asked_counts_for_a_recipes_own_samples(recipe):
    path = recipe(OUT + SAMPLES)
    made = report(path, None, steps=1, seeds=[7], of=["mix"])
    ((picture),) = made.pictures
    assert (picture.model, picture.seed, picture.settings.steps) == ("mix", 7, 1)
    assert (picture.settings.prompt, picture.settings.negative) == ("a lantern", "fog")
    assert {each.model for each in report(path, "other").pictures} == {"out"}
    assert {each.model for each in report(path, None, of=["mix", "out"]).pictures} == {"mix", "out"}


def test_a_graph_is_drawn_without_being_written(place):
    night, day = mk.open(place / "night.safetensors"), mk.open(place / "day.safetensors")
    assert not same(drawn(mk.ops.weighted_sum(night, day, alpha=0.5)), drawn(place / "night.safetensors"))


# --- run --------------------------------------------------------------------------------------------------


def test_a_run_draws_beside_its_recipe_and_replaces_its_own_folder(recipe):
    path = recipe(OUT + SAMPLES)
    folder = path.parent / "r-samples"
    ran = mk.run(path, sampling=QUICK)
    names = sorted(each.name for each in folder.iterdir())
    assert names == sorted(
        [f"{model}-seed-{seed}.png" for model in ("night", "mix", "out") for seed in (1, 2)]
        + ["report.html", "report.json", "sheet.png"]
    )
    assert ran.samples["folder"] == str(folder)
    assert not ran.warnings
    first = (folder / "out-seed-1.png").read_bytes()
    path.write_text(path.read_text().replace('["out", "night", "mix"]', '["out"]'))
    mk.run(path, sampling=QUICK, force=True)
    assert (folder / "out-seed-1.png").read_bytes() == first
    assert not (folder / "night-seed-1.png").exists()
    assert json.loads((folder / "report.json").read_text())["models"] == ["out"]


def test_a_foreign_folder_stays_and_so_do_the_outputs(recipe):
    path = recipe(OUT + SAMPLES)
    (path.parent / "r-samples").mkdir()
    (path.parent / "r-samples" / "diary.txt").write_text("mine")
    told = []
    ran = mk.run(path, sampling=QUICK, on_event=told.append)
    assert (path.parent / "out.safetensors").is_file()
    assert ran.samples is None
    assert [each.message for each in told if isinstance(each, Noted)] == [*ran.warnings]
    assert ran.warnings[0].startswith("no pictures: ")
    assert [each.name for each in (path.parent / "r-samples").iterdir()] == ["diary.txt"]


def test_a_run_without_samples_and_one_of_samples_alone(recipe):
    path = recipe(OUT + SAMPLES)
    assert mk.run(path, samples=False).samples is None
    assert not (path.parent / "r-samples").exists()
    alone = recipe(SAMPLES.replace('"out", ', ""), "alone.toml")
    ran = mk.run(alone, sampling=QUICK)
    assert ran.outputs == ()
    assert ran.lock is None
    assert len(ran.samples["pictures"]) == 4
    assert (path.parent / "alone-samples" / "sheet.png").is_file()
    (path.parent / "alone-samples" / "report.json").unlink()  # now it is someone else's
    with pytest.raises(UsageError):
        mk.run(alone, sampling=QUICK)


def test_without_the_packages_a_run_warns_and_sample_refuses(recipe, monkeypatch):
    def missing():
        raise EnvironmentFault("Making pictures needs diffusers, not installed here: pip install it")

    monkeypatch.setattr(packages, "need_packages", missing)
    path = recipe(OUT + SAMPLES)
    ran = mk.run(path)
    assert (path.parent / "out.safetensors").is_file()
    assert ran.samples is None
    assert ran.warnings == ("no pictures: Making pictures needs diffusers, not installed here: pip install it",)
    with pytest.raises(EnvironmentFault, match="needs diffusers"):
        mk.sample(path)
    with pytest.raises(EnvironmentFault, match="needs diffusers"):
        mk.run(recipe(SAMPLES.replace('"out", ', ""), "alone.toml"))


@pytest.mark.parametrize("checks", ["none", "full"])
def test_a_cancelled_run_ends_within_a_step_and_leaves_no_folder(recipe, checks):
    path = recipe(OUT + SAMPLES)
    token, told = CancelToken(), []

    def listen(event):
        if isinstance(event, Sampling) and event.stage == "pictures":
            told.append(event)
            token.cancel()

    with pytest.raises(Cancelled):
        mk.run(path, on_event=listen, cancel=token, sampling=replace(full(path), checks=checks))
    assert len(told) == 1
    assert (path.parent / "out.safetensors").is_file()
    assert not [each for each in path.parent.iterdir() if "samples" in each.name]


def test_models_too_small_to_draw_are_merged_all_the_same(tmp_path_factory, tmp_path):
    story.room(tmp_path_factory, tmp_path, recipe=story.MIX + SAMPLES.replace(', "night", "mix"', ""))
    ran = mk.run(tmp_path / "r.toml", sampling=QUICK)
    assert (tmp_path / "out.safetensors").is_file()
    assert ran.samples is None
    (warning,) = ran.warnings
    assert warning.startswith("no pictures: No UNet can be built of the widths that ")
    with pytest.raises(WrongFormat, match="No UNet can be built"):
        drawn(tmp_path / "base.safetensors")


# --- how it is computed -----------------------------------------------------------------------------------


def test_batches_leave_a_picture_as_it_is(place):
    model = place / "night.safetensors"
    one = [each for seed in (1, 2, 3) for each in drawn(model, seeds=[seed])]
    for batch in (1, 4):
        found = drawn(model, seeds=[1, 2, 3], options=mk.SampleOptions(checks="none", threads=1, batch=batch))
        assert max(np.abs(np.int16(a) - b).max() for a, b in zip(one, found, strict=True)) <= 1


def test_a_picture_has_the_hash_that_the_library_knows(place, tmp_path):
    model = tmp_path / "night.safetensors"
    model.hardlink_to(place / "night.safetensors")
    (unknown,) = mk.sample(model, "a cat", steps=1, seeds=[1], size=[64, 64], options=QUICK).pictures
    assert unknown.model_hash is None
    mk.scan_library([tmp_path], hashes="all", sha256=True)
    (known,) = mk.sample(model, "a cat", steps=1, seeds=[1], size=[64, 64], options=QUICK).pictures
    assert known.model_hash == hashlib.sha256(model.read_bytes()).hexdigest()[:10]
