"""What is measured of small random models, and what is said of them beside their parents."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from mergekit_sd.sampling.checks import Probes, Seen, compare, measure
from mergekit_sd.sampling.checks.measuring import probe_pictures, signal_and_noise
from mergekit_sd.sampling.checks.tracing import unet_units
from mergekit_sd.sampling.conditions import Condition
from tests import diffusers_folders as folders

WORDS = ["a", "red", "blue", "circle", "square", "car", "cat", "girl"]
CONCEPTS = {"red": "red", "blue": "blue", "circle": "circle", "square": "square", "car": "car", "cat": "cat"}
PROBES = Probes(
    "tests", CONCEPTS, ("", "a"), (("red", "circle"), ("blue", "square")), "a red circle", (250, 500, 750), (1,)
)


def networks(family: str = "sd1", seed: int = 0, **options) -> SimpleNamespace:
    """A random model as the loader gives it. Its UNet is made to listen to its prompt: random ones hardly do."""
    torch.manual_seed(seed)
    made = folders.components(family, **options)
    for name, weight in made["unet"].named_parameters():
        if "attn2.to_v" in name or "attn2.to_out.0.weight" in name or "proj_out.weight" in name:
            weight.data.mul_(4)
    for each in made.values():
        each.eval()
    return SimpleNamespace(
        architecture=family,
        family=family,
        prediction="epsilon",
        zero_snr=False,
        unet=made["unet"],
        vae=made["vae"],
        text_encoders=tuple(made[name] for name in ("text_encoder", "text_encoder_2") if name in made),
        size=(64, 64),
        device=torch.device("cpu"),
        dtype=torch.float32,
        nonfinite={},
    )


def encoder(model: SimpleNamespace) -> Callable[[str], Condition]:
    """Words as tokens, 12 of them: enough of a prompt for what is measured."""

    def encode(prompt: str) -> Condition:
        tokens = [98, *(WORDS.index(word) + 1 for word in prompt.split()), *[99] * 12][:12]
        found = [each(torch.tensor([tokens]), output_hidden_states=True) for each in model.text_encoders]
        if len(found) == 1:
            return Condition(found[0].last_hidden_state)
        return Condition(torch.cat([each.hidden_states[-2] for each in found], dim=2), found[1].text_embeds)

    return encode


def measured(model: SimpleNamespace, probes: Probes = PROBES, **options):
    return measure(model, encoder(model), probes, **options)


def found(child, parents, name: str, seen: Seen | None = None):
    checks, _ = compare("mix", child, parents, seen)
    return next(each for each in checks if each.name == name)


@pytest.fixture(scope="module")
def base() -> SimpleNamespace:
    return networks()


@pytest.fixture(scope="module")
def parent(base):
    return measured(base)


@pytest.fixture
def child(base) -> SimpleNamespace:
    return SimpleNamespace(**{**vars(base), "unet": copy.deepcopy(base.unet)})


def test_a_model_beside_itself_has_nothing_to_say(base, parent):
    again = measured(base, against={"base": parent})
    checks, charts = compare("mix", again, {"base": parent}, Seen(position_ids="ok"))
    random = {"prediction type"}  # which a random net cannot have
    assert {each.name for each in checks if each.level != "ok"} == random
    assert {each.heading for each in checks} == {"prompt", "unasked", "sound"}
    assert all(each.model == "mix" and "mix" in each.message and each.message.endswith(".") for each in checks)
    own, total, text, answers = charts
    assert set(own.values["base"].values()) == set(total.values["base"].values()) == {0.0}
    assert set(text.values["base"].values()) == {0.0}
    assert list(own.values["base"]) == [f"IN{i:02}" for i in range(12)] + ["M00"] + [f"OUT{i:02}" for i in range(12)]
    assert list(text.values["base"]) == ["embeddings", "layer 00", "layer 01"]
    assert set(answers.values["mix"].values()) == {1.0}


def test_a_measure_is_small_and_can_be_sent_to_another_process(parent):
    sent = pickle.dumps(parent)
    assert len(sent) < 3_000_000
    again = pickle.loads(sent)
    assert found(again, {"base": parent}, "drift from base").message == "Every block of mix answers as base's does."


def test_the_unet_is_called_once_for_each_prompt_and_trace(base, parent):
    assert (parent.calls, parent.probed) == (9, 27)
    again = measured(base, against={"one": parent, "two": parent})
    assert (again.calls, again.probed) == (11, 33)


@pytest.mark.parametrize(
    ("block", "name"),
    [
        ("IN00", "conv_in.weight"),
        ("IN00", "time_embedding.linear_2.weight"),
        ("IN01", "down_blocks.0.resnets.0.conv2.weight"),
        ("IN03", "down_blocks.0.downsamplers.0.conv.weight"),
        ("IN05", "down_blocks.1.attentions.1.proj_out.weight"),
        ("M00", "mid_block.resnets.0.conv1.weight"),
        ("OUT02", "up_blocks.0.upsamplers.0.conv.weight"),
        ("OUT04", "up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_k.weight"),
        ("OUT11", "up_blocks.3.resnets.2.conv_shortcut.weight"),
        ("OUT11", "conv_out.weight"),
    ],
)
def test_exactly_the_changed_block_drifts_of_its_own(child, parent, block, name):
    child.unet.get_parameter(name).data.mul_(1.5)
    _, charts = compare("mix", measured(child, against={"base": parent}), {"base": parent})
    own, total = (chart.values["base"] for chart in charts[:2])
    assert {each for each, drift in own.items() if drift > 0} == {block}
    names = list(total)
    earlier = names[: names.index(block)]
    assert all(total[each] == 0 for each in earlier)
    assert total[block] == pytest.approx(own[block], abs=2e-3)
    assert total["OUT11"] > 0


def test_every_weight_of_a_unet_lies_in_one_block(base):
    for family in ("sd1", "sdxl"):
        unet = base.unet if family == "sd1" else folders.unet("sdxl")
        units = unet_units(unet, family)
        assert len(units) == (25 if family == "sd1" else 19)
        entries = [unit.entry for unit in units if unit.entry is not None]
        assert len(set(map(id, entries))) == len(units) - 1


def test_the_drift_names_the_block(child, parent):
    child.unet.get_parameter("mid_block.resnets.0.conv2.weight").data.mul_(2)
    mine = measured(child, against={"base": parent})
    said = found(mine, {"base": parent}, "drift from base")
    assert said.level == "ok"
    assert "moved most from base's, of their own: M00 (" in said.message


def mixed(a, b, part):
    """Every weight of two UNets, averaged."""
    made, other = copy.deepcopy(a.unet), dict(b.unet.named_parameters())
    for name, weight in made.named_parameters():
        weight.data.lerp_(other[name].data, part)
    return SimpleNamespace(**{**vars(a), "unet": made})


def test_a_block_that_is_no_mix_of_the_parents_is_stray(base, parent):
    other = networks(seed=0)
    for weight in other.unet.parameters():
        weight.data.mul_(1.01)
    parents = {"base": parent, "other": measured(other)}
    mine = mixed(base, other, 0.4)
    assert found(measured(mine, against=parents), parents, "stray blocks", Seen(only_models=True)).level == "ok"
    weight = mine.unet.get_parameter("mid_block.resnets.0.conv2.weight")
    torch.manual_seed(1)
    weight.data.normal_(0, 20 * float(weight.detach().std()))
    worn = measured(mine, against=parents)
    check = found(worn, parents, "stray blocks", Seen(only_models=True))
    assert check.level == "warning"
    assert "further off than the parents are from each other: M00. " in check.message
    assert list(check.figures) == ["M00 relative"]
    for which, seen in ((parents, Seen()), ({"base": parent}, Seen(only_models=True))):  # a LoRA; one parent alone
        assert "stray blocks" not in {each.name for each in compare("mix", worn, which, seen)[0]}


def test_a_parent_measured_afterwards_still_shows_the_total_drift(child, parent):
    child.unet.get_parameter("mid_block.resnets.0.conv2.weight").data.mul_(2)
    checks, charts = compare("mix", measured(child), {"base": parent})
    assert "with what they inherit: M00 (" in next(each.message for each in checks if each.name == "drift from base")
    assert charts[0].title == "Blocks of mix: drift with what they inherit"


def test_a_text_encoders_layer_drifts_of_its_own(child, base, parent):
    changed = copy.deepcopy(base.text_encoders[0])
    changed.get_parameter(
        next(name for name, _ in changed.named_parameters() if name.endswith("layers.0.mlp.fc2.weight"))
    ).data.mul_(3)
    child.text_encoders = (changed,)
    _, charts = compare("mix", measured(child, against={"base": parent}), {"base": parent})
    own, total, text = (chart.values["base"] for chart in charts[:3])
    assert {name for name, drift in text.items() if drift > 0} == {"layer 00"}
    assert set(own.values()) == {0.0}
    assert total["IN00"] == 0 < total["IN01"]


def test_sdxl_has_two_text_encoders_and_nine_blocks_each_way():
    model = networks("sdxl")
    mine = measured(model)
    again = measured(model, against={"base": mine})
    _, charts = compare("mix", again, {"base": mine})
    assert len(charts[0].values["base"]) == 19
    assert "2: layer 01" in charts[2].values["base"]
    assert all(set(chart.values["base"].values()) == {0.0} for chart in charts[:3])


def test_an_inpainting_unet_is_asked_too():
    mine = measured(networks(channels=9))
    assert mine.finite == {"text encoder": True, "UNet": True, "VAE": True}


# --- prompts -----------------------------------------------------------------------------------------------


def with_token(base: SimpleNamespace, change: Callable[[torch.Tensor], None]) -> SimpleNamespace:
    """The model with another table of tokens."""
    encoder_ = copy.deepcopy(base.text_encoders[0])
    change(next(weight for name, weight in encoder_.named_parameters() if name.endswith("token_embedding.weight")).data)
    return SimpleNamespace(**{**vars(base), "text_encoders": (encoder_,)})


def row(word: str) -> int:
    return WORDS.index(word) + 1


@pytest.fixture(scope="module")
def listening() -> SimpleNamespace:
    """Words as directions of their own; the padding's token is the origin, so that no word is what is left."""

    def spread(table: torch.Tensor) -> None:
        table.copy_(torch.eye(100, table.shape[1]) * 8)
        table[99] = 0

    return with_token(networks(seed=3), spread)


