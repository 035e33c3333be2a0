"""Networks of plans: the same weights give what diffusers' and transformers' own modules give."""

from __future__ import annotations

import gc
import sys
import warnings

import models
import pytest
import torch
from models import recipe

pytest.importorskip("diffusers", exc_type=ImportError)
pytest.importorskip("transformers", exc_type=ImportError)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import diffusers_folders as theirs
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from safetensors.torch import load_file, save_file
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

import mergekit_sd as mk
from mergekit_sd.errors import (
    Cancelled,
    EnvironmentFault,
    MissingTensors,
    RecipeError,
    ShapeMismatch,
    UsageError,
    WrongFormat,
)
from mergekit_sd.events import CancelToken, Noted, Progressed
from mergekit_sd.planning.samples import plan_sampled
from mergekit_sd.sampling import packages, tensors
from mergekit_sd.sampling.networks import load_networks
from mergekit_sd.sampling.tensors import default_dtype, plan_networks

KINDS = {  # what diffusers makes: family, channels of the UNet
    "sd1": ("sd1", 4),
    "sd2": ("sd2", 4),
    "sdxl": ("sdxl", 4),
    "sd1-inpainting": ("sd1", 9),
    "sd1-pix2pix": ("sd1", 8),
}
CLASSES = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}


def made_by_diffusers(folder, kind, seed=0):
    """A folder that diffusers wrote, and the same as one file of ours, float32."""
    family, channels = KINDS[kind]
    torch.manual_seed(seed)
    place = folder / f"{kind}-{seed}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save(place, family, theirs.components(family, channels=channels))
    mk.save(mk.open(place), folder / f"{kind}-{seed}.safetensors", dtype="fp32")
    return place


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    for kind in KINDS:
        made_by_diffusers(folder, kind)
    made_by_diffusers(folder, "sd1", seed=1)
    return folder


def planned(folder, name="m", vae=None, steps=None, outputs=None, **files):
    """A plan of one name of a recipe."""
    files = {key: f"{file}.safetensors" for key, file in files.items()}
    path = recipe(folder, files, steps, outputs or {}, name="sampled.toml")
    return plan_sampled(mk.load(path), [name], vae=vae)[name]


def networks(folder, *args, options=None, **files):
    return load_networks(planned(folder, *args, **files), **{"dtype": "fp32", **(options or {})})


def parts(made):
    named = {"unet": made.unet, "vae": made.vae}
    return named | dict(zip(("text_encoder", "text_encoder_2"), made.text_encoders, strict=False))


