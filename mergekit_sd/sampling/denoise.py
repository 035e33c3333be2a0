"""The denoising loop: from a model, conditions and seeds to latents.

Owns guidance (negative, AND, rescale) and how rows share calls of the UNet. Must not know how prompts
are read, nor what becomes of the latents.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from mergekit_sd.errors import Cancelled, WrongFormat
from mergekit_sd.events import CancelToken
from mergekit_sd.lazy import torch
from mergekit_sd.sampling.conditions import Condition, Guidance, added
from mergekit_sd.sampling.decoding import encode_grey
from mergekit_sd.sampling.noise import CELL, first_noise, generators
from mergekit_sd.sampling.schedulers import schedule
from mergekit_sd.sampling.values import Settings

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_sd.sampling.networks import Networks

    Residuals: TypeAlias = tuple[Sequence[Tensor], Tensor]

LATENTS = 4  # channels of what is denoised, in all families
MASK = 1


class Controlling(Protocol):
    """What steers the UNet from beside it (`sampling.control.Control`)."""

    def residuals(
        self, latents: Tensor, timestep: Tensor, condition: Condition, step: int, steps: int
    ) -> Residuals | None:
        """What is added to the UNet's skip connections and to its middle for these rows; None for nothing."""


# Called after each step with its number from 1, how many there are, and latents of what is seen so far.
OnStep: TypeAlias = "Callable[[int, int, Tensor], None]"


def denoise(
    networks: Networks,
    guidance: Guidance,
    *,
    settings: Settings,
    seeds: Sequence[int],
    size: tuple[int, int],
    batch: int = 8,
    control: Sequence[Controlling] = (),
    on_step: OnStep | None = None,
    cancel: CancelToken | None = None,
) -> Tensor:
    """Latents (pictures, 4, height / 8, width / 8), float32, one picture for each seed; NaN is returned, not raised.

    `size`: width and height in pixels. `batch`: the most rows of one call of the UNet; a picture takes one for each
    condition. Of `settings` only steps, cfg, sampler and cfg_rescale are looked at. `cancel` is looked at before
    each call. Raises UsageError for what a sampler or a size cannot be, WrongFormat for a UNet with inputs that
    nothing here can give, Cancelled.
    """
    plan = schedule(
        settings.sampler, settings.steps, networks.prediction, zero_snr=networks.zero_snr, device=networks.device
    )
    sources = generators(seeds)
    latents = (first_noise(sources, size, LATENTS) * plan.first_sigma).to(networks.device)
    caller = _Caller(networks, size, batch, control, cancel)
    last = len(plan.evaluations) - 1
    with torch.no_grad():
        for evaluation, timestep in enumerate(plan.evaluations):
            step = plan.step_of(evaluation)
            scaled = plan.scaled(latents, timestep)
            ask = _Ask(scaled, timestep, step, plan.steps)
            prediction = guided(
                functools.partial(caller.predictions, ask),
                guidance.positive(step),
                guidance.negative(step),
                cfg=settings.cfg,
                rescale=settings.cfg_rescale,
            )
            latents = plan.stepped(prediction, timestep, latents, sources)
            if on_step is not None and (evaluation == last or plan.step_of(evaluation + 1) != step):
                seen = latents if evaluation == last else plan.clean(prediction, timestep, scaled)
                on_step(step + 1, plan.steps, seen)
    return latents


def guided(
    predict: Callable[[Sequence[Condition]], Sequence[Tensor]],
    positive: Sequence[tuple[Condition, float]],
    negative: Condition,
    *,
    cfg: float,
    rescale: float,
) -> Tensor:
    """negative + Σ weight · cfg · (positive − negative), of what `predict` gives for each condition.

    Ho & Salimans 2022 (arXiv:2207.12598); several positives as Liu et al. 2022 (arXiv:2206.01714). A cfg of 0 means
    no guidance, as 1 does. Where the negative's share is 0, it is not computed. `rescale` is φ of Lin et al. 2023
    (arXiv:2305.08891, equations 15 and 16): the spread of each picture is brought back to that of cfg 1.
    """
    cfg = cfg or 1.0
    conditions, weights = zip(*positive, strict=True)
    if math.isclose(cfg * sum(weights), 1.0) and (cfg == 1.0 or not rescale):
        found = predict(conditions)
        return sum_of(found, [cfg * weight for weight in weights])
    *found, away = predict((*conditions, negative))
    direction = sum_of([each - away for each in found], weights)
    steered = away + cfg * direction
    if not rescale:
        return steered
    spread = _spread(away + direction) / _spread(steered)
    return steered * (rescale * spread + (1 - rescale))


