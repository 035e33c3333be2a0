"""Hypernetworks before keys and values: against numpy, and that they leave nothing behind."""

from __future__ import annotations

import numpy as np
import pytest
import small_files
import torch

pytest.importorskip("diffusers")

import sampling_networks

from mergekit_sd.errors import FamilyMismatch, WrongFormat
from mergekit_sd.sampling.hypernetworks import applied, load_hypernetwork

WIDTH = 8


class Attention(torch.nn.Module):
    """One attention's layers, as diffusers calls them; another width for the text."""

    def __init__(self, text=WIDTH):
        super().__init__()
        self.to_q = torch.nn.Linear(WIDTH, WIDTH)
        self.to_k, self.to_v = torch.nn.Linear(text, WIDTH), torch.nn.Linear(text, WIDTH)

    def forward(self, x, context):
        return self.to_q(x), self.to_k(context), self.to_v(context)


@pytest.fixture
def attention():
    torch.manual_seed(3)
    return Attention().requires_grad_(False)


@pytest.fixture
def rows():
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))


def written(path, **options):
    return small_files.saved(path, small_files.hypernetwork((WIDTH,), **options))


def activated(x, name):
    return {"relu": np.maximum(x, 0), "linear": x, "tanh": np.tanh(x), "swish": x * np.clip(x + 3, 0, 6) / 6}[name]


def answer(file, x, side, multiplier=1.0):
    """The WebUI's formula in float64: x + net(x) · multiplier, the layers in their file's order."""
    value = small_files.loaded(file)
    net, name = value[WIDTH][side], value["activation_func"]
    weights = {int(key.split(".")[1]): np.float64(net[key]) for key in net if key.endswith("weight")}
    last = max(number for number, weight in weights.items() if weight.ndim == 2)
    made = np.float64(x)
    for number, weight in sorted(weights.items()):
        bias = np.float64(net[f"linear.{number}.bias"])
        if weight.ndim == 2:
            made = made @ weight.T + bias
            made = activated(made, name) if number < last or value["activate_output"] else made
        else:
            centred = made - made.mean(-1, keepdims=True)
            made = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weight + bias
    return np.float64(x) + made * multiplier


def through(layer, x):
    return np.float64(x) @ np.float64(layer.weight).T + np.float64(layer.bias)


def close(found, wanted):
    np.testing.assert_allclose(np.float64(found), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ["relu", "linear", "tanh", "swish"])
@pytest.mark.parametrize("output", [False, True], ids=["", "activated output"])
@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
@pytest.mark.parametrize("structure", [(1, 2, 1), (1, 1), (1, 2, 1.5, 1)], ids=str)
def test_keys_and_values_are_made_of_what_the_nets_change(
    tmp_path, attention, rows, activation, output, norm, structure
):
    file = written(
        tmp_path / "h.pt", structure=structure, norm=norm, activation_func=activation, activate_output=output
    )
    query = attention.to_q(rows)
    with applied(attention, [(load_hypernetwork(file), 0.6)]):
        found = attention(rows, rows)
    assert torch.equal(found[0], query)
    for side, layer in enumerate((attention.to_k, attention.to_v)):
        close(found[side + 1], through(layer, answer(file, rows, side, 0.6)))


def test_two_go_one_after_the_other(tmp_path, attention, rows):
    files = [written(tmp_path / f"{seed}.pt", seed=seed) for seed in (1, 2)]
    with applied(
        attention, [(load_hypernetwork(file), strength) for file, strength in zip(files, (0.5, -2), strict=True)]
    ):
        keys = attention(rows, rows)[1]
    close(keys, through(attention.to_k, answer(files[1], answer(files[0], rows, 0, 0.5), 0, -2)))


