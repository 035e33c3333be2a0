"""Recipes out of the records that other tools leave in a file: A1111's merger and supermerger.

This room must not know our own recipe's metadata, nor how a recipe is planned.
"""

from __future__ import annotations

from mergekit_sd.foreign.a1111 import read_a1111
from mergekit_sd.foreign.records import (
    A1111_KEY,
    DAMAGED,
    LOOK,
    MODELS_KEY,
    NoRecipe,
    Recovered,
    metadata_object,
)
from mergekit_sd.foreign.supermerger import read_supermerger
from mergekit_sd.formats.tensor import ModelFile

__all__ = ["A1111_KEY", "DAMAGED", "LOOK", "NoRecipe", "Recovered", "metadata_object", "read_record"]


def read_record(file: ModelFile) -> Recovered:
    """The recipe that another tool's record in a file tells of. Raises NoRecipe."""
    record = metadata_object(file, A1111_KEY)
    known = metadata_object(file, MODELS_KEY) if MODELS_KEY in file.metadata else {}
    read = read_supermerger if "supermerger" in str(record.get("type")) else read_a1111
    return read(file, record, known)
