"""LoRA files made of LoRA files: merged, resized, renamed.

Owns which modules of which files meet. Must not know what becomes of their factors (`lora.joining`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mergekit_sd import architectures
from mergekit_sd.adapters.algorithms import Algorithm, check, identify
from mergekit_sd.adapters.matching import Matched, match
from mergekit_sd.adapters.names import Adapter, Module, read_adapter
from mergekit_sd.adapters.styles import BIAS_PARTS, DOWN, OFT_R, UP, Style
from mergekit_sd.adapters.targets import Layer, Target, lora_name
from mergekit_sd.architectures import Architecture, Layout, Role, detect
from mergekit_sd.errors import FamilyMismatch, UsageError, WrongFormat
from mergekit_sd.lora.joining import Joint, Piece, Work, each_module, merging, renaming, resizing
from mergekit_sd.operations.types import Key
from mergekit_sd.planning.adapters import told_of
from mergekit_sd.planning.expression import Read, Survey
from mergekit_sd.planning.lora import base_labels, report_of, rule_of
from mergekit_sd.planning.models import Model, StepReport
from mergekit_sd.recipe.load import Step
from mergekit_sd.text import count, listed

_FAMILIES = ("sd1", "sd2", "sdxl")


@dataclass(frozen=True)
class _Files:
    """LoRA files of one family: their modules by layer, and the layers' places in a whole model."""

    family: Architecture
    layout: Layout
    adapters: tuple[Adapter, ...]
    matched: tuple[Matched, ...]


def merge_loras(step: Step, operands: Mapping[str, Model], seed: int) -> tuple[Model, StepReport]:
    """One LoRA out of several, layer by layer."""
    said = step.settings
    if said["method"] != "sum" and not said["rank"]:
        raise UsageError(f'The method "{said["method"]}" needs a rank.', hint="give one: rank = 32, or --rank 32")
    files = _opened(operands)
    names = [name for name, place in files.layout.places.items() if place.role == Role.weight]
    gathered: dict[str, tuple[Layer, Target, list[tuple[Piece, list[Read]]]]] = {}
    for (label, use), matched in zip(step.loras.items(), files.matched, strict=True):
        strengths = use.strengths(files.layout, names, seed)
        for found in matched.matches:
            target = found.layer.target("weight")
            if target is None or any(each.kind == "bias" for each in found.targets):
                raise _no_sum(operands[label], found.module)
            if not _checked(operands[label], found.module).additive:
                raise _no_sum(operands[label], found.module)
            name = lora_name(found.layer, said["style"], files.family.family)
            piece = _piece(operands[label], found.module, strengths[target.tensor])
            gathered.setdefault(name, (found.layer, target, []))[2].append(
                (piece, _reads(operands[label], found.module))
            )
    joints: dict[str, Joint] = {}
    reads: dict[str, tuple[Read, ...]] = {}
    for name, (layer, target, pieces) in gathered.items():
        block = files.layout.places[target.tensor].block or layer.component
        shape = _shape(pieces[0], files.family.tensors[target.tensor].shape, target)
        joints[name] = Joint(name, shape, block, tuple(piece for piece, _ in pieces))
        reads[name] = tuple(read for _, each in pieces for read in each)
    work = merging(said["rank"], said["method"], said["density"], said["style"], seed)
    labels = base_labels(files.family)
    settings = {label: use.describe() for label, use in step.loras.items()} | dict(said)
    return _made(
        step, operands, files.layout, joints, reads, work, lambda _: labels, settings, _left_out(operands, files)
    )


def resize_lora(step: Step, operands: Mapping[str, Model], _seed: int) -> tuple[Model, StepReport]:
    """A LoRA of lower ranks."""
    said = step.settings
    rule = rule_of(said["rule"], said["amount"], said["rank"])
    (lora,) = operands.values()
    adapter = _adapter(lora)
    joints = {each.name: _alone(lora, each, each.name) for each in adapter.modules}
    reads = {each.name: tuple(_reads(lora, each)) for each in adapter.modules}
    plain = sum(joint.pieces[0].is_plain for joint in joints.values())
    others = len(joints) - plain
    notes = [f"left as they are, being no plain LoRA: {count(others, 'module')}"] if others else []
    work = resizing(rule, adapter.style)
    return _made(step, operands, lora.layout, joints, reads, work, _trained(adapter), dict(said), notes)


def rename_lora(step: Step, operands: Mapping[str, Model], _seed: int) -> tuple[Model, StepReport]:
    """A LoRA under another trainer's names."""
    style: Style = step.settings["style"]
    files = _opened(operands)
    (lora,) = operands.values()
    joints: dict[str, Joint] = {}
    reads: dict[str, tuple[Read, ...]] = {}
    for found in files.matched[0].matches:
        name = lora_name(found.layer, style, files.family.family)
        joints[name] = _alone(lora, found.module, name)
        reads[name] = tuple(_reads(lora, found.module))
    notes = _left_out(operands, files)
    labels = _trained(files.adapters[0])
    return _made(step, operands, lora.layout, joints, reads, renaming(style), labels, dict(step.settings), notes)


# --- files -------------------------------------------------------------------------------------------------


