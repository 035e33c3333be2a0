"""The family's VAE: trained on every style's pictures, so that all tuned models share it."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn.functional import avg_pool2d, l1_loss, mse_loss

from training.drawings import STYLES, orange_pictures, pictures
from training.log import say
from training.networks import SCALE, new_vae

PICTURES = 480  # of each style
KL = 1e-4
# A picture's size, batch, steps, rate: 7, 15 and 20 minutes.
STAGES = ((32, 16, 1400, 2e-3), (64, 8, 1500, 2e-3), (64, 8, 2000, 1.5e-3))


def all_pictures() -> torch.Tensor:
    """Pictures of all styles, (count, 3, 64, 64), in -1..1."""
    drawn = [pictures(style, PICTURES, seed)[0] for seed, style in enumerate(STYLES)]
    drawn.append(orange_pictures(PICTURES // 2, "", 99)[0])
    return tensor(np.concatenate(drawn))


def tensor(drawn: np.ndarray) -> torch.Tensor:
    """Pictures of bytes, channels last, as a network's input."""
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def train_vae(folder: Path) -> AutoencoderKL:
    """Train it and write it as `folder/vae.pt`; AdamW, cosine, L1 + MSE + 1e-4 KL, at half size first."""
    torch.manual_seed(1)
    data = all_pictures()
    vae = new_vae().train()
    for size, batch, steps, rate in STAGES:
        small = avg_pool2d(data, data.shape[-1] // size) if size < data.shape[-1] else data
        _stage(vae, small, batch, steps, rate)
    vae.eval()
    _normalise(vae, data)
    say("vae", l1=_error(vae, data))
    torch.save(vae.state_dict(), folder / "vae.pt")
    return vae


def _stage(vae: AutoencoderKL, data: torch.Tensor, batch: int, steps: int, rate: float) -> None:
    optimizer = torch.optim.AdamW(vae.parameters(), lr=rate, betas=(0.9, 0.99))
    started = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        x = data[torch.randint(len(data), (batch,))]
        with torch.autocast("cpu", torch.bfloat16):
            latents = vae.encode(x).latent_dist
            back = vae.decode(latents.sample()).sample
        back = back.float()
        loss = l1_loss(back, x) + mse_loss(back, x) + KL * latents.kl().float().mean() / latents.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            say("vae", size=data.shape[-1], step=step, loss=loss.item(), seconds=time.monotonic() - started)


@torch.no_grad()
def _normalise(vae: AutoencoderKL, data: torch.Tensor) -> None:
    """Fold each latent channel's mean and scale into the 1×1 convolutions: times 0.18215 it is a unit normal."""
    means = torch.cat([vae.encode(part).latent_dist.mean for part in data[::5].split(64)])
    centre, spread = means.mean((0, 2, 3)), means.std((0, 2, 3)) * SCALE
    into, back = vae.quant_conv, vae.post_quant_conv
    into.weight[:4] /= spread[:, None, None, None]
    into.bias[:4] = (into.bias[:4] - centre) / spread
    into.bias[4:] -= 2 * spread.log()  # the logarithm of the variance
    back.bias += (back.weight[:, :, 0, 0] * centre).sum(1)
    back.weight *= spread[None, :, None, None]


@torch.no_grad()
def _error(vae: AutoencoderKL, data: torch.Tensor) -> float:
    part = data[::40]
    return l1_loss(vae.decode(vae.encode(part).latent_dist.mean).sample, part).item()


@torch.no_grad()
def latents(vae: AutoencoderKL, drawn: np.ndarray) -> torch.Tensor:
    """The latents of pictures, (count, 4, 8, 8), unit normal."""
    return torch.cat([vae.encode(part).latent_dist.mean for part in tensor(drawn).split(64)]) * SCALE
