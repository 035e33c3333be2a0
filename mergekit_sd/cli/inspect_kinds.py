"""What `inspect` says of LoRAs, embeddings, hypernetworks and ControlNets, and of how a model was made.

Owns the words. What is counted is `mergekit_sd.inspection`'s.
"""

from __future__ import annotations

from collections.abc import Mapping

import mergekit_sd as mk
from mergekit_sd.cli.inspect_words import FAMILIES, PARTS, fact, say
from mergekit_sd.text import count, listed

_ALGORITHMS = {
    "lora": "LoRA",
    "locon": "LoCon (convolutions)",
    "loha": "LoHa",
    "lokr": "LoKr",
    "ia3": "IA3",
    "glora": "GLoRA",
    "oft": "OFT",
    "diag-oft": "Diag-OFT",
    "boft": "BOFT",
    "full": "full differences",
    "norm": "norms",
    "tlora": "T-LoRA",
}
_STYLES = {
    "kohya": "kohya's names",
    "lycoris": "LyCORIS's names",
    "comfyui": "ComfyUI's names",
    "peft": "PEFT's names",
    "diffusers": "diffusers' names",
    "ldm": "the original (LDM) names",
    "control-lora": "a ControlLoRA (a LoRA of the UNet's encoder, not a full copy)",
    "lllite": "ControlNet-LLLite",
}
# Plain values of a pickle that are told in other words.
_TOLD = {
    "embedding": {"name", "step", "sd_checkpoint_name"},
    "hypernetwork": {
        *("name", "step", "sd_checkpoint_name", "layer_structure", "activation_func", "is_layer_norm"),
        *("use_dropout", "dropout_structure", "activate_output"),
    },
}
_NO_FAMILY = "cannot be told from names and shapes"
# Facts of one line: what they are called, and the facts it is made of.
_ABOUT = {
    "title": ("title",),
    "by": ("author",),
    "description": ("description",),
    "licence": ("license",),
    "how to use": ("usage_hint",),
    "trigger": ("trigger_phrase",),
    "keywords": ("keywords",),
    "architecture": ("made_for",),
    "merged from": ("merged_from",),
    "date": ("date",),
    "name": ("name",),
    "trained on": ("base_model", "base_version"),
    "network": ("network", "algorithm"),
    "optimizer": ("optimizer",),
    "scheduler": ("scheduler",),
    "resolution": ("resolution",),
    "epochs": ("epochs",),
    "steps": ("steps",),
    "clip skip": ("clip_skip",),
}
_RATES = {
    "learning_rate": "",
    "unet_learning_rate": "UNet ",
    "text_encoder_learning_rate": "text encoder ",
}


# --- kinds -----------------------------------------------------------------------------------------


def show_kind(found: mk.Inspection) -> None:
    """What only files of its kind have."""
    if found.adapter is not None:
        _show_adapter(found)
    elif found.embedding is not None:
        _show_embedding(found)
    elif found.hypernetwork is not None:
        _show_hypernetwork(found)
    elif found.controlnet is not None:
        _show_controlnet(found)


def _family(name: str | None) -> None:
    fact("for", FAMILIES.get(name, name) if name else _NO_FAMILY)


def _show_adapter(found: mk.Inspection) -> None:
    adapter = found.adapter
    assert adapter is not None
    _family(adapter.family)
    each = [f"{_ALGORITHMS[name]} {number:,}" for name, number in adapter.algorithms.items()]
    dora = {0: "", adapter.modules: "; all with DoRA"}.get(adapter.dora, f"; {adapter.dora:,} with DoRA")
    fact("modules", ", ".join(each) + dora)
    parts = [f"{PARTS[name]} {number:,}" for name, number in adapter.parts.items()]
    fact("changes", ", ".join(parts) or "parts that its names do not tell")
    for label, sizes in (("rank", adapter.ranks), ("alpha", adapter.alphas)):
        each = [_range(sizes.linear), _range(sizes.conv) + " in convolutions" if sizes.conv else ""]
        if told := ", ".join(filter(None, each)):
            fact(label, told)
    if any(adapter.ranks.as_json().values()) and not any(adapter.alphas.as_json().values()):
        fact("alpha", "none: applied as it is (scale 1)")
    if adapter.style:
        fact("names", _STYLES[adapter.style])
    if adapter.embeddings:
        fact("embeddings", f"{listed(adapter.embeddings)} (bundled)")
    if adapter.stray:
        fact("besides", f"{count(adapter.stray, 'tensor')} of no module")
    if not adapter.usable:
        say("  T-LoRA cannot be applied: it needs values of its training that no file holds.", "yellow")