def _adapter(lora: Model) -> Adapter:
    if lora.file is None or lora.layout.kind in ("checkpoint", "unet", "vae", "text_encoder"):
        file = lora.file.path if lora.file else None
        raise WrongFormat(f'"{lora.name}" is no LoRA.', file=file, hint="`mergekit-sd inspect` tells what a file is")
    return read_adapter(lora.file)


def _opened(operands: Mapping[str, Model]) -> _Files:
    """The files, with the family that all of them are for. Raises FamilyMismatch where there is none."""
    adapters = tuple(_adapter(each) for each in operands.values())
    refused: FamilyMismatch | None = None
    for name in _FAMILIES:
        family = architectures.get(name)
        try:
            matched = tuple(match(adapter, family) for adapter in adapters)
        except FamilyMismatch as error:
            refused = refused or error
            continue
        return _Files(family, detect(family.tensors), adapters, matched)
    assert refused
    raise FamilyMismatch(
        "These LoRAs are not for models of one family." if len(adapters) > 1 else refused.message,
        file=refused.file,
        hint="`mergekit-sd inspect` tells what each is for",
        details=refused.details,
    )


def _reads(lora: Model, module: Module) -> list[Read]:
    return [Read(lora.origin, tensor) for tensor in module.parts.values()]


def _piece(lora: Model, module: Module, strength: float = 1.0) -> Piece:
    assert lora.file
    return Piece(tuple(module.parts), str(lora.file.path), module.name, strength, module.scale)


def _alone(lora: Model, module: Module, name: str) -> Joint:
    _checked(lora, module)
    if OFT_R in module.parts:
        raise _unnamed(lora, module)
    shape = _factor_shape({part: tensor.shape for part, tensor in module.parts.items()})
    return Joint(name, shape, "all", (_piece(lora, module),))


def _checked(lora: Model, module: Module) -> Algorithm:
    """A module's algorithm. Raises what is wrong with its parts, as far as headers tell, with file and module."""
    assert lora.file
    with told_of(str(lora.file.path), module.name):
        algorithm = identify(module.parts)
        shape = _factor_shape({part: tensor.shape for part, tensor in module.parts.items()})
        if shape:
            weights = {name: part for name, part in module.parts.items() if name not in BIAS_PARTS}
            check(weights, shape)
        return algorithm


def _shape(first: tuple[Piece, list[Read]], whole: tuple[int, ...], target: Target) -> tuple[int, ...]:
    """A layer's weight: as its factors say it, else as the whole model's is."""
    piece, reads = first
    if piece.is_plain:
        return _factor_shape({part: read.shape for part, read in zip(piece.parts, reads, strict=True)})
    rows = (whole[0] // target.rows[1], *whole[1:]) if target.rows else whole
    return rows[::-1] if target.transposed else rows


def _factor_shape(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """(out, in, …) as up (out, r, …) and down (r, in, …) say it; () for what has no such parts."""
    return (shapes[UP][0], *shapes[DOWN][1:]) if UP in shapes and DOWN in shapes else ()


def _no_sum(lora: Model, module: Module) -> WrongFormat:
    assert lora.file
    return WrongFormat(
        "This module cannot be merged alone.",
        file=lora.file.path,
        key=module.name,
        hint="inject the files into their base one after the other, then extract a LoRA of the result",
        details=["what it changes depends on the model that it is put into, or is a bias"],
    )


def _unnamed(lora: Model, module: Module) -> WrongFormat:
    assert lora.file
    return WrongFormat(
        "PEFT's OFT means what its adapter_config.json says: no other trainer has names for it.",
        file=lora.file.path,
        key=module.name,
        hint="inject the file into its base, then extract a LoRA of the result",
    )


def _left_out(operands: Mapping[str, Model], files: _Files) -> list[str]:
    notes = []
    for lora, matched in zip(operands.values(), files.matched, strict=True):
        if matched.unmatched:
            names = listed(each.module.name for each in matched.unmatched)
            notes.append(
                f'"{lora.name}": {count(len(matched.unmatched), "module")} of no known layer left out: {names}'
            )
    return notes


def _trained(adapter: Adapter) -> Callable[[Any], dict[str, str]]:
    """What training has said of a file stays with it, but for ranks and hashes."""
    gone = ("ss_network_dim", "ss_network_alpha", "sshs_model_hash", "sshs_legacy_hash")
    labels = {key: text for key, text in adapter.metadata.items() if key.startswith("ss") and key not in gone}
    return lambda _: labels


def _made(
    step: Step,
    operands: Mapping[str, Model],
    layout: Layout,
    joints: Mapping[str, Joint],
    reads: Mapping[str, tuple[Read, ...]],
    work: Work,
    labels: Callable[[Any], Mapping[str, str]],
    settings: dict[str, Any],
    notes: list[str],
) -> tuple[Model, StepReport]:
    from mergekit_sd.planning.values import Making

    survey = Survey(step.name, replace(step.operation, survey=each_module(joints, work)), dict(reads))
    survey.keys.update({name: Key(name) for name in joints})
    size = sum(read.tensor.nbytes for each in reads.values() for read in each)
    first = next(iter(operands.values()))
    making = Making(survey, size, labels, report_of)
    report = StepReport(
        step.name,
        step.operation.name,
        dict(step.operands),
        {},
        settings,
        merged=len(joints),
        folded=0,
        carried=0,
        kept=(),
        dropped=(),
        notes=tuple(notes),
    )
    return Model(step.name, "lora", layout, {}, first.origin, making=making), report
