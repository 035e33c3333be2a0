"""The denoising loop: diffusers' own pipelines are the reference, and direct computations of guidance."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("diffusers")
from sampling_networks import SIZE, condition, constant, networks, pipeline_latents, scheduler

from mergekit_sd.errors import Cancelled, UsageError, WrongFormat
from mergekit_sd.events import CancelToken
from mergekit_sd.recipe.samplers import SAMPLERS
from mergekit_sd.sampling.conditions import Condition, Guidance
from mergekit_sd.sampling.denoise import denoise, guided
from mergekit_sd.sampling.noise import first_noise, generators
from mergekit_sd.sampling.schedulers import schedule
from mergekit_sd.sampling.values import Settings

# What each sampler is in diffusers, told a second time: the table must not drift unseen.
LINSPACE = {"timestep_spacing": "linspace"}
KARRAS = {"use_karras_sigmas": True}
SDE = {"algorithm_type": "sde-dpmsolver++"}
BY_HAND = {
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", KARRAS),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", SDE),
    "dpmpp_2m_sde_karras": ("DPMSolverMultistepScheduler", SDE | KARRAS),
    "euler": ("EulerDiscreteScheduler", LINSPACE),
    "euler_a": ("EulerAncestralDiscreteScheduler", LINSPACE),
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "heun": ("HeunDiscreteScheduler", LINSPACE),
}
NO_ZERO_SNR = ["heun"]
STEPS = 3


@pytest.fixture(scope="module")
def models():
    """Networks by family and prediction, made once."""
    made = {}

    def get(family: str, prediction: str = "epsilon", **options):
        key = (family, prediction, *options.items())
        if key not in made:
            made[key] = networks(family, prediction, **options)
        return made[key]

    return get


def asked(**changes) -> Settings:
    return replace(Settings("", steps=STEPS, cfg=5.0, sampler="euler"), **changes)


def run(made, guidance=None, *, seeds=(1, 2), size=SIZE, batch=8, control=(), on_step=None, cancel=None, **changes):
    guidance = guidance or constant(condition(made, 1), condition(made, 2))
    return denoise(
        made,
        guidance,
        settings=asked(**changes),
        seeds=seeds,
        size=size,
        batch=batch,
        control=control,
        on_step=on_step,
        cancel=cancel,
    )


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """To 1e-5 of the largest: latents of random networks under guidance grow."""
    return ours.dtype == torch.float32 and bool((ours - theirs).abs().max() <= 1e-5 * max(1, theirs.abs().max()))


class Counting:
    """Stands in a UNet's place and keeps what it was asked."""

    def __init__(self, made):
        self.unet, self.inputs, self.rows = made.unet, [], []
        self.config = made.unet.config

    def __call__(self, inputs, *rest, **more):
        self.inputs.append(inputs)
        self.rows.append(len(inputs))
        return self.unet(inputs, *rest, **more)


def counted(made):
    unet = Counting(made)
    return unet, replace(made, unet=unet)


# --- against diffusers' pipelines ----------------------------------------------------------------


def test_every_sampler_is_told_by_hand():
    assert set(BY_HAND) == set(SAMPLERS)


@pytest.mark.parametrize("sampler", BY_HAND)
def test_sd1_is_as_diffusers_makes_it(models, sampler):
    made = models("sd1")
    positive, negative = condition(made, 1), condition(made, 2)
    theirs = pipeline_latents(
        made,
        scheduler(BY_HAND[sampler][0], **BY_HAND[sampler][1]),
        positive,
        negative,
        steps=STEPS,
        cfg=5.0,
        seeds=(1, 2),
    )
    assert same(run(made, constant(positive, negative), sampler=sampler), theirs)


@pytest.mark.parametrize("sampler", ["dpmpp_2m_karras", "euler_a", "ddim", "heun"])
def test_a_model_that_predicts_v_is_as_diffusers_makes_it(models, sampler):
    made = models("sd2", "v")
    positive, negative = condition(made, 1), condition(made, 2)
    scheduling = scheduler(BY_HAND[sampler][0], "v", **BY_HAND[sampler][1])
    theirs = pipeline_latents(made, scheduling, positive, negative, steps=STEPS, cfg=5.0, seeds=(1, 2))
    assert same(run(made, constant(positive, negative), sampler=sampler), theirs)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_sdxl_is_as_diffusers_makes_it(models, zero_snr):
    prediction = "v" if zero_snr else "epsilon"
    made = models("sdxl", prediction, zero_snr=zero_snr)
    positive, negative = condition(made, 1), condition(made, 2)
    more = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if zero_snr else LINSPACE
    scheduling = scheduler("EulerDiscreteScheduler", prediction, **more)
    theirs = pipeline_latents(
        made, scheduling, positive, negative, steps=STEPS, cfg=5.0, seeds=(1, 2), guidance_rescale=0.7
    )
    assert same(run(made, constant(positive, negative), cfg_rescale=0.7), theirs)


