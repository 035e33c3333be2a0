"""A planned checkpoint as the files of a diffusers folder: one output for each component, and its configuration.

Owns which tensors go where, renamed, divided or transposed. Must not know how a folder is written.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mergekit_sd.architectures import Architecture
from mergekit_sd.errors import MissingTensors, ShapeMismatch, WrongFormat
from mergekit_sd.formats.diffusers.configs import (
    PIPELINES,
    POOLED,
    SD2_TEXT_LAYERS,
    Config,
    Shapes,
    model_index,
    scheduler_config,
    text_config,
    unet_config,
    vae_config,
)
from mergekit_sd.formats.diffusers.names import Part, Twin, to_diffusers
from mergekit_sd.formats.tensor import TensorInfo
from mergekit_sd.planning.expression import Expression, Read, Rows, Transposed
from mergekit_sd.planning.surgery import WORDS
from mergekit_sd.planning.values import Plan, PlannedOutput, PlannedTensor
from mergekit_sd.text import listed

# By family: each component's folder is called as the component is, and has tensors of this kind.
PARTS: Mapping[str, Mapping[str, Part]] = {
    "sd1": {"unet": "unet", "vae": "vae", "text_encoder": "clip"},
    "sd2": {"unet": "unet", "vae": "vae", "text_encoder": "openclip"},
    "sdxl": {"unet": "unet", "vae": "vae", "text_encoder": "clip", "text_encoder_2": "openclip"},
}
LATENT_PIXELS = 8  # of the picture, for each of the latents, on a side
_SD2_UNUSED = (f"text_model.encoder.layers.{SD2_TEXT_LAYERS}.", "text_projection.")


@dataclass(frozen=True)
class FolderPlan:
    """A folder before it exists: its outputs by component, and its small files by their path, as plain data.

    `pads`: by tokenizer folder, whether it pads with the end mark (CLIP's) rather than with id 0 (OpenCLIP's).
    `left_out`: the model's tensors that diffusers makes itself or has no place for.
    """

    plan: Plan
    outputs: Mapping[str, PlannedOutput]
    files: Mapping[str, Config]
    pads: Mapping[str, bool]
    left_out: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """The size of the weights."""
        return sum(tensor.info.nbytes for each in self.outputs.values() for tensor in each.tensors)

    @property
    def weights(self) -> tuple[str, ...]:
        """The paths of the files of weights in the folder."""
        return tuple(each.path.as_posix() for each in self.outputs.values())

    def within(self, place: Path) -> Plan:
        """The plan that writes the weights below a folder."""
        outputs = (replace(each, path=place / each.path) for each in self.outputs.values())
        return replace(self.plan, outputs=tuple(outputs))


def plan_folder(plan: Plan, component: str | None = None) -> FolderPlan:
    """The folder of a plan's only output, or of one of its components: that one's files then lie on top.

    Raises WrongFormat for what is no SD1, SD2 or SDXL, MissingTensors for one that is not whole.
    """
    output = plan.outputs[0]
    architecture = output.layout.architecture
    if architecture is None or architecture.name not in PIPELINES or output.making:
        what = architecture.title if architecture else "This"
        message = f"{what} cannot be written as a folder of diffusers."
        raise WrongFormat(message, hint="only whole models of SD1, SD2 and SDXL can")
    parts = PARTS[architecture.family]
    tensors = {name: _component(output, architecture, name, part) for name, part in parts.items()}
    _check_whole(output, tensors, [component] if component else list(parts))
    configs = _configs(output, architecture, tensors, [component] if component else list(parts))
    if component:
        outputs = {component: _output(output, component, Path(), tensors[component])}
        return FolderPlan(plan, outputs, {"config.json": configs[component]}, {})
    outputs = {name: _output(output, name, Path(name), tensors[name]) for name in parts}
    files = {f"{name}/config.json": config for name, config in configs.items()}
    encoders = [name for name in parts if name.startswith("text_encoder")]
    scheduler = _scheduler(output, architecture)
    files["scheduler/scheduler_config.json"] = scheduler
    classes = {name: configs[name]["architectures"][0] for name in encoders}
    files["model_index.json"] = model_index(architecture.name, classes, scheduler["_class_name"])
    pads = {name.replace("text_encoder", "tokenizer"): parts[name] == "clip" for name in encoders}
    return FolderPlan(plan, outputs, files, pads, _left_out(output, architecture, parts))


def _left_out(output: PlannedOutput, architecture: Architecture, parts: Mapping[str, Part]) -> tuple[str, ...]:
    """The tensors of which `_component` makes nothing, the schedule last."""

    def has_place(tensor: PlannedTensor) -> bool:
        component = tensor.component or ""
        return component in parts and bool(_twins(output, architecture, tensor, component, parts[component]))

    ordered = sorted(output.tensors, key=lambda each: each.component is None)
    return tuple(tensor.info.name for tensor in ordered if not has_place(tensor))


def _check_whole(
    output: PlannedOutput, tensors: Mapping[str, Collection[PlannedTensor]], wanted: Collection[str]
) -> None:
    missing = [WORDS[name] for name in wanted if not tensors.get(name)]
    if missing:
        raise MissingTensors(
            f'"{output.spec.model}" has no {listed(missing)}.',
            hint="put it in first (bake-vae), or write one component: --component",
        )


def _output(output: PlannedOutput, component: str, place: Path, tensors: tuple[PlannedTensor, ...]) -> PlannedOutput:
    stem = "model" if component.startswith("text") else "diffusion_pytorch_model"
    spec = replace(output.spec, name=component)
    return replace(output, spec=spec, path=place / f"{stem}.safetensors", tensors=tensors, dropped={}, size=0)


# --- tensors ------------------------------------------------------------------------------------------


def _component(
    output: PlannedOutput, architecture: Architecture, component: str, part: Part
) -> tuple[PlannedTensor, ...]:
    """The tensors of a component as diffusers has them, those that it has no place for left out."""
    return tuple(
        _as_twin(tensor, twin)
        for tensor in output.tensors
        if tensor.component == component
        for twin in _twins(output, architecture, tensor, component, part)
    )


def _twins(
    output: PlannedOutput, architecture: Architecture, tensor: PlannedTensor, component: str, part: Part
) -> list[Twin]:
    """Where diffusers has a tensor of the component: nowhere, once, or in several parts."""
    prefix = output.layout.prefix_of(component) or architecture.components[component]
    return [
        twin
        for twin in to_diffusers(part, tensor.info.name.removeprefix(prefix))
        if not twin.name.endswith(".position_ids")  # transformers makes these itself
        and not (architecture.family == "sd2" and twin.name.startswith(_SD2_UNUSED))
    ]


def _as_twin(tensor: PlannedTensor, twin: Twin) -> PlannedTensor:
    expression = tensor.expression
    if twin.rows:
        expression = _rows(tensor, *twin.rows)
    elif twin.transposed:
        expression = Transposed(expression, expression.dtype)
    shape = expression.shape
    if twin.name.endswith(_LINEAR) and shape[2:] == (1, 1):
        shape = shape[:2]
    how = tensor.how if isinstance(expression, Read) else "merged"
    nbytes = math.prod(shape) * tensor.info.dtype.itemsize
    return PlannedTensor(TensorInfo(twin.name, tensor.info.dtype, shape, 0, nbytes), how, expression, tensor.component)


# The VAE's attention: linear layers in diffusers, 1x1 convolutions in LDM. (The UNet's have attn1 or attn2 before it.)
_LINEAR = tuple(f"mid_block.attentions.0.{name}.weight" for name in ("to_q", "to_k", "to_v", "to_out.0"))


def _rows(tensor: PlannedTensor, index: int, of: int) -> Expression:
    """A share of a tensor's rows; what is only copied stays so: it is a stretch of the file's bytes."""
    expression = tensor.expression
    if not expression.shape or expression.shape[0] % of:
        message = (
            f"The tensor holds query, key and value, but its shape {list(expression.shape)} is no multiple of {of}."
        )
        raise ShapeMismatch(message, key=tensor.info.name, hint="the file is damaged: take another")
    if not isinstance(expression, Read):
        return Rows(expression, index, of, expression.dtype)
    whole = expression.tensor
    nbytes = whole.nbytes // of
    shape = (whole.shape[0] // of, *whole.shape[1:])
    name = f"{whole.name}[{index + 1} of {of}]"
    return Read(expression.input, TensorInfo(name, whole.dtype, shape, whole.offset + index * nbytes, nbytes))


# --- configurations -----------------------------------------------------------------------------------


def _configs(
    output: PlannedOutput,
    architecture: Architecture,
    tensors: Mapping[str, tuple[PlannedTensor, ...]],
    wanted: Collection[str],
) -> dict[str, Config]:
    """Each component's `config.json`."""
    family = architecture.family
    shapes: dict[str, Shapes] = {n: {each.info.name: each.info.shape for each in made} for n, made in tensors.items()}
    pixels = architecture.published_as("epsilon" if output.prediction == "epsilon" else None)[1]
    pooled = shapes.get("text_encoder_2", {}).get("text_projection.weight", (POOLED,))[0]
    configs: dict[str, Config] = {}
    for name in wanted:
        if name == "unet":
            size, v = pixels // LATENT_PIXELS, output.prediction == "v"
            configs[name] = unet_config(shapes[name], family, size=size, v=v, pooled=pooled)
        elif name == "vae":
            configs[name] = vae_config(shapes[name], family, size=pixels)
        else:
            configs[name] = text_config(shapes[name], openclip=PARTS[family][name] == "openclip")
    return configs


def _scheduler(output: PlannedOutput, architecture: Architecture) -> Config:
    zero_snr = any(tensor.info.name == "ztsnr" for tensor in output.tensors)
    return scheduler_config(architecture.family, v=output.prediction == "v", zero_snr=zero_snr)
