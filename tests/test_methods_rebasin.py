"""Git Re-Basin: the groups of units that the data tells, and the matching that finds their order.

The layers below compute as Stable Diffusion does, in float64, straight from tensors by their LDM names.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from oracle_rebasin import Pair
from torch.nn import functional

from mergekit_sd import architectures
from mergekit_sd.errors import UsageError
from mergekit_sd.operations import OPERATIONS, matching
from mergekit_sd.operations.matching import assign
from mergekit_sd.operations.rebasin import FAMILIES, find_orders, groups_of
from mergekit_sd.operations.types import Key

UNET, VAE = "model.diffusion_model.", "first_stage_model."
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def _one_thread():
    """As in a run, torch has one thread: on small matrices, several only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- models in little, whose sizes keep the layouts' proportions ---------------------------------------


def layout(family, *, width=1, text=1, deep=99):
    """Keys and shapes of a family; widths divided by `width`, the text's and the VAE's by `text`, layers `deep`."""
    architecture = architectures.get(family)
    keys, shapes = {}, {}
    for name, spec in architecture.tensors.items():
        if spec.component is None or name == architecture.position_ids:
            continue
        stacks = (".layers.", ".resblocks.", ".transformer_blocks.")
        if any(f"{stack}{n}." in name for stack in stacks for n in range(deep, 32)):
            continue
        shape = []
        for axis, size in enumerate(spec.shape):
            takes_text = axis == 1 and ("attn2.to_k" in name or "attn2.to_v" in name or "label_emb.0.0" in name)
            divisor = width if spec.component == "unet" and not takes_text else text
            shape.append(size if size < 77 or name.endswith("conv_in") else size // divisor)
        keys[name] = Key(name, family, spec.component, spec.block)
        shapes[name] = tuple(shape)
    return keys, shapes


def little(family, *, some=("time_embed", "label_emb", "input_blocks.4.", "middle_block.1.", "encoder.mid.")):
    """A layout with narrow layers and two of each stack; `some` blocks of UNet and VAE."""
    keys, shapes = layout(family, width=12 if family == "sdxl-refiner" else 10, text=4, deep=2)
    names = [
        n
        for n in keys
        if not n.startswith((UNET, VAE)) or n.split(".", 2 if n.startswith(UNET) else 1)[-1].startswith(some)
    ]
    return {name: keys[name] for name in names}, {name: shapes[name] for name in names}


def numbers(shapes, seed, dtype=torch.float32):
    random = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=random, dtype=dtype) / max(1.0, math.sqrt(math.prod(shape[1:])))
        for name, shape in shapes.items()
    }


