"""What the records of all merge tools have in common: models, a title, the file that was made."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergekit_sd.errors import InputError
from mergekit_sd.formats.tensor import ModelFile

A1111_KEY, MODELS_KEY = "sd_merge_recipe", "sd_merge_models"
SLOTS = ("a", "b", "c")
DAMAGED = "The recipe in its metadata is damaged."
NO_COUNTERPART = "Its record is of a merge that has no counterpart here: "
LOOK = "`mergekit-sd inspect` shows the record"
_SHA256 = re.compile("[0-9a-fA-F]{64}")


class NoRecipe(InputError):
    """The file's metadata holds no recipe that can be understood."""


@dataclass(frozen=True)
class Recovered:
    """A recipe found in a file: as plain data, and what a reader should know.

    `source`: "mergekit-sd", "a1111" or "supermerger". `content`: each model's content hash, where
    the record has it.
    """

    source: str
    data: dict[str, Any]
    content: Mapping[str, str]
    notes: tuple[str, ...]


def metadata_object(file: ModelFile, key: str) -> dict[str, Any]:
    """The JSON object under a key of a file's metadata."""
    try:
        value = json.loads(file.metadata[key])
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise NoRecipe(DAMAGED, file=file.path, key=key, hint=LOOK)
    return value


def refused(file: ModelFile, message: str) -> NoRecipe:
    """A refusal of the record in a file."""
    return NoRecipe(message, file=file.path, key=A1111_KEY, hint=LOOK)


def models_said(file: ModelFile, known: dict[str, Any], said: list[Any]) -> dict[str, Any]:
    """What a record says of its models, by slot: a sha256 whose file the other record names, or a name."""
    models: dict[str, Any] = {}
    for slot, what in zip(SLOTS, said, strict=False):
        if not isinstance(what, str) or not what:
            raise NoRecipe(f"Its record does not say which file model {slot} was.", file=file.path, hint=LOOK)
        if not _SHA256.fullmatch(what):
            models[slot] = {"file": portable(what.split(" [")[0])}
            continue
        entry = known.get(what)
        name = entry.get("name") if isinstance(entry, dict) else None
        models[slot] = {"file": portable(str(name or f"{what[:10]}.safetensors")), "sha256": what.lower()}
    return models


def portable(name: str) -> str:
    """A path as the WebUI on Windows writes it, with slashes."""
    return name.replace("\\", "/")


def recipe_of(
    file: ModelFile, record: dict[str, Any], models: dict[str, Any], steps: dict[str, Any], output: dict[str, Any]
) -> dict[str, Any]:
    """The recipe's data: the models that were merged, the steps, and the file as its output."""
    title = str(record.get("custom_name") or file.path.stem)
    data: dict[str, Any] = {"recipe": 1, "title": title, "models": models}
    if steps:
        data["steps"] = steps
    return {**data, "outputs": {"output": {**output, "file": file.path.name}}}
