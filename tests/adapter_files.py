"""LoRA-like files as trainers write them: real names and ranks, layers of few numbers.

Names by kohya's sd-scripts and LyCORIS's lists of weights. Layers are 8 wide, but for those that read the
text, whose width tells the family.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

WIDTH = 8
CONTEXT = {"sd1": 768, "sd2": 1024, "sdxl": 2048}
Tensors = dict[str, torch.Tensor]
Layer = tuple[str, int, int]  # its name, input width, kernel

_BLOCK = [f"attn{n}_to_{part}" for n in (1, 2) for part in ("q", "k", "v", "out_0")] + ["ff_net_0_proj", "ff_net_2"]


def _attention(start: str, depth: int, family: str) -> list[Layer]:
    context = CONTEXT[family]
    inner = [f"{start}_transformer_blocks_{n}_{layer}" for n in range(depth) for layer in _BLOCK]
    layers = [(name, context if name.endswith(("attn2_to_k", "attn2_to_v")) else WIDTH, 1) for name in inner]
    return [(f"{start}_proj_in", WIDTH, 1), *layers, (f"{start}_proj_out", WIDTH, 1)]


def sd_unet(family: str = "sd1") -> list[Layer]:
    """The 192 layers that a plain LoRA of SD1 or SD2 changes, by diffusers' names."""
    starts = [f"down_blocks_{i}_attentions_{j}" for i in range(3) for j in range(2)]
    starts += ["mid_block_attentions_0", *(f"up_blocks_{i}_attentions_{j}" for i in (1, 2, 3) for j in range(3))]
    return [layer for start in starts for layer in _attention(start, 1, family)]


def sd_conv() -> list[Layer]:
    """The 86 more of a LoRA with convolutions: 50 of them 3×3."""
    resnets = [f"down_blocks_{i}_resnets_{j}" for i in range(4) for j in range(2)]
    resnets += [f"mid_block_resnets_{j}" for j in range(2)]
    resnets += [f"up_blocks_{i}_resnets_{j}" for i in range(4) for j in range(3)]
    layers = [(f"{start}_{conv}", WIDTH, 3) for start in resnets for conv in ("conv1", "conv2")]
    layers += [(f"{start}_time_emb_proj", WIDTH, 1) for start in resnets]
    shortcuts = [f"down_blocks_{i}_resnets_0" for i in (1, 2)] + [s for s in resnets if s.startswith("up")]
    layers += [(f"{start}_conv_shortcut", WIDTH, 1) for start in shortcuts]
    layers += [(f"down_blocks_{i}_downsamplers_0_conv", WIDTH, 3) for i in range(3)]
    return layers + [(f"up_blocks_{i}_upsamplers_0_conv", WIDTH, 3) for i in range(3)]


def sdxl_unet() -> list[Layer]:
    """The 722 layers that a plain LoRA of SDXL changes, by LDM's names."""
    depths = {"input_blocks_4_1": 2, "input_blocks_5_1": 2, "input_blocks_7_1": 10, "input_blocks_8_1": 10}
    depths |= {"middle_block_1": 10} | {f"output_blocks_{n}_1": 10 if n < 3 else 2 for n in range(6)}
    return [layer for start, depth in depths.items() for layer in _attention(start, depth, "sdxl")]


def text_encoder(layers: int, width: int) -> list[Layer]:
    """The six layers of each of a text encoder's."""
    parts = [*(f"self_attn_{part}_proj" for part in ("q", "k", "v", "out")), "mlp_fc1", "mlp_fc2"]
    return [(f"text_model_encoder_layers_{n}_{part}", width, 1) for n in range(layers) for part in parts]


# --- what each algorithm stores of a layer ---------------------------------------------------------


def _zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float16)


def lora(width: int, kernel: int, rank: int) -> Tensors:
    k = () if kernel == 1 else (kernel, kernel)
    return {"lora_down.weight": _zeros(rank, width, *k), "lora_up.weight": _zeros(WIDTH, rank, *(1 for _ in k))}


def tucker(width: int, kernel: int, rank: int) -> Tensors:
    mid = {"lora_mid.weight": _zeros(rank, rank, kernel, kernel)}
    return {"lora_down.weight": _zeros(rank, width, 1, 1), "lora_up.weight": _zeros(WIDTH, rank, 1, 1)} | mid


def loha(width: int, kernel: int, rank: int) -> Tensors:
    a, b = _zeros(WIDTH, rank), _zeros(rank, width * kernel**2)
    return {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a, "hada_w2_b": b}


def lokr(width: int, kernel: int, rank: int) -> Tensors:
    return {"lokr_w1": _zeros(2, 2), "lokr_w2_a": _zeros(WIDTH // 2, rank), "lokr_w2_b": _zeros(rank, width // 2)}


def lokr_full(width: int, kernel: int, rank: int) -> Tensors:
    return {"lokr_w1": _zeros(2, 2), "lokr_w2": _zeros(WIDTH // 2, width // 2)}


def glora(width: int, kernel: int, rank: int) -> Tensors:
    a = {"a1.weight": _zeros(width, rank), "a2.weight": _zeros(rank, width)}
    return a | {"b1.weight": _zeros(WIDTH, rank), "b2.weight": _zeros(rank, width)}


def ia3(width: int, kernel: int, rank: int) -> Tensors:
    return {"weight": _zeros(WIDTH, 1), "on_input": torch.tensor(False)}


def oft(width: int, kernel: int, rank: int) -> Tensors:
    return {"oft_blocks": _zeros(2, WIDTH // 2, WIDTH // 2)}


def boft(width: int, kernel: int, rank: int) -> Tensors:
    return {"oft_blocks": _zeros(2, 4, 2, 2), "rescale": _zeros(WIDTH, 1)}


def full(width: int, kernel: int, rank: int) -> Tensors:
    return {"diff": _zeros(WIDTH, width), "diff_b": _zeros(WIDTH)}


def norm(width: int, kernel: int, rank: int) -> Tensors:
    return {"w_norm": _zeros(width), "b_norm": _zeros(width)}


def tlora(width: int, kernel: int, rank: int) -> Tensors:
    return {
        "q_layer.weight": _zeros(rank, width),
        "p_layer.weight": _zeros(WIDTH, rank),
        "lambda_layer": _zeros(1, rank),
    }


Algorithm = Callable[[int, int, int], Tensors]


def adapted(
    layers: list[Layer],
    prefix: str = "lora_unet_",
    algorithm: Algorithm = lora,
    *,
    rank: int = 4,
    alpha: float | None = 2,
    dora: bool = False,
) -> Tensors:
    """A file's tensors for these layers."""
    made: Tensors = {}
    for name, width, kernel in layers:
        made |= {f"{prefix}{name}.{end}": tensor for end, tensor in algorithm(width, kernel, rank).items()}
        if alpha is not None:
            made[f"{prefix}{name}.alpha"] = torch.tensor(alpha, dtype=torch.float16)
        if dora:
            made[f"{prefix}{name}.dora_scale"] = _zeros(WIDTH, 1)
    return made