def numbers(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outputs_of(name, module):
    """What a component makes of fixed numbers."""
    with torch.no_grad():
        if name == "vae":
            return module.decode(numbers(1, 1, 4, 8, 8)).sample, module.encode(
                numbers(2, 1, 3, 32, 32)
            ).latent_dist.mean
        if name == "unet":
            more = {}
            if module.config.addition_embed_type:
                more = {"added_cond_kwargs": {"text_embeds": numbers(3, 1, theirs.TEXT), "time_ids": torch.ones(1, 6)}}
            context = numbers(4, 1, 7, module.config.cross_attention_dim)
            latents = numbers(5, 1, module.config.in_channels, 16, 16)
            return (module(latents, 501, encoder_hidden_states=context, **more).sample,)
        # The largest id is in front: the small reference pools there, for it knows no end mark. Published ones
        # take the largest id for it, as ours do.
        made = module(torch.tensor([[99, 3, 1, 4, 1, 5, 9]]), output_hidden_states=True)
        return made[0], made.hidden_states[-2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")  # of from_pretrained
def test_modules_compute_what_diffusers_own_do(folder, kind):
    made = networks(folder, m=f"{kind}-0")
    assert (made.architecture, made.family) == (kind, KINDS[kind][0])
    assert set(parts(made)) == {each.name for each in (folder / f"{kind}-0").iterdir()} & set(CLASSES)
    for name, module in parts(made).items():
        reference = CLASSES[name].from_pretrained(folder / f"{kind}-0" / name, local_files_only=True).eval()
        assert type(module) is type(reference)
        mine, own = module.state_dict(), reference.state_dict()
        assert mine.keys() == own.keys()
        assert all(torch.equal(each, own[key]) for key, each in mine.items())
        for ours, wanted in zip(outputs_of(name, module), outputs_of(name, reference), strict=True):
            # Where weights lie in memory decides which of torch's kernels computes: the last bits differ.
            torch.testing.assert_close(ours, wanted, rtol=0, atol=5e-6)


def test_modules_are_ready_to_compute(folder):
    for module in parts(networks(folder, m="sdxl-0")).values():
        assert not module.training
        assert not any(each.requires_grad or each.is_meta for each in module.parameters())
        assert not any(each.is_meta for each in module.buffers())


def test_a_merge_that_is_not_written_is_the_merge_that_is(folder, tmp_path):
    """To the bit, in the output's own dtype, which the networks are then cast from."""
    steps = {"mix": {"op": "weighted_sum", "a": "a", "b": "b", "alpha": 0.3}}
    outputs = {"out": {"model": "mix", "file": "out.safetensors", "dtype": "fp16"}}
    unwritten = networks(folder, "out", a="sd1-0", b="sd1-1", steps=steps, outputs=outputs)
    mk.run(folder / "sampled.toml")
    written = networks(folder, m="out")
    for name, module in parts(written).items():
        other = dict(parts(unwritten)[name].state_dict())
        assert {each.dtype for each in other.values()} == {torch.float32}
        assert all(torch.equal(other[key], tensor) for key, tensor in module.state_dict().items())


def test_a_step_is_not_rounded_and_a_model_is_as_it_is(folder):
    steps = {"mix": {"op": "weighted_sum", "a": "a", "b": "b", "alpha": 0.5}}
    plans = plan_sampled(
        mk.load(recipe(folder, {"a": "sd1-0.safetensors", "b": "sd1-1.safetensors"}, steps, {})), ["a", "mix", "a"]
    )
    assert list(plans) == ["a", "mix"]
    assert [each.name for each in plans["mix"].outputs] == ["mix"]
    of_a, of_mix = (load_networks(plans[name], dtype="fp32").vae.state_dict() for name in ("a", "mix"))
    of_b = networks(folder, m="sd1-1").vae.state_dict()
    for key, tensor in of_mix.items():
        mean = (of_a[key].double() + of_b[key].double()) / 2
        torch.testing.assert_close(tensor.double(), mean, rtol=1e-6, atol=3e-8)


def test_what_is_known_of_a_model_beside_its_networks(folder):
    bare = networks(folder, m="sdxl-0")
    assert (bare.prediction, bare.zero_snr, bare.size) == ("epsilon", False, (1024, 1024))
    assert (bare.device, bare.dtype, dict(bare.nonfinite)) == (torch.device("cpu"), torch.float32, {})
    assert networks(folder, m="sd1-0").size == (512, 512)
    assert networks(folder, m="sd2-0").size == (512, 512)
    marked = load_file(folder / "sdxl-0.safetensors") | {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}
    said = {"modelspec.resolution": "64x96", "modelspec.usage_hint": " say please "}
    save_file(marked, folder / "sdxl-v.safetensors", said)
    made = networks(folder, m="sdxl-v")
    assert (made.prediction, made.zero_snr, made.size) == ("v", True, (64, 96))


@pytest.mark.parametrize(
    ("said", "size"),
    [("768x512", (768, 512)), ("64", (64, 64)), ("100x100", None), ("0x0", None), ("99999x8", None), ("big", None)],
)
def test_a_size_that_a_file_says_counts_where_it_can_be(folder, said, size):
    save_file(load_file(folder / "sd1-0.safetensors"), folder / "says.safetensors", {"modelspec.resolution": said})
    assert networks(folder, m="says").size == (size or (512, 512))


def test_sd2_that_predicts_v_is_made_at_768(folder):
    said = {"modelspec.prediction_type": "v"}
    save_file(load_file(folder / "sd2-0.safetensors"), folder / "sd2-v.safetensors", said)
    made = networks(folder, m="sd2-v")
    assert (made.prediction, made.size) == ("v", (768, 768))
    assert made.unet.config.upcast_attention


# --- another VAE ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["bare", "prefixed", "pickled", "checkpoint"])
@pytest.mark.parametrize("has_its_own", [True, False])
def test_a_vae_from_elsewhere_takes_the_places_of_all(folder, form, has_its_own):
    """Also of an output that bakes one itself, and of a model that has none."""
    whole = load_file(folder / "sd1-1.safetensors")
    bare = {key.removeprefix(models.VAE): each for key, each in whole.items() if key.startswith(models.VAE)}
    vae = folder / f"vae-{form}.{'pt' if form == 'pickled' else 'safetensors'}"
    if form == "pickled":
        torch.save({"state_dict": bare}, vae)
    else:
        save_file(
            {"bare": bare, "prefixed": {models.VAE + key: each for key, each in bare.items()}}.get(form, whole), vae
        )
    mine = load_file(folder / "sd1-0.safetensors")
    if not has_its_own:
        mine = {key: each for key, each in mine.items() if not key.startswith(models.VAE)}
    save_file(mine, folder / "mine.safetensors")
    own = networks(folder, m="sd1-1").vae.state_dict()
    outputs = {"out": {"model": "m", "file": "o.safetensors", "dtype": "fp32"} | ({"vae": "m"} if has_its_own else {})}
    for name in ("m", "out"):
        made = networks(folder, name, vae=vae, m="mine", outputs=outputs)
        assert all(torch.equal(own[key], each) for key, each in made.vae.state_dict().items())


def test_names_for_another_vae_are_free_ones(folder):
    path = recipe(folder, {"vae": "sd1-0.safetensors"}, {}, {}, name="taken.toml")
    made = load_networks(plan_sampled(mk.load(path), ["vae"], vae=folder / "sd1-1.safetensors")["vae"], dtype="fp32")
    assert torch.equal(made.vae.decoder.conv_in.weight, networks(folder, m="sd1-1").vae.decoder.conv_in.weight)
    assert torch.equal(made.unet.conv_in.weight, networks(folder, m="sd1-0").unet.conv_in.weight)


# --- dtypes ---------------------------------------------------------------------------------------------


def test_the_vae_is_never_half(folder, monkeypatch):
    made = networks(folder, m="sd1-0", options={"dtype": "bf16"})
    assert {each.dtype for each in parts(made).values()} == {torch.bfloat16} == {made.dtype}
    monkeypatch.setattr("mergekit_sd.sampling.networks.check_numbers", lambda *_: None)  # no GPU is needed to load
    made = networks(folder, m="sd1-0", options={"dtype": "fp16"})
    assert {name: module.dtype for name, module in parts(made).items()} == {
        "unet": torch.float16,
        "vae": torch.float32,
        "text_encoder": torch.float16,
    }


def test_a_cast_rounds_as_torch_does(folder):
    wide, narrow = (networks(folder, m="sd1-0", options={"dtype": each}).unet for each in ("fp32", "bf16"))
    other = narrow.state_dict()
    assert all(torch.equal(each.bfloat16(), other[key]) for key, each in wide.state_dict().items())


def test_the_dtype_goes_with_device_size_and_processor(folder, monkeypatch):
    small = plan_networks(planned(folder, m="sd1-0"))
    for native in (True, False):
        monkeypatch.setattr(tensors, "has_native_bf16", lambda native=native: native)
        assert default_dtype(small) == "fp32"
        assert default_dtype(small, "cuda") == "fp16"
    monkeypatch.setattr(tensors, "SMALL", 1000)
    assert default_dtype(small) == "fp32"
    monkeypatch.setattr(tensors, "has_native_bf16", lambda: True)
    assert default_dtype(small) == "bf16"


def test_whether_bf16_is_native_is_a_fact_of_this_machine():
    assert tensors.has_native_bf16() in (True, False)


# --- what is told, what is refused ------------------------------------------------------------------------


def test_nan_is_told_with_counts_not_refused(folder):
    broken = load_file(folder / "sd1-0.safetensors")
    broken[models.CONV_IN][0, 0] = float("nan")
    broken[models.VAE + "decoder.conv_in.bias"][3] = float("inf")
    save_file(broken, folder / "nan.safetensors")
    events = []
    wanted = {"unet.conv_in.weight": 9, "vae.decoder.conv_in.bias": 1}
    assert networks(folder, m="nan", options={"on_event": events.append}).nonfinite == wanted
    (told,) = [event.message for event in events if isinstance(event, Noted)]
    assert "NaN or Inf in 2 tensors (10 elements)" in told
    assert networks(folder, m="nan", options={"dtype": "bf16"}).nonfinite == wanted
    steps = {"mix": {"op": "weighted_sum", "a": "a", "b": "b", "alpha": 0.5}}
    assert networks(folder, "mix", a="sd1-1", b="nan", steps=steps).nonfinite == wanted


def test_values_that_an_outputs_dtype_cannot_hold_are_told(folder):
    large = load_file(folder / "sd1-0.safetensors")
    large[models.CONV_IN][0, 0] = 1e5
    save_file(large, folder / "large.safetensors")
    outputs = {"out": {"model": "m", "file": "o.safetensors", "dtype": "fp16"}}
    assert networks(folder, "out", m="large", outputs=outputs).nonfinite == {"unet.conv_in.weight": 9}
    assert networks(folder, "m", m="large", outputs=outputs).nonfinite == {}


@pytest.mark.parametrize(
    ("left_out", "message", "hint"),
    [
        ((models.VAE,), "has no VAE", "--vae"),
        (("cond_stage_model.",), "has no text encoder", "whole model"),
        ((models.VAE, "cond_stage_model."), "has no VAE and text encoder|has no VAE, text encoder", "whole model"),
    ],
)
def test_a_model_that_lacks_a_component_is_refused(folder, left_out, message, hint):
    whole = load_file(folder / "sd1-0.safetensors")
    save_file({key: each for key, each in whole.items() if not key.startswith(left_out)}, folder / "part.safetensors")
    with pytest.raises(MissingTensors, match=message) as caught:
        networks(folder, m="part")
    assert hint in caught.value.hint


def test_a_tensor_that_lacks_is_named(folder):
    whole = load_file(folder / "sd1-0.safetensors")
    del whole[models.UNET + "middle_block.1.proj_out.bias"]
    save_file(whole, folder / "gap.safetensors")
    with pytest.raises(MissingTensors, match='UNet of "m" lacks 1 tensor') as caught:
        networks(folder, m="gap")
    assert caught.value.details == ("mid_block.attentions.0.proj_out.bias",)


def test_a_tensor_of_another_shape_is_named(folder):
    whole = load_file(folder / "sd1-0.safetensors")
    whole[models.UNET + "middle_block.1.proj_out.bias"] = torch.zeros(5)
    save_file(whole, folder / "odd.safetensors")
    with pytest.raises(ShapeMismatch) as caught:
        networks(folder, m="odd")
    assert caught.value.key == "mid_block.attentions.0.proj_out.bias"


def test_what_is_no_checkpoint_is_refused(folder):
    save_file({"lora_unet_x.lora_up.weight": torch.zeros(2, 2)}, folder / "other.safetensors")
    with pytest.raises(WrongFormat, match="cannot be sampled"):
        networks(folder, m="other")


def test_names_that_make_no_pictures_are_refused(folder):
    files = {"a": "sd1-0.safetensors", "b": "sd1-1.safetensors"}
    steps = {"difference": {"op": "subtract", "a": "a", "b": "b"}}
    loaded = mk.load(recipe(folder, files, steps, {}, name="names.toml"))
    with pytest.raises(RecipeError, match="a difference of models, which makes no pictures"):
        plan_sampled(loaded, ["difference"])
    with pytest.raises(RecipeError, match='no model, step or output "diference"') as caught:
        plan_sampled(loaded, ["diference"])
    assert "difference" in caught.value.hint


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtype": "fp16"}, UsageError, "CPU"),
        ({"dtype": "fp8_e5m2"}, UsageError, "no dtype to sample in"),
        ({"device": "tpu"}, UsageError, "no device to sample on"),
    ],
)
def test_numbers_that_cannot_be_sampled_in_are_refused(folder, options, error, message):
    with pytest.raises(error, match=message):
        networks(folder, m="sd1-0", options=options)


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_refused(folder, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(EnvironmentFault, match="no device"):
        networks(folder, m="sd1-0", options={"device": device})


@pytest.mark.parametrize("package", ["diffusers", "transformers", "openai-clip", "Pillow"])
def test_without_the_packages_one_sentence_says_what_to_install(folder, package, monkeypatch):
    there = packages._is_there
    monkeypatch.setattr(packages, "_is_there", lambda name, module: name != package and there(name, module))
    packages.need_packages.cache_clear()
    try:
        with pytest.raises(EnvironmentFault, match=package) as caught:
            networks(folder, m="sd1-0")
    finally:
        packages.need_packages.cache_clear()
    assert "pip install 'mergekit-sd[sample]'" in caught.value.message
    assert caught.value.exit_code == 4


def test_a_package_that_cannot_be_imported_is_missing(monkeypatch):
    assert packages._is_there("diffusers", "diffusers")
    assert not packages._is_there("no-such-package", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    assert not packages._is_there("Pillow", "PIL.Image")


# --- on the way -------------------------------------------------------------------------------------------


def test_progress_is_one_for_all_components(folder):
    events = []
    networks(folder, m="sdxl-0", options={"on_event": events.append})
    told = [event for event in events if isinstance(event, Progressed)]
    total = plan_networks(planned(folder, m="sdxl-0")).bytes
    assert {(event.output, event.bytes) for event in told} == {("m", total)}
    assert [event.done for event in told] == sorted(event.done for event in told)
    assert told[-1].done == total


def test_it_can_be_cancelled(folder):
    token = CancelToken()
    token.cancel()
    with pytest.raises(Cancelled):
        networks(folder, m="sd1-0", options={"cancel": token})


def test_nothing_is_written(folder):
    before = sorted(folder.rglob("*"))
    plan = planned(folder, m="sd1-0")
    load_networks(plan, dtype="fp32")
    assert sorted({*folder.rglob("*")} - {folder / "sampled.toml"}) == [p for p in before if p.name != "sampled.toml"]


def test_networks_share_their_memory_with_what_was_computed(folder):
    """One buffer for each component: no second copy of the weights stays behind."""
    made = networks(folder, m="sd1-0")
    gc.collect()
    for module in parts(made).values():
        stores = {each.untyped_storage().data_ptr() for each in module.parameters()}
        assert len(stores) == 1