def orders_of(groups, seed):
    """A random order of each group's elements; blocks stay together."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, group in groups.items():
        length = group.units // group.blocks
        units = np.concatenate([at * length + rng.permutation(length) for at in rng.permutation(group.blocks)])
        found[name] = np.concatenate([np.arange(unit * group.size, (unit + 1) * group.size) for unit in units])
    return found


def reordered(tensors, groups, orders, *, without=None):
    """The model with its groups in these orders, tensor by tensor, apart from one."""
    result = dict(tensors)
    for name, group in groups.items():
        order = torch.from_numpy(orders[name])
        for tensor, place in group.places.items():
            if tensor == without:
                continue
            values = result[tensor].transpose(0, place.axis).clone()
            for start in place.starts:
                values[start : start + len(order)] = values[start + order].clone()
            result[tensor] = values.transpose(0, place.axis)
    return result


# --- the layers of Stable Diffusion ---------------------------------------------------------------------


def linear(t, at, x):
    weight = t[at + ".weight"]
    return functional.linear(x, weight.reshape(weight.shape[:2]), t.get(at + ".bias"))


def conv(t, at, x):
    return functional.conv2d(x, t[at + ".weight"], t[at + ".bias"], padding=1)


def group_norm(t, at, x):
    return functional.group_norm(x, 32, t[at + ".weight"], t[at + ".bias"])


def layer_norm(t, at, x):
    return functional.layer_norm(x, x.shape[-1:], t[at + ".weight"], t[at + ".bias"])


def attend(q, k, v, heads):
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    weight = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1)
    return (weight @ v).transpose(1, 2).flatten(2)


def attention(t, at, x, context, heads):
    made = attend(linear(t, at + ".to_q", x), linear(t, at + ".to_k", context), linear(t, at + ".to_v", context), heads)
    return linear(t, at + ".to_out.0", made)


def transformer(t, at, x, context, family):
    h = linear(t, at + ".proj_in", group_norm(t, at + ".norm", x).flatten(2).transpose(1, 2))
    heads = 8 if family == "sd1" else max(1, h.shape[-1] // 64)
    for n in itertools.takewhile(lambda n: f"{at}.transformer_blocks.{n}.norm1.weight" in t, itertools.count()):
        block = f"{at}.transformer_blocks.{n}"
        normed = layer_norm(t, block + ".norm1", h)
        h = h + attention(t, block + ".attn1", normed, normed, heads)
        h = h + attention(t, block + ".attn2", layer_norm(t, block + ".norm2", h), context, heads)
        value, gate = linear(t, block + ".ff.net.0.proj", layer_norm(t, block + ".norm3", h)).chunk(2, -1)
        h = h + linear(t, block + ".ff.net.2", value * functional.gelu(gate))
    return linear(t, at + ".proj_out", h)


def resblock(t, at, x, embedding):
    h = conv(t, at + ".in_layers.2", functional.silu(group_norm(t, at + ".in_layers.0", x)))
    h = h + linear(t, at + ".emb_layers.1", functional.silu(embedding))[:, :, None, None]
    return conv(t, at + ".out_layers.3", functional.silu(group_norm(t, at + ".out_layers.0", h)))


def embed(t, at, x):
    return linear(t, at + ".2", functional.silu(linear(t, at + ".0", x)))


def vae_resblock(t, at, x):
    h = conv(t, at + ".conv1", functional.silu(group_norm(t, at + ".norm1", x)))
    return conv(t, at + ".conv2", functional.silu(group_norm(t, at + ".norm2", h)))


def vae_attention(t, at, x):
    h = group_norm(t, at + ".norm", x).flatten(2).transpose(1, 2)
    return linear(t, at + ".proj_out", attend(*(linear(t, f"{at}.{each}", h) for each in "qkv"), 1))


def clip(t, at, tokens):
    embeddings = at + "text_model.embeddings."
    h = t[embeddings + "token_embedding.weight"][tokens] + t[embeddings + "position_embedding.weight"][: len(tokens)]
    h = h[None]
    for n in range(2):
        layer = f"{at}text_model.encoder.layers.{n}"
        x = layer_norm(t, layer + ".layer_norm1", h)
        made = attend(*(linear(t, f"{layer}.self_attn.{each}_proj", x) for each in "qkv"), h.shape[-1] // 64)
        h = h + linear(t, layer + ".self_attn.out_proj", made)
        x = linear(t, layer + ".mlp.fc1", layer_norm(t, layer + ".layer_norm2", h))
        h = h + linear(t, layer + ".mlp.fc2", x * torch.sigmoid(1.702 * x))
    return layer_norm(t, at + "text_model.final_layer_norm", h)


def openclip(t, at, tokens):
    """The stream, and the pooled output."""
    h = (t[at + "token_embedding.weight"][tokens] + t[at + "positional_embedding"][: len(tokens)])[None]
    for n in range(2):
        layer = f"{at}transformer.resblocks.{n}"
        x = layer_norm(t, layer + ".ln_1", h)
        q, k, v = functional.linear(x, t[layer + ".attn.in_proj_weight"], t[layer + ".attn.in_proj_bias"]).chunk(3, -1)
        h = h + linear(t, layer + ".attn.out_proj", attend(q, k, v, h.shape[-1] // 64))
        x = functional.gelu(linear(t, layer + ".mlp.c_fc", layer_norm(t, layer + ".ln_2", h)))
        h = h + linear(t, layer + ".mlp.c_proj", x)
    final = layer_norm(t, at + "ln_final", h)
    return final, final[:, -1] @ t[at + "text_projection"]


def outputs(t, family):
    """What the layers of a model compute, by their names: each UNet and VAE layer from an input of its own."""
    random = torch.Generator().manual_seed(1)

    def given(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64)

    prefixes = architectures.get(family).components
    tokens = torch.tensor([3, 14, 15, 9, 2])
    texts, pooled = [], None
    if any("text_model." in name for name in t):
        texts.append(clip(t, prefixes["text_encoder"], tokens))
    if any("resblocks." in name for name in t):
        text, pooled = openclip(t, prefixes["text_encoder" if family == "sd2" else "text_encoder_2"], tokens)
        texts.append(text)
    context = torch.cat(texts, -1)
    emb = embed(t, UNET + "time_embed", given(1, t[UNET + "time_embed.0.weight"].shape[1]))
    found = {}
    if UNET + "label_emb.0.0.weight" in t:
        sizes = given(1, t[UNET + "label_emb.0.0.weight"].shape[1] - pooled.shape[1])
        emb = emb + embed(t, UNET + "label_emb.0", torch.cat([pooled, sizes], -1))
    elif pooled is not None:
        found["pooled"] = pooled
    for name in t:
        if name.endswith(".in_layers.0.weight"):
            at = name.removesuffix(".in_layers.0.weight")
            found[at] = resblock(t, at, given(1, *t[name].shape, 3, 3), emb)
        elif name.endswith(".norm1.weight") and name.startswith(VAE):
            at = name.removesuffix(".norm1.weight")
            found[at] = vae_resblock(t, at, given(1, *t[name].shape, 3, 3))
        elif name.endswith(".norm.weight"):
            at = name.removesuffix(".norm.weight")
            x = given(1, *t[name].shape, 2, 2)
            found[at] = vae_attention(t, at, x) if name.startswith(VAE) else transformer(t, at, x, context, family)
    return found


def distance(one, other):
    return max(float((one[name] - other[name]).abs().max()) for name in one)


# --- the groups -------------------------------------------------------------------------------------------


@every_family
def test_permuting_a_group_changes_no_output(family):
    keys, shapes = little(family)
    model, groups = numbers(shapes, 0, torch.float64), groups_of(keys, shapes)
    before = outputs(model, family)
    titles = sorted({name.split()[0] for name in groups})
    for title in titles:
        some = {name: group for name, group in groups.items() if name.split()[0] == title}
        changed = reordered(model, some, orders_of(some, 5))
        assert any(not torch.equal(changed[name], model[name]) for name in model), title
        assert distance(before, outputs(changed, family)) < 1e-9, title
    assert distance(before, outputs(reordered(model, groups, orders_of(groups, 6)), family)) < 1e-9


@every_family
def test_a_group_lacks_no_tensor_and_holds_none_in_vain(family):
    keys, shapes = little(family, some=("time_embed", "label_emb", "input_blocks.4.", "encoder.mid."))
    model = numbers(shapes, 0, torch.float64)
    before = outputs(model, family)
    first = {name.split()[0]: (name, group) for name, group in reversed(groups_of(keys, shapes).items())}
    for name, group in first.values():
        orders = {name: np.roll(np.arange(group.units * group.size), group.units // 2 * group.size)}
        for tensor in group.places:
            changed = reordered(model, {name: group}, orders, without=tensor)
            # What is added to all of a softmax's row changes nothing: no output sees the keys' bias.
            unseen = tensor.endswith((".k.bias", ".k_proj.bias"))
            assert (distance(before, outputs(changed, family)) < 1e-9) == unseen, (name, tensor)


@every_family
def test_the_data_covers_the_layout(family):
    keys, shapes = layout(family)
    groups = groups_of(keys, shapes)
    taken = {(name, axis): np.zeros(size, int) for name, shape in shapes.items() for axis, size in enumerate(shape)}
    for group in groups.values():
        for tensor, place in group.places.items():
            for start in place.starts:
                piece = taken[tensor, place.axis][start : start + group.units * group.size]
                assert len(piece) == group.units * group.size
                piece += 1
    for (tensor, axis), times in taken.items():
        assert times.max(initial=0) <= 1, (tensor, axis)
        if not times.all():
            assert _is_fixed(tensor, axis), (tensor, axis)
            # SDXL's sizes, which come after the pooled text.
            assert times.sum() == (1280 if "label_emb.0.0.weight" in tensor else 0), (tensor, axis)


def _is_fixed(name, axis):
    """Whether an axis lies on a main stream, or counts pixels, latents, tokens, positions, sinusoids."""
    inside = name.removeprefix(UNET).removeprefix(VAE)
    if axis > 1 or inside.endswith("logit_scale"):
        return True
    if name.startswith(VAE):
        streams = ("conv_", "quant_conv", "post_quant", "norm_out", ".norm1.", ".norm.", "nin_shortcut", "sample.")
        ends = {0: ("conv2.", "proj_out."), 1: ("conv1.", "q.", "k.", "v.")}[axis]
        return any(each in inside for each in (*streams, *ends))
    if name.startswith(UNET):
        streams = ("input_blocks.0.", ".op.", ".conv.", "in_layers.0.", "skip_connection.", ".norm.")
        ends = {0: ("out_layers.3.", "proj_out."), 1: ("in_layers.2.", "proj_in.", "time_embed.0.", "label_emb.0.0.")}
        return inside.startswith("out.") or any(each in inside for each in (*streams, *ends[axis]))
    # The embeddings' rows are tokens and positions. SD2 has a projection that nothing takes.
    return (axis == 0 and "embedding" in inside) or (axis == 1 and inside.endswith("model.text_projection"))


def test_heads_are_the_architectures():
    def heads(family):
        keys, shapes = layout(family)
        found = groups_of(keys, shapes).items()
        return Counter((group.units, group.size) for name, group in found if name.startswith("attention_heads"))

    # attn1 and attn2 of each transformer block.
    assert heads("sd1") == {(8, 40): 10, (8, 80): 10, (8, 160): 12}
    assert heads("sd2") == {(5, 64): 10, (10, 64): 10, (20, 64): 12}
    assert heads("sdxl") == {(10, 64): 20, (20, 64): 120}


def test_groups_do_not_depend_on_a_files_prefix():
    keys, shapes = layout("sd1")
    bare = {
        name: Key(name.split(".", 2 if "cond" in name else 1)[-1], "sd1", key.component, key.block)
        for name, key in keys.items()
    }
    assert bare[UNET + "time_embed.0.weight"].name == "diffusion_model.time_embed.0.weight"
    found = [[group.places for group in groups_of(each, shapes).values()] for each in (keys, bare)]
    assert found[0] == found[1]


@pytest.mark.parametrize("family", [None, "flux"])
def test_a_model_of_no_known_family_is_refused(family):
    with pytest.raises(UsageError) as caught:
        groups_of({"x": Key("x", family)}, {"x": (3,)})
    assert "sdxl" in caught.value.hint


@pytest.mark.parametrize("sizes", [1, 4, 6])
@every_family
def test_sizes_that_do_not_fit_leave_a_group_in_place(family, sizes):
    keys, shapes = layout(family, deep=1)
    shapes = {name: tuple(min(size, sizes) for size in shape) for name, shape in shapes.items()}
    a, b = numbers(shapes, 0), numbers(shapes, 1)
    find_orders(Pair(keys, a, b))
    left = ("resblock", "clip_heads", "attention_heads", "feed_forward")
    assert not any(name.startswith(left) for name in groups_of(keys, shapes))


def test_a_width_that_cannot_be_divided_is_left_in_place():
    name = UNET + "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
    keys = {name: Key(name, "sdxl", "unet", "IN04")}

    def titles(*shape):
        return {group.split()[0] for group in groups_of(keys, {name: shape})}

    assert titles(128, 16) == {"clip_stream", "openclip_stream", "attention_heads"}
    assert titles(128, 12) == {"attention_heads"}
    assert titles(160, 12) == set()


# --- the matching -----------------------------------------------------------------------------------------


def merged(keys, a, b, orders, alpha):
    rebasin = OPERATIONS["rebasin"].function
    return {name: rebasin(a[name], b[name], alpha=alpha, key=keys[name], survey=orders) for name in keys}


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_permuted_model_is_put_back_to_the_bit(family):
    keys, shapes = little(family, some=("",))
    model, groups = numbers(shapes, 0), groups_of(keys, shapes)
    changed = reordered(model, groups, orders_of(groups, 7))
    orders = find_orders(Pair(keys, model, changed, threads=2))
    back = merged(keys, model, changed, orders, 1.0)
    assert [name for name in keys if not torch.equal(back[name], model[name])] == []


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_noise_does_not_hide_the_order(family):
    keys, shapes = little(family)
    model, groups = numbers(shapes, 0), groups_of(keys, shapes)
    noise = numbers(shapes, 1)
    near = {name: each + 0.3 * noise[name] for name, each in model.items()}
    changed = reordered(near, groups, orders_of(groups, 7))
    back = merged(keys, model, changed, find_orders(Pair(keys, model, changed)), 1.0)
    assert [name for name in keys if not torch.equal(back[name], near[name])] == []


def test_a_fine_tune_stays_in_place_and_costs_one_sweep():
    keys, shapes = little("sd1")
    model, noise = numbers(shapes, 0), numbers(shapes, 1)
    pair = Pair(keys, model, {name: each + 0.2 * noise[name] for name, each in model.items()})
    assert find_orders(pair) == {}
    uses = Counter(name for group in groups_of(keys, shapes).values() for name in group.places)
    assert Counter(pair.asked) == uses


def test_unlike_models_come_nearer_and_no_group_can_do_better():
    keys, shapes = little("sd1", some=("input_blocks.4.", "time_embed", "encoder.mid."))
    a, b = numbers(shapes, 0), numbers(shapes, 1)
    found = merged(keys, a, b, find_orders(Pair(keys, a, b)), 1.0)

    def likeness(other):
        return sum(float((a[name].double() * other[name].double()).sum()) for name in keys)

    assert likeness(found) > likeness(b) + 1.0
    assert find_orders(Pair(keys, a, found)) == {}
    computed = [outputs({name: each.double() for name, each in model.items()}, "sd1") for model in (b, found)]
    assert distance(*computed) < 1e-9


def test_the_order_found_depends_neither_on_threads_nor_on_scale_nor_on_room(monkeypatch):
    keys, shapes = little("sd1", some=("input_blocks.1.", "time_embed", "encoder.mid."))
    a, b = numbers(shapes, 0), numbers(shapes, 1)
    first = find_orders(Pair(keys, a, b))
    for room, other in (
        (matching.HELD, Pair(keys, a, b, threads=4)),
        (matching.HELD, Pair(keys, {name: each * 2.0**100 for name, each in a.items()}, b)),
        (matching.HELD, Pair(keys, a, {name: each * 2.0**-115 for name, each in b.items()})),
        (1, Pair(keys, a, b)),
    ):
        monkeypatch.setattr(matching, "HELD", room)
        again = find_orders(other)
        assert first.keys() == again.keys()
        for key, axes in first.items():
            assert all(np.array_equal(order, again[key][axis]) for axis, order in axes.items())


def test_what_is_not_finite_counts_for_nothing_and_shows():
    keys, shapes = little("sd1", some=("input_blocks.1.", "time_embed", "encoder.mid."))
    model, groups = numbers(shapes, 0), groups_of(keys, shapes)
    changed = reordered(model, groups, orders_of(groups, 7))
    bad = UNET + "input_blocks.1.1.transformer_blocks.0.ff.net.2.bias"
    changed[bad][3] = math.nan
    back = merged(keys, model, changed, find_orders(Pair(keys, model, changed)), 1.0)
    assert [name for name in keys if not torch.equal(back[name], model[name])] == [bad]
    assert int(back[bad].isnan().sum()) == 1


def test_of_a_part_of_a_model_what_is_there_is_matched():
    keys, shapes = little("sdxl")
    model, groups = numbers(shapes, 0), groups_of(keys, shapes)
    changed = reordered(model, groups, orders_of(groups, 7))
    keys = {name: key for name, key in keys.items() if key.component == "unet"}
    back = merged(keys, model, changed, find_orders(Pair(keys, model, changed)), 1.0)
    assert [name for name in keys if not torch.equal(back[name], model[name])] == []


# --- assignments ------------------------------------------------------------------------------------------


def test_blocks_change_places_whole():
    # Freely, all four cost nothing; in blocks of two, rows 0 and 1 must share a block of columns.
    cost = np.array([[9, 9, 9, 0], [0, 9, 4, 9], [9, 0, 9, 9], [2, 9, 0, 9]], dtype=float)
    assert list(assign(cost, 1)) == [3, 0, 1, 2]
    assert list(assign(cost, 2)) == [3, 2, 1, 0]


@pytest.mark.parametrize("seed", range(5))
def test_assignments_with_blocks_are_the_best_there_are(seed):
    cost = np.random.default_rng(seed).standard_normal((6, 6))

    def total(order):
        return cost[np.arange(6), list(order)].sum()

    def allowed(order):
        return all(order[at] // 2 == order[at + 1] // 2 for at in (0, 2, 4))

    every = list(itertools.permutations(range(6)))
    assert total(assign(cost, 1)) == pytest.approx(min(map(total, every)))
    assert total(assign(cost, 3)) == pytest.approx(min(total(order) for order in every if allowed(order)))
    assert allowed(assign(cost, 3))
