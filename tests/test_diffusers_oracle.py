"""What diffusers and transformers make, opened; and what we write, loaded by them: to the bit, both ways."""

from __future__ import annotations

import contextlib
import io
import warnings

import pytest
import torch
from models import read, same

pytest.importorskip("diffusers", exc_type=ImportError)
pytest.importorskip("transformers", exc_type=ImportError)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import diffusers_folders as theirs
    from diffusers import (
        AutoencoderKL,
        StableDiffusionInpaintPipeline,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from diffusers.loaders import single_file_utils
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import mergekit_sd as mk
from mergekit_sd.architectures import catalog
from mergekit_sd.diffusers_folder import save_diffusers
from mergekit_sd.formats.diffusers.configs import SD2_TEXT_LAYERS, text_config, unet_config, vae_config
from mergekit_sd.formats.diffusers.names import to_diffusers
from mergekit_sd.planning.diffusers import PARTS

# Their own warnings are about their versions, not about us.
pytestmark = pytest.mark.filterwarnings("ignore")

FAMILIES = ("sd1", "sd2", "sdxl")
LOADERS = {"sd1": StableDiffusionPipeline, "sd2": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
SECOND = "conditioner.embedders.1.model."


@contextlib.contextmanager
def quiet():
    """Without their progress bars."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield


def same_tensors(made, wanted):
    """Names, bits; transformers from 5.6 on lacks `text_model.` in its own names."""
    level = {name.removeprefix("text_model."): each for name, each in made.items()}
    bare = {name.removeprefix("text_model."): each for name, each in wanted.items()}
    return set(level) == set(bare) and all(same(level[name], bare[name]) for name in bare)


# What the shapes of tensors tell.
TOLD = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "hidden_act", "projection_dim")
TOLD += ("vocab_size", "block_out_channels", "latent_channels", "layers_per_block", "down_block_types", "in_channels")
TOLD += ("cross_attention_dim", "use_linear_projection", "projection_class_embeddings_input_dim", "up_block_types")
TOLD += ("addition_embed_type", "addition_time_embed_dim")


def told(module):
    """That part of a module's configuration."""
    config = module.config.to_dict() if hasattr(module.config, "to_dict") else dict(module.config)
    return {key: list(each) if isinstance(each, tuple) else each for key, each in config.items() if key in TOLD}


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """Of each family: its components, the folder that diffusers saved, the checkpoint that we wrote from it."""
    place = tmp_path_factory.mktemp("theirs")
    found = {}
    for family in FAMILIES:
        torch.manual_seed(1)
        with quiet():
            made = theirs.components(family)
            folder = theirs.save(place / family, family, made)
        checkpoint = place / f"{family}.safetensors"
        mk.save(mk.open(folder), checkpoint, dtype="keep", junk="keep")
        found[family] = (made, folder, checkpoint)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_their_folder_is_the_checkpoint_that_they_convert_back(there, family):
    """Our LDM file through diffusers' own conversion gives the modules' weights, to the bit."""
    modules, folder, path = there[family]
    found = mk.inspect_file(folder)
    assert (found.kind, found.architecture, found.junk.bytes) == ("checkpoint", family, 0)
    checkpoint = read(path)
    unet = single_file_utils.convert_ldm_unet_checkpoint(dict(checkpoint), dict(modules["unet"].config))
    assert same_tensors(unet, modules["unet"].state_dict())
    vae = single_file_utils.convert_ldm_vae_checkpoint(dict(checkpoint), dict(modules["vae"].config))
    vae = {n: t.reshape(modules["vae"].state_dict()[n].shape) for n, t in vae.items()}
    assert same_tensors(vae, modules["vae"].state_dict())
    for name, prefix in (("text_encoder", "cond_stage_model.model."), ("text_encoder_2", SECOND)):
        if any(key.startswith(prefix) for key in checkpoint):
            text = single_file_utils.convert_open_clip_checkpoint(modules[name], dict(checkpoint), prefix)
            assert same_tensors(text, modules[name].state_dict())
    if family != "sd2":
        text = single_file_utils.convert_ldm_clip_checkpoint(dict(checkpoint))
        assert same_tensors(text, modules["text_encoder"].state_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_what_we_write_they_load(there, tmp_path, family):
    modules, _, checkpoint = there[family]
    save_diffusers(mk.open(checkpoint), tmp_path / "out", dtype="keep")
    with quiet():
        loaded = LOADERS[family].from_pretrained(tmp_path / "out", local_files_only=True)
    for name, module in modules.items():
        assert same_tensors(getattr(loaded, name).state_dict(), module.state_dict())
        assert told(getattr(loaded, name)) == told(module)
    heads = 8 if family == "sd1" else [1] * len(loaded.unet.config.block_out_channels)
    assert loaded.unet.config.attention_head_dim == heads
    ids = loaded.tokenizer("a photo of an astronaut riding a horse on mars").input_ids
    assert ids[1:-1] == [320, 1125, 539, 550, 18376, 6765, 320, 4558, 525, 7496]
    assert loaded.tokenizer.pad_token_id == (0 if family == "sd2" else 49407)


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back(there, tmp_path, family):
    """Folder, folder, checkpoint: the same as without the detour."""
    _, folder, checkpoint = there[family]
    save_diffusers(mk.open(folder), tmp_path / "out", dtype="keep")
    mk.save(mk.open(tmp_path / "out"), tmp_path / "back.safetensors", dtype="keep")
    one, other = read(tmp_path / "back.safetensors"), read(checkpoint)
    assert set(one) == set(other)
    assert all(same(one[name], other[name]) for name in other)


def test_a_picture_comes_out_the_same(tmp_path):
    """SD1's components as they were and as they came back denoise to the same bits."""
    with quiet():
        torch.manual_seed(1)
        made = theirs.components("sd1", vocabulary=49408)
        folder = theirs.save(tmp_path / "in", "sd1", made)
    save_diffusers(mk.open(folder), tmp_path / "out", dtype="keep")
    with quiet():
        pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "out", local_files_only=True)
        pipe.set_progress_bar_config(disable=True)

        def picture():
            generator = torch.Generator().manual_seed(0)
            call = pipe(
                "a lantern", num_inference_steps=2, height=64, width=64, generator=generator, output_type="latent"
            )
            return call.images

        ours = picture()
        pipe.unet, pipe.vae, pipe.text_encoder = made["unet"], made["vae"], made["text_encoder"]
        assert torch.equal(ours, picture())


@pytest.mark.parametrize("suffix", ["shards", "bin", "fp16"])
def test_their_other_ways_of_saving(tmp_path, suffix):
    how = {"shards": {"max_shard_size": "1MB"}, "bin": {"safe_serialization": False}, "fp16": {"variant": "fp16"}}
    with quiet():
        torch.manual_seed(2)
        made = {"unet": theirs.unet("sd1"), "vae": theirs.vae(), "text_encoder": theirs.text()}
        for module in made.values():
            module.half()
        folder = tmp_path / "in"
        if suffix == "bin":  # transformers saves safetensors only
            theirs.save(folder, "sd1", made)
            for name in ("unet", "vae"):
                (folder / name / "diffusion_pytorch_model.safetensors").unlink()
                made[name].save_pretrained(folder / name, **how[suffix])
        else:
            theirs.save(folder, "sd1", made, **how[suffix])
    save_diffusers(mk.open(folder), tmp_path / "out", dtype="keep")
    for name, module in made.items():
        file = next((tmp_path / "out" / name).glob("*.safetensors"))
        assert same_tensors(read(file), module.state_dict())


def test_inpainting(tmp_path):
    with quiet():
        torch.manual_seed(3)
        made = theirs.components("sd1", channels=9)
        folder = theirs.save(tmp_path / "in", "sd1", made)
    mk.save(mk.open(folder), tmp_path / "a.safetensors", dtype="keep")
    assert mk.inspect_file(tmp_path / "a.safetensors").architecture == "sd1-inpainting"
    save_diffusers(mk.open(tmp_path / "a.safetensors"), tmp_path / "out", dtype="keep")
    with quiet():
        loaded = StableDiffusionInpaintPipeline.from_pretrained(tmp_path / "out", local_files_only=True)
    assert loaded.unet.config.in_channels == 9
    assert same_tensors(loaded.unet.state_dict(), made["unet"].state_dict())


def test_one_component(there, tmp_path):
    modules, _, checkpoint = there["sdxl"]
    loaders = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder_2": CLIPTextModelWithProjection}
    for name, loader in loaders.items():
        save_diffusers(mk.open(checkpoint), tmp_path / name, component=name, dtype="keep")
        with quiet():
            loaded = loader.from_pretrained(tmp_path / name, local_files_only=True)
        assert same_tensors(loaded.state_dict(), modules[name].state_dict())


# --- the published layouts, at full size ----------------------------------------------------------------


def published(family, component):
    """Diffusers' names and shapes of a component of the published model, as we would write them."""
    part = PARTS[family][component]
    found = {}
    for name, shape in catalog.component_tensors(family, component).items():
        for twin in to_diffusers(part, name):
            rows = shape if twin.rows is None else (shape[0] // twin.rows[1], *shape[1:])
            rows = rows[::-1] if twin.transposed else rows
            linear = part == "vae" and ".attentions.0.to_" in twin.name and len(rows) == 4
            found[twin.name] = rows[:2] if linear else rows
    if family == "sd2" and component == "text_encoder":
        last = f"text_model.encoder.layers.{SD2_TEXT_LAYERS}."
        found = {n: s for n, s in found.items() if not n.startswith((last, "text_projection"))}
    return {name: shape for name, shape in found.items() if not name.endswith("position_ids")}


def shapes_of(module):
    return {name.removeprefix("text_model."): tuple(each.shape) for name, each in module.state_dict().items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_full_size_models_have_the_tensors_that_diffusers_makes_of_our_configurations(family):
    for component, part in PARTS[family].items():
        shapes = published(family, component)
        with torch.device("meta"), quiet():
            if part == "unet":
                module = UNet2DConditionModel.from_config(unet_config(shapes, family, size=64, v=False))
            elif part == "vae":
                module = AutoencoderKL.from_config(vae_config(shapes, family, size=512))
            else:
                kind = CLIPTextModelWithProjection if component == "text_encoder_2" else CLIPTextModel
                module = kind(CLIPTextConfig(**text_config(shapes, openclip=part == "openclip")))
        made = {name.removeprefix("text_model."): shape for name, shape in shapes.items()}
        assert made == shapes_of(module)


# As the published folders have them.
PUBLISHED = [
    ("sd1", "unet", {"attention_head_dim": 8, "cross_attention_dim": 768, "use_linear_projection": False}),
    (
        "sd2",
        "unet",
        {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True},
    ),
    (
        "sdxl",
        "unet",
        {
            "attention_head_dim": [5, 10, 20],
            "transformer_layers_per_block": [1, 2, 10],
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "addition_embed_type": "text_time",
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        },
    ),
    ("sd1", "vae", {"block_out_channels": [128, 256, 512, 512], "latent_channels": 4, "scaling_factor": 0.18215}),
    ("sdxl", "vae", {"scaling_factor": 0.13025, "force_upcast": True}),
    ("sd1", "text_encoder", {"num_attention_heads": 12, "num_hidden_layers": 12, "hidden_act": "quick_gelu"}),
    ("sd2", "text_encoder", {"num_attention_heads": 16, "num_hidden_layers": 23, "hidden_act": "gelu"}),
    ("sdxl", "text_encoder_2", {"num_attention_heads": 20, "num_hidden_layers": 32, "projection_dim": 1280}),
]


@pytest.mark.parametrize(("family", "component", "wanted"), PUBLISHED)
def test_configurations_are_the_published_ones(family, component, wanted):
    shapes = published(family, component)
    if component == "unet":
        config = unet_config(shapes, family, size=64, v=False)
    elif component == "vae":
        config = vae_config(shapes, family, size=512)
    else:
        config = text_config(shapes, openclip=PARTS[family][component] == "openclip")
    assert {key: config[key] for key in wanted} == wanted


def test_the_small_models_have_every_name_of_the_real_ones(there):
    """Else the tests above would prove little."""
    for family, (modules, _, _) in there.items():
        for component in ("unet", "vae"):
            assert set(modules[component].state_dict()) == set(published(family, component))