def sum_of(parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ weight · part."""
    total = parts[0] * weights[0]
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total = total + part * weight
    return total


def _spread(prediction: Tensor) -> Tensor:
    return prediction.std(dim=(1, 2, 3), keepdim=True)


class _Ask:
    """What the UNet is asked at one evaluation, for all pictures."""

    __slots__ = ("scaled", "step", "steps", "timestep")

    def __init__(self, scaled: Tensor, timestep: Tensor, step: int, steps: int) -> None:
        self.scaled, self.timestep, self.step, self.steps = scaled, timestep, step, steps


class _Caller:
    """Calls the UNet for pictures and conditions, as many rows at once as may be."""

    def __init__(
        self,
        networks: Networks,
        size: tuple[int, int],
        batch: int,
        control: Sequence[Controlling],
        cancel: CancelToken | None,
    ) -> None:
        self._unet: Any = networks.unet
        self._device, self._dtype = networks.device, networks.dtype
        self._size = size
        self._batch = max(1, batch)
        self._control = control
        self._cancel = cancel
        self._beside = _beside(networks, size)

    def predictions(self, ask: _Ask, conditions: Sequence[Condition]) -> list[Tensor]:
        """What the UNet says of all pictures under each condition, float32."""
        pictures = len(ask.scaled)
        found: dict[tuple[int, int], Tensor] = {}
        for rows in _calls(conditions, pictures, self._batch):
            if self._cancel is not None and self._cancel.cancelled:
                raise Cancelled
            found.update(zip(rows, self._call(ask, conditions, rows), strict=True))
        return [
            torch.stack([found[number, picture] for picture in range(pictures)]) for number in range(len(conditions))
        ]

    def _call(self, ask: _Ask, conditions: Sequence[Condition], rows: Sequence[tuple[int, int]]) -> Tensor:
        condition = self._joined([conditions[number] for number, _ in rows])
        latents = ask.scaled[[picture for _, picture in rows]].to(self._device, self._dtype)
        inputs = (
            latents if self._beside is None else torch.cat((latents, self._beside.expand(len(rows), -1, -1, -1)), 1)
        )
        residuals = _summed(
            each.residuals(latents, ask.timestep, condition, ask.step, ask.steps) for each in self._control
        )
        down, middle = (None, None) if residuals is None else residuals
        predicted: Tensor = self._unet(
            inputs,
            ask.timestep,
            encoder_hidden_states=condition.context,
            added_cond_kwargs=added(condition, self._size),
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            return_dict=False,
        )[0]
        return predicted.float()

    def _joined(self, conditions: Sequence[Condition]) -> Condition:
        context = torch.cat([each.context for each in conditions]).to(self._device, self._dtype)
        pooled = [each.pooled for each in conditions if each.pooled is not None]
        return Condition(context, torch.cat(pooled).to(self._device, self._dtype) if pooled else None)


def _calls(conditions: Sequence[Condition], pictures: int, batch: int) -> Iterator[Sequence[tuple[int, int]]]:
    """(condition, picture) of the rows of each call.

    Contexts of different lengths go in calls of their own: padding would change what the UNet sees.
    """

    def length(number: int) -> int:
        return conditions[number].context.shape[1]

    for _, alike in itertools.groupby(sorted(range(len(conditions)), key=length), key=length):
        rows = list(itertools.product(alike, range(pictures)))
        yield from (rows[start : start + batch] for start in range(0, len(rows), batch))


def _summed(several: Iterator[Residuals | None]) -> Residuals | None:
    total: Residuals | None = None
    for each in several:
        if total is None or each is None:
            total = total or each
        else:
            down = [mine + other for mine, other in zip(total[0], each[0], strict=True)]
            total = (down, total[1] + each[1])
    return total


def _beside(networks: Networks, size: tuple[int, int]) -> Tensor | None:
    """What a UNet of more than four inputs sees beside the latents when a picture is made of a prompt alone.

    Inpainting: a mask of ones, all is to be painted, and the latents of grey, which is what a covered picture
    looks like. Pix2pix: the latents of no picture, zeros.
    """
    unet: Any = networks.unet
    extra = unet.config.in_channels - LATENTS
    width, height = size[0] // CELL, size[1] // CELL
    if extra == 0:
        return None
    if extra == LATENTS:
        return torch.zeros((1, LATENTS, height, width), device=networks.device, dtype=networks.dtype)
    if extra != MASK + LATENTS:
        raise WrongFormat(
            f"The UNet takes {extra + LATENTS} channels.",
            hint="Pictures can be made with 4 (plain), 8 (pix2pix) and 9 (inpainting).",
        )
    mask = torch.ones((1, MASK, height, width))
    grey = encode_grey(networks.vae, size).cpu()
    return torch.cat((mask, grey), 1).to(networks.device, networks.dtype)
