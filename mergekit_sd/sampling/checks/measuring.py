"""One model's answers to the probes, small enough to keep while the next model is loaded.

Owns how the UNet, the VAE and the text encoders are asked. Every model sees the same latents: smooth fields
of fixed seeds with noise of SD's schedule. Must not judge: that takes the parents' answers beside these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from mergekit_sd.lazy import torch
from mergekit_sd.sampling.checks.probes import Disc, Probes
from mergekit_sd.sampling.checks.tracing import (
    Half,
    Move,
    Trace,
    Unit,
    follow,
    is_empty,
    like,
    moves,
    text_units,
    to_half,
    unet_units,
)
from mergekit_sd.sampling.conditions import Condition, added

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_sd.sampling.networks import Networks

Array: TypeAlias = NDArray[np.float32]
Encode: TypeAlias = Callable[[str], Condition]

LARGEST_SIDE = 32  # of the probes' latents: a quarter of SD1's work, a sixteenth of SDXL's; the same for all models
BATCH = 8  # probes in one call of the UNet: 5 timesteps of one seed go at once


@dataclass(frozen=True, slots=True, eq=False)
class TextCall:
    """How a text encoder was called, to be called so again by another model."""

    arguments: tuple[Any, ...]
    named: Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """A model's answers. `predictions` by prompt, (probes, 4, side, side), as noise whatever the UNet predicts.

    `prediction` is what the model is said to predict, `type_errors` the squared error of its raw predictions
    as "epsilon" and as "v", shares of what they should be. `latents`: of the VAE's test picture, scaled,
    (4, h, w); `round_trip`: the squared error of that picture, decoded again, as a share of its variance.
    `finite`: whether the text encoders, the UNet, the VAE give finite numbers. `nonfinite`: tensors that hold NaN
    or Inf, and how many. `empty`: blocks and networks of which every weight is 0. `unet`, `text`: the traced
    prompt's way, `context` and `pooled` its condition. `own` and `own_text`: by parent, how far each block
    is from the parent's when given the parent's input. `calls`: of the UNet, `probed`: latents in them.
    """

    probes: Probes
    family: str
    prediction: str
    type_errors: Mapping[str, float]
    predictions: Mapping[str, Array]
    latents: Array
    round_trip: float
    finite: Mapping[str, bool]
    nonfinite: Mapping[str, int]
    empty: tuple[str, ...]
    unet: Trace
    text: tuple[Trace, ...]
    context: Half
    pooled: Half | None
    calls: int
    probed: int
    own: Mapping[str, Mapping[str, Move]] = field(default_factory=dict)
    own_text: Mapping[str, Mapping[str, Move]] = field(default_factory=dict)


@dataclass(slots=True)
class _Asking:
    """A UNet being asked, and how often it was."""

    networks: Networks
    latents: Array
    timesteps: NDArray[np.int64]
    calls: int = 0
    probed: int = 0

    def predict(self, context: Tensor, pooled: Tensor | None) -> Array:
        """The UNet's raw predictions for all probes, (probes, 4, side, side)."""
        starts = range(0, len(self.latents), BATCH)
        return np.concatenate([self.once(slice(start, start + BATCH), context, pooled) for start in starts])

    def once(self, rows: slice, context: Tensor, pooled: Tensor | None) -> Array:
        """The same for some of the probes, in one call."""
        self.calls += 1
        self.probed += len(self.latents[rows])
        return ask(self.networks, self.latents[rows], self.timesteps[rows], context, pooled)


def measure(
    networks: Networks, encode: Encode, probes: Probes, *, against: Mapping[str, Measured] | None = None
) -> Measured:
    """Ask a model all the probes. `against`: parents measured before, whose blocks' inputs its blocks are given.

    The UNet sees each prompt's probes, and the traced ones once for itself and once for each parent: of the
    general set 60 latents of up to 32 × 32, and 5 a parent.
    """
    same = {name: each for name, each in (against or {}).items() if _comparable(each, networks, probes)}
    with torch.inference_mode():
        asking = _Asking(networks, *probe_latents(probes, side_of(networks)))
        condition, text, text_calls = _trace_text(networks, encode, probes.traced)
        context, pooled = to_half(condition.context), None if condition.pooled is None else to_half(condition.pooled)
        units = unet_units(cast("Any", networks.unet), networks.architecture)
        traced_rows = slice(0, min(len(probes.timesteps), BATCH))  # the first seed's

        def traced(kept: Half, kept_pooled: Half | None, given: Trace | None = None) -> Trace:
            full = like(kept, condition.context)
            full_pooled = None if kept_pooled is None else like(kept_pooled, condition.context)
            return follow(units, lambda: asking.once(traced_rows, full, full_pooled), given)

        unet = traced(context, pooled)
        own = {name: moves(traced(each.context, each.pooled, each.unet), each.unet) for name, each in same.items()}
        own_text = {name: _own_text(networks, text_calls, each) for name, each in same.items()}
        conditions = {prompt: encode(prompt) for prompt in probes.prompts}
        raw = {prompt: asking.predict(each.context, each.pooled) for prompt, each in conditions.items()}
        latents, round_trip = _through_vae(networks, probes.picture)
    return Measured(
        probes=probes,
        family=networks.family,
        prediction=networks.prediction,
        type_errors=_type_errors(raw, probes, side_of(networks)),
        predictions={prompt: _as_noise(each, networks.prediction, asking) for prompt, each in raw.items()},
        latents=latents,
        round_trip=round_trip,
        finite={
            "text encoder": all(bool(torch.isfinite(each.context).all()) for each in conditions.values()),
            "UNet": _is_finite(*raw.values()),
            "VAE": _is_finite(latents, np.float32(round_trip)),
        },
        nonfinite=dict(networks.nonfinite),
        empty=_empty(networks, units),
        unet=unet,
        text=text,
        context=context,
        pooled=pooled,
        calls=asking.calls,
        probed=asking.probed,
        own=own,
        own_text=own_text,
    )


