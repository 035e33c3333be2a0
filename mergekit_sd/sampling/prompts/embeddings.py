"""Textual inversions: files that stand for words of a prompt, and their vectors.

Owns where they are looked for, which words name them, and whether they fit the text encoders. As in the WebUI a
file's name is its word, and what is compared are CLIP's ids: upper and lower case are the same, spaces do not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_sd.architectures import detect
from mergekit_sd.errors import FamilyMismatch, MissingInput, ShapeMismatch
from mergekit_sd.formats.open import open_model, read_bytes
from mergekit_sd.formats.tensor import ModelFile
from mergekit_sd.lazy import torch
from mergekit_sd.planning.expression import Read
from mergekit_sd.planning.forms import BOTH_ENCODERS, vectors_of
from mergekit_sd.planning.models import model_of_file
from mergekit_sd.recipe.load import ModelRef
from mergekit_sd.sampling.prompts.tokens import CHUNK, Word, ids_of
from mergekit_sd.text import count, shown

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".pt", ".bin", ".safetensors")
LARGEST = 32 * 2**20  # bytes; 75 vectors of both of SDXL's encoders take 0.6 MB: more is a model
_HINT = "`mergekit-sd inspect` tells what a file is for"


def find_embeddings(folders: Iterable[str | Path], models: Iterable[str | Path] = ()) -> dict[str, Path]:
    """Files that may be textual inversions, by the word that names each: the file's name without its suffix.

    They are looked for in folders and what is below them, then beside the models. Of one name the first counts.
    Files are opened only when a prompt names them. Raises MissingInput for a folder that is not there.
    """
    found: dict[str, Path] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise MissingInput("There is no such folder of textual inversions.", file=folder, hint="name another one")
        _add(found, folder.rglob("*"))
    for model in map(Path, models):
        _add(found, model.parent.glob("*"))
    return found


def _add(found: dict[str, Path], paths: Iterable[Path]) -> None:
    for path in sorted(paths):
        if path.suffix.lower() in SUFFIXES and path.is_file() and path.stat().st_size <= LARGEST:
            found.setdefault(path.stem, path)


def load_embedding(path: str | Path, widths: Sequence[int]) -> tuple[Tensor, ...] | None:
    """A textual inversion's vectors, (n, width) for each text encoder, in the file's dtype; None for any other file.

    `widths`: of the model's text encoders. Raises what opening raises, FamilyMismatch for vectors of other widths,
    ShapeMismatch for SDXL's two of different numbers or more than a chunk takes.
    """
    file = open_model(path)
    layout = detect(file.tensors)
    if layout.kind != "embedding":
        return None
    name = Path(path).stem
    by_encoder = vectors_of(model_of_file(0, ModelRef(name, str(path)), file, layout)).tensors
    order = BOTH_ENCODERS if len(by_encoder) > 1 else ("",)
    found = tuple(_vectors(file, by_encoder[encoder]) for encoder in order)
    theirs = [each.shape[-1] for each in found]
    if theirs != list(widths):
        message = f'The textual inversion "{shown(name)}" is for {_words(theirs)}; the model has {_words(widths)}.'
        raise FamilyMismatch(message, file=path, hint=_HINT)
    numbers = {len(each) for each in found}
    if len(numbers) > 1 or max(numbers) > CHUNK:
        message = f'The textual inversion "{shown(name)}" has {count(max(numbers), "vector")}'
        why = f" for one text encoder and {min(numbers)} for the other." if len(numbers) > 1 else f", above {CHUNK}."
        raise ShapeMismatch(message + why, file=path, hint=_HINT)
    return found


def _vectors(file: ModelFile, said: object) -> Tensor:
    assert isinstance(said, Read)
    data = bytearray(read_bytes(file, said.tensor))
    dtype: torch.dtype = getattr(torch, said.dtype.torch_name)
    values = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return values.reshape(-1, said.shape[-1])


def _words(widths: Sequence[int]) -> str:
    """The text encoders of some widths, in words."""
    return f"text encoder{'s' if len(widths) > 1 else ''} of width {' and '.join(map(str, widths))}"


class Embeddings:
    """The textual inversions that a prompt may name, and the vectors of those that were named."""

    def __init__(self, files: Mapping[str, Path], widths: Sequence[int]) -> None:
        self.loaded: dict[str, tuple[Tensor, ...] | None] = {}
        self._files = files
        self._widths = widths

    def find(self, ids: Sequence[int], place: int) -> Word | None:
        """The textual inversion named at a place of a text's ids, by the longest name. Raises as `load_embedding`."""
        for named, name in self._by_first_id.get(ids[place], ()):
            if tuple(ids[place : place + len(named)]) == named:
                vectors = self._load(name)
                if vectors and len(vectors[0]):
                    return Word(name, len(named), len(vectors[0]))
        return None

    def _load(self, name: str) -> tuple[Tensor, ...] | None:
        if name not in self.loaded:
            self.loaded[name] = load_embedding(self._files[name], self._widths)
        return self.loaded[name]

    @cached_property
    def _by_first_id(self) -> Mapping[int, Sequence[tuple[tuple[int, ...], str]]]:
        found: dict[int, list[tuple[tuple[int, ...], str]]] = {}
        for name in self._files:
            if ids := ids_of(name):
                found.setdefault(ids[0], []).append((ids, name))
        return {first: sorted(names, key=lambda each: -len(each[0])) for first, names in found.items()}
