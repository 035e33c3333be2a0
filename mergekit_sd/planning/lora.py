"""LoRA files in the making: which layers of which models they are made of, and what they say of themselves.

Owns the steps whose result is a LoRA. Must not know how factors are found (`lora.extraction`).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mergekit_sd.adapters.targets import Target, layers_of, lora_name, targets_of
from mergekit_sd.architectures import Architecture
from mergekit_sd.errors import MissingTensors, ShapeMismatch, UsageError, WrongFormat
from mergekit_sd.lora.extraction import MIB, WITH_ALPHA, Extracted, Settings, Source, extraction
from mergekit_sd.lora.ranks import Rule
from mergekit_sd.lora.report import BlockKept, by_block, total
from mergekit_sd.operations import OPERATIONS
from mergekit_sd.operations.types import Key
from mergekit_sd.planning.expression import Apply, Expression, Rows, Survey, Transposed
from mergekit_sd.planning.models import Model, StepReport, check_families
from mergekit_sd.recipe.load import Step
from mergekit_sd.text import count, listed

_BASE_VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}
_ITEMSIZE = 2  # of float16, which LoRAs are mostly written in
MOST_LISTED = 10
USUAL_AMOUNTS = {
    "threshold": 0.01,
    "ratio": 0.1,
    "quantile": 0.9,
    "norm": 0.9,
    "error": 0.3,
    "sv_ratio": 10.0,
    "sv_cumulative": 0.9,
    "sv_fro": 0.9,
}


def extract_lora(step: Step, operands: Mapping[str, Model], seed: int) -> tuple[Model, StepReport]:
    """The step's LoRA in the making, and its report."""
    from mergekit_sd.planning.values import Making

    check_families(operands)
    tuned, base = operands.values()
    settings = _settings(step.settings)
    if settings.algorithm in ("loha", "lokr") and (step.settings["rule"] != "fixed" or settings.size):
        raise UsageError(
            f"Rules and sizes are for LoRA; {settings.algorithm} takes a rank.", hint='write rule = "fixed"'
        )
    if settings.style not in WITH_ALPHA and (settings.algorithm != "lora" or step.settings["rest"] == "keep"):
        raise UsageError(f'The style "{settings.style}" has names for LoRA alone.', hint="take the style kohya")
    sources = _sources(tuned, base, settings)
    whole = _whole(tuned, base, sources, settings, rest=step.settings["rest"] == "keep")
    if settings.algorithm == "full":
        sources = {}
    operation = replace(step.operation, survey=extraction(settings, sources, seed if step.seed is None else step.seed))
    survey = Survey(step.name, operation)
    for module, source in sources.items():
        survey.operands[module] = (
            _difference(tuned.tensors[source.target.tensor], base.tensors[source.target.tensor]),
        )
        survey.keys[module] = Key(module, None, source.layer.component, source.block)
    size = sum(min(_most(settings, source), *_sides(source)) * source.cost for source in sources.values()) * _ITEMSIZE
    size += sum(math.prod(each.shape) for each in whole.values()) * _ITEMSIZE
    architecture = tuned.layout.architecture
    assert architecture is not None
    making = Making(
        survey, min(size, settings.size or size), lambda made: _labels(architecture, settings, made), report_of
    )
    report = StepReport(
        step.name,
        step.operation.name,
        dict(step.operands),
        {},
        step.settings,
        merged=len(sources) + len(whole),
        folded=0,
        carried=0,
        kept=(),
        dropped=(),
        notes=tuple(_left_out(tuned, base, settings)),
    )
    return Model(step.name, "lora", tuned.layout, whole, tuned.origin, making=making), report


def _whole(
    tuned: Model, base: Model, sources: Mapping[str, Source], settings: Settings, *, rest: bool
) -> dict[str, Expression]:
    """What is written as a whole difference: weights, if they are wanted so, and the rest: biases and norms."""
    architecture = tuned.layout.architecture
    assert architecture is not None
    found: dict[str, Expression] = {}
    for layer in layers_of(tuned.layout).every:
        module = lora_name(layer, settings.style, architecture.family)
        if layer.component != "unet" and settings.text_encoder != "keep":
            continue
        is_norm = "norm" in layer.diffusers.rpartition(".")[2]
        for target in layer.targets:
            if not all(target.tensor in model.tensors for model in (tuned, base)):
                continue
            is_weight = target.kind == "weight"
            if is_weight and module in sources and settings.algorithm == "full":
                part = "diff"
            elif rest and is_norm:
                part = "w_norm" if is_weight else "b_norm"
            elif rest and module in sources and not is_weight:
                part = "diff_b"
            else:
                continue
            _same_shape(tuned, base, target.tensor)
            one, other = (_rows(model.tensors[target.tensor], target) for model in (tuned, base))
            found[f"{module}.{part}"] = _difference(one, other)
    return found


def _difference(one: Expression, other: Expression) -> Expression:
    return Apply(OPERATIONS["subtract"], (one, other), {}, one.shape, one.dtype)


def _rows(whole: Expression, target: Target) -> Expression:
    expression = Rows(whole, *target.rows, whole.dtype) if target.rows else whole
    return Transposed(expression, whole.dtype) if target.transposed else expression


def rule_of(kind: str, amount: float, rank: int) -> Rule:
    """A rank rule as a recipe says it: `amount` 0 stands for what is usual, `rank` is the most."""
    return Rule("fixed", rank) if kind == "fixed" else Rule(kind, amount or USUAL_AMOUNTS[kind], rank)


