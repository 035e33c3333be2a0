"""Diffusers' schedulers for the samplers that a recipe can name, set up for a model and a number of steps.

Owns the noise schedule that all of Stable Diffusion was trained with. Must not know of networks or prompts.
"""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING, Any, Literal

from mergekit_sd.errors import UsageError
from mergekit_sd.recipe.samplers import SAMPLERS, Sampler
from mergekit_sd.sampling.packages import quiet

if TYPE_CHECKING:
    from torch import Generator, Tensor

# Rombach et al. 2022 (arXiv:2112.10752), the released configurations of SD1, SD2 and SDXL alike.
_BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_PREDICTION = {"epsilon": "epsilon", "v": "v_prediction"}
# Lin et al. 2023 (arXiv:2305.08891): a schedule that ends in pure noise, and steps that begin there.
_ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


class Schedule:
    """The steps of one sampling run. `evaluations` are the timesteps at which the UNet is asked, in order.

    A sampler of second order asks twice in a step; `step_of` counts the steps that a user asked for.
    """

    def __init__(self, scheduler: Any, steps: int) -> None:
        self._scheduler = scheduler
        self._draws = "generator" in inspect.signature(scheduler.step).parameters
        self.steps = steps
        self.evaluations: list[Tensor] = list(scheduler.timesteps)

    @property
    def first_sigma(self) -> float:
        """What the first noise is multiplied by."""
        return float(self._scheduler.init_noise_sigma)

    def step_of(self, evaluation: int) -> int:
        """The step, counted from 0, that an evaluation belongs to."""
        return evaluation // int(self._scheduler.order)

    def scaled(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """Latents with the variance that the UNet was trained on."""
        scaled: Tensor = self._scheduler.scale_model_input(latents, timestep)
        return scaled

    def stepped(self, prediction: Tensor, timestep: Tensor, latents: Tensor, sources: list[Generator]) -> Tensor:
        """The latents after an evaluation; noise that the sampler adds is drawn from each picture's generator."""
        drawn = {"generator": sources} if self._draws else {}
        after: Tensor = self._scheduler.step(prediction, timestep, latents, return_dict=False, **drawn)[0]
        return after

    def clean(self, prediction: Tensor, timestep: Tensor, scaled: Tensor) -> Tensor:
        """The picture that the UNet sees in `scaled` latents, as latents without noise: what a preview shows."""
        kept = float(self._scheduler.alphas_cumprod[round(float(timestep))])
        picture, noise = math.sqrt(kept), math.sqrt(1 - kept)
        if self._scheduler.config.prediction_type == "v_prediction":
            return picture * scaled - noise * prediction
        return (scaled - noise * prediction) / picture


def schedule(
    sampler: str, steps: int, prediction: Literal["epsilon", "v"], *, zero_snr: bool = False, device: Any = "cpu"
) -> Schedule:
    """The schedule of a sampler of `recipe.samplers.SAMPLERS` for a model that predicts epsilon or v.

    `zero_snr`: the model was trained down to pure noise. Raises UsageError for an unknown sampler, for steps
    that it cannot make, and for a model that it cannot sample.
    """
    chosen = SAMPLERS.get(sampler)
    if chosen is None:
        raise UsageError(f"There is no sampler {sampler!r}.", key="sampler", hint=f"Choose of: {', '.join(SAMPLERS)}.")
    with quiet():
        import diffusers

        kind = getattr(diffusers, chosen.scheduler)
        settings: dict[str, Any] = {**_BETAS, **chosen.settings, "prediction_type": _PREDICTION[prediction]}
        if zero_snr:
            _refuse_zero_snr(chosen, kind, prediction)
            settings |= _ZERO_SNR
        scheduler = kind(**settings)
        _refuse_steps(chosen, steps, scheduler.config.get("original_inference_steps", _BETAS["num_train_timesteps"]))
        scheduler.set_timesteps(steps, device=device)
    return Schedule(scheduler, steps)


def _refuse_steps(sampler: Sampler, steps: int, most: int) -> None:
    if not 1 <= steps <= most:
        raise UsageError(
            f"The sampler {sampler.name} cannot make {steps} steps.", key="steps", hint=f"Give 1 to {most} steps."
        )


def _refuse_zero_snr(sampler: Sampler, kind: type, prediction: str) -> None:
    if prediction != "v":
        raise UsageError(
            "The model is said to have zero terminal SNR and to predict epsilon; pure noise tells it nothing.",
            key="prediction",
            hint="Models of zero terminal SNR predict v: declare that, or not the zero SNR.",
        )
    if "rescale_betas_zero_snr" not in inspect.signature(kind).parameters:
        raise UsageError(
            f"The sampler {sampler.name} cannot begin at pure noise, which a model of zero terminal SNR needs.",
            key="sampler",
            hint="Choose another, dpmpp_2m_karras or euler for instance.",
        )
