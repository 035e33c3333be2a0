"""Small checkpoints of real layouts, made by code: real names and ranks, few numbers.

Nothing here uses the engine: files are written and read by the safetensors library, blocks are
told by the rules of the MBW extension, results are computed by numpy in float64.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mergekit_sd import architectures

UNET = "model.diffusion_model."
VAE = "first_stage_model."
CONV_IN = UNET + "input_blocks.0.0.weight"
POSITION_IDS = {
    "sd1": "cond_stage_model.transformer.text_model.embeddings.position_ids",
    "sdxl": "conditioner.embedders.0.transformer.text_model.embeddings.position_ids",
}
SCHEDULE = ("betas", "alphas_cumprod", "posterior_variance")
DTYPES = {
    "fp16": torch.float16,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp64": torch.float64,
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
# Bits of the mantissa, and the exponent of the smallest normal number.
PRECISION = {"fp16": (10, -14), "bf16": (7, -126), "fp32": (23, -126), "fp8_e4m3fn": (3, -6), "fp8_e5m2": (2, -14)}

Tensors = dict[str, torch.Tensor]


def shapes(name: str, width: int = 4, layers: int = 1) -> dict[str, tuple[int, ...]]:
    """The names of an architecture with sizes cut to `width`, and only `layers` layers of the text encoders."""
    architecture = architectures.get(name)
    found = {}
    for key, spec in architecture.tensors.items():
        if any(f"{stack}.{n}." in key for stack in ("encoder.layers", "resblocks") for n in range(layers, 40)):
            continue
        small = tuple(min(size, width) for size in spec.shape)
        if key == architecture.conv_in:
            small = (small[0], spec.shape[1], *small[2:])
        found[key] = spec.shape if key == architecture.position_ids else small
    return found


def filled(
    wanted: Mapping[str, tuple[int, ...]], seed: int = 0, dtype: str = "fp16", *, scale: float = 0.05
) -> Tensors:
    """Tensors of these shapes with normal numbers; schedule buffers and position_ids as files have them."""
    rng = np.random.default_rng(seed)
    sizes = [int(np.prod(shape)) for shape in wanted.values()]
    numbers = torch.from_numpy(rng.standard_normal(sum(sizes)) * scale)
    result = {}
    for (name, shape), piece in zip(wanted.items(), torch.split(numbers, sizes), strict=True):
        if name.endswith("position_ids"):
            result[name] = torch.arange(shape[-1]).reshape(shape)
        elif "." not in name and name not in ("v_pred", "ztsnr"):  # schedule buffers: float32 in every file
            result[name] = piece.reshape(shape).float()
        else:
            result[name] = piece.reshape(shape).to(DTYPES[dtype])
    return result


def checkpoint(name: str = "sd1", seed: int = 0, dtype: str = "fp16", **options: int) -> Tensors:
    """A small checkpoint of an architecture."""
    return filled(shapes(name, **options), seed, dtype)


def with_ema(tensors: Tensors, seed: int = 99) -> Tensors:
    """The same and EMA weights of its UNet, their own numbers, with the counters."""
    rng = torch.Generator().manual_seed(seed)
    ema = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): torch.randn(each.shape, generator=rng) * 0.05
        for name, each in tensors.items()
        if name.startswith(UNET)
    }
    counters = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7, dtype=torch.int32)}
    return tensors | ema | counters


def novelai(tensors: Tensors) -> Tensors:
    """The same with NovelAI's names, which lack `text_model.`."""
    start = "cond_stage_model.transformer."
    return {name.replace(start + "text_model.", start): each for name, each in tensors.items()}


def vae_file(seed: int = 50, dtype: str = "fp16", *, prefix: str = "") -> Tensors:
    """A VAE alone, as the WebUI's VAE folder holds it."""
    wanted = {key.removeprefix(VAE): shape for key, shape in shapes("sd1").items() if key.startswith(VAE)}
    return {prefix + name: each for name, each in filled(wanted, seed, dtype).items()}