# --- schedules and noise -------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name not in NO_ZERO_SNR])
def test_zero_snr_begins_at_pure_noise(sampler):
    plan = schedule(sampler, 4, "v", zero_snr=True)
    assert plan.evaluations[0] == 999
    # Nothing of the picture is left (all but LCM and DDIM keep 2^-24 of it, so that sigma is finite).
    latents, prediction = torch.ones(1), torch.full((1,), 0.25)
    assert plan.clean(prediction, plan.evaluations[0], latents).item() == pytest.approx(-0.25, abs=3e-4)


def test_the_first_sigma_of_zero_snr_is_that_of_two_to_the_minus_24():
    plan = schedule("euler", 4, "v", zero_snr=True)
    assert plan.first_sigma == pytest.approx(np.sqrt((1 - 2**-24) / 2**-24), rel=1e-5)
    assert schedule("euler", 4, "v").first_sigma == pytest.approx(14.6146, rel=1e-5)  # k-diffusion's


@pytest.mark.parametrize("sampler", NO_ZERO_SNR)
def test_a_sampler_that_cannot_begin_at_pure_noise_is_refused(sampler):
    with pytest.raises(UsageError, match=r"cannot begin at pure noise"):
        schedule(sampler, 4, "v", zero_snr=True)


def test_zero_snr_with_epsilon_is_refused():
    with pytest.raises(UsageError, match="pure noise tells it nothing"):
        schedule("euler", 4, "epsilon", zero_snr=True)


@pytest.mark.parametrize(("sampler", "steps"), [("lcm", 51), ("euler", 0), ("ddim", 1001)])
def test_steps_that_cannot_be_made_are_refused(sampler, steps):
    with pytest.raises(UsageError, match=f"{sampler} cannot make {steps} steps"):
        schedule(sampler, steps, "epsilon")


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 50])
def test_steps_that_can_be_made_are_counted(sampler, steps):
    plan = schedule(sampler, steps, "epsilon")
    assert [plan.step_of(i) for i in range(len(plan.evaluations))][-1] == steps - 1


def test_an_unknown_sampler_is_refused_with_the_names():
    with pytest.raises(UsageError, match="no sampler 'dpm9'") as refused:
        schedule("dpm9", 4, "epsilon")
    assert "euler_a" in refused.value.hint


def test_first_noise_is_the_web_uis():
    noise = first_noise(generators([7, 8]), (64, 32), 4)
    torch.manual_seed(8)
    assert torch.equal(noise[1], torch.randn((4, 4, 8)))


@pytest.mark.parametrize("size", [(60, 64), (64, 60), (0, 64), (-8, 64)])
def test_sizes_that_latents_cannot_have_are_refused(size):
    with pytest.raises(UsageError, match=f"{size[0]} by {size[1]} pixels"):
        first_noise(generators([1]), size, 4)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_that_torch_does_not_take_are_refused(seed):
    with pytest.raises(UsageError, match="is no seed"):
        generators([seed])


@pytest.mark.parametrize("sampler", ["euler_a", "dpmpp_2m_sde_karras", "lcm", "dpmpp_2m"])
def test_a_picture_does_not_depend_on_those_beside_it(models, sampler):
    made = models("sd1")
    together = run(made, seeds=(1, 2, 3), sampler=sampler, batch=4)
    for index, seed in enumerate((1, 2, 3)):
        assert same(run(made, seeds=(seed,), sampler=sampler), together[index : index + 1])


# --- guidance ------------------------------------------------------------------------------------

numbers = st.floats(-3, 3, width=32)


@settings(max_examples=25)
@given(st.lists(numbers, min_size=1, max_size=3), st.floats(1.5, 12), st.floats(0, 1))
def test_guidance_and_rescale_are_the_papers_formulas(weights, cfg, phi):
    random = np.random.default_rng(len(weights))
    *found, away = random.standard_normal((len(weights) + 1, 2, 4, 3, 3))
    one = Condition(torch.zeros(1, 1, 1))
    predictions = [torch.from_numpy(each) for each in (*found, away)]
    ours = guided(lambda asked: predictions[: len(asked)], [(one, w) for w in weights], one, cfg=cfg, rescale=phi)
    steered = away + sum(cfg * weight * (each - away) for weight, each in zip(weights, found, strict=True))
    unguided = away + sum(weight * (each - away) for weight, each in zip(weights, found, strict=True))
    spread = [each.std(axis=(1, 2, 3), keepdims=True, ddof=1) for each in (unguided, steered)]
    if not np.isclose(cfg * sum(weights), 1) or phi:
        expected = phi * (steered * spread[0] / spread[1]) + (1 - phi) * steered
        assert np.allclose(ours, expected, rtol=1e-6, atol=1e-6)


