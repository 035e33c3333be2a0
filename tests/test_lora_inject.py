"""LoRA files into models, by recipe and by command: which tensors change, by how much, and what is refused."""

from __future__ import annotations

import models
import numpy as np
import pytest
import torch

import mergekit_sd as mk
from mergekit_sd import architectures
from mergekit_sd.adapters.algorithms import apply
from mergekit_sd.adapters.targets import lora_name, targets_of
from mergekit_sd.architectures import detect
from mergekit_sd.errors import FamilyMismatch, MalformedFile, ShapeMismatch, WrongFormat
from mergekit_sd.execute import tasks, worker

RANK = 3
WIDE = {"sd1": 24, "sd2": 24, "sdxl": 24}
every_family = pytest.mark.parametrize("family", WIDE)


def checkpoint(family, dtype=torch.float32, seed=0):
    """A small model with two layers in its text encoders; q, k and v of OpenCLIP in one, as it should be."""
    architecture, width = architectures.get(family), WIDE[family]
    random = torch.Generator().manual_seed(seed)
    made = {}
    for name, spec in architecture.tensors.items():
        if any(f"{stack}.{n}." in name for stack in ("encoder.layers", "resblocks") for n in range(2, 40)):
            continue
        shape = [min(size, width) for size in spec.shape]
        if name == architecture.conv_in:
            shape[1] = spec.shape[1]
        if "in_proj" in name:
            shape[0] = 3 * width
        made[name] = (torch.randn(shape, generator=random) * 0.1).to(dtype)
    if architecture.position_ids in made:
        made[architecture.position_ids] = torch.arange(77)[None]
    return made


