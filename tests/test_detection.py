"""Telling files apart by names and ranks: each kind, each variant, and what must stay unknown."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_sd import architectures
from mergekit_sd.architectures import Role, detect, ema_name, is_ema, prediction_hint
from mergekit_sd.formats.dtypes import F16
from mergekit_sd.formats.tensor import TensorInfo

UNET = "model.diffusion_model."
VAE = "first_stage_model."
CLIP = "cond_stage_model.transformer."
NOVELAI = ("embeddings.", "encoder.", "final_layer_norm.")


def header(shapes):
    """A header of these names and shapes; a list of names stands for tensors of rank 2."""
    if not isinstance(shapes, dict):
        shapes = dict.fromkeys(shapes, (2, 2))
    return {name: TensorInfo(name, F16, tuple(shape), 0, 2) for name, shape in shapes.items()}


def full(name):
    return {key: spec.shape for key, spec in architectures.get(name).tensors.items()}


def component(name, wanted, *, bare):
    architecture = architectures.get(name)
    prefix = architecture.components[wanted] if bare else ""
    return {
        key.removeprefix(prefix): spec.shape for key, spec in architecture.tensors.items() if spec.component == wanted
    }


def small(shapes, *, layers=32):
    """The same layout in little: no size above 16, few text layers."""
    return {
        key: tuple(min(size, 16) for size in shape)
        for key, shape in shapes.items()
        if not any(f"{stack}.{i}." in key for stack in ("encoder.layers", "resblocks") for i in range(layers, 32))
    }


def roles(layout):
    return Counter(place.role for place in layout.places.values())


# --- whole checkpoints ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", architectures.names())
@pytest.mark.parametrize("shape", [lambda s: s, small, lambda s: small(s, layers=2)], ids=["full", "small", "few"])
def test_checkpoint(name, shape):
    shapes = shape(full(name))
    layout = detect(header(shapes))
    assert layout.kind == "checkpoint"
    assert layout.architecture is architectures.get(name)
    assert dict(layout.canonical) == {key: key for key in shapes}
    assert set(layout.places) == set(shapes)
    assert set(roles(layout)) <= {Role.weight, Role.schedule, Role.position_ids}
    for key, place in layout.places.items():
        spec = layout.architecture.tensors[key]
        assert (place.component, place.block) == (spec.component, spec.block)


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_position_ids_may_be_missing(name):
    shapes = full(name)
    position_ids = architectures.get(name).position_ids
    assert detect(header(shapes)).places[position_ids].role == Role.position_ids
    del shapes[position_ids]
    layout = detect(header(shapes))
    assert (layout.kind, layout.architecture.name) == ("checkpoint", name)


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "sdxl-refiner"])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), share=st.floats(0.95, 1), extra=st.integers(0, 40))
def test_dropped_and_added_names_do_not_change_the_family(name, seed, share, extra):
    shapes = full(name)
    # Drawn by a seed: a sample of thousands of names is more than hypothesis draws itself.
    random = Random(seed)
    kept = random.sample(sorted(shapes), int(len(shapes) * share))
    added = {f"{random.choice(['', UNET, VAE])}extra.{i}": (3,) for i in range(extra)}
    layout = detect(header({key: shapes[key] for key in kept} | added))
    assert (layout.kind, layout.architecture.family) == ("checkpoint", name)
    assert roles(layout)[Role.junk] == len(added)


def test_without_the_first_convolution_it_is_the_plain_variant():
    shapes = full("sd1-inpainting")
    del shapes[UNET + "input_blocks.0.0.weight"]
    assert detect(header(shapes)).architecture.name == "sd1"


def test_two_of_three_components_are_a_checkpoint():
    shapes = {key: shape for key, shape in full("sd1").items() if not key.startswith(VAE)}
    layout = detect(header(shapes))
    assert layout.kind == "checkpoint"
    assert layout.prefix_of("vae") is None
    assert layout.prefix_of("unet") == UNET
    assert layout.prefix_of("text_encoder") == CLIP


# --- roles ----------------------------------------------------------------------------------------


def test_roles_of_what_is_no_weight():
    unet = [key for key in full("sd1") if key.startswith(UNET)]
    ema = [ema_name(key) for key in unet] + ["model_ema.decay", "model_ema.num_updates"]
    junk = [
        "cond_stage_model.transformer.text_projection.weight",
        "cond_stage_model.logit_scale",
        UNET + "input_blocks.1.9.x",
    ]
    markers = ["v_pred", "ztsnr", "edm_mean", "edm_std", "edm_vpred.sigma_max"]
    extra = dict.fromkeys([*ema, *junk, *markers, "logvar"], (1,))
    layout = detect(header(full("sd1") | extra))
    assert layout.architecture.name == "sd1"
    by_role = {role: {key for key in layout.places if layout.places[key].role == role} for role in Role}
    assert by_role[Role.ema] == set(ema)
    assert by_role[Role.junk] == set(junk)
    assert by_role[Role.marker] == set(markers)
    assert len(by_role[Role.schedule]) == 13
    assert len(by_role[Role.weight]) == 1130
    assert not by_role[Role.unknown]


def test_schedule_buffers_are_no_junk_in_sdxl():
    layout = detect(header(full("sdxl") | {"betas": (1000,), "logvar": (1000,)}))
    assert layout.places["betas"].role == layout.places["logvar"].role == Role.schedule


def test_depth_model_is_a_component_of_its_own():
    midas = {"depth_model.model.pretrained.model.cls_token": (1, 1, 768)}
    layout = detect(header(full("sd2-depth") | midas))
    place = layout.places["depth_model.model.pretrained.model.cls_token"]
    assert (place.component, place.role) == ("depth_model", Role.weight)
    assert layout.prefix_of("depth_model") == "depth_model."
    other = detect(header(full("sd2") | midas))
    assert other.places["depth_model.model.pretrained.model.cls_token"].role == Role.junk


def test_ema_names():
    assert ema_name(UNET + "input_blocks.0.0.weight") == "model_ema.diffusion_modelinput_blocks00weight"
    assert is_ema("model_ema.decay")
    assert not is_ema(UNET + "input_blocks.0.0.weight")


# --- NovelAI's names -------------------------------------------------------------------------------


def novelai(shapes):
    return {
        key.replace("text_model.", "") if key.startswith(CLIP + "text_model.") else key: shape
        for key, shape in shapes.items()
    }


def test_novelai_prefixes():
    stored = novelai(full("sd1"))
    layout = detect(header(stored))
    assert sum(key.startswith(tuple(CLIP + start for start in NOVELAI)) for key in stored) == 197
    assert set(layout.canonical) == set(stored)
    assert set(layout.canonical.values()) == set(layout.places) == set(full("sd1"))
    assert roles(layout)[Role.junk] == 0
    assert layout.prefix_of("text_encoder") == CLIP


def test_novelai_name_beside_the_real_one_is_junk():
    both = full("sd1") | {CLIP + "embeddings.position_ids": (1, 77)}
    layout = detect(header(both))
    assert layout.canonical[CLIP + "embeddings.position_ids"] == CLIP + "embeddings.position_ids"
    assert layout.places[CLIP + "embeddings.position_ids"].role == Role.junk
    assert len(set(layout.canonical.values())) == len(both)


# --- one component --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", architectures.names())
@pytest.mark.parametrize("bare", [False, True], ids=["prefixed", "bare"])
def test_unet_alone(name, bare):
    layout = detect(header(component(name, "unet", bare=bare)))
    assert (layout.kind, layout.architecture.name) == ("unet", name)
    assert layout.prefix_of("unet") == ("" if bare else UNET)
    assert layout.prefix_of("vae") is None
    start = "" if bare else UNET
    last = layout.architecture.blocks[-1]
    assert layout.places[start + "out.2.weight"] == architectures.Place("unet", last, Role.weight)
    assert layout.places[start + "time_embed.0.weight"].block == "IN00"
    assert set(roles(layout)) == {Role.weight}


def test_bare_unet_with_its_ema():
    unet = component("sd1", "unet", bare=True)
    ema = {ema_name(UNET + key): shape for key, shape in unet.items()}
    layout = detect(header(unet | ema))
    assert (layout.kind, layout.architecture.name) == ("unet", "sd1")
    assert roles(layout) == {Role.weight: 686, Role.ema: 686}


@pytest.mark.parametrize("bare", [False, True], ids=["prefixed", "bare"])
@pytest.mark.parametrize("shape", [lambda s: s, small], ids=["full", "small"])
def test_vae_alone(bare, shape):
    vae = shape(component("sd1", "vae", bare=bare))
    layout = detect(header(vae))
    assert (layout.kind, layout.architecture) == ("vae", None)
    assert layout.prefix_of("vae") == ("" if bare else VAE)
    assert {place.component for place in layout.places.values()} == {"vae"}
    assert layout.prediction is None


def test_vae_with_what_training_left():
    vae = component("sd1", "vae", bare=True)
    left = {"model_ema.decay": (), "model_ema.num_updates": (), **{f"loss.discriminator.{i}": (1,) for i in range(90)}}
    layout = detect(header(vae | left | {"odd": (1,)}))
    assert layout.kind == "vae"
    assert roles(layout) == {Role.weight: 248, Role.ema: 2, Role.unknown: 91}


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("sd1", "text_encoder"),
        ("sd2", "text_encoder"),
        ("sdxl", "text_encoder"),
        ("sdxl", "text_encoder_2"),
        ("sdxl-refiner", "text_encoder_2"),
    ],
)
@pytest.mark.parametrize("bare", [False, True], ids=["prefixed", "bare"])
def test_text_encoder_alone(name, wanted, bare):
    shapes = component(name, wanted, bare=bare)
    layout = detect(header(shapes))
    assert (layout.kind, layout.architecture) == ("text_encoder", None)
    assert layout.prefix_of(wanted) == ("" if bare else architectures.get(name).components[wanted])
    assert {place.component for place in layout.places.values()} == {wanted}
    assert roles(layout)[Role.unknown] == 0
    assert roles(layout)[Role.position_ids] == sum(key.endswith("position_ids") for key in shapes)
    assert detect(header(small(shapes, layers=2))).kind == "text_encoder"


def test_both_text_encoders_of_sdxl():
    both = component("sdxl", "text_encoder", bare=False) | component("sdxl", "text_encoder_2", bare=False)
    layout = detect(header(both))
    assert layout.kind == "text_encoder"
    assert {place.component for place in layout.places.values()} == {"text_encoder", "text_encoder_2"}


# --- what must stay unknown ------------------------------------------------------------------------


def assert_unknown(shapes):
    layout = detect(header(shapes))
    assert (layout.kind, layout.architecture) == ("unknown", None)
    # What a name says by itself holds in any layout; nothing is junk, nothing a component's weight.
    assert set(roles(layout)) <= {Role.unknown, Role.schedule, Role.position_ids, Role.marker, Role.ema}
    assert {place.component for place in layout.places.values()} <= {None}


def test_empty_file():
    assert_unknown({})


def test_unknown_names():
    assert_unknown({f"transformer.h.{i}.attn.weight": (4, 4) for i in range(500)})


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "sdxl-refiner"])
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.85])
def test_checkpoint_with_a_broken_unet_is_not_its_vae(name, kept):
    shapes = full(name)
    unet = [key for key in shapes if key.startswith(UNET)]
    assert_unknown({key: shape for key, shape in shapes.items() if key not in set(unet[int(kept * len(unet)) :])})


@pytest.mark.parametrize("channels", [1, 7, 16])
def test_unknown_input_channels_are_no_variant(channels):
    assert_unknown(full("sd1") | {UNET + "input_blocks.0.0.weight": (320, channels, 3, 3)})


def test_video_model_with_all_of_sd2s_names():
    time = {key.replace(".transformer_blocks.", ".time_stack."): shape for key, shape in full("sd2").items()}
    assert_unknown(time | full("sd2"))


def test_unclip_is_not_sd2():
    assert_unknown(full("sd2") | {UNET + "label_emb.0.0.weight": (1280, 2048)})


def test_vae_of_another_family():
    vae = component("sd1", "vae", bare=True)
    assert_unknown(vae | {"decoder.conv_in.weight": (512, 16, 3, 3)})


def test_ranks_that_no_family_has():
    assert_unknown({key: (*shape, 1) for key, shape in full("sd1").items()})


def test_vae_beside_a_foreign_unet():
    foreign = {f"{UNET}double_blocks.{i}.img_attn.qkv.weight": (8, 8) for i in range(10)}
    assert_unknown(component("sd1", "vae", bare=False) | foreign)


@settings(max_examples=60, deadline=None)
@given(names=st.lists(st.text(max_size=30), max_size=20, unique=True), rank=st.integers(0, 5))
def test_any_names_at_all(names, rank):
    layout = detect(header(dict.fromkeys(names, (2,) * rank)))
    assert set(layout.canonical) == set(names)
    assert layout.architecture is None


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), share=st.floats(0, 1))
def test_part_of_sdxl_is_never_taken_for_a_vae(seed, share):
    shapes = full("sdxl")
    kept = Random(seed).sample(sorted(shapes), int(len(shapes) * share))
    assert detect(header({key: shapes[key] for key in kept})).kind in {"checkpoint", "unknown"}


# --- adapters and the like -------------------------------------------------------------------------

MODULES = ["down_blocks_0_attentions_0_proj_in", "mid_block_attentions_0_proj_out"]


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("lora", [f"lora_unet_{m}.{p}" for m in MODULES for p in ("lora_up.weight", "lora_down.weight", "alpha")]),
        ("lora", [f"lora_te1_{m}.{p}" for m in MODULES for p in ("lora_up.weight", "lora_mid.weight", "dora_scale")]),
        ("lora", [f"unet.down.{m}.lora_{p}.weight" for m in MODULES for p in "AB"]),
        ("lora", [f"base_model.model.{m}.lora_{p}.default.weight" for m in MODULES for p in "AB"]),
        ("lora", [f"unet.{m}.lora.{p}.weight" for m in MODULES for p in ("down", "up")]),
        ("lora", [f"{m}.attn1.processor.to_q_lora.{p}.weight" for m in MODULES for p in ("down", "up")]),
        ("lora", [f"text_encoder.{m}.lora_linear_layer.{p}.weight" for m in MODULES for p in ("down", "up")]),
        ("lora", ["diffusion_model.out.2.lora_up.weight", "diffusion_model.out.2.lora_down.weight"]),
        ("lycoris", [f"lora_unet_{m}.hada_{p}" for m in MODULES for p in ("w1_a", "w1_b", "w2_a", "w2_b")]),
        ("lycoris", [f"lora_unet_{m}.{p}" for m in MODULES for p in ("lokr_w1", "lokr_w2_a", "lokr_w2_b", "alpha")]),
        ("lycoris", [f"oft_unet_{m}.oft_blocks" for m in MODULES]),
        ("lycoris", [f"lycoris_{m}.{p}" for m in MODULES for p in ("oft_diag", "alpha")]),
        ("lycoris", [f"lora_unet_{m}.{p}" for m in MODULES for p in ("weight", "on_input")]),
        ("lycoris", [f"lora_unet_{m}.{p}.weight" for m in MODULES for p in ("a1", "a2", "b1", "b2")]),
        ("lycoris", [f"lora_unet_{m}.{p}" for m in MODULES for p in ("diff", "diff_b")]),
        ("embedding", ["emb_params"]),
        ("embedding", ["clip_g", "clip_l"]),
        ("embedding", ["string_to_param.*"]),
        ("unknown", ["clip_g", "clip_l", "other"]),
        ("hypernetwork", [f"{w}.{i}.linear.0.{p}" for w in (320, 768) for i in (0, 1) for p in ("weight", "bias")]),
        ("controlnet", ["control_model.time_embed.0.weight", "control_model.zero_convs.0.0.weight"]),
        ("controlnet", ["time_embed.0.weight", "zero_convs.0.0.weight", "input_hint_block.0.weight"]),
        ("controlnet", ["conv_in.weight", "controlnet_cond_embedding.conv_in.weight"]),
    ],
)
def test_kinds_without_components(kind, names):
    layout = detect(header(names))
    assert (layout.kind, layout.architecture, layout.prediction) == (kind, None, None)
    assert set(roles(layout)) == {Role.unknown}


def test_whole_controlnet_file():
    copy = {
        key.replace(UNET, "control_model."): shape
        for key, shape in full("sd1").items()
        if key.startswith((UNET + "input_blocks.", UNET + "middle_block."))
    }
    assert detect(header(full("sd1") | copy)).kind == "controlnet"


def test_some_stray_adapter_names_make_no_adapter():
    stray = dict.fromkeys([f"lora_unet_x{i}.lora_up.weight" for i in range(20)], (4, 4))
    layout = detect(header(full("sd1") | stray | {"control_model.x": (1,)}))
    assert layout.kind == "checkpoint"
    assert roles(layout)[Role.junk] == 21


# --- prediction -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "marker", "expected"),
    [
        ("sd1", None, "epsilon"),
        ("sd2", None, None),
        ("sdxl", None, "epsilon"),
        ("sdxl", "v_pred", "v"),
        ("sdxl", "ztsnr", "epsilon"),
        ("sdxl-pix2pix", "edm_vpred.sigma_max", "v"),
        ("sdxl", "edm_mean", None),
    ],
)
def test_prediction(name, marker, expected):
    shapes = full(name) | ({marker: (0,)} if marker else {})
    assert prediction_hint(header(shapes)) == expected


def test_names_that_speak_for_themselves_are_known_in_any_layout():
    names = {
        "text.embeddings.position_ids": Role.position_ids,
        "betas": Role.schedule,
        "v_pred": Role.marker,
        "model_ema.decay": Role.ema,
        "some.weight": Role.unknown,
    }
    layout = detect(header(dict.fromkeys(names, (3,))))
    assert {name: place.role for name, place in layout.places.items()} == names