def _settings(said: Mapping[str, Any]) -> Settings:
    return Settings(
        rule_of(said["rule"], said["amount"], said["rank"]),
        rule_of(said["rule"], said["amount"], said["conv_rank"]) if said["conv_rank"] else None,
        int(said["size_mb"] * MIB) or None,
        said["clamp"],
        said["text_encoder"],
        said["min_diff"],
        said["style"],
        algorithm=said["algorithm"],
        alone=said["rest"] == "drop",
    )


def _sources(tuned: Model, base: Model, settings: Settings) -> dict[str, Source]:
    """The layers that are extracted, by the names that the file will have for them."""
    architecture = tuned.layout.architecture
    if architecture is None:
        raise WrongFormat(
            f'What "{tuned.name}" is was not recognised, so its layers have no names in a LoRA.',
            hint="`mergekit-sd inspect` tells what is in it",
        )
    sources: dict[str, Source] = {}
    for layer in targets_of(tuned.layout, conv=settings.conv_rule is not None):
        target = layer.target("weight")
        if target is None or not all(target.tensor in model.tensors for model in (tuned, base)):
            continue
        shape = _same_shape(tuned, base, target.tensor)
        rows = (shape[0] // target.rows[1], *shape[1:]) if target.rows else shape
        module = lora_name(layer, settings.style, architecture.family)
        block = tuned.layout.places[target.tensor].block or layer.component
        source = Source(module, layer, target, block, rows[::-1] if target.transposed else rows)
        if settings.conv_rule is not None or not source.is_spatial:
            sources[module] = source
    if not sources:
        raise MissingTensors(f'"{tuned.name}" and "{base.name}" have no layers in common that a LoRA is made of.')
    return sources


def _same_shape(tuned: Model, base: Model, name: str) -> tuple[int, ...]:
    one, other = tuned.tensors[name].shape, base.tensors[name].shape
    if one != other:
        message = f'"{tuned.name}" has shape {list(one)} where "{base.name}" has {list(other)}.'
        raise ShapeMismatch(message, key=name, hint="are both of one kind? `mergekit-sd diff` shows where they differ")
    return one


def _left_out(tuned: Model, base: Model, settings: Settings) -> list[str]:
    """A note on layers that only one of the models has."""
    layers = targets_of(tuned.layout, conv=settings.conv_rule is not None)
    targets = [target for layer in layers if (target := layer.target("weight"))]
    alone = [target.tensor for target in targets if target.tensor not in base.tensors]
    if not alone:
        return []
    return [f'{count(len(alone), "layer")} that only "{tuned.name}" has are left out: {listed(alone)}']


def _most(settings: Settings, source: Source) -> int:
    rule = settings.conv_rule if source.is_spatial else settings.rule
    assert rule is not None
    return rule.limit(min(_sides(source)))


def _sides(source: Source) -> tuple[int, int]:
    return source.shape[0], source.cost - source.shape[0]


# --- what is said of it ------------------------------------------------------------------------------------


def _labels(architecture: Architecture, settings: Settings, made: Extracted) -> dict[str, str]:
    """kohya's metadata, by which the WebUI, ComfyUI and Civitai know a LoRA; all of it text."""
    ranks = Counter(each.rank for each in made.layers if each.rank and not _is_conv(each.name, made))
    rank = ranks.most_common(1)[0][0] if ranks else int(settings.rule.amount)
    arguments: dict[str, str] = {}
    if settings.conv_rule is not None:
        most = max((each.rank for each in made.layers if _is_conv(each.name, made)), default=0)
        arguments = {"conv_dim": str(most), "conv_alpha": str(float(most))}
    return base_labels(architecture) | {
        "ss_network_dim": str(rank) if len(ranks) <= 1 else "Dynamic",
        "ss_network_alpha": str(float(rank)) if len(ranks) <= 1 else "Dynamic",
        "ss_network_args": json.dumps(arguments),
    }


def base_labels(architecture: Architecture) -> dict[str, str]:
    """kohya's metadata of any LoRA for a family."""
    family = architecture.family
    return {
        "ss_v2": str(family == "sd2"),
        "ss_base_model_version": _BASE_VERSIONS.get(family, family),
        "ss_network_module": "networks.lora",
    }


def _is_conv(module: str, made: Extracted) -> bool:
    down = made.tensors.get(f"{module}.lora_down.weight")
    return down is not None and down.ndim == 4 and down.shape[-1] > 1


def report_of(made: Extracted) -> dict[str, Any]:
    """Per block the share of the change that is kept, and the layers that take most; plain data."""
    if not made.layers:
        return {"layers": 0, "unchanged": 0, "kept": None, "blocks": {}, "largest": [], "dropped": {}}
    changed = [each for each in made.layers if each.change]
    largest = sorted(made.layers, key=lambda each: -each.size)[:MOST_LISTED]
    return {
        "layers": sum(bool(each.rank) for each in made.layers),
        "unchanged": len(made.layers) - len(changed),
        "kept": total("all", made.layers).kept if changed else None,
        "blocks": {each.name: each.as_json() for each in sorted(by_block(made.layers), key=_place)},
        "largest": [each.as_json() for each in largest],
        "dropped": dict(made.dropped),
    }


def _place(block: BlockKept) -> tuple[int, str]:
    order = {"IN": 1, "M": 2, "OUT": 3}
    return order.get(block.name.rstrip("0123456789"), 0), block.name