@pytest.fixture(scope="module")
def listened(listening):
    return measured(listening)


def test_a_word_whose_row_is_zero_is_forgotten_and_no_other(listening, listened):
    deaf = with_token(listening, lambda table: table[row("circle")].zero_())
    check = found(measured(deaf), {"base": listened}, "forgetting")
    assert check.level == "warning"
    assert check.message.startswith("mix has forgotten circle (")
    assert check.figures["red"] == pytest.approx(1, abs=1e-3)


def test_a_model_that_answers_to_one_word_only_is_said_to(listening, listened):
    def change(table: torch.Tensor) -> None:
        for word in ("red", "blue", "circle", "square", "car"):
            table[row(word)].zero_()

    check = found(measured(with_token(listening, change)), {"base": listened}, "forgetting")
    assert check.message.startswith("mix answers to cat only; it has forgotten red, blue, circle, square, car")


def test_a_word_that_means_another_instead_is_taken_for_it(listening, listened):
    def change(table: torch.Tensor) -> None:
        table[row("square")] = table[row("circle")]

    mine = measured(with_token(listening, change))
    check = found(mine, {"base": listened}, "forgetting")
    assert check.level == "warning"
    assert check.message == "mix takes square for circle, which its parents tell apart."
    assert found(mine, {"base": listened, "twin": mine}, "forgetting").level == "ok"  # inherited