def layers(family, model, *, conv=True):
    """Each trained layer with its kohya name and its weight's shape."""
    found = {}
    for layer in targets_of(detect(model), conv=conv):
        target = layer.target("weight")
        shape = tuple(model[target.tensor].shape)
        shape = (shape[0] // 3, *shape[1:]) if target.rows else shape
        found[lora_name(layer, "kohya", family)] = (layer, target, shape)
    return found


def lora(family, model, seed=5, *, alpha=2.0, conv=True, dtype=torch.float32):
    """A LoRA of every layer, random in both factors."""
    random = torch.Generator().manual_seed(seed)
    made = {}
    for name, (_, _, shape) in layers(family, model, conv=conv).items():
        ones = (1,) * (len(shape) - 2)
        made[f"{name}.lora_down.weight"] = torch.randn(RANK, *shape[1:], generator=random).to(dtype)
        made[f"{name}.lora_up.weight"] = (torch.randn(shape[0], RANK, *ones, generator=random) * 0.01).to(dtype)
        if alpha is not None:
            made[f"{name}.alpha"] = torch.tensor(alpha)
    return made


def oracle(family, model, file, strengths, scale=2.0 / RANK):
    """The model in float64 with a LoRA in it; `strengths` by component, or a function of a target and its layer."""
    made = {name: tensor.double().numpy() for name, tensor in model.items()}
    for name, (layer, target, shape) in layers(family, model).items():
        if f"{name}.lora_up.weight" not in file:
            continue
        up, down = (file[f"{name}.lora_{part}.weight"].double().numpy() for part in ("up", "down"))
        strength = strengths(layer) if callable(strengths) else strengths[layer.component]
        change = strength * scale * (up.reshape(len(up), -1) @ down.reshape(len(down), -1)).reshape(shape)
        whole = made[target.tensor]
        start = target.rows[0] * shape[0] if target.rows else 0
        whole[start : start + shape[0]] += change
    return made


def inject(folder, model, files, entries, **output):
    """The tensors of model with LoRA files in it, through a recipe."""
    models.write(folder / "model.safetensors", model)
    sources = {"model": "model.safetensors"}
    for name, file in files.items():
        models.write(folder / f"{name}.safetensors", file)
        sources[name] = f"{name}.safetensors"
    step = {"op": "inject_lora", "model": "model", "loras": entries}
    where = models.recipe(
        folder,
        sources,
        {"m": step},
        {"out": {"model": "m", "file": "out.safetensors", "dtype": "fp32", **output}},
    )
    mk.run(where, force=True)
    return models.read(folder / "out.safetensors")


def close(made, expected):
    for name, values in expected.items():
        np.testing.assert_allclose(made[name].double().numpy(), values, rtol=0, atol=1e-6, err_msg=name)


@every_family
def test_every_layer_of_every_family(tmp_path, family):
    model = checkpoint(family)
    file = lora(family, model)
    made = inject(tmp_path, model, {"style": file}, ["<lora:style:0.7>"])
    strengths = dict.fromkeys(("unet", "text_encoder", "text_encoder_2"), 0.7)
    close(made, oracle(family, model, file, strengths))
    changed = {target.tensor for _, target, _ in layers(family, model).values()}
    assert len(layers(family, model)) > 280
    for name, tensor in model.items():
        assert torch.equal(made[name], tensor) != (name in changed), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_files_of_every_dtype(tmp_path, dtype):
    model = checkpoint("sd1")
    file = lora("sd1", model, dtype=dtype)
    made = inject(tmp_path, model, {"style": file}, ["style"])
    close(made, oracle("sd1", model, {n: t.float() for n, t in file.items()}, {"unet": 1, "text_encoder": 1}))


@pytest.mark.parametrize(
    ("alpha", "scale"),
    [
        (None, 1.0),
        (torch.tensor(0.0), 1.0),
        (torch.tensor([6.0]), 2.0),
        (torch.tensor(6, dtype=torch.int64), 2.0),
        (torch.tensor(6, dtype=torch.int32), 2.0),
    ],
)
def test_alpha_in_every_form(tmp_path, alpha, scale):
    model = checkpoint("sd1")
    file = lora("sd1", model, alpha=None)
    if alpha is not None:
        file |= {f"{name}.alpha": alpha.clone() for name in layers("sd1", model)}
    made = inject(tmp_path, model, {"style": file}, ["style"])
    close(made, oracle("sd1", model, file, {"unet": 1, "text_encoder": 1}, scale))


def test_text_encoders_have_strengths_of_their_own(tmp_path):
    model = checkpoint("sdxl")
    file = lora("sdxl", model)
    entry = {"lora": "style", "strength": 0.8, "text_encoder": 0.5, "text_encoder_2": -0.25}
    made = inject(tmp_path, model, {"style": file}, [entry])
    close(made, oracle("sdxl", model, file, {"unet": 0.8, "text_encoder": 0.5, "text_encoder_2": -0.25}))


def test_block_weights(tmp_path):
    model = checkpoint("sd1")
    file = lora("sd1", model)
    made = inject(tmp_path, model, {"style": file}, [{"lora": "style", "strength": 2.0, "blocks": "OUTALL"}])
    outs = tuple(f"output_blocks.{n}." for n in range(3, 12))

    def strength(layer):
        if layer.component != "unet":
            return 2.0
        return 2.0 * (layer.target("weight").tensor.removeprefix("model.diffusion_model.").startswith(outs))

    close(made, oracle("sd1", model, file, strength))


def test_several_files_and_out_again(tmp_path):
    model = checkpoint("sd2")
    one, other = lora("sd2", model, 1), lora("sd2", model, 2, alpha=None)
    files = {"one": one, "other": other}
    both = inject(tmp_path, model, files, ["<lora:one:0.5>", "<lora:other:-0.3>"])
    expected = oracle("sd2", model, one, dict.fromkeys(("unet", "text_encoder"), 0.5))
    change = oracle("sd2", model, other, dict.fromkeys(("unet", "text_encoder"), -0.3), 1.0)
    close(both, {n: expected[n] + change[n] - model[n].double().numpy() for n in expected})
    back = inject(tmp_path, both, files, ["<lora:one:-0.5>", "<lora:other:0.3>"])
    for name, tensor in model.items():
        torch.testing.assert_close(back[name], tensor, rtol=0, atol=3e-7)


def test_strength_0_is_a_copy(tmp_path):
    model = checkpoint("sd1", torch.float16)
    made = inject(tmp_path, model, {"style": lora("sd1", model)}, ["<lora:style:0>"], dtype="keep")
    assert all(torch.equal(made[name], tensor) for name, tensor in model.items())


def test_what_needs_the_weight_itself(tmp_path):
    """DoRA and OFT one after the other, then a LoRA and a bias: as the formulas, tensor by tensor."""
    model = checkpoint("sd1")
    name, (_, target, shape) = next(iter(layers("sd1", model, conv=False).items()))
    random = torch.Generator().manual_seed(3)
    down, up = torch.randn(RANK, *shape[1:], generator=random), torch.randn(shape[0], RANK, generator=random)
    dora = {"lora_down.weight": down, "lora_up.weight": up.reshape(shape[0], RANK, *(1,) * (len(shape) - 2))}
    dora["dora_scale"] = torch.rand(shape[0], *(1,) * (len(shape) - 1), generator=random)
    oft = {"oft_blocks": torch.randn(2, shape[0] // 2, shape[0] // 2, generator=random) * 0.1}
    full = {"diff": torch.randn(shape, generator=random), "diff_b": torch.randn(shape[0], generator=random)}
    files = {
        file: {f"{name}.{part}": tensor for part, tensor in parts.items()}
        for file, parts in (("dora", dora), ("oft", oft), ("full", full))
    }
    bias = target.tensor.removesuffix("weight") + "bias"
    if bias not in model:
        model[bias] = torch.zeros(shape[0])
    made = inject(tmp_path, model, files, ["<lora:dora:0.5>", "<lora:oft:0.8>", "<lora:full:-1>"])
    weight = apply(apply(model[target.tensor], dora, 0.5), oft, 0.8) - full["diff"]
    torch.testing.assert_close(made[target.tensor], weight, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(made[bias], model[bias] - full["diff_b"], rtol=1e-6, atol=1e-7)


def test_magnitudes_of_peft_are_of_rows(tmp_path):
    """On a convolution as wide as high, (1, out, 1, 1) would mean columns in LyCORIS' files."""
    model = checkpoint("sd1")
    found = layers("sd1", model).values()
    layer, target, shape = next(each for each in found if len(each[2]) == 4 and each[2][2] == 3)
    random = torch.Generator().manual_seed(3)
    parts = {
        "lora_down.weight": torch.randn(RANK, *shape[1:], generator=random),
        "lora_up.weight": torch.randn(shape[0], RANK, 1, 1, generator=random),
        "dora_scale": torch.rand(shape[0], generator=random),
    }
    start = f"unet.{layer.diffusers}."
    file = {
        start + "lora_A.weight": parts["lora_down.weight"],
        start + "lora_B.weight": parts["lora_up.weight"],
        start + "lora_magnitude_vector": parts["dora_scale"].reshape(1, -1, 1, 1),
    }
    made = inject(tmp_path, model, {"dora": file}, ["dora"])
    expected = apply(model[target.tensor], parts, 1.0)
    torch.testing.assert_close(made[target.tensor], expected, rtol=1e-6, atol=1e-6)


def test_pieces_do_not_matter(tmp_path, monkeypatch):
    model = checkpoint("sd1", torch.float16)
    made = []
    for chunk in (1 << 18, 128, 64):
        monkeypatch.setattr(tasks, "CHUNK", chunk)
        monkeypatch.setattr(worker, "CHUNK", chunk)
        inject(tmp_path, model, {"style": lora("sd1", model)}, ["style"], dtype="fp16")
        made.append((tmp_path / "out.safetensors").read_bytes())
    assert made[0] == made[1] == made[2]


def test_the_file_recovers_and_verifies(tmp_path):
    model = checkpoint("sd1", torch.float16)
    inject(tmp_path, model, {"style": lora("sd1", model)}, [{"lora": "style", "strength": 0.5}], dtype="fp16")
    assert mk.recover(tmp_path / "out.safetensors").data["steps"]["m"]["loras"] == [{"lora": "style", "strength": 0.5}]
    assert mk.verify(tmp_path / "out.safetensors").same


def test_from_python(tmp_path):
    model = checkpoint("sd1", torch.float16)
    models.write(tmp_path / "model.safetensors", model)
    models.write(tmp_path / "style.safetensors", lora("sd1", model))
    opened, style = mk.open(tmp_path / "model.safetensors"), mk.open(tmp_path / "style.safetensors")
    made = []
    for given in ([(style, 0.5)], [{"lora": style, "strength": 0.5}]):
        mk.save(mk.ops.inject_lora(opened, given), tmp_path / "out.safetensors", force=True)
        made.append(models.read(tmp_path / "out.safetensors"))
    mk.save(mk.ops.inject_lora(opened, style), tmp_path / "one.safetensors")
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
    assert not torch.equal(made[0][CONV], models.read(tmp_path / "one.safetensors")[CONV])


CONV = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"

# --- what is left out, and what is refused ---------------------------------------------------------------


def planned(folder, model, file, **step):
    models.write(folder / "model.safetensors", model)
    models.write(folder / "style.safetensors", file)
    sources = {"model": "model.safetensors", "style": "style.safetensors"}
    step = {"op": "inject_lora", "model": "model", "loras": ["style"], **step}
    return mk.plan(models.recipe(folder, sources, {"m": step}))


def test_modules_that_find_no_tensor_are_noted(tmp_path):
    model = checkpoint("sd1")
    file = lora("sd1", model)
    file |= {
        f"lora_unet_nowhere_{n}.{part}.weight": torch.ones(4, 4) for n in "ab" for part in ("lora_up", "lora_down")
    }
    plan = planned(tmp_path, model, file)
    (note,) = [text for text in plan.warnings if "left out" in text]
    assert "2 modules" in note
    assert "lora_unet_nowhere_a, lora_unet_nowhere_b" in note


@pytest.mark.parametrize("other", ["sd2", "sdxl"])
def test_another_familys_lora_is_refused(tmp_path, other):
    model = checkpoint("sd1")
    with pytest.raises(FamilyMismatch, match="This LoRA is for") as caught:
        planned(tmp_path, model, real_names(other))
    assert caught.value.file == str(tmp_path / "style.safetensors")


def real_names(family):
    """A LoRA with the widths of a whole model, of one layer that tells the family."""
    start = "lora_unet_input_blocks_4_1" if family == "sdxl" else "lora_unet_down_blocks_1_attentions_0"
    width = {"sd2": 1024, "sdxl": 2048}[family]
    name = f"{start}_transformer_blocks_0_attn2_to_k"
    return {f"{name}.lora_down.weight": torch.zeros(4, width), f"{name}.lora_up.weight": torch.zeros(640, 4)}


def test_a_checkpoint_is_no_lora(tmp_path):
    model = checkpoint("sd1")
    with pytest.raises(WrongFormat, match='"style" is a checkpoint, no LoRA'):
        planned(tmp_path, model, model)


def test_a_lora_is_no_model(tmp_path):
    model = checkpoint("sd1")
    models.write(tmp_path / "a.safetensors", lora("sd1", model))
    models.write(tmp_path / "b.safetensors", lora("sd1", model, 9))
    step = {"op": "weighted_sum", "a": "a", "b": "b", "alpha": 0.5}
    with pytest.raises(WrongFormat, match='"a" is a LoRA'):
        mk.plan(models.recipe(tmp_path, {"a": "a.safetensors", "b": "b.safetensors"}, {"m": step}))


NAME = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
GOOD = {"lora_down.weight": torch.ones(2, 24), "lora_up.weight": torch.ones(24, 2), "alpha": torch.tensor(1.0)}
BROKEN = {
    "no up": ({"lora_up.weight": None}, MalformedFile, "lora_up.weight"),
    "no down": ({"lora_down.weight": None}, MalformedFile, "lora_down.weight"),
    "up transposed": ({"lora_up.weight": torch.ones(2, 24)}, ShapeMismatch, "lora_up.weight"),
    "down transposed": ({"lora_down.weight": torch.ones(24, 2)}, ShapeMismatch, "lora_"),
    "ranks differ": ({"lora_up.weight": torch.ones(24, 3)}, ShapeMismatch, "lora_up.weight"),
    "too wide": ({"lora_down.weight": torch.ones(2, 48)}, ShapeMismatch, "lora_down.weight"),
    "too high": ({"lora_up.weight": torch.ones(48, 2)}, ShapeMismatch, "lora_up.weight"),
    "rank 0": ({"lora_down.weight": torch.ones(0, 24), "lora_up.weight": torch.ones(24, 0)}, ShapeMismatch, "lora_"),
    "a vector": ({"lora_down.weight": torch.ones(24)}, ShapeMismatch, "lora_down.weight"),
    "a kernel": ({"lora_down.weight": torch.ones(2, 24, 3, 3)}, ShapeMismatch, "lora_down.weight"),
    "many alphas": ({"alpha": torch.ones(2)}, ShapeMismatch, "alpha"),
    "mid alone": ({"lora_down.weight": None, "lora_mid.weight": torch.ones(2, 2, 1, 1)}, MalformedFile, "lora_"),
    "two algorithms": ({"hada_w1_a": torch.ones(24, 2)}, MalformedFile, "No algorithm has these parts together."),
    "half a LoHa": (
        {**dict.fromkeys(GOOD), "hada_w1_a": torch.ones(24, 2), "hada_w1_b": torch.ones(2, 24)},
        MalformedFile,
        "hada_w2",
    ),
    "T-LoRA": ({**dict.fromkeys(GOOD), "q_layer.weight": torch.ones(2, 24)}, WrongFormat, "T-LoRA"),
    "OFT that does not fit": ({**dict.fromkeys(GOOD), "oft_blocks": torch.ones(5, 5, 5)}, ShapeMismatch, "oft_blocks"),
    "OFT not square": ({**dict.fromkeys(GOOD), "oft_blocks": torch.ones(6, 4, 3)}, ShapeMismatch, "oft_blocks"),
    "DoRA of another width": ({"dora_scale": torch.ones(7, 1)}, ShapeMismatch, "dora_scale"),
    "a difference of another shape": ({**dict.fromkeys(GOOD), "diff": torch.ones(24, 23)}, ShapeMismatch, "diff"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_malformed_files_are_refused_by_name(tmp_path, case):
    changes, error, words = BROKEN[case]
    parts = {name: tensor for name, tensor in {**GOOD, **changes}.items() if tensor is not None}
    with pytest.raises(error) as caught:
        planned(tmp_path, checkpoint("sd1"), {f"{NAME}.{part}": tensor for part, tensor in parts.items()})
    found = caught.value
    assert found.file == str(tmp_path / "style.safetensors")
    assert found.key == NAME
    assert words in found.message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_cannot_be_meant_are_refused_by_the_run(tmp_path, value):
    plan = planned(
        tmp_path,
        checkpoint("sd1"),
        {f"{NAME}.{n}": t for n, t in GOOD.items()} | {f"{NAME}.alpha": torch.tensor(value)},
    )
    with pytest.raises(MalformedFile, match="alpha") as caught:
        mk.run(plan.recipe)
    assert caught.value.file == str(tmp_path / "style.safetensors")
    assert caught.value.key == NAME
    assert not (tmp_path / "out.safetensors").exists()


# --- the command -----------------------------------------------------------------------------------------


def test_the_command_takes_strengths_as_prompts_do(tmp_path, monkeypatch):
    from mergekit_sd.cli.main import run

    monkeypatch.chdir(tmp_path)
    model = checkpoint("sd1", torch.float16)
    file = lora("sd1", model)
    models.write(tmp_path / "model.safetensors", model)
    models.write(tmp_path / "a:1.safetensors", file)
    assert run(["lora", "inject", "model.safetensors", "a:1.safetensors:0.5:0.8", "-o", "out.safetensors"]) == 0
    made = models.read(tmp_path / "out.safetensors")
    expected = oracle("sd1", model, file, {"unet": 0.8, "text_encoder": 0.5})
    assert made[CONV].dtype == torch.float16
    for name, values in expected.items():
        np.testing.assert_allclose(made[name].double().numpy(), values, rtol=1e-3, atol=1e-5)
    assert run(["lora", "inject", "model.safetensors", "nowhere:0.5", "-o", "x.safetensors"]) == 3
