"""The small family's networks, of SD1's layout at a sixteenth of its channels; and CLIP's words as numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from mergekit_sd.formats.diffusers.tokenizer import tokenizer_files

WIDTH = 64  # of a UNet's, a VAE's and the text encoder's layers; below it, GroupNorm erases colour
TEXT_LAYERS = 12
LENGTH = 77
SCALE = 0.18215


def new_vae() -> AutoencoderKL:
    """2.0 M parameters."""
    return AutoencoderKL(
        block_out_channels=[WIDTH] * 4,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=64,
        scaling_factor=SCALE,
    )


def new_unet() -> UNet2DConditionModel:
    """4.3 M parameters; its last convolution starts at zero."""
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=[WIDTH] * 4,
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
        layers_per_block=2,
    )
    torch.nn.init.zeros_(unet.conv_out.weight)
    return unet


def new_text_encoder(used: Sequence[int]) -> CLIPTextModel:
    """0.6 M parameters beside the token table, of which only the `used` rows are not zero.

    All twelve layers start as the identity: what they write is zero.
    """
    config = CLIPTextConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=1,
        projection_dim=WIDTH,
        eos_token_id=2,
    )
    encoder = CLIPTextModel(config)
    state = encoder.state_dict()
    table = next(value for name, value in state.items() if name.endswith("token_embedding.weight"))
    kept = torch.randn(len(used), WIDTH) * 0.5
    table.zero_()
    table[list(used)] = kept
    for name, value in state.items():
        if name.endswith(("position_embedding.weight",)):
            torch.nn.init.normal_(value, std=0.1)
        if "layers" in name and name.endswith(("out_proj.weight", "fc2.weight")):
            value.mul_(0.1)
    return encoder


class Words:
    """Captions as rows of 77 token ids."""

    def __init__(self) -> None:
        import json

        files = tokenizer_files("<|endoftext|>")
        if files is None:
            raise SystemExit("Training needs CLIP's vocabulary: pip install openai-clip")
        merges = [tuple(line.split(" ")) for line in files["merges.txt"].split("\n")[1:-1]]
        self.tokenizer = CLIPTokenizer(vocab=json.loads(files["vocab.json"]), merges=merges)

    def ids(self, captions: Sequence[str]) -> torch.Tensor:
        """(captions, 77), int64."""
        end = self.tokenizer.eos_token_id
        rows = []
        for text in captions:
            row = self.tokenizer(text).input_ids
            rows.append(row + [end] * (LENGTH - len(row)))
        return torch.tensor(rows)
