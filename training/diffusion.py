"""Training a UNet to take noise away from latents, by caption: the base, what is tuned from it, and adapters."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel

from training.log import say
from training.networks import Words

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
EMPTY = 0.1  # of the captions, for guidance without a classifier
JUDGED = 1000  # steps
SNR = 2.0  # the loss counts less where there is hardly noise: colours, which come late, are decided where there is much


@dataclass
class Data:
    """Latents, (count, 4, 8, 8), and the number of each one's caption."""

    latents: torch.Tensor
    captions: list[str]
    which: torch.Tensor

    @classmethod
    def of(cls, latents: torch.Tensor, captions: Sequence[str]) -> Data:
        """Every distinct caption is encoded once a step."""
        distinct = list(dict.fromkeys(captions))
        number = {text: n for n, text in enumerate(distinct)}
        return cls(latents, [*distinct, ""], torch.tensor([number[text] for text in captions]))

    def joined(self, other: Data) -> Data:
        """Both."""
        captions = [self.captions[n] for n in self.which] + [other.captions[n] for n in other.which]
        return Data.of(torch.cat([self.latents, other.latents]), captions)


@dataclass
class Model:
    """A UNet, its text encoder, and the words."""

    unet: UNet2DConditionModel
    text: CLIPTextModel
    words: Words

    def context(self, ids: torch.Tensor) -> torch.Tensor:
        """What the UNet is told, (prompts, 77, 64)."""
        return self.text(ids).last_hidden_state

    def copied(self) -> Model:
        """The same numbers, to be trained apart."""
        return Model(copy.deepcopy(self.unet), copy.deepcopy(self.text), self.words)


@dataclass(frozen=True)
class Run:
    """How long and how fast to learn. `average`: of the weights, as they come out at the end."""

    name: str
    steps: int
    rate: float
    batch: int = 32
    average: float = 0.995
    flat: float = 0.3  # of the steps, before the rate falls


def train(
    model: Model,
    data: Data,
    run: Run,
    learned: Iterable[nn.Parameter],
    *,
    judge: Callable[[], dict[str, object]] | None = None,
    keep: Callable[[], None] = lambda: None,
    seed: int = 0,
) -> None:
    """Train `learned`, which end as the average over the steps. `keep` is called after each step's update."""
    torch.manual_seed(seed)
    learned = [each for each in learned if each.requires_grad]
    ids = model.words.ids(data.captions)
    empty = len(data.captions) - 1
    noise = DDPMScheduler(**SCHEDULE)
    signal = noise.alphas_cumprod
    optimizer = torch.optim.AdamW(learned, lr=run.rate, betas=(0.9, 0.99))
    averages = [each.detach().clone() for each in learned]
    started, recent = time.monotonic(), 0.0
    for step in range(run.steps):
        for group in optimizer.param_groups:
            group["lr"] = run.rate * _schedule(step, run)
        pick = torch.randint(len(data.latents), (run.batch,))
        x0, which = data.latents[pick], data.which[pick].clone()
        which[torch.rand(run.batch) < EMPTY] = empty
        eps = torch.randn_like(x0)
        t = torch.randint(1000, (run.batch,))
        told = model.context(ids)[which]
        said = model.unet(noise.add_noise(x0, eps, t), t, told).sample
        snr = signal[t] / (1 - signal[t])
        loss = ((said - eps).square().mean((1, 2, 3)) * (SNR / snr).clamp(max=1)).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        keep()
        held = min(run.average, (step + 1) / (step + 10))
        with torch.no_grad():
            for average, now in zip(averages, learned, strict=True):
                average.lerp_(now, 1 - held)
        recent += (loss.item() - recent) / min(step + 1, 50)
        if step % 100 == 99 or step + 1 == run.steps:
            found = {}
            if judge and (step % JUDGED == JUDGED - 1 or step + 1 == run.steps):
                found = _averaged(learned, averages, judge)
            say(run.name, step=step + 1, loss=recent, seconds=time.monotonic() - started, **found)
    with torch.no_grad():
        for average, now in zip(averages, learned, strict=True):
            now.copy_(average)


def _averaged(
    learned: list[nn.Parameter], averages: list[torch.Tensor], judge: Callable[[], dict[str, object]]
) -> dict[str, object]:
    """What the judge says of the averaged weights."""
    now = [each.detach().clone() for each in learned]
    with torch.no_grad():
        for each, average in zip(learned, averages, strict=True):
            each.copy_(average)
        found = judge()
        for each, own in zip(learned, now, strict=True):
            each.copy_(own)
    return found


def _schedule(step: int, run: Run) -> float:
    """Warm-up of 50 steps, flat, then a cosine to zero."""
    late = max(0.0, step / run.steps - run.flat) / (1 - run.flat)
    return min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * late))


@torch.no_grad()
def sample(model: Model, captions: Sequence[str], seed: int = 0, cfg: float = 4.0, steps: int = 20) -> torch.Tensor:
    """Latents, (captions, 4, 8, 8), by DPM++ 2M Karras."""
    scheduler = DPMSolverMultistepScheduler(**SCHEDULE, use_karras_sigmas=True)
    scheduler.set_timesteps(steps)
    random = torch.Generator().manual_seed(seed)
    x = torch.randn((len(captions), 4, 8, 8), generator=random) * scheduler.init_noise_sigma
    told = model.context(model.words.ids([*captions, *[""] * len(captions)]))
    for t in scheduler.timesteps:
        said, plain = model.unet(scheduler.scale_model_input(torch.cat([x, x]), t), t, told).sample.chunk(2)
        x = scheduler.step(plain + cfg * (said - plain), t, x).prev_sample
    return x