def _range(sizes: Mapping[str, int]) -> str:
    """`32`, or `4–128 (mostly 32)`."""
    values = sorted(sizes, key=float)
    if len(values) < 2:
        return "".join(values)
    return f"{values[0]}–{values[-1]} (mostly {next(iter(sizes))})"


def _show_embedding(found: mk.Inspection) -> None:
    embedding = found.embedding
    assert embedding is not None
    _family(embedding.family)
    widths = " and ".join(map(str, embedding.widths.values()))
    fact("vectors", f"{embedding.vectors} of width {widths}")
    fact("token", embedding.token or "the file's name")
    _facts({"name": embedding.name, "step": embedding.step, "trained on": embedding.trained_on})


def _show_hypernetwork(found: mk.Inspection) -> None:
    net = found.hypernetwork
    assert net is not None
    _family(net.family)
    fact("widths", ", ".join(map(str, net.widths)))
    activation = f", {net.activation}" if net.activation else ""
    activation += ", its output too" if net.activation and net.activates_output else ""
    fact("layers", "×".join(f"{each:g}" for each in net.structure) + activation)
    fact("layer norm", "yes" if net.layer_norm else "no")
    _facts({"dropout": net.dropout, "name": net.name, "steps": net.step, "trained on": net.trained_on})


def _facts(told: Mapping[str, str | int | None]) -> None:
    for label, value in told.items():
        if value is not None:
            fact(label, _plain(value))


def _show_controlnet(found: mk.Inspection) -> None:
    net = found.controlnet
    assert net is not None
    _family(net.family)
    if net.style:
        fact("kind", _STYLES[net.style] + (f", rank {net.rank}" if net.rank else ""))
    if net.checkpoint:
        fact("besides", "a whole checkpoint")


# --- how it was made -------------------------------------------------------------------------------


def untold(found: mk.Inspection) -> dict[str, str]:
    """The metadata that is not told in words."""
    told = found.about.told | _TOLD.get(found.kind, frozenset())
    return {key: value for key, value in found.metadata.items() if key not in told}


def show_about(found: mk.Inspection) -> None:
    """What the metadata says of how the model was made, in words."""
    facts = found.about.facts
    if not facts:
        return
    say("About, as its metadata says")
    for label, names in _ABOUT.items():
        if values := [_plain(facts[name]) for name in names if name in facts]:
            fact(label, values[0] + (f" ({', '.join(values[1:])})" if values[1:] else ""))
    if rates := [f"{words}{facts[name]:g}" for name, words in _RATES.items() if name in facts]:
        fact("learning rate", ", ".join(rates))
    if "rank" in facts:
        fact("rank, alpha", _ranks(facts))
    if images := _images(facts):
        fact("images", images)
    for label, name in (("started", "started"), ("finished", "finished")):
        if name in facts:
            fact(label, str(facts[name]).replace("T", " ").replace("Z", " UTC"))
    tags = facts.get("tags")
    if isinstance(tags, dict):
        fact("tags", ", ".join(f"{tag} {number:,}" for tag, number in tags.items()))


def _plain(value: object) -> str:
    return f"{value:,}" if isinstance(value, int | float) else " ".join(str(value).split())


def _ranks(facts: Mapping[str, object]) -> str:
    linear = [str(facts[name]) for name in ("rank", "alpha") if name in facts]
    conv = [str(facts[name]) for name in ("conv_rank", "conv_alpha") if name in facts]
    return ", ".join(linear) + (f"; {', '.join(conv)} in convolutions" if conv else "")


def _images(facts: Mapping[str, object]) -> str:
    """How many pictures it was trained on, and in which folders with how many repeats."""
    number, regularisation = facts.get("images"), facts.get("regularisation_images")
    told = [f"{number:,} with repeats"] if isinstance(number, int) else []
    told += [f"{regularisation:,} for regularisation"] if isinstance(regularisation, int) and regularisation else []
    folders = facts.get("datasets")
    if isinstance(folders, dict):
        told.append(listed((f"{name}: {each['images']} × {each['repeats']}" for name, each in folders.items()), 4))
    return "; ".join(told)