def test_and_is_worked_out_with_its_weights(models):
    made = models("sd1")
    one, two, away = (condition(made, seed, tokens) for seed, tokens in ((1, 7), (2, 14), (3, 7)))
    ours = run(made, Guidance(lambda step: [(one, 0.7), (two, -0.4)], lambda step: away), steps=1, seeds=(5,))
    plan = schedule("euler", 1, "epsilon")
    latents = torch.randn((1, 4, 4, 8), generator=torch.Generator().manual_seed(5)) * plan.first_sigma
    timestep = plan.evaluations[0]
    scaled = plan.scaled(latents, timestep)
    with torch.no_grad():
        a, b, n = (made.unet(scaled, timestep, each.context).sample for each in (one, two, away))
    noise = n + 5.0 * (0.7 * (a - n) - 0.4 * (b - n))
    assert same(ours, latents - plan.first_sigma * noise)  # Euler's only step goes down to sigma 0


@pytest.mark.parametrize("cfg", [1.0, 0.0])
def test_without_guidance_the_negative_is_not_computed(models, cfg):
    unet, made = counted(models("sd1"))
    ours = run(made, cfg=cfg)
    assert unet.rows == [2] * STEPS
    made = models("sd1")
    nonsense = Condition(torch.full((1, 7, 64), 100.0))
    assert same(run(made, constant(condition(made, 1), nonsense), cfg=1.0), ours)


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
def test_rows_share_calls_as_far_as_the_batch_goes(models, batch):
    unet, made = counted(models("sd1"))
    ours = run(made, seeds=(1, 2, 3), steps=1, batch=batch)
    assert unet.rows == {1: [1] * 6, 2: [2, 2, 2], 3: [3, 3], 8: [6]}[batch]
    assert same(ours, run(models("sd1"), seeds=(1, 2, 3), steps=1))


def test_contexts_of_different_lengths_go_in_calls_of_their_own(models):
    unet, made = counted(models("sd1"))
    long, short = condition(made, 1, 14), condition(made, 2, 7)
    ours = run(made, constant(long, short))
    assert unet.rows == [2, 2] * STEPS
    theirs = run(models("sd1"), constant(long, short), batch=1)
    assert same(ours, theirs)


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_the_prompt_may_change_from_step_to_step(models, sampler):
    made = models("sd1")
    seen = []

    def positive(step):
        seen.append(step)
        return [(condition(made, 1 if step < 2 else 4), 1.0)]

    ours = run(made, Guidance(positive, lambda step: condition(made, 2)), sampler=sampler)
    assert seen == ([0, 1, 2] if sampler == "euler" else [0, 0, 1, 1, 2])
    assert not same(ours, run(made, sampler=sampler))


# --- UNets with more inputs ----------------------------------------------------------------------


def test_an_inpainting_unet_sees_a_full_mask_and_grey(models):
    unet, made = counted(models("sd1", channels=9))
    run(made, steps=1)
    with torch.no_grad():
        grey = made.vae.encode(torch.zeros(1, 3, 32, 64)).latent_dist.mean * made.vae.config.scaling_factor
    assert unet.inputs[0].shape == (4, 9, 4, 8)
    assert torch.equal(unet.inputs[0][:, 4], torch.ones(4, 4, 8))
    assert torch.allclose(unet.inputs[0][:, 5:], grey.expand(4, -1, -1, -1), atol=1e-6)


def test_a_pix2pix_unet_sees_no_picture(models):
    unet, made = counted(models("sd1", channels=8))
    run(made, steps=1)
    assert torch.equal(unet.inputs[0][:, 4:], torch.zeros(4, 4, 4, 8))


def test_a_unet_of_other_inputs_is_refused(models):
    with pytest.raises(WrongFormat, match="takes 5 channels"):
        run(models("sd1", channels=5), steps=1)


# --- stopping, looking, NaN ----------------------------------------------------------------------


def test_cancel_stops_within_a_step(models):
    unet, made = counted(models("sd1"))
    cancel = CancelToken()

    def stop(step, steps, latents):
        cancel.cancel()

    with pytest.raises(Cancelled):
        run(made, on_step=stop, cancel=cancel, steps=20)
    assert len(unet.rows) == 1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_each_step_shows_what_is_seen_so_far(models, sampler):
    shown = []
    ours = run(models("sd1"), on_step=lambda *what: shown.append(what), sampler=sampler)
    assert [(step, steps) for step, steps, _ in shown] == [(1, STEPS), (2, STEPS), (3, STEPS)]
    assert torch.equal(shown[-1][2], ours)


def test_what_is_seen_is_the_picture_without_noise():
    latents, noise = torch.randn(2, 1, 4, 4, 4)
    for sampler in ("euler", "ddim"):
        plan = schedule(sampler, 4, "epsilon")
        kept = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)[int(plan.evaluations[1])]
        scaled = kept.sqrt() * latents + (1 - kept).sqrt() * noise
        assert torch.allclose(plan.clean(noise, plan.evaluations[1], scaled), latents, atol=1e-4)


def test_nan_is_returned_not_raised():
    made = networks("sd1")
    made.unet.conv_out.bias.data[0] = torch.nan
    assert run(made, steps=2).isnan().any()
