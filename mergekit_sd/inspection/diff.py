"""How two models differ, block by block: what is in which file, and how far the values lie apart.

Owns the meeting of two files' names, the streaming through both, and the report. The arithmetic is
`distance`'s. Must not know how the report is shown.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from mergekit_sd.architectures import Layout, Role, detect
from mergekit_sd.errors import Cancelled
from mergekit_sd.events import CancelToken
from mergekit_sd.formats.dtypes import F64
from mergekit_sd.formats.hashing import default_threads
from mergekit_sd.formats.open import open_model
from mergekit_sd.formats.reading import InputFile
from mergekit_sd.formats.tensor import ModelFile, TensorInfo
from mergekit_sd.inspection.distance import Distance, Measurer
from mergekit_sd.inspection.naming import bare_name
from mergekit_sd.inspection.streaming import CHUNK, Buffer, Piece, batches, in_parallel, pieces

State: TypeAlias = Literal["equal", "different", "shape", "only_a", "only_b"]
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class TensorDiff:
    """One tensor of either file, or of both. `name` is as A stores it, else as B does."""

    name: str
    group: str
    state: State
    shape_a: tuple[int, ...] | None
    shape_b: tuple[int, ...] | None
    distance: Distance | None

    def as_json(self) -> dict[str, object]:
        """One flat object; measures are null where the tensor is not in both files with one shape."""
        return {
            "name": self.name,
            "group": self.group,
            "state": self.state,
            "shape_a": self.shape_a,
            "shape_b": self.shape_b,
            **_measures(self.distance or Distance(), known=self.distance is not None),
        }


@dataclass(frozen=True, slots=True)
class GroupDiff:
    """The tensors of a block, of a component without blocks, or of both models (`name` "weights").

    `compared` counts those in both files with one shape, `equal` those of them without a difference.
    `largest_in` names the tensor with the largest absolute change.
    """

    name: str
    distance: Distance
    largest_in: str | None
    compared: int
    equal: int
    shape: int
    only_a: int
    only_b: int

    def as_json(self) -> dict[str, object]:
        """One flat object."""
        return {
            "name": self.name,
            **_measures(self.distance, known=self.compared > 0),
            "largest_in": self.largest_in,
            "compared": self.compared,
            "equal": self.equal,
            "shape": self.shape,
            "only_a": self.only_a,
            "only_b": self.only_b,
        }


@dataclass(frozen=True, slots=True)
class FileSide:
    """One of the two files."""

    path: str
    kind: str
    architecture: str | None

    def as_json(self) -> dict[str, object]:
        """One flat object."""
        return {"path": self.path, "kind": self.kind, "architecture": self.architecture}


@dataclass(frozen=True, slots=True)
class Diff:
    """Two files, compared. `groups` are in the order of the model: blocks, components, the rest.

    `total` is of the weights alone: schedule buffers are large numbers, and EMA copies count twice.
    """

    a: FileSide
    b: FileSide
    groups: Sequence[GroupDiff]
    total: GroupDiff
    tensors: Sequence[TensorDiff] = field(repr=False)

    @property
    def same(self) -> bool:
        """Whether both have the same tensors with the same values (dtypes may differ)."""
        return all(each.state == "equal" for each in self.tensors)

    def of_state(self, state: State) -> list[TensorDiff]:
        """The tensors of that state, in the files' order."""
        return [each for each in self.tensors if each.state == state]

    def most_changed(self) -> list[TensorDiff]:
        """The tensors whose values differ, the largest relative change first."""

        def change(each: TensorDiff) -> float:
            relative = each.distance.relative_l2 if each.distance else 0.0
            return float("inf") if relative is None else relative

        return sorted(self.of_state("different"), key=change, reverse=True)

    def as_json(self, *, tensors: bool = False) -> dict[str, object]:
        """The object that `diff --json` prints; `tensors` adds those that differ, most changed first."""
        report: dict[str, object] = {
            "a": self.a.as_json(),
            "b": self.b.as_json(),
            "same": self.same,
            "total": self.total.as_json(),
            "groups": [group.as_json() for group in self.groups],
            "shape": [
                {"name": each.name, "shape_a": each.shape_a, "shape_b": each.shape_b} for each in self.of_state("shape")
            ],
            "only_a": [each.name for each in self.of_state("only_a")],
            "only_b": [each.name for each in self.of_state("only_b")],
        }
        return {**report, "tensors": [each.as_json() for each in self.most_changed()]} if tensors else report


