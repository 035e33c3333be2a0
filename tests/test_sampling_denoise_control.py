"""ControlNets: diffusers' pipeline is the reference; files of either spelling give the same network."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
import diffusers
from safetensors.torch import save_file
from sampling_networks import SIZE, condition, constant, networks, pipeline_latents, scheduler

from mergekit_sd.errors import FamilyMismatch, UsageError, WrongFormat
from mergekit_sd.formats.diffusers.names import to_ldm
from mergekit_sd.sampling.control import Control, load_control
from mergekit_sd.sampling.denoise import _summed, denoise
from mergekit_sd.sampling.values import Settings

STEPS = 4
ASKED = Settings("", steps=STEPS, cfg=5.0, sampler="euler")
PICTURE = np.random.default_rng(0).integers(0, 256, (SIZE[1], SIZE[0], 3), np.uint8)


def net(made, seed: int = 0) -> diffusers.ControlNetModel:
    """A ControlNet that does something: new ones begin at zero."""
    torch.manual_seed(seed)
    made = diffusers.ControlNetModel.from_unet(made.unet).eval().requires_grad_(False)
    for name, parameter in made.named_parameters():
        if "controlnet_" in name:
            parameter.normal_(std=0.2)
    return made


def ldm_names(names) -> dict[str, str]:
    """Diffusers' names to those of lllyasviel's files, written down from the published ones."""
    found = {name: twin.name for name, twin in to_ldm("unet", [*names]).items()}
    hints = ["conv_in", *(f"blocks.{i}" for i in range(6)), "conv_out"]
    for name in names:
        for leaf in ("weight", "bias"):
            for i, hint in enumerate(hints):
                if name == f"controlnet_cond_embedding.{hint}.{leaf}":
                    found[name] = f"input_hint_block.{2 * i}.{leaf}"
            for i in range(12):
                if name == f"controlnet_down_blocks.{i}.{leaf}":
                    found[name] = f"zero_convs.{i}.0.{leaf}"
            if name == f"controlnet_mid_block.{leaf}":
                found[name] = f"middle_block_out.0.{leaf}"
    return found


@pytest.fixture(scope="module")
def made():
    return networks("sd1")


@pytest.fixture(scope="module")
def sdxl():
    return networks("sdxl")


def run(made, control, seeds=(1, 2), **changes):
    guidance = constant(condition(made, 1), condition(made, 2))
    return denoise(made, guidance, settings=replace(ASKED, **changes), seeds=seeds, size=SIZE, control=control)


def same(ours, theirs) -> bool:
    return bool((ours - theirs).abs().max() <= 1e-5 * max(1, theirs.abs().max()))


@pytest.mark.parametrize(("weight", "start", "end"), [(1.0, 0.0, 1.0), (0.6, 0.25, 0.8)])
def test_a_controlnet_steers_as_diffusers_lets_it(made, weight, start, end):
    from PIL import Image

    steering = net(made)
    picture = PICTURE if weight == 1 else np.random.default_rng(1).integers(0, 256, (48, 40, 3), np.uint8)
    theirs = pipeline_latents(
        made,
        scheduler("EulerDiscreteScheduler", timestep_spacing="linspace"),
        condition(made, 1),
        condition(made, 2),
        steps=STEPS,
        cfg=5.0,
        seeds=(1, 2),
        controlnet=steering,
        image=Image.fromarray(picture),
        controlnet_conditioning_scale=weight,
        control_guidance_start=start,
        control_guidance_end=end,
    )
    ours = run(made, [Control(steering, picture, weight, start, end)])
    assert same(ours, theirs)
    assert not same(ours, run(made, []))


def test_several_add_up(made):
    first, second = (Control(net(made, seed), PICTURE, weight) for seed, weight in ((1, 0.5), (2, 0.25)))
    beyond = Control(net(made), PICTURE, 1.0, 0.9, 0.95)  # no whole step lies within
    latents, seen = torch.randn(1, 4, 4, 8), condition(made, 1)
    timestep = torch.tensor(500)
    down, middle = first.residuals(latents, timestep, seen, 0, 1)
    other_down, other_middle = second.residuals(latents, timestep, seen, 0, 1)
    summed = _summed(each.residuals(latents, timestep, seen, 0, 1) for each in (first, beyond, second))
    assert torch.equal(summed[1], middle + other_middle)
    assert all(torch.equal(s, a + b) for s, a, b in zip(summed[0], down, other_down, strict=True))


def test_sdxl_is_steered_too(sdxl):
    assert not same(run(sdxl, [Control(net(sdxl), PICTURE)], steps=1), run(sdxl, [], steps=1))


@pytest.mark.parametrize("window", [(0.5, 0.5), (-0.1, 1), (0, 1.1), (0.8, 0.2)])
def test_windows_that_cannot_be_are_refused(made, window):
    with pytest.raises(UsageError, match="cannot steer from"):
        Control(net(made), PICTURE, 1.0, *window)


@pytest.mark.parametrize(
    ("family", "spelling"),
    [("sd1", "ldm"), ("sd1", "ldm with prefix"), ("sd1", "diffusers"), ("sd1", "folder"), ("sdxl", "ldm")],
)
def test_files_of_either_spelling_are_read(made, sdxl, family, spelling, tmp_path):
    made = {"sd1": made, "sdxl": sdxl}[family]
    steering = net(made)
    path = tmp_path / "control.safetensors"
    tensors = steering.state_dict()
    if spelling == "folder":
        steering.save_pretrained(tmp_path)
        path = tmp_path
    else:
        names = ldm_names(tensors) if spelling.startswith("ldm") else {name: name for name in tensors}
        assert len(names) == len(tensors)
        prefix = "control_model." if spelling == "ldm with prefix" else ""
        save_file({prefix + names[name]: tensor.clone() for name, tensor in tensors.items()}, path)
    found = load_control(path, made)
    assert {*found.state_dict()} == {*tensors}
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in tensors.items())


def test_one_of_another_family_is_refused(made, sdxl, tmp_path):
    path = tmp_path / "control.safetensors"
    save_file(net(sdxl).state_dict(), path)
    with pytest.raises(FamilyMismatch, match=r"does not fit the model \(sd1\)") as refused:
        load_control(path, made)
    assert refused.value.details


def test_names_that_no_controlnet_has_are_refused(made, tmp_path):
    path = tmp_path / "control.safetensors"
    tensors = net(made).state_dict()
    names = ldm_names(tensors)
    more = {"input_hint_block.x.weight": torch.zeros(1), "input_hint_block.99.weight": torch.zeros(1)}
    save_file({**{names[name]: tensor.clone() for name, tensor in tensors.items()}, **more}, path)
    with pytest.raises(FamilyMismatch, match="does not fit") as refused:
        load_control(path, made)
    assert len(refused.value.details) == 2


def test_what_is_no_controlnet_is_refused(made, tmp_path):
    path = tmp_path / "unet.safetensors"
    save_file({"conv_in.weight": torch.zeros(32, 4, 3, 3)}, path)
    with pytest.raises(WrongFormat, match="is no ControlNet"):
        load_control(path, made)
    save_file({"lllite_unet_input_blocks_4_1.cond_emb.weight": torch.zeros(4, 4)}, path)
    with pytest.raises(WrongFormat, match="kind lllite"):
        load_control(path, made)


def test_an_inpainting_unet_takes_a_plain_controlnet(tmp_path):
    path = tmp_path / "control.safetensors"
    save_file({name: tensor.clone() for name, tensor in net(networks("sd1")).state_dict().items()}, path)
    made = networks("sd1", channels=9)
    assert run(made, [Control(load_control(path, made), PICTURE)], steps=1).isfinite().all()
