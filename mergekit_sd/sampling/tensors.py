"""A plan's model as tensors in memory, by component and diffusers' names.

Owns which numbers a model is sampled in. Must not know modules or pictures.
"""

from __future__ import annotations

import platform
from dataclasses import replace

from mergekit_sd.errors import EnvironmentFault, MissingTensors, UsageError, WrongFormat
from mergekit_sd.events import CancelToken, Event, Listener, Progressed, ignore
from mergekit_sd.execute.in_memory import InMemory, compute_in_memory
from mergekit_sd.formats.diffusers.configs import PIPELINES
from mergekit_sd.formats.dtypes import OUTPUT_DTYPES, Dtype
from mergekit_sd.lazy import torch
from mergekit_sd.planning.diffusers import PARTS, FolderPlan, plan_folder
from mergekit_sd.planning.surgery import WORDS
from mergekit_sd.planning.values import Plan
from mergekit_sd.text import listed

DTYPES = ("fp32", "bf16", "fp16")
SMALL = 100_000_000  # parameters of a UNet: below, bf16's conversions cost more than it saves


def plan_networks(plan: Plan) -> FolderPlan:
    """The components that a plan's only output is sampled with.

    Raises WrongFormat for what is no whole SD1, SD2 or SDXL, MissingTensors where a component is not there.
    """
    output = plan.outputs[0]
    architecture, name = output.layout.architecture, output.spec.model
    if architecture is None or architecture.name not in PIPELINES or output.making:
        what = f", {architecture.title}," if architecture else ""
        message = f'"{name}"{what} cannot be sampled.'
        raise WrongFormat(message, hint="only models of SD1, SD2 and SDXL can")
    there = {tensor.component for tensor in output.tensors}
    missing = [component for component in PARTS[architecture.family] if component not in there]
    if missing == ["vae"]:
        raise MissingTensors(f'"{name}" has no VAE.', hint="give one: --vae FILE")
    if missing:
        words = listed([WORDS[component] for component in missing])
        hint = 'take a whole model, or put them in first: op = "replace"'
        raise MissingTensors(f'"{name}" has no {words}: no pictures can be made of it.', hint=hint)
    return plan_folder(plan)


def compute(
    planned: FolderPlan,
    *,
    dtype: str,
    device: str = "cpu",
    threads: int | None = None,
    on_event: Listener = ignore,
    cancel: CancelToken | None = None,
) -> dict[str, InMemory]:
    """Every component's tensors in `dtype` ("fp32", "bf16", "fp16"; the VAE's see `vae_dtype`), on a device.

    One copy of the weights is all the memory that it takes. NaN and Inf are counted. Tells one progress under
    the output's name. Raises Cancelled, and what reading raises.
    """
    name, total, done = planned.plan.outputs[0].name, planned.bytes, 0
    found = {}
    for component, output in planned.outputs.items():

        def tell(event: Event, done: int = done) -> None:
            if isinstance(event, Progressed):
                event = replace(event, output=name, done=done + event.done, bytes=total)
            on_event(event)

        wanted = OUTPUT_DTYPES[vae_dtype(dtype) if component == "vae" else dtype]
        made = compute_in_memory(planned.plan, output, wanted, threads=threads, on_event=tell, cancel=cancel)
        if device != "cpu":  # one component after the other, so that no second model is held
            made = replace(made, tensors={key: tensor.to(device) for key, tensor in made.tensors.items()})
        found[component] = made
        done += sum(tensor.info.nbytes for tensor in output.tensors)
    return found


# --- dtypes and devices ---------------------------------------------------------------------------------


def default_dtype(planned: FolderPlan, device: str = "cpu") -> str:
    """What is fastest without harm: fp16 on a GPU; on a CPU bf16 where it computes in it, but for small models."""
    if device != "cpu":
        return "fp16"
    parameters = sum(tensor.info.numel for tensor in planned.outputs["unet"].tensors)
    return "bf16" if parameters >= SMALL and has_native_bf16() else "fp32"


def vae_dtype(dtype: str) -> str:
    """A VAE's dtype beside a UNet's: never fp16, in which SDXL's overflows."""
    return "fp32" if dtype == "fp16" else dtype


def has_native_bf16() -> bool:
    """Whether this CPU multiplies in bfloat16. Elsewhere it is emulated, and slower than float32."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        supported = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return bool(supported)


def check_numbers(dtype: str, device: str) -> None:
    """Raises UsageError for a dtype or device that is none, EnvironmentFault for one that this machine lacks."""
    if dtype not in DTYPES:
        raise UsageError(f'"{dtype}" is no dtype to sample in.', hint=f"take {listed(list(DTYPES))}")
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda", "mps"):
        raise UsageError(f'"{device}" is no device to sample on.', hint="take cpu, cuda or mps")
    if kind == "cpu" and dtype == "fp16":
        raise UsageError("A CPU takes minutes for a step in fp16.", hint="take bf16 or fp32")
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there[kind]:
        raise EnvironmentFault(f'There is no device "{device}" that torch can use.', hint="sample on the CPU")


def as_torch(dtype: str) -> torch.dtype:
    """The torch dtype of a name."""
    found: Dtype = OUTPUT_DTYPES[dtype]
    made: torch.dtype = getattr(torch, found.torch_name)
    return made