def _measures(distance: Distance, *, known: bool) -> dict[str, object]:
    return {
        "relative_l2": distance.relative_l2 if known else None,
        "cosine": distance.cosine if known else None,
        "largest": distance.largest if known else None,
        "nonfinite": distance.nonfinite,
    }


def diff_files(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    on_progress: OnProgress | None = None,
    cancel: CancelToken | None = None,
) -> Diff:
    """Compare two model files. Raises an InputError for a file that is none, Cancelled if asked to stop.

    `on_progress` is called in this thread with the bytes done and the bytes in all.
    """
    models = (open_model(a), open_model(b))
    layouts = (detect(models[0].tensors), detect(models[1].tensors))
    pairs = list(_pairs(models, layouts))
    distances = _distances(models, [pair for pair in pairs if pair.comparable], on_progress, cancel)
    tensors = [pair.result(distances.get(number)) for number, pair in enumerate(pairs)]
    sides = [
        FileSide(str(path), layout.kind, None if layout.architecture is None else layout.architecture.name)
        for path, layout in zip((a, b), layouts, strict=True)
    ]
    return Diff(sides[0], sides[1], _groups(tensors, layouts), _total(tensors), tensors)


# --- which tensors meet ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Pair:
    """A tensor of A, of B, or one of each that go by the same name. `number` counts the pairs."""

    number: int
    group: str
    a: TensorInfo | None
    b: TensorInfo | None

    @property
    def comparable(self) -> bool:
        return self.a is not None and self.b is not None and self.a.shape == self.b.shape

    def result(self, distance: Distance | None) -> TensorDiff:
        state: State = "shape"
        if self.a is None:
            state = "only_b"
        elif self.b is None:
            state = "only_a"
        elif distance is not None:
            state = "equal" if distance.equal else "different"
        named = self.a or self.b
        assert named is not None
        shapes = [None if tensor is None else tensor.shape for tensor in (self.a, self.b)]
        return TensorDiff(named.name, self.group, state, shapes[0], shapes[1], distance)


def _pairs(models: tuple[ModelFile, ModelFile], layouts: tuple[Layout, Layout]) -> Iterator[_Pair]:
    """Every tensor of A in its order, with its like in B; then those only in B."""
    partners = _partners(models, layouts)
    met = set(partners.values())
    groups = tuple(_GroupNames(layout) for layout in layouts)
    numbers = itertools.count()
    for stored, tensor in models[0].tensors.items():
        partner = partners.get(stored)
        group = groups[0].of(stored)
        if partner is not None and group == Role.unknown:  # the other file may know better
            group = groups[1].of(partner)
        yield _Pair(next(numbers), group, tensor, None if partner is None else models[1].tensors[partner])
    for stored, tensor in models[1].tensors.items():
        if stored not in met:
            yield _Pair(next(numbers), groups[1].of(stored), None, tensor)


def _partners(models: tuple[ModelFile, ModelFile], layouts: tuple[Layout, Layout]) -> dict[str, str]:
    """The stored name in B for a stored name in A: by the canonical names, else by those without prefix."""
    whole = {layouts[1].canonical[stored]: stored for stored in models[1].tensors}
    partners = {
        stored: whole[layouts[0].canonical[stored]]
        for stored in models[0].tensors
        if layouts[0].canonical[stored] in whole
    }
    taken = set(partners.values())
    bare = {bare_name(layouts[1], stored): stored for stored in models[1].tensors if stored not in taken}
    for stored in models[0].tensors:
        name = bare_name(layouts[0], stored)
        if stored not in partners and name in bare:
            partners[stored] = bare[name]
    return partners


