"""Small random SD1 models as files that diffusers can load: the full vocabulary, pictures of 64×64, and a LoRA.

Imported only where diffusers is installed: `pytest.importorskip("diffusers")` comes first.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import diffusers_folders as small
import models
import torch

import mergekit_sd as mk
from mergekit_sd.adapters.targets import lora_name, targets_of
from mergekit_sd.architectures import detect

SIZE = 64
VOCABULARY = 49408
DECLARED = {"modelspec.resolution": f"{SIZE}x{SIZE}"}
EMBEDDED = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"


def tensors(seed: int = 0) -> models.Tensors:
    """A checkpoint of SD1's names, fp16."""
    torch.manual_seed(seed)
    made = small.components("sd1", vocabulary=VOCABULARY)
    torch.nn.init.normal_(made["text_encoder"].embeddings.token_embedding.weight)
    for parameter in made["text_encoder"].final_layer_norm.parameters():
        torch.nn.init.normal_(parameter, 0.5)  # as it is made, prompts differ by nearly nothing
    with tempfile.TemporaryDirectory() as folder:
        source = small.save(Path(folder, "model"), "sd1", made)
        mk.save(mk.open(source), Path(folder, "model.safetensors"), dtype="fp16")
        return models.read(Path(folder, "model.safetensors"))


def write(path: Path, made: Mapping[str, torch.Tensor], **metadata: str) -> Path:
    """A model's file, which says its size; more of ModelSpec by name."""
    said = DECLARED | {f"modelspec.{name}": value for name, value in metadata.items()}
    return models.write(path, dict(made), said)


def lora(model: models.Tensors, seed: int = 5, rank: int = 2, size: float = 0.5) -> models.Tensors:
    """A LoRA of every linear layer of UNet and text encoder, by kohya's names."""
    random = torch.Generator().manual_seed(seed)
    made = {}
    for layer in targets_of(detect(model), conv=False):
        shape = model[layer.target("weight").tensor].shape
        name = lora_name(layer, "kohya", "sd1")
        made[f"{name}.lora_down.weight"] = torch.randn(rank, *shape[1:], generator=random).half()
        up = torch.randn(shape[0], rank, *(1,) * (len(shape) - 2), generator=random)
        made[f"{name}.lora_up.weight"] = (up * size / shape[1]).half()
    return made
