"""From latents to pixels: the VAE's own decode is the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
import diffusers_folders as small

from mergekit_sd.sampling import decoding
from mergekit_sd.sampling.decoding import approximate, decode, encode_grey


@pytest.fixture
def vae():
    torch.manual_seed(3)
    return small.vae().eval().requires_grad_(False)


def latents(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_pixels_are_the_vaes(vae):
    vae.register_to_config(scaling_factor=0.5, shift_factor=0.25)
    given = latents(2, 4, 4, 6)
    found = decode(vae, given)
    with torch.no_grad():
        image = vae.decode(given / 0.5 + 0.25).sample
    expected = np.round((image.permute(0, 2, 3, 1).numpy().clip(-1, 1) + 1) * 127.5)
    assert [each.pixels.shape for each in found] == [(32, 48, 3)] * 2
    assert all(np.abs(each.pixels - want).max() <= 1 for each, want in zip(found, expected, strict=True))
    assert not any(each.nan_latents or each.nan_decode or each.in_fp32 for each in found)


def test_the_latents_range_is_the_configs(vae):
    assert vae.config.scaling_factor == pytest.approx(0.18215)
    grey = encode_grey(vae, (48, 32))
    with torch.no_grad():
        assert torch.allclose(grey, vae.encode(torch.zeros(1, 3, 32, 48)).latent_dist.mean * 0.18215, atol=1e-6)


def test_nan_latents_are_told_for_their_picture_only(vae):
    given = latents(2, 4, 4, 4)
    given[0, 0, 0, 0] = torch.nan
    broken, whole = decode(vae, given)
    assert (broken.nan_latents, broken.nan_decode) == (True, False)
    assert broken.pixels.shape == (32, 32, 3)
    assert not broken.pixels.any()
    assert not whole.nan_latents
    assert np.array_equal(whole.pixels, decode(vae, given[1:])[0].pixels)


def test_a_nan_decode_is_told_from_nan_latents(vae):
    vae.decoder.conv_out.bias.data[0] = torch.nan
    (found,) = decode(vae, latents(1, 4, 4, 4))
    assert (found.nan_latents, found.nan_decode) == (False, True)
    assert not found.pixels.any()


def test_what_bf16_cannot_decode_is_decoded_in_fp32(vae, monkeypatch):
    vae.to(torch.bfloat16)
    real = type(vae).decode
    worked_in = []

    def failing(self, given, **more):
        worked_in.append(given.dtype)
        return (real(self, given, **more)[0] * (torch.nan if given.dtype == torch.bfloat16 else 1),)

    monkeypatch.setattr(type(vae), "decode", failing)
    (found,) = decode(vae, latents(1, 4, 4, 4))
    assert worked_in == [torch.bfloat16, torch.float32]
    assert found.in_fp32
    assert not found.nan_decode
    assert found.pixels.any()
    assert vae.dtype == torch.bfloat16


def test_fp16_is_never_decoded_in(vae, monkeypatch):
    vae.to(torch.float16)
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    real = type(vae).decode
    worked_in = []

    def watched(self, given, **more):
        worked_in.append((given.dtype, self.dtype))
        return real(self, given, **more)

    monkeypatch.setattr(type(vae), "decode", watched)
    assert decode(vae, latents(1, 4, 4, 4))[0].pixels.any()
    assert worked_in == [(torch.float32, torch.float32)]
    assert all(torch.equal(vae.state_dict()[name], tensor) for name, tensor in before.items())
    assert vae.dtype == torch.float16


def test_large_pictures_are_decoded_in_tiles(vae, monkeypatch):
    monkeypatch.setattr(decoding, "LARGE", 64 * 64)
    monkeypatch.setattr(decoding, "TILE", 64)
    sizes = []
    vae.decoder.register_forward_pre_hook(lambda _, given: sizes.append(tuple(given[0].shape[-2:])))
    decode(vae, latents(1, 4, 8, 8))
    assert sizes == [(8, 8)]
    sizes.clear()
    decode(vae, latents(1, 4, 8, 12))
    assert sizes == [(8, 8), (8, 6), (2, 8), (2, 6)]
    assert not vae.use_tiling
    sizes.clear()
    decode(vae, latents(1, 4, 8, 12), tiled=False)
    assert sizes == [(8, 12)]


def test_tiles_make_nearly_the_same_picture(vae, monkeypatch):
    # Norms and attention look at a whole tile: without them a pixel depends on its surroundings only.
    for name, module in list(vae.decoder.named_modules()):
        if isinstance(module, torch.nn.GroupNorm):
            vae.decoder.set_submodule(name, torch.nn.Identity())
    vae.decoder.mid_block.attentions[0] = None
    given = latents(1, 4, 24, 24)
    with torch.no_grad():
        vae.decoder.conv_out.weight /= 3 * vae.decode(given / vae.config.scaling_factor).sample.std()
        vae.decoder.conv_out.bias.zero_()
    monkeypatch.setattr(decoding, "TILE", 128)
    whole, tiled = (decode(vae, given, tiled=each)[0].pixels.astype(float) for each in (False, True))
    assert whole.shape == tiled.shape == (192, 192, 3)
    assert 0 < np.abs(whole - tiled).mean() < 0.05 * whole.std()


def test_the_preview_is_fitted_to_what_the_vae_makes(vae, monkeypatch):
    mixing, offset = 0.3 * latents(3, 4), torch.tensor([0.1, -0.2, 0.3])[:, None, None]

    def linear(self, given, **more):
        colours = torch.einsum("rc,bchw->brhw", mixing, given * self.config.scaling_factor) + offset
        return (colours.repeat_interleave(8, -1).repeat_interleave(8, -2),)

    monkeypatch.setattr(type(vae), "decode", linear)
    given = latents(1, 4, 4, 6)
    difference = approximate(vae)(given).astype(int) - decode(vae, given)[0].pixels[4::8, 4::8]
    assert np.abs(difference).max() <= 1


def test_a_broken_vae_has_a_black_preview(vae):
    vae.decoder.conv_out.bias.data[0] = torch.nan
    found = approximate(vae)(latents(1, 4, 4, 6))
    assert found.shape == (4, 6, 3)
    assert not found.any()
