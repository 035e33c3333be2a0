"""ControlNets: read from a file, shaped by the UNet that they steer, and asked for what they add to it.

Owns the names of what a ControlNet has and a UNet has not. Must not know of the loop that asks.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mergekit_sd.errors import FamilyMismatch, UsageError, WrongFormat
from mergekit_sd.formats.diffusers.names import to_diffusers
from mergekit_sd.formats.open import open_model
from mergekit_sd.inspection.controlnets import controlnet_of
from mergekit_sd.lazy import torch
from mergekit_sd.sampling.conditions import Condition, added
from mergekit_sd.sampling.noise import CELL
from mergekit_sd.sampling.packages import quiet
from mergekit_sd.sampling.reading import read_tensors
from mergekit_sd.sampling.values import Pixels
from mergekit_sd.text import listed

if TYPE_CHECKING:
    from diffusers import ControlNetModel
    from torch import Tensor

    from mergekit_sd.sampling.networks import Networks

_PREFIX = "control_model."
_HINT = "controlnet_cond_embedding."
_TWINS = {
    r"zero_convs\.(\d+)\.0\.(.+)": "controlnet_down_blocks.{}.{}",
    r"middle_block_out\.0\.(.+)": "controlnet_mid_block.{}",
}
# LDM counts the activations between the convolutions, too.
_HINTS = {0: "conv_in", **{2 * number + 2: f"blocks.{number}" for number in range(6)}, 14: "conv_out"}
_IN_FOLDER = "diffusion_pytorch_model.safetensors"


class Control:
    """A ControlNet, the picture that it is shown, (height, width, 3), and how much and when it steers.

    `weight` multiplies what it adds; it is asked from `start` to `end`, shares of the steps, 0..1.
    Raises UsageError for a window that is empty or beyond.
    """

    def __init__(
        self, net: ControlNetModel, picture: Pixels, weight: float = 1.0, start: float = 0.0, end: float = 1.0
    ) -> None:
        if not 0 <= start < end <= 1:
            raise UsageError(
                f"A ControlNet cannot steer from {start:g} to {end:g}.",
                hint="Give shares of the steps: 0 <= start < end <= 1.",
            )
        self._net: Any = net
        self._picture = picture
        self._weight = weight
        self._window = (start, end)
        self._shown: Tensor | None = None

    def residuals(
        self, latents: Tensor, timestep: Tensor, condition: Condition, step: int, steps: int
    ) -> tuple[list[Tensor], Tensor] | None:
        """What is added for these rows at a step, counted from 0; None outside the window.

        A step belongs to the window if all of it does.
        """
        if step / steps < self._window[0] or (step + 1) / steps > self._window[1]:
            return None
        size = (latents.shape[-1] * CELL, latents.shape[-2] * CELL)
        if self._shown is None or self._shown.shape[-2:] != size[::-1]:
            self._shown = _shown(self._picture, size)
        shown = self._shown.to(latents.device, latents.dtype).expand(len(latents), -1, -1, -1)
        down, middle = self._net(
            latents,
            timestep,
            encoder_hidden_states=condition.context,
            controlnet_cond=shown,
            conditioning_scale=self._weight,
            added_cond_kwargs=added(condition, size),
            return_dict=False,
        )
        return down, middle


def _shown(picture: Pixels, size: tuple[int, int]) -> Tensor:
    """The picture in another size, (1, 3, height, width), 0..1."""
    from PIL import Image

    resized = Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None].float() / 255


def load_control(path: str | os.PathLike[str], networks: Networks) -> ControlNetModel:
    """The ControlNet of a file (LDM's or diffusers' names) or of a diffusers folder, for these networks.

    Raises WrongFormat for what is no plain ControlNet, FamilyMismatch for one of another family, and what
    opening a file raises.
    """
    place = Path(path)
    model = open_model(place / _IN_FOLDER if (place / _IN_FOLDER).is_file() else place)
    style = controlnet_of(model).style
    if style not in ("ldm", "diffusers"):
        kind = f"is a ControlNet of the kind {style}" if style else "is no ControlNet"
        raise WrongFormat(f"The file {kind}; plain ControlNets can steer.", file=model.path)
    own = any(name.startswith(_PREFIX) for name in model.tensors)
    return _net(_renamed(read_tensors(model, _PREFIX if own else "")), networks, model.path)


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In diffusers' names; names that are neither spelling's stay, to be refused."""
    if any(name.startswith(_HINT) for name in tensors):
        return dict(tensors)
    return {_twin(name): tensor for name, tensor in tensors.items()}


def _twin(name: str) -> str:
    for pattern, place in _TWINS.items():
        if found := re.fullmatch(pattern, name):
            return place.format(*found.groups())
    if found := re.fullmatch(r"input_hint_block\.(\d+)\.(.+)", name):
        return f"{_HINT}{_HINTS.get(int(found[1]), found[1])}.{found[2]}"
    twins = to_diffusers("unet", name)
    return twins[0].name if twins else name


def _net(tensors: Mapping[str, Tensor], networks: Networks, file: Path) -> ControlNetModel:
    """A ControlNet has the shape of its UNet's first half."""
    with quiet():
        from diffusers import ControlNetModel

        known = inspect.signature(ControlNetModel.__init__).parameters
        unet: Any = networks.unet
        config = {name: value for name, value in unet.config.items() if name in known}
        config["in_channels"] = 4  # what an inpainting UNet has beside, a ControlNet never sees
        make: Any = ControlNetModel
        with torch.device("meta"):
            net = make(**config)
    wanted: Mapping[str, Tensor] = net.state_dict()
    bad = sorted({*wanted} ^ {*tensors}) or [name for name in wanted if wanted[name].shape != tensors[name].shape]
    if bad:
        raise FamilyMismatch(
            f"The ControlNet does not fit the model ({networks.family}): {listed(bad[:3])}.",
            file=file,
            hint="Take one that was made for the model's family.",
            details=bad,
        )
    net.load_state_dict(
        {name: tensor.to(networks.device, networks.dtype) for name, tensor in tensors.items()}, assign=True
    )
    made: ControlNetModel = net.eval().requires_grad_(False)
    return made