def _is_finite(*values: Array | np.float32) -> bool:
    return all(bool(np.isfinite(each).all()) for each in values)


def _empty(networks: Networks, units: Sequence[Unit]) -> tuple[str, ...]:
    parts: dict[str, Any] = {"text encoder": networks.text_encoders[0], "VAE": networks.vae}
    if len(networks.text_encoders) > 1:
        parts["second text encoder"] = networks.text_encoders[1]
    whole = [name for name, network in parts.items() if is_empty(network)]
    return (*(unit.name for unit in units if unit.is_empty), *whole)


def _comparable(parent: Measured, networks: Networks, probes: Probes) -> bool:
    side = next(iter(parent.predictions.values())).shape[-1]
    return parent.family == networks.family and parent.probes == probes and side == side_of(networks)


# --- the UNet ----------------------------------------------------------------------------------------------


def side_of(networks: Networks) -> int:
    """The probes' latents' side: the model's own, 32 at most, a multiple of 8 for the UNet's halvings."""
    return max(8, min(LARGEST_SIDE, min(networks.size) // 8) // 8 * 8)


def ask(
    networks: Networks, latents: Array, timesteps: NDArray[np.int64], context: Tensor, pooled: Tensor | None
) -> Array:
    """One call of the UNet: latents (n, 4, h, w), timesteps (n), one condition for all.

    An inpainting UNet is told to paint everything: mask 1, the picture beneath grey.
    """
    count, device, dtype = len(latents), networks.device, networks.dtype
    sample = torch.from_numpy(latents).to(device=device, dtype=dtype)
    unet: Any = networks.unet
    extra = unet.config.in_channels - sample.shape[1]
    if extra > 0:
        more = torch.zeros(count, extra, *sample.shape[2:], device=device, dtype=dtype)
        if extra == 5:
            more[:, 0] = 1
        sample = torch.cat([sample, more], dim=1)
    rows = Condition(_rows(context, networks, count), None if pooled is None else _rows(pooled, networks, count))
    output = unet(
        sample,
        torch.from_numpy(timesteps).to(device),
        encoder_hidden_states=rows.context,
        added_cond_kwargs=added(rows, networks.size),
        return_dict=False,
    )[0]
    prediction: Array = output.float().cpu().numpy()
    return prediction


def _rows(condition: Tensor, networks: Networks, count: int) -> Tensor:
    return condition.to(device=networks.device, dtype=networks.dtype).expand(count, *condition.shape[1:])


def signal_and_noise(timesteps: NDArray[np.int64]) -> tuple[Array, Array]:
    """The shares of picture and of noise at a timestep, (n, 1, 1, 1) each: √ᾱ and √(1 − ᾱ) of SD's "scaled linear"."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    kept = np.cumprod(1 - betas)[timesteps].astype(np.float32)[:, None, None, None]
    return np.sqrt(kept), np.sqrt(1 - kept)


def probe_pictures(probes: Probes, side: int) -> tuple[Array, Array, NDArray[np.int64]]:
    """Clean latents, noise (probes, 4, side, side) and timesteps (probes): all timesteps of one seed, then the next.

    The clean ones are fields whose spectrum falls as a picture's does, of variance 1.
    """
    frequencies = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)[None, :])
    clean, noise = [], []
    for seed in probes.seeds:
        random = np.random.default_rng(seed)
        field_ = np.fft.ifft2(np.fft.fft2(random.standard_normal((4, side, side))) / (1 / side + frequencies)).real
        field_ /= field_.std()
        for _ in probes.timesteps:
            clean.append(field_)
            noise.append(random.standard_normal((4, side, side)))
    times = np.array(probes.timesteps * len(probes.seeds), np.int64)
    return np.stack(clean).astype(np.float32), np.stack(noise).astype(np.float32), times


def probe_latents(probes: Probes, side: int) -> tuple[Array, NDArray[np.int64]]:
    """The noisy latents that every model is asked with, and their timesteps."""
    clean, noise, times = probe_pictures(probes, side)
    signal, share = signal_and_noise(times)
    return signal * clean + share * noise, times


def _as_noise(raw: Array, prediction: str, asking: _Asking) -> Array:
    if prediction != "v":
        return raw
    signal, share = signal_and_noise(asking.timesteps)
    return signal * raw + share * asking.latents


def _type_errors(raw: Mapping[str, Array], probes: Probes, side: int) -> dict[str, float]:
    """Of the unconditional prediction, at the middle timesteps: at the ends the two readings are nearly one."""
    clean, noise, times = probe_pictures(probes, side)
    signal, share = signal_and_noise(times)
    middle = (times >= 200) & (times <= 800)
    if not middle.any():
        return {}
    said = {"epsilon": noise, "v": signal * noise - share * clean}
    return {name: float(_square(raw[""] - each, middle) / _square(each, middle)) for name, each in said.items()}


def _square(values: Array, rows: NDArray[np.bool_]) -> float:
    return float(np.square(values[rows].astype(np.float64)).sum())


# --- text encoders -----------------------------------------------------------------------------------------


def _trace_text(
    networks: Networks, encode: Encode, prompt: str
) -> tuple[Condition, tuple[Trace, ...], tuple[TextCall, ...]]:
    """The condition, each text encoder's trace, and how each was called."""
    calls: dict[int, TextCall] = {}

    def noting(index: int) -> Callable[..., None]:
        def hook(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            calls[index] = TextCall(arguments, dict(named))

        return hook

    handles = [
        each.register_forward_pre_hook(noting(index), with_kwargs=True)
        for index, each in enumerate(networks.text_encoders)
    ]
    try:
        condition = encode(prompt)
    finally:
        for handle in handles:
            handle.remove()
    called = tuple(calls[index] for index in sorted(calls))
    if len(called) != len(networks.text_encoders):  # conditions that come from elsewhere: nothing to trace
        return condition, (), ()
    return condition, _follow_text(networks, called), called


def _follow_text(networks: Networks, calls: tuple[TextCall, ...], given: tuple[Trace, ...] = ()) -> tuple[Trace, ...]:
    traces = []
    for index, (encoder, call) in enumerate(zip(networks.text_encoders, calls, strict=True)):

        def run(encoder: Any = encoder, call: TextCall = call) -> object:
            return encoder(*call.arguments, **call.named)

        traces.append(follow(text_units(encoder), run, given[index] if given else None))
    return tuple(traces)


def _own_text(networks: Networks, calls: tuple[TextCall, ...], parent: Measured) -> dict[str, Move]:
    if not calls or len(parent.text) != len(calls):
        return {}
    return joined_moves(_follow_text(networks, calls, parent.text), parent.text)


def joined_moves(mine: tuple[Trace, ...], theirs: tuple[Trace, ...]) -> dict[str, Move]:
    """Moves of all text encoders by "layer 03", of SDXL's second by "2: layer 03"."""
    result = {}
    for number, (a, b) in enumerate(zip(mine, theirs, strict=False), 1):
        result.update({name if number == 1 else f"{number}: {name}": move for name, move in moves(a, b).items()})
    return result


# --- the VAE -----------------------------------------------------------------------------------------------


def probe_picture(side: int, plain: Disc | None = None) -> Array:
    """Soft colours with two discs, or one disc on plain ground: (1, 3, side, side), from -1 to 1."""
    y, x = np.mgrid[0:side, 0:side] / side
    discs: Sequence[tuple[tuple[float, float], float, Sequence[float]]]
    if plain:
        picture = np.broadcast_to(np.array(plain.ground)[:, None, None] / 127.5 - 1, (3, side, side)).copy()
        discs = [((0.5, 0.5), 0.27, [each / 127.5 - 1 for each in plain.disc])]
    else:
        picture = np.stack([0.8 * x - 0.4, 0.8 * y - 0.4, 0.4 - 0.8 * x * y])
        discs = [((0.3, 0.3), 0.18, (0.8, -0.6, -0.5)), ((0.7, 0.6), 0.22, (-0.5, -0.3, 0.8))]
    for at, radius, colour in discs:
        inside = np.hypot(x - at[0], y - at[1]) < radius
        picture[:, inside] = np.array(colour)[:, None]
    return picture.astype(np.float32)[None]


def _through_vae(networks: Networks, plain: Disc | None) -> tuple[Array, float]:
    """The test picture's scaled latents, (4, h, w), and the error of the way back; never in fp16, which overflows."""
    vae: Any = networks.vae
    own = next(iter(vae.parameters())).dtype
    working = torch.float32 if own == torch.float16 else own
    picture = torch.from_numpy(probe_picture(8 * side_of(networks), plain))
    vae.to(dtype=working)
    try:
        latents = vae.encode(picture.to(device=networks.device, dtype=working), return_dict=False)[0].mode()
        back = vae.decode(latents, return_dict=False)[0].float().cpu()
    finally:
        vae.to(dtype=own)
    error = (back - picture).square().mean() / picture.var()
    scaled: Array = (latents[0].float().cpu() * vae.config.scaling_factor).numpy()
    return scaled, float(error)
