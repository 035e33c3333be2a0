"""What an output file says of itself: ModelSpec, our recipe, and A1111's merge record on request.

Owns the metadata's content. Every hash in it has a fixed width, so that the header's length is
known before the hashes are. No path of this machine and no name of the output gets in: the same
recipe and inputs give the same bytes wherever they lie.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from mergekit_sd.formats.hashing import FileHashes
from mergekit_sd.planning.values import Plan, PlannedOutput
from mergekit_sd.recipe.graph import reachable
from mergekit_sd.recipe.load import Recipe
from mergekit_sd.recipe.samplers import SAMPLERS

RECIPE_KEY = "mergekit_sd.recipe"
PROBES_KEY = "mergekit_sd.probes"  # the set of probes that means something to a model
NO_CONTENT_HASH = "0" * 32
NO_SHA256 = "0" * 64
IMPLEMENTATION = "https://github.com/Stability-AI/generative-models"
A1111_METHODS = {"weighted_sum": "Weighted sum", "add_difference": "Add difference"}


def build_metadata(
    plan: Plan, output: PlannedOutput, content: Mapping[int, str], files: Mapping[int, FileHashes]
) -> dict[str, str]:
    """The metadata of an output, given each input's content hash (and file hashes for A1111's).

    Inputs whose hash is not known yet get a placeholder of the same width.
    """
    metadata = {"format": "pt", **output.settings}
    if plan.metadata == "none":
        return metadata
    metadata |= {**_modelspec(plan, output), **output.labels}
    if probes := agreed(plan, output, PROBES_KEY):
        metadata[PROBES_KEY] = probes
    metadata[RECIPE_KEY] = canonical_json(recipe_of_output(plan, output, content))
    if plan.metadata == "webui":
        metadata |= _a1111(plan, output, files)
    return metadata


def canonical_json(value: object) -> str:
    """JSON with sorted keys and no blanks: one spelling for one value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=_plain)


def _plain(value: object) -> str:
    if isinstance(value, datetime.date):
        return value.isoformat()
    raise TypeError(type(value).__name__)


def portable(file: str) -> str:
    """A recipe's path without this machine's folders: an absolute one keeps its name only."""
    if PurePosixPath(file).is_absolute() or PureWindowsPath(file).is_absolute():
        return PureWindowsPath(file).name
    return file


def recipe_of_output(plan: Plan, output: PlannedOutput, content: Mapping[int, str]) -> dict[str, Any]:
    """The part of the recipe that this output is made by, as plain data.

    Each model carries the content hash of what was used of it; the output carries no file name.
    """
    recipe = plan.recipe
    used = reachable(recipe, [output.name])
    data: dict[str, Any] = {"recipe": 1}
    for key in ("title", "seed", "date"):
        if key in recipe.data:
            data[key] = recipe.data[key]
    numbers = {each.name: number for number, each in enumerate(plan.inputs)}
    data["models"] = {name: _model(recipe, name, content.get(numbers[name])) for name in used.models}
    if used.steps:
        data["steps"] = {name: recipe.data["steps"][name] for name in used.steps}
    entry = recipe.data["outputs"][output.name]
    data["outputs"] = {output.name: {key: value for key, value in entry.items() if key != "file"}}
    return data


def _model(recipe: Recipe, name: str, content: str | None) -> dict[str, Any]:
    reference = recipe.models[name]
    entry = {"file": portable(reference.file), "content": content or NO_CONTENT_HASH}
    if reference.weights != "file":
        entry["weights"] = reference.weights
    if reference.sha256:
        entry["sha256"] = reference.sha256
    return entry


def _modelspec(plan: Plan, output: PlannedOutput) -> dict[str, str]:
    """ModelSpec 1.0.1; a parent's title or hashes are never inherited. Unknown layouts get none."""
    architecture = output.layout.architecture
    if architecture is None:
        return {}
    parents = sorted(plan.inputs[number].name for number in output.reads())  # the order in the file is no matter
    published, resolution = architecture.published_as("epsilon" if output.prediction == "epsilon" else None)
    fields = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{published}/lora" if output.making else published,
        "implementation": IMPLEMENTATION,
        "title": plan.recipe.title or output.name,
        "resolution": _size(output) or agreed(plan, output, "modelspec.resolution") or f"{resolution}x{resolution}",
        "merged_from": ", ".join(PureWindowsPath(plan.recipe.models[name].file).name for name in parents),
    }
    if output.prediction:
        fields["prediction_type"] = output.prediction
    if plan.recipe.date:
        fields["date"] = str(plan.recipe.date)
    if hint := sampling_hint(output.spec.sampling) or agreed(plan, output, "modelspec.usage_hint"):
        fields["usage_hint"] = hint
    return {f"modelspec.{name}": value for name, value in fields.items()}