def test_what_one_parent_alone_knows_must_be_kept(listening, listened):
    deaf = measured(with_token(listening, lambda table: table[row("circle")].zero_()))
    assert found(listened, {"deaf": deaf, "base": listened}, "forgetting").level == "ok"
    assert found(deaf, {"deaf": deaf, "base": listened}, "forgetting").level == "warning"
    assert "circle" not in found(deaf, {"deaf": deaf}, "forgetting").figures  # no parent answers it: nothing to lose


def test_a_word_that_means_another_as_well_brings_it_along(listening, listened):
    def change(table: torch.Tensor) -> None:
        table[row("red")] += 2 * table[row("circle")]

    mine = measured(with_token(listening, change))
    check = found(mine, {"base": listened}, "association")
    assert (check.level, check.heading) == ("warning", "prompt")
    assert check.message.endswith("more than in its parents: red brings circle.")
    assert found(listened, {"base": listened}, "association").level == "ok"
    assert found(mine, {"base": listened, "twin": mine}, "association").level == "ok"  # inherited


def test_what_the_padding_means_is_added_unasked(listening, listened):
    def change(table: torch.Tensor) -> None:
        table[99] = 0.7 * table[row("circle")]

    check = found(measured(with_token(listening, change)), {"base": listened}, "unasked")
    assert (check.level, check.heading) == ("warning", "unasked")
    assert "to empty and plain prompts: " in check.message
    assert "circle (" in check.message


