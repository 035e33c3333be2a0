"""The architecture data, expanded: the very names and shapes of the published checkpoints."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest

from mergekit_sd import architectures
from mergekit_sd.architectures import catalog
from mergekit_sd.architectures.spec import TensorSpec
from mergekit_sd.architectures.templates import TemplateError, Templates
from mergekit_sd.errors import UsageError

SDXL_BLOCKS = [f"IN{i:02}" for i in range(9)] + ["M00"] + [f"OUT{i:02}" for i in range(9)]
SD1_BLOCKS = [f"IN{i:02}" for i in range(12)] + ["M00"] + [f"OUT{i:02}" for i in range(12)]

# Count of tensors, and `digest` (sha256 over the sorted lines "name [shape]"), of the published checkpoints of
# SD1.5, SD2 and SDXL base, schedule buffers included; computed from their own lists of names and shapes.
PUBLISHED = {
    "sd1": (1143, "3fb50d880562fe738ff910ffa29a9559314894183e2a485b36c9deb74ce1daea"),
    "sd2": (1240, "c3900c8330438534e655a94c0fc4923d3ca9be6fefbd70e9b389a7283effb3a7"),
    "sdxl": (2515, "3417e4dabcea9327d05c3c560dcc9c94b4ce22e074aee74af19b311d2f607a16"),
}


def digest(tensors: Mapping[str, TensorSpec]) -> str:
    lines = sorted(f"{name} {list(spec.shape)}" for name, spec in tensors.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@pytest.mark.parametrize("name", PUBLISHED)
def test_expanded_is_what_was_published(name):
    tensors = architectures.get(name).tensors
    assert (len(tensors), digest(tensors)) == PUBLISHED[name]


def test_component_counts():
    def counts(name):
        return Counter(spec.component for spec in architectures.get(name).tensors.values() if spec.component)

    assert counts("sd1") == {"unet": 686, "vae": 248, "text_encoder": 197}
    assert counts("sd2") == {"unet": 686, "vae": 248, "text_encoder": 294}
    assert counts("sdxl") == {"unet": 1680, "vae": 248, "text_encoder": 197, "text_encoder_2": 390}
    assert counts("sdxl-refiner") == {"unet": 1220, "vae": 248, "text_encoder_2": 390}


def test_names_lists_every_architecture():
    assert architectures.names() == (
        "sd1",
        "sd1-inpainting",
        "sd1-pix2pix",
        "sd2",
        "sd2-inpainting",
        "sd2-depth",
        "sdxl",
        "sdxl-inpainting",
        "sdxl-pix2pix",
        "sdxl-refiner",
    )
    assert [architectures.get(name).name for name in architectures.names()] == list(architectures.names())


@pytest.mark.parametrize("wrong", ["sdx", "sd1-inpaintin", "sdxl-", "", "SD1 "])
def test_unknown_name(wrong):
    with pytest.raises(UsageError) as caught:
        architectures.get(wrong)
    assert caught.value.hint


@pytest.mark.parametrize("name", architectures.names())
def test_variant_differs_from_its_family_only_in_the_first_convolution(name):
    variant = architectures.get(name)
    plain = architectures.get(variant.family)
    different = {key for key, spec in variant.tensors.items() if plain.tensors.get(key) != spec}
    assert variant.tensors.keys() == plain.tensors.keys()
    assert different == (set() if variant == plain else {"model.diffusion_model.input_blocks.0.0.weight"})
    assert variant.tensors[variant.conv_in].shape[1] == variant.channels


@pytest.mark.parametrize("name", architectures.names())
def test_every_unet_tensor_has_a_block(name):
    architecture = architectures.get(name)
    assert list(architecture.blocks) == (SDXL_BLOCKS if architecture.family == "sdxl" else SD1_BLOCKS)
    unet = architecture.components["unet"]
    for key, spec in architecture.tensors.items():
        inside = re.match(r"(input|middle|output)_block(?:s\.(\d+))?\.", key.removeprefix(unet))
        if spec.component != "unet":
            assert spec.block is None
        elif inside is None:
            assert spec.block == (architecture.blocks[-1] if key.startswith(unet + "out.") else "IN00")
        elif inside[1] == "middle":
            assert spec.block == "M00"
        else:
            assert spec.block == f"{inside[1].removesuffix('put').upper()}{int(inside[2]):02}"


def test_what_a_whole_file_may_lack():
    for name in architectures.names():
        architecture = architectures.get(name)
        optional = {key for key, spec in architecture.tensors.items() if spec.optional}
        stored = architecture.schedule & architecture.tensors.keys()
        assert optional == stored | ({architecture.position_ids} - {None})
        assert "logvar" in architecture.known_besides
        assert len(architecture.schedule) == 13


def test_facts_beside_the_tensors():
    sd1, sd2, sdxl = (architectures.get(name) for name in ("sd1", "sd2", "sdxl"))
    assert sd1.position_ids == "cond_stage_model.transformer.text_model.embeddings.position_ids"
    assert sd2.position_ids is None
    assert sdxl.position_ids == "conditioner.embedders.0.transformer.text_model.embeddings.position_ids"
    assert [a.resolution for a in (sd1, sd2, sdxl)] == [512, 768, 1024]
    assert architectures.get("sdxl-refiner").components["text_encoder_2"] == "conditioner.embedders.0.model."
    assert architectures.get("sd2-depth").components["depth_model"] == "depth_model."
    assert architectures.get("sdxl-refiner").family != sdxl.family


def test_sd2_is_published_under_two_names():
    sd2 = architectures.get("sd2")
    assert sd2.published_as("v") == ("stable-diffusion-v2-768-v", 768)
    assert sd2.published_as(None) == ("stable-diffusion-v2-768-v", 768)
    assert sd2.published_as("epsilon") == ("stable-diffusion-v2-512", 512)
    assert architectures.get("sd2-inpainting").published_as("epsilon") == ("stable-diffusion-v2-inpainting", 512)
    assert architectures.get("sd1").published_as("epsilon") == ("stable-diffusion-v1", 512)


def test_architectures_are_values():
    assert architectures.get("sd1") is architectures.get("sd1")
    assert len({architectures.get(name) for name in architectures.names()}) == 10


def test_every_data_file_is_read():
    stems = {path.stem for path in (Path(catalog.__file__).parent / "data").glob("*.toml")}
    assert stems == {*catalog.FAMILIES, "layers", "names"}


@pytest.mark.parametrize("family", catalog.FAMILIES)
def test_what_recognises_a_family_is_true_of_it(family):
    unet = catalog.component_tensors(family, "unet")
    marks = catalog.family_data(family)["recognised"]
    assert marks["tensors"] == len(unet)
    assert {name: len(unet[name]) for name in marks["telltales"]} == marks["telltales"]
    assert not set(marks["absent"]) & unet.keys()


def test_template_language():
    templates = Templates(
        {
            "linear(in, out)": {"weight": ["out", "in"]},
            "conv(in, out)": {"weight": ["out", "in", 1, 1]},
            "layer(width, project)": {"": "linear(width, 4*width)", "proj": "project(width, 2*width)"},
            "model(n)": {"a.{1..n}": "layer(8, conv)", "scale": []},
        }
    )
    assert dict(templates.expand("model(3)", {})) == {
        "a.1.weight": (32, 8),
        "a.1.proj.weight": (16, 8, 1, 1),
        "a.2.weight": (32, 8),
        "a.2.proj.weight": (16, 8, 1, 1),
        "scale": (),
    }


@pytest.mark.parametrize("call", ["nothing(1)", "group(1)", "group(1, 2)", "group(word)", "group"])
def test_template_errors(call):
    templates = Templates({"group(width)": {"weight": ["width", "height"]}})
    with pytest.raises(TemplateError):
        templates.expand(call, {})


def test_imports_nothing_heavy():
    code = "import sys, mergekit_sd.architectures; print({'torch', 'numpy', 'pydantic'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
