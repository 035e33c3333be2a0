"""Tokens, chunks, textual inversions, and what text encoders say: against transformers, diffusers and numpy.

The text encoders are random and small, of the full vocabulary.
"""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusers_folders

from mergekit_sd.errors import EnvironmentFault, FamilyMismatch, MissingInput, RecipeError, ShapeMismatch, UsageError
from mergekit_sd.sampling.prompts import encode, find_embeddings
from mergekit_sd.sampling.prompts import tokens as tokens_module
from mergekit_sd.sampling.prompts.embeddings import LARGEST, Embeddings, load_embedding
from mergekit_sd.sampling.prompts.parse import parse
from mergekit_sd.sampling.prompts.tokens import BOS, CHUNK, COMMA, EOS, ZERO, Chunk, chunks_of, ids_of

WIDTH = diffusers_folders.TEXT
ASTRONAUT = "a photo of an astronaut riding a horse on mars"
IDS = (320, 1125, 539, 550, 18376, 6765, 320, 4558, 525, 7496)
LAYERS = 3


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(0)
    made = {
        family: diffusers_folders.text(
            *([kind] if (kind := parts[0]) else []), activation=parts[1], layers=LAYERS, vocabulary=49408
        ).eval()
        for family, parts in {
            "l": (diffusers_folders.CLIPTextModel, "quick_gelu"),
            "h": (diffusers_folders.CLIPTextModel, "gelu"),
            "g": (diffusers_folders.CLIPTextModelWithProjection, "gelu"),
        }.items()
    }
    for module in (made["l"], made["h"], made["g"].text_model):
        for parameter in module.final_layer_norm.parameters():  # as it is made, it leaves a mean of nearly 0
            torch.nn.init.normal_(parameter, 0.5)

    def model(family, *encoders):
        return types.SimpleNamespace(family=family, text_encoders=encoders, device=torch.device("cpu"))

    return {
        "sd1": model("sd1", made["l"]),
        "sd2": model("sd2", made["h"]),
        "sdxl": model("sdxl", made["l"], made["g"]),
    }


def row(ids, pad=EOS):
    return [BOS, *ids, EOS, *[pad] * (CHUNK - len(ids))]


def said(module, *rows):
    with torch.no_grad():
        return module(torch.tensor(rows), output_hidden_states=True)


def both(networks, positive, negative="", steps=1, **options):
    guidance = encode(networks, positive, negative, steps, **options)
    ((condition, weight),) = guidance.positive(0)
    assert weight == 1
    return condition, guidance.negative(0)


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


# --- tokens and chunks -----------------------------------------------------------------------------------


def test_known_ids():
    assert ids_of(ASTRONAUT) == IDS
    assert ids_of(ASTRONAUT.upper().replace(" ", "\n ")) == IDS
    assert ids_of(",") == (COMMA,)
    assert ids_of("") == ids_of(" \t") == ()
    assert ids_of("a \udcff") == ids_of("a ?")


def test_without_the_vocabulary(monkeypatch):
    monkeypatch.setattr(tokens_module, "tokenizer_files", lambda pad: None)
    tokens_module._tokenizer.cache_clear()
    with pytest.raises(EnvironmentFault, match=r"pip install 'mergekit-sd\[sample\]'"):
        ids_of("words that no test asked for")