# --- soundness ---------------------------------------------------------------------------------------------


class Oracle(torch.nn.Module):
    """A UNet that knows the probes' noise: it predicts just that, or v, `part` of it right, the rest random."""

    def __init__(self, kind: str, part: float = 1.0) -> None:
        super().__init__()
        self.config = SimpleNamespace(in_channels=4)
        clean, noise, times = probe_pictures(PROBES, 8)
        signal, share = signal_and_noise(times)
        right = {"epsilon": noise, "v": signal * noise - share * clean}[kind]
        wild = np.random.default_rng(7).standard_normal(right.shape).astype(np.float32)
        self.answer = torch.from_numpy(part * right + (1 - part) * wild)

    def forward(self, sample, timestep, **_):
        return (self.answer[: len(sample)],)


@pytest.mark.parametrize("part", [1.0, 0.7])
@pytest.mark.parametrize(("truth", "other"), [("epsilon", "v"), ("v", "epsilon")])
def test_what_the_unet_predicts_is_found_out(child, truth, other, part):
    child.unet = Oracle(truth, part)
    child.prediction = truth
    assert found(measured(child), {}, "prediction type").level == "ok"
    child.prediction = other
    check = found(measured(child), {}, "prediction type")
    assert check.level == "failed"
    word = {"epsilon": "noise (epsilon)", "v": "velocity (v)"}[truth]
    assert f"the pictures come out wrong because it predicts {word}." in check.message


@pytest.mark.parametrize("said", ["epsilon", "v"])
@pytest.mark.parametrize("part", [0.0, 0.05])
def test_a_net_that_guesses_is_not_accused_of_the_other_type(child, said, part):
    child.unet, child.prediction = Oracle("v", part), said
    check = found(measured(child), {}, "prediction type")
    assert check.level == "warning"
    assert "cannot be told" in check.message


def test_a_net_worse_than_nothing_is_accused_beside_parents_that_predict(child):
    child.unet = Oracle("epsilon")
    sound = measured(child)
    child.unet = Oracle("epsilon", 0.0)
    check = found(measured(child), {"base": sound}, "prediction type")
    assert check.level == "failed"
    assert "predicts worse than nothing would, unlike its parents'" in check.message
    assert check.figures["least error of a parent"] < 0.1


def test_a_random_unet_is_not_accused(parent):
    assert found(parent, {}, "prediction type").level == "warning"


def test_predictions_of_velocity_are_compared_as_noise(child):
    child.unet = Oracle("v")
    child.prediction = "v"
    _, noise, _ = probe_pictures(PROBES, 8)
    np.testing.assert_allclose(measured(child).predictions[""], noise, atol=1e-5)


def test_nan_in_the_unet_is_told_from_nan_in_the_vae(base, child, parent):
    child.unet.get_parameter("conv_out.weight").data[0, 0, 0, 0] = float("nan")
    mine = measured(child, against={"base": parent})
    check = found(mine, {"base": parent}, "finite")
    assert check.level == "failed"
    assert check.message.startswith("The UNet of mix gives NaN or Inf")
    child.nonfinite = {"unet.conv_out.weight": 1}
    assert "in 1 tensor: unet.conv_out.weight. " in found(measured(child), {}, "finite").message

    vae = copy.deepcopy(base.vae)
    vae.get_parameter("decoder.conv_out.weight").data[0] = float("nan")
    check = found(measured(SimpleNamespace(**{**vars(base), "vae": vae})), {}, "finite")
    assert check.level == "failed"
    assert check.message.startswith("The VAE of mix makes NaN, and not for want of precision")


