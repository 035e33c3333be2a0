"""A file's metadata in words: what trainers (kohya's sd-scripts) and modelspec say of a model.

Owns which keys say what, and how their values read. Values come from strangers: what does not read as
it should is left out. Must not know tensors. modelspec: https://github.com/Stability-AI/ModelSpec
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

MOST_TAGS = 10
MAX_JSON = 16 << 20  # characters: a value beyond is nobody's tag list

# What is said, and the keys that say it: the first that has a value.
_TEXTS = {
    "title": ("modelspec.title",),
    "author": ("modelspec.author",),
    "description": ("modelspec.description", "ss_training_comment"),
    "license": ("modelspec.license",),
    "usage_hint": ("modelspec.usage_hint",),
    "trigger_phrase": ("modelspec.trigger_phrase",),
    "keywords": ("modelspec.tags",),
    "made_for": ("modelspec.architecture",),
    "merged_from": ("modelspec.merged_from",),
    "date": ("modelspec.date",),
    "resolution": ("modelspec.resolution", "ss_resolution"),
    "name": ("ss_output_name",),
    "base_model": ("ss_sd_model_name",),
    "base_version": ("ss_base_model_version",),
    "network": ("ss_network_module",),
    "optimizer": ("ss_optimizer",),
    "scheduler": ("ss_lr_scheduler",),
}
_NUMBERS = {
    "rank": ("ss_network_dim",),
    "alpha": ("ss_network_alpha",),
    "epochs": ("ss_epoch", "ss_num_epochs"),
    "steps": ("ss_steps", "ss_max_train_steps"),
    "learning_rate": ("ss_learning_rate",),
    "unet_learning_rate": ("ss_unet_lr",),
    "text_encoder_learning_rate": ("ss_text_encoder_lr",),
    "clip_skip": ("ss_clip_skip",),
    "images": ("ss_num_train_images",),
    "regularisation_images": ("ss_num_reg_images",),
}
_DATES = {"started": ("ss_training_started_at",), "finished": ("ss_training_finished_at",)}
# Of `ss_network_args`: what LyCORIS is told besides.
_ARGUMENTS = {"algorithm": "algo", "conv_rank": "conv_dim", "conv_alpha": "conv_alpha"}
_JSON = ("ss_tag_frequency", "ss_dataset_dirs", "ss_datasets", "ss_bucket_info", "ss_network_args")
_NOTHING = ("", "None", "null")


@dataclass(frozen=True, slots=True)
class About:
    """`facts` in the order they are told: texts, numbers, and `tags` and `datasets` as counts by name.

    `told` are the keys of the metadata that the facts are from.
    """

    facts: Mapping[str, object]
    told: frozenset[str]


def about(metadata: Mapping[str, str]) -> About:
    """What the metadata says of how a model was made. Never raises: what cannot be read is not told."""
    facts: dict[str, object] = {}
    told = {key for key in _JSON if key in metadata}
    for table, read in ((_TEXTS, _text), (_NUMBERS, _number), (_DATES, _date)):
        for fact, keys in table.items():
            values = ((key, read(metadata[key])) for key in keys if key in metadata)
            key, value = next(((key, value) for key, value in values if value is not None), ("", None))
            if value is not None:
                facts[fact] = value
                told.add(key)
    facts |= _datasets(metadata)
    arguments = _object(metadata, "ss_network_args")
    for fact, name in _ARGUMENTS.items():
        argument = arguments.get(name)
        if isinstance(argument, str | int | float) and str(argument) not in _NOTHING:
            facts[fact] = argument
    return About(facts, frozenset(told))


def _text(value: str) -> str | None:
    return None if value.strip() in _NOTHING else value.strip()


def _number(value: str) -> float | None:
    try:
        number = float(value)
    except ValueError:
        return None
    if not math.isfinite(number):
        return None
    return int(number) if number.is_integer() else number


def _date(value: str) -> str | None:
    """Seconds since 1970 as a date in UTC."""
    number = _number(value)
    try:
        return None if not number else datetime.fromtimestamp(number, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError):
        return None


def _datasets(metadata: Mapping[str, str]) -> dict[str, object]:
    """The folders that were trained on, with their images and repeats, and the most frequent tags."""
    facts: dict[str, object] = {}
    folders = {
        name: {"images": entry["img_count"], "repeats": entry["n_repeats"]}
        for name, entry in _object(metadata, "ss_dataset_dirs").items()
        if isinstance(entry, dict) and all(type(entry.get(key)) is int for key in ("img_count", "n_repeats"))
    }
    if folders:
        facts["datasets"] = folders
    tags: Counter[str] = Counter()
    for frequencies in _object(metadata, "ss_tag_frequency").values():
        for tag, number in frequencies.items() if isinstance(frequencies, dict) else ():
            if type(number) is int and 0 < number < 1 << 53:
                tags[re.sub(r"\s+", " ", tag).strip()] += number
    if tags:
        facts["tags"] = dict(tags.most_common(MOST_TAGS))
    return facts


def _object(metadata: Mapping[str, str], key: str) -> dict[str, object]:
    """A JSON object of the metadata; empty where there is none, or something else."""
    value = metadata.get(key, "")
    try:
        found = json.loads(value) if len(value) <= MAX_JSON else {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