def words(number, start=0):
    """So many tokens of one id each, in the order of the alphabet."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return " ".join(letters[(start + n) % 26] for n in range(number))


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("", [0]),
        (words(75), [75]),
        (words(76), [75, 1]),
        (words(151), [75, 75, 1]),
        (words(60) + ", " + words(20), [61, 20]),  # the comma is the 61st
        (words(55) + ", " + words(20), [56, 20]),  # 20 from the end: the first that counts
        (words(54) + ", " + words(21), [75, 1]),  # 21 from the end
        (words(60) + ", b, " + words(20), [63, 20]),  # the last of two
        (words(74) + ", " + words(3), [75, 3]),
        (words(75) + ", " + words(3), [75, 4]),
        (words(60) + ", " + words(14) + ", b", [75, 2]),  # a comma never leaves
        (words(60) + ", " + words(14), [75]),  # full, and nothing follows
        ("a BREAK b", [1, 1]),
        ("BREAK a", [0, 1]),
        ("a BREAK BREAK b", [1, 0, 1]),
        ("a BREAK", [1]),
        (words(75) + " BREAK b", [75, 1]),
        (words(60) + ", " + words(14) + " BREAK b", [75, 1]),
    ],
)
def test_chunks(text, lengths):
    chunks = chunks_of(parse(text))
    assert [len(chunk.ids) for chunk in chunks] == lengths
    assert sum((chunk.ids for chunk in chunks), ()) == ids_of(text.replace("BREAK", ""))


def test_weights_go_with_their_tokens():
    first, second = chunks_of(parse(f"{words(60)}, (a b:1.5) {words(20)}"))
    assert second.ids[:2] == ids_of("a b")
    assert second.weights == (1.5, 1.5, *[1.0] * 20)
    assert first.row_weights() == [1.0] * 77
    assert second.row_weights() == [1, 1.5, 1.5, *[1] * 74]


def test_rows():
    assert Chunk(IDS).row(EOS) == row(IDS)
    assert Chunk(IDS).row(ZERO) == [BOS, *IDS, EOS, *[0] * 65]
    assert len(Chunk((5,) * 75).row(ZERO)) == 77


# --- what the text encoders say --------------------------------------------------------------------------


def test_a_plain_prompt_is_the_encoders_own(networks):
    condition, negative = both(networks["sd1"], ASTRONAUT, ASTRONAUT)
    assert torch.equal(condition.context, said(networks["sd1"].text_encoders[0], row(IDS)).last_hidden_state)
    assert condition.pooled is None
    assert negative is condition
    sd2, _ = both(networks["sd2"], ASTRONAUT, ASTRONAUT)
    assert torch.equal(sd2.context, said(networks["sd2"].text_encoders[0], row(IDS, ZERO)).last_hidden_state)


def test_sdxl_is_diffusers_own(networks):
    from diffusers import StableDiffusionXLPipeline

    l, g = networks["sdxl"].text_encoders  # noqa: E741
    tokenizers = [tokens_module._tokenizer(), type(tokens_module._tokenizer())(**_vocabulary(), pad_token="!")]
    for each in tokenizers:
        each.model_max_length = 77
    pipeline = StableDiffusionXLPipeline(
        vae=diffusers_folders.vae(),
        text_encoder=l,
        text_encoder_2=g,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=diffusers_folders.unet("sdxl"),
        scheduler=None,
        force_zeros_for_empty_prompt=False,
    )
    with torch.no_grad():
        expected = pipeline.encode_prompt(ASTRONAUT, negative_prompt="", device="cpu")
    for condition, context, pooled in zip(both(networks["sdxl"], ASTRONAUT), expected[:2], expected[2:], strict=True):
        assert context.shape == (1, 77, 2 * WIDTH)
        close(condition.context, context)
        close(condition.pooled, pooled)


def _vocabulary():
    import json

    files = tokens_module.tokenizer_files("!")
    merges = [tuple(line.split(" ")) for line in files["merges.txt"].split("\n")[1:-1]]
    return {"vocab": json.loads(files["vocab.json"]), "merges": merges}


def test_emphasis_by_hand(networks):
    plain = said(networks["sd1"].text_encoders[0], row(ids_of("a red cat")))
    z = plain.last_hidden_state[0].double().numpy()
    w = np.ones(77)
    w[2], w[3] = 1.5, 1 / 1.1
    made = z * w[:, None]
    made *= z.mean() / made.mean()
    condition, _ = both(networks["sd1"], "a (red:1.5) [cat]")
    close(condition.context[0].double(), torch.from_numpy(made))


def test_emphasis_of_sdxl_is_each_encoders_own(networks):
    parts = []
    for module, pad in zip(networks["sdxl"].text_encoders, (EOS, ZERO), strict=True):
        z = said(module, row(ids_of("a red cat"), pad)).hidden_states[-2][0].double().numpy()
        made = z * np.where(np.arange(77) == 2, 1.4, 1.0)[:, None]
        parts.append(made * z.mean() / made.mean())
    condition, _ = both(networks["sdxl"], "a (red:1.4) cat")
    plain, _ = both(networks["sdxl"], "a red cat")
    close(condition.context[0].double(), torch.from_numpy(np.concatenate(parts, 1)))
    close(condition.pooled, plain.pooled)


def test_clip_skip_by_hand(networks):
    module = networks["sd1"].text_encoders[0]
    found = said(module, row(IDS))
    norm = {name: each.detach().double().numpy() for name, each in module.final_layer_norm.named_parameters()}
    for skip in range(1, LAYERS + 1):
        z = found.hidden_states[-skip].double().numpy()
        spread = np.sqrt(z.var(axis=-1, keepdims=True) + 1e-5)
        expected = (z - z.mean(axis=-1, keepdims=True)) / spread * norm["weight"] + norm["bias"]
        condition, _ = both(networks["sd1"], ASTRONAUT, clip_skip=skip)
        close(condition.context.double(), torch.from_numpy(expected))
    for family in ("sd2", "sdxl"):
        skipped, plain = both(networks[family], ASTRONAUT, clip_skip=2)[0], both(networks[family], ASTRONAUT)[0]
        assert torch.equal(skipped.context, plain.context)


@pytest.mark.parametrize("skip", [0, -1, LAYERS + 1])
def test_clip_skip_beyond_the_layers(networks, skip):
    with pytest.raises(UsageError, match=f"Clip skip {skip}: the text encoder has {LAYERS} layers"):
        encode(networks["sd1"], "a", "", 1, clip_skip=skip)


def test_all_are_as_long_as_the_longest(networks):
    condition, negative = both(networks["sdxl"], f"a cat BREAK (a:1.3) {words(80)}", "a dog")
    l, g = networks["sdxl"].text_encoders  # noqa: E741
    assert condition.context.shape == negative.context.shape == (1, 3 * 77, 2 * WIDTH)
    rows = [row(ids_of("a dog")), row([]), row([])]
    close(negative.context[0, :, :WIDTH], said(l, *rows).hidden_states[-2].reshape(-1, WIDTH))
    close(negative.pooled, said(g, row(ids_of("a dog"), ZERO)).text_embeds)
    close(condition.pooled, said(g, row(ids_of("a cat"), ZERO)).text_embeds)
    close(condition.context[0, :77, :WIDTH], said(l, row(ids_of("a cat"))).hidden_states[-2][0])


def test_steps_and_parts(networks, monkeypatch):
    model = networks["sd1"]
    calls = []
    monkeypatch.setattr(model.text_encoders[0], "forward", _counted(model.text_encoders[0].forward, calls))
    guidance = encode(model, "[a cat:a dog:0.5] :0.5 AND [a cat|a fox]", "[x:2] AND y", 4)
    assert [len(rows) for rows in calls] == [5]  # a cat, a dog, a fox, and the two of the negative prompt
    single = {text: both(model, text)[0].context for text in ("a cat", "a dog", "a fox")}
    expected = [("a cat", "a cat"), ("a cat", "a fox"), ("a dog", "a cat"), ("a dog", "a fox")]
    for step, (first, second) in enumerate(expected):
        (one, weight), (two, other) = guidance.positive(step)
        assert (weight, other) == (0.5, 1)
        close(one.context, single[first])
        close(two.context, single[second])
    against = [row(ids_of(text)) for text in (" AND y", "x AND y")]
    for step in range(4):
        expected = said(model.text_encoders[0], against[step >= 2]).last_hidden_state
        close(guidance.negative(step).context, expected)


def _counted(forward, calls):
    def counting(ids, **options):
        calls.append(ids)
        return forward(ids, **options)

    return counting


# --- textual inversions ----------------------------------------------------------------------------------


def vectors(number=2, seed=1, width=WIDTH):
    return torch.randn(number, width, generator=torch.Generator().manual_seed(seed))


def saved(folder, name, number=2, **options):
    path = folder / f"{name}.safetensors"
    save_file({"emb_params": vectors(number, **options)}, path)
    return path


FORMS = {
    "a.pt": lambda v: {"string_to_token": {"*": 265}, "string_to_param": {"*": v}, "name": "other", "step": 5},
    "a.bin": lambda v: {"<token>": v},
    "a.safetensors": lambda v: {"emb_params": v},
    "b.safetensors": lambda v: {"word": v},
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_form_is_read(tmp_path, name, dtype):
    values = vectors().to(dtype)
    if name.endswith(".safetensors"):
        save_file(FORMS[name](values), tmp_path / name)
    else:
        torch.save(FORMS[name](values), tmp_path / name)
    (found,) = load_embedding(tmp_path / name, [WIDTH])
    assert found.dtype == dtype
    assert torch.equal(found, values)


def test_one_vector_without_a_row_and_two_encoders(tmp_path):
    torch.save({"<x>": vectors(1)[0]}, tmp_path / "x.bin")
    assert load_embedding(tmp_path / "x.bin", [WIDTH])[0].shape == (1, WIDTH)
    both_of = {"clip_g": vectors(3, 1, 48), "clip_l": vectors(3, 2, 32)}
    save_file(both_of, tmp_path / "y.safetensors")
    l, g = load_embedding(tmp_path / "y.safetensors", [32, 48])  # noqa: E741
    assert torch.equal(l, both_of["clip_l"])
    assert torch.equal(g, both_of["clip_g"])


def test_what_does_not_fit(tmp_path):
    path = saved(tmp_path, "wide", width=WIDTH + 1)
    with pytest.raises(FamilyMismatch, match=r'"wide" is for text encoder of width 65; .* of width 64') as caught:
        load_embedding(path, [WIDTH])
    assert caught.value.file == str(path)
    with pytest.raises(FamilyMismatch, match="text encoders of width 64 and 64"):
        load_embedding(saved(tmp_path, "one"), [WIDTH, WIDTH])
    with pytest.raises(ShapeMismatch, match="76 vectors, above 75"):
        load_embedding(saved(tmp_path, "long", 76), [WIDTH])
    save_file({"clip_g": vectors(3), "clip_l": vectors(2)}, tmp_path / "odd.safetensors")
    with pytest.raises(ShapeMismatch, match="3 vectors for one text encoder and 2 for the other"):
        load_embedding(tmp_path / "odd.safetensors", [WIDTH, WIDTH])


def test_where_they_are_found(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "beside" / "deep").mkdir(parents=True)
    first, deep = saved(tmp_path / "in", "x"), saved(tmp_path / "in" / "deep", "Y")
    shadowed, near = saved(tmp_path / "beside", "x"), saved(tmp_path / "beside", "z")
    saved(tmp_path / "beside" / "deep", "w")
    (tmp_path / "in" / "notes.txt").write_text("no")
    with (tmp_path / "in" / "large.pt").open("wb") as file:
        file.truncate(LARGEST + 1)
    assert find_embeddings([tmp_path / "in"]) == {"x": first, "Y": deep}
    assert find_embeddings([tmp_path / "in"], [shadowed]) == {"x": first, "Y": deep, "z": near}
    with pytest.raises(MissingInput, match="no such folder"):
        find_embeddings([tmp_path / "none"])


def test_words_name_them(tmp_path):
    for name in ("style", "style two", "Bad-Hand-5"):
        saved(tmp_path, name)
    save_file({"x.weight": vectors(), "y.weight": vectors()}, tmp_path / "cat.safetensors")  # no textual inversion
    (tmp_path / "dog.pt").write_bytes(b"nothing that can be read")  # nobody names it
    find = Embeddings(find_embeddings([tmp_path]), [WIDTH]).find

    def found(text):
        return [chunk.words for chunk in chunks_of(parse(text), find)]

    assert found("a style") == [((1, "style"),)]
    assert found("a STYLE two, style") == [((1, "style two"), (4, "style"))]
    assert found("stylet a freestyle cat") == [()]
    assert found("(bad-hand-5:1.2)") == [((0, "Bad-Hand-5"),)]
    assert found("st(yle)") == [()]
    (chunk,) = chunks_of(parse("a (style:1.5) b"), find)
    assert chunk.ids == (*ids_of("a"), 0, 0, *ids_of("b"))
    assert chunk.weights == (1, 1.5, 1.5, 1)


def test_at_the_border_of_a_chunk(tmp_path):
    saved(tmp_path, "zebra", 4)
    find = Embeddings(find_embeddings([tmp_path]), [WIDTH]).find
    places = {71: (75, (71,), ()), 72: (72, (), (0,)), 75: (75, (), (0,))}
    for before, (length, first, second) in places.items():
        one, two = chunks_of(parse(f"{words(before)} zebra b"), find)
        assert len(one.ids) == length
        assert [place for place, _ in one.words] == list(first)
        assert [place for place, _ in two.words] == list(second)
    one, two = chunks_of(parse(f"{words(60)}, a zebra {words(12)}"), find)
    assert (len(one.ids), one.words) == (61, ())
    assert (len(two.ids), two.words) == (17, ((1, "zebra"),))


def test_their_vectors_stand_for_the_words(networks, tmp_path):
    values = {"clip_l": vectors(2, 3), "clip_g": vectors(2, 4)}
    save_file(values, tmp_path / "zebra.safetensors")
    found = {"embeddings": find_embeddings([tmp_path])}
    guidance = encode(networks["sdxl"], "a (zebra:1.2)", "zebra BREAK zebra", 1, **found)
    (condition, _), negative = guidance.positive(0)[0], guidance.negative(0)
    encoders = zip(networks["sdxl"].text_encoders, (EOS, ZERO), values.values(), strict=True)
    for number, (module, pad, each) in enumerate(encoders):
        table = module.get_input_embeddings().weight
        kept = table[1:3].clone()  # ids 1 and 2 stand for the vectors: what the table says of them is what is read
        with torch.no_grad():
            table[1:3] = each
            positive = said(module, row([*ids_of("a"), 1, 2], pad)).hidden_states[-2][0]
            alone = said(module, row([1, 2], pad))
            table[1:3] = kept
        part = slice(number * WIDTH, (number + 1) * WIDTH)
        w = torch.ones(77, 1)
        w[2:4] = 1.2
        close(condition.context[0, :77, part], positive * w * positive.mean() / (positive * w).mean())
        close(negative.context[0, :77, part], alone.hidden_states[-2][0])
        close(negative.context[0, 77:, part], alone.hidden_states[-2][0])
    close(negative.pooled, alone.text_embeds)
    without, _ = both(networks["sdxl"], "a zebra", "a")
    again = said(networks["sdxl"].text_encoders[0], row(ids_of("a zebra"))).hidden_states[-2]
    close(without.context[..., :WIDTH], again)


def test_a_prompt_that_is_refused_runs_nothing(networks, tmp_path):
    saved(tmp_path, "zebra", width=WIDTH + 1)
    with pytest.raises(FamilyMismatch):
        encode(networks["sd1"], "a zebra", "", 1, embeddings=find_embeddings([tmp_path]))
    with pytest.raises(RecipeError, match="is no number"):
        encode(networks["sd1"], "a (zebra:1.2.3)", "", 1)