def test_a_parent_with_nan_is_left_out(child, parent):
    child.unet.get_parameter("conv_out.weight").data[0, 0, 0, 0] = float("nan")
    _, charts = compare("mix", parent, {"broken": measured(child)})
    assert charts == ()


@pytest.mark.parametrize(
    ("seen", "level", "words"),
    [
        (Seen(nan_latents=True), "failed", "ends in NaN before the VAE"),
        (Seen(nan_decode=True), "failed", "The VAE of mix makes NaN"),
        (Seen(in_fp32=True), "warning", "The VAE of mix overflows in the precision it is stored in"),
    ],
)
def test_what_the_sampling_saw_counts(parent, seen, level, words):
    check = found(parent, {}, "finite", seen)
    assert check.level == level
    assert words in check.message


def test_a_vae_in_fp16_is_run_in_fp32_and_left_as_it_was(base, parent):
    vae = copy.deepcopy(base.vae).half()
    mine = measured(with_vae(base, vae))
    assert next(vae.parameters()).dtype == torch.float16
    assert mine.round_trip == pytest.approx(parent.round_trip, rel=1e-2)


def test_what_is_all_zeros_is_named(base, parent):
    assert found(parent, {}, "empty parts").level == "ok"
    unet, text = copy.deepcopy(base.unet), copy.deepcopy(base.text_encoders[0])
    for name, weight in unet.named_parameters():
        if name.startswith(("up_blocks.1.resnets.1.", "up_blocks.1.attentions.1.")):
            weight.data.zero_()
        if name == "mid_block.resnets.0.conv1.weight":  # one of many: not empty
            weight.data.zero_()
    for weight in text.parameters():
        weight.data.zero_()
    mine = measured(SimpleNamespace(**{**vars(base), "unet": unet, "text_encoders": (text,)}))
    check = found(mine, {"base": parent}, "empty parts")
    assert check.level == "failed"
    assert check.message.startswith("Every weight is 0 in these parts of mix: OUT04, text encoder.")


@pytest.mark.parametrize(("state", "level"), [("ok", "ok"), ("missing", "ok"), ("corrupt", "failed")])
def test_position_ids(parent, state, level):
    check = found(parent, {}, "position ids", Seen(position_ids=state))
    assert check.level == level
    assert "The position ids of mix" in check.message


class Pooling(torch.nn.Module):
    """A VAE without loss on what is smooth: means of 8×8 pixels, `turned` into other channels, `worn` by noise."""

    def __init__(self, turned: int = 0, worn: float = 0.0) -> None:
        super().__init__()
        self.config = SimpleNamespace(scaling_factor=1.0)
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.turned, self.worn = turned, worn

    def encode(self, picture, return_dict):
        means = torch.nn.functional.avg_pool2d(picture, 8)
        latents = torch.cat([means, torch.zeros_like(means[:, :1])], dim=1).roll(self.turned, 1)
        return (SimpleNamespace(mode=lambda: latents * (-1 if self.turned else 1)),)

    def decode(self, latents, return_dict):
        latents = (latents * (-1 if self.turned else 1)).roll(-self.turned, 1)
        picture = torch.nn.functional.interpolate(latents[:, :3], scale_factor=8)
        return (picture * (1 - self.worn),)


def with_vae(base: SimpleNamespace, vae: torch.nn.Module) -> SimpleNamespace:
    return SimpleNamespace(**{**vars(base), "vae": vae})


def test_a_vae_of_another_family_and_a_worn_one_are_told(base):
    whole = measured(with_vae(base, Pooling()))
    assert found(whole, {"base": whole}, "VAE").level == "ok"
    assert found(whole, {}, "VAE").level == "ok"
    other = found(measured(with_vae(base, Pooling(turned=2))), {"base": whole}, "VAE")
    assert other.level == "failed"
    assert "of another family than its parents'" in other.message
    worn = measured(with_vae(base, Pooling(worn=0.9)))
    check = found(worn, {"base": whole}, "VAE", Seen(mixed_vae=True))
    assert check.level == "failed"
    assert "times worse than its parents'. The recipe mixes VAEs" in check.message
    assert "does not bring a picture back" in found(worn, {}, "VAE").message
