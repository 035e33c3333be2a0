"""Textual inversions among .pt, .bin and .safetensors: every bit, every setting, and other programs' readers."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from small_files import SETTINGS, diffusers, loaded, plain, same, saved, webui

import mergekit_sd as mk
from mergekit_sd.cli.main import run
from mergekit_sd.errors import NonFiniteResult, OutputExists, RecipeError, WrongFormat
from mergekit_sd.formats.open import open_model
from mergekit_sd.inspection import inspect_file

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FORMS = st.sampled_from([(".pt", "a1111"), (".pt", "diffusers"), (".bin", "a1111"), (".bin", "diffusers"),
                         (".safetensors", "a1111"), (".safetensors", "diffusers"), (".pt", "auto"), (".bin", "auto"),
                         (".safetensors", "auto")])  # fmt: skip


def converted(source, target, **options):
    mk.save(mk.ops.convert(mk.open(source), **options), target, dtype="keep", title="a title", force=True)
    return target


def vectors_in(path):
    """The only tensor of a file, by the library that it is made for."""
    value = load_file(path) if path.suffix == ".safetensors" else loaded(path)
    if "string_to_param" in value:
        assert value["string_to_token"] == {"*": 265}
        value = value["string_to_param"]
    ((_, tensor),) = value.items()
    return tensor


@settings(max_examples=40, deadline=None)
@given(
    chain=st.lists(FORMS, min_size=1, max_size=4),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 40)),
    dtype=st.sampled_from(DTYPES),
    numbers=st.randoms(use_true_random=False),
)
def test_no_chain_of_forms_changes_a_bit(chain, shape, dtype, numbers):
    vectors = torch.randn(shape, generator=torch.Generator().manual_seed(numbers.randrange(2**31))).to(dtype)
    with tempfile.TemporaryDirectory() as folder:
        path = webui(Path(folder) / "0.pt", vectors)
        for number, (suffix, style) in enumerate(chain, 1):
            path = converted(path, Path(folder) / f"{number}{suffix}", style=style)
            assert same(vectors_in(path), vectors)
            assert inspect_file(path).kind == "embedding"


def test_settings_survive_safetensors(tmp_path):
    vectors = torch.randn(3, 768)
    webui(tmp_path / "a.pt", torch.nn.Parameter(vectors))
    there = converted(tmp_path / "a.pt", tmp_path / "a.safetensors")
    assert list(load_file(there)) == ["emb_params"]
    back = loaded(converted(there, tmp_path / "b.pt"))
    assert same(back.pop("string_to_param")["*"], vectors)
    assert back == {"string_to_token": {"*": 265}, **SETTINGS}
    assert type(back["step"]) is int


def test_settings_stay_without_other_metadata(tmp_path):
    webui(tmp_path / "a.pt", torch.randn(2, 768))
    node = mk.ops.convert(mk.open(tmp_path / "a.pt"))
    mk.save(node, tmp_path / "a.safetensors", dtype="keep", metadata="none")
    expected = {name: str(value) for name, value in SETTINGS.items()}
    assert open_model(tmp_path / "a.safetensors").metadata == {"format": "pt", **expected}


def test_the_token_is_diffusers_key_and_the_webuis_name(tmp_path):
    vectors = torch.randn(2, 768)
    diffusers(tmp_path / "a.bin", vectors, "<cat-toy>")
    assert loaded(converted(tmp_path / "a.bin", tmp_path / "a.pt"))["name"] == "<cat-toy>"
    assert list(loaded(converted(tmp_path / "a.pt", tmp_path / "b.bin"))) == ["<cat-toy>"]
    plain(tmp_path / "c.safetensors", vectors)
    assert list(loaded(converted(tmp_path / "c.safetensors", tmp_path / "c.bin"))) == ["a title"]
    webui(tmp_path / "d.pt", vectors, name="v1.5")
    assert list(loaded(converted(tmp_path / "d.pt", tmp_path / "d.bin"))) == ["v1_5"]


def test_one_vector_without_a_row_gets_one_for_the_webui(tmp_path):
    """It takes the first axis for the number of vectors."""
    vector = torch.randn(768)
    diffusers(tmp_path / "a.bin", vector)
    assert same(vectors_in(converted(tmp_path / "a.bin", tmp_path / "a.pt")), vector[None])
    assert same(vectors_in(converted(tmp_path / "a.bin", tmp_path / "b.bin")), vector)


@pytest.mark.parametrize("style", ["auto", "a1111", "diffusers"])
@pytest.mark.parametrize("suffix", [".pt", ".bin", ".safetensors"])
def test_sdxl_has_one_form(tmp_path, suffix, style):
    both = {"clip_l": torch.randn(3, 768), "clip_g": torch.randn(3, 1280)}
    plain(tmp_path / "a.safetensors", both)
    path = converted(tmp_path / "a.safetensors", tmp_path / f"b{suffix}", style=style)
    made = load_file(path) if suffix == ".safetensors" else loaded(path)
    assert set(made) == set(both)
    assert all(same(made[name], tensor) for name, tensor in both.items())


def test_a_safetensors_of_one_tensor_keeps_its_name_unless_told(tmp_path):
    """It may be a textual inversion, or anything."""
    plain(tmp_path / "a.safetensors", torch.randn(2, 8), "weight")
    made = converted(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert list(load_file(made)) == ["weight"]
    assert "name" not in open_model(made).metadata
    made = converted(tmp_path / "a.safetensors", tmp_path / "c.safetensors", style="a1111")
    assert list(load_file(made)) == ["emb_params"]


def test_token_ids_that_are_tensors_are_left_behind(tmp_path):
    value = {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": {"*": torch.ones(2, 768)}, **SETTINGS}
    saved(tmp_path / "a.pt", value)
    assert list(load_file(converted(tmp_path / "a.pt", tmp_path / "a.safetensors"))) == ["emb_params"]


def test_equal_content_gives_equal_bytes_wherever_it_lies(tmp_path):
    (tmp_path / "folder").mkdir()
    webui(tmp_path / "a.pt", torch.randn(3, 768))
    one = converted(tmp_path / "a.pt", tmp_path / "one.pt").read_bytes()
    assert converted(tmp_path / "a.pt", tmp_path / "folder" / "another name.pt").read_bytes() == one


def test_an_output_needs_no_step(tmp_path):
    webui(tmp_path / "a.pt", torch.randn(3, 768))
    (tmp_path / "r.toml").write_text(
        'recipe = 1\n[models]\na = "a.pt"\n[outputs.b]\nmodel = "a"\nfile = "b.bin"\ndtype = "keep"\n'
    )
    report = mk.run(tmp_path / "r.toml").outputs[0]
    assert list(loaded(tmp_path / "b.bin")) == ["lantern"]
    assert report.bytes == (tmp_path / "b.bin").stat().st_size
    mk.run(tmp_path / "r.toml", locked=True, force=True)
    assert mk.run(tmp_path / "r.toml", skip_done=True).skipped == ("b",)


def test_another_dtype(tmp_path):
    webui(tmp_path / "a.pt", torch.randn(3, 768))
    mk.save(mk.ops.convert(mk.open(tmp_path / "a.pt")), tmp_path / "b.pt", dtype="fp16")
    expected = loaded(tmp_path / "a.pt")["string_to_param"]["*"].half()
    assert same(loaded(tmp_path / "b.pt")["string_to_param"]["*"], expected)


def test_safetensors_are_verified(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    webui(tmp_path / "a.pt", torch.randn(3, 768))
    assert run(["convert", "a.pt", "--style", "diffusers", "-o", "b.safetensors"]) == 0
    assert list(load_file("b.safetensors")) == ["lantern"]
    assert run(["verify", "b.safetensors"]) == 0
    assert run(["convert", "a.pt", "-o", "b.pt"]) == 0
    assert run(["verify", "b.pt"]) != 0  # it has no recipe in it
    assert "recipe" in capsys.readouterr().err


def test_what_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    webui(tmp_path / "a.pt", torch.randn(3, 768))
    plain(tmp_path / "m.safetensors", {"x.weight": torch.ones(2, 2), "y.weight": torch.ones(2)})
    before = (tmp_path / "a.pt").read_bytes()
    with pytest.raises(RecipeError, match=r"A textual inversion is not written as \.ckpt\.") as caught:
        converted(tmp_path / "a.pt", tmp_path / "a.ckpt")
    assert caught.value.hint == "name the file .safetensors or .pt or .bin"
    for suffix in (".pt", ".bin", ".ckpt", ".pth"):
        with pytest.raises(RecipeError, match=rf"A model is not written as \{suffix}") as caught:
            converted(tmp_path / "m.safetensors", tmp_path / f"m{suffix}")
        assert caught.value.hint == "name the file .safetensors"
    with pytest.raises(WrongFormat, match="is no textual inversion"):
        converted(tmp_path / "m.safetensors", tmp_path / "n.safetensors", style="a1111")
    plain(tmp_path / "t.safetensors", {"clip_l": torch.ones(1, 8), "emb_params": torch.ones(1, 8)})
    with pytest.raises(WrongFormat, match="2 tensors"):
        converted(tmp_path / "t.safetensors", tmp_path / "t.pt")
    plain(tmp_path / "i.safetensors", torch.ones(2, 8, dtype=torch.int64))
    with pytest.raises(WrongFormat, match="no vectors"):
        converted(tmp_path / "i.safetensors", tmp_path / "i.pt")
    (tmp_path / "there.pt").touch()
    with pytest.raises(OutputExists):
        mk.save(mk.ops.convert(mk.open("a.pt")), tmp_path / "there.pt", dtype="keep")
    assert run(["convert", "a.pt", "-o", "a.pt", "--force"]) == 2
    assert "--output" in capsys.readouterr().err
    assert (tmp_path / "a.pt").read_bytes() == before


def test_nan_is_refused_and_nothing_is_left(tmp_path):
    vectors = torch.randn(2, 768)
    vectors[1, 5] = torch.inf
    webui(tmp_path / "a.pt", vectors)
    with pytest.raises(NonFiniteResult):
        mk.save(mk.ops.merge_embeddings([mk.open(tmp_path / "a.pt")], weights=[2.0]), tmp_path / "b.pt", dtype="keep")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


# --- diffusers ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loader(tmp_path_factory):
    """A CLIP tokenizer and text encoder of eight numbers, and diffusers' loader of textual inversions on them."""
    pytest.importorskip("diffusers")
    import json
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers.loaders import TextualInversionLoaderMixin
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    folder = tmp_path_factory.mktemp("tokenizer")
    words = ["<|startoftext|>", "<|endoftext|>", "a</w>", "b</w>", "a", "b"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")

    class Pipe(TextualInversionLoaderMixin):
        def __init__(self):
            self.tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
            config = CLIPTextConfig(
                vocab_size=len(self.tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                num_attention_heads=1, bos_token_id=0, eos_token_id=1, pad_token_id=1,
            )  # fmt: skip
            self.text_encoder = CLIPTextModel(config)
            self.components = {}
            self.hf_device_map = None

    return Pipe


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("suffix", "style"), [(".pt", "a1111"), (".bin", "diffusers"), (".safetensors", "diffusers"), (".pt", "diffusers")]
)
def test_diffusers_loads_what_is_written(tmp_path, loader, suffix, style):
    vectors = torch.randn(2, 8)
    webui(tmp_path / "a.pt", vectors, name="<fog>")
    path = converted(tmp_path / "a.pt", tmp_path / f"b{suffix}", style=style)
    pipe = loader()
    pipe.load_textual_inversion(str(tmp_path), weight_name=path.name, local_files_only=True)
    ids = pipe.tokenizer.convert_tokens_to_ids(["<fog>", "<fog>_1"])
    table = pipe.text_encoder.get_input_embeddings().weight
    assert torch.equal(table[ids], vectors)
