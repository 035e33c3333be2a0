"""LoRA files in a plan: which tensors of a model they change, and by which expression.

Owns the operations that a plan makes of a file's modules. Must not know names (`adapters.matching`)
nor formulas (`adapters.algorithms`).

A difference that is only added is made whole when its tensor is due, and added piece by piece; what
needs the weight itself (DoRA, OFT, IA3, GLoRA) gets it whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mergekit_sd.adapters.algorithms import Single, apply, apply_bias, check, check_bias, delta_of, identify
from mergekit_sd.adapters.matching import Matched, match
from mergekit_sd.adapters.names import Module, read_adapter
from mergekit_sd.adapters.styles import BIAS_PARTS, DORA_SCALE, Style
from mergekit_sd.adapters.targets import Target
from mergekit_sd.architectures import Role
from mergekit_sd.errors import MergekitError, WrongFormat
from mergekit_sd.formats.dtypes import F32
from mergekit_sd.lazy import torch
from mergekit_sd.operations import OPERATIONS
from mergekit_sd.operations.planned import PAIR
from mergekit_sd.operations.types import Tensor
from mergekit_sd.planning.expression import Apply, Expression, Read
from mergekit_sd.planning.models import Model, StepReport
from mergekit_sd.recipe.load import Step
from mergekit_sd.text import count, shown

MOST_NOTED = 8  # modules that a note names


@dataclass(frozen=True, slots=True)
class Use:
    """A module's part in one tensor; `parts` names the tensors that it brings along, in their order."""

    file: str
    module: str
    parts: tuple[str, ...]
    target: Target
    strength: float
    said: Mapping[str, float]
    """Numbers of PEFT's settings that are parts, too."""
    additive: bool
    kohya_oft: bool
    rows_of_dora: bool
    """Its magnitudes are of rows whatever their shape: PEFT writes (1, out, 1, 1) for a convolution."""


def inject_loras(step: Step, operands: Mapping[str, Model], seed: int) -> tuple[Model, StepReport]:
    """The model with LoRA files in it, one after the other. `operands`: the model, then the files by label."""
    model = operands["model"]
    if model.file and model.layout.kind in ("lora", "lycoris"):
        raise WrongFormat(f'"{model.name}" is a LoRA, no model.', file=model.file.path, hint="name the model first")
    uses: dict[str, list[tuple[Use, list[Read]]]] = {}
    notes: list[str] = []
    names = [name for name in model.tensors if model.layout.places[name].role in (Role.weight, Role.unknown)]
    for label, use in step.loras.items():
        lora = operands[label]
        style, matched = matched_file(lora, model)
        notes += _notes(lora, matched)
        strengths = use.strengths(model.layout, names, seed)
        for found in matched.matches:
            for target in found.targets:
                if strengths.get(target.tensor) and target.tensor in model.tensors:
                    one = _use(
                        lora, style, found.module, target, strengths[target.tensor], model.tensors[target.tensor].shape
                    )
                    reads = [Read(lora.origin, found.module.parts[part]) for part in one.parts]
                    uses.setdefault(target.tensor, []).append((one, reads))
    changed = {name: _changed(model.tensors[name], each) for name, each in uses.items()}
    report = StepReport(
        step.name,
        step.operation.name,
        dict(step.operands),
        {},
        {label: use.describe() for label, use in step.loras.items()},
        merged=len(changed),
        folded=0,
        carried=len(model.tensors) - len(changed),
        kept=(),
        dropped=(),
        notes=tuple(notes),
    )
    return replace(model, name=step.name, tensors={**model.tensors, **changed}, file=None), report


def matched_file(lora: Model, model: Model) -> tuple[Style, Matched]:
    """A LoRA file's style, and its modules with the layers of a model that they change.

    Raises WrongFormat for another file.
    """
    if lora.file is None:
        raise WrongFormat(f'"{lora.name}" is no LoRA\'s file.', hint="name one of [models]")
    if lora.layout.kind in ("checkpoint", "unet", "vae", "text_encoder"):
        raise WrongFormat(
            f'"{lora.name}" is a {lora.layout.kind.replace("_", " ")}, no LoRA.',
            file=lora.file.path,
            hint="name the model first, then the LoRA files",
        )
    adapter = read_adapter(lora.file)
    return adapter.style, match(adapter, model.layout)


def _notes(lora: Model, matched: Matched) -> list[str]:
    """What of a file is left out, and why."""
    if not matched.unmatched:
        return []
    by_reason: dict[str, list[str]] = {}
    for each in matched.unmatched:
        by_reason.setdefault(each.why, []).append(shown(each.module.name))
    notes = []
    for why, modules in by_reason.items():
        more = f" and {len(modules) - MOST_NOTED} more" if len(modules) > MOST_NOTED else ""
        named = ", ".join(modules[:MOST_NOTED]) + more
        notes.append(f'"{lora.name}": {count(len(modules), "module")} left out, {why}: {named}')
    return notes


