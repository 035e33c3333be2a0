"""A trained model as a checkpoint of SD1's layout, by way of the folder that diffusers would load."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from diffusers import AutoencoderKL

import mergekit_sd as mk
from training.diffusion import Model

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}


def write_checkpoint(model: Model, vae: AutoencoderKL, path: Path) -> None:
    """Write it as fp16 .safetensors; it says its size and how it is sampled."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "trained"
        for part, name in ((model.unet, "unet"), (vae, "vae"), (model.text, "text_encoder")):
            part.save_pretrained(folder / name)  # makes the folder, too
        (folder / "scheduler").mkdir()
        (folder / "scheduler/scheduler_config.json").write_text(json.dumps(SCHEDULER))
        index = {
            "_class_name": "StableDiffusionPipeline",
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        }
        (folder / "model_index.json").write_text(json.dumps(index))
        sampling = {"steps": 20, "cfg": 4.0, "size": [64, 64]}
        mk.save(mk.ops.fix(mk.open(folder)), path, title=path.stem, sampling=sampling, force=True)
