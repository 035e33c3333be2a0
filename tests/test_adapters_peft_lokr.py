"""PEFT's LoKr files of whole factors: the strength stands in adapter_config.json, and is found there."""

from __future__ import annotations

import json
import warnings

import models
import pytest
import torch

from mergekit_sd.adapters.algorithms import apply
from mergekit_sd.adapters.names import read_adapter
from mergekit_sd.errors import MalformedFile
from mergekit_sd.formats.open import open_model

R, ALPHA = 64, 3.0


def module_of(tmp_path, config, parts=("lokr_w1", "lokr_w2")):
    tensors = {f"base_model.model.a.b.{part}": torch.ones(2, 3) for part in parts}
    models.write(tmp_path / "adapter_model.safetensors", tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    return read_adapter(open_model(tmp_path / "adapter_model.safetensors")).modules[0]


def test_what_peft_saves_and_merges(tmp_path):
    """Its own file and config, against its own merge."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(12, 8), torch.nn.Linear(8, 12))
    before = [layer.weight.detach().clone() for layer in base]
    config = peft.LoKrConfig(
        r=R, alpha=ALPHA, target_modules=["0", "1"], rank_pattern={"1": 32}, alpha_pattern={"1": 5}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(base, config)
        for parameter in made.parameters():
            if parameter.requires_grad:
                torch.nn.init.uniform_(parameter, 0.2, 1.0)
        made.save_pretrained(tmp_path)
        after = [layer.weight.detach() for layer in made.merge_and_unload()]
    file = open_model(tmp_path / "adapter_model.safetensors")
    tensors = models.read(tmp_path / "adapter_model.safetensors")
    modules = read_adapter(file).modules
    assert [module.scale for module in modules] == [ALPHA / R, 5 / 32]
    for number, module in enumerate(modules):
        assert module.parts.keys() == {"lokr_w1", "lokr_w2"}
        parts = {part: tensors[info.name] for part, info in module.parts.items()}
        found = apply(before[number], parts | {"scale": torch.tensor(module.scale)}, 1.0)
        assert float((found - after[number]).norm() / after[number].norm()) <= 1e-5


def test_which_rank_counts(tmp_path):
    said = {"peft_type": "LOKR", "r": R, "alpha": ALPHA}
    assert module_of(tmp_path, said).scale == ALPHA / R
    assert module_of(tmp_path, said | {"rank_pattern": {"b": 4}}).scale == ALPHA / 4
    assert module_of(tmp_path, said, ("lokr_w1", "lokr_w2_a", "lokr_w2_b")).scale == ALPHA / 2  # the factors' own
    assert module_of(tmp_path, said, ("lokr_w1", "lokr_w2", "alpha")).scale is None
    assert module_of(tmp_path, {"peft_type": "LOKR", "alpha": ALPHA}).scale is None


def test_ranks_are_read_only_where_they_count(tmp_path):
    """Of other kinds they say what shapes say, and may be regular expressions."""
    pattern = {"rank_pattern": {"to_(q|k)": 4}, "alpha": ALPHA}
    assert module_of(tmp_path, pattern | {"peft_type": "LORA"}, ("lora_A.weight",)).scale == ALPHA / 2
    with pytest.raises(MalformedFile, match="regular expressions"):
        module_of(tmp_path, pattern | {"peft_type": "LOKR"})
    with pytest.raises(MalformedFile, match="must be a number"):
        module_of(tmp_path, {"peft_type": "LOKR", "alpha": ALPHA, "r": "4"})
