"""Networks out of tensors: diffusers' UNet and VAE, transformers' text encoders, ready to compute.

Owns the modules and what else a sampler must know of a model. Must not know prompts, noise or pictures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from mergekit_sd.errors import MissingTensors, ShapeMismatch, WrongFormat
from mergekit_sd.events import CancelToken, Listener, Noted, ignore
from mergekit_sd.execute.in_memory import InMemory
from mergekit_sd.formats.diffusers.configs import Config
from mergekit_sd.lazy import torch
from mergekit_sd.operations.types import Tensor
from mergekit_sd.planning.diffusers import FolderPlan
from mergekit_sd.planning.surgery import WORDS
from mergekit_sd.planning.values import Plan
from mergekit_sd.sampling.declared import picture_size
from mergekit_sd.sampling.packages import need_packages, quiet
from mergekit_sd.sampling.tensors import as_torch, check_numbers, compute, default_dtype, plan_networks
from mergekit_sd.text import count, listed

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

_LEVEL = "text_model."  # transformers from 5.6 on has dropped it from the names of CLIPTextModel


@dataclass(frozen=True, slots=True, eq=False)
class Networks:
    """A model that can be sampled. All modules are in eval mode, and no gradients are kept.

    `architecture`: "sd1", "sd1-inpainting", …; `family`: "sd1", "sd2", "sdxl". `text_encoders`: SDXL has two,
    CLIP-L and CLIP-G. `size`: width and height that it makes by default, in pixels. `dtype`: of the UNet and
    the text encoders. `nonfinite`: how many elements are NaN or Inf, by tensor ("unet.conv_in.weight").
    """

    architecture: str
    family: str
    prediction: Literal["epsilon", "v"]
    zero_snr: bool
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoders: tuple[CLIPTextModel | CLIPTextModelWithProjection, ...]
    size: tuple[int, int]
    device: torch.device
    dtype: torch.dtype
    nonfinite: Mapping[str, int] = field(default_factory=dict)


def load_networks(
    plan: Plan,
    *,
    dtype: str | None = None,
    device: str = "cpu",
    threads: int | None = None,
    on_event: Listener = ignore,
    cancel: CancelToken | None = None,
) -> Networks:
    """Compute a plan's only output and make networks of it; nothing is written, NaN and Inf are told.

    `dtype`: "fp32", "bf16" or "fp16", None for what is fastest on the device ("cpu", "cuda", "mps").
    Raises EnvironmentFault without the packages or the device, MissingTensors or WrongFormat for what is no
    whole model, UsageError for fp16 on a CPU, Cancelled.
    """
    planned = plan_networks(plan)
    need_packages()
    dtype = dtype or default_dtype(planned, device)
    check_numbers(dtype, device)
    made = compute(planned, dtype=dtype, device=device, threads=threads, on_event=on_event, cancel=cancel)
    networks = build_networks(planned, made, dtype=dtype, device=device)
    if networks.nonfinite:
        tensors, elements = count(len(networks.nonfinite), "tensor"), count(sum(networks.nonfinite.values()), "element")
        name = plan.outputs[0].spec.model
        on_event(Noted(f'"{name}" has NaN or Inf in {tensors} ({elements}): {listed(list(networks.nonfinite))}'))
    return networks


def build_networks(planned: FolderPlan, made: Mapping[str, InMemory], *, dtype: str, device: str = "cpu") -> Networks:
    """Networks that hold a plan's tensors themselves, no copies. `dtype`, `device`: what they were made in.

    Raises MissingTensors, ShapeMismatch or WrongFormat where they do not fit the networks.
    """
    plan, output = planned.plan, planned.plan.outputs[0]
    architecture = output.layout.architecture
    assert architecture is not None
    prediction: Literal["epsilon", "v"] = "v" if output.prediction == "v" else "epsilon"
    modules = {
        component: _module(component, planned.files[f"{component}/config.json"], each.tensors, output.spec.model)
        for component, each in made.items()
    }
    return Networks(
        architecture=architecture.name,
        family=architecture.family,
        prediction=prediction,
        zero_snr=bool(planned.files["scheduler/scheduler_config.json"]["rescale_betas_zero_snr"]),
        unet=modules["unet"],
        vae=modules["vae"],
        text_encoders=tuple(modules[name] for name in modules if name.startswith("text_encoder")),
        size=picture_size(plan),
        device=torch.device(device),
        dtype=as_torch(dtype),
        nonfinite={f"{part}.{name}": n for part, each in made.items() for name, n in each.nonfinite.items()},
    )


def _module(component: str, config: Config, tensors: Mapping[str, Tensor], model: str) -> Any:
    """A component's module around its tensors."""
    try:
        with quiet(), torch.device("meta"):
            module = _empty(component, config)
    except ValueError as error:  # channels that no norm's groups divide, a width that no heads divide
        message = f'No {WORDS[component]} can be built of the widths that "{model}" has: {error}.'
        raise WrongFormat(message, hint="only models of SD1, SD2 and SDXL can be sampled") from error
    wanted: Mapping[str, Tensor] = module.state_dict()
    found = {name: tensors[name if name in tensors else _LEVEL + name] for name in wanted if _has(tensors, name)}
    _check_fits(component, wanted, found, model)
    module.load_state_dict(found, strict=True, assign=True)
    for name, buffer in module.named_buffers():
        if buffer.is_meta:  # what no file keeps: CLIP's position ids
            _fill(module, name, buffer, next(iter(found.values())).device)
    return module.eval().requires_grad_(False)


def _empty(component: str, config: Config) -> Any:
    import diffusers
    import transformers

    if component.startswith("text_encoder"):
        kind = getattr(transformers, config["architectures"][0])
        return kind(transformers.CLIPTextConfig(**config))
    return getattr(diffusers, config["_class_name"]).from_config(config)


def _has(tensors: Mapping[str, Tensor], name: str) -> bool:
    return name in tensors or _LEVEL + name in tensors


def _check_fits(component: str, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], model: str) -> None:
    missing = [name for name in wanted if name not in found]
    if missing:
        raise MissingTensors(
            f'The {WORDS[component]} of "{model}" lacks {count(len(missing), "tensor")}.',
            hint="take a whole model: `mergekit-sd inspect` tells what is in it",
            details=missing,
        )
    for name, tensor in wanted.items():
        if found[name].shape != tensor.shape:
            raise ShapeMismatch(
                f'The {WORDS[component]} of "{model}" has shape {list(found[name].shape)} where '
                f"its other tensors ask for {list(tensor.shape)}.",
                key=name,
                hint="the file is damaged, or of an unknown kind: take another",
            )


def _fill(module: Any, name: str, buffer: Tensor, device: torch.device) -> None:
    owner, _, last = name.rpartition(".")
    assert last == "position_ids", name
    ids = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape)
    module.get_submodule(owner).register_buffer(last, ids, persistent=False)
