"""LoRA files joined, made smaller, renamed: module by module, out of their parts.

Owns what becomes of a module's factors. Must not know files or plans: it gets the parts of each
module from a survey, on threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from mergekit_sd.adapters.algorithms import delta_of
from mergekit_sd.adapters.algorithms.parts import SETTINGS, scale
from mergekit_sd.adapters.styles import DOWN, UP, Style, key_of
from mergekit_sd.errors import MissingTensors, NonFiniteResult
from mergekit_sd.lazy import torch
from mergekit_sd.lora.extraction import WITH_ALPHA, Extracted, named
from mergekit_sd.lora.factors import Factors, concatenate, decompose, from_shape, resize, split
from mergekit_sd.lora.ranks import Rule
from mergekit_sd.lora.report import ModuleKept
from mergekit_sd.lora.svd import truncated_svd
from mergekit_sd.operations import OPERATIONS
from mergekit_sd.operations.draws import Draw
from mergekit_sd.operations.survey import Models
from mergekit_sd.operations.types import Key, Tensor
from mergekit_sd.text import listed

Method: TypeAlias = Literal["sum", "ties", "dare"]
ITEMSIZE = 2  # bytes of a value, for reports
NOTHING = 1e-6  # of what is added up: a sum that is smaller is rounding


@dataclass(frozen=True, slots=True)
class Piece:
    """A file's module: the names of its parts, in the order in which they are read, and its strength.

    `file` and `module` are for refusals. `scale` stands for alpha/rank where settings say it.
    """

    parts: tuple[str, ...]
    file: str
    module: str
    strength: float = 1.0
    scale: float | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it is an up and a down factor and nothing else."""
        return set(self.parts) - SETTINGS == {DOWN, UP}


@dataclass(frozen=True, slots=True)
class Joint:
    """A layer that one or more files change: its name in the result, its weight's shape, where it is."""

    module: str
    shape: tuple[int, ...]
    block: str
    pieces: tuple[Piece, ...]


Work: TypeAlias = Callable[[Joint, list[dict[str, Tensor]]], tuple[dict[str, Tensor], ModuleKept | None]]


def each_module(joints: Mapping[str, Joint], work: Work) -> Callable[[Models], Extracted]:
    """A survey that does `work` on every joint, given the parts of its pieces by name."""

    def survey(models: Models) -> Extracted:
        by_key = {models.keys[name]: joint for name, joint in joints.items()}

        def one(key: Key, operands: tuple[Tensor, ...]) -> tuple[dict[str, Tensor], ModuleKept | None]:
            return work(by_key[key], _dealt(by_key[key], operands))

        tensors: dict[str, Tensor] = {}
        kept: list[ModuleKept] = []
        for made, told in models.map(one, joints):
            tensors |= made
            kept += [told] if told else []
        if not tensors:
            raise MissingTensors(
                "There is nothing to write: the changes cancel each other.", hint="check the strengths"
            )
        return Extracted(tensors, tuple(kept))

    return survey


def _dealt(joint: Joint, operands: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    rest = iter(operands)
    dealt = [{name: next(rest) for name in piece.parts} for piece in joint.pieces]
    for parts, piece in zip(dealt, joint.pieces, strict=True):
        if piece.scale is not None:
            parts["scale"] = torch.tensor(piece.scale)
    return dealt


# --- merging ---------------------------------------------------------------------------------------------


def merging(rank: int, method: Method, density: float, style: Style, seed: int) -> Work:
    """The sum of the changes, or what TIES or DARE make of them; rank 0: exact."""

    def work(joint: Joint, parts: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], ModuleKept]:
        draw = Draw(seed, joint.module)
        if method == "sum" and all(piece.is_plain for piece in joint.pieces):
            pairs = [(_factors_of(p, piece), piece.strength) for p, piece in zip(parts, joint.pieces, strict=True)]
            whole = concatenate(pairs)
            change = math.sqrt(decompose(whole).energy)
            if change <= NOTHING * sum(math.sqrt(decompose(each).energy) * abs(strength) for each, strength in pairs):
                return {}, ModuleKept(joint.module, joint.block, 0, 0, 0.0, 1.0)
            factors, kept = (resized(whole, Rule("fixed", rank))) if rank else (whole, 1.0)
        else:
            dense = _dense(joint, parts, method, density, draw)
            found = truncated_svd(dense, rank or min(dense.shape), draw=draw)
            factors, change = split(found), math.sqrt(found.energy)
            kept = math.sqrt(min(1.0, float(found.s.square().sum()) / found.energy)) if found.energy else 1.0
        return named(joint.module, factors, joint.shape, style), _told(joint, factors, change, kept)

    return work