class _GroupNames:
    """The group of each tensor of a file: its block, else its component, else its role."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def of(self, stored: str) -> str:
        place = self._layout.places[self._layout.canonical[stored]]
        return place.block or place.component or place.role.value


# --- the pass through both files -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Step:
    """One piece of a pair."""

    number: int
    a: Piece
    b: Piece

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.b.nbytes


def _distances(
    models: tuple[ModelFile, ModelFile],
    pairs: Sequence[_Pair],
    on_progress: OnProgress | None,
    cancel: CancelToken | None,
) -> Mapping[int, Distance]:
    """The distance of each pair, by its number."""
    # Along A: reading forward is what disks are good at.
    steps = sorted((step for pair in pairs for step in _steps(pair)), key=lambda step: step.a.tensor.offset)
    found = {pair.number: Distance() for pair in pairs}
    total, done = sum(step.nbytes for step in steps), 0

    def take(batch: list[_Step], distances: Sequence[Distance]) -> None:
        nonlocal done
        for step, distance in zip(batch, distances, strict=True):
            found[step.number].add(distance)
            done += step.nbytes
        if on_progress:
            on_progress(done, total)
        if cancel and cancel.cancelled:
            raise Cancelled

    with (
        closing(InputFile.of(models[0])) as file_a,
        closing(InputFile.of(models[1])) as file_b,
    ):
        tasks = batches(steps, lambda step: step.nbytes)
        in_parallel(tasks, lambda: _comparer(file_a, file_b), take, default_threads())
        file_a.check_unchanged()
        file_b.check_unchanged()
    return found


def _steps(pair: _Pair) -> Iterator[_Step]:
    assert pair.a is not None
    assert pair.b is not None
    for piece_a, piece_b in zip(pieces(pair.a), pieces(pair.b), strict=True):
        yield _Step(pair.number, piece_a, piece_b)


def _comparer(file_a: InputFile, file_b: InputFile) -> Callable[[list[_Step]], list[Distance]]:
    buffer_a, buffer_b, measure = Buffer(CHUNK * F64.itemsize), Buffer(CHUNK * F64.itemsize), Measurer()

    def compare(step: _Step) -> Distance:
        data_a, data_b = buffer_a.read(file_a, step.a), buffer_b.read(file_b, step.b)
        return measure(data_a, step.a.tensor.dtype, data_b, step.b.tensor.dtype)

    return lambda batch: [compare(step) for step in batch]


# --- the report ------------------------------------------------------------------------------------


def _groups(tensors: Sequence[TensorDiff], layouts: Iterable[Layout]) -> list[GroupDiff]:
    """Blocks in the UNet's order, then components, then roles of what belongs to none."""
    members: dict[str, list[TensorDiff]] = {}
    for layout in layouts:
        if layout.architecture is not None:
            names = (*layout.architecture.blocks, *layout.architecture.components)
            members.update({name: members.get(name, []) for name in names})
    members.update({role.value: [] for role in Role})
    for tensor in tensors:
        members.setdefault(tensor.group, []).append(tensor)
    return [_group(name, every) for name, every in members.items() if every]


def _total(tensors: Sequence[TensorDiff]) -> GroupDiff:
    besides = (Role.schedule, Role.marker, Role.ema, Role.junk)
    return _group("weights", [tensor for tensor in tensors if tensor.group not in besides])


def _group(name: str, tensors: Sequence[TensorDiff]) -> GroupDiff:
    total = Distance()
    largest_in: str | None = None
    for tensor in tensors:
        if tensor.distance is not None:
            if tensor.distance.largest > total.largest:
                largest_in = tensor.name
            total.add(tensor.distance)
    states = [tensor.state for tensor in tensors]
    return GroupDiff(
        name,
        total,
        largest_in,
        compared=states.count("equal") + states.count("different"),
        equal=states.count("equal"),
        shape=states.count("shape"),
        only_a=states.count("only_a"),
        only_b=states.count("only_b"),
    )