def write(path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> Path:
    """A safetensors file, written by the safetensors library."""
    save_file({name: each.contiguous() for name, each in tensors.items()}, path, dict(metadata or {"format": "pt"}))
    return path


def read(path: Path | str) -> Tensors:
    """All tensors of a file, read by the safetensors library."""
    return load_file(path)


def metadata(path: Path | str) -> dict[str, str]:
    """A file's metadata, read by the safetensors library."""
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def bits(tensor: torch.Tensor) -> bytes:
    """A tensor's bytes."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are one to the bit: dtype, shape, bytes."""
    return one.dtype == other.dtype and one.shape == other.shape and bits(one) == bits(other)


def f64(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's numbers in float64."""
    return tensor.to(torch.float64).numpy()


def error_in_steps(tensor: torch.Tensor, oracle: np.ndarray, dtype: str = "fp16") -> float:
    """The largest distance from the oracle, in steps of the dtype at the oracle's magnitude."""
    if tensor.numel() == 0:
        return 0.0
    mantissa, lowest = PRECISION[dtype]
    exponent = np.frexp(np.abs(oracle))[1] - 1
    step = np.ldexp(1.0, np.maximum(np.where(oracle == 0, lowest, exponent), lowest) - mantissa)
    return float(np.max(np.abs(f64(tensor) - oracle) / step))


# --- blocks, by the rules of the MBW extension and supermerger (not by ours) --------------------------

SD_BLOCKS = [*(f"IN{n:02}" for n in range(12)), "M00", *(f"OUT{n:02}" for n in range(12))]
XL_BLOCKS = [*(f"IN{n:02}" for n in range(9)), "M00", *(f"OUT{n:02}" for n in range(9))]


def block_of(name: str, *, xl: bool = False) -> str:
    """The block whose weight a tensor takes; "BASE" for all outside the UNet."""
    if not name.startswith(UNET):
        return "BASE"
    if "time_embed" in name or (xl and "label_emb" in name):
        return "IN00"
    if ".out." in name:
        return "OUT08" if xl else "OUT11"
    if ".middle_block." in name:
        return "M00"
    for part, start in ((".input_blocks.", "IN"), (".output_blocks.", "OUT")):
        if part in name:
            return f"{start}{int(name.split(part)[1].split('.')[0]):02}"
    return "BASE"


def is_carried(name: str) -> bool:
    """Whether a tensor of a small checkpoint is never merged: it comes from the first operand."""
    return "." not in name or name.endswith("position_ids") or name.startswith(("model_ema.", "edm_"))


# --- recipes -----------------------------------------------------------------------------------------


def toml(value: object) -> str:
    """A value in TOML."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{json.dumps(key)} = {toml(each)}" for key, each in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, bool | str):
        return json.dumps(value, ensure_ascii=False)
    return repr(value)


def recipe(
    folder: Path,
    models: Mapping[str, object],
    steps: Mapping[str, Mapping[str, object]] | None = None,
    outputs: Mapping[str, Mapping[str, object]] | None = None,
    *,
    name: str = "r.toml",
    **top: object,
) -> Path:
    """Write a recipe file; without `outputs`, the last step (or model) goes to out.safetensors."""
    steps = steps or {}
    last = [*models, *steps][-1]
    outputs = {"out": {"model": last, "file": "out.safetensors"}} if outputs is None else outputs
    lines = ["recipe = 1", *(f"{key} = {toml(value)}" for key, value in top.items()), "[models]"]
    lines += [f"{json.dumps(key)} = {toml(value)}" for key, value in models.items()]
    for table, entries in (("steps", steps), ("outputs", outputs)):
        for key, entry in entries.items():
            lines += [f"[{table}.{json.dumps(key)}]", *(f"{k} = {toml(v)}" for k, v in entry.items())]
    path = folder / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def left_overs(folder: Path) -> list[str]:
    """Names of hidden files, which no run may leave behind."""
    return sorted(path.name for path in folder.rglob(".*"))