def test_old_names_are_read_and_half_precision_stays(tmp_path, attention, rows):
    new = small_files.hypernetwork((WIDTH,), activation_func="linear")
    nets = [{key.replace(".0.", "1.").replace(".2.", "2."): each for key, each in net.items()} for net in new[WIDTH]]
    assert "linear1.weight" in nets[0]
    net = load_hypernetwork(small_files.saved(tmp_path / "old.pt", {WIDTH: tuple(nets)}))
    with applied(attention, [(net, 1.0)]):
        close(
            attention(rows, rows)[2],
            through(attention.to_v, answer(small_files.saved(tmp_path / "new.pt", new), rows, 1)),
        )
        assert attention.bfloat16()(rows.bfloat16(), rows.bfloat16())[1].dtype == torch.bfloat16


def test_other_widths_pass_by(tmp_path, rows):
    torch.manual_seed(0)
    both = torch.nn.ModuleDict({"attn1": Attention(), "attn2": Attention(text=6)})
    words = torch.randn(1, 3, 6)
    before = both["attn2"](rows, words)
    with applied(both, [(load_hypernetwork(written(tmp_path / "h.pt")), 1.0)]):
        assert all(map(torch.equal, both["attn2"](rows, words), before))
        changed = both["attn1"](rows, rows)
    assert not torch.equal(changed[1], both["attn1"](rows, rows)[1])


def test_afterwards_and_at_0_the_unet_computes_as_before_to_the_bit(tmp_path):
    networks = sampling_networks.networks("sd1")
    net = load_hypernetwork(
        small_files.saved(tmp_path / "h.pt", small_files.hypernetwork((64, 32, 96), activation_func="relu"))
    )
    condition = sampling_networks.condition(networks, 1)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def computed():
        with torch.no_grad():
            return networks.unet(latents, 500, encoder_hidden_states=condition.context).sample

    before = computed()
    with applied(networks.unet, [(net, 0.0)]):
        assert torch.equal(computed(), before)
    with applied(networks.unet, [(net, 1.0)]):
        assert not torch.equal(computed(), before)
    with pytest.raises(ZeroDivisionError), applied(networks.unet, [(net, 1.0)]):
        raise ZeroDivisionError
    assert torch.equal(computed(), before)
    assert not any(module._forward_pre_hooks for module in networks.unet.modules())


def changed(**entries):
    """A hypernetwork whose first net has other tensors."""
    value = small_files.hypernetwork((WIDTH,))
    first = {key: each for key, each in {**value[WIDTH][0], **entries}.items() if each is not None}
    return value | {WIDTH: (first, value[WIDTH][1])}


BROKEN = {
    "no nets": ({"step": 1, "name": "x", "layer_structure": [1, 1]}, None),
    "another activation": (small_files.hypernetwork((WIDTH,), activation_func="magic"), "magic"),
    "an activation with numbers": (small_files.hypernetwork((WIDTH,), activation_func="threshold"), "threshold"),
    "an activation of another width": (small_files.hypernetwork((WIDTH,), activation_func="glu"), "glu"),
    "layers that do not fit": (changed(**{"linear.2.weight": torch.zeros(WIDTH, 5)}), "Layer 2"),
    "a bias that does not fit": (changed(**{"linear.0.bias": torch.zeros(3)}), "Layer 0"),
    "a bias alone": (changed(**{"linear.0.weight": None}), "Layer 0"),
    "a kernel": (changed(**{"linear.0.weight": torch.zeros(16, WIDTH, 1)}), "Layer 0"),
    "another width out": (
        changed(**{"linear.2.weight": torch.zeros(5, 16), "linear.2.bias": torch.zeros(5)}),
        "gives 5",
    ),
}


@pytest.mark.parametrize(("value", "word"), BROKEN.values(), ids=BROKEN)
def test_what_is_no_hypernetwork_is_refused(tmp_path, value, word):
    with pytest.raises(WrongFormat, match=word) as refused:
        load_hypernetwork(small_files.saved(tmp_path / "h.pt", value))
    assert refused.value.file == str(tmp_path / "h.pt")


def test_one_of_another_family_is_refused(tmp_path, attention):
    file = small_files.saved(tmp_path / "h.pt", small_files.hypernetwork((16,)))
    with (
        pytest.raises(FamilyMismatch, match="widths 16") as refused,
        applied(attention, [(load_hypernetwork(file), 1.0)]),
    ):
        pass
    assert str(WIDTH) in refused.value.hint