def _use(lora: Model, style: Style, module: Module, target: Target, strength: float, shape: tuple[int, ...]) -> Use:
    """A module's part in a tensor of that shape. Raises what is wrong with its parts, as far as headers tell."""
    of_bias = target.kind == "bias"
    parts = {name: part for name, part in module.parts.items() if (name in BIAS_PARTS) == of_bias}
    rows_of_dora = DORA_SCALE in parts and style in ("peft", "diffusers")
    if rows_of_dora:
        parts[DORA_SCALE] = replace(parts[DORA_SCALE], shape=(parts[DORA_SCALE].numel,))
    assert lora.file
    file, name = str(lora.file.path), module.name
    with told_of(file, name):
        if of_bias:
            check_bias(parts, _shape(target, shape))
        else:
            check({**parts, **dict.fromkeys(module.said, Single())}, _shape(target, shape))
        additive = of_bias or identify(parts).additive
    kohya_oft = name.startswith("oft_unet")
    return Use(file, name, tuple(parts), target, strength, module.said, additive, kohya_oft, rows_of_dora)


@contextlib.contextmanager
def told_of(file: str, module: str) -> Iterator[None]:
    """Refusals of a formula, with the file and the module that they are of."""
    try:
        yield
    except MergekitError as error:
        error.file, error.key = error.file or file, error.key or module
        raise


def _changed(weight: Expression, uses: Sequence[tuple[Use, list[Read]]]) -> Expression:
    """A tensor with all uses in it."""
    reads = tuple(read for _, each in uses for read in each)
    every = tuple(use for use, _ in uses)
    if all(use.additive for use in every):
        made = Apply(_DELTA, reads, {"uses": every, "shape": weight.shape}, weight.shape, F32)
        return Apply(PAIR, (weight, made), {"factors": (1.0, 1.0)}, weight.shape, weight.dtype)
    return Apply(_CHANGE, (weight, *reads), {"uses": every}, weight.shape, weight.dtype)


# --- what is computed ------------------------------------------------------------------------------------


def _delta(*parts: Tensor, uses: Sequence[Use], shape: tuple[int, ...], out: Any = None) -> Tensor:  # noqa: ARG001
    """The sum of what several modules add to one tensor."""
    dealt = _dealt(uses, parts)
    if len(uses) == 1 and uses[0].target == Target(uses[0].target.tensor, "weight"):  # most are: no second copy
        with told_of(uses[0].file, uses[0].module):
            return delta_of(dealt[0][1], shape).mul_(uses[0].strength)
    total = torch.zeros(shape, device=parts[0].device)
    for use, own in dealt:
        part = _part(total, use.target)
        with told_of(use.file, use.module):
            if use.target.kind == "bias":
                part.copy_(apply_bias(part, own, use.strength))
            else:
                part.add_(delta_of(own, tuple(part.shape)), alpha=use.strength)
    return total


def _change(weight: Tensor, *parts: Tensor, uses: Sequence[Use], out: Any = None) -> Tensor:  # noqa: ARG001
    """The tensor after several modules, one after the other."""
    result = weight.clone()
    for use, own in _dealt(uses, parts):
        part = _part(result, use.target)
        with told_of(use.file, use.module):
            part.copy_(apply(part, own, use.strength, kohya_oft=use.kohya_oft))
    return result


def _dealt(uses: Sequence[Use], parts: Sequence[Tensor]) -> list[tuple[Use, dict[str, Tensor]]]:
    """Each use with its own parts by name; what settings say is among them."""
    dealt = []
    rest = iter(parts)
    for use in uses:
        own = {name: next(rest) for name in use.parts}
        if use.rows_of_dora:
            own[DORA_SCALE] = own[DORA_SCALE].flatten()
        own |= {name: torch.tensor(number, device=parts[0].device) for name, number in use.said.items()}
        dealt.append((use, own))
    return dealt


def _part(whole: Tensor, target: Target) -> Tensor:
    """The rows of a tensor that a target is, as its layer has them."""
    if target.rows:
        index, of = target.rows
        size = whole.shape[0] // of
        whole = whole[index * size : (index + 1) * size]
    return whole.T if target.transposed else whole


def _shape(target: Target, whole: tuple[int, ...]) -> tuple[int, ...]:
    rows = (whole[0] // target.rows[1], *whole[1:]) if target.rows else whole
    return rows[::-1] if target.transposed else rows


_INJECT = replace(OPERATIONS["inject_lora"], operands=(), by="tensor", planned=False)
_DELTA = replace(_INJECT, function=_delta)
_CHANGE = replace(_INJECT, function=_change)
