"""A LoRA, a LoHa, a LoKr, a textual inversion and a hypernetwork for the base, trained and written in their formats."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from training.diffusion import Data, Model, Run, train
from training.networks import WIDTH

RANK = 8
LOHA_RANK = 4
LOKR_BLOCKS = 4  # the first factor is 4x4
WORD = "orange"  # of CLIP's vocabulary, unknown to the base: its row of the token table is what is learned


class Lora(nn.Module):
    """W + up·down·(alpha/rank), alpha = rank / 2."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        rows, columns = weight.shape[0], weight[0].numel()
        self.down = nn.Parameter(torch.randn(RANK, columns) / math.sqrt(columns))
        self.up = nn.Parameter(torch.zeros(rows, RANK))
        self.alpha = RANK / 2

    def forward(self, weight: Tensor) -> Tensor:
        """The layer's weight with the difference."""
        return weight + (self.up @ self.down).view_as(weight) * (self.alpha / RANK)

    def tensors(self, shape: torch.Size) -> dict[str, Tensor]:
        """As kohya names them, 1×1 convolutions as such."""
        kernel = (1,) * (len(shape) - 2)
        return {
            "lora_down.weight": self.down.reshape(RANK, shape[1], *kernel),
            "lora_up.weight": self.up.reshape(shape[0], RANK, *kernel),
            "alpha": torch.tensor(self.alpha),
        }


class Loha(nn.Module):
    """W + (w1a·w1b) ∘ (w2a·w2b)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        rows, columns = weight.shape[0], weight[0].numel()
        self.w1_a = nn.Parameter(torch.randn(rows, LOHA_RANK) * 0.1)
        self.w1_b = nn.Parameter(torch.randn(LOHA_RANK, columns))
        self.w2_a = nn.Parameter(torch.zeros(rows, LOHA_RANK))
        self.w2_b = nn.Parameter(torch.randn(LOHA_RANK, columns))

    def forward(self, weight: Tensor) -> Tensor:
        """The layer's weight with the difference."""
        return weight + ((self.w1_a @ self.w1_b) * (self.w2_a @ self.w2_b)).view_as(weight)

    def tensors(self, shape: torch.Size) -> dict[str, Tensor]:
        """As LyCORIS names them."""
        own = {f"hada_{name}": getattr(self, name) for name in ("w1_a", "w1_b", "w2_a", "w2_b")}
        return {**own, "alpha": torch.tensor(float(LOHA_RANK))}


class Lokr(nn.Module):
    """W + w1 ⊗ w2, both whole."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        rows, columns = weight.shape[0], weight.shape[1]
        self.w1 = nn.Parameter(torch.randn(LOKR_BLOCKS, LOKR_BLOCKS))
        self.w2 = nn.Parameter(torch.zeros(rows // LOKR_BLOCKS, columns // LOKR_BLOCKS, *weight.shape[2:]))

    def forward(self, weight: Tensor) -> Tensor:
        """The layer's weight with the difference."""
        first = self.w1.reshape(*self.w1.shape, *(1,) * (weight.dim() - 2))
        return weight + torch.kron(first, self.w2)

    def tensors(self, shape: torch.Size) -> dict[str, Tensor]:
        """As LyCORIS names them; with both whole, alpha does not count."""
        return {"lokr_w1": self.w1, "lokr_w2": self.w2, "alpha": torch.tensor(1.0)}