def _dense(joint: Joint, parts: list[dict[str, Tensor]], method: Method, density: float, draw: Draw) -> Tensor:
    changes = [delta_of(each, joint.shape).flatten(1) for each in parts]
    strengths = tuple(piece.strength for piece in joint.pieces)
    zeros = torch.zeros_like(changes[0])
    if method == "ties":
        made: Tensor = OPERATIONS["ties"].function(zeros, tuple(changes), weights=strengths, density=density)
        return made
    if method == "dare":
        dropped: Tensor = OPERATIONS["dare_linear"].function(
            zeros, tuple(changes), weights=strengths, density=density, draw=draw
        )
        return dropped
    for strength, change in zip(strengths, changes, strict=True):
        zeros.add_(change, alpha=strength)
    return zeros


# --- resizing, renaming ------------------------------------------------------------------------------------


def resizing(rule: Rule, style: Style) -> Work:
    """Plain factors at the rank that a rule asks for; what is none stays as it is."""

    def work(joint: Joint, parts: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], ModuleKept | None]:
        if not joint.pieces[0].is_plain:
            return {key_of(joint.module, part, style): tensor for part, tensor in parts[0].items()}, None
        whole = _factors_of(parts[0], joint.pieces[0])
        factors, kept = resized(whole, replace(rule, most=min(rule.most or whole.rank, whole.rank)))
        change = math.sqrt(decompose(whole).energy)
        return named(joint.module, factors, joint.shape, style), _told(joint, factors, change, kept)

    return work


def renaming(style: Style) -> Work:
    """The same parts under a style's names; alpha goes into up where the style has none."""

    def work(joint: Joint, parts: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], None]:
        own = dict(parts[0])
        if UP in own and style not in WITH_ALPHA:
            own[UP] = own[UP] * scale(own, len(own[DOWN]))
            own = {name: tensor for name, tensor in own.items() if name not in SETTINGS}
        elif "scale" in own and "alpha" not in own and DOWN in own:
            own["alpha"] = own.pop("scale") * len(own[DOWN])
        return {key_of(joint.module, part, style): tensor for part, tensor in own.items()}, None

    return work


def _factors_of(parts: Mapping[str, Tensor], piece: Piece) -> Factors:
    """A plain LoRA's factors, with alpha/rank as their scale. Raises NonFiniteResult for NaN and Inf."""
    bad = [name for name, tensor in parts.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise NonFiniteResult(
            f"NaN or Inf in {listed(bad)} of this module; nothing was written.",
            file=piece.file,
            key=piece.module,
            hint="the file is damaged: `mergekit-sd inspect --scan` lists every such tensor",
        )
    return from_shape(parts[UP], parts[DOWN], scale(parts, len(parts[DOWN])))


def resized(whole: Factors, rule: Rule) -> tuple[Factors, float]:
    """The factors at a rule's rank, and the share of the change's norm that they keep."""
    factors, parts = resize(whole, rule)
    energy = parts.energy
    share = float(parts.s[: factors.rank].square().sum()) / energy if energy else 1.0
    return factors, math.sqrt(min(1.0, share))


def _told(joint: Joint, factors: Factors, change: float, kept: float) -> ModuleKept:
    size = (factors.up.numel() + factors.down.numel()) * ITEMSIZE
    return ModuleKept(joint.module, joint.block, factors.rank, size, change, kept)
