"""Which models of the library are nearest to one: ASimilarity, and the cosine of each of the UNet's blocks.

Owns the comparison of signatures and their way into the index: one is made when it is first asked for, and
kept while its file stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from mergekit_sd import architectures
from mergekit_sd.errors import Cancelled, InputError, MissingTensors
from mergekit_sd.events import CancelToken, Event, Listener, ignore
from mergekit_sd.library.entry import LibraryEntry, entry_of, open_header, whole_path
from mergekit_sd.library.index import Library
from mergekit_sd.library.signature import METHOD, Response, Sampled, Signature, attention_blocks, make_signature


@dataclass(frozen=True, slots=True)
class ModelCompared(Event):
    """One more model is compared: `done` of `files`."""

    kind: ClassVar[str] = "compared"
    path: str
    done: int
    files: int


@dataclass(frozen=True, slots=True)
class SimilarModel:
    """A model, and how near it is to the one asked for.

    `asimilarity` is in percent; None where a block that it needs is missing, of another size or not finite.
    `blocks` are the cosines by block, estimated from samples; None where the blocks cannot be compared.
    """

    path: Path
    architecture: str | None
    asimilarity: float | None
    blocks: Mapping[str, float | None]

    @property
    def cosine(self) -> float | None:
        """The mean of the blocks' cosines."""
        known = [each for each in self.blocks.values() if each is not None]
        return sum(known) / len(known) if known else None

    @property
    def most_different(self) -> tuple[str, float] | None:
        """The block with the lowest cosine; None if all of them are the same."""
        known = [(block, each) for block, each in self.blocks.items() if each is not None and each < 1]
        return min(known, key=lambda item: item[1], default=None)

    def as_json(self) -> dict[str, object]:
        """One object, with every block."""
        lowest = self.most_different
        return {
            "path": str(self.path),
            "architecture": self.architecture,
            "asimilarity": self.asimilarity,
            "cosine": self.cosine,
            "most_different": None if lowest is None else lowest[0],
            "blocks": dict(self.blocks),
        }


@dataclass(frozen=True, slots=True)
class Similarity:
    """The models of one family in the library, the nearest to `path` first.

    `attention` are the blocks that ASimilarity is the mean of; `unread` tells which models could not be read.
    """

    path: Path
    family: str
    attention: tuple[str, ...]
    models: tuple[SimilarModel, ...]
    unread: Mapping[Path, str]

    def as_json(self) -> dict[str, object]:
        """The report as plain data."""
        return {
            "path": str(self.path),
            "family": self.family,
            "attention": list(self.attention),
            "models": [model.as_json() for model in self.models],
            "unread": [{"path": str(path), "error": error} for path, error in self.unread.items()],
        }


def find_similar(path: str | Path, *, on_event: Listener = ignore, cancel: CancelToken | None = None) -> Similarity:
    """Compare a model with all of its family in the library, but for itself and its links.

    The first time, some 40 MB are read of each model; then the index has what is needed. Raises an InputError
    for a file that cannot be read, MissingTensors if it has no UNet of a known family, Cancelled when asked to
    stop: what was read by then is kept.
    """
    opened = open_header(Path(path))
    architecture = opened.layout.architecture
    if architecture is None or "unet" not in opened.layout.prefixes:
        hint = "name a checkpoint or a UNet of a known family"
        raise MissingTensors("This model has no UNet that could be compared.", file=path, hint=hint)
    own = replace(entry_of(opened), path=whole_path(Path(path)))
    compared: list[SimilarModel] = []
    unread: dict[Path, str] = {}
    with Library() as library:
        ours = _signature(library, own)
        others = [entry for entry in library.entries() if _is_of_family(entry, architecture.family)]
        others = [entry for entry in others if not _is_same_file(entry, own) and entry.is_current()]
        for number, entry in enumerate(others, start=1):
            if cancel and cancel.cancelled:
                raise Cancelled
            try:
                theirs = _signature(library, entry)
            except InputError as error:
                unread[entry.path] = error.message
                continue
            compared.append(_compared(entry, ours, theirs, attention_blocks(opened.layout)))
            on_event(ModelCompared(str(entry.path), number, len(others)))
    nearest = sorted(compared, key=_nearness, reverse=True)
    return Similarity(Path(path), architecture.family, attention_blocks(opened.layout), tuple(nearest), unread)


def _is_of_family(entry: LibraryEntry, family: str) -> bool:
    if entry.error or entry.architecture is None or "unet" not in entry.components:
        return False
    return architectures.get(entry.architecture).family == family


def _is_same_file(entry: LibraryEntry, own: LibraryEntry) -> bool:
    return entry.state == own.state if own.state.inode else entry.path == own.path


def _signature(library: Library, entry: LibraryEntry) -> Signature:
    """A model's signature, from the index or made now; kept only of a file that the index has."""
    kept = library.signature(entry, METHOD)
    found = Signature.from_bytes(kept) if kept else None
    if found is None:
        found = make_signature(open_header(entry.path))
        library.add_signature(entry, METHOD, found.to_bytes())
    return found


def _compared(entry: LibraryEntry, ours: Signature, theirs: Signature, attention: Iterable[str]) -> SimilarModel:
    blocks = {block: block_cosine(sampled, theirs.samples.get(block)) for block, sampled in ours.samples.items()}
    each = [row_cosine(ours.responses.get(block), theirs.responses.get(block)) for block in attention]
    known = [cosine for cosine in each if cosine is not None]
    asimilarity = 100 * sum(known) / len(known) if known and len(known) == len(each) else None
    return SimilarModel(entry.path, entry.architecture, asimilarity, blocks)


def _nearness(model: SimilarModel) -> tuple[float, float]:
    """ASimilarity as it is shown, then the cosine: two copies of one model do not change places by rounding."""
    asimilarity = -1.0 if model.asimilarity is None else round(model.asimilarity, 2)
    return asimilarity, -1.0 if model.cosine is None else model.cosine


def block_cosine(a: Sampled, b: Sampled | None) -> float | None:
    """The cosine of two blocks by their samples; of values that are not finite in either, none counts."""
    import numpy as np

    if b is None or a.shapes != b.shapes or len(a.values) != len(b.values):
        return None
    if np.array_equal(a.values, b.values):
        return 1.0
    both = np.isfinite(a.values) & np.isfinite(b.values)
    x, y = a.values[both].astype(np.float64), b.values[both].astype(np.float64)
    length = float(np.sqrt((x @ x) * (y @ y)))
    return max(-1.0, min(1.0, float(x @ y) / length)) if length else None


def row_cosine(a: Response | None, b: Response | None) -> float | None:
    """The mean cosine of the rows of two responses; 0 for a row that is zero, as torch has it."""
    import numpy as np

    if a is None or b is None or a.size != b.size:
        return None
    _, in_a, in_b = np.intersect1d(a.places, b.places, assume_unique=True, return_indices=True)
    products = a.values[in_a].astype(np.float64) * b.values[in_b]
    dots = np.bincount(a.places[in_a] // a.size, weights=products, minlength=a.size)
    squares = [
        np.bincount(each.places // each.size, weights=each.values.astype(np.float64) ** 2, minlength=each.size)
        for each in (a, b)
    ]
    lengths = np.sqrt(squares[0] * squares[1])
    return float(np.mean(np.divide(dots, lengths, out=np.zeros(a.size), where=lengths > 0)))