def _layers(model: Model, convolutions: bool) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers of the transformers (kohya's own choice), or the residual blocks' convolutions as well."""
    for name, module in model.unet.named_modules():
        inside = "attentions" in name and isinstance(module, nn.Linear | nn.Conv2d)
        if inside or (convolutions and "resnets" in name and isinstance(module, nn.Conv2d)):
            yield name, module


def train_adapter(
    model: Model, kind: type[Lora] | type[Loha] | type[Lokr], data: Data, run: Run, path: Path, **judged: object
) -> Model:
    """Train one on a copy of the model, which is returned with it in place; `path` gets the file."""
    tuned = model.copied()
    tuned.unet.requires_grad_(False)
    tuned.text.requires_grad_(False)
    layers = list(_layers(tuned, convolutions=kind is not Lora))
    torch.manual_seed(11)
    for _, layer in layers:
        parametrize.register_parametrization(layer, "weight", kind(layer.weight))
    own = [layer.parametrizations["weight"][0] for _, layer in layers]
    train(tuned, data, run, [each for adapter in own for each in adapter.parameters()], **judged_by(tuned, judged))
    tensors: dict[str, Tensor] = {}
    for (name, layer), adapter in zip(layers, own, strict=True):
        for part, value in adapter.tensors(layer.weight.shape).items():
            tensors[f"lora_unet_{name.replace('.', '_')}.{part}"] = value.detach().half().contiguous()
    save_file(tensors, path, metadata={"ss_output_name": path.stem, "ss_base_model_version": "sd_v1"})
    return tuned


class Net(nn.Module):
    """x + W₂·relu(W₁·x): layer structure 1, 2, 1."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.ReLU(), nn.Linear(2 * WIDTH, WIDTH))
        nn.init.normal_(self.linear[0].weight, std=0.1)
        nn.init.zeros_(self.linear[2].weight)

    def forward(self, x: Tensor) -> Tensor:
        """(…, 64) to (…, 64)."""
        return x + self.linear(x)


@contextmanager
def hypernetwork(model: Model, keys: nn.Module, values: nn.Module) -> Iterator[None]:
    """Put in front of every layer that makes keys or values of what is 64 wide: the text and the picture itself."""
    hooks = [
        module.register_forward_pre_hook(lambda _, args, net=net: (net(args[0]),))
        for end, net in (("to_k", keys), ("to_v", values))
        for name, module in model.unet.named_modules()
        if name.endswith(end)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def train_hypernetwork(model: Model, data: Data, run: Run, path: Path, **judged: object) -> None:
    """Train one and write it as the WebUI's .pt."""
    tuned = model.copied()
    tuned.unet.requires_grad_(False)
    tuned.text.requires_grad_(False)
    torch.manual_seed(12)
    keys, values = Net(), Net()
    with hypernetwork(tuned, keys, values):
        train(tuned, data, run, [*keys.parameters(), *values.parameters()], **judged_by(tuned, judged))
    states = [{name: each.detach().half() for name, each in net.state_dict().items()} for net in (keys, values)]
    said = {
        "step": run.steps,
        "name": path.stem,
        "layer_structure": [1, 2, 1],
        "activation_func": "relu",
        "is_layer_norm": False,
        "weight_initialization": "Normal",
        "use_dropout": False,
        "activate_output": False,
        "last_layer_dropout": False,
        "sd_checkpoint_name": "base",
    }
    torch.save({WIDTH: tuple(states), **said}, path)


def train_inversion(model: Model, data: Data, run: Run, path: Path, **judged: object) -> None:
    """Learn one vector that stands for WORD and write it as `emb_params`."""
    tuned = model.copied()
    tuned.unet.requires_grad_(False)
    tuned.text.requires_grad_(False)
    row, *near = tuned.words.ids([WORD, "red", "yellow"])[:, 1].tolist()
    table = tuned.text.get_input_embeddings().weight
    with torch.no_grad():
        table[row] = table[near].mean(0)
    table.requires_grad_(True)
    others = table.detach().clone()

    def keep() -> None:
        with torch.no_grad():
            own = table[row].clone()
            table.copy_(others)
            table[row] = own

    train(tuned, data, run, [table], keep=keep, **judged_by(tuned, judged))
    save_file({"emb_params": table[row].detach()[None].clone()}, path, metadata={"name": path.stem})


def judged_by(tuned: Model, judged: dict[str, object]) -> dict[str, object]:
    """The judge of a model, told which."""
    judge = judged.get("judge")
    return {"judge": lambda: judge(tuned)} if callable(judge) else {}