def _size(output: PlannedOutput) -> str | None:
    size = (output.spec.sampling or {}).get("size")
    return f"{size[0]}x{size[1]}" if size else None


def agreed(plan: Plan, output: PlannedOutput, key: str) -> str | None:
    """What all models say that the UNet is made of: a merge of equals, or a LoRA, is sampled as they are."""
    used = {read.input for tensor in output.tensors if tensor.component == "unet" for read in tensor.reads}
    models = [plan.inputs[number] for number in used]
    said = {each.file.metadata.get(key) for each in models if each.layout.kind in ("checkpoint", "unet")}
    return said.pop() if len(said) == 1 else None


def sampling_hint(sampling: Mapping[str, Any] | None) -> str | None:
    """Settings as people read them, in the words of the WebUI's infotext."""
    if not sampling:
        return None
    words: dict[str, Callable[[Any], str]] = {
        "steps": lambda value: f"Steps: {value}",
        "sampler": lambda value: f"Sampler: {SAMPLERS[value].label}",
        "cfg": lambda value: f"CFG scale: {value:g}",
        "size": lambda value: f"Size: {value[0]}x{value[1]}",
        "clip_skip": lambda value: f"Clip skip: {value}",
    }
    return ", ".join(say(sampling[name]) for name, say in words.items() if name in sampling)


def _a1111(plan: Plan, output: PlannedOutput, files: Mapping[int, FileHashes]) -> dict[str, str]:
    """`sd_merge_recipe` and `sd_merge_models` as the WebUI's checkpoint merger writes them."""
    used = reachable(plan.recipe, [output.name])
    steps = [plan.recipe.steps[name] for name in used.steps]
    by_name = {each.name: number for number, each in enumerate(plan.inputs)}
    merged = {output.spec.model, *(name for step in steps for name in step.operands.values())}
    parents = sorted(used.models, key=lambda name: (name not in merged, name))  # a VAE that is baked comes last
    if len(steps) == 1:  # A1111's own order: primary, secondary, tertiary
        operands = [name for name in steps[0].operands.values() if name in by_name]
        parents = operands + [name for name in parents if name not in operands]
    hashes = {n: files[by_name[n]].sha256 if by_name[n] in files else NO_SHA256 for n in parents}
    first, second, third = ([hashes[name] for name in parents if name in merged] + [None] * 3)[:3]
    alpha = steps[0].parameters["alpha"].describe() if len(steps) == 1 and "alpha" in steps[0].parameters else None
    vae = output.spec.vae
    channels = output.layout.architecture.name if output.layout.architecture else ""
    recipe = {
        "type": "mergekit-sd",
        "primary_model_hash": first,
        "secondary_model_hash": second,
        "tertiary_model_hash": third,
        "interp_method": " > ".join(A1111_METHODS.get(step.operation.name, step.operation.name) for step in steps)
        or "No interpolation",
        "multiplier": alpha if isinstance(alpha, float | int) else None,
        "save_as_half": output.spec.dtype_of("unet") == "fp16",
        "custom_name": plan.recipe.title or output.name,
        "config_source": 0,
        "bake_in_vae": portable(plan.recipe.models[vae].file) if vae in plan.recipe.models else "None",
        "discard_weights": "",
        "is_inpainting": channels.endswith("inpainting"),
        "is_instruct_pix2pix": channels.endswith("pix2pix"),
    }
    models: dict[str, Any] = {}
    for name, sha256 in hashes.items():
        models |= _parent(plan, by_name[name], sha256, files.get(by_name[name]))
    return {"sd_merge_recipe": canonical_json(recipe), "sd_merge_models": canonical_json(models)}


def _parent(plan: Plan, number: int, sha256: str, hashes: FileHashes | None) -> dict[str, Any]:
    source = plan.inputs[number]
    recipe, models = (_parsed(source.file.metadata.get(key)) for key in ("sd_merge_recipe", "sd_merge_models"))
    entry = {
        "name": portable(plan.recipe.models[source.name].file),
        "legacy_hash": hashes.auto_v1 if hashes else "0" * 8,
        "sd_merge_recipe": recipe,
    }
    return {**(models if isinstance(models, dict) else {}), sha256: entry}


def _parsed(text: str | None) -> Any:
    try:
        return json.loads(text) if text else None
    except ValueError:
        return None
