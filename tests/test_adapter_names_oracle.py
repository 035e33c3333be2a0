"""Names of LoRA files against diffusers, transformers and PEFT: what we write, they find; what they write, we read."""

from __future__ import annotations

import functools
import importlib
import types
import warnings

import pytest
import torch
from adapter_headers import FAMILIES, lora_shapes
from small_models import small

from mergekit_sd import architectures
from mergekit_sd.adapters.matching import match
from mergekit_sd.adapters.names import read_adapter
from mergekit_sd.adapters.styles import key_of
from mergekit_sd.adapters.targets import layers_of, lora_name, targets_of
from mergekit_sd.formats.open import open_model

pytestmark = pytest.mark.filterwarnings("ignore")

UNETS = {
    "sd1": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": {
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "sdxl": {
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
TEXT_ENCODERS = {
    "sd1": {"text_encoder": CLIP_L},
    "sd2": {"text_encoder": CLIP_H},
    "sdxl": {"text_encoder": CLIP_L, "text_encoder_2": CLIP_G},
}


their = types.SimpleNamespace()


@pytest.fixture(scope="module", autouse=True)
def _libraries():
    """Imported when a test needs them: they take seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("diffusers", "transformers", "peft"):
            setattr(their, name, pytest.importorskip(name, exc_type=ImportError))
        their.conversion = importlib.import_module("diffusers.loaders.lora_conversion_utils")
        their.state_dicts = importlib.import_module("diffusers.utils.state_dict_utils")


@functools.cache
def weights(family: str) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shapes of diffusers' and transformers' own models, by component; names without `text_model.`."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models = {"unet": their.diffusers.UNet2DConditionModel(**UNETS[family])}
        for component, config in TEXT_ENCODERS[family].items():
            openclip = config is not CLIP_L  # OpenCLIP's have a projection
            kind = their.transformers.CLIPTextModelWithProjection if openclip else their.transformers.CLIPTextModel
            config = their.transformers.CLIPTextConfig(**config, projection_dim=config["hidden_size"])
            models[component] = kind(config)
    return {
        component: {bare(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        for component, model in models.items()
    }


def bare(name: str) -> str:
    """transformers leaves `text_model.` out from 5.6 on."""
    return name.removeprefix("text_model.")


def marked(family: str, layers, style: str) -> dict[str, torch.Tensor]:
    """A LoRA whose layers are told apart by their numbers: factors and alpha of layer n hold n."""
    return {
        key: torch.full(shape or (), float(number))
        for number, layer in enumerate(layers)
        for key, shape in lora_shapes(family, [layer], style).items()
    }


def found_by_diffusers(converted: dict[str, torch.Tensor]) -> dict[tuple[str, str], int]:
    """The layers that a LoRA's keys reach once diffusers loads it: by component and name, the number in them."""
    found = {}
    for key, tensor in converted.items():
        component, _, name = key.partition(".")
        convert = their.state_dicts.convert_unet_state_dict_to_peft
        if component != "unet":
            old = "to_out_lora" in name or "to_q_lora" in name or "to_k_lora" in name or "to_v_lora" in name
            kind = their.state_dicts.StateDictType["DIFFUSERS_OLD" if old else "DIFFUSERS"]
            mapping = their.state_dicts.PEFT_STATE_DICT_MAPPINGS[kind]
            convert = functools.partial(their.state_dicts.convert_state_dict, mapping=mapping)
        (loaded,) = convert({name: tensor})
        layer, factor, _ = loaded.rsplit(".", 2)
        assert factor in ("lora_A", "lora_B"), loaded
        number = int(tensor.flatten()[0])
        assert found.setdefault((component, bare(layer)), number) == number
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_each_layer_is_what_diffusers_models_have_under_its_name(family):
    theirs = weights(family)
    seen = {component: set() for component in theirs}
    for layer in layers_of(architectures.get(family)).every:
        for target in layer.targets:
            name = f"{bare(layer.diffusers)}.{target.kind}"
            rows, *rest = architectures.get(family).tensors[target.tensor].shape
            shape = (rows // target.rows[1] if target.rows else rows, *rest)
            assert theirs[layer.component][name] == (shape[::-1] if target.transposed else shape), name
            seen[layer.component].add(name)
    unseen = {name for component, names in seen.items() for name in set(theirs[component]) - names}
    assert unseen <= {"embeddings.position_ids"}


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_loads_kohyas_names_as_we_write_them(family):
    layers = targets_of(architectures.get(family), conv=True)
    file = marked(family, layers, "kohya")
    if family == "sdxl":
        file = their.conversion._maybe_map_sgm_blocks_to_diffusers(file, types.SimpleNamespace(layers_per_block=2))
    converted, alphas = their.conversion._convert_non_diffusers_lora_to_diffusers(file)
    assert len(alphas) == len(layers)
    assert found_by_diffusers(converted) == {
        (layer.component, bare(layer.diffusers)): number for number, layer in enumerate(layers)
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("style", ["diffusers", "peft"])
def test_diffusers_loads_its_own_names_as_we_write_them(family, style):
    layers = targets_of(architectures.get(family), conv=True)
    found = found_by_diffusers(marked(family, layers, style))
    assert found == {(layer.component, bare(layer.diffusers)): number for number, layer in enumerate(layers)}
    assert all(f"{name}.weight" in weights(family)[component] for component, name in found)


# --- what PEFT writes ----------------------------------------------------------------------------------------


CONFIG = {
    "r": 2,
    "lora_alpha": 3,
    "target_modules": ["to_q", "to_out.0", "proj_in", "ff.net.2", "conv1", "conv_shortcut", "upsamplers.0.conv"],
    "rank_pattern": {"proj_in": 4},
    "alpha_pattern": {"attn2.to_q": 5, "mid_block.attentions.0.proj_in": 7},
    "init_lora_weights": False,
}


@pytest.fixture(params=[False, True], ids=["plain", "rank-stabilised"])
def config(request):
    return their.peft.LoraConfig(**CONFIG, use_rslora=request.param)


@pytest.fixture
def unet():
    """A little UNet with the names of SD1's."""
    return their.diffusers.UNet2DConditionModel(
        block_out_channels=(4, 8, 16, 16), norm_num_groups=4, cross_attention_dim=8, attention_head_dim=2
    )


def assert_read(path, trained):
    adapter = read_adapter(open_model(path))
    found = match(adapter, architectures.detect(small("sd1")))
    assert not found.unmatched
    assert not adapter.unused
    modules = trained.named_modules()
    scalings = {
        name.removeprefix("base_model.model."): each.scaling for name, each in modules if hasattr(each, "scaling")
    }
    assert {each.layer.diffusers: {"default": each.module.scale} for each in found.matches} == {
        name: pytest.approx(scaling) for name, scaling in scalings.items()
    }
    assert len({each.module.scale for each in found.matches}) > 3


def test_what_diffusers_saves_is_read_with_its_alphas(unet, config, tmp_path):
    unet.add_adapter(config)
    their.diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=their.peft.get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
    )
    assert_read(tmp_path / "pytorch_lora_weights.safetensors", unet)


def test_what_peft_saves_is_read_with_its_alphas(unet, config, tmp_path):
    wrapped = their.peft.get_peft_model(unet, config)
    wrapped.save_pretrained(tmp_path)
    assert_read(tmp_path / "adapter_model.safetensors", wrapped)


@pytest.mark.parametrize("style", ["diffusers", "peft"])
def test_diffusers_loads_a_file_of_ours_into_a_model(unet, style):
    layout = architectures.detect(small("sd1"))
    layers = [each for each in targets_of(layout, conv=True) if each.component == "unet"]
    shapes = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    file = {}
    for number, layer in enumerate(layers):
        out, inside, *kernel = shapes[f"{layer.diffusers}.weight"]
        name = lora_name(layer, style, "sd1")
        file[key_of(name, "lora_down.weight", style)] = torch.full((2, inside, *kernel), float(number))
        file[key_of(name, "lora_up.weight", style)] = torch.full((out, 2, *[1 for _ in kernel]), float(number))
    unet.load_lora_adapter(file, prefix="unet")
    loaded = {name: each for name, each in unet.named_modules() if hasattr(each, "lora_A")}
    numbers = {name: each.lora_A["default_0"].weight.flatten()[0].item() for name, each in loaded.items()}
    assert numbers == {layer.diffusers: number for number, layer in enumerate(layers)}
