"""What goes into a network's blocks and what comes out, by hooks; and what comes out for another model's input.

Owns which modules make a block. A block is entered by its first module and left by its last; feeding each
block what another model's block was given tells its own change from what it inherits. Values are kept in
fp16, and a traced run computes with what is kept, so that equal models give equal numbers. Must not know
what is compared.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mergekit_sd import architectures
from mergekit_sd.formats.diffusers.names import to_ldm
from mergekit_sd.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

Half: TypeAlias = NDArray[np.float16]
LARGEST = 65504.0  # of fp16

_MODULE = re.compile(r"(?:down|up)_blocks\.\d+\.\w+\.\d+|mid_block\.\w+\.\d+|\w+")
_TEXT_LAYER = re.compile(r"(?:.+\.)?encoder\.layers\.(\d+)")
_TEXT_EMBEDDINGS = re.compile(r"(?:.+\.)?embeddings")


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """One block: the module whose input is the block's (None: the network's own), and whose output is.

    `modules` are all it has. `time`: the embeddings of the time (and of SDXL's sizes), which are outputs, too,
    and inputs of all blocks.
    """

    name: str
    entry: Module | None
    exit: Module
    modules: tuple[Module, ...]
    time: tuple[Module, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether every weight matrix and kernel of the block is 0."""
        return is_empty(*self.modules)


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """A run: each block's input where it has one of its own, and its outputs, those of the time last."""

    inputs: Mapping[str, Half]
    outputs: Mapping[str, tuple[Half, ...]]


@dataclass(frozen=True, slots=True)
class Move:
    """How far an output is from another: ‖a − b‖/‖b‖, and the cosine of the two."""

    relative: float
    cosine: float


def unet_units(unet: Module, architecture: str) -> list[Unit]:
    """The blocks of diffusers' UNet in SD's names, IN00 … M00 … OUT11, in the order in which they run."""
    known = architectures.get(architecture)
    prefix = known.components["unet"]
    slots: dict[str, dict[str, str]] = {}
    names = list(unet.state_dict())
    for theirs, twin in to_ldm("unet", names).items():
        tensor = known.tensors.get(prefix + twin.name)
        module = _MODULE.match(theirs)
        if tensor is not None and tensor.block is not None and module is not None:
            slots.setdefault(tensor.block, {}).setdefault(module[0], twin.name)
    return [_unit(unet, block, slots[block]) for block in known.blocks if block in slots]


def _unit(unet: Module, block: str, slots: Mapping[str, str]) -> Unit:
    """`slots`: the block's modules, with LDM's name of a tensor of each: its numbers count in running order."""
    embeddings = [name for name in slots if name in ("time_embedding", "add_embedding")]
    # "out." follows all "output_blocks.": LDM's names sort as the modules run.
    chain = sorted((name for name in slots if name not in embeddings), key=lambda name: _running(slots[name]))
    entry = None if embeddings else unet.get_submodule(chain[0])
    return Unit(
        block,
        entry,
        unet.get_submodule(chain[-1]),
        tuple(map(unet.get_submodule, slots)),
        tuple(map(unet.get_submodule, embeddings)),
    )


def is_empty(*modules: Module) -> bool:
    """Whether every weight matrix and kernel of the modules is 0; False where they have none."""
    weights = [each for module in modules for each in module.parameters() if each.dim() > 1]
    return bool(weights) and not any(bool(each.any()) for each in weights)


def _running(name: str) -> tuple[int, tuple[int, ...]]:
    return int(name.startswith("out.")), tuple(int(part) for part in name.split(".") if part.isdecimal())


def text_units(encoder: Module) -> list[Unit]:
    """A text encoder's embeddings and layers, in the order in which they run."""
    units = []
    for name, module in encoder.named_modules():
        if _TEXT_EMBEDDINGS.fullmatch(name):
            units.append(Unit("embeddings", None, module, (module,)))
        elif layer := _TEXT_LAYER.fullmatch(name):
            units.append(Unit(f"layer {int(layer[1]):02}", module, module, (module,)))
    return units


def follow(units: Sequence[Unit], run: Callable[[], object], given: Trace | None = None) -> Trace:
    """Run, and note every block's input and outputs; with `given`, each block gets that trace's input instead.

    A module that runs several times keeps its last run. What never runs is not in the trace.
    """
    inputs: dict[str, Half] = {}
    outputs: dict[str, dict[int, Half]] = {unit.name: {} for unit in units}

    def entering(unit: Unit) -> Callable[..., tuple[Any, Any]]:
        def hook(_: Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
            value = arguments[0] if arguments else named["hidden_states"]
            inputs[unit.name] = to_half(value) if given is None else given.inputs[unit.name]
            changed = like(inputs[unit.name], value)
            return ((changed, *arguments[1:]), named) if arguments else ((), {**named, "hidden_states": changed})

        return hook

    def leaving(unit: Unit) -> Callable[..., None]:
        def hook(_: Module, __: Any, output: Any) -> None:
            outputs[unit.name][0] = to_half(output[0] if isinstance(output, tuple) else output)

        return hook

    def embedding(unit: Unit, index: int) -> Callable[..., Tensor]:
        def hook(_: Module, __: Any, output: Tensor) -> Tensor:
            outputs[unit.name][index] = kept = to_half(output)
            return like(kept if given is None else given.outputs[unit.name][index], output)

        return hook

    with ExitStack() as hooks:
        for unit in units:
            if unit.entry is not None:
                before = unit.entry.register_forward_pre_hook(entering(unit), with_kwargs=True)
                hooks.enter_context(_removed(before))
            hooks.enter_context(_removed(unit.exit.register_forward_hook(leaving(unit))))
            for index, module in enumerate(unit.time, 1):
                hooks.enter_context(_removed(module.register_forward_hook(embedding(unit, index))))
        run()
    return Trace(inputs, {name: tuple(each[index] for index in sorted(each)) for name, each in outputs.items() if each})


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def moves(mine: Trace, theirs: Trace) -> dict[str, Move]:
    """How far each block's output is from the other trace's; the farthest of several outputs.

    Blocks of another shape, or not in both, are left out.
    """
    result = {}
    for name, outputs in mine.outputs.items():
        others = theirs.outputs.get(name, ())
        if [each.shape for each in outputs] == [each.shape for each in others]:
            found = [_move(a, b) for a, b in zip(outputs, others, strict=True)]
            result[name] = max(found, key=lambda each: each.relative)
    return result


def _move(mine: Half, theirs: Half) -> Move:
    a, b = mine.astype(np.float64).ravel(), theirs.astype(np.float64).ravel()
    size_a, size_b = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    if not size_a or not size_b:  # one gives nothing: all of it moved, or none
        return Move(float(size_a != size_b), float(size_a == size_b))
    return Move(float(np.linalg.norm(a - b)) / size_b, float(a @ b) / (size_a * size_b))


def to_half(tensor: Tensor) -> Half:
    """In fp16, what is beyond its range at its limits; NaN stays."""
    array: Half = tensor.detach().float().clamp(-LARGEST, LARGEST).half().cpu().numpy()
    return array


def like(values: Half, tensor: Tensor) -> Tensor:
    """The values on the tensor's device and in its dtype."""
    return torch.from_numpy(values).to(device=tensor.device, dtype=tensor.dtype)
