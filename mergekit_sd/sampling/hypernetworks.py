"""Hypernetworks: small nets before a UNet's keys and values, put there for a time.

Owns how a file's nets are computed. Must not know prompts, which say the multipliers.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_sd.errors import FamilyMismatch, WrongFormat
from mergekit_sd.formats.open import open_model
from mergekit_sd.inspection.hypernetworks import hypernetwork_of
from mergekit_sd.lazy import torch
from mergekit_sd.sampling.reading import read_tensors
from mergekit_sd.text import listed, shown

if TYPE_CHECKING:
    from torch import Tensor

# The WebUI's names of activations that torch calls otherwise; all others are torch.nn's, in lower case.
_OWN = {"swish": "Hardswish", "linear": "Identity"}
_NAME = re.compile(r"^(\d+)\.([01])\.linear\.?(\d+)\.(weight|bias)$")  # old files: linear1, linear2
_SIDES = ("to_k", "to_v")


@dataclass(frozen=True, slots=True)
class Layer:
    """A linear layer, (out, in), or a layer norm, (width,); `activated` where the activation follows."""

    weight: Tensor
    bias: Tensor | None
    activated: bool


@dataclass(frozen=True, slots=True, eq=False)
class Hypernetwork:
    """Nets for keys and for values, by the width of what they change, float32."""

    name: str
    nets: Mapping[int, tuple[Sequence[Layer], Sequence[Layer]]]
    activation: Callable[[Tensor], Tensor]

    def changed(self, x: Tensor, side: int, multiplier: float) -> Tensor:
        """x + net(x) · multiplier; `x` (rows, tokens, width), `side` 0 for keys and 1 for values."""
        nets = self.nets.get(x.shape[-1])
        if nets is None:
            return x
        made = x.float()
        for layer in nets[side]:
            weight, bias = layer.weight.to(x.device), None if layer.bias is None else layer.bias.to(x.device)
            if weight.ndim == 2:
                made = torch.nn.functional.linear(made, weight, bias)
            else:
                made = torch.nn.functional.layer_norm(made, weight.shape, weight, bias)
            made = self.activation(made) if layer.activated else made
        return (x.float() + made * multiplier).to(x.dtype)


def load_hypernetwork(path: str | Path) -> Hypernetwork:
    """Read one. Raises WrongFormat for what is none or has an activation that torch has not."""
    model = open_model(path)
    said = hypernetwork_of(model)
    found: dict[tuple[int, int], dict[int, dict[str, Tensor]]] = {}
    for name, tensor in read_tensors(model).items():
        if match := _NAME.match(name):
            place = found.setdefault((int(match[1]), int(match[2])), {})
            place.setdefault(int(match[3]), {})[match[4]] = tensor.float()
    widths = sorted({width for width, _ in found})
    missing = [f"{width}.{side}" for width in widths for side in (0, 1) if (width, side) not in found]
    if not widths or missing:
        message = f"The hypernetwork lacks {listed(missing)}." if missing else "This is no hypernetwork."
        raise WrongFormat(message, file=model.path, hint="take another file")
    for (width, _), net in found.items():
        _check_fits(net, width, model.path)
    nets = {
        width: (_layers(found[width, 0], said.activates_output), _layers(found[width, 1], said.activates_output))
        for width in widths
    }
    return Hypernetwork(Path(path).stem, nets, _activation(said.activation, model.path))


def _check_fits(net: Mapping[int, Mapping[str, Tensor]], width: int, file: Path) -> None:
    """Each layer must take what the one before it gives, the first and the last the width itself."""
    given = width
    for number, layer in sorted(net.items()):
        shape = tuple(layer["weight"].shape) if "weight" in layer else ()
        fits = len(shape) in (1, 2) and shape[-1] == given
        given = shape[0] if fits else given
        if not fits or ("bias" in layer and tuple(layer["bias"].shape) != (given,)):
            message = f"Layer {number} of the hypernetwork's net for the width {width} has shapes that do not fit."
            raise WrongFormat(message, file=file, hint="take another file")
    if given != width:
        message = f"The hypernetwork's net for the width {width} gives {given}."
        raise WrongFormat(message, file=file, hint="take another file")


def _layers(found: Mapping[int, Mapping[str, Tensor]], activates_output: bool) -> list[Layer]:
    linear = [number for number in sorted(found) if found[number]["weight"].ndim == 2]
    return [
        Layer(each["weight"], each.get("bias"), number in linear and (number != linear[-1] or activates_output))
        for number, each in sorted(found.items())
    ]


def _activation(name: str | None, file: Path) -> Callable[[Tensor], Tensor]:
    if name in (None, "", "None"):
        name = "linear"
    kinds = {kind.lower(): kind for kind in vars(torch.nn.modules.activation)["__all__"]} | {"identity": "Identity"}
    try:
        made = getattr(torch.nn, kinds[_OWN.get(str(name), str(name)).lower()])().eval()
        usable = made(torch.zeros(1, 2)).shape == (1, 2)
    except (KeyError, TypeError, RuntimeError):  # unknown, or one that needs numbers that no file says
        usable = False
    if not usable:
        message = f'The hypernetwork\'s activation "{shown(str(name))}" is not known.'
        raise WrongFormat(message, file=file, hint="take another file")
    found: Callable[[Tensor], Tensor] = made
    return found


@contextlib.contextmanager
def applied(unet: Any, uses: Sequence[tuple[Hypernetwork, float]]) -> Iterator[None]:
    """Around a computation: every key and value is made of what the nets changed, one hypernetwork after the other.

    Afterwards the UNet is as before, to the bit. Raises FamilyMismatch for nets of which none fits.
    """
    widths = {m.in_features for name, m in unet.named_modules() if name.endswith(_SIDES)}
    for each, _ in uses:
        if not widths & set(each.nets):
            message = f'The hypernetwork "{shown(each.name)}" is for the widths {listed(map(str, each.nets))}.'
            raise FamilyMismatch(message, hint=f"the model has {listed(map(str, sorted(widths)))}: take its family's")

    def hook(side: int) -> Callable[[Any, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        def before(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = inputs[0]
            for each, multiplier in uses:
                if multiplier:
                    x = each.changed(x, side, multiplier)
            return (x, *inputs[1:])

        return before

    hooks = [
        module.register_forward_pre_hook(hook(_SIDES.index(name.rpartition(".")[2])))
        for name, module in unet.named_modules()
        if name.endswith(_SIDES)
    ]
    try:
        yield
    finally:
        for each_hook in hooks:
            each_hook.remove()
