"""From latents to pixels and back, by the VAE: never in fp16, in tiles where a picture is large.

Owns telling a model that made NaN (in the latents) from a VAE that did (in the decode).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np

from mergekit_sd.lazy import torch
from mergekit_sd.sampling.values import Pixels

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from torch import Tensor

_Vae: TypeAlias = Any  # what a module of diffusers has, its types do not tell

LARGE = 1_500_000  # pixels; above, a decode's memory grows past what the UNet took
TILE = 512  # pixels
OVERLAP = 0.25  # of a tile


@dataclass(frozen=True, slots=True, eq=False)
class Decoded:
    """One picture, (height, width, 3), and whether it can be believed.

    `nan_latents`: NaN or Inf came out of the UNet, so the model is broken. `nan_decode`: the latents were
    finite and the VAE made NaN of them, in fp32 too. In both cases the picture is black.
    `in_fp32`: the VAE's own dtype made NaN, fp32 did not.
    """

    pixels: Pixels
    nan_latents: bool = False
    nan_decode: bool = False
    in_fp32: bool = False


def decode(vae: AutoencoderKL, latents: Tensor, *, tiled: bool | None = None) -> tuple[Decoded, ...]:
    """Each picture of latents (pictures, channels, height / 8, width / 8) as the denoising loop leaves them.

    One at a time, so that a picture does not depend on those beside it. `tiled`: None decides by size.
    """
    return tuple(_decode_one(vae, latents[i : i + 1], tiled) for i in range(len(latents)))


def _decode_one(vae: _Vae, latents: Tensor, tiled: bool | None) -> Decoded:
    height, width = (_scale(vae) * each for each in latents.shape[-2:])
    if not torch.isfinite(latents).all():
        return Decoded(np.zeros((height, width, 3), np.uint8), nan_latents=True)
    tiles = height * width > LARGE if tiled is None else tiled
    first = _working_dtype(vae)
    image = _image(vae, latents, first, tiles)
    again = image is None and first != torch.float32
    if again:
        image = _image(vae, latents, torch.float32, tiles)
    if image is None:
        return Decoded(np.zeros((height, width, 3), np.uint8), nan_decode=True)
    return Decoded(_pixels(image), in_fp32=again)


def _image(vae: _Vae, latents: Tensor, dtype: torch.dtype, tiled: bool) -> Tensor | None:
    """The decoded picture, (1, 3, height, width), about -1..1, float32 on the CPU; None where it is not finite."""
    unscaled = latents / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
    with torch.no_grad(), _in_dtype(vae, dtype), _in_tiles(vae, tiled):
        image: Tensor = vae.decode(unscaled.to(vae.device, dtype), return_dict=False)[0].float().cpu()
    return image if torch.isfinite(image).all() else None


def _pixels(image: Tensor) -> Pixels:
    """Bytes (height, width, 3) of one picture in -1..1, rounded to the nearest."""
    scaled = (image[0].permute(1, 2, 0) * 127.5 + 127.5).clamp(0, 255).round()
    return cast(Pixels, scaled.to(torch.uint8).numpy())


def encode_grey(vae: AutoencoderKL, size: tuple[int, int]) -> Tensor:
    """Latents of an even grey picture, (1, channels, height / 8, width / 8), float32; `size` is width and height."""
    width, height = size
    net: _Vae = vae
    dtype = _working_dtype(net)
    grey = torch.zeros((1, 3, height, width), dtype=dtype, device=net.device)
    with torch.no_grad(), _in_dtype(net, dtype), _in_tiles(net, width * height > LARGE):
        mean: Tensor = net.encode(grey).latent_dist.mean.float()
    latents: Tensor = (mean - (net.config.get("shift_factor") or 0.0)) * net.config.scaling_factor
    return latents


def approximate(vae: AutoencoderKL) -> Callable[[Tensor], Pixels]:
    """A cheap way from latents (1, channels, h, w) to small pixels (h, w, 3), for previews.

    A linear map, fitted by least squares to what the VAE makes of even latents of random values.
    """
    net: _Vae = vae
    channels = net.config.latent_channels
    values = torch.randn((24, channels), generator=torch.Generator("cpu").manual_seed(0))
    patches = [
        _image(vae, each[None, :, None, None].expand(1, channels, 4, 4), torch.float32, False) for each in values
    ]
    known = [(value, patch.mean((0, 2, 3))) for value, patch in zip(values, patches, strict=True) if patch is not None]
    if not known:
        return lambda latents: np.zeros((*latents.shape[-2:], 3), np.uint8)
    inputs = torch.stack([torch.cat((value, torch.ones(1))) for value, _ in known])
    solved = torch.linalg.lstsq(inputs, torch.stack([colour for _, colour in known])).solution

    def preview(latents: Tensor) -> Pixels:
        flat = latents[:1].float().cpu().nan_to_num()
        mixed = torch.einsum("bchw,cr->brhw", flat, solved[:-1]) + solved[-1][None, :, None, None]
        return _pixels(mixed)

    return preview


def _scale(vae: _Vae) -> int:
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def _working_dtype(vae: _Vae) -> torch.dtype:
    """What the VAE computes in: SDXL's overflows in fp16, and on a CPU fp16 is slow besides."""
    return torch.bfloat16 if vae.dtype == torch.bfloat16 else torch.float32


@contextlib.contextmanager
def _in_dtype(vae: _Vae, dtype: torch.dtype) -> Iterator[None]:
    """The VAE in another dtype for a while; from fp16 or bf16 to fp32 and back nothing is lost."""
    own = vae.dtype
    if dtype != own:
        vae.to(dtype=dtype)
    try:
        yield
    finally:
        if dtype != own:
            vae.to(dtype=own)


@contextlib.contextmanager
def _in_tiles(vae: _Vae, tiled: bool) -> Iterator[None]:
    """The VAE working in overlapping tiles, or in one piece, for a while."""
    names = ("use_tiling", "tile_sample_min_size", "tile_latent_min_size", "tile_overlap_factor")
    own = {name: getattr(vae, name) for name in names}
    wanted = dict(zip(names, (tiled, TILE, TILE // _scale(vae), OVERLAP), strict=True))
    try:
        for name, value in wanted.items():
            setattr(vae, name, value)
        yield
    finally:
        for name, value in own.items():
            setattr(vae, name, value)
